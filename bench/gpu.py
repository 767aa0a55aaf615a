"""The first run on a card, in ten minutes: one report, which can be attached to an issue.

    python bench/gpu.py                     every part; the report is also written to gpu-report.txt
    python bench/gpu.py --only waits draws  some of them
    python bench/gpu.py --device cpu        the same at small sizes, in 2 minutes: that the script works

A line says PASS or DIFFERS where something must hold, else it has a figure to compare. Each part stands
alone. None needs a network, as weights are random. Where a part fails the report says why, and the next one
runs. Exit code 1 if anything differs.
"""
import argparse
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import common
from common import (QWEN3_06B, ROOT, TINY, Config, Transformer, config_of, full, interleaved, machine,
                    peak_memory)

import torch
import torch.nn.functional as F

import sample as sampling
import test_gpu
import train
from grpo import Objective, response_logprobs, update
from model import compiled, fused_logprobs, naive_logprobs
from plumbing import nucleus
from plumbing.family import make_family
from plumbing.optimizer import Optimizer
from plumbing.terminal import pick_device
from pretend import pretend

QWEN3_17B = dict(QWEN3_06B, hidden_size=2_048, intermediate_size=6_144)
SHORT = dict(QWEN3_06B, num_hidden_layers=4)  # what needs the right widths but not all layers
seeded = lambda: torch.Generator().manual_seed(0)
LINES, gpu, device = [], True, "cuda"


def say(what, found, ok=None):
    LINES.append(f"{what:58} {found}{'' if ok is None else '  PASS' if ok else '  DIFFERS'}")
    print(LINES[-1], flush=True)


def random_model(config, dtype=torch.bfloat16, where=None):
    with torch.device(where or device):
        torch.manual_seed(0)
        model = Transformer(config_of(config))
    for name, p in model.named_parameters():
        torch.nn.init.normal_(p, float("norm" in name), 0.02 if p.dim() > 1 else 0.1)
    return model.to(dtype)


def prompts_of(count, length, vocabulary):
    return torch.randint(1, vocabulary, (count, length), generator=seeded()).tolist()


def small_family(place):
    family, sizes = Path(place, "family"), {"explorer": (16, 1), "learner": (32, 2)}
    make_family(family, "natural", sizes=sizes, corpus_size=256, epochs=1)
    return family


def seconds(call, repeats=3):
    return interleaved({"": call}, repeats)[""]


# ---- is it right? ------------------------------------------------------------------------------------------

def versions():
    say("machine", machine())
    if gpu:
        at = torch.cuda.get_device_properties(0)
        say("card", f"{at.total_memory / 2 ** 30:.0f} GiB, capability {at.major}.{at.minor}, "
                    f"{at.multi_processor_count} processors, CUDA {torch.version.cuda}, "
                    f"cuDNN {torch.backends.cudnn.version()}")
    say("PYTORCH_CUDA_ALLOC_CONF", os.environ.get("PYTORCH_CUDA_ALLOC_CONF"))


def same():
    """Log-probs and gradients of one batch on the CPU in float32, and here."""
    prompts, ids = prompts_of(3, 20, 500), torch.randint(500, (12, 24), generator=seeded())
    mask, groups = torch.arange(24) < torch.randint(1, 25, (12, 1), generator=seeded()), torch.arange(12) // 4

    def run(where, dtype):
        model = random_model(TINY, torch.float32, "cpu").to(where, dtype)
        logps, _ = response_logprobs(model, prompts, groups, ids.to(where), mask)
        (logps * torch.randn(logps.shape, generator=seeded()).to(where)).sum().backward()
        gradient = torch.cat([p.grad.flatten().cpu().double() for p in model.parameters()])
        return logps.detach().cpu().double(), gradient
    logps, gradient = run("cpu", torch.float32)
    for dtype, far in ((torch.float32, 1e-4), (torch.bfloat16, 0.05)):
        ours, its = run(device, dtype)
        gap, angle = (ours - logps).abs().max().item(), F.cosine_similarity(its, gradient, 0).item()
        say(f"{dtype}: largest difference of a log-prob to the CPU's", f"{gap:.1e}", gap < far)
        say(f"{dtype}: cosine of the gradient with the CPU's", f"{angle:.6f}", angle > 1 - far)


