"""The sampler against `model.generate` of transformers and against its own GEMMs.

    python bench/sampler.py

Random weights (the work does not depend on them), prompts of 64 tokens, 64 new ones (SmolLM2: 32),
temperature 1, no nucleus, on both sides. "compiled" is train.py's --compile; its compile time is in the
unmeasured first round.
"""
from unittest import mock

from common import DEVICE, QWEN3_06B, SMOLLM2, TINY, interleaved, machine, pair, report, target

import torch
from transformers import LogitsProcessor, LogitsProcessorList

from sample import KVCache, sample

L = T = 64


def ours(model, prompts, n, stop=False, new=T, compile=False, **settings):
    model.compiled, stops = compile, (0,) if stop else ()
    return sample(model, prompts.tolist(), n, torch.Generator().manual_seed(0), new, stops, **settings)


def theirs(model, prompts, n, processor=None, new=T):
    with torch.no_grad():
        return model.generate(
            prompts, attention_mask=torch.ones_like(prompts), num_return_sequences=n, do_sample=True, top_k=0,
            top_p=1.0, max_new_tokens=new, pad_token_id=0, eos_token_id=0 if processor else None,
            logits_processor=LogitsProcessorList([processor] if processor else []))


def gemms(model, prompts, n, new):
    """The products with a weight that sampling cannot do without: each prompt's once, then new - 1 single
    tokens a row. Without norms, rotation, attention, cache and drawing."""
    layers = [(layer.self_attn.qkv_proj.weight, layer.self_attn.o_proj.weight, layer.mlp.gate_up_proj.weight,
               layer.mlp.down_proj.weight) for layer in model.layers]
    inputs = {(size, columns): torch.randn(size, columns, device=DEVICE, dtype=model.norm.weight.dtype)
              for size in {w.shape[1] for layer in layers for w in layer}
              for columns in (prompts * n, prompts * L, prompts)}

    @torch.no_grad()
    def run():
        for repeats, columns, to_logits in ((1, prompts * L, prompts), (new - 1, prompts * n, prompts * n)):
            for _ in range(repeats):
                for layer in layers:
                    for weight in layer:
                        weight @ inputs[weight.shape[1], columns]
                model.head @ inputs[model.head.shape[1], to_logits]
    return run


def against_generate(label, config, prompts, n, goal, new=T, repeats=5, dtype=torch.float32, compile=False,
                     with_gemms=False):
    model, twin = pair(config, dtype)
    ids = torch.randint(1, config["vocab_size"], (prompts, L), device=DEVICE)
    runs = {"sample": lambda: ours(model, ids, n, new=new),
            "model.generate": lambda: theirs(twin, ids, n, new=new)}
    if compile:
        runs["sample, compiled"] = lambda: ours(model, ids, n, new=new, compile=True)
    if with_gemms:
        runs["its GEMMs alone"] = gemms(model, prompts, n, new)
    seconds = interleaved(runs, repeats)
    print(f"\n{label}: {prompts} prompts x {n} rollouts x {new} tokens")
    for name, s in seconds.items():
        print(f"  {name:20}{s:9.3f} s {prompts * n * new / s:12,.0f} tokens/s")
    more = lambda name, part, goal: target(f"{label}_{name}", part, goal, at_least=True)
    more("vs_generate", seconds["model.generate"] / seconds["sample"], goal)
    if compile:
        more("compiled_vs_generate", seconds["model.generate"] / seconds["sample, compiled"], 1.2 * goal)


class StopAt(LogitsProcessor):
    """Makes row i of model.generate stop with token 0 at its lengths[i]-th token, and not before."""

    def __init__(self, lengths):
        self.lengths, self.step = lengths, 0

    def __call__(self, ids, scores):
        self.step += 1
        scores[:, 0] = torch.where(self.lengths == self.step, 1e4, -1e4)
        return scores


