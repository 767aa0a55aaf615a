"""Is the paper right? Every claim about S2L-PO as one command: a table, a JSON and a picture in assets/claims/.

    python recipes/claims.py gain --seeds 5           a claim of CLAIMS, or `all`; recipes/claims.md says what each asks
    python recipes/claims.py search                   first of all: every arm's learning rate, on the search pair

An *arm* is a set of train.py's flags. A *run* is one arm at one learning rate on one base pair with one RL seed. Runs are
kept under runs/claims, so an interrupted claim goes on where it stopped, and claims share what they have in common.

A *base pair* is an explorer and a learner that recipes/family.py pretrains from one seed: own corpus, own table of habits,
own initial weights, own problems. Rates are chosen on pair 0 and used on others, the first from pair 10 on that qualify.
Every arm is shown at one rate for all and at its own best rate out of the same grid.

Intervals. Runs on one pair are alike (an easy pair is easy for every seed), so seeds alone would promise too much. The pair
is a random effect: differences to the reference arm are averaged over a pair's seeds, and Student's t over those means.
For a balanced design that is the mixed model's interval exactly. With 6 pairs t is 2.6: an effect must be large or steady.
"""
import argparse
import contextlib
import itertools
import json
import math
import multiprocessing
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import anneal
import model as models
import reward
import train
from eval import crossover as find_crossover
from eval import WORTH_IT, new_figure, pass_at_k, plot_curves, powers_of_two, rescue, table
from recipes.pairs import FIRST_PAIR, LADDER, RUNS, directory, make_member, measure, qualified, thinned
from sample import sample

ASSETS = Path("assets/claims")
STEPS = 32
STUDY = (f"--steps {STEPS} --prompts-per-step 8 --group-size 16 --minibatches 2 --max-new-tokens 16 --eval-every 8 "
         "--eval-problems 128 --eval-n 16 --save-every 0 --device cpu --compile off").split()
GRID = (2e-4, 4e-4, 8e-4, 1.6e-3)
SEARCH_PAIR, SEARCH_SEEDS = 0, (100,)

ARMS = {  # name: train.py's flags; {base} is the directory of the base pair
    "GRPO": "--explorer none",
    "S2L-PO": "",
    "T_mix 12%": f"--mix-steps {STEPS // 8}", "T_mix 25%": f"--mix-steps {STEPS // 4}",
    "T_mix 75%": f"--mix-steps {STEPS * 3 // 4}", "T_mix 100%": f"--mix-steps {STEPS}",
    "cosine": "--schedule cosine", "abrupt": "--schedule step",
    "explorer only": "--schedule constant --explorer-share 1", "separate": "--mix separate",
    "GRPO at T 0.7": "--explorer none --temperature 0.7", "GRPO at T 1.3": "--explorer none --temperature 1.3",
    "GRPO at T 1.6": "--explorer none --temperature 1.6",
    "hot copy": "--explorer {base}/learner --explorer-temperature 1.6",
    "thinned": "",  # and `thinned` in the place of anneal.sample
    "twin": "--explorer {base}/twin", "early": "--explorer {base}/early", "pruned": "--explorer {base}/pruned",
    "behaviour": "--off-policy behaviour", "truncated": "--off-policy truncated",
    "geometric": "--off-policy geometric", "positive": "--off-policy positive",
    "measured": "--schedule measured", "measured, geometric": "--schedule measured --off-policy geometric",
    "measured, positive": "--schedule measured --off-policy positive",
    "rescue": "--schedule rescue", "rescue, geometric": "--schedule rescue --off-policy geometric",
    "fleet of 2": "--explorer {base}/explorer {base}/middle",
    "fleet of 3": "--explorer {base}/explorer {base}/middle {base}/twin",
}
CLAIMS = {  # name: the arms that are compared; the first is the reference
    "gain": ("GRPO", "S2L-PO"),
    "annealing": ("S2L-PO", "GRPO", "T_mix 12%", "T_mix 25%", "T_mix 75%", "T_mix 100%", "cosine", "abrupt", "explorer only",
                  "separate"),
    "noise": ("GRPO", "GRPO at T 0.7", "GRPO at T 1.3", "GRPO at T 1.6", "hot copy", "S2L-PO"),
    "diversity": ("S2L-PO", "thinned", "GRPO"),
    "size-or-difference": ("S2L-PO", "twin", "early", "pruned", "GRPO"),
    "treatment": ("S2L-PO", "behaviour", "truncated", "geometric", "positive", "GRPO"),
    "measured": ("GRPO", "S2L-PO", "geometric", "positive", "measured", "measured, geometric", "measured, positive", "rescue",
                 "rescue, geometric"),
    "fleet": ("S2L-PO", "fleet of 2", "fleet of 3", "GRPO"),
}
BOTH_TASKS = ("crossover", "gain", "measured")  # the others are asked of `habit` alone, unless --task says otherwise
PAIRS, SEEDS = 6, 5
FEWER = {"crossover": (3, 1), "when": (3, 1)}  # no RL, and 80 runs a pair and seed
T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # Student's t, 97.5%, 1 to 9 degrees of freedom


