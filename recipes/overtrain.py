"""Does it come about by itself? Task `natural`, over the size of the corpus and the epochs spent on it.

    python -m recipes.overtrain             makes what is missing, then reports; docs/worth.md has the plan
    python -m recipes.overtrain --pairs 1   a small look

A *cell* is a corpus size and a number of epochs. Each pair has its own corpus, weights and problems. A model
that sees few texts many times learns them by heart. So a large learner may become confidently wrong without
any habit built in, while a small explorer cannot. The question is where that makes pass@k cross over, whether
S2L-PO gains there, and what would have foretold it before training.

Finished jobs are kept under runs/worth/overtrain, and published when the command ends or is interrupted: it
goes on where it stopped, on another machine too. With fewer than 3 pairs the result is published to
runs/worth/assets, not to assets/worth.
"""
import argparse
import contextlib
import itertools
import json
import math
import os
import shutil

import numpy as np
import torch

from eval import crossover, headroom, pass_at_k, powers_of_two
from plumbing.family import make_family
from plumbing.files import write_whole
from recipes.claims import area, do, run_quietly
from recipes.pairs import directory, measure
from recipes.worth import ASSETS, RUNS

CORPORA, EPOCHS = (2_000, 6_000, 10_000, 40_000), (4, 8, 13, 22, 40)
FIRST, PAIRS, SEEDS = 40, 3, (0, 1)
ARMS = {"GRPO": "--explorer none", "S2L-PO": ""}  # 32 steps, at the rate that the search chose for `natural`
LR, ROLLOUTS, GROUP = 4e-4, 64, 16


def key_of(job):
    """Name of a (corpus, epochs, pair) among the base pairs."""
    corpus, epochs, pair = job
    return f"{pair}-{corpus}x{epochs}"


def path_of(job):
    return RUNS / "overtrain" / f"{key_of(job)}.json"


def work(job):
    """In a worker: makes the pair of a cell, measures it and trains its learner. Leaves right rollouts out of
    ROLLOUTS for each held-out problem, and each run's area under held-out strict pass@1."""
    corpus, epochs, pair = job
    base = directory("natural", key_of(job))
    torch.set_num_threads(1)
    if not base.exists():
        with open(os.devnull, "w") as null, contextlib.redirect_stderr(null):
            make_family(base, "natural", pair, corpus_size=corpus, epochs=epochs)
    result = {"corpus": corpus, "epochs": epochs, "pair": pair}
    for who in ("learner", "explorer"):
        result[who] = measure("natural", key_of(job), who, ROLLOUTS)["strict"]
    for arm, flags in ARMS.items():
        result[arm] = []
        for seed in SEEDS:
            args, run = run_quietly(base, ("--lr", LR, "--seed", seed, *flags.split()))
            evals = [line["eval_strict_pass@1"] for line in run.history if "eval_curve" in line]
            result[arm].append(area(evals))
            shutil.rmtree(args.out)
    path_of(job).parent.mkdir(parents=True, exist_ok=True)
    write_whole(path_of(job), lambda file: file.write(json.dumps(result).encode()))


# ---- the report --------------------------------------------------------------------------------------------

def cell_of(results):
    """What a cell is like, of its pairs' results: the base models, and what S2L-PO gained."""
    right = {who: [count for result in results for count in result[who]] for who in ("learner", "explorer")}
    at = lambda who, k: pass_at_k(right[who], ROLLOUTS, k)
    gains = np.array([np.subtract(result["S2L-PO"], result["GRPO"]) for result in results])  # [pairs, seeds]
    curves = [[at(who, k) for k in powers_of_two(ROLLOUTS)] for who in ("learner", "explorer")]
    level = at("learner", 1) > at("explorer", 1) - 1e-9  # rounding is no lead
    crosses = level and at("explorer", ROLLOUTS) > at("learner", ROLLOUTS)
    fails, explorer, own = headroom(right["learner"], right["explorer"], ROLLOUTS, GROUP)
    return {"learner@1": at("learner", 1), "explorer@1": at("explorer", 1), "learner@64": curves[0][-1],
            "explorer@64": curves[1][-1], "crosses": crosses,
            "at k": crossover(powers_of_two(ROLLOUTS), *curves) if crosses else None,
            "groups fail": fails, "explorer's": explorer, "own": own,
            "GRPO": float(np.mean([result["GRPO"] for result in results])),
            "gain": float(gains.mean()), "won": f"{(gains > 0).sum()}/{gains.size}",
            "ratio": explorer / own if own else math.inf if explorer else 0.0,
            "gap at 16": at("explorer", 16) - at("learner", 16),
            "GRPO's headroom": at("learner", 16) - at("learner", 1)}


