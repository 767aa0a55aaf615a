"""Keeps a run going while nobody watches: when it has died, starts it again with --resume.

    python -m recipes.overnight --out runs/night [train.py's flags]
    python -m recipes.overnight recipes.rescue --out runs/night [its flags]

Out of memory (exit code 3, or killed by the system), it goes on with half of --micro-batch-tokens and half of
--rollout-rows, which only cost time. It gives up where to start again cannot help: after bad input or a full
disk (exit code 2), NaN (4), a signal from you, and five starts in a row without a new checkpoint.
"""
import argparse
import signal
import subprocess
import sys
from pathlib import Path

from plumbing.survival import checkpoints

LEAST = {"--micro-batch-tokens": 512, "--rollout-rows": 16}
DONE, OUT_OF_MEMORY = (0, 2, 4, 130, 143, -2, -15), (3, 137, -9)  # -15: ended by signal 15


def supervise(argv):
    """Runs the module that argv names, or train, until it is through. Returns its last exit code."""
    module, *flags = argv if argv and not argv[0].startswith("-") else ["train", *argv]
    parser = argparse.ArgumentParser(description="Start a run again when it dies. Takes all its flags.")
    parser.add_argument("--out", type=Path, required=True, help="directory of the run")
    parser.add_argument("--resume", action="store_true", help="needless: given where there is a run")
    parser.add_argument("--micro-batch-tokens", type=int, default=8192, help="at first")
    parser.add_argument("--rollout-rows", type=int, default=1024, help="at first")
    own, flags = parser.parse_known_args(flags)
    sizes = {"--micro-batch-tokens": own.micro_batch_tokens, "--rollout-rows": own.rollout_rows}
    child, code, stopped, in_vain = None, 0, False, 0

    def forward(number, frame):
        nonlocal stopped
        stopped = True
        if child:
            child.send_signal(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, forward)
    while not stopped and in_vain < 5:
        before = newest(own.out)
        resume = ["--resume"] if (own.out / "config.json").exists() else []
        limits = [str(part) for size in sizes.items() for part in size]
        command = [sys.executable, "-m", module, *flags, "--out", str(own.out), *limits, *resume]
        child = subprocess.Popen(command, start_new_session=True)  # so that Ctrl-C comes once, by `forward`
        code = child.wait()
        if code in DONE:
            break
        in_vain = in_vain + 1 if newest(own.out) == before else 0
        if code in OUT_OF_MEMORY:
            sizes = {name: max(size // 2, min(size, LEAST[name])) for name, size in sizes.items()}
        print(f"overnight.py: it ended with exit code {code}; newest checkpoint {newest(own.out)}; next "
              + ", ".join(f"{name} {size}" for name, size in sizes.items()), file=sys.stderr, flush=True)
    return code if code >= 0 else 128 - code


def newest(out):
    return next((path.name for path in checkpoints(out)), None)


if __name__ == "__main__":
    sys.exit(supervise(sys.argv[1:]))
