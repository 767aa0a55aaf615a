"""What else helps where groups all fail: train.py's loop with one thing changed. Not the paper's.

    python -m recipes.remedies maxrl --explorer none [train.py's other flags]

    cooling   the learner's --temperature falls linearly, to 1 at the last step
    maxrl     advantages over the group's mean reward, not its standard deviation (arXiv 2602.02710)
    entropy   a bonus of --kl-coef for the learner's entropy
    dynamic   all-fail groups are drawn again, of other problems (DAPO, arXiv 2503.14476)
    minp      the learner's noise at --temperature stays coherent: min-p .05 (arXiv 2407.01082)
    raft      steps that the explorer writes alone (--schedule step --mix-steps 8) are supervised: RAFT

recipes/worth.py compares them, and recipes/length.py min-p. Shapes: P prompts a step, G rollouts a prompt.
"""
import math
import sys
from dataclasses import replace
from functools import partial

from anneal import split_group
from grpo import advantages_of
from plumbing.books import keep_books
from plumbing.steps import EXPLORER, LEARNER, batch_of, steps
from plumbing.terminal import fail
from plumbing.text import decode
from sample import join
from train import learn, main, parse_flags, score_all, share_of, train, writer


def groups_of(args, step, explore, own, streams=None):
    """(share, rollouts [P, G]) of a step, as train.train writes them. `streams`: the generators of explorer
    and learner, where they go on from an earlier call."""
    share = share_of(args, step, explore)
    streams = streams or (step.random(EXPLORER), step.random(LEARNER))
    writers = zip((explore, own), split_group(share, args.group_size), streams)
    return share, join(*(write(step.prompts, n, stream) for write, n, stream in writers if n))


def cooling(args, run, explore):
    for step in steps(args, run):
        heat = args.temperature + (1 - args.temperature) * (step.number - 1) / max(1, args.steps - 1)
        share, rollouts = groups_of(args, step, explore, writer(args, run, run.learner, heat))
        learn(run, step, rollouts, replace(run.objective, temperature=heat))
        keep_books(args, run, step, share=share, temperature=heat)


def maxrl(args, run, explore):
    own = writer(args, run, run.learner, args.temperature)
    for step in steps(args, run):
        share, rollouts = groups_of(args, step, explore, own)
        learn(run, step, rollouts, advantages=maxrl_advantages)
        keep_books(args, run, step, share=share)


def maxrl_advantages(rewards, from_explorer=None, objective=None):
    """A [P, G] of rewards [P, G] >= 0: (r - mean) / mean. All-fail groups get 0."""
    mean = rewards.mean(1, keepdim=True)  # [P, G] -> [P, 1]
    return (rewards - mean) / mean.clamp(min=1e-6)


def entropy(args, run, explore):
    """The KL to the uniform policy is log V less the entropy, and as a loss k2 has this KL's gradient: so the
    KL penalty is an entropy bonus if the reference is uniform. A model of zeros is."""
    for weight in run.reference.parameters():
        weight.zero_()
    run.objective = replace(run.objective, kl_estimator="k2")
    train(args, run, explore)


def dynamic(args, run, explore, redraws=3):
    """DAPO drops all-pass groups too, and goes on until the batch is full."""
    own = writer(args, run, run.learner, args.temperature)
    for step in steps(args, run):
        streams = step.random(EXPLORER), step.random(LEARNER)
        share, rollouts = groups_of(args, step, explore, own, streams)
        thrown_away = 0
        for attempt in range(1, redraws + 1):
            right = score_all(step.problems, decode(rollouts, run.tokenizer))[..., 1]  # [P, G]
            if not (failed := (right.sum(1) == 0).nonzero().flatten().tolist()):
                break
            thrown_away += int(rollouts.lengths[failed].sum())
            others = batch_of(step.number, len(step.batch), len(run.problems), args.seed + 10_000 * attempt)
            order = list(range(len(step.batch)))
            for place, i in enumerate(failed, len(order)):  # behind the groups that are there
                step.batch[i], order[i] = others[i], place
                step.problems[i], step.prompts[i] = run.problems[others[i]], run.prompts[others[i]]
            again = replace(step, prompts=[step.prompts[i] for i in failed])
            rollouts = join(rollouts, groups_of(args, again, explore, own, streams)[1], dim=0)[order]
        learn(run, step, rollouts)
        keep_books(args, run, step, share=share, tokens_thrown_away=thrown_away)


def minp(args, run, explore):
    """Ratios are those of the whole softmax at --temperature: nothing corrects for the tokens left out."""
    coherent = partial(without_rare, 0.05, args.temperature)
    own = writer(args, run, run.learner, args.temperature, adjust=coherent)
    for step in steps(args, run):
        share, rollouts = groups_of(args, step, explore, own)
        learn(run, step, rollouts)
        keep_books(args, run, step, share=share)


def without_rare(min_p, temperature, logits, ids=None, lengths=None):
    """`sample`'s hook for min-p, logits [R, V]: no tokens less likely than min_p times the likeliest, after
    temperature."""
    least = logits.amax(1, keepdim=True) + temperature * math.log(min_p)  # [R, 1]
    return logits.masked_fill(logits < least, -math.inf)


def raft(args, run, explore):
    """Ratio 1 and A = 1: the gradient is the log-likelihood's. A pass over all successes for each mini-batch
    that the objective has."""
    own = writer(args, run, run.learner, args.temperature)
    for step in steps(args, run):
        share, rollouts = groups_of(args, step, explore, own)
        objective, advantages, passes = run.objective, advantages_of, 1
        if share == 1:
            objective, advantages, passes = replace(objective, minibatches=1), successes, args.minibatches
        for _ in range(passes):
            learn(run, step, rollouts, objective, advantages)
        step.metrics["tokens_trained"] *= passes
        keep_books(args, run, step, share=share)


def successes(rewards, from_explorer, objective):
    """A [P, G]: 1 for what earned a full reward, else 0."""
    return (rewards >= 1).float()


LOOPS = {"cooling": cooling, "maxrl": maxrl, "entropy": entropy, "dynamic": dynamic, "minp": minp,
         "raft": raft}

if __name__ == "__main__":
    name, *argv = sys.argv[1:] or ["--help"]
    if name not in LOOPS:
        print(__doc__)
        sys.exit(0 if name in ("--help", "-h") else 2)
    if name in ("entropy", "dynamic"):
        flags = parse_flags(argv)
        if name == "entropy" and (not flags.kl_coef or flags.lora_rank):
            fail("remedies.py", 2, "entropy needs --kl-coef, and no --lora-rank: adapters share their base")
        if name == "dynamic" and flags.explorer.endswith(".jsonl"):
            fail("remedies.py", 2, "dynamic asks for other problems than a pool was made for: give a model")
    main(argv, loop=LOOPS[name], recipe=name)