def runs():
    """train.py as a user starts it: plain, and with most of what can be switched on, resumed."""
    with tempfile.TemporaryDirectory() as place:
        family = common.laptop_family() if gpu else small_family(place)

        def start(name, *more):
            flags = (f"train.py --learner {family}/learner --explorer {family}/explorer --eval-every 0 "
                     f"--data {family}/train.jsonl --max-new-tokens 16 --save-every 1 --device {device} "
                     f"--out {place}/{name}")
            done = subprocess.run([sys.executable, *flags.split(), *more], cwd=ROOT, capture_output=True,
                                  text=True, env=os.environ | {"CUDA_LAUNCH_BLOCKING": "1"})
            last = done.stderr.strip().splitlines()[-1:]
            say(f"train.py {' '.join(more)}",
                f"exit code {done.returncode} {last if done.returncode else ''}", not done.returncode)
            line = json.loads(Path(place, name, "metrics.jsonl").read_text().splitlines()[-1])
            fine = math.isfinite(line["loss"]) and (line["grad_norm"] > 0 or not gpu)  # small: no rewards
            say("  reward, gradient's norm, gap of the learner's log-probs",
                f"{line['reward']:.3f}, {line['grad_norm']:.3f}, {line['logp_gap_learner'] or 0:.1e}", fine)
        start("plain", "--steps", "4")
        more = "--dtype bfloat16 --kl-coef 0.01 --lora-rank 4 --checkpoint-layers".split()
        start("much", "--steps", "2", *more)
        start("much", "--steps", "3", "--resume")


def gap():
    """The sampler's log-probs beside the trainer's, of the same weights in bfloat16."""
    model = random_model(SHORT if gpu else TINY)
    prompts = prompts_of(8, 64, 500)
    r = sampling.sample(model, prompts, 8, seeded(), 128 if gpu else 24, ())
    groups = torch.arange(8).repeat_interleave(8)
    with torch.no_grad():
        logps, _ = response_logprobs(model, prompts, groups, r.ids.flatten(0, 1), r.mask.flatten(0, 1).cpu())
    gap = (logps - r.logps.flatten(0, 1)).abs()
    say("logp_gap in bfloat16: mean, largest", f"{gap.mean():.4f}, {gap.max():.3f}", gap.mean().item() < 0.03)


def waits():
    """How often the host waits for the device, as torch counts it, beside the table of test_gpu.py."""
    def asked(call):
        if not gpu:
            with pretend() as seen:
                call("cuda")
            return sum(seen.counts.values())
        call(device)  # what happens only once
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                call(device)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        return sum("synchroniz" in str(warning.message) for warning in said)
    tokens = lambda n: asked(lambda at: test_gpu.sampled(at, tokens=n, stops=()))
    parts = lambda size, m: asked(lambda at: test_gpu.updated(at, micro_batch_tokens=size, minibatches=m))
    for what, found, most in (
            ("8 tokens of sampling", tokens(16) - tokens(8), 1),
            ("15 parts of an update", parts(1, 1) - parts(10 ** 9, 1), 60),
            ("a mini-batch of one part", parts(10 ** 9, 3) - parts(10 ** 9, 2), 8)):
        say(f"times the device is waited for: {what}", f"{found}, of {most} allowed", found <= most)


def draws():
    """Draws with one row and top-p, and the nucleus by bisection beside the one by sorting."""
    vocabulary, until, count, lost = 151_936 if gpu else 4_096, time.time() + (20 if gpu else 5), 0, 0
    logits = 3 * torch.randn(1, vocabulary, generator=seeded()).to(device)
    while time.time() < until:
        for uniform in torch.rand(200, 1).to(device):
            _, logp = sampling.draw(logits, uniform, top_p=0.95 if count % 400 else 1.0)
            lost += ~logp.isfinite()
        count += 200
    say(f"draws of one row with a log-prob that is not finite, of {count:,}", int(lost), not lost)
    p = (3 * torch.randn(64 if gpu else 8, vocabulary, generator=seeded()).to(device)).softmax(-1)
    sizes = [(~outside(p, 0.95)).sum(1) for outside in (nucleus.by_bisection, nucleus.by_sorting)]
    apart = (sizes[0] - sizes[1]).abs().max().item()
    largest = sizes[1].max().item()
    say("tokens that the nucleus differs by, of the largest", f"{apart} of {largest}",
        apart <= 0.001 * largest)
    times = interleaved({"bisection": lambda: nucleus.by_bisection(p, 0.95),
                         "sorting": lambda: nucleus.by_sorting(p, 0.95)})
    say(f"top-p of {len(p)} rows x {vocabulary:,}: bisection, sorting",
        ", ".join(f"{1e3 * s:.2f} ms" for s in times.values()))


