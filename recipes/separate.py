"""Separate updates, as in the authors' launch script: first on the explorer's groups, then on the learner's.

    python recipes/separate.py [train.py's flags]

The paper's Algorithm 1 compares all rollouts of a prompt with each other. Here each source has its own groups
and advantages, and the learner has moved before it writes its own. A source with a single rollout in a group
has nothing to compare it with, and is left out of that step. At share 0 this is plain GRPO.
"""
import os
import sys
import time
from functools import partial
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # before torch: threads that spin for long starve others

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from anneal import explorer_share, split_group
from grpo import group_advantages, update
from sample import decode, join, sample
from train import (EXPLORER, LEARNER, MINIBATCH, batch_of, fail, generator, keep_books, last_step, main,
                   parse_flags, score_all, update_settings)


def separate(args, run, explore):
    """train.train with two updates a step."""
    by_learner = partial(sample, run.learner, max_new_tokens=args.max_new_tokens,
                         temperature=args.temperature, rows=args.rollout_rows)
    for step in range(last_step(run) + 1, args.steps + 1):
        random = partial(generator, args.seed, step)
        batch = batch_of(step, args.prompts_per_step, len(run.problems), args.seed)
        problems, prompts = [run.problems[i] for i in batch], [run.prompts[i] for i in batch]
        share = explorer_share(step, args.mix_steps, args.schedule, args.explorer_share) if explore else 0.0
        n_explorer, n_learner = split_group(share, args.group_size)

        parts, seconds = [], np.zeros(3)
        for write, n, purpose in ((explore, n_explorer, EXPLORER), (by_learner, n_learner, LEARNER)):
            if n < 2:
                parts.append(None)
                continue
            clock = [time.perf_counter()]
            rollouts = write(prompts, n, random(purpose))
            rollouts = join(rollouts, None) if write is explore else join(None, rollouts)  # marks whose
            clock.append(time.perf_counter())
            scores = score_all(problems, decode(rollouts, run.tokenizer)).to(rollouts.ids.device)
            advantages = group_advantages(scores[..., 0], scale=args.loss != "dr_grpo")
            clock.append(time.perf_counter())
            metrics, _ = update(run.learner, run.reference, run.optimizer, prompts, rollouts, advantages,
                                random(MINIBATCH), **update_settings(args))
            clock.append(time.perf_counter())
            parts.append((rollouts, scores, metrics))
            seconds += np.diff(clock)

        # One line for both: the means of their metrics, and sums of what is counted
        rollouts = join(*(part and part[0] for part in parts))
        _, scores, metrics = zip(*filter(None, parts))
        both = {name: [part[name] for part in metrics if part[name] is not None] for name in metrics[0]}
        line = {"step": step, "share": share}
        line |= {name: sum(values) / len(values) if values else None for name, values in both.items()}
        line |= {name: sum(both[name]) for name in ("skipped_updates", "tokens_trained")}
        scores, clock = torch.cat(scores, 1), np.cumsum([0, *seconds])
        keep_books(args, run, line, batch, rollouts, scores, None, None, clock)
        if run.stopped:
            break


if __name__ == "__main__":
    flags = parse_flags()
    if flags.schedule == "measured" or flags.group_size < 3:
        fail(2, "groups of one source cannot be measured, and of 2 rollouts there may be one of each")
    main(loop=separate, recipe="separate")
