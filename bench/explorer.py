"""What the explorer saves: rollout time and FLOPs of S2L-PO against plain GRPO over a whole run's schedule,
and whole steps of the laptop run.

    python bench/explorer.py        makes the laptop family in runs/ first if it is missing

T_mix is half of the steps, as in the paper's best runs and train.py's default. Both methods write the same
number of rollouts of the same length. One pair has the laptop family's sizes, the other the paper's ratio;
weights are random but in the laptop run.
"""
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from common import ROOT, TINY, Transformer, config_of, interleaved, laptop_family, machine, report, target

import torch

from anneal import explorer_share, split_group
from sample import sample

G, L, STEPS = 16, 12, 60
pair = lambda *sizes: [
    dict(TINY, hidden_size=d, intermediate_size=3 * d, head_dim=d // 4, num_hidden_layers=n)
    for d, n in sizes]
HABIT = pair((64, 3), (32, 2))  # train.py's laptop family: learner, explorer
PAPER = pair((256, 6), (128, 5))  # an explorer of about a fifth of the learner, as Qwen3-1.7B is of 8B


def flops(config, P, T, rows):
    """Two per weight and token, for P prompts (once each) and all but a row's last of T tokens. Without
    attention."""
    weights = sum(p.numel() for p in Transformer(config_of(config)).parameters())
    return 2 * weights * (P * L + rows * (T - 1))


def run(label, learner, explorer, P, T):
    torch.manual_seed(0)
    both = [Transformer(config_of(config)) for config in (learner, explorer)]
    prompts = torch.randint(0, learner["vocab_size"], (P, L)).tolist()
    split = [split_group(explorer_share(step, STEPS // 2), G) for step in range(1, STEPS + 1)]
    # Every different split is timed once a round, and counted as often as the schedule has it.
    times = {n: (lambda n=n: [sample(model, prompts, k, torch.Generator().manual_seed(0), T, stops=())
                              for model, k in zip(both, (G - n, n)) if k]) for n in range(G + 1)}
    seconds = interleaved(times, 5)
    mixed, alone = sum(seconds[n] for n, _ in split), STEPS * seconds[0]
    work = sum(flops(config, P, T, P * n)
               for counts in split for config, n in zip((explorer, learner), counts) if n)
    of_flops = work / (STEPS * flops(learner, P, T, P * G))
    size = [sum(p.numel() for p in model.parameters()) for model in both]
    print(f"\n{label}: {size[1]:,} parameters explore for {size[0]:,}, and write "
          f"{sum(n for n, _ in split) / (STEPS * G):.0%} of {STEPS} x {P} x {G} rollouts of {T} tokens\n"
          f"  rollouts of a run   GRPO {alone:.1f} s   S2L-PO {mixed:.1f} s   FLOPs {of_flops:.2f} of GRPO's")
    target(f"{label}_rollout_flops_of_grpo", of_flops, 0.8)


def laptop_steps():
    """Seconds of all steps of `python train.py`, with and without its explorer, evaluations left out. A step
    gets cheaper too as more groups pass altogether, which are not trained on."""
    laptop_family()
    seconds = {"linear": [], "none": []}
    for _ in range(2):
        for name, runs in seconds.items():
            with tempfile.TemporaryDirectory() as out:
                more = ["--explorer", "none"] if name == "none" else []
                command = [sys.executable, "train.py", "--out", f"{out}/run", "--eval-problems", "1",
                           "--eval-n", "2", "--eval-every", "0", "--save-every", "0", *more]
                subprocess.run(command, check=True, capture_output=True, cwd=ROOT)
                steps = map(json.loads, Path(out, "run", "metrics.jsonl").read_text().splitlines()[1:])
                runs.append(sum(step[f"seconds_{what}"] for step in steps
                                for what in ("sampling", "scoring", "training")))
    mixed, alone = (statistics.mean(runs) for runs in seconds.values())
    print(f"\nlaptop run, 40 whole steps: GRPO {alone:.1f} s, S2L-PO {mixed:.1f} s")
    target("laptop_step_seconds_of_grpo", mixed / alone, 1.1)


if __name__ == "__main__":
    print(machine())
    run("laptop_family", *HABIT, P=16, T=16)
    run("one_fifth", *PAPER, P=8, T=48)
    laptop_steps()
    report()
