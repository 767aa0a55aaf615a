"""Is S2L-PO worth it? Beside what a practitioner would do instead, on fresh pairs. The plan: docs/worth.md.

    python -m recipes.worth search       every arm at four settings on three pairs: its settings for `confirm`
    python -m recipes.worth confirm      every arm at its best setting on eight other pairs, three seeds each
    python -m recipes.worth boundary     the arms without a T_mix where S2L-PO lost before
    python -m recipes.worth report       tables, verdicts and picture from assets/worth/runs.json.gz alone

An *arm* is a set of train.py's flags and, for some, a loop of recipes/remedies.py. A *setting* is the flags
that are searched. Pairs, workers and intervals are those of recipes/claims.py. Finished runs are kept under
runs/worth: an interrupted command goes on where it stopped. What is published is not made again: to make it
anew, remove assets/worth/runs.json.gz. Below 8 pairs or 3 seeds it is a small look, which publishes to
runs/worth/assets.

FLOPs are estimated: 2 x parameters for each token sampled, by the model that sampled it, thrown away or not;
6 x parameters for each token trained on, and 2 x for pi_old's pass over it. Tokens of groups that teach
nothing are not trained on here. Prompts and evaluations are left out, and so is the entropy bonus's uniform
policy, which needs no model.
"""
import argparse
import gzip
import itertools
import json
import os
import shutil
from pathlib import Path

import numpy as np

import train
from plumbing.books import evaluate_run
from plumbing.checkpoint import load
from plumbing.files import write_whole
from plumbing.pictures import new_figure
from plumbing.terminal import one_line
from recipes.claims import GRID, SEARCH_SEEDS, area, do, interval, make_models, run_quietly, shown
from recipes.measured import measured
from recipes.pairs import directory, qualified
from recipes.remedies import LOOPS
from recipes.rescue import rescue

ASSETS, RUNS = Path("assets/worth"), Path("runs/worth")
SEARCH_PAIRS, FIRST, PAIRS, SEEDS = (20, 21, 22), 23, 8, 3  # confirming pairs are from FIRST on
MARGIN, NEVER_LOSE, REFERENCE = 0.03, 0.01, "S2L-PO"        # margins of area
ALONE = "--schedule step --mix-steps 8"  # 128 rollouts by the explorer where S2L-PO's T_mix 16 gives 135
ARMS = {  # name: flags; the simpler ones first: of arms that are as good, the first wins
    "GRPO": "--explorer none", "GRPO at T 1.6": "--explorer none --temperature 1.6",
    "GRPO at T 2.2": "--explorer none --temperature 2.2", "clip-high .28": "--explorer none --clip-high 0.28",
    "groups of 32": "--explorer none --group-size 32 --prompts-per-step 4",
    "T 1.6 to 1": "--explorer none --temperature 1.6", "MaxRL": "--explorer none",
    "entropy bonus": "--explorer none", "dynamic sampling": "--explorer none",
    "RAFT warm start": ALONE, "abrupt switch": ALONE, "S2L-PO": "",
    "S2L-PO at T 1.6": "--temperature 1.6", "S2L-PO at T 2.2": "--temperature 2.2",
    "S2L-PO, positive": "--off-policy positive",
    "rescue, positive": "--schedule constant --off-policy positive",
    "measured, positive": "--off-policy positive"}
OWN_LOOPS = {  # in the place of train.train
    "T 1.6 to 1": LOOPS["cooling"], "MaxRL": LOOPS["maxrl"], "entropy bonus": LOOPS["entropy"],
    "dynamic sampling": LOOPS["dynamic"], "RAFT warm start": LOOPS["raft"], "rescue, positive": rescue,
    "measured, positive": measured}
RATES = [f"--lr {lr:g}" for lr in GRID]
SETTINGS = {"entropy bonus": ["--lr 0.0004 --kl-coef 0.03", "--lr 0.0008 --kl-coef 0.01",
                              "--lr 0.0008 --kl-coef 0.03", "--lr 0.0008 --kl-coef 0.1"]}  # others: RATES
