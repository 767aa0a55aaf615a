"""Seconds from `python train.py` to its first training step, with the laptop family there.

    python bench/startup.py              makes the family in runs/ first if it is missing (some minutes, once)

The run evaluates both base models before its first step; here on one problem x 2 rollouts.
"""
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import ROOT, laptop_family, machine, report, target


def seconds_to_first_step():
    with tempfile.TemporaryDirectory() as out:
        started, metrics = time.perf_counter(), Path(out, "run", "metrics.jsonl")
        command = [sys.executable, "train.py", "--steps", "1", "--out", str(metrics.parent),
                   "--eval-problems", "1", "--eval-n", "2"]
        run = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            while run.poll() is None:
                lines = metrics.read_text().splitlines() if metrics.exists() else []
                if lines and json.loads(lines[-1])["step"] == 1:
                    return time.perf_counter() - started
                time.sleep(0.01)
        finally:
            run.kill()
            run.wait()
    raise RuntimeError(f"{' '.join(command)} ended before its first step")


if __name__ == "__main__":
    laptop_family()
    bare = statistics.median(seconds_to_first_step() for _ in range(5))
    print(f"{machine()}\n\nimport to the end of the first training step {bare:6.2f} s")
    target("startup_seconds_without_evaluation", bare, 5.0)
    report()
