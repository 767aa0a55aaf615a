"""Is the paper right? Every claim about S2L-PO as one command: a table, a JSON and a picture.

    python -m recipes.claims gain                      one claim, or `all`; docs/claims.md has the study
    python -m recipes.claims gain --pairs 2 --seeds 1  a small look
    python -m recipes.claims search                    every arm's learning rate, on a pair of its own

An *arm* is a set of train.py's flags and, for some, a loop or an explorer of another recipe. A *run* is one
arm at one learning rate on one base pair with one RL seed. A *base pair* is an explorer and a learner that
plumbing/family.py pretrains from one seed: its own corpus, table of habits, initial weights and problems.
Rates are chosen on pair 0 and used on others, the first from pair 10 on that qualify. Every arm is shown at
one rate for all and at its own best rate out of the same grid.

Runs are kept under runs/claims: an interrupted claim goes on where it stopped, and claims share runs. A claim
with all its pairs and seeds writes to assets/claims, where the published study lies, made with commit
64873bb; a smaller one to runs/claims/assets.

Intervals. Runs on one pair are alike (an easy pair is easy for every seed), so seeds alone would promise too
much. The pair is a random effect: differences to the reference arm are averaged over a pair's seeds, and
Student's t over those means. For a balanced design that is the mixed model's interval exactly. With 6 pairs t
is 2.6: an effect must be large or steady. Below 4 pairs, where t is 4.3 and more, there is no interval.
"""
import argparse
import contextlib
import itertools
import json
import math
import multiprocessing
import os
import shutil
import signal
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from tqdm import tqdm

import reward
import train
from eval import crossover as find_crossover
from eval import headroom, pass_at_k, powers_of_two, table
from plumbing import pictures
from plumbing.books import open_books
from plumbing.checkpoint import load
from plumbing.pictures import new_figure, plot_curves
from plumbing.problems import load_problems
from plumbing.terminal import one_line
from recipes.explorers import open_fleet, thinned
from recipes.measured import measured
from recipes.pairs import FIRST_PAIR, LADDER, RUNS, directory, make_member, measure, qualified
from recipes.rescue import rescue
from recipes.separate import separate

ASSETS = Path("assets/claims")
STEPS = 32
STUDY = (f"--steps {STEPS} --prompts-per-step 8 --group-size 16 --minibatches 2 --max-new-tokens 16 "
         "--eval-every 8 --eval-problems 128 --eval-n 16 --save-every 0 --device cpu").split()
GRID = (2e-4, 4e-4, 8e-4, 1.6e-3)
SEARCH_PAIR, SEARCH_SEEDS = 0, (100,)

ARMS = {  # name: train.py's flags; {base} is the directory of the base pair
    "GRPO": "--explorer none",
    "S2L-PO": "",
    "T_mix 12%": f"--mix-steps {STEPS // 8}", "T_mix 25%": f"--mix-steps {STEPS // 4}",
    "T_mix 75%": f"--mix-steps {STEPS * 3 // 4}", "T_mix 100%": f"--mix-steps {STEPS}",
    "cosine": "--schedule cosine", "abrupt": "--schedule step",
    "explorer only": "--schedule constant --explorer-share 1", "separate": "",
    **{f"GRPO at T {T}": f"--explorer none --temperature {T}" for T in (0.7, 1.3, 1.6)},
    "hot copy": "--explorer {base}/learner --explorer-temperature 1.6", "thinned": "",
    **{name: f"--explorer {{base}}/{name}" for name in ("twin", "early", "pruned")},
    "behaviour": "--off-policy behaviour", "truncated": "--off-policy truncated",
    "geometric": "--off-policy geometric", "positive": "--off-policy positive",
    "measured": "", "measured, geometric": "--off-policy geometric",
    "measured, positive": "--off-policy positive",
    "rescue": "--schedule constant", "rescue, geometric": "--schedule constant --off-policy geometric",
    "fleet of 2": "", "fleet of 3": "",
}
LOOPS = {"separate": separate, "rescue": rescue, "rescue, geometric": rescue,  # in the place of train.train
         **dict.fromkeys(("measured", "measured, geometric", "measured, positive"), measured)}