def mixed_lengths():
    """Lengths uniform in 8..64, twice as many prompts as rows in flight."""
    model, twin = pair(TINY)
    prompts, n, in_flight = 32, 8, 128
    ids = torch.randint(1, TINY["vocab_size"], (prompts, L))
    lengths = torch.randint(8, T + 1, (prompts, n))
    # A uniform number of 0 draws token 0; the others are too large to.
    uniform = torch.rand(prompts, n, T) * 0.95 + 0.05
    uniform.scatter_(2, lengths[..., None] - 1, 0.0)

    def ours_mixed(rows, compile=False):
        with mock.patch("torch.rand", return_value=uniform):
            r = ours(model, ids, n, stop=True, rows=rows, compile=compile)
        assert torch.equal(r.lengths, lengths)

    def theirs_mixed():
        half = in_flight // n
        for i in range(0, prompts, half):
            theirs(twin, ids[i:i + half], n, StopAt(lengths[i:i + half].flatten()))

    seconds = interleaved({"sample": lambda: ours_mixed(in_flight), "model.generate": theirs_mixed,
                           "sample, compiled": lambda: ours_mixed(in_flight, compile=True),
                           "sample, all 256 rows at once": lambda: ours_mixed(prompts * n)}, 5)
    print(f"\ntiny, lengths 8..64: {prompts} prompts x {n}, {in_flight} rows in flight")
    for name, s in seconds.items():
        print(f"  {name:30}{s:9.3f} s {lengths.sum().item() / s:12,.0f} useful tokens/s")
    for name, label in (("sample", ""), ("sample, compiled", "compiled_")):
        ratio = seconds["model.generate"] / seconds[name]
        target(f"tiny_mixed_lengths_{label}vs_generate", ratio, 2.7 if label else 2.3, at_least=True)


def scaling():
    """Time per token over a 16-fold range of prompts; the cache's bytes as rows finish."""
    model, _ = pair(TINY)
    print("\ntiny, rows in flight = 8 x prompts\n  prompts   microseconds per token")
    counts = (4, 8, 16, 32, 64)
    runs = {p: lambda p=p: ours(model, torch.randint(1, 512, (p, L)), 8) for p in counts}
    for p, s in interleaved(runs, 3).items():
        print(f"  {p:7d} {1e6 * s / (p * 8 * T):24.1f}")
    uniform, sizes, select = torch.rand(16, 8, T) * 0.95 + 0.05, [], KVCache.select
    for row in range(128):
        uniform[row // 8, row % 8, T * (row // 8 + 1) // 16 - 1] = 0.0

    def spy(cache, rows):
        select(cache, rows)
        if len(rows) < 128:
            sizes.append((len(rows), sum(kv.nbytes for kv in cache.layers)))
    with mock.patch("torch.rand", return_value=uniform), mock.patch.object(KVCache, "select", spy):
        ours(model, torch.randint(1, 512, (16, L)), 8, stop=True)
    print("\ntiny, 128 rows, 8 of them finish every 4 tokens\n  rows left   KV cache, MB")
    for rows, nbytes in sizes:
        print(f"  {rows:9d} {nbytes / 1e6:14.1f}")


def on_a_gpu():
    global L
    L = new = 256
    against_generate("qwen3_0.6b_256_rows", QWEN3_06B, 32, 8, 4.0, new, dtype=torch.bfloat16, compile=True)
    model, _ = pair(QWEN3_06B, torch.bfloat16)
    ids = torch.randint(1, QWEN3_06B["vocab_size"], (32, L), device=DEVICE)
    block = torch.empty(2 ** 30, dtype=torch.uint8, device=DEVICE)
    seconds = interleaved({"sample": lambda: ours(model, ids, 8, new=new, compile=True), "copy": block.clone})
    weights = sum(p.nbytes for p in model.parameters())
    # bf16: k and v, rows, key heads, slots, head size, bytes, layers
    kv = sum(2 * 256 * 8 * (L + t) * 128 * 2 * 28 for t in range(new))
    roofline = (weights * new + kv) / (2 * block.nbytes / seconds["copy"])
    target("qwen3_0.6b_of_bandwidth_roofline", roofline / seconds["sample"], 0.35, at_least=True)


if __name__ == "__main__":
    print(machine())
    if DEVICE == "cuda":
        on_a_gpu()
    else:
        against_generate("tiny", TINY, 16, 8, 2.0, compile=True)
        against_generate("smollm2", SMOLLM2, 2, 8, 1.8, new=32, with_gemms=True)
        mixed_lengths()
        scaling()
    report()
