"""What a run of train.py will need: memory of each phase and FLOPs of a step, before any weight is downloaded.

    python recipes/plan.py --prompt-tokens 300 --learner Qwen/Qwen3-1.7B-Base --explorer Qwen/Qwen3-0.6B-Base \\
        --max-new-tokens 512 --dtype bfloat16 --micro-batch-tokens 4096 --rollout-rows 128 --lora-rank 32

takes train.py's flags and reads nothing but the models' config.json (--learner also takes the path of one). The models are
made on torch's "meta" device, which knows shapes and holds no numbers. The forward pass of one micro-batch is run there,
and what autograd would keep for the backward pass is added up. Every response is as long as it may get, and an update
takes several micro-batches: this is the worst case. `bench/plan.py` compares it with measured peaks.
"""
import argparse
import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train
from anneal import explorer_share, split_group
from grpo import micro_batches
from model import Config, Transformer, add_lora, read_prompts
from sample import KVCache

GIB = 2 ** 30


def size(tensors):
    """Bytes of the distinct storages behind these tensors."""
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


def empty_model(source, dtype):
    """A model of shapes alone, from a directory or hub name, or the path of a config.json."""
    path = Path(source) if str(source).endswith(".json") else Path(source, "config.json")
    if not path.exists():
        from huggingface_hub import hf_hub_download
        path = hf_hub_download(str(source), "config.json")
    try:
        with torch.device("meta"):
            return Transformer(Config.from_hf(json.loads(Path(path).read_text()))).to(dtype)
    except KeyError as error:
        raise ValueError(f"{path}: no {error}") from None


def kept_activations(model, groups, rows, L, T):
    """Bytes that autograd keeps of grpo.py's response_logprobs, up to the final hidden states: `groups` prompts of L tokens,
    `rows` responses of T. (all of them, the mask, the prompts' keys and values)"""
    c, kept = model.config, []
    weights = {p.untyped_storage()._cdata for p in model.parameters()}
    group, ids = torch.zeros(rows, dtype=torch.long, device="meta"), torch.zeros(rows, T, dtype=torch.long, device="meta")
    mask = model.head.new_empty(rows, 1, c.num_attention_heads // c.num_key_value_heads * (T - 1), L + T - 1)

    def fused(q, k, v, attn_mask=None, is_causal=False, **_):  # as on the devices that hold numbers
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, is_causal=is_causal, attn_mask=attn_mask)[0]

    def after_prompt(layer, k, v):
        return *(torch.cat([old[group], new], dim=2) for old, new in zip(cache[layer], (k, v))), mask

    usual, F.scaled_dot_product_attention = F.scaled_dot_product_attention, fused
    try:
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            last, cache, _ = read_prompts(model, [[0] * L] * groups)
            rest = model(ids[:, 1:], ids[:, 1:], after_prompt)
    finally:
        F.scaled_dot_product_attention = usual
    kept = [t for t in kept if t.untyped_storage()._cdata not in weights]
    return size([*kept, last, rest]), size([mask]), size([t for pair in cache.values() for t in pair])


def update_memory(args, learner, groups, rows, L):
    """{what: bytes} that one micro-batch takes, beyond weights and optimiser."""
    T, (V, D), c = args.max_new_tokens, learner.head.shape, learner.config
    tokens, itemsize, layers = groups * L + rows * (T - 1), learner.head.dtype.itemsize, c.num_hidden_layers
    kept, mask, cache = kept_activations(learner, groups, rows, L, T)
    kernel = rows * T * (D * (itemsize + 4) + min(1024, V) * (itemsize + 3 * 4))
    kernel += V * D * itemsize if learner.embed_tokens.weight.requires_grad else 0
    layer = tokens * (4 * c.intermediate_size + 4 * D) * itemsize
    if args.checkpoint_layers:  # the layers' inputs, and one layer's inside at a time
        layer += (kept - mask) // layers
        kept = mask + cache + tokens * D * itemsize * layers
    trained = size(p for p in learner.parameters() if p.requires_grad)
    fp32 = 4 // itemsize
    return {"gradients": trained * fp32 + (trained if fp32 > 1 else 0), "kept activations": kept,
            "log-prob kernel, or a layer's backward": max(kernel, layer)}  # one after the other


