"""Survival: kill a run at any moment, and the same command with --resume goes on from its last checkpoint.

Nothing random is saved. Random numbers depend on (seed, step, purpose) alone, and so does the order of the
problems, so weights, AdamW's moments and the history of metrics are all that a checkpoint holds. On a CPU a
resumed run equals an unbroken one to the last bit.

SIGINT and SIGTERM end a run at once, whatever it is at, but for one thing: between the beginning of an update
and its entry in the history (`run.busy`) the weights are those of no step, so the signal waits. Then a
checkpoint is written.
"""
import contextlib
import itertools
import json
import os
import re
import signal
import sys
import time
import zipfile
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch

LEARNER, EXPLORER, MINIBATCH, EVALUATION, ADAPTER = range(5)  # what a random stream is for
FREE = {"resume", "out", "log", "steps", "device", "compile", "eval_every", "save_every", "rollout_rows",
        "micro_batch_tokens", "checkpoint_layers", "id"}  # settings that a resumed run may change
KNOWN_BY_HASH = {"learner", "explorer", "data", "eval_data"}  # wherever they lie now


# ---- what depends on (seed, step) alone --------------------------------------------------------------------

def generator(seed, step, purpose):
    """A CPU torch.Generator of its own for every use of randomness."""
    state = np.random.SeedSequence([seed, step, purpose]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> np.uint64(1)))