def memory_runs_out():
    """Exit code 3 and one line, whatever the allocator says."""
    with tempfile.TemporaryDirectory() as place:
        family = small_family(place)
        flags = (f"--learner {family}/learner --explorer none --data {family}/train.jsonl --out {place}/run "
                 f"--max-new-tokens 16 --device {device} --prompts-per-step 1000 --group-size "
                 f"{2000 if gpu else 1_000_000}")
        little = "import resource; resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))"
        if gpu:
            of_all = 1e8 / torch.cuda.mem_get_info()[1]
            little = f"import torch; torch.cuda.set_per_process_memory_fraction({of_all})"
        program = f"import plumbing; {little}; import train; train.main({flags.split()})"
        done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
        last = "".join(done.stderr.splitlines()[-1:])
        say("exit code when memory runs out, and why", f"{done.returncode} {last}", done.returncode == 3)


# ---- is it quick? ------------------------------------------------------------------------------------------

def attention():
    """Which kernel each of the three kinds of call takes, and what a step costs with cuDNN's and without."""
    from torch.profiler import ProfilerActivity, profile
    prompts = prompts_of(8, 64, 500)
    for dtype in (torch.float32, torch.bfloat16):
        model = random_model(TINY, dtype)
        r = sampling.sample(model, prompts, 4, seeded(), 16, ())
        with torch.no_grad():
            flight = sampling.Flight(model, 32, 80)
            flight.admit(prompts, flight.look(), torch.arange(32, device=device))
            groups = torch.arange(8).repeat_interleave(4)
            rows = groups, r.ids.flatten(0, 1), r.mask.flatten(0, 1).cpu()
            kinds = {"a prompt": flight.decode, "a token": flight.decode,
                     "an update": lambda: response_logprobs(model, prompts, *rows)}
            for kind, call in kinds.items():
                with profile(activities=[ProfilerActivity.CPU]) as profiled:
                    call()
                names = {e.key.removeprefix("aten::_scaled_dot_product_") for e in profiled.key_averages()
                         if "aten::_scaled_dot_product_" in e.key} or {"our own"}
                math_alone = any("math" in name for name in names) and gpu
                say(f"{dtype}, {kind}: attention's kernel", ", ".join(sorted(names)), not math_alone)
    model = random_model(SHORT if gpu else TINY)
    optimizer = Optimizer(model, 1e-6)
    for cudnn in (False, True) if gpu else (False,):
        torch.backends.cuda.enable_cudnn_sdp(cudnn)
        lengths = itertools.count(90, 7)  # new shapes each time, as real prompts have them
        step = lambda: a_step(model, optimizer, prompts_of(8, next(lengths), 500), 8, 64 if gpu else 8)
        times = [seconds(step, 1) for _ in range(2)]
        say(f"a step with{'' if cudnn else 'out'} cuDNN's attention", f"{statistics.mean(times):.2f} s")
    torch.backends.cuda.enable_cudnn_sdp(False)


def a_step(model, optimizer, prompts, n, tokens, micro_batch_tokens=8192):
    r = sampling.sample(model, prompts, n, seeded(), tokens, ())
    A = torch.randn(r.lengths.shape, generator=seeded()).to(device)
    update(model, None, optimizer, prompts, r, A, Objective(micro_batch_tokens=micro_batch_tokens), seeded())