PLACES = {  # name: (task, learner, explorer, steps); `home` is the study. At others S2L-PO lost before
    "home": ("habit", "learner", "explorer", 96), "natural": ("natural", "learner", "explorer", 32),
    **{name: ("habit", name, "explorer", 32) for name in ("noise 8%", "noise 32%")},
    **{name: ("habit", "learner", name, 32) for name in ("pruned", "twin", "epoch 3")}}
LIKE = {"twin": "pruned", "epoch 3": "pruned"}  # these differ in the explorer alone: GRPO runs at one of them
NO_T_MIX = "rescue, positive", "measured, positive"
KEY = "place", "pair", "arm", "setting", "seed"  # of a run


# ---- runs --------------------------------------------------------------------------------------------------

def path_of(job):
    place, pair, arm, setting, seed = (str(part).replace(" ", "_") for part in job)
    return RUNS / "results" / f"{place}-{pair}" / arm / setting.strip("-") / f"{seed}.json"


def work(job):
    """In a worker: a run (place, pair, arm, setting, seed). Its curves are left, as path_of names them."""
    place, pair, arm, setting, seed = job
    task, learner, explorer, steps = PLACES[place]
    base = directory(task, pair)
    flags = ("--learner", base / learner, "--explorer", base / explorer, "--steps", steps, "--mix-steps", 16,
             "--seed", seed, *ARMS[arm].split(), *setting.split())
    args, run = run_quietly(base, flags, loop=OWN_LOOPS.get(arm, train.train))
    size = {who: sum(p.numel() for p in load(base / name)[0].parameters())
            for who, name in (("learner", learner), ("explorer", explorer))}
    spent = np.cumsum([flops(line, size) if line["step"] else 0 for line in run.history]).tolist()
    evals = [line | {"flops": x} for line, x in zip(run.history, spent) if "eval_curve" in line]
    keys = {"step": "step", "flops": "flops", "strict@1": "eval_strict_pass@1",
            "strict@16": "eval_strict_pass@16", "answer@1": "eval_pass@1"}
    result = dict(zip(KEY, job)) | {name: [line[key] for line in evals] for name, key in keys.items()}
    if place == "home":
        cold = evaluate_run(args, run, train.writer(args, run, run.learner, temperature=0.7))
        result["cold"] = cold["eval_strict_pass@1"]
    path_of(job).parent.mkdir(parents=True, exist_ok=True)
    write_whole(path_of(job), lambda file: file.write(json.dumps(result).encode()))
    shutil.rmtree(args.out)


def flops(line, size, passes=8):
    """Of a step, as the docstring above says. passes: FLOPs of a trained token, over the parameters
    (6 without pi_old's forward pass)."""
    tokens = {who: line[f"rollouts_{who}"] * (line[f"length_{who}"] or 0) for who in size}
    tokens["learner"] += line.get("tokens_thrown_away", 0)
    trained = passes * size["learner"] * line["tokens_trained"]
    return sum(2 * size[who] * tokens[who] for who in size) + trained


def make_runs(args, title, jobs):
    """Makes the runs that are neither published nor there, and publishes all. Returns {job: run}."""
    runs = published(args)
    do([job for job in jobs if job not in runs], args.workers, title, work, lambda job: path_of(job).exists())
    made = [json.loads(path.read_text()) for path in sorted((RUNS / "results").rglob("*.json"))]
    runs |= {tuple(run[key] for key in KEY): run for run in made}
    args.assets.mkdir(parents=True, exist_ok=True)
    (args.assets / "runs.json.gz").write_bytes(gzip.compress(json.dumps([*runs.values()]).encode(), mtime=0))
    return runs


def published(args):
    path = args.assets / "runs.json.gz"
    runs = json.loads(gzip.decompress(path.read_bytes())) if path.exists() else []
    return {tuple(run[key] for key in KEY): run for run in runs}


# ---- the stages --------------------------------------------------------------------------------------------

def search(args):
    make_models("habit", SEARCH_PAIRS, (), args.workers)
    runs = make_runs(args, "search", [("home", pair, arm, setting, seed) for pair in SEARCH_PAIRS
                                      for seed in SEARCH_SEEDS for arm in args.arms
                                      for setting in SETTINGS.get(arm, RATES)])
    report_search(runs, args.arms)


