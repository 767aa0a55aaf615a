"""A pool: the explorer's rollouts on disk, sampled ahead of training, as the authors did, on many machines.

    python recipes/pool.py --model EXPLORER --data train.jsonl --n 32 --out pool.jsonl
    python train.py --learner LEARNER --explorer pool.jsonl --data train.jsonl

A line is a rollout, with the fields of the authors' sampler. pool.jsonl.settings.json says how they were
sampled: flags, a hash of the weights, stop tokens. Kill the writer at any moment: the same command goes on,
and the file ends with the same bytes. `cat` makes one pool of shards (--shard 3/8): copy the settings of one.
"""
import argparse
import hashlib
import json
import os
import re
import sys
from functools import partial
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # before torch: threads that spin for long starve others

import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from anneal import explorer_share, split_group
from model import fingerprint, load, one_line, pick_device
from reward import load_problems, score
from sample import Rollouts, check_lengths, decode, encode, sample
from train import batch_of, write_whole

AT_ONCE = 16  # problems: their rollouts are written whole or not at all, from random numbers of their own


def write_pool(args, shard, shards):
    """Samples args.n rollouts of every problem of a shard. ValueError if args.out has other settings."""
    model, tokenizer = load(args.model, pick_device(args.device), getattr(torch, args.dtype))
    problems = list(enumerate(load_problems(args.data)))[shard - 1::shards]
    prompts = [encode(problem.prompt, tokenizer, problem.in_words, args.thinking) for _, problem in problems]
    check_lengths(model, prompts, args.max_new_tokens)
    out, note = Path(args.out), Path(args.out + ".settings.json")
    settings = {name: x for name, x in vars(args).items() if name not in ("out", "device", "rollout_rows")}
    settings |= {"weights": fingerprint(model), "stop_ids": model.stop_ids,
                 "prompts": hashlib.sha256(str(prompts).encode()).hexdigest()}
    settings = json.dumps(settings, indent=1)
    out.parent.mkdir(parents=True, exist_ok=True)
    with open(out, "ab+") as file:
        if file.tell() and not (note.exists() and note.read_text() == settings):
            raise ValueError(f"{out} was written with other settings ({note}): take another --out")
        write_whole(note, lambda file: file.write(settings.encode()))
        place = end = done = 0  # end: of the last whole batch; done: problems up to there
        file.seek(0)
        for number, line in enumerate(file, 1):
            place += len(line)
            if line.endswith(b"\n") and number in (len(problems) * args.n, (done + AT_ONCE) * args.n):
                end, done = place, number // args.n
        file.truncate(end)
        seconds = 0.1 if sys.stderr.isatty() else 30  # in a log, a line is a line
        for start in tqdm(range(done, len(problems), AT_ONCE), desc=args.out, mininterval=seconds):
            batch = problems[start:start + AT_ONCE]
            random = torch.Generator().manual_seed(args.seed * 1_000_003 + batch[0][0])
            rollouts = sample(model, prompts[start:start + AT_ONCE], args.n, random, args.max_new_tokens,
                              args.temperature, top_p=args.top_p, rows=args.rollout_rows)
            for p, texts in enumerate(decode(rollouts, tokenizer)):
                number, problem = batch[p]
                for g, text in enumerate(texts):
                    length, worth = rollouts.lengths[p, g], score(problem, text)
                    file.write(json.dumps({
                        "prompt_id": number, "prompt": problem.question, "prompt_ids": prompts[start + p],
                        "response": text, "response_ids": rollouts.ids[p, g, :length].tolist(),
                        "small_model_log_probs": rollouts.logps[p, g, :length].tolist(),
                        "reward": worth.reward, "is_correct": worth.strict, "data_source": args.data,
                        "ground_truth": problem.answer}).encode() + b"\n")
            file.flush()


def open_pool(args, run):
    """explore(prompts, n, generator) -> Rollouts [P, n] from the file args.explorer. ValueError or OSError if
    it is no pool, or has too little for this run."""
    path, note, stop_ids = args.explorer, Path(args.explorer + ".settings.json"), run.learner.stop_ids
    writer, theirs = "EXPLORER", stop_ids
    places, run.hashes["explorer"] = index(path)
    if note.exists():
        try:
            writer, theirs = (json.loads(note.read_text())[key] for key in ("model", "stop_ids"))
            if not all(type(i) is int and 0 <= i < run.learner.num_tokens for i in theirs):
                raise ValueError(f"stop_ids {theirs} are not tokens of the learner")
        except (ValueError, LookupError, TypeError, RecursionError) as error:
            raise ValueError(f"{note}: no settings of a pool: {error!r:.200}") from error
    else:
        print(f"{path} has no settings beside it: taken for its stop tokens are the learner's, {stop_ids}")
    run.learner.stop_ids = tuple(sorted({*stop_ids, *theirs}))  # as in train.open_explorer

    wanted, measured = {}, args.schedule == "measured"  # {problem: the most rollouts that a step asks of it}
    for step in range(1, args.steps + 1):
        share = 1 if measured else explorer_share(step, args.mix_steps, args.schedule, args.explorer_share)
        n, _ = split_group(share, args.group_size, int(measured))
        for i in batch_of(step, args.prompts_per_step, len(run.problems), args.seed) if n else ():
            wanted[i] = max(n, wanted.get(i, 0))
    missing = {i: n - len(places.get(key_of(run.prompts[i]), ())) for i, n in wanted.items()}
    if missing := {i: n for i, n in missing.items() if n > 0}:
        i = min(missing)
        raise ValueError(
            f"{path} lacks {sum(missing.values()):,} rollouts of {len(missing):,} prompts, {missing[i]} of "
            f"{wanted[i]} of {run.problems[i].question[:40]!r} say: python recipes/pool.py --model "
            f"{writer} --data {args.data} --n {max(wanted.values())} --out NEW.jsonl makes enough")
    explore = partial(draw, path, places, run.learner, args.max_new_tokens)
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


