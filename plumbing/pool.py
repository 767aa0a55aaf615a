"""An explorer whose rollouts lie in a file: `train.py --explorer pool.jsonl`.

A line is a rollout, with the fields of the authors' sampler. `python -m recipes.pool` writes such a file, and
beside it pool.jsonl.settings.json, which says how they were sampled.
"""
import hashlib
import json
import math
import re
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
    pool = Pool(args.explorer, run.learner.num_tokens, run.stops)
    if not pool.has_log_probs and args.off_policy in ("behaviour", "truncated", "geometric"):
        raise ValueError(f"--off-policy {args.off_policy} needs the log-probabilities of the explorer's "
                         f"tokens, which {pool.path} does not have")
    run.hashes["explorer"], run.stops = pool.hash, pool.stops  # as in train.open_explorer

    wanted = {}  # {problem: the most rollouts that a step asks of it}
    for step in range(1, args.steps + 1):
        share = explorer_share(step, args.mix_steps, args.schedule, args.explorer_share)
        n, _ = split_group(share, args.group_size)
        for i in batch_of(step, args.prompts_per_step, len(run.problems), args.seed) if n else ():
            wanted[i] = max(n, wanted.get(i, 0))
    missing = {i: n - pool.count(run.prompts[i]) for i, n in wanted.items()}
    if missing := {i: n for i, n in missing.items() if n > 0}:
        i = min(missing)
        enough = (f"python -m recipes.pool --model {pool.writer} --data {args.data} --n "
                  f"{max(wanted.values())} --out NEW.jsonl makes enough" if pool.has_log_probs
                  else "import more texts, or lower --group-size")
        raise ValueError(
            f"{pool.path} lacks {sum(missing.values()):,} rollouts of {len(missing):,} prompts, {missing[i]} "
            f"of {wanted[i]} of {run.problems[i].question[:40]!r} say: {enough}")

    def explore(prompts, n, generator):
        rollouts = pool.draw(prompts, n, generator, args.max_new_tokens, run.until)
        return Rollouts(*(x.to(run.learner.head.device) for x in vars(rollouts).values()))
    for i in list(wanted)[:1]:
        explore([run.prompts[i]], 1, torch.Generator())  # what is wrong with all records shows at once
    return explore


class Pool:
    """The rollouts of a file, for a learner of num_tokens tokens that stops at the tokens `stops`. ValueError
    or OSError if the file is no pool."""

    def __init__(self, path, num_tokens, stops):
        self.path, self.num_tokens, note = path, num_tokens, Path(f"{path}.settings.json")
        self.places, digest = index(path)
        self.writer, self.has_log_probs = "EXPLORER", True
        settings, theirs = "", stops
        if note.exists():
            try:
                settings = note.read_text()
                said = json.loads(settings)
                self.writer, theirs = said["model"], said["stops"]
                self.has_log_probs = said.get("log_probs", True)
                if not all(type(i) is int and 0 <= i < num_tokens for i in theirs):
                    raise ValueError(f"stops {theirs} are not tokens of the learner")
            except (ValueError, LookupError, TypeError, RecursionError) as error:
                raise ValueError(f"{note}: no settings of a pool: {error!r:.200}") from error
        else:
            print(f"{path} has no settings beside it, so its stop tokens are taken to be the learner's, "
                  f"{theirs}")
        self.stops = tuple(sorted({*stops, *theirs}))
        self.hash = hashlib.sha256((digest + settings).encode()).hexdigest()[:16]

    def count(self, prompt):
        """How many rollouts of a prompt it has."""
        return len(self.places.get(key_of(prompt), ()))

    def draw(self, prompts, n, generator, max_new_tokens, until=None):
        """n different rollouts of each prompt, in the order of the file, cut at max_new_tokens and at a stop
        text: Rollouts [P, n] on the CPU."""
        records = []
        with open(self.path, "rb") as file:
            for prompt in prompts:
                if self.count(prompt) < n:
                    raise OSError(f"{self.path} has {self.count(prompt)} rollouts of a prompt, and {n} are "
                                  "asked for")
                chosen = torch.randperm(self.count(prompt), generator=generator)[:n].sort().values
                for at in (self.places[key_of(prompt)][i] for i in chosen.tolist()):
                    file.seek(at)
                    try:
                        records.append(read(file.readline(), prompt, self.num_tokens, self.stops))
                    except (ValueError, KeyError, TypeError, RecursionError) as error:
                        raise OSError(f"{self.path}, byte {at}: no rollout to use: {error!r:.200}") from error
        lengths = torch.tensor([min(len(ids), max_new_tokens) for ids, _ in records])
        finished = torch.tensor([ids[:max_new_tokens][-1] in self.stops for ids, _ in records])
        ids, logps = (pad_sequence([torch.tensor(row[:max_new_tokens]) for row in rows], batch_first=True)
                      for rows in zip(*records))  # [P*n, T] each
        fields = ids, lengths, logps, finished, torch.zeros_like(finished)
        rollouts = Rollouts(*(x.unflatten(0, (len(prompts), n)) for x in fields))
        return cut(rollouts, until) if until else rollouts


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