def graphs():
    """What --compile makes: a graph for each model's decoding step and kernel, without breaks."""
    from torch._dynamo.utils import counters
    torch._dynamo.reset()
    compiled.cache_clear()
    counters.clear()
    model = random_model(TINY, torch.float32)
    model.compiled = True
    started = time.time()
    for length in (20, 45):
        a_step(model, Optimizer(model, 1e-6), prompts_of(4, length, 500), 4, 40)
    breaks = sum(counters["graph_break"].values())
    made = counters["stats"]["unique_graphs"]
    say("--compile: graphs, breaks, seconds", f"{made}, {breaks}, {time.time() - started:.0f}",
        not breaks and made <= 8)


def decoding():
    """Milliseconds and kernels a token, beside model.generate and what memory's speed allows."""
    from torch.profiler import ProfilerActivity, profile
    block = torch.empty(2 ** 30 if gpu else 2 ** 26, dtype=torch.uint8, device=device)
    rate = 2 * block.nbytes / seconds(block.clone)
    square = torch.randn(8192 if gpu else 512, 8192 if gpu else 512, device=device, dtype=torch.bfloat16)
    work = 2 * len(square) ** 3 / seconds(lambda: square @ square)
    say("copy rate, matmul rate in bfloat16", f"{rate / 1e12:.3f} TB/s, {work / 1e12:.2f} TFLOP/s")
    L, new = (128, 64) if gpu else (16, 16)
    for name, config in (("Qwen3-0.6B", QWEN3_06B), ("Qwen3-1.7B", QWEN3_17B)) if gpu else (("tiny", TINY),):
        model = random_model(config)
        weights = sum(p.nbytes for p in model.parameters())
        kv = 2 * config["num_key_value_heads"] * config["head_dim"] * config["num_hidden_layers"]  # a token
        for rows in (16, 64, 256) if gpu else (8,):
            prompts = prompts_of(rows // 8, L, 500)
            run = lambda t=new: sampling.sample(model, prompts, 8, seeded(), t, ())
            token = (seconds(run, 2) - seconds(lambda: run(1), 2)) / (new - 1)
            with profile(activities=[ProfilerActivity.CUDA if gpu else ProfilerActivity.CPU]) as profiled:
                run(9)
            kernels = sum(e.count for e in profiled.key_averages() if gpu or e.key.startswith("aten::")) / 9
            least = (weights + rows * 2 * kv * (L + new / 2)) / rate
            say(f"{name}'s shape, {rows} rows: ms a token",
                f"{1e3 * token:.2f}, {1e3 * least:.2f} at memory's speed ({least / token:.0%}), "
                f"{kernels:.0f} {'kernels' if gpu else 'operations'} a token")
        if config is not QWEN3_17B:
            generate(config, rows, prompts, new)
        del model


def generate(config, rows, prompts, new):
    from transformers import AutoConfig, AutoModelForCausalLM
    with torch.device(device):
        twin = AutoModelForCausalLM.from_config(AutoConfig.for_model(**full(config)))
    twin = twin.to(torch.bfloat16).eval()
    ids = torch.tensor(prompts, device=device).repeat_interleave(8, 0)
    options = dict(attention_mask=torch.ones_like(ids), do_sample=True, top_k=0, pad_token_id=0,
                   eos_token_id=None)
    with torch.no_grad():
        times = [seconds(lambda: twin.generate(ids, max_new_tokens=t, **options), 1) for t in (new, 1)]
    say(f"model.generate, {rows} rows: ms a token", f"{1e3 * (times[0] - times[1]) / (new - 1):.2f}")


def kernel():
    """The log-prob kernel, forward and backward, beside what it replaces."""
    T, H, V, rows = (8_192, 1_024, 151_669, 151_936) if gpu else (256, 64, 4_093, 4_096)
    dtype = torch.bfloat16 if gpu else torch.float32
    h = torch.randn(T, H, device=device, dtype=dtype).requires_grad_()
    w = (torch.randn(rows, H, device=device) * H ** -0.5).to(dtype).requires_grad_()
    targets, upstream = torch.randint(V, (T,), device=device), torch.randn(T, device=device)
    ways = {"chunked, as train.py": lambda: fused_logprobs(h, w[:V], targets)[0],
            "chunked, chunks of 1,024": lambda: fused_logprobs(h, w[:V], targets, chunk=1024)[0],
            "naive": lambda: naive_logprobs(h, w[:V], targets)}
    if hasattr(F, "linear_cross_entropy"):
        ways["F.linear_cross_entropy"] = lambda: -F.linear_cross_entropy(h, w[:V], targets, reduction="none")
    if gpu:
        ways["chunked, compiled"] = lambda: fused_logprobs(h, w[:V], targets, compile=True)[0]
    both = {name: lambda way=way: torch.autograd.grad(way(), (h, w), upstream) for name, way in ways.items()}
    for name, s in interleaved(both, 3).items():
        say(f"log-probs of {T:,} tokens x {V:,}, {name}",
            f"{1e3 * s:.1f} ms, {peak_memory(both[name]) / 1e6:,.0f} MB")


def memory():
    """Peaks of a step's phases beside recipes/plan.py's figures."""
    from recipes.plan import plan
    shape = full(dict(QWEN3_06B, num_hidden_layers=8) if gpu else TINY)
    with tempfile.TemporaryDirectory() as place:
        Path(place, "config.json").write_text(json.dumps(shape))
        args = train.parse_flags(f"--learner {place} --data any --explorer none --prompts-per-step 8 "
                                 "--group-size 8 --max-new-tokens 128 --micro-batch-tokens 4096 "
                                 f"--dtype bfloat16 --device {device}".split())
        planned = [sum(parts.values()) for parts in plan(args, 128)[0].values()]
    model = Transformer(Config.from_hf(shape)).to(device, torch.bfloat16)
    optimizer, prompts = Optimizer(model, 1e-6), prompts_of(8, 128, 500)
    a_step(model, optimizer, prompts, 8, 128, 4096)  # in the first step AdamW has no moments yet
    if not gpu:
        say("peak memory beside recipes/plan.py", "on a CPU: python bench/plan.py")
        return
    phases = {"sampling": lambda: sampling.sample(model, prompts, 8, seeded(), 128, ()),
              "a step": lambda: a_step(model, optimizer, prompts, 8, 128, 4096)}
    for (name, call), plans in zip(phases.items(), (planned[0], max(planned))):
        torch.cuda.reset_peak_memory_stats()
        call()
        peak = torch.cuda.max_memory_allocated()
        say(f"peak memory of {name}: measured, of the plan's",
            f"{peak / 2 ** 30:.2f} GiB, {peak / plans:.2f}")


PARTS = versions, same, runs, gap, waits, draws, memory_runs_out, attention, graphs, decoding, kernel, memory


def main():
    global gpu, device
    parser = argparse.ArgumentParser(description="One report of a first run on a GPU.")
    names = [part.__name__ for part in PARTS]
    parser.add_argument("--only", nargs="+", choices=names, help="these parts alone")
    parser.add_argument("--device", default="auto", help="auto: cuda, then mps, then cpu")
    parser.add_argument("--out", default="gpu-report.txt", help="file of the report")
    args = parser.parse_args()
    device = pick_device(args.device)
    gpu = device.startswith("cuda")
    common.DEVICE = "cuda" if gpu else "cpu"
    for part in PARTS:
        if not args.only or part.__name__ in args.only:
            started = time.time()
            print(f"\n{part.__name__}", flush=True)
            LINES.append(f"\n{part.__name__}: {' '.join((part.__doc__ or '').split())}")
            try:
                part()
            except Exception as error:  # the other parts shall run
                why = " ".join(f"{type(error).__name__}: {error!s:.300}".split())
                say(f"{part.__name__} ended with", why, False)
            LINES.append(f"({time.time() - started:.0f} s)")
            if gpu:
                torch.cuda.empty_cache()
            Path(args.out).write_text("\n".join(LINES) + "\n")
    differs = [line for line in LINES if line.endswith("DIFFERS")]
    verdict = f"\n{len(differs)} lines differ:" if differs else "\nPASS"
    print(verdict, *differs, f"written to {args.out}", sep="\n")
    sys.exit(bool(differs))


if __name__ == "__main__":
    main()
