"""What else helps where groups all fail: train.py's loop with one thing changed. Not the paper's.

    python recipes/remedies.py maxrl --explorer none [train.py's other flags]

    cooling   the learner's --temperature falls linearly, to 1 at the last step
    maxrl     advantages over the group's mean reward, not its standard deviation (arXiv 2602.02710)
    entropy   a bonus of --kl-coef for the learner's entropy
    dynamic   all-fail groups are drawn again, of other problems (DAPO, arXiv 2503.14476)
    raft      steps that the explorer writes alone (--schedule step --mix-steps 8) are supervised: RAFT

recipes/worth.py compares them. Shapes: P prompts a step, G rollouts a prompt.
"""
import os
import sys
import time
from functools import partial
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # before torch: threads that spin for long starve others

import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from anneal import explorer_share, split_group
from grpo import group_advantages, update
from sample import decode, join
from train import (EXPLORER, LEARNER, MINIBATCH, batch_of, fail, generator, keep_books, last_step, learner_of,
                   main, parse_flags, past_steps, score_all, update_settings)


def variant(args, run, explore, cools=False, redraws=0, imitates=False, advantages=None, **more):
    """train.train with what is named above; more: update's keywords."""
    advantages = advantages or partial(group_advantages, scale=args.loss != "dr_grpo")
    for step in range(last_step(run) + 1, args.steps + 1):
        random = partial(generator, args.seed, step)
        batch = batch_of(step, args.prompts_per_step, len(run.problems), args.seed)
        settings = update_settings(args) | more
        if cools:
            settings["temperature"] += (1 - args.temperature) * (step - 1) / max(1, args.steps - 1)
        share = explorer_share(step, args.mix_steps, args.schedule, args.explorer_share,
                               past_steps(run)) if explore else 0.0
        n_explorer, n_learner = split_group(share, args.group_size, int(args.schedule == "measured"))
        by_learner = partial(learner_of(args, run), temperature=settings["temperature"])
        streams = random(EXPLORER), random(LEARNER)  # what is drawn again goes on where these stopped

        def write(batch):
            prompts = [run.prompts[i] for i in batch]
            explored = explore(prompts, n_explorer, streams[0]) if n_explorer else None
            rollouts = join(explored, by_learner(prompts, n_learner, streams[1]) if n_learner else None)
            scores = score_all([run.problems[i] for i in batch], decode(rollouts, run.tokenizer))
            return rollouts, scores.to(rollouts.ids.device)                          # [P, G], [P, G, 3]

        clock = [time.perf_counter()]
        rollouts, scores = write(batch)
        thrown_away = 0
        for attempt in range(1, redraws + 1):
            others = batch_of(step, len(batch), len(run.problems), args.seed + 10_000 * attempt)
            thrown_away += draw_again(batch, rollouts, scores, write, others)
        clock += [time.perf_counter()] * 2  # scoring counts as sampling here

        A, passes, prompts = advantages(scores[..., 0]), 1, [run.prompts[i] for i in batch]
        if imitates and share == 1:  # ratio 1 and A = 1: the gradient is the log-likelihood's
            A, passes, settings["minibatches"] = scores[..., 1], args.minibatches, 1
        for _ in range(passes):
            metrics, tokens = update(run.learner, run.reference, run.optimizer, prompts, rollouts, A,
                                     random(MINIBATCH), **settings)
        metrics["tokens_trained"] *= passes
        clock.append(time.perf_counter())
        line = {"step": step, "share": share, "temperature": settings["temperature"],
                "tokens_thrown_away": thrown_away}
        keep_books(args, run, line | metrics, batch, rollouts, scores, A, tokens, clock)
        if run.stopped:
            break


def draw_again(batch, rollouts, scores, write, others):
    """In the places of groups that all fail, in batch, rollouts and scores: groups of `others`. Returns how
    many tokens were thrown away. DAPO drops all-pass groups too, and goes on until the batch is full."""
    failed = (scores[..., 1] == 0).all(1).nonzero().flatten().tolist()
    if not failed:
        return 0
    thrown_away = int(rollouts.lengths[failed].sum())
    for i in failed:
        batch[i] = others[i]
    again, scores[failed] = write([batch[i] for i in failed])
    T = max(rollouts.ids.shape[2], again.ids.shape[2])  # a pool's rollouts are as wide as the longest drawn
    widen = lambda x: F.pad(x, (0, T - x.shape[2])) if x.dim() == 3 else x
    for name, x in vars(rollouts).items():
        x = widen(x)
        x[failed] = widen(getattr(again, name))
        setattr(rollouts, name, x)
    return thrown_away


def maxrl_advantages(rewards):
    """A [P, G] of rewards [P, G] >= 0: (r - mean) / mean. All-fail groups get 0."""
    mean = rewards.mean(1, keepdim=True)  # [P, G] -> [P, 1]
    return (rewards - mean) / mean.clamp(min=1e-6)


def entropy(args, run, explore):
    """The KL to the uniform policy is log V less the entropy, and as a loss k2 has this KL's gradient: so the
    KL penalty is an entropy bonus if the reference is uniform. A model of zeros is."""
    for weight in run.reference.parameters():
        weight.zero_()
    variant(args, run, explore, kl_estimator="k2")


LOOPS = {"cooling": partial(variant, cools=True), "maxrl": partial(variant, advantages=maxrl_advantages),
         "entropy": entropy, "dynamic": partial(variant, redraws=3), "raft": partial(variant, imitates=True)}

if __name__ == "__main__":
    if not {*sys.argv[1:2]} & {*LOOPS}:
        sys.exit(__doc__)
    flags = parse_flags(sys.argv[2:])
    if sys.argv[1] == "entropy" and (not flags.kl_coef or flags.lora_rank):
        fail(2, "entropy needs --kl-coef, and no --lora-rank: adapters share the reference's weights")
    main(sys.argv[2:], loop=LOOPS[sys.argv[1]], recipe=sys.argv[1])
