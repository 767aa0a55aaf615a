"""Small-to-large annealing: how much of each group the explorer writes at each step (Algorithm 1).

    alpha_i = 1 - (i - 1) / (T_mix - 1)   for i <= T_mix, else 0       explorer's share at step i = 1, 2, ...
    G_w = ceil(alpha_i * G),  G_s = G - G_w                            explorer's and learner's rollouts

Early on, many of the learner's own groups fail altogether. An explorer that fails on other problems supplies
successes to learn from. Later its rollouts are off-policy and worse than the learner's own, so the share
falls to 0. From step T_mix on this is plain GRPO (schedules linear and cosine).

    python anneal.py --steps 16 --mix-steps 8 --group-size 16          prints the table of a run
"""
import argparse
import math

SCHEDULES = {
    "linear": "the paper's: from 1 at step 1 to 0 at step mix-steps",
    "cosine": "the same end points along half a cosine: slower to leave, slower to arrive",
    "step": "the explorer alone up to mix-steps, then the learner alone",
    "constant": "explorer-share at every step, to the end",
}


def explorer_share(step, mix_steps, schedule="linear", constant=0.5):
    """alpha_i in [0, 1] of `step` = i, counted from 1. With mix_steps = 1, alpha_1 = 1 (the equation has 0/0
    there)."""
    if schedule == "constant":
        return constant
    if step > mix_steps:
        return 0.0
    progress = (step - 1) / (mix_steps - 1) if mix_steps > 1 else 0.0
    if schedule == "linear":
        return 1 - progress
    if schedule == "cosine":
        return (1 + math.cos(math.pi * progress)) / 2
    if schedule == "step":
        return 1.0
    raise ValueError(f"no curve belongs to the schedule {schedule!r}")


def split_group(share, group_size):
    """(G_w, G_s): ceil(share * G) and the rest, which sum to G.

    A product that is whole on paper can come out a hair above (0.3 * 10 = 3.0000000000000004 when 0.3 is 1 -
    0.7). The ceiling would then add a rollout; hence the 1e-9."""
    explorer = math.ceil(share * group_size - 1e-9)
    return explorer, group_size - explorer


def main():
    parser = argparse.ArgumentParser(description="Print how each group is split at every step.")
    parser.add_argument("--steps", type=int, default=16, help="training steps T")
    parser.add_argument("--mix-steps", type=int, help="mixing steps T_mix; half of --steps where not given")
    parser.add_argument("--group-size", type=int, default=16, help="rollouts per prompt G")
    parser.add_argument("--schedule", choices=SCHEDULES, default="linear",
                        help="; ".join(f"{name}: {meaning}" for name, meaning in SCHEDULES.items()))
    parser.add_argument("--explorer-share", type=float, default=0.5, help="the share of --schedule constant")
    args = parser.parse_args()
    args.mix_steps = max(1, args.steps // 2) if args.mix_steps is None else args.mix_steps
    if not (1 <= args.mix_steps <= args.steps and args.group_size >= 1 and 0 <= args.explorer_share <= 1):
        parser.error("--mix-steps lies in 1..--steps, --explorer-share in 0..1, --group-size starts at 1")
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
