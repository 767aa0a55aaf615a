"""Is S2L-PO worth it? Beside what a practitioner would do instead, on fresh pairs. The plan: docs/worth.md.

    python recipes/worth.py search       every arm at four settings on three pairs: its settings for `confirm`
    python recipes/worth.py confirm      every arm at its best setting on eight other pairs, three seeds each
    python recipes/worth.py boundary     the arms without a T_mix where S2L-PO lost before
    python recipes/worth.py report       tables, verdicts and picture from assets/worth/runs.json.gz alone

An *arm* is a set of train.py's flags and, for some, the loop `variant` below. A *setting* is the flags that
are searched. Pairs, workers and intervals are those of recipes/claims.py. Finished runs are kept under
runs/worth: an interrupted command goes on where it stopped. Below 8 pairs or 3 seeds it is a small look,
which publishes to runs/worth/assets.

FLOPs are estimated: 2 x parameters for each token sampled, by the model that sampled it, thrown away or not;
6 x parameters for each token trained on, and 2 x for pi_old's pass over it. Prompts and evaluations are left
out, and so is the entropy bonus's uniform policy, which needs no model.
"""
import argparse
import gzip
import json
import os
import shutil
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import model as models
import train
from anneal import explorer_share
from eval import new_figure
from grpo import group_advantages, update
from recipes.claims import GRID, SEARCH_SEEDS, area, do, interval, make_models, run_quietly, shown
from recipes.pairs import directory, qualified
from recipes.rescue import rescue
from sample import decode, join
from train import batch_of, generator, keep_books, last_step, learner_of, score_all, update_settings

ASSETS, RUNS = Path("assets/worth"), Path("runs/worth")
SEARCH_PAIRS, FIRST, PAIRS, SEEDS = (20, 21, 22), 23, 8, 3
MARGIN, NEVER_LOSE = 0.03, 0.01  # of area


# ---- arms that flags do not make ---------------------------------------------------------------------------

def variant(args, run, explore, cools=False, redraws=0, imitates=False, advantages=group_advantages, **more):
    """train.train with one writer a step: the explorer up to --mix-steps of the schedule `step`, the learner
    else. cools: its temperature falls to 1 at the last step. redraws: how often all-fail groups are drawn
    again. imitates: the explorer's steps are supervised. more: update's keywords."""
    for step in range(last_step(run) + 1, args.steps + 1):
        random = partial(generator, args.seed, step)
        batch = batch_of(step, args.prompts_per_step, len(run.problems), args.seed)
        progress = (step - 1) / (args.steps - 1) if cools else 0.0
        temperature = args.temperature + (1 - args.temperature) * progress
        share = explorer_share(step, args.mix_steps, args.schedule) if explore else 0.0
        write = explore if share else partial(learner_of(args, run), temperature=temperature)
        write = partial(write, n=args.group_size, generator=random(train.EXPLORER if share else train.LEARNER))
        clock = [time.perf_counter()]
        rollouts, scores = written(run, batch, write)                                # [P, G], [P, G, 3]
        batch, thrown_away = draw_again(args, run, step, batch, rollouts, scores, write, redraws)
        rollouts = join(rollouts, None) if share else rollouts                       # marks the explorer's
        clock += [time.perf_counter()] * 2  # scores belong to sampling here

        settings, passes = update_settings(args) | {"temperature": temperature} | more, 1
        A = advantages(scores[..., 0])
        if imitates and share:  # at ratio 1, A = 1 gives the gradient of the log-likelihood: RAFT
            A, settings["minibatches"], passes = scores[..., 1], 1, args.minibatches
        prompts = [run.prompts[i] for i in batch]
        for _ in range(passes):
            metrics, tokens = update(run.learner, run.reference, run.optimizer, prompts, rollouts, A,
                                     random(train.MINIBATCH), **settings)
        metrics["tokens_trained"] *= passes
        clock.append(time.perf_counter())
        line = {"step": step, "share": share, "temperature": temperature, "tokens_thrown_away": thrown_away}
        keep_books(args, run, line | metrics, batch, rollouts, scores, A, tokens, clock)


