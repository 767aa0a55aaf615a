"""Runs side by side: a table, and a picture of held-out pass@1.

    python -m recipes.compare runs/smollm2-grpo runs/smollm2-s2lpo --out compare.png
"""
import argparse
import json
import statistics
from pathlib import Path

from plumbing.pictures import new_figure
from plumbing.terminal import one_line


def read(run):
    """Of a run's metrics.jsonl: steps and values [K] of its held-out strict pass@1, and the median seconds of
    a step, without evaluations. ValueError if nothing was evaluated."""
    lines = [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]
    evals = [(line["step"], line["eval_strict_pass@1"]) for line in lines if "eval_strict_pass@1" in line]
    spent = lambda line: sum(x for key, x in line.items() if key.startswith("seconds_"))
    seconds = [spent(line) for line in lines if line["step"]]
    if not evals or not seconds:
        raise ValueError(f"{run} has no steps with evaluations: --eval-data makes them")
    return *zip(*evals), statistics.median(seconds)


def main(argv=None):
    parser = argparse.ArgumentParser(description="Held-out pass@1 of several runs, as a table and a picture.")
    parser.add_argument("runs", nargs="+", help="directories of train.py's runs")
    parser.add_argument("--out", default="compare.png", help="picture to write (compare.png)")
    args = parser.parse_args(argv)
    with one_line("compare.py"):
        found = {run: read(run) for run in args.runs}
        width = max(map(len, found))
        print(f"{'':{width}}  steps  before     end    best  seconds a step")
        for run, (steps, values, seconds) in found.items():
            shown = "".join(f"{value:8.3f}" for value in (values[0], values[-1], max(values)))
            print(f"{run:{width}}{steps[-1]:7d}{shown}{seconds:16.2f}")
        if figure := new_figure(1):
            for run, (steps, values, _) in found.items():
                figure[1].plot(steps, values, marker=".", label=Path(run).name)
            figure[1].set(xlabel="step", ylabel="held-out pass@1", ylim=(0, 1))
            figure[1].legend()
            figure[0].savefig(args.out, dpi=130)


if __name__ == "__main__":
    main()
