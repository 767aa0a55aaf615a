"""Rescue: the explorer writes only where the learner failed. Not the paper's.

    python recipes/rescue.py --explorer-share 0.5 [train.py's other flags]

The learner writes the first (1 - share) of each group. Where all of these are wrong, the explorer writes the
rest; elsewhere the learner does. No T_mix is needed: the explorer leaves as the learner's groups stop
failing. The share that each step logs is what came of it. At share 0 this is plain GRPO.

Shapes: P prompts a step, G rollouts a prompt.
"""
import os
import sys
import time
from functools import partial
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # before torch: threads that spin for long starve others

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from anneal import explorer_share, split_group
from grpo import group_advantages, update
from sample import Rollouts, decode, join, sample
from train import (EXPLORER, LEARNER, MINIBATCH, batch_of, generator, keep_books, last_step, main, past_steps,
                   score_all, update_settings)


def rescue(args, run, explore):
    """train.train with other rollouts."""
    by_learner = partial(sample, run.learner, max_new_tokens=args.max_new_tokens,
                         temperature=args.temperature, rows=args.rollout_rows)
    for step in range(last_step(run) + 1, args.steps + 1):
        random = partial(generator, args.seed, step)
        batch = batch_of(step, args.prompts_per_step, len(run.problems), args.seed)
        problems, prompts = [run.problems[i] for i in batch], [run.prompts[i] for i in batch]
        clock = [time.perf_counter()]
        share = 0.0
        if explore:
            share = explorer_share(step, args.mix_steps, args.schedule, args.explorer_share, past_steps(run))
        n_rest, n_first = split_group(share, args.group_size, learner_at_least=1)  # of nothing, nothing fails

        learner_random = random(LEARNER)  # one stream: the rest goes on where the first part left it
        rollouts = by_learner(prompts, n_first, learner_random)                    # [P, n_first]
        if n_rest:
            scores = score_all(problems, decode(rollouts, run.tokenizer))
            failed = (scores[..., 1] == 0).all(1)                                  # [P] strictly
            rest = by_either(prompts, n_rest, failed, (explore, random(EXPLORER)),
                             (by_learner, learner_random))                         # [P, n_rest]
            from_explorer = torch.cat([rollouts.from_explorer, rest.from_explorer], dim=1)
            rollouts = join(rollouts, rest)                                        # [P, G]
            rollouts.from_explorer = from_explorer  # join marks its first part, here the learner's
        clock.append(time.perf_counter())

        scores = score_all(problems, decode(rollouts, run.tokenizer)).to(rollouts.ids.device)
        advantages = group_advantages(scores[..., 0], scale=args.loss != "dr_grpo")
        clock.append(time.perf_counter())
        metrics, tokens = update(run.learner, run.reference, run.optimizer, prompts, rollouts, advantages,
                                 random(MINIBATCH), **update_settings(args))
        clock.append(time.perf_counter())
        share = rollouts.from_explorer.float().mean().item()
        keep_books(args, run, {"step": step, "share": share} | metrics, batch, rollouts, scores, advantages,
                   tokens, clock)
        if run.stopped:
            break


def by_either(prompts, n, failed, *writers):
    """Rollouts [P, n]: of prompts that failed [P] by the first of two writers (explore, generator), of the
    others by the second."""
    parts = []
    for (write, generator), which in zip(writers, (failed, ~failed)):
        chosen = [prompt for prompt, wanted in zip(prompts, which.tolist()) if wanted]
        parts.append(turned(write(chosen, n, generator)) if chosen else None)
    order = torch.cat([failed.nonzero(), (~failed).nonzero()]).flatten().argsort()  # [P] back to the prompts'
    return Rollouts(**{name: x[order.to(x.device)] for name, x in vars(turned(join(*parts))).items()})


def turned(rollouts):
    """[P, G] <-> [G, P], so that `join` puts prompts side by side and marks the explorer's."""
    return Rollouts(**{name: x.transpose(0, 1) for name, x in vars(rollouts).items()})


if __name__ == "__main__":
    main(["--schedule", "constant", *sys.argv[1:]], loop=rescue, recipe="rescue")
