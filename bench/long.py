"""A long run must stay flat: memory and seconds a step over 2,000 tiny steps, in tenths.

    python bench/long.py                    Linux only (resident memory from /proc); 4 minutes on 2 cores

A run like any other, with evaluations and checkpoints on the way. Medians of each tenth, so that what grows
shows as a trend.
"""
import argparse
import json
import statistics
import tempfile
from pathlib import Path

from common import laptop_family, report, target

import train


def main():
    parser = argparse.ArgumentParser(description="Memory and time per step of a long run.")
    parser.add_argument("--steps", type=int, default=2_000)
    steps = parser.parse_args().steps
    with tempfile.TemporaryDirectory() as directory:
        family, out = laptop_family(), Path(directory, "run")
        args = train.parse_flags([str(flag) for flag in (
            "--learner", family / "learner", "--explorer", family / "explorer", "--data",
            family / "train.jsonl", "--eval-data", family / "heldout.jsonl", "--out", out, "--steps", steps,
            "--schedule", "constant", "--prompts-per-step", 4, "--group-size", 8, "--max-new-tokens", 16,
            "--eval-problems", 32, "--eval-n", 32, "--eval-every", 50, "--save-every", 20, "--lr", 1e-4,
            "--device", "cpu")])
        run, explore = train.load_run(args, train.open_explorer)
        memory, keep_books = [], train.keep_books

        def measured(*inputs):
            keep_books(*inputs)
            status = Path("/proc/self/status").read_text()
            memory.append(int(status.partition("VmRSS:")[2].split()[0]) / 1024)
        train.keep_books = measured
        train.train(args, run, explore)
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    seconds = [sum(line[f"seconds_{what}"] for what in ("sampling", "scoring", "training")) for line in lines]
    tenths = [slice(i * steps // 10, (i + 1) * steps // 10) for i in range(10)]
    print(f"{'steps':>12}{'ms a step':>12}{'MB resident':>14}")
    seconds, memory = ([statistics.median(values[part]) for part in tenths] for values in (seconds, memory))
    for part, s, mb in zip(tenths, seconds, memory):
        print(f"{part.start + 1:>6}-{part.stop:<5}{1000 * s:12.1f}{mb:14.1f}")
    target("long_run_memory_last_tenth_of_second", memory[9] / memory[1], 1.02)
    target("long_run_seconds_last_tenth_of_second", seconds[9] / seconds[1], 1.05)
    report()


if __name__ == "__main__":
    main()