def written(run, batch, write):
    """(rollouts [P, G], scores [P, G, 3]) of the problems `batch` by write(prompts)."""
    rollouts = write([run.prompts[i] for i in batch])
    return rollouts, score_all([run.problems[i] for i in batch], decode(rollouts, run.tokenizer))


def draw_again(args, run, step, batch, rollouts, scores, write, redraws):
    """DAPO's dynamic sampling, for all-fail groups: others, of other problems, take their places in rollouts
    and scores. Returns the batch as it then is, and the tokens thrown away."""
    thrown_away, batch = 0, list(batch)
    for attempt in range(1, redraws + 1):
        failed = (scores[..., 1] == 0).all(1).nonzero().flatten().tolist()
        if not failed:
            break
        thrown_away += int(rollouts.lengths[failed].sum())
        others = batch_of(step, len(batch), len(run.problems), args.seed + 10_000 * attempt)
        for i in failed:
            batch[i] = others[i]
        again, scores[failed] = written(run, [batch[i] for i in failed], write)
        for name, x in vars(rollouts).items():
            x[failed] = getattr(again, name)
    return batch, thrown_away


def maxrl_advantages(rewards):
    """MaxRL (arXiv 2602.02710): divided by the mean reward, not by the standard deviation; all-fail groups 0."""
    mean = rewards.mean(1, keepdim=True)  # [P, G] -> [P, 1]
    return (rewards - mean) / mean.clamp(min=1e-6)


def entropy_bonus(args, run, explore):
    """The KL to the uniform policy is log V less the entropy, and k2's gradient is that of this KL: so
    --kl-coef with a uniform reference is an entropy bonus. A model of zeros is uniform."""
    for weight in run.reference.parameters():
        weight.zero_()
    variant(args, run, explore, kl_estimator="k2")


# The explorer alone for 8 steps: 128 rollouts a prompt, where S2L-PO's 16 steps of annealing are 135.
ALONE = "--schedule step --mix-steps 8"
ARMS = {  # name: (flags, loop), the simpler ones first: of arms that are as good, the first wins
    "GRPO": ("--explorer none", train.train),
    "GRPO at T 1.6": ("--explorer none --temperature 1.6", train.train),
    "GRPO at T 2.2": ("--explorer none --temperature 2.2", train.train),
    "clip-high .28": ("--explorer none --clip-high 0.28", train.train),
    "groups of 32": ("--explorer none --group-size 32 --prompts-per-step 4", train.train),
    "T 1.6 to 1": ("--explorer none --temperature 1.6", partial(variant, cools=True)),
    "MaxRL": ("--explorer none", partial(variant, advantages=maxrl_advantages)),
    "entropy bonus": ("--explorer none", entropy_bonus),
    "dynamic sampling": ("--explorer none", partial(variant, redraws=3)),
    "RAFT warm start": (ALONE, partial(variant, imitates=True)),
    "abrupt switch": (ALONE, train.train),
    "S2L-PO": ("", train.train),
    "S2L-PO at T 1.6": ("--temperature 1.6", train.train),
    "S2L-PO at T 2.2": ("--temperature 2.2", train.train),
    "S2L-PO, positive": ("--off-policy positive", train.train),
    "rescue, positive": ("--schedule constant --off-policy positive", rescue),
    "measured, positive": ("--schedule measured --off-policy positive", train.train),
}
RATES = [f"--lr {lr:g}" for lr in GRID]
SETTINGS = {"entropy bonus": ["--lr 0.0004 --kl-coef 0.03"] + [f"--lr 0.0008 --kl-coef {c}" for c in (.01, .03, .1)]}
REFERENCE = "S2L-PO"
PLACES = {  # name: (task, learner, explorer, steps); `home` is the study, the others are where S2L-PO lost
    "home": ("habit", "learner", "explorer", 96), "natural": ("natural", "learner", "explorer", 32),
    **{name: ("habit", name, "explorer", 32) for name in ("noise 8%", "noise 32%")},
    **{name: ("habit", "learner", name, 32) for name in ("pruned", "twin", "epoch 3")}}
NO_T_MIX = "rescue, positive", "measured, positive"


# ---- runs --------------------------------------------------------------------------------------------------