def batch_of(step, size, count, seed):
    """Indices of the step's problems: each comes once, in an order shuffled anew, before any comes again."""
    positions = range((step - 1) * size, step * size)
    epochs = {position // count for position in positions}
    orders = {epoch: np.random.default_rng([seed, epoch]).permutation(count) for epoch in epochs}
    return [int(orders[position // count][position % count]) for position in positions]


def last_step(run):
    return run.history[-1]["step"] if run.history else 0


@dataclass
class Turn:
    """A step of training: which problems, their random streams, and how long its phases take."""
    step: int
    batch: list        # [P] indices of its problems
    problems: list     # [P]
    prompts: list      # [P] their token ids
    random: object     # random(purpose): a generator of its own for each
    seconds: dict = field(default_factory=dict)
    since: float = field(default_factory=time.perf_counter)

    def lap(self, phase):
        """Counts the time since the last lap as that phase's."""
        now = time.perf_counter()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self.since
        self.since = now


def turns(args, run):
    """The steps that this run has still to do."""
    for step in range(last_step(run) + 1, args.steps + 1):
        batch = batch_of(step, args.prompts_per_step, len(run.problems), args.seed)
        problems, prompts = [run.problems[i] for i in batch], [run.prompts[i] for i in batch]
        yield Turn(step, batch, problems, prompts, partial(generator, args.seed, step))


# ---- a run's directory -------------------------------------------------------------------------------------

def write_whole(path, write):
    """write(file), so that `path` then holds all of it, or what it held before, whatever happens."""
    beside = path.with_name(path.name + ".partial")
    with open(beside, "wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())  # else a power cut may leave the name of an empty file
    os.replace(beside, path)


def whole_lines(path):
    """The lines of a file that is written line by line. A last one that was cut short is cut off."""
    text = path.read_bytes() if path.exists() else b""
    whole = text[:text.rfind(b"\n") + 1]
    if whole != text:
        write_whole(path, lambda file: file.write(whole))
    return whole.decode().splitlines()


def settings_of(out):
    """The settings of the run in `out`, as its first start left them; {} if there is none."""
    path = Path(out, "config.json")
    return json.loads(path.read_text()) if path.exists() else {}


def check_place(out, resume):
    """ValueError if a run cannot begin, or go on, in directory `out`."""
    there = [path for path in out.glob("*") if path.suffix != ".partial"]  # which a killed run leaves
    if out.is_file():
        raise ValueError(f"--out {out} is a file, not a directory")
    if there and resume and not (out / "config.json").exists():
        raise ValueError(f"--resume: {out} holds no run")
    if there and not resume:
        raise ValueError(f"{out} is there already: --resume continues a run, another --out begins one")


def new_directory():
    """runs/<time>, made here, so that of several runs that start in one second each gets its own."""
    name = time.strftime("runs/%Y%m%d-%H%M%S")
    for path in map(Path, itertools.chain([name], (f"{name}-{i}" for i in itertools.count(2)))):
        with contextlib.suppress(FileExistsError):
            path.mkdir(parents=True)
            return path


def claim(args, run):
    """Makes args.out this run's, or takes up the run in it. ValueError if that was another experiment."""
    settings = vars(args) | {f"hash_of_{name}": value for name, value in run.hashes.items()}
    if before := settings_of(args.out):
        if changed := [f"{name} {before.get(name)} -> {settings[name]}"
                       for name in sorted(settings.keys() - FREE - KNOWN_BY_HASH)
                       if settings[name] != before.get(name)]:
            raise ValueError(f"{args.out} began with other settings: {', '.join(changed)}")
        restore(run, Path(args.out))
    args.out = args.out or str(new_directory())
    args.id = settings["id"] = before.get("id") or f"{Path(args.out).name}-{os.urandom(4).hex()}"
    out = Path(args.out)
    (out / "rollouts").mkdir(parents=True, exist_ok=True)
    write_whole(out / "config.json", lambda file: file.write(json.dumps(settings, indent=2).encode()))
    for path in (out / "rollouts").glob("step_*.json"):  # of steps to come again
        if int(path.stem.removeprefix("step_")) > last_step(run):
            path.unlink()


def checkpoints(out):
    """Paths of a run's checkpoints, newest first. A copy under another name is the user's, not the run's."""
    found = ((re.fullmatch(r"checkpoint_(\d{6,})\.pt", path.name), path) for path in out.glob("checkpoint_*"))
    return [path for _, path in sorted(((int(name[1]), path) for name, path in found if name), reverse=True)]


def save_checkpoint(run, out):
    """A run between two steps."""
    optimizer = run.optimizer
    state = {"weights": optimizer.masters, "adamw": optimizer.adamw.state_dict(), "history": run.history}
    write_whole(out / f"checkpoint_{last_step(run):06d}.pt", lambda file: torch.save(state, file))
    for old in checkpoints(out)[2:]:
        old.unlink()


def restore(run, out):
    """Takes up the newest checkpoint whose checksums hold. From the beginning if none was written yet.
    ValueError if all there are damaged."""
    damaged = None
    for path in checkpoints(out):
        try:
            damaged = zipfile.ZipFile(path).testzip()  # torch.load does not look at its checksums
        except Exception as error:  # in a damaged header zipfile trips over anything
            damaged = error
        if not damaged:
            state = torch.load(path, map_location="cpu", weights_only=True)
            run.optimizer.restore(state["weights"], state["adamw"])
            run.history = state["history"]
            break
        print(f"warning: {path} is damaged ({damaged})", file=sys.stderr)
    if damaged:
        raise ValueError(f"no checkpoint in {out} can be read: remove that directory to begin anew")
    print(f"resumed   after step {last_step(run)}")


# ---- signals, and errors in one line -----------------------------------------------------------------------

def listen(run):
    """Ctrl-C and SIGTERM raise KeyboardInterrupt; while the run is busy, `settle` does so as soon as the step
    is done. A second signal leaves at once."""
    def note(number, frame):
        run.stopped = number
        signal.signal(number, signal.SIG_DFL)
        os.write(2, b"\nending this update, then saving; once more quits at once\n")
        if not run.busy:
            raise KeyboardInterrupt
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, note)


def settle(run, line):
    """Enters a step's metrics in the history. What began with run.busy = True is whole then."""
    run.history.append(line)
    run.busy = False
    if run.stopped:
        raise KeyboardInterrupt


# Decisions about CUDA's arithmetic, in this one place. None was measured, as no GPU was at hand.
torch.backends.cuda.enable_cudnn_sdp(False)  # plans anew for every shape, and ours hardly ever come twice
torch.backends.cuda.matmul.allow_tf32 = False  # float32 means float32, as on a CPU: for speed there is bf16
torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False  # long sums are float32's


def pick_device(name):
    """`auto` takes CUDA, then Apple's MPS, then the CPU. ValueError for a device that is not there."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        probe = torch.zeros(1, device=name)
        probe.item()  # which `meta` cannot give
        return str(probe.device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {name!r} cannot be used here: {str(error).splitlines()[0]}") from None


def out_of_memory(error):
    """Whether an exception says that memory ran out. Every allocator has its own words for it."""
    return isinstance(error, MemoryError) or any(
        words in str(error) for words in ("out of memory", "can't allocate", "ALLOC_FAILED"))


@contextlib.contextmanager
def one_line(program, users=(ValueError, OSError), memory="sample fewer rollouts at once, or shorter ones"):
    """Within it an error that the user can mend ends the program with one line. Exit codes: 2 bad input or a
    full disk, 3 out of memory, 4 NaN, 130 Ctrl-C. All other errors are bugs, and keep their traceback. What a
    terminal cannot show is spelled out, where it would be an error of its own."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        yield
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if isinstance(error.__context__, OSError) and isinstance(error, RuntimeError):
            error = error.__context__  # a full disk, over which torch.save raises its own
        if isinstance(error, FloatingPointError):
            code, why = 4, error
        elif out_of_memory(error):
            code, why = 3, f"out of memory: {memory}"
        elif isinstance(error, users):
            code, why = 2, error
        else:
            raise
        fail(program, code, why)


def fail(program, code, error):
    print(f"{program}: error: {str(error).partition(chr(10))[0]}", file=sys.stderr)
    sys.exit(code)
