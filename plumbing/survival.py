"""Survival: kill a run at any moment, and the same command with --resume goes on from its last checkpoint.

Nothing random is saved. Random numbers depend on (seed, step, purpose) alone, and so does the order of the
problems, so weights, AdamW's moments and the history of metrics are all that a checkpoint holds. On a CPU a
resumed run equals an unbroken one to the last bit.

SIGINT and SIGTERM end a run at once, except during two things (`run.busy`), which end first. Between the
beginning of an update and its entry in the history the weights are those of no step. And while a file is
written, torch turns an interruption into an error of its own. Before it ends, the run saves its last step.
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
from pathlib import Path

import torch

from model import add_lora
from plumbing.checkpoint import fingerprint, load
from plumbing.files import write_whole
from plumbing.steps import last_step

FREE = {"resume", "out", "log", "steps", "device", "compile", "eval_every", "save_every", "keep",
        "rollout_rows", "micro_batch_tokens", "checkpoint_layers", "id"}  # what a resumed run may change
KNOWN_BY_HASH = {"learner", "explorer", "data", "eval_data"}  # wherever they lie now


# ---- a run's directory -------------------------------------------------------------------------------------

def settings_of(out):
    """The settings of the run in `out`, as its first start left them; {} if there is none."""
    path = Path(out or "", "config.json")
    return json.loads(path.read_text()) if out and path.exists() else {}


def check_place(out, resume):
    """ValueError if a run cannot begin, or go on, in directory `out`."""
    there = [path for path in out.glob("*") if path.suffix != ".partial"]  # which a killed run leaves
    if out.is_file():
        raise ValueError(f"--out {out} is a file, not a directory")
    if there and resume and not (out / "config.json").exists():
        raise ValueError(f"--resume: {out} holds no run")
    if resume and not there:
        print(f"{out} holds no run yet: a new one begins")
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
    args.out = args.out or str(new_directory())
    settings = vars(args) | {f"hash_of_{name}": value for name, value in run.hashes.items()}
    settings["stops"] = list(run.stops)
    if before := settings_of(args.out):
        if changed := [f"{name} {before.get(name)} -> {settings[name]}"
                       for name in sorted(settings.keys() - FREE - KNOWN_BY_HASH)
                       if settings[name] != before.get(name)]:
            raise ValueError(f"{args.out} began with other settings: {', '.join(changed)}")
        restore(run, Path(args.out))
        if args.steps < last_step(run):
            raise ValueError(f"--steps {args.steps}: the run in {args.out} has made {last_step(run)} already")
    args.id = settings["id"] = before.get("id") or f"{Path(args.out).name}-{os.urandom(4).hex()}"
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    write_whole(out / "config.json", lambda file: file.write(json.dumps(settings, indent=2).encode()))
    (out / "rollouts").mkdir(exist_ok=True)
    for path in (out / "rollouts").glob("step_*.json"):  # of steps to come again
        if int(path.stem.removeprefix("step_")) > last_step(run):
            path.unlink()


def checkpoints(out):
    """Paths of a run's checkpoints, newest first. A copy under another name is the user's, not the run's."""
    found = ((re.fullmatch(r"checkpoint_(\d{6,})\.pt", path.name), path) for path in out.glob("checkpoint_*"))
    return [path for _, path in sorted(((int(name[1]), path) for name, path in found if name), reverse=True)]


def save_checkpoint(run, out, keep):
    """A run between two steps. The newest `keep` are left."""
    optimizer = run.optimizer
    state = {"weights": optimizer.masters, "adamw": optimizer.adamw.state_dict(), "history": run.history}
    write_whole(out / f"checkpoint_{last_step(run):06d}.pt", lambda file: torch.save(state, file))
    run.saved = last_step(run)
    for old in checkpoints(out)[keep:]:
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
            run.saved = last_step(run)
            break
        print(f"warning: {path} is damaged ({damaged})", file=sys.stderr)
    if damaged:
        raise ValueError(f"no checkpoint in {out} can be read: remove that directory to begin anew")
    print(f"resumed   after step {last_step(run)}")


def run_of(source):
    """(directory, settings) of the run that `source` is, or a checkpoint of; the settings of anything else
    are {}."""
    out = Path(source).parent if str(source).endswith(".pt") else Path(source)
    settings = settings_of(out)
    return out, settings if "learner" in settings else {}


def load_any(source, device="cpu", dtype=torch.float32):
    """(model, tokenizer, stops) of a checkpoint, as `load`; of a run's directory, as its newest checkpoint
    left the learner; or of one of its checkpoints, runs/x/checkpoint_000020.pt."""
    path, (out, settings) = Path(source), run_of(source)
    if not settings:
        return load(source, device, dtype)
    file = path if path.suffix == ".pt" else next(iter(checkpoints(out)), out / "checkpoint")
    if not file.is_file():
        raise ValueError(f"{source}: the run has no such checkpoint")
    model, tokenizer, base_stops = load(settings["learner"], device, dtype)
    same_dtype = settings["dtype"] == str(dtype).removeprefix("torch.")  # of which the fingerprint is
    if same_dtype and fingerprint(model, tokenizer, base_stops) != settings["hash_of_learner"]:
        raise ValueError(f"{settings['learner']} is no longer the model that {out} began with")
    if settings["lora_rank"]:
        add_lora(model, settings["lora_rank"], torch.Generator())
    saved = torch.load(file, map_location="cpu", weights_only=True)["weights"]
    with torch.no_grad():
        for weight, master in zip((w for w in model.parameters() if w.requires_grad), saved, strict=True):
            weight.copy_(master)
    return model, tokenizer, tuple(settings["stops"])


# ---- signals -----------------------------------------------------------------------------------------------

def listen(run):
    """Ctrl-C and SIGTERM raise KeyboardInterrupt; while the run is busy, `settle` does so as soon as it no
    longer is. A second signal leaves at once."""
    numbers = signal.SIGINT, signal.SIGTERM

    def note(number, frame):
        run.stopped = number
        for each in numbers:
            signal.signal(each, signal.SIG_DFL)
        os.write(2, b"\nstopping: saving the last step; once more quits at once\n")
        if not run.busy:
            raise KeyboardInterrupt
    for number in numbers:
        signal.signal(number, note)


def settle(run):
    """What began with run.busy = True is whole: a signal that came meanwhile is heeded now."""
    run.busy = False
    if run.stopped:
        raise KeyboardInterrupt