# ---- runs ----------------------------------------------------------------------------------------------------------

def make_models(task, pairs, members, workers):
    """The pairs first, then those of their relatives that are wanted."""
    do([(task, pair, "explorer") for pair in pairs], workers, f"{task}: base pairs")
    do([(task, pair, name) for pair in pairs for name in members], workers, f"{task}: other models")


def pairs_of(task, args):
    make_models(task, range(FIRST_PAIR, FIRST_PAIR + args.pairs), (), args.workers)  # side by side, if all should qualify
    return qualified(task, args.pairs)


def members_of(arms):
    return [part.removeprefix("{base}/") for arm in arms for part in ARMS[arm].split() if "{base}/" in part]


def flags_of(arm, base):
    """`S2L-PO by epoch 5`: the arm S2L-PO with base/epoch 5 as its explorer."""
    name, _, explorer = arm.partition(" by ")
    return [part.format(base=base) for part in ARMS[name].split()] + (["--explorer", str(base / explorer)] if explorer else [])


def path_of(task, pair, arm, lr, seed):
    return RUNS / "results" / f"{task}-{pair}" / arm.replace(" ", "_") / f"{lr:g}" / f"{seed}.jsonl"


def work(job):
    """In a worker process: a member to pretrain (task, pair, name) or a run (task, pair, arm, lr, seed), unless it is there.
    Leaves a run's metrics.jsonl as the one file path_of names."""
    with open(os.devnull, "w") as null, contextlib.redirect_stdout(null), contextlib.redirect_stderr(null):
        torch.set_num_threads(1)
        task, pair, what = job[:3]
        base = directory(task, pair)
        if len(job) == 3:
            return make_member(task, pair, what)
        lr, seed = job[3:]
        out = RUNS / f"worker-{os.getpid()}"
        shutil.rmtree(out, ignore_errors=True)
        learner, _, arm = what.rpartition(" | ")
        args = train.parse_args([*STUDY, "--learner", str(base / (learner or "learner")), "--explorer", str(base / "explorer"),
                                 "--data", str(base / "train.jsonl"), "--eval-data", str(base / "heldout.jsonl"),
                                 "--lr", str(lr), "--seed", str(seed), "--out", str(out), *flags_of(arm, base)])
        train.resolve_args(args)
        anneal.sample = thinned if arm == "thinned" else sample
        run = train.Run(args)
        train.train(args, run)
        os.close(run.locked)
        path_of(*job).parent.mkdir(parents=True, exist_ok=True)
        os.replace(out / "metrics.jsonl", path_of(*job))
        shutil.rmtree(out)


def do(jobs, workers, title):
    """Does those jobs that are not done yet, side by side. Interrupted, what is done stays done."""
    done = lambda job: (directory(*job[:2]) / job[2]).exists() if len(job) == 3 else path_of(*job).exists()
    jobs = [job for job in dict.fromkeys(jobs) if not done(job)]
    if not jobs:
        return
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        for _ in tqdm(pool.imap_unordered(work, jobs), total=len(jobs), desc=title, unit="job", dynamic_ncols=True):
            pass


def curve(task, pair, arm, lr, seed):
    """{metric: values at the evaluations} of a run."""
    lines = [json.loads(line) for line in path_of(task, pair, arm, lr, seed).read_text().splitlines()]
    evals = [line for line in lines if "eval_pass@1" in line]
    return {"step": [line["step"] for line in evals], "strict@1": [line["eval_strict_pass@1"] for line in evals],
            "strict@16": [line["eval_strict_pass@16"] for line in evals], "answer@1": [line["eval_pass@1"] for line in evals]}


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
    """(mean, half width) of the 95% interval for values [pairs, seeds], the pair being a random effect."""
    means = np.asarray(values).mean(1)
    if len(means) < 2:
        return float(means.mean()), math.nan
    return float(means.mean()), float(T_975[len(means) - 2] * means.std(ddof=1) / math.sqrt(len(means)))


