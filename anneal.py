"""Small-to-large annealing: which rollouts of each group the explorer writes at each step (S2L-PO, Algorithm 1).

    alpha_i = 1 - (i - 1) / (T_mix - 1)   for i <= T_mix, else 0       explorer's share at step i = 1, 2, ...
    G_w = ceil(alpha_i * G),  G_s = G - G_w                            explorer's and learner's rollouts

Early on the learner's own groups mostly fail, and an explorer that fails differently supplies the successes to learn
from. Later its rollouts are off-policy and worse than the learner's own, so the share falls to 0: from step T_mix on
this is plain GRPO, and the explorer is not needed any more.

T_mix is a guess at how long that takes. Two schedules that are not the paper's look instead:

    measured   alpha = e / (e + l)   e: groups that only the explorer's rollouts solved, l: groups that the learner's did,
                                     both smoothed over steps; below 0.1 the explorer leaves for good
    rescue     the learner writes the first (1 - share) of each group; where all of those fail, the explorer writes the
                                     rest, elsewhere the learner does. The share is --explorer-share, 0.5

    python anneal.py --steps 16 --mix-steps 8 --group-size 16          prints that table
"""
import argparse
import math
from dataclasses import dataclass

import numpy as np

from model import Transformer
from sample import mix, retokenize, sample

SCHEDULES = {
    "linear": "the paper's equation: from 1 at step 1 to 0 at step mix-steps",
    "cosine": "the same end points along half a cosine: slower to leave, slower to arrive",
    "step": "the explorer alone up to mix-steps, then the learner alone",
    "constant": "explorer-share at every step, to the end",
    "measured": "what the explorer adds, in ratio to what the learner solves: no T_mix to choose",
    "rescue": "explorer-share, but only of the groups whose other rollouts, the learner's, have all failed",
    "none": "no explorer: plain GRPO",
}
MIXES = {
    "joint": "one group a prompt, advantages over both sources, one update (the paper's Algorithm 1)",
    "separate": "an update on the explorer's groups, then one on the learner's (the authors' launch script)",
}


def explorer_share(step, mix_steps, schedule="linear", constant=0.5, success=(0.5, 0.5)):
    """alpha_i in [0, 1] of `step` = i, counted from 1. With mix_steps = 1, alpha_1 = 1 (the equation has 0/0 there).
    `success`: e and l of the schedule "measured", which `observe` keeps."""
    if schedule == "none":
        return 0.0
    if schedule in ("constant", "rescue"):
        return constant
    if schedule == "measured":
        share = success[0] / sum(success) if sum(success) else 0.5
        return share if share >= 0.1 else 0.0  # for good: without rollouts its success is 0 from then on
    if step > mix_steps:
        return 0.0
    progress = (step - 1) / (mix_steps - 1) if mix_steps > 1 else 0.0
    return {"linear": 1 - progress, "cosine": (1 + math.cos(math.pi * progress)) / 2, "step": 1.0}[schedule]


def observe(success, rewards, from_explorer, decay=0.8):
    """(e, l) after a step with rewards [P, G], from_explorer [P, G]. A group counts for l if one of the learner's rollouts
    is right, and for e if one of the explorer's is and none of the learner's: what counts is what the explorer adds. (Mean
    rewards in their place never let it go: even a beaten explorer is right now and then.)"""
    right = rewards > 0
    solved = (right & ~from_explorer).any(1)  # [P, G] -> [P]
    rescued = right.any(1) & ~solved
    return tuple(decay * before + (1 - decay) * now.float().mean().item() for before, now in zip(success, (rescued, solved)))


def split_group(share, group_size, at_least=0):
    """(explorer's, learner's) number of rollouts: ceil(share * G) and the rest, which is never less than `at_least`. They
    always sum to G.

    A product that is whole on paper can come out a hair above (0.3 * 10 = 3.0000000000000004 when 0.3 is 1 - 0.7), and
    ceil would then add a rollout; hence the 1e-9."""
    explorer = min(math.ceil(share * group_size - 1e-9), group_size - at_least)
    return explorer, group_size - explorer


@dataclass
class Explorer:
    model: Transformer
    tokenizer: object
    prompts: dict | None  # {learner's prompt: its own} where its tokeniser is another (--retokenize)