def path_of(job):
    place, pair, arm, setting, seed = (str(part).replace(" ", "_") for part in job)
    return RUNS / "results" / f"{place}-{pair}" / arm / setting.lstrip("-") / f"{seed}.json"


def is_done(job):
    return path_of(job).exists()


def work(job):
    """In a worker: a run (place, pair, arm, setting, seed). Its curves are left, as path_of names them."""
    place, pair, arm, setting, seed = job
    (task, learner, explorer, steps), (flags, loop) = PLACES[place], ARMS[arm]
    base = directory(task, pair)
    who = {"learner": base / learner, "explorer": base / explorer}
    args, run = run_quietly(base, ["--learner", who["learner"], "--explorer", who["explorer"], "--steps", steps,
                                   "--mix-steps", 16, "--seed", seed, *flags.split(), *setting.split()], loop=loop)
    cold = train.evaluate_model(args, run, partial(learner_of(args, run), temperature=0.7))
    size = {name: sum(p.numel() for p in models.load(path)[0].parameters()) for name, path in who.items()}
    spent = np.cumsum([[0.0, 0.0] if not line["step"] else flops(line, size) for line in run.history], axis=0)
    at = [i for i, line in enumerate(run.history) if "eval_curve" in line]
    curve = lambda key: [run.history[i][f"eval_{key}"] for i in at]
    result = dict(place=place, pair=pair, arm=arm, setting=setting, seed=seed, flops=spent[at].sum(1).tolist(),
                  step=[run.history[i]["step"] for i in at], flops_sampling=spent[-1, 0], size=size,
                  rollouts_explorer=sum(line.get("rollouts_explorer", 0) for line in run.history),
                  cold=[cold["eval_strict_pass@1"], cold["eval_strict_pass@16"]])
    result |= {"strict@1": curve("strict_pass@1"), "strict@16": curve("strict_pass@16"), "answer@1": curve("pass@1")}
    path_of(job).parent.mkdir(parents=True, exist_ok=True)
    train.write_whole(path_of(job), lambda file: file.write(json.dumps(result).encode()))
    shutil.rmtree(args.out)


def flops(line, size):
    """[of sampling, of training] in a step."""
    tokens = {who: line[f"rollouts_{who}"] * (line[f"length_{who}"] or 0) for who in size}
    tokens["learner"] += line.get("tokens_thrown_away", 0)
    return [sum(2 * size[who] * tokens[who] for who in size), (6 + 2) * size["learner"] * line["tokens_trained"]]


def make_runs(jobs, args, title):
    """Makes the runs that are not there and publishes all. Returns {job: run}."""
    do(jobs, args.workers, title, work, is_done)
    found = [json.loads(path.read_text()) for path in sorted((RUNS / "results").rglob("*.json"))]
    args.assets.mkdir(parents=True, exist_ok=True)
    (args.assets / "runs.json.gz").write_bytes(gzip.compress(json.dumps(found).encode(), mtime=0))
    return published(args)


def published(args):
    runs = json.loads(gzip.decompress((args.assets / "runs.json.gz").read_bytes()))
    return {tuple(run[key] for key in ("place", "pair", "arm", "setting", "seed")): run for run in runs}


# ---- the three stages --------------------------------------------------------------------------------------

def search(args):
    make_models("habit", SEARCH_PAIRS, (), args.workers)
    runs = make_runs([("home", pair, arm, setting, seed) for pair in SEARCH_PAIRS for seed in SEARCH_SEEDS
                      for arm in args.arms for setting in SETTINGS.get(arm, RATES)], args, "search")
    for arm in args.arms:
        print(f"{arm:20}" + "".join(f"{reach:9.3f}  {setting}" for setting, reach in searched(runs, arm).items()))


def searched(runs, arm):
    """{setting: mean area on the search pairs}. ValueError if a run is missing."""
    try:
        return {setting: np.mean([area(runs["home", pair, arm, setting, seed]["strict@1"])
                                  for pair in SEARCH_PAIRS for seed in SEARCH_SEEDS])
                for setting in SETTINGS.get(arm, RATES)}
    except KeyError:
        raise ValueError(f"{arm} has not been searched: run `python recipes/worth.py search`") from None


def best_setting(runs, arm):
    reached = searched(runs, arm)
    return max(reached, key=reached.get)


