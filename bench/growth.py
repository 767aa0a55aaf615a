"""How the cost of a GRPO step grows, and what running each prompt once in the update saves.

    python bench/growth.py

A step is sampling and one update of a model of random weights: 8 prompts x 8 rollouts of 64 + 64 tokens, one
of which is varied at a time. "row by row" is the same update with a prompt of its own for every row, as other
trainers run it. The slope is that of log cost over log size: 1 where cost is proportional.
"""
from common import TINY, Transformer, config_of, interleaved, machine, peak_memory, report, target

import numpy as np
import torch

from grpo import Objective, update
from plumbing.optimizer import Optimizer
from sample import Rollouts, sample

BASE = dict(prompts=8, group=8, prompt=64, response=64, width=128, vocabulary=512)
VARIED = {  # name: the settings that vary, and the size that the slope is taken over
    "group size, 64 rollouts": [(g, dict(prompts=64 // g, group=g)) for g in (4, 8, 16, 32, 64)],
    "prompt tokens": [(n, dict(prompt=n)) for n in (16, 64, 256, 1024)],
    "response tokens": [(n, dict(response=n)) for n in (16, 64, 256, 512)],
    "width": [(n, dict(width=n)) for n in (64, 128, 256, 512)],
    "vocabulary": [(n, dict(vocabulary=n)) for n in (512, 4_096, 32_768)]}


def phases(prompts, group, prompt, response, width, vocabulary):
    """{"sampling", "update", "row by row"}: what is to be timed."""
    torch.manual_seed(0)
    model = Transformer(config_of(dict(TINY, hidden_size=width, intermediate_size=3 * width,
                                       head_dim=width // 4, vocab_size=vocabulary)))
    for weights in model.parameters():
        if weights.dim() > 1:
            torch.nn.init.normal_(weights, std=0.02)
    ids, random = torch.randint(vocabulary, (prompts, prompt)).tolist(), torch.Generator()
    write = lambda: sample(model, ids, group, random.manual_seed(0), response, stops=())
    rollouts, advantages = write(), torch.randn(prompts, group)
    rows = Rollouts(*(x.flatten(0, 1)[:, None] for x in vars(rollouts).values()))  # each its own group
    optimizer, objective = Optimizer(model, lr=1e-6), Objective(micro_batch_tokens=16_384)
    learn = lambda *inputs: update(model, None, optimizer, *inputs, objective, random)
    return {"sampling": write, "update": lambda: learn(ids, rollouts, advantages),
            "row by row": lambda: learn([ids[i // group] for i in range(prompts * group)], rows,
                                        advantages.reshape(-1, 1))}


def slope(sizes, costs):
    return np.polyfit(np.log(sizes), np.log(costs), 1)[0]


def grow(name, cases):
    print(f"\n{name:24}  sampling      update  row by row     step's extra memory")
    sizes, table = [size for size, _ in cases], []
    for size, change in cases:
        runs = phases(**BASE | change)
        seconds = interleaved(runs, 3)
        memory = [peak_memory(runs[phase]) / 1e6 for phase in ("sampling", "update")]
        table.append([*seconds.values(), max(memory)])
        print(f"{size:24,}" + "".join(f"{s:10.3f} s" for s in seconds.values()) + f"{max(memory):20,.0f} MB")
    print(f"{'slope':24}" + "".join(f"{slope(sizes, costs):10.2f}  " for costs in zip(*table)))


def prompt_once(name, goal, **change):
    seconds = interleaved({key: run for key, run in phases(**BASE | change).items() if key != "sampling"}, 5)
    target(f"update_prompt_once_{name}", seconds["row by row"] / seconds["update"], goal, at_least=True)


if __name__ == "__main__":
    print(machine())
    prompt_once("64_and_64_tokens", 1.6)
    prompt_once("512_and_64_tokens", 4, prompt=512)
    for name, cases in VARIED.items():
        grow(name, cases)
    report()
