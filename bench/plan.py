"""recipes/plan.py against measured peaks: a model of 20 million parameters, its rollouts and one update, on a
CPU.

    python bench/plan.py            Linux only: resident memory's peaks, less the interpreter's

Each case runs in a process of its own. Freed memory must go back to the system at once for the peaks to mean
anything, hence MALLOC_MMAP_THRESHOLD_.
"""
import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from common import Config, Transformer

import torch

import train
from grpo import update
from model import add_lora
from plumbing.optimizer import Optimizer
from recipes.plan import plan
from sample import sample

CONFIG = {"model_type": "qwen3", "vocab_size": 16_384, "hidden_size": 384, "intermediate_size": 1024,
          "num_hidden_layers": 8, "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 64,
          "rms_norm_eps": 1e-6, "max_position_embeddings": 4096, "tie_word_embeddings": True}
TINY = CONFIG | {"hidden_size": 64, "intermediate_size": 64, "vocab_size": 1100, "num_hidden_layers": 1}
CASES = {"float32": "", "micro-batch of 512 tokens": "--micro-batch-tokens 512", "KL": "--kl-coef 0.1",
         "checkpointed layers": "--checkpoint-layers", "LoRA": "--lora-rank 16 --kl-coef 0.1",
         "LoRA, checkpointed": "--lora-rank 16 --checkpoint-layers", "bfloat16": "--dtype bfloat16",
         "long prompts": "--micro-batch-tokens 1024 --prompt-tokens 256"}


def peak():
    """Highest resident memory since the last call, in bytes."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    Path("/proc/self/clear_refs").write_text("5")
    return int(status["VmHWM"].split()[0]) * 1024


def measure(args):
    """(peak of sampling, of the update) in bytes, of one step with random weights."""
    torch.set_num_threads(1)
    dtype = getattr(torch, args.dtype)
    step(args, Transformer(Config.from_hf(TINY)).to(dtype), None)  # what libraries allocate once is no run's
    peak()
    before = peak()
    model = Transformer(Config.from_hf(CONFIG)).to(dtype)
    reference = None
    if args.kl_coef:
        reference = model if args.lora_rank else Transformer(model.config).to(dtype)
    if args.lora_rank:
        add_lora(model, args.lora_rank, None)
    model.checkpoint_layers = args.checkpoint_layers
    return [high - before for high in step(args, model, reference)]


def step(args, model, reference):
    """Peaks of sampling and of the update in the second step: in the first AdamW has no moments yet."""
    optimizer, random = Optimizer(model, args.lr), torch.Generator().manual_seed(0)
    prompts = torch.randint(1, 1000, (args.prompts_per_step, args.prompt_tokens)).tolist()
    rollouts = None
    for _ in range(2):
        peak()
        rollouts = sample(model, prompts, args.group_size, random, args.max_new_tokens, stops=())
        sampling = peak()
        update(model, reference, optimizer, prompts, rollouts, torch.randn(rollouts.lengths.shape),
               train.objective_of(args), random)
        updating = peak()
    return sampling, updating


def flags(learner, more):
    parser = argparse.ArgumentParser()
    parser.add_argument("--prompt-tokens", type=int, default=64)
    own, rest = parser.parse_known_args(more)
    args = train.parse_flags([
        "--learner", learner, "--data", "any", "--explorer", "none", "--prompts-per-step", "4",
        "--group-size", "8", "--max-new-tokens", "64", "--micro-batch-tokens", "2048",
        "--device", "cpu", *rest])
    return argparse.Namespace(**vars(args), **vars(own))


def main():
    if len(sys.argv) > 1:
        print(json.dumps(measure(flags("any", sys.argv[2:]))))
        return
    print(f"{'':30}{'planned':>19}{'measured':>19}{'measured/planned':>22}")
    print(f"{'GiB':30}" + f"{'sampling':>11}{'update':>8}" * 3)
    with tempfile.TemporaryDirectory() as directory:
        Path(directory, "config.json").write_text(json.dumps(CONFIG))
        for name, more in CASES.items():
            args = flags(directory, more.split())
            planned = [sum(parts.values()) for parts in plan(args, args.prompt_tokens)[0].values()]
            freed = {"MALLOC_MMAP_THRESHOLD_": "262144"}
            out = subprocess.run([sys.executable, __file__, "case", *more.split()], check=True,
                                 stdout=subprocess.PIPE, env=os.environ | freed)
            measured = json.loads(out.stdout.splitlines()[-1])
            rows = [[x / 2 ** 30 for x in planned], [x / 2 ** 30 for x in measured],
                    [m / p for m, p in zip(measured, planned)]]
            print(f"{name:30}" + "".join(f"{a:11.3f}{b:8.3f}" for a, b in rows), flush=True)


if __name__ == "__main__":
    main()