def draw(path, places, learner, max_new_tokens, prompts, n, generator):
    """n different rollouts of each prompt, in the order of the file, cut at max_new_tokens."""
    records = []
    with open(path, "rb") as file:
        for prompt in prompts:
            there = places.get(key_of(prompt), ())
            if len(there) < n:
                raise ValueError(f"{path} has {len(there)} rollouts of a prompt, and {n} are asked for")
            for i in torch.randperm(len(there), generator=generator)[:n].sort().values.tolist():
                file.seek(there[i])
                try:
                    records.append(read(file.readline(), prompt, learner))
                except (ValueError, KeyError, TypeError, RecursionError) as error:
                    raise OSError(f"{path}, byte {there[i]}: no rollout to use: {error!r:.200}") from error
    lengths = torch.tensor([min(len(ids), max_new_tokens) for ids, _ in records])
    finished = torch.tensor([ids[:max_new_tokens][-1] in learner.stop_ids for ids, _ in records])
    ids, logps = (pad_sequence([torch.tensor(row[:max_new_tokens]) for row in rows], batch_first=True)
                  for rows in zip(*records))  # [P*n, T] each
    fields = ids, lengths, logps, finished, torch.zeros_like(finished)
    return Rollouts(*(x.unflatten(0, (len(prompts), n)).to(learner.head.device) for x in fields))


def read(line, prompt, learner):
    """(token ids, log-probs) of a record. ValueError says what is wrong with it."""
    record = json.loads(line)
    ids, logps = record["response_ids"], record["small_model_log_probs"]
    if record["prompt_ids"] != prompt:
        raise ValueError("it answers another prompt: has the file changed?")
    if not all(type(i) is int and 0 <= i < learner.num_tokens for i in ids):
        raise ValueError("it holds tokens that the learner has not")
    if any(i in learner.stop_ids for i in ids[:-1]):
        raise ValueError("it goes on after a stop token")
    if not 0 < len(ids) == len(logps) or not all(type(x) in (int, float) and x < 0.1 for x in logps):
        raise ValueError("it needs tokens, and for each a log-prob that is not above 0 and no NaN")
    return ids, [float(max(x, -1e4)) for x in logps]  # -inf, of a sampler that rounds, makes infinite ratios


def main(argv=None):
    parser = argparse.ArgumentParser(description="Write an explorer's rollouts of many problems to a file.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    needed = dict(required=True, default=argparse.SUPPRESS)  # --help then names no default
    add("--model", **needed, help="the explorer: a directory or a Hugging Face hub name")
    add("--data", **needed, help="problems: JSONL as train.py's --data")
    add("--out", **needed, help="JSONL to write; goes on where it was stopped")
    add("--n", type=int, default=16, help="rollouts per problem")
    add("--shard", default="1/1", help="3/8: every eighth problem from the third on")
    add("--max-new-tokens", type=int, default=512, help="longest response")
    add("--temperature", type=float, default=1.0, help="the paper's is 0.7")
    add("--top-p", type=float, default=1.0, help="the paper's is 0.95")
    add("--rollout-rows", type=int, default=1024, help="rows sampled at once: lower it to save memory")
    add("--thinking", choices=("on", "off"), help="for chat templates that can")
    add("--seed", type=int, default=0, help="of the rollouts")
    add("--device", default="auto", help="auto: cuda, then mps, then cpu")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of weights")
    args = parser.parse_args(argv)
    try:
        shard, shards = map(int, args.shard.split("/"))
        if not 1 <= shard <= shards:
            raise ValueError(f"--shard {args.shard}: not from 1/{shards} to {shards}/{shards}")
        write_pool(args, shard, shards)
    except Exception as error:
        parser.exit(2, f"pool.py: error: {one_line(error)}\n")


if __name__ == "__main__":
    main()
