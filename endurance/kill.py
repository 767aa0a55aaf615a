"""A training that is killed again and again, beside one that never was: weights and metrics must be the same.

    python -m endurance.kill --kills 100
    python -m endurance.kill --kills 30 --signal TERM

Each life of the run is `python train.py .. --resume`, or a recipe, in a process of its own. The signal comes
a random moment after the first to eighth time that a chosen phase has begun: loading, sampling, update,
evaluating, saving, drawing. Only the killed run lives beside busy processes, because how threads take turns
must not change a bit. Three runs are killed: one with a live explorer, one with a pool, and a recipe's in
bfloat16 with LoRA and a KL penalty.

After SIGTERM the exit code must be 143, after SIGINT 130; a process that still loads may die of the signal
itself. For each phase it prints how many signals came in it, and the seconds that the slowest death took.
"""
import argparse
import contextlib
import json
import random
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

import train
from plumbing import books, pictures
from plumbing.family import make_family

ROOT, PYTHON = Path(__file__).resolve().parent.parent, (sys.executable, "-m")
WATCHED = (("sampling", train, "sample"), ("update", train, "update"), ("evaluating", books, "evaluate_run"),
           ("saving", books, "save_checkpoint"), ("saving", books, "save"), ("drawing", pictures, "note"),
           ("drawing", pictures, "draw"))
PHASES = list(dict.fromkeys(["loading", *(phase for phase, *_ in WATCHED)]))
RUNS = {"live explorer": ("train",),
        "pool": ("train", "--explorer", "pool.jsonl", "--mix-steps", 12),
        "measured, bfloat16, LoRA, KL": ("recipes.measured", "--dtype", "bfloat16", "--lora-rank", 4,
                                         "--lr", 1e-2, "--kl-coef", 0.1)}


def child(phase_file, module, *flags):
    """The module as it is, but for a note of which phase begins."""
    with open(phase_file, "w", buffering=1) as phases:
        def noting(phase, function):
            def noted(*args, **more):
                phases.write(phase + "\n")
                return function(*args, **more)
            return noted
        phases.write("loading\n")
        for phase, room, name in WATCHED:
            setattr(room, name, noting(phase, getattr(room, name)))
        sys.argv = [module, *flags]
        if module == "train":  # as a module of that name it is loaded already, and noted
            train.main()
        else:
            runpy.run_module(module, run_name="__main__")


def live(command, directory, kill_in=None, number=signal.SIGKILL):
    """One life of a run, to be killed while it does `kill_in`. Returns (the phase that had begun last, the
    seconds that dying took), or None if the run came to its end before. RuntimeError if it failed, or with
    another exit code."""
    phases, phase = directory / "phases", None
    phases.write_text("")
    with open(directory / "output", "w+") as output:
        process = subprocess.Popen([*PYTHON, "endurance.kill", "child", phases, *map(str, command)],
                                   cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)
        if kill_in:
            which = 1 if kill_in == "loading" else random.randint(1, 8)
            while process.poll() is None and phases.read_text().split("\n").count(kill_in) < which:
                time.sleep(0.001)
            time.sleep(random.uniform(0, 2.0 if kill_in == "loading" else 0.05))
            phase = phases.read_text().split("\n")[-2] if process.poll() is None else kill_in
            process.send_signal(number)
        sent = time.perf_counter()
        code = -number if number == signal.SIGKILL else 128 + number
        if process.wait() not in (0, code) and not (phase == "loading" and process.returncode == -number):
            output.seek(0)
            raise RuntimeError(f"exit code {process.returncode}, {phase}: {output.read()[-2000:]}")
    return None if process.returncode == 0 else (phase, time.perf_counter() - sent)


@contextlib.contextmanager
def beside(busy):
    """Processes that do nothing but keep the machine busy."""
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(busy)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def outcome(run):
    """Metrics and weights that a run leaves, but for what a clock decides."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return ([{key: value for key, value in line.items() if "second" not in key} for line in lines],
            load_file(run / "learner" / "model.safetensors"))


def compare(unbroken, killed):
    (lines, weights), (again, weights2) = outcome(unbroken), outcome(killed)
    assert len(lines) == len(again)
    assert lines == again, next(pair for pair in zip(lines, again) if pair[0] != pair[1])
    assert weights.keys() == weights2.keys()
    assert all(torch.equal(weights[name], weights2[name]) for name in weights)


def endure(command, directory, kills, busy, number):
    """Kills a run so often, and compares it with an unbroken one. Returns {phase: [seconds of each death]}
    and how many runs came to their end."""
    unbroken, killed = directory / "unbroken", directory / "killed"
    live([*command, "--out", unbroken], directory)
    deaths, ended, again = {phase: [] for phase in PHASES}, 0, [*command, "--out", killed, "--resume"]
    with beside(busy):
        while sum(map(len, deaths.values())) < kills:
            if death := live(again, directory, random.choice(PHASES), number):
                deaths[death[0]].append(death[1])
            else:  # it ended before it could be killed: a new run for the rest of the kills
                compare(unbroken, killed)
                shutil.rmtree(killed)
                ended += 1
        live(again, directory)
    compare(unbroken, killed)
    return deaths, ended + 1


def main():
    parser = argparse.ArgumentParser(description="Kill and resume a training; compare with an unbroken one.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="in all, shared out over three runs")
    parser.add_argument("--signal", choices=("KILL", "TERM", "INT"), default="KILL", help="what kills")
    parser.add_argument("--busy", type=int, default=2, help="busy processes beside the run that is killed")
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    args = parser.parse_args()
    random.seed(args.seed)
    family = train.family_of("habit")
    if not family.exists():
        make_family(family)
    for i, (name, (module, *more)) in enumerate(RUNS.items()):
        with tempfile.TemporaryDirectory() as directory:
            directory, kills = Path(directory), args.kills // len(RUNS) + (i < args.kills % len(RUNS))
            if "pool.jsonl" in more:
                more[more.index("pool.jsonl")] = pool = directory / "pool.jsonl"
                flags = ["--model", family / "explorer", "--data", family / "train.jsonl", "--n", "8",
                         "--max-new-tokens", "16", "--out", pool]
                subprocess.run([*PYTHON, "recipes.pool", *flags], cwd=ROOT, check=True, capture_output=True)
            command = [module, "--steps", 40, "--prompts-per-step", 4, "--group-size", 8,
                       "--eval-problems", 32, "--eval-n", 16, "--eval-every", 2, "--save-every", 3,
                       "--device", "cpu", *more]
            deaths, ended = endure(command, directory, kills, args.busy, signal.Signals[f"SIG{args.signal}"])
        slowest = ", ".join(f"{phase} {len(seconds)} ({max(seconds):.1f} s)"
                            for phase, seconds in deaths.items() if seconds)
        print(f"{name}: {kills} times SIG{args.signal}: {slowest}; {ended} runs to the end, each equal to "
              "the unbroken one to the bit", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["child"]:
        child(*sys.argv[2:])
    else:
        main()