# ---- learning rates ------------------------------------------------------------------------------------------------

def search(args):
    """Every arm at every rate of the grid on the search pair. Writes search.json, which all claims read."""
    arms = list(dict.fromkeys(arm for name in CLAIMS for arm in CLAIMS[name]))
    path = ASSETS / "search.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    for task in args.task or ("habit", "natural"):
        wanted = arms if task == "habit" else [arm for arm in arms if any(arm in CLAIMS.get(name, ()) for name in BOTH_TASKS)]
        make_models(task, [SEARCH_PAIR], members_of(wanted), args.workers)
        do([(task, SEARCH_PAIR, arm, lr, seed) for seed in SEARCH_SEEDS for lr in GRID for arm in wanted], args.workers,
           f"search on {task}")
        reached = lambda arm, lr: float(numbers(task, [SEARCH_PAIR], arm, lr, SEARCH_SEEDS)["area@1"].mean())
        found[task] = {arm: {f"{lr:g}": reached(arm, lr) for lr in GRID} for arm in wanted}
        print(f"\n{task}: area under held-out strict pass@1, pair {SEARCH_PAIR}, RL seeds {SEARCH_SEEDS}")
        print(f"{'':22}" + "".join(f"{lr:>10g}" for lr in GRID))
        for arm, row in found[task].items():
            starred = [f"{value:9.3f}{'*' if value == max(row.values()) else ' '}" for value in row.values()]
            print(f"{arm:22}" + "".join(starred))
    write_json("search", found)


def rates(task, arm):
    """(equal, best): the rate at which GRPO and S2L-PO do best on average, and the arm's own best, on the search pair."""
    try:
        found = json.loads((ASSETS / "search.json").read_text())[task]
    except (OSError, KeyError):
        raise ValueError(f"{ASSETS}/search.json has no rates for {task}: run `python recipes/claims.py search`") from None
    together = {lr: found["GRPO"][lr] + found["S2L-PO"][lr] for lr in found["GRPO"]}
    return float(max(together, key=together.get)), float(max(found[arm], key=found[arm].get))


# ---- the comparison of arms ----------------------------------------------------------------------------------------

def compare(name, args):
    """Runs a claim's arms at the equal rate and at each one's own best; table, JSON and picture."""
    arms = CLAIMS[name]
    for task in args.task or (("habit", "natural") if name in BOTH_TASKS else ("habit",)):
        pairs, seeds = pairs_of(task, args), range(args.seeds)
        choices = {which: {arm: rates(task, arm)[i] for arm in arms} for i, which in enumerate(("equal", "best"))}
        make_models(task, pairs, members_of(arms), args.workers)
        do([(task, pair, arm, lr, seed) for seed in seeds for pair in pairs for chosen in choices.values()
            for arm, lr in chosen.items()], args.workers, f"{name} on {task}")
        print(f"\n{name} on {task}: {len(pairs)} base pairs x {len(seeds)} seeds, held-out strict pass@k; 95% intervals")
        result = {"task": task, "pairs": pairs, "seeds": len(seeds), "reference": arms[0]}
        for which, chosen in choices.items():
            title = {"equal": "all at one rate", "best": "each at its own best rate"}[which]
            found = {arm: numbers(task, pairs, arm, lr, seeds) | {"lr": lr} for arm, lr in chosen.items()}
            result[which] = beside(arms[0], found)
            print(f"\n{title:24}{'rate':>8}{'area@1':>8}{'final@1':>9}{'@16':>7}{'answer@1':>10}"
                  f"   area@1 beside {arms[0]:10}      wins   area@16")
            for arm, row in result[which].items():
                difference = (f"{row['gain']:+.3f} [{row['gain'] - row['half']:+.3f}, {row['gain'] + row['half']:+.3f}]"
                              f"{row['wins']:6d}/{row['of']}   {row['gain@16']:+.3f} +-{row['half@16']:.3f}")
                print(f"{arm:24}{row['lr']:8g}{row['area@1']:8.3f}{row['final@1']:9.3f}{row['final@16']:7.3f}"
                      f"{row['answer@1']:10.3f}   {'reference' if arm == arms[0] else difference}")
        label = name if task == "habit" else f"{name}-{task}"
        write_json(label, result)
        draw(label, result)