FLEETS = {"fleet of 2": ("middle",), "fleet of 3": ("middle", "twin")}         # members beside the explorer
CLAIMS = {  # name: the arms that are compared; the first is the reference
    "gain": ("GRPO", "S2L-PO"),
    "annealing": ("S2L-PO", "GRPO", "T_mix 12%", "T_mix 25%", "T_mix 75%", "T_mix 100%", "cosine", "abrupt",
                  "explorer only", "separate"),
    "noise": ("GRPO", "GRPO at T 0.7", "GRPO at T 1.3", "GRPO at T 1.6", "hot copy", "S2L-PO"),
    "diversity": ("S2L-PO", "thinned", "GRPO"),
    "size-or-difference": ("S2L-PO", "twin", "early", "pruned", "GRPO"),
    "treatment": ("S2L-PO", "behaviour", "truncated", "geometric", "positive", "GRPO"),
    "measured": ("GRPO", "S2L-PO", "geometric", "positive", "measured", "measured, geometric",
                 "measured, positive", "rescue", "rescue, geometric"),
    "fleet": ("S2L-PO", "fleet of 2", "fleet of 3", "GRPO"),
}
BOTH_TASKS = ("crossover", "gain", "measured")  # the others are asked of `habit`, unless --task is given
PAIRS, SEEDS = 6, 5
FEWER = {"crossover": (3, 1), "when": (3, 1)}  # no RL, and 80 runs a pair and seed
T_975 = (3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # Student's t, 97.5%, 3 to 9 degrees of freedom


# ---- runs --------------------------------------------------------------------------------------------------

def make_models(task, pairs, members, workers):
    """The pairs first, then those of their relatives that are wanted."""
    do([(task, pair, "explorer") for pair in pairs], workers, f"{task}: base pairs")
    do([(task, pair, name) for pair in pairs for name in members], workers, f"{task}: other models")


def pairs_of(task, args):
    make_models(task, range(FIRST_PAIR, FIRST_PAIR + args.pairs), (), args.workers)  # if all should qualify
    return qualified(task, args.pairs)


def members_of(arms):
    named = [part.removeprefix("{base}/") for arm in arms for part in ARMS[arm].split() if "{base}/" in part]
    return [*named, *(name for arm in arms for name in FLEETS.get(arm, ()))]


def flags_of(arm, base):
    """`S2L-PO by epoch 5`: the arm S2L-PO with base/epoch 5 as its explorer."""
    name, _, explorer = arm.partition(" by ")
    own = ["--explorer", base / explorer] if explorer else []
    return [*(part.format(base=base) for part in ARMS[name].split()), *own]


def opener_of(arm, base):
    if arm == "thinned":
        return lambda args, run: thinned(train.open_explorer(args, run))
    if arm in FLEETS:
        return lambda args, run: open_fleet(args, run, [str(base / name) for name in FLEETS[arm]])
    return train.open_explorer


def path_of(task, pair, arm, lr, seed):
    return RUNS / "results" / f"{task}-{pair}" / arm.replace(" ", "_") / f"{lr:g}" / f"{seed}.jsonl"


def run_quietly(base, flags, open_explorer=train.open_explorer, loop=train.train):
    """(args, run) of train.py's own path on a base pair, with one thread, when it has ended."""
    torch.set_num_threads(1)
    out = RUNS / f"worker-{os.getpid()}"
    shutil.rmtree(out, ignore_errors=True)
    with (open(os.devnull, "w") as null, contextlib.redirect_stdout(null), contextlib.redirect_stderr(null),
          mock.patch.object(pictures, "draw")):  # pictures that nobody sees would be a quarter of its time
        args = train.parse_flags([str(flag) for flag in (
            *STUDY, "--learner", base / "learner", "--explorer", base / "explorer",
            "--data", base / "train.jsonl", "--eval-data", base / "heldout.jsonl", "--out", out, *flags)])
        run, explore = train.load_run(args, open_explorer)
        open_books(args, run, None)  # without an evaluation of the explorer
        loop(args, run, explore)
    return args, run


def work(job):
    """In a worker: a member to pretrain (task, pair, name) or a run (task, pair, arm, lr, seed). Of a
    run, metrics.jsonl is left, as path_of names it."""
    if len(job) == 3:
        with open(os.devnull, "w") as null, contextlib.redirect_stderr(null):
            torch.set_num_threads(1)
            return make_member(*job)
    (task, pair, what, lr, seed), base = job, directory(*job[:2])
    learner, _, arm = what.rpartition(" | ")
    flags = ("--learner", base / (learner or "learner"), "--lr", lr, "--seed", seed, *flags_of(arm, base))
    args, _ = run_quietly(base, flags, opener_of(arm, base), LOOPS.get(arm, train.train))
    path_of(*job).parent.mkdir(parents=True, exist_ok=True)
    os.replace(Path(args.out) / "metrics.jsonl", path_of(*job))
    shutil.rmtree(args.out)


def is_done(job):
    return (directory(*job[:2]) / job[2]).exists() if len(job) == 3 else path_of(*job).exists()


def do(jobs, workers, title, work=work, is_done=is_done):
    """Does those jobs that are not done yet, side by side. Interrupted, what is done stays done."""
    jobs = [job for job in dict.fromkeys(jobs) if not is_done(job)]
    if not jobs:
        return
    usual = signal.signal(signal.SIGINT, signal.SIG_IGN)  # and so do workers: Ctrl-C ends them from here
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        signal.signal(signal.SIGINT, usual)
        for _ in tqdm(pool.imap_unordered(work, jobs), total=len(jobs), desc=title, dynamic_ncols=True):
            pass


def curve(task, pair, arm, lr, seed):
    """{metric: values at the evaluations} of a run."""
    lines = [json.loads(line) for line in path_of(task, pair, arm, lr, seed).read_text().splitlines()]
    evals = [line for line in lines if "eval_pass@1" in line]
    return {name: [line[f"eval_{key}"] for line in evals] for name, key in (
        ("strict@1", "strict_pass@1"), ("strict@16", "strict_pass@16"), ("answer@1", "pass@1"))}


def area(values):
    """Mean height of a curve at equal distances (trapezoid rule): the whole of training in one number."""
    return float(np.mean((np.array(values[1:]) + values[:-1]) / 2))


def numbers(task, pairs, arm, lr, seeds):
    """{metric: [pairs, seeds]}."""
    curves = [[curve(task, pair, arm, lr, seed) for seed in seeds] for pair in pairs]
    of = lambda f: np.array([[f(c) for c in row] for row in curves])
    return {"area@1": of(lambda c: area(c["strict@1"])), "area@16": of(lambda c: area(c["strict@16"])),
            "final@1": of(lambda c: c["strict@1"][-1]), "final@16": of(lambda c: c["strict@16"][-1]),
            "answer@1": of(lambda c: c["answer@1"][-1]), "curve": of(lambda c: c["strict@1"])}


def interval(values):
    """(mean, half width) of the 95% interval for values [pairs, seeds], the pair being a random effect. Below
    4 pairs the half width is None."""
    means = np.asarray(values).mean(1)
    if len(means) < 4:
        return float(means.mean()), None
    return float(means.mean()), float(T_975[len(means) - 4] * means.std(ddof=1) / math.sqrt(len(means)))


def shown(mean, half):
    return f"{mean:+.3f}" + ("" if half is None else f" [{mean - half:+.3f}, {mean + half:+.3f}]")


# ---- learning rates ----------------------------------------------------------------------------------------

def search(args):
    """Every arm at every rate of the grid on the search pair. Writes search.json, which all claims read."""
    arms = list(dict.fromkeys(arm for name in CLAIMS for arm in CLAIMS[name]))
    path = ASSETS / "search.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    for task in args.task or ("habit", "natural"):
        asked = [name for name in CLAIMS if args.task or task == "habit" or name in BOTH_TASKS]
        wanted = [arm for arm in arms if any(arm in CLAIMS[name] for name in asked)]
        make_models(task, [SEARCH_PAIR], members_of(wanted), args.workers)
        do([(task, SEARCH_PAIR, arm, lr, seed) for seed in SEARCH_SEEDS for lr in GRID for arm in wanted],
           args.workers, f"search on {task}")
        reached = lambda arm, lr: float(numbers(task, [SEARCH_PAIR], arm, lr, SEARCH_SEEDS)["area@1"].mean())
        found[task] = {arm: {f"{lr:g}": reached(arm, lr) for lr in GRID} for arm in wanted}
        print(f"\n{task}: area under held-out strict pass@1, pair {SEARCH_PAIR}, RL seeds {SEARCH_SEEDS}")
        print(" " * 22 + "".join(f"{lr:>10g}" for lr in GRID))
        for arm, row in found[task].items():
            starred = [f"{value:9.3f}{'*' if value == max(row.values()) else ' '}" for value in row.values()]
            print(f"{arm:22}" + "".join(starred))
    write_json(path, found)


def rates(task, arm):
    """(equal, best): the rate at which GRPO and S2L-PO do best on average, and the arm's own best, on the
    search pair."""
    try:
        found = json.loads((ASSETS / "search.json").read_text())[task]
        own = found[arm]
    except (OSError, KeyError):
        raise ValueError(f"{ASSETS}/search.json has no rates of {arm} on {task}: "
                         f"run `python -m recipes.claims search --task {task}`") from None
    together = {lr: found["GRPO"][lr] + found["S2L-PO"][lr] for lr in found["GRPO"]}
    return float(max(together, key=together.get)), float(max(own, key=own.get))


# ---- the comparison of arms --------------------------------------------------------------------------------

def compare(name, args):
    """Runs a claim's arms at the equal rate and at each one's own best; table, JSON and picture."""
    arms = CLAIMS[name]
    for task in args.task or (("habit", "natural") if name in BOTH_TASKS else ("habit",)):
        equal, best = ({arm: rates(task, arm)[i] for arm in arms} for i in range(2))
        pairs, seeds = pairs_of(task, args), range(args.seeds)
        make_models(task, pairs, members_of(arms), args.workers)
        do([(task, pair, arm, lr, seed) for seed in seeds for pair in pairs
            for arm, lr in (*equal.items(), *best.items())], args.workers, f"{name} on {task}")
        print(f"\n{name} on {task}: {len(pairs)} base pairs x {len(seeds)} seeds, held-out strict pass@k"
              + ("; 95% intervals" if len(pairs) >= 4 else "; too few pairs for intervals"))
        result = {"task": task, "pairs": pairs, "seeds": len(seeds), "reference": arms[0]}
        for which, chosen, title in (("equal", equal, "all at one rate"), ("best", best, "each at its best")):
            found = {arm: numbers(task, pairs, arm, lr, seeds) | {"lr": lr} for arm, lr in chosen.items()}
            result[which] = beside(arms[0], found)
            print(f"\n{title:26}{'rate':>8}{'area@1':>8}{'final@1':>9}{'@16':>7}{'answer@1':>10}   "
                  f"area@1 (runs won) and area@16, less {arms[0]}'s")
            for arm, row in result[which].items():
                difference = (f"{shown(row['gain'], row['half'])} ({row['wins']}/{row['of']})   "
                              f"{shown(row['gain@16'], row['half@16'])}")
                print(f"{arm:26}{row['lr']:8g}{row['area@1']:8.3f}{row['final@1']:9.3f}{row['final@16']:7.3f}"
                      f"{row['answer@1']:10.3f}   {'reference' if arm == arms[0] else difference}")
        path = args.assets / (name if task == "habit" else f"{name}-{task}")
        write_json(path.with_suffix(".json"), result)
        draw(path, result)


def beside(reference, arms):
    """{arm: means over runs, and differences to the reference with intervals} from {arm: `numbers`, lr}."""
    rows = {}
    for arm, got in arms.items():
        one, sixteen = (got[key] - arms[reference][key] for key in ("area@1", "area@16"))  # [pairs, seeds]
        rows[arm] = {"lr": got["lr"]} | {key: got[key].mean((0, 1)).tolist() for key in got if key != "lr"}
        rows[arm] |= dict(zip(("gain", "half", "gain@16", "half@16"), interval(one) + interval(sixteen)))
        rows[arm] |= {"wins": int((one > 0).sum()), "of": one.size, "runs": got["area@1"].tolist()}
    return rows


def draw(path, result):
    """Learning curves at each arm's own best rate; gains over the reference, at both choices of rate."""
    if (figure := new_figure(2)) is None:
        return
    figure, (left, right) = figure
    others = itertools.cycle(("#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#8c6d1f", "black", "#7b3294",
                              "#b2182b"))
    for i, (arm, best) in enumerate(result["best"].items()):
        color = {"GRPO": pictures.GRPO, "S2L-PO": pictures.LEARNER}.get(arm) or next(others)  # in all figures
        left.plot(np.arange(len(best["curve"])) * 8, best["curve"], "o-", markersize=3, color=color,
                  label=f"{arm} ({best['lr']:g})")
        for which, shift, marker in (("equal", -0.12, "o"), ("best", 0.12, "s")):
            row = result[which][arm]
            if arm != result["reference"]:
                right.errorbar(row["gain"], -i + shift, xerr=row["half"], fmt=marker, markersize=4, capsize=2,
                               color=color, markerfacecolor="white" if which == "equal" else color)
    left.set(xlabel="step", ylabel="held-out strict pass@1", title=f"{path.name}: each at its own best rate")
    figure.legend(fontsize=7, ncols=5, loc="outside lower center")
    right.axvline(0, color="grey", linewidth=0.8)
    right.set_yticks([-i for i in range(1, len(result["best"]))], list(result["best"])[1:], fontsize=8)
    right.set(title="hollow: one rate; full: own best", xlabel=f"area@1, less {result['reference']}'s")
    figure.savefig(path.with_suffix(".png"), dpi=110)


def write_json(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")


# ---- claims that are not, or not only, a comparison of arms ------------------------------------------------

def crossover(name, args):
    """pass@k of a ladder of four sizes, k to 256, on all pairs' problems; bootstrap over problems."""
    n, random = 256, np.random.default_rng(0)
    ks = powers_of_two(n)
    for task in args.task or ("habit", "natural"):
        pairs, each, leads = pairs_of(task, args), {}, {}
        make_models(task, pairs, LADDER[task], args.workers)
        for member in LADDER[task]:
            right = [c for pair in pairs for c in measure(task, pair, member, n)["strict"]]
            each[member] = np.array([[pass_at_k([c], n, k) for k in ks] for c in right])  # [problems, ks]
        shown_first = ("learner", "explorer", "middle", "narrow")
        curves = {member: each[member].mean(0).tolist() for member in shown_first}
        print(f"\n{name} on {task}: strict pass@k, {n} rollouts, {len(right)} problems of {len(pairs)} pairs")
        print(table(ks, curves))
        draws = random.integers(len(right), size=(1_000, len(right)))
        band = lambda values: np.quantile(values[draws].mean(1), (0.025, 0.975), axis=0)  # -> [2, ks]
        for larger, smaller in itertools.combinations(reversed(LADDER[task]), 2):
            lead, k = each[smaller] - each[larger], find_crossover(ks, curves[larger], curves[smaller])
            (low, *_, low_n), (high, *_, high_n) = band(lead).tolist()
            leads[f"{smaller} less {larger}"] = {
                "at 1": [low, high], f"at {n}": [low_n, high_n], "crossover": k}
            print(f"{smaller:8} less {larger:8} at k = 1 [{low:+.3f}, {high:+.3f}], at {n} [{low_n:+.3f}, "
                  f"{high_n:+.3f}], crossover " + (f"at k = {k:.1f}" if k else "none"))
        bands = {member: band(each[member]) for member in curves}
        path = args.assets / (name if task == "habit" else f"{name}-{task}")
        write_json(path.with_suffix(".json"), {
            "task": task, "pairs": pairs, "k": ks, "pass@k": curves, "leads": leads,
            "95%": {member: values.tolist() for member, values in bands.items()}})
        if figure := new_figure(1):
            crossing = find_crossover(ks, *list(curves.values())[:2])
            plot_curves(figure[1], curves, f"base models of `{task}`", crossing)
            for low, high in bands.values():
                figure[1].fill_between(ks, low, high, alpha=0.2)
            figure[0].savefig(path.with_suffix(".png"), dpi=110)


def compute(name, args):
    """Rollout FLOPs (2 per parameter and token, prompts once for each source) and seconds of S2L-PO's runs in
    ratio to GRPO's: the runs of `gain` at the equal rate."""
    compare("gain", args)
    for task in args.task or ("habit", "natural"):
        pairs, spent = pairs_of(task, args), {arm: [] for arm in CLAIMS["gain"]}
        for pair, arm, seed in itertools.product(pairs, spent, range(args.seeds)):
            base = directory(task, pair)
            size = {who: sum(p.numel() for p in load(base / who)[0].parameters())
                    for who in ("explorer", "learner")}
            prompt = 8 * len(load_problems(base / "train.jsonl")[0].question)  # a step's
            lines = path_of(task, pair, arm, rates(task, arm)[0], seed).read_text().splitlines()
            steps = [line for line in map(json.loads, lines) if line["step"]]
            flops = sum(2 * size[who] * (line[f"rollouts_{who}"] * line[f"length_{who}"] + prompt)
                        for line in steps for who in size if line[f"rollouts_{who}"])
            sampling = sum(line["seconds_sampling"] for line in steps)
            training = sum(line["seconds_training"] for line in steps)
            spent[arm].append((flops, sampling, sampling + training))
        ratios = np.divide(spent["S2L-PO"], spent["GRPO"]).reshape(len(pairs), args.seeds, 3)
        kinds = ("rollout FLOPs", "rollout seconds", "step seconds")
        result = {kind: interval(ratios[..., i]) for i, kind in enumerate(kinds)}
        print(f"\n{name} on {task}, S2L-PO in ratio to GRPO: "
              + ", ".join(f"{kind} {shown(*found)}" for kind, found in result.items()))
        write_json(args.assets / f"{name if task == 'habit' else f'{name}-{task}'}.json", result)


def diversity(name, args):
    """How groups of 16 of the base models vary; then training with the explorer's rollouts thinned to the
    learner's variety."""
    pairs, rows = pairs_of("habit", args), {}
    kinds = "distinct methods", "distinct answers", "distinct texts", "method entropy", "executed"
    for label, member, options in (
            ("learner", "learner", {}), ("learner at T 1.3", "learner", {"temperature": 1.3}),
            ("learner at T 1.6", "learner", {"temperature": 1.6}), ("explorer", "explorer", {}),
            ("explorer, thinned", "explorer", {"thin": True})):
        found = [measure("habit", pair, member, 16, **options) for pair in pairs]
        rows[label] = {kind: float(np.mean([f[kind] for f in found])) for kind in kinds}
        rows[label]["pass@16"] = float(np.mean([pass_at_k(f["strict"], 16, 16) for f in found]))
    print("\ngroups of 16 on held-out problems")
    print(" " * 20 + "".join(f"{kind:>18}" for kind in (*kinds, "pass@16")))
    for label, row in rows.items():
        print(f"{label:20}" + "".join(f"{value:18.3f}" for value in row.values()))
    write_json(args.assets / "diversity-measured.json", rows)
    compare(name, args)


def when(name, args):
    """The map: gain of S2L-PO over GRPO, each at its best rate of the grid there, over the strength of the
    learner's habit and the competence of the explorer. Then other explorers, and the other task."""
    learners = ("noise 32%", "noise 8%", "learner", "noise 0%")
    explorers = ("narrow", "epoch 3", "epoch 4", "explorer")
    pairs, seeds, places = pairs_of("habit", args), range(args.seeds), []
    make_models("habit", pairs, (*learners, *explorers), args.workers)
    # The pair's own learner and explorer are what `gain` trains: the same arms, so the same runs.
    name_of = lambda learner, arm: arm if learner == "learner" else f"{learner} | {arm}"
    arm_of = lambda learner, arm: name_of(learner, arm).removesuffix(" by explorer")
    arms = [arm_of(learner, arm) for learner in learners
            for arm in ("GRPO", *(f"S2L-PO by {explorer}" for explorer in explorers))]
    do([("habit", pair, arm, lr, seed) for seed in seeds for pair in pairs for arm in arms for lr in GRID],
       args.workers, name)
    print(f"\n{name}: {len(pairs)} pairs x {len(seeds)} seeds; area@1, each at the best rate of {GRID}")
    areas = lambda arm: [numbers("habit", pairs, arm, lr, seeds)["area@1"] for lr in GRID]
    for learner, explorer in itertools.product(learners, explorers):
        best = [max(areas(arm_of(learner, arm)), key=np.mean) for arm in ("GRPO", f"S2L-PO by {explorer}")]
        places.append(place("habit", pairs, learner, explorer, *best, title=not places))
    print("\nelsewhere, each at its own best rate of the search pair")
    elsewhere = []
    for task, arm in (("habit", "twin"), ("habit", "early"), ("habit", "pruned"), ("natural", "S2L-PO")):
        others, explorer = pairs_of(task, args), "explorer" if arm == "S2L-PO" else arm
        make_models(task, others, members_of([arm]), args.workers)
        both = {who: rates(task, who)[1] for who in ("GRPO", arm)}
        do([(task, pair, who, lr, seed) for seed in seeds for pair in others for who, lr in both.items()],
           args.workers, name)
        best = [numbers(task, others, who, lr, seeds)["area@1"] for who, lr in both.items()]
        elsewhere.append(place(task, others, "learner", explorer, *best, title=not elsewhere))
    write_json(args.assets / f"{name}.json", {
        "pairs": pairs, "seeds": len(seeds), "grid": GRID, "places": places, "elsewhere": elsewhere})
    draw_map(args.assets / f"{name}.png", learners, explorers, places, elsewhere)


def place(task, pairs, learner, explorer, grpo, s2l, title):
    """Prints and returns what models are like before training, and areas [pairs, seeds] after."""
    first, second = ([measure(task, pair, who, 64) for pair in pairs] for who in (learner, explorer))
    right = lambda models: [count for model in models for count in model["strict"]]  # on all pairs' problems
    fails, succeeds, own = headroom(right(first), right(second), 64, 16)
    ratio = succeeds / own if own else math.inf if succeeds else math.nan
    found = {"task": task, "learner": learner, "explorer": explorer, "groups fail": fails,
             "explorer's": succeeds, "own": own, "ratio": ratio,
             "GRPO": float(grpo.mean()), "S2L-PO": float(s2l.mean()), "gain": float((s2l - grpo).mean())}
    if title:
        print("".join(f"{key:>12}" for key in found))
    print("".join(f"{x:12.4g}" if isinstance(x, float) else f"{x:>12}" for x in found.values()), flush=True)
    executed = [b["executed"] for b in second if "executed" in b]
    return found | {"ratio": str(ratio), "executed": float(np.mean(executed)) if executed else None}


def draw_map(path, learners, explorers, places, elsewhere):
    if (figure := new_figure(2)) is None:
        return
    figure, (axis, rule) = figure
    gains = np.array([place["gain"] for place in places]).reshape(len(learners), len(explorers))
    most = abs(gains).max()
    axis.imshow(gains, cmap="RdBu", vmin=-most, vmax=most, origin="lower", aspect="auto")
    axis.contour(gains, levels=[0], colors="black")  # where the gain changes sign
    for (i, j), gain in np.ndenumerate(gains):
        axis.text(j, i, f"{gain:+.2f}", ha="center", va="center", color="white" if gain > 0.25 else "black")
    axis.set_xticks(range(len(explorers)), [f"{place['explorer']}\n{place['executed']:.0%} executed"
                                            for place in places[:len(explorers)]], fontsize=8)
    axis.set_yticks(range(len(learners)), [f"{place['learner']}\n{place['groups fail']:.0%} of groups fail"
                                           for place in places[::len(explorers)]], fontsize=8)
    axis.set(title="S2L-PO's gain over GRPO", xlabel="explorer", ylabel="learner")
    for some, marker, label in ((places, "o", "the map"), (elsewhere, "s", "elsewhere")):
        ratios = [np.clip(float(place["ratio"]), 0.3, 3e3) for place in some]
        rule.plot(ratios, [place["gain"] for place in some], marker, label=label)
    rule.axhline(0, color="grey", linewidth=0.8)
    rule.set(xscale="log", title="where the learner's groups all fail", ylabel="gain",
             xlabel="explorer's success / learner's own (left end: 0; right: own is 0)")
    rule.legend(fontsize=8)
    figure.savefig(path, dpi=110)


SPECIAL = {"crossover": crossover, "compute": compute, "diversity": diversity, "when": when}


def main():
    parser = argparse.ArgumentParser(description="Test a claim of the paper, or a question it left open.")
    add, names = parser.add_argument, list(dict.fromkeys((*SPECIAL, *CLAIMS)))
    add("name", choices=("search", *names, "all"), help="docs/claims.md describes each")
    add("--pairs", type=int, help=f"base pairs, up to 10 ({PAIRS}; crossover and when 3)")
    add("--seeds", type=int, help=f"RL seeds for each pair ({SEEDS}; crossover and when 1)")
    add("--task", choices=reward.SYNTHETIC, action="append", help="the claim's own where not given")
    add("--workers", type=int, default=os.cpu_count(), help="processes of one thread each (all cores)")
    given = parser.parse_args()
    if not 1 <= (given.pairs or 1) <= 10 or (given.seeds or 1) < 1 or given.workers < 1:
        parser.error("--pairs lies between 1 and 10; --seeds and --workers start at 1")
    with one_line("claims.py"):
        if given.name == "search":
            search(given)
        for name in names if given.name == "all" else {given.name} - {"search"}:
            pairs, seeds = FEWER.get(name, (PAIRS, SEEDS))
            args = argparse.Namespace(**vars(given))
            args.pairs, args.seeds = given.pairs or pairs, given.seeds or seeds
            args.assets = ASSETS if args.pairs >= pairs and args.seeds >= seeds else RUNS / "assets"
            args.assets.mkdir(parents=True, exist_ok=True)
            SPECIAL.get(name, compare)(name, args)


if __name__ == "__main__":
    main()
