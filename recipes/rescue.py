"""Rescue: the explorer writes only where the learner failed. Not the paper's.

    python -m recipes.rescue --explorer-share 0.5 [train.py's other flags]

The learner writes the first (1 - share) of each group. Where all of these are wrong, the explorer writes the
rest; elsewhere the learner does. No T_mix is needed: the explorer leaves as the learner's groups stop
failing. The share that each step logs is what came of it. At share 0 this is plain GRPO.

Shapes: P prompts a step, G rollouts a prompt.
"""
import sys

import torch

from anneal import explorer_share, split_group
from plumbing.books import keep_books
from plumbing.steps import EXPLORER, LEARNER, steps
from plumbing.text import decode
from sample import join
from train import learn, main, score_all, writer


def rescue(args, run, explore):
    """train.train with other rollouts."""
    write = writer(args, run, run.learner, args.temperature)
    for step in steps(args, run):
        share = 0.0
        if explore:
            share = explorer_share(step.number, args.mix_steps, args.schedule, args.explorer_share)
        n_rest = min(split_group(share, args.group_size)[0], args.group_size - 1)  # else nobody could fail
        random = step.random(LEARNER)  # one stream: the rest goes on where the first part left it
        rollouts = write(step.prompts, args.group_size - n_rest, random)             # [P, n_first]
        if n_rest:
            failed = score_all(step.problems, decode(rollouts, run.tokenizer))[..., 1].sum(1) == 0  # [P]
            parts, order = [], []
            for writes, stream, which in ((explore, step.random(EXPLORER), failed), (write, random, ~failed)):
                if chosen := which.nonzero().flatten().tolist():
                    parts.append(writes([step.prompts[i] for i in chosen], n_rest, stream))
                    order += chosen
            rest = join(*parts, dim=0)[torch.tensor(order).argsort()]              # [P, n_rest], in order
            rollouts = join(rollouts, rest)                                        # [P, G]
        share = rollouts.from_explorer.float().mean().item()
        learn(run, step, rollouts)
        keep_books(args, run, step, share=share)


if __name__ == "__main__":
    main(["--schedule", "constant", *sys.argv[1:]], loop=rescue, recipe="rescue")