def beside(reference, arms):
    """{arm: means over runs, and differences to the reference with intervals} from {arm: `numbers`, lr}."""
    rows = {}
    for arm, got in arms.items():
        one, sixteen = (got[key] - arms[reference][key] for key in ("area@1", "area@16"))  # [pairs, seeds], paired
        rows[arm] = {"lr": got["lr"]} | {key: got[key].mean((0, 1)).tolist() for key in got if key != "lr"}
        rows[arm] |= dict(zip(("gain", "half", "gain@16", "half@16"), interval(one) + interval(sixteen)))
        rows[arm] |= {"wins": int((one > 0).sum()), "of": one.size, "runs": got["area@1"].tolist()}
    return rows


def draw(label, result):
    """Learning curves at each arm's own best rate; gains over the reference with intervals, at both choices of rate."""
    if (figure := new_figure(2)) is None:
        return
    figure, (left, right) = figure
    arms = list(result["best"])
    x = np.arange(len(result["best"][arms[0]]["curve"])) * 8
    for i, arm in enumerate(arms):
        best = result["best"][arm]
        left.plot(x, best["curve"], "o-", markersize=3, color=f"C{i}", label=f"{arm} ({best['lr']:g})")
        for which, shift, marker in (("equal", -0.12, "o"), ("best", 0.12, "s")):
            row = result[which][arm]
            if arm != result["reference"]:
                right.errorbar(row["gain"], -i + shift, xerr=row["half"], fmt=marker, markersize=4, color=f"C{i}", capsize=2,
                               markerfacecolor="white" if which == "equal" else f"C{i}")
    left.set(xlabel="step", ylabel="held-out strict pass@1", title=f"{label}: each at its own best rate")
    left.legend(fontsize=7)
    right.axvline(0, color="grey", linewidth=0.8)
    right.set_yticks([-i for i in range(1, len(arms))], arms[1:], fontsize=8)
    right.set(xlabel="area under pass@1, less " + result["reference"] + "'s", title="hollow: one rate for all; full: own best")
    figure.savefig(ASSETS / f"{label}.png", dpi=110)