def confirm(args):
    runs = published(args)
    chosen = {arm: best_setting(runs, arm) for arm in args.arms}
    make_models("habit", range(FIRST, FIRST + args.pairs), (), args.workers)
    make_runs([("home", pair, arm, setting, seed) for seed in range(args.seeds)
               for pair in qualified("habit", args.pairs, FIRST) for arm, setting in chosen.items()], args, "confirm")
    report(args)


def boundary(args):
    for place, (task, *who, _) in list(PLACES.items())[1:]:
        make_models(task, range(FIRST, FIRST + args.pairs), (), args.workers)
        pairs = qualified(task, args.pairs, FIRST)
        make_models(task, pairs, [name for name in who if name not in ("learner", "explorer")], args.workers)
        jobs = [(place, pair, arm, rate, seed) for seed in range(args.seeds) for pair in pairs
                for arm in ("GRPO", *NO_T_MIX) for rate in RATES[1:]]
        runs = make_runs(jobs, args, place)
        for arm, rate in ((arm, rate) for arm in NO_T_MIX for rate in RATES[1:]):
            of = lambda arm: np.array([[area(runs[place, pair, arm, rate, seed]["strict@1"])
                                        for seed in range(args.seeds)] for pair in pairs])
            print(f"{place:10} {arm:20} {rate:13} less GRPO {judged(of(arm) - of('GRPO'), NEVER_LOSE)}", flush=True)


# ---- the report --------------------------------------------------------------------------------------------

HYPOTHESES = (  # what, endpoint, the arm that should be ahead, of which
    ("the explorer gives the early speed", "early", "S2L-PO", "GRPO at T 1.6"),
    ("temperature gives the end", "last", "GRPO at T 1.6", "S2L-PO"),
    ("they add up", "area", "S2L-PO at T 1.6", "S2L-PO"), ("they add up", "area", "S2L-PO at T 1.6", "GRPO at T 1.6"))


def endpoints(run, budget):
    """Of strict pass@1 where nothing else is said. `budget`: the FLOPs of S2L-PO's run of this pair and seed;
    a run that ends before it keeps its last value."""
    steps, spent, curve = run["step"], run["flops"], run["strict@1"]
    return {"equal": area(np.interp(np.linspace(0, budget, 193), spent, curve)), "area": area(curve),
            "early": area([value for step, value in zip(steps, curve) if step <= 32]), "last": curve[-1],
            "last@16": run["strict@16"][-1], "cold": run["cold"][0], "steps": reached(steps, curve),
            "GFLOPs": reached(spent, curve) / 1e9, "cost": spent[-1] / budget}


def reached(x, curve, level=0.8):
    """The x at which the curve first reaches the level, interpolated; the last x where it never does."""
    above = next((i for i, value in enumerate(curve) if value >= level), None)
    if not above:
        return x[-1] if above is None else x[0]
    return float(np.interp(level, curve[above - 1:above + 1], x[above - 1:above + 1]))


def judged(difference, margin=MARGIN):
    """`+.012 [-.010, +.034], won 14 of 24: as good`, of differences [pairs, seeds]."""
    mean, half = interval(difference)
    verdict = "too few pairs" if half is None else "better" if mean > half else "as good" if (
        mean - half > -margin) else "worse" if mean + half < 0 else "undecided"
    return f"{shown(mean, half)}, won {(difference > 0).sum()} of {difference.size}: {verdict}"


def confirmed(runs, arms):
    """{arm: {endpoint: [pairs, seeds]}} of the confirming runs of arms with as many of them as S2L-PO has."""
    setting = {arm: best_setting(runs, arm) for arm in {REFERENCE, *arms}}
    mine = [key for key in runs if key[0] == "home" and key[1] >= FIRST and key[2:4] == (REFERENCE, setting[REFERENCE])]
    pairs, seeds = (sorted({key[i] for key in mine}) for i in (1, 4))
    found = {}
    for arm in arms:
        of = lambda pair, seed, arm: runs["home", pair, arm, setting[arm], seed]
        try:
            each = [[endpoints(of(pair, seed, arm), of(pair, seed, REFERENCE)["flops"][-1]) for seed in seeds]
                    for pair in pairs]
        except KeyError:
            print(f"{arm}: not all of its runs are there")
            continue
        found[arm] = {key: np.array([[run[key] for run in row] for row in each]) for key in each[0][0]}
        found[arm]["curve"] = np.mean([of(pair, seed, arm)["strict@1"] for pair in pairs for seed in seeds], axis=0)
    return found, setting