PREDICTORS = "own", "ratio", "gap at 16", "GRPO's headroom"  # fixed before the runs


def border(values, won):
    """(threshold, sign) that gets most of `won` [N] right: won where sign * value > sign * threshold. The
    lowest of those that are equally good."""
    ordered = sorted(set(values))
    between = [(a + min(b, 2 * abs(a) + 1)) / 2 for a, b in zip(ordered, ordered[1:])]  # b may be infinite
    middles = [-math.inf, *between, math.inf]
    return max(itertools.product(middles, (1, -1)), key=lambda rule: accuracy(values, won, *rule))


def accuracy(values, won, threshold, sign):
    return float(np.mean([(sign * value > sign * threshold) == w for value, w in zip(values, won)]))


def predictions(cells):
    """{predictor: (threshold, sign, share right of the other half)}, fitted on every other cell of the grid
    {(i, j): cell}, like the white squares of a chess board. `always no` is what to beat."""
    fit, rest = ([cell for (i, j), cell in cells.items() if (i + j) % 2 == half] for half in (0, 1))
    won = lambda some: [cell["gain"] > 0 for cell in some]
    found = {"always no": (math.inf, 1, 1 - float(np.mean(won(rest))))}
    for name in PREDICTORS:
        values = lambda some: [cell[name] for cell in some]
        rule = border(values(fit), won(fit))
        found[name] = (*rule, accuracy(values(rest), won(rest), *rule))
    return found


def read(path):
    return json.loads(path.read_text()) if path.exists() else []


def report(results):
    cells = {}
    for (i, corpus), (j, epochs) in itertools.product(enumerate(CORPORA), enumerate(EPOCHS)):
        here = [r for r in results if (r["corpus"], r["epochs"]) == (corpus, epochs)]
        if here:
            cells[i, j] = {"corpus": corpus, "epochs": epochs, "pairs": len(here)} | cell_of(here)
    shown = lambda x: f"{x:.3g}" if type(x) is float else str(x)
    for n, cell in enumerate(cells.values()):
        if n == 0:
            print("".join(f"{name:>{max(11, len(name) + 2)}}" for name in cell))
        print("".join(f"{shown(x):>{max(11, len(name) + 2)}}" for name, x in cell.items()))
    for there in (True, False):
        gains = [cell["gain"] for cell in cells.values() if cell["crosses"] == there]
        print(f"{len(gains)} cells {'with' if there else 'without'} a crossover; S2L-PO gained in "
              f"{sum(gain > 0 for gain in gains)}")
    if len(cells) < len(CORPORA) * len(EPOCHS):
        print(f"no predictions yet: {len(cells)} cells of {len(CORPORA) * len(EPOCHS)}")
        return
    for name, (threshold, sign, right) in predictions(cells).items():
        print(f"{name:16} says yes {'above' if sign > 0 else 'below'} {threshold:8.3g}: right in {right:.0%}")


def main(argv=None):
    parser = argparse.ArgumentParser(description="S2L-PO on `natural`, over corpus sizes and epochs.")
    add = parser.add_argument
    add("--pairs", type=int, default=PAIRS, help=f"base pairs of a cell ({PAIRS})")
    add("--workers", type=int, default=os.cpu_count(), help="processes of one thread each (all cores)")
    args = parser.parse_args(argv)
    if args.pairs < 1 or args.workers < 1:
        parser.error("--pairs and --workers start at 1")
    jobs = sorted(itertools.product(CORPORA, EPOCHS, range(FIRST, FIRST + args.pairs)),
                  key=lambda job: job[0] * job[1])  # the cheap ones first
    path = (ASSETS if args.pairs >= PAIRS else RUNS / "assets") / "overtrain.json"
    job_of = lambda result: (result["corpus"], result["epochs"], result["pair"])
    published = {job_of(result): result for result in read(path)}
    code = 0
    try:
        do([job for job in jobs if job not in published], args.workers, "cells", work,
           lambda job: path_of(job).exists())
    except KeyboardInterrupt:
        code = 130
    made = [json.loads(path_of(job).read_text()) for job in jobs if path_of(job).exists()]
    results = sorted((published | {job_of(result): result for result in made}).values(), key=job_of)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results))
    report(results)
    parser.exit(code, "stopped: the same command goes on\n" if code else None)


if __name__ == "__main__":
    main()