def write_json(name, content):
    ASSETS.mkdir(parents=True, exist_ok=True)
    (ASSETS / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")


# ---- claims that are not, or not only, a comparison of arms ------------------------------------------------------------

def crossover(name, args):
    """pass@k of a ladder of four sizes, k to 256, over all pairs' held-out problems; bootstrap intervals over problems."""
    n, random = 256, np.random.default_rng(0)
    ks = powers_of_two(n)
    for task in args.task or ("habit", "natural"):
        pairs, each, leads = pairs_of(task, args), {}, {}
        make_models(task, pairs, LADDER[task], args.workers)
        for member in LADDER[task]:
            right = [c for pair in pairs for c in measure(task, pair, member, n)["strict"]]
            each[member] = np.array([[pass_at_k([c], n, k) for k in ks] for c in right])  # [problems, ks]
        curves = {member: each[member].mean(0).tolist() for member in ("learner", "explorer", "middle", "narrow")}
        print(f"\n{name} on {task}: strict pass@k, {n} rollouts, {len(right)} problems of {len(pairs)} pairs\n{table(ks, curves)}")
        draws = random.integers(len(right), size=(1_000, len(right)))
        band = lambda values: np.quantile(values[draws].mean(1), (0.025, 0.975), axis=0)  # [problems, ks] -> [2, ks]
        for larger, smaller in itertools.combinations(reversed(LADDER[task]), 2):
            lead, k = each[smaller] - each[larger], find_crossover(ks, curves[larger], curves[smaller])
            (low, *_, low_n), (high, *_, high_n) = band(lead).tolist()
            leads[f"{smaller} less {larger}"] = {"at 1": [low, high], f"at {n}": [low_n, high_n], "crossover": k}
            print(f"{smaller:8} less {larger:8} at k = 1 [{low:+.3f}, {high:+.3f}], at {n} [{low_n:+.3f}, {high_n:+.3f}], "
                  + (f"crossover at k = {k:.1f}" if k else "no crossover"))
        bands = {member: band(each[member]) for member in curves}
        label = name if task == "habit" else f"{name}-{task}"
        write_json(label, {"task": task, "pairs": pairs, "k": ks, "pass@k": curves, "leads": leads,
                           "95%": {member: values.tolist() for member, values in bands.items()}})
        if figure := new_figure(1):
            plot_curves(figure[1], ks, curves)
            for member, (low, high) in bands.items():
                figure[1].fill_between(ks, low, high, alpha=0.2)
            figure[1].set(title=f"base models of `{task}`")
            figure[0].savefig(ASSETS / f"{label}.png", dpi=110)


def compute(name, args):
    """Rollout FLOPs (2 per parameter and token, prompts once for each source) and seconds of S2L-PO's runs in ratio to
    GRPO's: the runs of `gain` at the equal rate."""
    compare("gain", args)
    for task in args.task or ("habit", "natural"):
        pairs, spent = pairs_of(task, args), {arm: [] for arm in CLAIMS["gain"]}
        for pair, arm, seed in itertools.product(pairs, spent, range(args.seeds)):
            base = directory(task, pair)
            size = {who: sum(p.numel() for p in models.load(base / who)[0].parameters()) for who in ("explorer", "learner")}
            prompt = 8 * len(reward.load_problems(base / "train.jsonl")[0].question)  # tokens of a step's prompts
            lines = path_of(task, pair, arm, rates(task, arm)[0], seed).read_text().splitlines()
            steps = [line for line in map(json.loads, lines) if line["step"]]
            flops = sum(2 * size[who] * (line[f"rollouts_{who}"] * line[f"length_{who}"] + prompt)
                        for line in steps for who in size if line[f"rollouts_{who}"])
            sampling, training = (sum(line[f"seconds_{what}"] for line in steps) for what in ("sampling", "training"))
            spent[arm].append((flops, sampling, sampling + training))
        ratios = np.divide(spent["S2L-PO"], spent["GRPO"]).reshape(len(pairs), args.seeds, 3)
        result = {what: interval(ratios[..., i]) for i, what in enumerate(("rollout FLOPs", "rollout seconds", "step seconds"))}
        print(f"\n{name} on {task}, S2L-PO in ratio to GRPO: "
              + ", ".join(f"{what} {mean:.3f} +-{half:.3f}" for what, (mean, half) in result.items()))
        write_json(name if task == "habit" else f"{name}-{task}", result)


def diversity(name, args):
    """How groups of 16 of the base models vary; then training with the explorer's rollouts thinned to the learner's variety."""
    pairs, rows = pairs_of("habit", args), {}
    for label, member, options in (("learner", "learner", {}), ("learner at T 1.3", "learner", {"temperature": 1.3}),
                                   ("learner at T 1.6", "learner", {"temperature": 1.6}), ("explorer", "explorer", {}),
                                   ("explorer, thinned", "explorer", {"thin": True})):
        found = [measure("habit", pair, member, 16, **options) for pair in pairs]
        rows[label] = {key: float(np.mean([f[key] for f in found])) for key in
                       ("distinct methods", "distinct answers", "distinct texts", "method entropy", "executed")}
        rows[label]["pass@16"] = float(np.mean([pass_at_k(f["strict"], 16, 16) for f in found]))
    print("\ngroups of 16 on held-out problems\n" + " " * 20 + "".join(f"{key:>18}" for key in rows["learner"]))
    for label, row in rows.items():
        print(f"{label:20}" + "".join(f"{value:18.3f}" for value in row.values()))
    write_json("diversity-measured", rows)
    compare(name, args)


def when(name, args):
    """The map: gain of S2L-PO over GRPO, each at its best rate of the grid in that place, over the strength of the learner's
    habit and the competence of the explorer. Then its rule where it was not made: other explorers, the other task."""
    learners = ("noise 32%", "noise 8%", "learner", "noise 0%")
    explorers = ("narrow", "epoch 3", "epoch 4", "explorer")
    pairs, seeds, places = pairs_of("habit", args), range(args.seeds), []
    make_models("habit", pairs, (*learners, *explorers), args.workers)
    # The pair's own learner and explorer are what `gain` trains: the same arms, so the same runs.
    arm_of = lambda learner, arm: (arm if learner == "learner" else f"{learner} | {arm}").removesuffix(" by explorer")
    arms = [arm_of(learner, arm) for learner in learners for arm in ("GRPO", *(f"S2L-PO by {e}" for e in explorers))]
    do([("habit", pair, arm, lr, seed) for seed in seeds for pair in pairs for arm in arms for lr in GRID], args.workers, name)
    print(f"\n{name}: {len(pairs)} pairs x {len(seeds)} seeds; area under strict pass@1, each at its best rate of {GRID}")
    for learner, explorer in itertools.product(learners, explorers):
        best = lambda arm: max((numbers("habit", pairs, arm_of(learner, arm), lr, seeds)["area@1"] for lr in GRID), key=np.mean)
        places.append(place("habit", pairs, learner, explorer, best("GRPO"), best(f"S2L-PO by {explorer}"), title=not places))
    print("\nelsewhere, each at its own best rate of the search pair")
    elsewhere = []
    for task, arm in (("habit", "twin"), ("habit", "early"), ("habit", "pruned"), ("natural", "S2L-PO")):
        others, explorer = pairs_of(task, args), "explorer" if arm == "S2L-PO" else arm
        make_models(task, others, members_of([arm]), args.workers)
        do([(task, pair, a, rates(task, a)[1], seed) for seed in seeds for pair in others for a in ("GRPO", arm)], args.workers, name)
        best = lambda arm: numbers(task, others, arm, rates(task, arm)[1], seeds)["area@1"]
        elsewhere.append(place(task, others, "learner", explorer, best("GRPO"), best(arm), title=not elsewhere))
    write_json(name, {"pairs": pairs, "seeds": len(seeds), "grid": GRID, "places": places, "elsewhere": elsewhere})
    draw_map(name, learners, explorers, places, elsewhere)


def place(task, pairs, learner, explorer, grpo, s2l, title):
    """Prints and returns what models are like before training, and areas [pairs, seeds] after."""
    first, second = ([measure(task, pair, who, 64) for pair in pairs] for who in (learner, explorer))
    right = lambda models: [count for model in models for count in model["strict"]]  # on all pairs' problems
    fails, rescued, own = rescue(right(first), right(second), 64, 16)
    found = {"task": task, "learner": learner, "explorer": explorer, "groups fail": fails, "rescued": rescued, "own": own,
             "ratio": rescued / own if own else math.inf if rescued else math.nan, "GRPO": float(grpo.mean()), "S2L-PO": float(s2l.mean()),
             "gain": float((s2l - grpo).mean())}
    if title:
        print("".join(f"{key:>12}" for key in found))
    print("".join(f"{value:12.4g}" if isinstance(value, float) else f"{value:>12}" for value in found.values()), flush=True)
    executed = [b["executed"] for b in second if "executed" in b]
    return found | {"ratio": str(found["ratio"]), "executed": float(np.mean(executed)) if executed else None}


def draw_map(name, learners, explorers, places, elsewhere):
    if (figure := new_figure(2)) is None:
        return
    figure, (axis, rule) = figure
    gains = np.array([place["gain"] for place in places]).reshape(len(learners), len(explorers))
    axis.imshow(gains, cmap="RdBu", vmin=-abs(gains).max(), vmax=abs(gains).max(), origin="lower", aspect="auto")
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
    rule.axvline(WORTH_IT, color="grey", linestyle=":", label=f"{WORTH_IT} times")
    rule.set(xscale="log", title="where the learner's groups all fail", ylabel="gain",
             xlabel="explorer's success / learner's own (left end: 0; right: own is 0)")
    rule.legend(fontsize=8)
    figure.savefig(ASSETS / f"{name}.png", dpi=110)


SPECIAL = {"crossover": crossover, "compute": compute, "diversity": diversity, "when": when}


def main():
    parser = argparse.ArgumentParser(description="Test one of the paper's claims, or a question it left open.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("name", choices=("search", *dict.fromkeys((*SPECIAL, *CLAIMS)), "all"), help="recipes/claims.md describes each")
    fewer = "; of " + " and ".join(FEWER) + ", "
    add("--pairs", type=int, default=PAIRS, help="base pairs" + fewer + str(FEWER["when"][0]))
    add("--seeds", type=int, default=SEEDS, help="RL seeds for each pair" + fewer + str(FEWER["when"][1]))
    add("--task", choices=reward.TASKS, action="append", help="the claim's own where not given")
    add("--workers", type=int, default=os.cpu_count(), help="processes of one thread each")
    args = parser.parse_args()
    if not 2 <= args.pairs <= 1 + len(T_975) or args.seeds < 1:
        parser.error(f"--pairs must be between 2 and {1 + len(T_975)}, --seeds at least 1")
    try:
        if args.name == "search":
            return search(args)
        for name in dict.fromkeys((*SPECIAL, *CLAIMS)) if args.name == "all" else [args.name]:
            pairs, seeds = FEWER.get(name, (PAIRS, SEEDS))
            parser.set_defaults(pairs=pairs, seeds=seeds)
            SPECIAL.get(name, compare)(name, parser.parse_args())
    except (ValueError, OSError) as error:
        print(f"claims.py: error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
