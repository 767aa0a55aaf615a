"""What a run of train.py will need: memory of each phase, FLOPs of a step, before any weight is downloaded.

    python -m recipes.plan --prompt-tokens 300 --learner Qwen/Qwen3-1.7B-Base --explorer Qwen/Qwen3-0.6B-Base
        --max-new-tokens 512 --dtype bfloat16 --micro-batch-tokens 4096 --rollout-rows 128 --lora-rank 32

takes train.py's flags and reads nothing but the models' config.json (--learner also takes the path of one).
The models are made on torch's "meta" device, which knows shapes and holds no numbers. The forward pass of one
micro-batch is run there, and what autograd would keep for the backward pass is added up. Every response is as
long as it may get: the worst case. bench/plan.py compares it with measured peaks.

Shapes: P prompts of L tokens, G rollouts of T tokens each.
"""
import argparse
import json
from pathlib import Path

import torch
import torch.nn.functional as F

import train
from anneal import explorer_share, split_group
from model import Config, Transformer, add_lora, read_prompts
from plumbing.optimizer import micro_batches
from plumbing.terminal import one_line
from sample import KVCache

CONTEXT = 0.6 * 2 ** 30  # bytes that a GPU's driver, kernels and libraries take (not measured)


def size(tensors):
    """Bytes of the distinct storages behind these tensors."""
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


def empty_model(source, dtype):
    """A model of shapes alone, from a directory or hub name, or the path of a config.json."""
    path = Path(source) if source.endswith(".json") else Path(source, "config.json")
    if not path.exists():
        from huggingface_hub import hf_hub_download
        path = hf_hub_download(source, "config.json")
    try:
        with torch.device("meta"):
            return Transformer(Config.from_hf(json.loads(Path(path).read_text()))).to(dtype)
    except (KeyError, TypeError, AttributeError) as error:  # something is missing, or of another kind
        raise ValueError(f"{path} is no configuration of a model: {error!r}") from error


def kept_activations(model, groups, rows, L, T):
    """Bytes that autograd keeps in grpo.response_logprobs, up to the final hidden state, for `rows` responses
    to `groups` prompts: (all of them, the mask's, the prompts' keys and values)."""
    c, kept, weights = model.config, [], {p.untyped_storage()._cdata for p in model.parameters()}
    group, ids = (torch.zeros(rows, *shape, dtype=torch.long, device="meta") for shape in ((), (T - 1,)))
    queries = c.num_attention_heads // c.num_key_value_heads * (T - 1)  # of a key head
    mask = model.head.new_empty(rows, 1, queries, L + T - 1)

    def fused(q, k, v, enable_gqa=False, **options):  # as on the devices that hold numbers
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, **options)[0]

    def after_prompt(layer, k, v):
        return *(torch.cat([old[group], new], dim=2) for old, new in zip(cache[layer], (k, v))), mask

    usual, F.scaled_dot_product_attention = F.scaled_dot_product_attention, fused
    try:
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            last, cache, _ = read_prompts(model, [[0] * L] * groups)
            rest = model(ids, ids, after_prompt)
    finally:
        F.scaled_dot_product_attention = usual
    kept = [t for t in kept if t.untyped_storage()._cdata not in weights]
    return size([*kept, last, rest]), size([mask]), size(t for pair in cache.values() for t in pair)


def update_memory(args, learner, groups, rows, L):
    """{what: bytes} that one micro-batch takes, beyond weights and optimiser."""
    T, (V, D), c = args.max_new_tokens, learner.head.shape, learner.config
    tokens, layers, itemsize = groups * L + rows * (T - 1), c.num_hidden_layers, learner.head.dtype.itemsize
    kept, mask, cache = kept_activations(learner, groups, rows, L, T)
    chunk = min(1024 if args.device == "cpu" else 4096, V)
    kernel = rows * T * (D * (itemsize + 4) + chunk * (itemsize + 3 * 4))
    kernel += V * D * itemsize if learner.embed_tokens.weight.requires_grad else 0
    layer = tokens * (4 * c.intermediate_size + 4 * D) * itemsize
    if learner.embed_tokens.weight.requires_grad:  # the head's gradient waits for the embedding's
        layer += tokens * D * 4 + V * D * itemsize * c.tie_word_embeddings
    if args.device != "cpu" and itemsize == 4:  # model.attend makes a prompt's mask there, in each layer
        kept += layers * c.num_attention_heads // c.num_key_value_heads * L ** 2 * itemsize
    if args.checkpoint_layers:  # the layers' inputs, and one layer's inside at a time
        layer += (kept - mask) // layers
        kept = mask + cache + tokens * D * itemsize * layers
    trained = size(p for p in learner.parameters() if p.requires_grad)
    return {"gradients": trained if itemsize == 4 else 3 * trained,  # float32, and those of the micro-batch
            "kept activations": kept, "log-prob kernel, or a layer's backward": max(kernel, layer)}  # in turn


