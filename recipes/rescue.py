"""Rescue: the explorer writes only where the learner failed. Not the paper's.

    python -m recipes.rescue --explorer-share 0.5 [train.py's other flags]

The learner writes the first (1 - share) of each group. Where all of these are wrong, the explorer writes the
rest; elsewhere the learner does. No T_mix is needed: the explorer leaves as the learner's groups stop
failing. The share that each step logs is what came of it. At share 0 this is plain GRPO.

Shapes: P prompts a step, G rollouts a prompt.
"""
import sys

import torch

from anneal import split_group
from plumbing.books import keep_books
from plumbing.steps import EXPLORER, LEARNER, steps
from plumbing.text import decode
from sample import join
from train import learn, main, score_all, share_of, writer


def rescue(args, run, explore):
    """train.train with other rollouts."""
    write = writer(args, run, run.learner, args.temperature)
    for step in steps(args, run):
        share = share_of(args, step, explore)
        n_rest = min(split_group(share, args.group_size)[0], args.group_size - 1)  # else nobody could fail
        random = step.random(LEARNER)  # one stream: the rest goes on where the first part left it
        rollouts = write(step.prompts, args.group_size - n_rest, random)             # [P, n_first]
        if n_rest:
            failed = score_all(step.problems, decode(rollouts, run.tokenizer))[..., 1].sum(1) == 0  # [P]
            lost, won = (which.nonzero().flatten().tolist() for which in (failed, ~failed))
            asked = lambda which: [step.prompts[i] for i in which]
            parts = [explore(asked(lost), n_rest, step.random(EXPLORER))] if lost else []
            parts += [write(asked(won), n_rest, random)] if won else []
            rest = join(*parts, dim=0)[torch.tensor(lost + won).argsort()]         # [P, n_rest], in order
            rollouts = join(rollouts, rest)                                        # [P, G]
        share = rollouts.from_explorer.float().mean().item()
        learn(run, step, rollouts)
        keep_books(args, run, step, share=share)


if __name__ == "__main__":
    main(["--schedule", "constant", *sys.argv[1:]], loop=rescue, recipe="rescue")