def sample_groups(args, run, prompts, n_explorer, n_learner, explorer_random, learner_random, failed):
    """Rollouts [P, G], one group for each of P prompts: n_explorer rollouts by the explorers, who share them out evenly, or
    from their pool, and n_learner by the learner. For the schedule "rescue" `failed(rollouts)` tells the groups [P] in
    which nothing is right."""
    def by_explorers(prompts, n):                                                               # sample(pi_omega, G_w)
        counts = [(n + i) // len(run.explorers) for i in range(len(run.explorers))]
        return [by_explorer(explorer, prompts, count) for explorer, count in zip(run.explorers, counts) if count]

    def by_explorer(explorer, prompts, n):
        own = [explorer.prompts[tuple(prompt)] for prompt in prompts] if explorer.prompts else prompts
        rollouts = sample(explorer.model, own, n, explorer_random, args.max_new_tokens, args.explorer_temperature,
                          top_p=args.explorer_top_p, rows=args.rollout_rows, from_explorer=True)
        if not explorer.prompts:
            return rollouts
        return retokenize(rollouts, explorer.tokenizer, run.tokenizer, run.stop_id, args.max_new_tokens)

    def by_learner(prompts, n):                                                                 # sample(pi_theta, G_s)
        return [sample(run.learner, prompts, n, learner_random, args.max_new_tokens, args.temperature,
                       top_p=args.top_p, rows=args.rollout_rows)] if n else []

    def from_pool(prompts, n):
        return [run.pool.draw(prompts, n, explorer_random, run.learner)]

    def explore(prompts, n):
        if not (run.pool and n):
            return by_explorers(prompts, n)
        stocked = [run.pool.count(prompt) >= n for prompt in prompts]
        return [by_either(prompts, n, stocked, from_pool, by_explorers)]

    if args.schedule != "rescue":
        return mix(*explore(prompts, n_explorer), *by_learner(prompts, n_learner))
    own = mix(*by_learner(prompts, n_learner))
    return mix(own, by_either(prompts, n_explorer, failed(own), explore, by_learner))


def by_either(prompts, n, which, first, second):
    """Rollouts [P, n]: by `first` for the prompts where `which` [P] is true, by `second` for the others."""
    parts = [mix(*write([prompt for prompt, w in zip(prompts, which) if w == wanted], n))
             for wanted, write in ((True, first), (False, second)) if wanted in which]
    place = np.argsort(np.argsort(np.logical_not(which), kind="stable"))  # back from `first`'s before `second`'s
    return mix(*parts, dim=0).groups(place)


def main():
    parser = argparse.ArgumentParser(description="Print how each group is split at every step.")
    parser.add_argument("--steps", type=int, default=16, help="training steps T")
    parser.add_argument("--mix-steps", type=int, default=8, help="mixing steps T_mix")
    parser.add_argument("--group-size", type=int, default=16, help="rollouts per prompt G")
    fixed = {name: meaning for name, meaning in SCHEDULES.items() if name not in ("measured", "rescue")}
    parser.add_argument("--schedule", choices=fixed, default="linear",
                        help="; ".join(f"{name}: {meaning}" for name, meaning in fixed.items()))
    parser.add_argument("--explorer-share", type=float, default=0.5, help="the share of --schedule constant")
    args = parser.parse_args()
    if not (args.steps >= args.mix_steps >= 1 <= args.group_size and 0 <= args.explorer_share <= 1):
        parser.error("--mix-steps lies between 1 and --steps, --group-size starts at 1, --explorer-share lies in [0, 1]")
    print(" step   alpha  explorer  learner")
    total = 0
    for step in range(1, args.steps + 1):
        share = explorer_share(step, args.mix_steps, args.schedule, args.explorer_share)
        explorer, learner = split_group(share, args.group_size)
        total += explorer
        print(f"{step:5d}  {share:6.3f}  {explorer:8d}  {learner:7d}  {'#' * explorer}{'.' * learner}")
    rollouts = args.steps * args.group_size
    print(f"the explorer writes {total} of {rollouts} rollouts, {total / rollouts:.0%}")


if __name__ == "__main__":
    main()