def report(args):
    found, setting = confirmed(published(args), args.arms)
    shape = found[REFERENCE]["equal"].shape
    print(f"\n{shape[0]} pairs x {shape[1]} seeds. equal: area at equal FLOPs; cost: FLOPs in ratio to {REFERENCE}'s")
    keys = list(found[REFERENCE])[:-1]
    print(f"{'':20}" + "".join(f"{key:>8}" for key in keys) + f"   equal, less {REFERENCE}'s")
    for arm, row in found.items():
        against = judged(row["equal"] - found[REFERENCE]["equal"]) if arm != REFERENCE else "reference"
        print(f"{arm:20}" + "".join(f"{row[key].mean():8.3f}" for key in keys) + f"   {against} ({setting[arm]})")
    for what, key, first, second in HYPOTHESES:
        if first in found and second in found:
            print(f"{what}: {key} of {first}, less that of {second}: {judged(found[first][key] - found[second][key])}")
    best = max(found, key=lambda arm: found[arm]["equal"].mean())
    for arm in found:  # the simplest that is as good
        if arm == best or judged(found[arm]["equal"] - found[best]["equal"]).endswith((": as good", ": better")):
            print(f"recommended: {arm} (highest is {best})")
            break
    draw(args.assets / "worth.png", found)


SHOWN = {"GRPO": "#000000", "GRPO at T 1.6": "#e69f00", "RAFT warm start": "#009e73", "S2L-PO": "#0072b2",
         "S2L-PO at T 1.6": "#d55e00", "measured, positive": "#cc79a7"}  # Okabe and Ito's


def draw(path, found):
    """Mean curves of some arms; of all, the difference to S2L-PO at equal FLOPs beside the margin."""
    if (figure := new_figure(2)) is None:
        return
    figure, (left, right) = figure
    for arm, color in SHOWN.items():
        if arm in found:
            left.plot(np.arange(len(found[arm]["curve"])) * 8, found[arm]["curve"], color=color, label=arm)
    left.set(xlabel="step", ylabel="held-out strict pass@1", ylim=(0, 1.02))
    left.legend(fontsize=7)
    right.axvspan(-MARGIN, MARGIN, color="#dddddd")
    for i, arm in enumerate(found):
        mean, half = interval(found[arm]["equal"] - found[REFERENCE]["equal"])
        right.errorbar(mean, -i, xerr=half, fmt="o", markersize=4, capsize=2, color=SHOWN.get(arm, "#777777"))
    right.set_yticks([-i for i in range(len(found))], list(found), fontsize=7)
    right.set(xlabel=f"area at equal FLOPs, less {REFERENCE}'s; grey: the margin")
    figure.savefig(path, dpi=130)


def main(argv=None):
    parser = argparse.ArgumentParser(description="S2L-PO beside what a practitioner would do instead.")
    add = parser.add_argument
    add("stage", choices=("search", "confirm", "boundary", "report"), help="docs/worth.md has the plan")
    add("--pairs", type=int, default=PAIRS, help=f"confirming pairs, up to 10 ({PAIRS})")
    add("--seeds", type=int, default=SEEDS, help=f"RL seeds for each ({SEEDS})")
    add("--arms", nargs="+", choices=ARMS, default=list(ARMS), metavar="ARM", help=f"{'; '.join(ARMS)} (all)")
    add("--workers", type=int, default=os.cpu_count(), help="processes of one thread each (all cores)")
    args = parser.parse_args(argv)
    args.assets = ASSETS if args.pairs >= PAIRS and args.seeds >= SEEDS else RUNS / "assets"
    try:
        globals()[args.stage](args)
    except (ValueError, OSError) as error:
        parser.exit(2, f"worth.py: error: {error}\n")
    except KeyboardInterrupt:
        parser.exit(130, "stopped: the same command goes on\n")


if __name__ == "__main__":
    main()