def searched(runs, arm):
    """[(mean area on the search pairs, setting)], the best first. ValueError if a run is missing."""
    height = lambda setting: np.mean([area(runs["home", pair, arm, setting, seed]["strict@1"])
                                      for pair in SEARCH_PAIRS for seed in SEARCH_SEEDS])
    try:
        return sorted(((height(setting), setting) for setting in SETTINGS.get(arm, RATES)), reverse=True)
    except KeyError:
        raise ValueError(f"{arm} has not been searched: run `python -m recipes.worth search`, with the same "
                         "--pairs and --seeds") from None


def confirm(args):
    runs = published(args)
    chosen = {arm: searched(runs, arm)[0][1] for arm in args.arms}
    make_models("habit", range(FIRST, FIRST + args.pairs), (), args.workers)  # if all should qualify
    pairs = qualified("habit", args.pairs, FIRST)
    make_runs(args, "confirm", [("home", pair, arm, setting, seed) for seed in range(args.seeds)
                                for pair in pairs for arm, setting in chosen.items()])
    report(args)


def boundary(args):
    for place, (task, *who, _) in list(PLACES.items())[1:]:
        make_models(task, range(FIRST, FIRST + args.pairs), (), args.workers)
        pairs, seeds = qualified(task, args.pairs, FIRST), range(args.seeds)
        make_models(task, pairs, {*who} - {"learner", "explorer"}, args.workers)
        arms = NO_T_MIX if place in LIKE else ("GRPO", *NO_T_MIX)
        make_runs(args, place, [(place, pair, arm, rate, seed) for seed in seeds for pair in pairs
                                for arm in arms for rate in RATES[1:]])
    report_boundary(published(args))


# ---- the report --------------------------------------------------------------------------------------------

HYPOTHESES = (  # what, endpoint, and which arm is ahead of which in it
    ("1. the explorer gives the early speed", "early", "S2L-PO", "GRPO at T 1.6"),
    ("2. temperature gives the end", "last", "GRPO at T 1.6", "S2L-PO"),
    ("3. they add up", "area", "S2L-PO at T 1.6", "S2L-PO"),
    ("3. they add up", "area", "S2L-PO at T 1.6", "GRPO at T 1.6"),
    *(("keeps the gain", "early", arm, "GRPO") for arm in NO_T_MIX))


def endpoints(run, budget):
    """Numbers of a run, of strict pass@1 where nothing else is said. budget: the FLOPs of S2L-PO's run of
    this pair and seed. A run that ends before that keeps its last value."""
    step, spent, curve = run["step"], run["flops"], run["strict@1"]
    return {"equal": area(np.interp(np.linspace(0, budget, 193), spent, curve)), "area": area(curve),
            "early": area([value for at, value in zip(step, curve) if at <= 32]), "last": curve[-1],
            "last@16": run["strict@16"][-1], "T 0.7": run["cold"], "steps": reached(step, curve),
            "GFLOPs": reached(spent, curve) / 1e9, "cost": spent[-1] / budget}


def reached(x, curve, level=0.8):
    """The x at which a curve first reaches the level, interpolated; the last x if it never does."""
    for i, value in enumerate(curve):
        if value >= level:
            return float(np.interp(level, curve[max(0, i - 1):i + 1], x[max(0, i - 1):i + 1]))
    return x[-1]


def judged(difference, margin=MARGIN):
    """`+0.012 [-0.010, +0.034], won 14 of 24: as good`, of differences [pairs, seeds]."""
    mean, half = interval(difference)
    verdict = ("too few pairs" if half is None else "better" if mean - half > 0 else
               "as good" if mean - half > -margin else "worse" if mean + half < 0 else "undecided")
    return f"{shown(mean, half)}, won {(difference > 0).sum()} of {difference.size}: {verdict}"


def runs_of(runs, place, arm, setting):
    """{(pair, seed): run}, in order, without the pairs of the search."""
    return {key[1::3]: run for key, run in sorted(runs.items()) if key[0] == place and key[1] >= FIRST
            and key[2:4] == (arm, setting)}


