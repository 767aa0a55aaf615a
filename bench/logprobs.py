"""The fused log-prob kernel against the GEMMs it consists of and against its peers, in time and memory.

    python bench/logprobs.py

Hidden size and vocabulary are SmolLM2-135M's (on a GPU: H = 1,024, V = 151,936). TRL's kernel takes part
where TRL is installed: pip install trl.
"""
from common import DEVICE, interleaved, machine, peak_memory, report, target

import torch
import torch.nn.functional as F

from grpo import policy_loss
from model import fused_logprobs, naive_logprobs

GPU = DEVICE == "cuda"
T, H, V, DTYPE = (8_192, 1_024, 151_936, torch.bfloat16) if GPU else (1_024, 576, 49_152, torch.float32)


def linear_cross_entropy(h, w, targets):
    """Ships with torch 2.13. Its "auto" chunk is several times slower on a CPU than 256 tokens."""
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=256, chunking_method=None)
    return -F.linear_cross_entropy(h, w, targets, reduction="none", options=options)


KERNELS = {"fused, compiled": lambda h, w, t: fused_logprobs(h, w, t, compile=True)[0],
           "fused, not compiled": lambda h, w, t: fused_logprobs(h, w, t)[0],
           "naive": naive_logprobs}
if hasattr(F, "linear_cross_entropy"):
    KERNELS["F.linear_cross_entropy"] = linear_cross_entropy
try:
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE
    KERNELS["TRL's chunked kernel"] = lambda h, w, t: ChunkedLogProbFunction.apply(
        h, w, None, t, 1.0, _CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, ("entropy",))[0]
except ImportError:
    print("TRL is not installed (pip install trl): its kernel is left out")


def inputs(vocabulary=V):
    torch.manual_seed(0)
    new = lambda *shape: torch.randn(*shape, device=DEVICE, dtype=DTYPE)
    h, w = new(T, H).requires_grad_(), (new(vocabulary, H) * H ** -0.5).requires_grad_()
    return h, w, torch.randint(vocabulary, (T,), device=DEVICE), torch.randn(T, device=DEVICE)


def gemms(h, w, logits=1, gradients=False, chunk=None):
    """The GEMMs alone: `logits` times the logits, then d hidden and d weight; in chunks or not."""
    h, w = h.detach(), w.detach()
    z, d_h, d_w = h.new_empty(T, chunk or V), torch.empty_like(h), torch.empty_like(w)

    def run():
        for part, d_part in zip(w.split(chunk or V), d_w.split(chunk or V)):
            for _ in range(logits):
                torch.mm(h, part.T, out=z)
            if gradients:
                torch.mm(z, part, out=d_h)
                torch.mm(z.T, h, out=d_part)
    return run


def one_pass(h, w, targets, advantages, chunk=512):
    """What update does not use: loss and gradients in one pass over chunks of tokens, three GEMMs, because
    d loss / d log-prob is known as soon as a token's log-prob is (not for gspo, whose ratio is the row's)."""
    d_h, d_w = torch.empty_like(h), torch.zeros_like(w)
    for i in range(0, T, chunk):
        z = h[i:i + chunk] @ w.T  # [chunk, V]
        rows = torch.arange(len(z), device=z.device)
        lse = z.logsumexp(-1)
        logps = (z[rows, targets[i:i + chunk]] - lse)[:, None].requires_grad_()
        with torch.enable_grad():
            ones = torch.ones_like(logps)
            loss, _, _ = policy_loss(logps, logps.detach(), advantages[i:i + chunk], ones / T, ones.bool())
            grad, = torch.autograd.grad(loss, logps)
        z.sub_(lse[:, None]).exp_().mul_(-grad)
        z[rows, targets[i:i + chunk]] += grad[:, 0]
        d_h[i:i + chunk] = z @ w
        d_w.addmm_(z.T, h[i:i + chunk])
    return d_h, d_w


def time_table():
    h, w, targets, upstream = inputs()

    def forward(kernel):
        with torch.no_grad():
            kernel(h, w, targets)

    def both(kernel):
        return torch.autograd.grad(kernel(h, w, targets), (h, w), upstream)

    # The limit is the faster of whole and chunked GEMMs: which one that is depends on caches and on luck.
    chunk = 1024 if V % 1024 == 0 else None
    runs = {("GEMM", "forward"): gemms(h, w), ("chunked", "forward"): gemms(h, w, chunk=chunk),
            ("GEMM", "both"): gemms(h, w, 2, True), ("chunked", "both"): gemms(h, w, 2, True, chunk),
            ("3 GEMMs", "both"): gemms(h, w, 1, True),
            ("one pass (not used)", "both"): lambda: one_pass(h.detach(), w.detach(), targets, upstream)}
    for name, kernel in KERNELS.items():
        runs[name, "forward"] = lambda kernel=kernel: forward(kernel)
        runs[name, "both"] = lambda kernel=kernel: both(kernel)
    seconds = interleaved(runs)
    for part in ("forward", "both"):
        seconds["GEMM", part] = min(seconds["GEMM", part], seconds["chunked", part])
    memory = {name: peak_memory(lambda: both(kernel)) for name, kernel in KERNELS.items()}
    print(f"\nT = {T:,}, H = {H:,}, V = {V:,}, {DTYPE}\n"
          f"{'':26}forward  / GEMM   forward + backward  / 4 GEMMs   extra memory")
    for name in ("GEMM", *KERNELS):
        f, b = seconds[name, "forward"], seconds[name, "both"]
        extra = f"{memory[name] / 1e6:10,.0f} MB" if name in memory else ""
        print(f"{name:24}{f:8.3f} s {f / seconds['GEMM', 'forward']:7.2f} {b:17.3f} s "
              f"{b / seconds['GEMM', 'both']:11.2f} {extra}")
    three = seconds["one pass (not used)", "both"] / seconds["3 GEMMs", "both"]
    print(f"one pass, not used: {seconds['one pass (not used)', 'both']:.3f} s, {three:.2f} of three GEMMs")
    if not GPU:
        ours = seconds["fused, compiled", "forward"]
        target("logprob_forward_of_gemm", ours / seconds["GEMM", "forward"], 1.15)
    ours = seconds["fused, compiled", "both"]
    target("logprob_both_of_4_gemms", ours / seconds["GEMM", "both"], 1.25 if GPU else 1.10)
    target("logprob_memory_of_naive", memory["fused, compiled"] / memory["naive"], 0.03)
    for peer in list(KERNELS)[2:]:
        target(f"logprob_both_of_{peer.split()[0]}", ours / seconds[peer, "both"], 1.0)


def memory_table():
    print(f"\nextra memory over a 16-fold range of vocabularies, T = {T:,}, MB\n"
          f"  vocabulary  {'':4}naive  fused, compiled")
    for vocabulary in (V // 16, V // 4, V):
        h, w, targets, upstream = inputs(vocabulary)
        both = lambda kernel: torch.autograd.grad(kernel(h, w, targets), (h, w), upstream)
        extra = [peak_memory(lambda: both(KERNELS[name])) / 1e6 for name in ("naive", "fused, compiled")]
        print(f"  {vocabulary:10,} {extra[0]:10,.0f} {extra[1]:16,.0f}")


if __name__ == "__main__":
    print(machine())
    time_table()
    memory_table()
    report()
