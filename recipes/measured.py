"""Measured: the explorer leaves as the learner learns, and no T_mix is guessed. Not the paper's.

    python -m recipes.measured [train.py's flags]

alpha = e / (e + l), where e is the share of groups that only the explorer solved, and l the share that the
learner solved. Groups are counted, not mean rewards, which would never let the explorer go: even a beaten one
is right now and then. docs/worth.md measured this schedule; that it gains anything was not shown.
"""
import sys

from anneal import split_group
from plumbing.books import keep_books
from plumbing.steps import EXPLORER, LEARNER, steps
from sample import join
from train import learn, main, writer


def measured(args, run, explore):
    """train.train with another share. The learner writes at least one rollout of each group: else nobody can
    say what it would have solved."""
    write = writer(args, run, run.learner, args.temperature)
    for step in steps(args, run):
        share = measured_share(run.history) if explore else 0.0
        n_explorer = min(split_group(share, args.group_size)[0], args.group_size - 1)
        parts = [explore(step.prompts, n_explorer, step.random(EXPLORER))] if n_explorer else []
        parts.append(write(step.prompts, args.group_size - n_explorer, step.random(LEARNER)))
        rollouts = join(*parts)
        learn(run, step, rollouts)
        keep_books(args, run, step, share=share)


def measured_share(history, decay=0.8, least=0.1):
    """alpha from the metrics of the steps so far, e and l smoothed over them. Below `least` the explorer
    leaves for good: without rollouts of its own, e only falls from then on."""
    e = l = 0.5
    for line in history:
        if line["step"]:
            e = decay * e + (1 - decay) * line["groups_explorer_only"]
            l = decay * l + (1 - decay) * line["groups_learner"]
    share = e / (e + l) if e + l else 0.5
    return share if share >= least else 0.0


if __name__ == "__main__":
    all_of_it = ["--schedule", "constant", "--explorer-share", "1"]  # a pool must hold what may be asked of it
    main([*all_of_it, *sys.argv[1:]], loop=measured, recipe="measured")