def plan(args, L):
    """({phase: {what: bytes}}, {what: FLOPs of a step, averaged over the run})."""
    P, G, T, dtype = args.prompts_per_step, args.group_size, args.max_new_tokens, getattr(torch, args.dtype)
    learner = empty_model(args.learner, dtype)
    if args.lora_rank:
        add_lora(learner, args.lora_rank, None)
    live = args.explorer != "none" and not args.explorer.endswith(".jsonl")
    explorer = empty_model(args.explorer, dtype) if live else None
    trained = sum(p.numel() for p in learner.parameters() if p.requires_grad)
    held = {"CUDA's context and workspaces": 0 if args.device == "cpu" else CONTEXT,
            "learner": size(learner.parameters()), "explorer": size(explorer.parameters()) if live else 0,
            "reference (KL)": size(learner.parameters()) if args.kl_coef and not args.lora_rank else 0,
            "AdamW's moments": 8 * trained, "master weights": 4 * trained if dtype.itemsize < 4 else 0}

    batches = [(P, G)] + [(args.eval_problems, args.eval_n)] * bool(args.eval_data)  # prompts, rollouts each
    in_flight = [(min(prompts, max(1, args.rollout_rows // n)), n) for prompts, n in batches]
    rows = max(prompts * n for prompts, n in in_flight)
    caches = lambda model, P, n: (KVCache(model, P * n, L + T), KVCache(model, P, L))  # of rows, of prompts
    cached = [size(sum((kv.layers for kv in caches(model, *batch)), []))
              for model in (learner, explorer) if model for batch in in_flight]
    arrays = 8 if live and args.explorer_top_p < 1 else 4  # of the logits' size, in `draw`
    sampling = {"keys and values": max(cached), "rollouts": 16 * T * max(P * n for P, n in batches),
                "logits, probabilities": arrays * rows * learner.config.vocab_size * 4}
    whole = -(-P // args.minibatches) * G  # rows of a mini-batch
    groups = [row // G for row in range(whole)]
    parts = micro_batches(range(whole), groups, [L] * whole, [T] * whole, args.micro_batch_tokens)
    parts = [(len({groups[row] for row in part}), len(part)) for part in parts]
    largest = max(parts, key=lambda part: part[0] * L + part[1] * T)  # (groups, rows)
    update = update_memory(args, learner, *largest, L) | {"rollouts, what each token leaves": 36 * P * G * T}

    def forward(model, groups, rows):
        """FLOPs: 2 a weight and token, and attention to all before. Each prompt once; without the head."""
        c, matrices = model.config, sum(p.numel() for p in model.layers.parameters() if p.dim() > 1)
        attention = 2 * c.num_hidden_layers * c.num_attention_heads * c.head_dim
        of = lambda first, last: 2 * matrices * (last - first) + attention * (last ** 2 - first ** 2)
        return groups * of(0, L) + rows * of(L, L + T)

    head = lambda model, rows: 2 * model.head.numel() * rows * T
    rollouts = lambda model, groups, rows: forward(model, groups, rows) + head(model, rows) if model else 0
    share = lambda step: explorer_share(step, args.mix_steps, args.schedule, args.explorer_share)
    shares = [share(step) if args.explorer != "none" else 0 for step in range(1, args.steps + 1)]
    per_step = lambda counts: [P * sum(map(kind, counts)) / args.steps for kind in (bool, int)]
    explored, own = map(per_step, zip(*(split_group(share, G) for share in shares)))  # (groups, rows)
    passes = (2 if args.lora_rank else 3) + args.checkpoint_layers  # LoRA: W has no gradient
    passes += (args.minibatches > 1) + bool(args.kl_coef)  # pi_old, pi_ref
    heads = passes + (not args.checkpoint_layers)  # the head's logits are always made again
    updates = [passes * forward(learner, *part) + heads * head(learner, part[1]) for part in parts]
    flops = {"rollouts by the explorer": rollouts(explorer, *explored),
             "rollouts by the learner": rollouts(learner, *own), "update": P * G / whole * sum(updates),
             "all rollouts by the learner (GRPO)": rollouts(learner, P, P * G)}
    return {"sampling": held | sampling, "update": held | update}, flops


def main():
    parser = argparse.ArgumentParser(description="Memory and FLOPs of a train.py run; all its flags too.")
    parser.add_argument("--prompt-tokens", type=int, default=256, help="length of a prompt")
    own, rest = parser.parse_known_args()
    args = train.parse_flags(["--data", "any", "--explorer", "none", *rest])
    with one_line("plan.py"):
        memory, flops = plan(args, own.prompt_tokens)
    for phase, amounts in memory.items():
        print(f"{phase}: {sum(amounts.values()) / 2 ** 30:.2f} GiB")
        print("".join(f"  {what:40}{amount / 2 ** 30:10.3f}\n" for what, amount in amounts.items() if amount))
    print("FLOPs of a step, averaged over the run")
    print("".join(f"  {what:40}{amount:10.2e}\n" for what, amount in flops.items()), end="")


if __name__ == "__main__":
    main()
