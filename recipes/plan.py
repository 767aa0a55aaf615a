"""What a run of train.py will need: memory of each phase and FLOPs of a step, before any weight is downloaded.

    python recipes/plan.py --prompt-tokens 300 --learner Qwen/Qwen3-1.7B-Base --explorer Qwen/Qwen3-0.6B-Base \\
        --max-new-tokens 512 --dtype bfloat16 --micro-batch-tokens 4096 --rollout-rows 128 --lora-rank 32

takes train.py's flags and reads nothing but the models' config.json (--learner also takes the path of one). Nothing is
guessed: the models are made on torch's "meta" device, which knows shapes and holds no numbers, the forward pass of one
micro-batch is run there, and what autograd would keep for the backward pass is added up. Every response is taken to be as
long as it may get and an update to take several micro-batches, so this is the worst case. `bench/plan.py` compares it with measured peaks.
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
from model import Config, Transformer, add_lora, find_file
from sample import KVCache

GIB = 2 ** 30


def size(tensors):
    """Bytes of the distinct storages behind these tensors."""
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


def empty_model(source, dtype):
    """A model of shapes alone, from a directory or hub name, or the path of a config.json."""
    path = source if str(source).endswith(".json") else find_file(source, "config.json")
    try:
        with torch.device("meta"):
            return Transformer(Config.from_hf(json.loads(Path(path).read_text()))).to(dtype)
    except KeyError as error:
        raise ValueError(f"{path}: no {error}") from None


def kept_activations(model, rows, tokens):
    """Bytes that autograd keeps of a forward pass over [rows, tokens] up to the final hidden states, those included."""
    kept, weights = [], {p.untyped_storage()._cdata for p in model.parameters()}
    fused = lambda q, k, v, **_: torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, is_causal=True)[0]
    usual, F.scaled_dot_product_attention = F.scaled_dot_product_attention, fused  # as on the devices that hold numbers
    try:
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            hidden = model(torch.zeros(rows, tokens, dtype=torch.long, device="meta"))
    finally:
        F.scaled_dot_product_attention = usual
    return size([t for t in kept if t.untyped_storage()._cdata not in weights] + [hidden])


def update_memory(args, learner, micro, length):
    """{what: bytes} that one micro-batch of `micro` rows takes, beyond weights and optimiser."""
    tokens, responses, (V, D) = micro * length, micro * args.max_new_tokens, learner.head.shape
    itemsize, c = learner.head.dtype.itemsize, learner.config
    kept = kept_activations(learner, micro, length)
    layer = kept // c.num_hidden_layers
    if args.checkpoint_layers:  # the layers' inputs, and one layer's inside at a time
        kept = tokens * D * itemsize * c.num_hidden_layers + layer
    trained = size(p for p in learner.parameters() if p.requires_grad)
    fp32 = 4 // itemsize
    return {"gradients": trained * fp32 + (trained if fp32 > 1 else 0), "kept activations": kept,
            "one layer's backward": tokens * (4 * c.intermediate_size + 4 * D) * itemsize,
            "log-prob kernel": responses * (D * (itemsize + 4) + min(1024, V) * (itemsize + 3 * 4))
            + (V * D * itemsize if learner.embed_tokens.weight.requires_grad else 0)}


def plan(args, prompt_tokens):
    """({phase: {what: bytes}}, {what: FLOPs of a step, averaged over the run})."""
    dtype = getattr(torch, args.dtype)
    learner = empty_model(args.learner, dtype)
    weights = size(learner.parameters())
    if args.lora_rank:
        add_lora(learner, args.lora_rank, None)
    explorers = [empty_model(name, dtype).requires_grad_(False) for name in args.explorer]
    trained = sum(p.numel() for p in learner.parameters() if p.requires_grad)
    held = {"learner": size(learner.parameters()), "explorers": sum(size(model.parameters()) for model in explorers),
            "reference (KL)": weights if args.kl_coef and not args.lora_rank else 0,
            f"AdamW's moments, {args.optimizer_dtype}": 2 * trained * getattr(torch, args.optimizer_dtype).itemsize,
            "float32 master weights": 4 * trained if args.dtype != "float32" else 0}
    P, G, T, L = args.prompts_per_step, args.group_size, args.max_new_tokens, prompt_tokens + args.max_new_tokens
    rows = G * min(P, max(1, args.rollout_rows // G))
    writers = explorers if args.schedule == "constant" and args.explorer_share == 1 else [learner, *explorers]
    cache = max(size(KVCache(model, rows, L).layers) for model in writers)
    micro = max(1, min(args.micro_batch_tokens // L, P * G // args.minibatches))
    logits = 4 if min(args.top_p, args.explorer_top_p) == 1 else 8  # arrays of their size, in `draw`
    memory = {"sampling": held | {"keys and values": cache, "logits, probabilities": logits * rows * learner.config.vocab_size * 4,
                                  "rollouts": 16 * P * G * T},  # bytes a token
              "update": held | update_memory(args, learner, micro, L) | {"rollouts, what is kept of each token": 36 * P * G * T}}

    def forward(model, first, last):
        """FLOPs of positions first to last of a sequence: 2 a weight and token, and attention to all positions before."""
        c, matrices = model.config, sum(p.numel() for p in model.layers.parameters() if p.dim() > 1)
        attention = 2 * c.num_hidden_layers * c.num_attention_heads * c.head_dim * (last ** 2 - first ** 2)
        return 2 * matrices * (last - first) + attention

    def rollouts(model, number, prompts):
        """Every prompt once for its group, then the responses."""
        response = forward(model, prompt_tokens, L) + 2 * model.head.numel() * T
        return number * response + prompts * forward(model, 0, prompt_tokens)

    splits = [split_group(explorer_share(step, args.mix_steps, args.schedule, args.explorer_share), G)
              for step in range(1, args.steps + 1)]
    by_explorers, by_learner = (P * sum(counts) / args.steps for counts in zip(*splits))
    writing = [P * sum(count > 0 for count in counts) / args.steps for counts in zip(*splits)]
    frozen = (args.minibatches > 1) + bool(args.kl_coef)  # passes for pi_old and pi_ref
    passes = (2 if args.lora_rank else 3) + args.checkpoint_layers + frozen  # LoRA: no gradient of the large matrices
    head = 2 * learner.head.numel() * T * (passes + (not args.checkpoint_layers))  # its logits are always made again
    flops = {"rollouts by explorers": sum(rollouts(model, by_explorers / len(explorers), writing[0]) for model in explorers),
             "rollouts by the learner": rollouts(learner, by_learner, writing[1]),
             "all rollouts by the learner (GRPO)": rollouts(learner, P * G, P),
             "update": P * G * (passes * forward(learner, 0, L) + head)}
    return memory, flops


def main():
    parser = argparse.ArgumentParser(description="Memory and FLOPs of a train.py run, whose flags are all taken too.")
    parser.add_argument("--prompt-tokens", type=int, default=256, help="length of a prompt")
    own, rest = parser.parse_known_args()
    args = train.parse_args(rest)
    args.explorer = [] if args.explorer == ["none"] or args.schedule == "none" else args.explorer or []
    args.schedule = args.schedule if args.explorer or args.explorer_pool else "none"
    args.mix_steps = args.mix_steps or max(1, args.steps // 2)
    if args.learner is None or not 1 <= args.minibatches <= args.prompts_per_step:
        parser.error("--learner is needed, and --minibatches between 1 and --prompts-per-step")
    try:
        memory, flops = plan(args, own.prompt_tokens)
    except (ValueError, OSError) as error:
        print(f"plan.py: error: {error}", file=sys.stderr)
        sys.exit(2)
    for phase, parts in memory.items():
        print(f"{phase}: {sum(parts.values()) / GIB:.2f} GiB")
        print("".join(f"  {what:36}{amount / GIB:10.3f}\n" for what, amount in parts.items() if amount))
    print("FLOPs of a step, averaged over the run")
    print("".join(f"  {what:36}{amount:10.2e}\n" for what, amount in flops.items()), end="")


if __name__ == "__main__":
    main()
