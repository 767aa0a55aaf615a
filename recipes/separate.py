"""Separate updates, as in the authors' launch script: first on the explorer's groups, then on the learner's.

    python -m recipes.separate [train.py's flags]

The paper's Algorithm 1 compares all rollouts of a prompt with each other. Here each source has its own groups
and advantages, and the learner has moved before it writes its own. A source with a single rollout in a group
has nothing to compare it with, and is left out of that step. At share 0 this is plain GRPO.
"""
import torch

import train
from anneal import split_group
from plumbing.books import keep_books
from plumbing.steps import EXPLORER, LEARNER, steps
from sample import join
from train import learn, main, share_of, writer


def separate(args, run, explore):
    """train.train with two updates a step."""
    own = writer(args, run, run.learner, args.temperature)
    for step in steps(args, run):
        share = share_of(args, step, explore)
        n_explorer, n_learner = split_group(share, args.group_size)
        parts, found = [], []
        for write, n, purpose in ((explore, n_explorer, EXPLORER), (own, n_learner, LEARNER)):
            if n >= 2:
                parts.append(write(step.prompts, n, step.random(purpose)))
                learn(run, step, parts[-1])
                found.append((step.scores, step.advantages, step.metrics))

        # One record for both: the means of their metrics, and sums of what is counted
        scores, advantages, metrics = zip(*found)
        both = {name: [part[name] for part in metrics if part[name] is not None] for name in metrics[0]}
        step.metrics = {name: sum(values) / len(values) if values else None for name, values in both.items()}
        step.metrics |= {name: sum(both[name]) for name in ("skipped_updates", "tokens_trained")}
        step.rollouts, step.scores = join(*parts), torch.cat(scores, 1)
        step.advantages, step.tokens = torch.cat(advantages, 1), None
        keep_books(args, run, step, share=share)


def open_explorer(args, run):
    if args.group_size < 3:
        raise ValueError("--group-size 2: of 2 rollouts there may be one of each source, which has no group")
    return train.open_explorer(args, run)


if __name__ == "__main__":
    main(loop=separate, open_explorer=open_explorer, recipe="separate")