def plan(args, L):
    """({phase: {what: bytes}}, {what: FLOPs of a step, averaged over the run}), for prompts of L tokens."""
    dtype = getattr(torch, args.dtype)
    learner = empty_model(args.learner, dtype)
    weights = size(learner.parameters())
    if args.lora_rank:
        add_lora(learner, args.lora_rank, None)
    live = args.explorer != "none" and not args.explorer.endswith(".jsonl")
    explorer = empty_model(args.explorer, dtype) if live else None
    trained = sum(p.numel() for p in learner.parameters() if p.requires_grad)
    held = {"learner": size(learner.parameters()), "explorer": size(explorer.parameters()) if live else 0,
            "reference (KL)": weights if args.kl_coef and not args.lora_rank else 0, "AdamW's moments": 8 * trained,
            "float32 master weights": 4 * trained if args.dtype != "float32" else 0}
    P, G, T = args.prompts_per_step, args.group_size, args.max_new_tokens
    at_once = min(P, max(1, args.rollout_rows // G))  # groups
    writers = [learner, explorer] if live else [learner]
    cache = max(size(KVCache(model, at_once * G, L + T).layers) + size(KVCache(model, at_once, L).layers) for model in writers)
    whole = -(-P // args.minibatches) * G  # rows of a mini-batch
    slices = micro_batches([i // G for i in range(whole)], [L] * whole, [T] * whole, args.micro_batch_tokens)
    parts = [((part.stop - 1) // G - part.start // G + 1, part.stop - part.start) for part in slices]  # (groups, rows)
    logits = 4 if args.explorer_top_p == 1 or not live else 8  # arrays of their size, in `draw`
    rollouts = {"logits, probabilities": logits * at_once * G * learner.config.vocab_size * 4, "rollouts": 16 * P * G * T}
    memory = {"sampling": held | {"keys and values": cache} | rollouts,
              "update": held | update_memory(args, learner, *max(parts, key=lambda part: part[0] * L + part[1] * T), L)
              | {"rollouts, what is kept of each token": 36 * P * G * T}}

    def forward(model, first, last):
        """FLOPs of positions first to last of a sequence: 2 a weight and token, and attention to all positions before."""
        c, matrices = model.config, sum(p.numel() for p in model.layers.parameters() if p.dim() > 1)
        attention = 2 * c.num_hidden_layers * c.num_attention_heads * c.head_dim * (last ** 2 - first ** 2)
        return 2 * matrices * (last - first) + attention

    def both(model, groups, rows):
        """Every prompt once for its group, then the responses; the head is beside it."""
        return groups * forward(model, 0, L) + rows * forward(model, L, L + T)

    head = lambda model, rows: rows * 2 * model.head.numel() * T
    splits = [split_group(explorer_share(step, args.mix_steps, args.schedule, args.explorer_share), G) if args.explorer != "none"
              else (0, G) for step in range(1, args.steps + 1)]
    (explored, own), writing = ([sum(f(n) for n in counts) * P / args.steps for counts in zip(*splits)] for f in (int, bool))
    frozen = (args.minibatches > 1) + bool(args.kl_coef)  # passes for pi_old and pi_ref
    passes = (2 if args.lora_rank else 3) + args.checkpoint_layers + frozen  # LoRA: no gradient of the large matrices
    again = passes + (not args.checkpoint_layers)  # the head's logits are always made again
    flops = {"rollouts by the explorer": both(explorer, writing[0], explored) + head(explorer, explored) if live else 0,
             "rollouts by the learner": both(learner, writing[1], own) + head(learner, own),
             "all rollouts by the learner (GRPO)": both(learner, P, P * G) + head(learner, P * G),
             "update": P * G / whole * sum(passes * both(learner, *part) + again * head(learner, part[1]) for part in parts)}
    return memory, flops


def main():
    parser = argparse.ArgumentParser(description="Memory and FLOPs of a train.py run, whose flags are all taken too.")
    parser.add_argument("--prompt-tokens", type=int, default=256, help="length of a prompt")
    own, rest = parser.parse_known_args()
    args = train.parse_flags(["--data", "any", "--explorer", "none", *rest])
    try:
        memory, flops = plan(args, own.prompt_tokens)
    except (ValueError, OSError) as error:
        print(f"plan.py: error: {error}", file=sys.stderr)
        sys.exit(2)
    for phase, amounts in memory.items():
        print(f"{phase}: {sum(amounts.values()) / GIB:.2f} GiB")
        print("".join(f"  {what:40}{amount / GIB:10.3f}\n" for what, amount in amounts.items() if amount))
    print("FLOPs of a step, averaged over the run")
    print("".join(f"  {what:40}{amount:10.2e}\n" for what, amount in flops.items()), end="")


if __name__ == "__main__":
    main()
