"""An explorer whose rollouts lie in a file: `train.py --explorer pool.jsonl`.

A line is a rollout, with the fields of the authors' sampler. `python -m recipes.pool` writes such a file, and
beside it pool.jsonl.settings.json, which says how they were sampled.
"""
import hashlib
import json
import math
import re
from functools import partial
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence

from anneal import explorer_share, split_group
from plumbing.steps import batch_of
from plumbing.text import cut
from sample import Rollouts


def open_pool(args, run):
    """explore(prompts, n, generator) -> Rollouts [P, n] from the file args.explorer. ValueError or OSError if
    it is no pool, or has too little for this run. A resumed run must find the same rollouts and settings."""
    path, note, theirs = args.explorer, Path(args.explorer + ".settings.json"), run.stops
    places, digest = index(path)
    writer, settings, known = "EXPLORER", "", True
    if note.exists():
        try:
            settings = note.read_text()
            writer, theirs = (json.loads(settings)[key] for key in ("model", "stops"))
            known = json.loads(settings).get("log_probs", True)
            if not all(type(i) is int and 0 <= i < run.learner.num_tokens for i in theirs):
                raise ValueError(f"stops {theirs} are not tokens of the learner")
        except (ValueError, LookupError, TypeError, RecursionError) as error:
            raise ValueError(f"{note}: no settings of a pool: {error!r:.200}") from error
    else:
        print(f"{path} has no settings beside it, so its stop tokens are taken to be the learner's, {theirs}")
    if not known and args.off_policy in ("behaviour", "truncated", "geometric"):
        raise ValueError(f"--off-policy {args.off_policy} needs the log-probabilities of the explorer's "
                         f"tokens, which {path} does not have")
    run.hashes["explorer"] = hashlib.sha256((digest + settings).encode()).hexdigest()[:16]
    run.stops = tuple(sorted({*run.stops, *theirs}))  # as in train.open_explorer

    wanted = {}  # {problem: the most rollouts that a step asks of it}
    for step in range(1, args.steps + 1):
        share = explorer_share(step, args.mix_steps, args.schedule, args.explorer_share)
        n, _ = split_group(share, args.group_size)
        for i in batch_of(step, args.prompts_per_step, len(run.problems), args.seed) if n else ():
            wanted[i] = max(n, wanted.get(i, 0))
    missing = {i: n - len(places.get(key_of(run.prompts[i]), ())) for i, n in wanted.items()}
    if missing := {i: n for i, n in missing.items() if n > 0}:
        i = min(missing)
        enough = (f"python -m recipes.pool --model {writer} --data {args.data} --n {max(wanted.values())} "
                  "--out NEW.jsonl makes enough" if known else "import more texts, or lower --group-size")
        raise ValueError(
            f"{path} lacks {sum(missing.values()):,} rollouts of {len(missing):,} prompts, {missing[i]} of "
            f"{wanted[i]} of {run.problems[i].question[:40]!r} say: {enough}")
    explore = partial(draw, path, places, run, args.max_new_tokens)
    for i in list(wanted)[:1]:
        explore([run.prompts[i]], 1, torch.Generator())  # what is wrong with all records shows at once
    return explore


def key_of(prompt):
    return ",".join(map(str, prompt)).encode()


def index(path):
    """({prompt's key: [byte where a record of it begins]}, hash of the file). A record is parsed when it is
    drawn: the paper's 272,000 are 14 GB. A last line that was cut short is left out."""
    prompt_ids = re.compile(rb'"prompt_ids": ?\[([0-9, ]+)\]')  # a text has backslashes before its quotes
    places, place, digest = {}, 0, hashlib.sha256()
    with open(path, "rb", buffering=1 << 20) as file:
        for number, line in enumerate(file, 1):
            found = prompt_ids.findall(line)
            if len(found) == 1 and line.endswith(b"}\n"):
                places.setdefault(found[0].replace(b" ", b""), []).append(place)
            elif line.endswith(b"\n"):
                raise ValueError(f"{path}, line {number}: not one rollout in the authors' layout")
            place += len(line)
            digest.update(line)
    return places, digest.hexdigest()


def draw(path, places, run, max_new_tokens, prompts, n, generator):
    """n different rollouts of each prompt, in the order of the file, cut at max_new_tokens."""
    records = []
    with open(path, "rb") as file:
        for prompt in prompts:
            there = places.get(key_of(prompt), ())
            if len(there) < n:
                raise OSError(f"{path} has {len(there)} rollouts of a prompt, and {n} are asked for")
            for i in torch.randperm(len(there), generator=generator)[:n].sort().values.tolist():
                file.seek(there[i])
                try:
                    records.append(read(file.readline(), prompt, run.learner.num_tokens, run.stops))
                except (ValueError, KeyError, TypeError, RecursionError) as error:
                    raise OSError(f"{path}, byte {there[i]}: no rollout to use: {error!r:.200}") from error
    lengths = torch.tensor([min(len(ids), max_new_tokens) for ids, _ in records])
    finished = torch.tensor([ids[:max_new_tokens][-1] in run.stops for ids, _ in records])
    ids, logps = (pad_sequence([torch.tensor(row[:max_new_tokens]) for row in rows], batch_first=True)
                  for rows in zip(*records))  # [P*n, T] each
    fields = ids, lengths, logps, finished, torch.zeros_like(finished)
    rollouts = Rollouts(*(x.unflatten(0, (len(prompts), n)) for x in fields))
    rollouts = cut(rollouts, run.until) if run.until else rollouts
    return Rollouts(*(x.to(run.learner.head.device) for x in vars(rollouts).values()))


def read(line, prompt, num_tokens, stops):
    """(token ids, log-probs) of a record. ValueError says what is wrong with it."""
    record = json.loads(line)
    ids, logps = record["response_ids"], record["small_model_log_probs"]
    unknown, logps = logps is None, [0.0] * len(ids) if logps is None else logps
    if record["prompt_ids"] != prompt:
        raise ValueError("it answers another prompt: has the file changed?")
    if not all(type(i) is int and 0 <= i < num_tokens for i in ids):
        raise ValueError("it holds tokens that the learner has not")
    if not 0 < len(ids) == len(logps) or not all(type(x) in (int, float) and x < 0.1 for x in logps):
        raise ValueError("it needs tokens, and for each a log-prob that is not above 0 and no NaN")
    first = next((place for place, i in enumerate(ids) if i in stops), len(ids))
    ids, logps = ids[:first + 1], logps[:first + 1]  # its writer may have had fewer stop tokens
    # -inf, of a sampler that rounds, makes infinite ratios. NaN: recipes.pool_import does not know them
    return ids, [math.nan if unknown else float(max(x, -1e4)) for x in logps]
