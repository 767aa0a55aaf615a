"""A training that is killed again and again, beside one that never was: weights and metrics must be the same.

    python bench/kill.py --kills 100           about 12 minutes on 2 cores
    python bench/kill.py --kills 30 --signal TERM

Each life of the run is `python train.py .. --resume` in a process of its own. The signal comes a random
moment after the first to eighth time that a chosen kind of work has begun: loading, sampling, update, saving,
evaluating. Three runs, so that live explorers, a pool, and bfloat16 with LoRA, the KL's reference and the
schedule `measured` all have their share. After SIGTERM the exit code must be 143 (while loading the signal
itself may end the process); the slowest exit is printed.
"""
import argparse
import collections
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from common import laptop_family
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
PHASES = ("loading", "sampling", "update", "saving", "evaluating")
RUNS = {"live explorer": (),
        "pool": ("--explorer", "pool.jsonl", "--mix-steps", 12),
        "bfloat16, LoRA, KL, measured": ("--dtype", "bfloat16", "--lora-rank", 4, "--lr", 1e-2,
                                         "--kl-coef", 0.1, "--schedule", "measured")}


def child(phase_file, flags):
    """train.py as it is, but for a note of what it is at."""
    import train
    with open(phase_file, "w", buffering=1) as phases:
        def noting(phase, function):
            def noted(*args, **more):
                phases.write(phase + "\n")
                return function(*args, **more)
            return noted
        phases.write("loading\n")
        for phase, name in (("sampling", "sample"), ("update", "update"), ("saving", "write_whole"),
                            ("evaluating", "evaluate"), ("saving", "save")):
            setattr(train, name, noting(phase, getattr(train, name)))
        train.main(flags)


def live(flags, directory, kill_in=None, number=signal.SIGKILL):
    """One life, of a run that is to be killed while it does `kill_in`. Returns the seconds that dying took,
    None if the run came to its end before. RuntimeError if it failed, or with another exit code."""
    phases = directory / "phases"
    phases.write_text("")
    output = open(directory / "output", "w+")
    process = subprocess.Popen([sys.executable, __file__, "child", str(phases), *map(str, flags)],
                               cwd=directory, stdout=output, stderr=subprocess.STDOUT,
                               env=os.environ | {"OMP_NUM_THREADS": "1"})
    if kill_in:
        kind, which = kill_in, 1 if kill_in == "loading" else random.randint(1, 8)
        while process.poll() is None and phases.read_text().split("\n").count(kind) < which:
            time.sleep(0.001)
        time.sleep(random.uniform(0, 2.0 if kind == "loading" else 0.05))
        process.send_signal(number)
    sent = time.perf_counter()
    code = -number if number == signal.SIGKILL else 128 + number
    if process.wait() not in (0, code) and not (kill_in == "loading" and process.returncode == -number):
        output.seek(0)
        raise RuntimeError(f"exit code {process.returncode}: {output.read()[-2000:]}")
    return None if process.returncode == 0 else time.perf_counter() - sent


def outcome(run):
    """Metrics and weights that a run leaves, but for what a clock decides."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return ([{key: value for key, value in line.items() if "second" not in key} for line in lines],
            load_file(run / "learner" / "model.safetensors"))


def main():
    parser = argparse.ArgumentParser(description="Kill and resume a training; compare with an unbroken one.")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--signal", choices=("KILL", "TERM", "INT"), default="KILL")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    number = signal.Signals["SIG" + args.signal]
    random.seed(args.seed)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as directory:
        directory = Path(directory)
        family = laptop_family()
        pool = ["--model", family / "explorer", "--data", family / "train.jsonl", "--n", "8",
                "--max-new-tokens", "16", "--out", directory / "pool.jsonl"]
        subprocess.run([sys.executable, ROOT / "recipes/pool.py", *pool], check=True, capture_output=True)
        for i, (name, more) in enumerate(RUNS.items()):
            flags = ["--learner", family / "learner", "--explorer", family / "explorer",
                     "--data", family / "train.jsonl", "--eval-data", family / "heldout.jsonl", "--steps", 40,
                     "--prompts-per-step", 4, "--group-size", 8, "--max-new-tokens", 16, "--lr", 8e-4,
                     "--eval-problems", 32, "--eval-n", 16, "--eval-every", 2, "--save-every", 3,
                     "--device", "cpu", *more]
            live([*flags, "--out", directory / f"unbroken-{i}"], directory)
            kills, ended, slowest = collections.Counter(), 0, 0.0
            planned = args.kills // len(RUNS) + (i < args.kills % len(RUNS))
            again = [*flags, "--out", directory / f"killed-{i}", "--resume"]
            while sum(kills.values()) < planned:
                phase = random.choice(PHASES)
                took = live(again, directory, phase, number)
                if took is None:  # it ended before it could be killed: a new run for the rest of the kills
                    ended += 1
                    compare(directory, i)
                    shutil.rmtree(directory / f"killed-{i}")
                else:
                    kills[phase], slowest = kills[phase] + 1, max(slowest, took)
            live(again, directory)
            compare(directory, i)
            counts = ", ".join(f"{phase} {kills[phase]}" for phase in PHASES)
            print(f"{name}: {sum(kills.values())} times SIG{args.signal} ({counts}), dead within "
                  f"{slowest:.1f} s; {ended + 1} runs to the end, each equal to the unbroken one to the bit",
                  flush=True)


def compare(directory, i):
    lines, weights = outcome(directory / f"unbroken-{i}")
    again, weights2 = outcome(directory / f"killed-{i}")
    assert lines == again, next(pair for pair in zip(lines, again) if pair[0] != pair[1])
    assert weights.keys() == weights2.keys()
    assert all(torch.equal(weights[name], weights2[name]) for name in weights)


if __name__ == "__main__":
    if sys.argv[1:2] == ["child"]:
        child(sys.argv[2], sys.argv[3:])
    else:
        main()