def by_pair(values):
    """[pairs, seeds] of {(pair, seed): value}. ValueError unless every pair has the same seeds."""
    pairs, seeds = ({key[i] for key in values} for i in range(2))
    if len(values) < len(pairs) * len(seeds):
        raise ValueError(f"runs are missing of {len(pairs)} pairs x {len(seeds)} seeds: make them first")
    return np.array(list(values.values())).reshape(len(pairs), -1)


def confirmed(runs, arms):
    """{arm: {endpoint: [pairs, seeds]}} of arms with the same confirming runs as S2L-PO."""
    of, found = {arm: runs_of(runs, "home", arm, searched(runs, arm)[0][1]) for arm in arms}, {}
    for arm in (arm for arm in arms if of[arm].keys() == of[REFERENCE].keys()):
        each = {key: endpoints(run, of[REFERENCE][key]["flops"][-1]) for key, run in of[arm].items()}
        names = next(iter(each.values()))
        found[arm] = {name: by_pair({key: row[name] for key, row in each.items()}) for name in names}
        found[arm]["curve"] = np.mean([run["strict@1"] for run in of[arm].values()], axis=0)
    return found


def report_search(runs, arms):
    for arm in arms:
        print(f"{arm:20}" + "".join(f"{height:9.3f} at {setting}" for height, setting in searched(runs, arm)))


def report_boundary(runs):
    for place, arm, rate in itertools.product(list(PLACES)[1:], NO_T_MIX, RATES[1:]):
        mine, grpo = runs_of(runs, place, arm, rate), runs_of(runs, LIKE.get(place, place), "GRPO", rate)
        if mine and mine.keys() == grpo.keys():
            less = {key: area(mine[key]["strict@1"]) - area(grpo[key]["strict@1"]) for key in mine}
            height = np.mean([area(run["strict@1"]) for run in grpo.values()])
            print(f"{place:10} {arm:20} {rate}, less GRPO's {height:.3f}: "
                  f"{judged(by_pair(less), NEVER_LOSE)}")


def report(args):
    runs = published(args)
    report_search(runs, args.arms)
    report_boundary(runs)
    found = confirmed(runs, args.arms)
    less = lambda key, first, second: found[first][key] - found[second][key]
    keys, of = [key for key in found[REFERENCE] if key != "curve"], found[REFERENCE]["equal"].shape
    print(f"\n{of[0]} pairs x {of[1]} seeds; equal: area at equal FLOPs; cost: FLOPs over {REFERENCE}'s\n"
          f"{'':20}" + "".join(f"{key:>8}" for key in keys) + f"   equal | area | last, less {REFERENCE}'s")
    for arm, row in found.items():
        against = [judged(less(key, arm, REFERENCE)) for key in ("equal", "area", "last") if arm != REFERENCE]
        print(f"{arm:20}" + "".join(f"{row[key].mean():8.3f}" for key in keys) + "   " + " | ".join(against))
    for what, key, first, second in HYPOTHESES:
        if {first, second} <= found.keys():
            print(f"{what}: {key} of {first}, less {second}'s: {judged(less(key, first, second))}")
    for key, cost in (("equal", "FLOPs"), ("area", "rollouts")):
        best = max(found, key=lambda arm: found[arm][key].mean())
        good = [arm for arm in found if arm == best or judged(less(key, arm, best)).endswith("as good")]
        print(f"at equal {cost} highest: {best}; as good: {', '.join(good)}; recommended: {good[0]}")
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
        for key, y, face in (("equal", -i + 0.15, None), ("area", -i - 0.15, "white")):
            mean, half = interval(found[arm][key] - found[REFERENCE][key])
            right.errorbar(mean, y, xerr=half, fmt="o", markersize=4, capsize=2, markerfacecolor=face,
                           color=SHOWN.get(arm, "#777777"))
    right.set_yticks([-i for i in range(len(found))], list(found), fontsize=7)
    right.set(xlabel=f"area less {REFERENCE}'s; grey: the margin", title="full: FLOPs; hollow: rollouts")
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
    args.arms = [arm for arm in ARMS if arm in {*args.arms, REFERENCE}]
    args.assets = ASSETS if args.pairs >= PAIRS and args.seeds >= SEEDS else RUNS / "assets"
    with one_line("worth.py"):
        globals()[args.stage](args)


if __name__ == "__main__":
    main()
