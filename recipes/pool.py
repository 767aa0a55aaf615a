"""A pool: the explorer's rollouts on disk, sampled ahead of training, as the authors did, on many machines.

    python -m recipes.pool --model EXPLORER --data train.jsonl --n 32 --out pool.jsonl
    python train.py --learner LEARNER --explorer pool.jsonl --data train.jsonl

A line is a rollout, with the fields of the authors' sampler. pool.jsonl.settings.json says how they were
sampled: flags, a hash of the weights, stop tokens. Kill the writer at any moment: the same command goes on,
and the file ends with the same bytes. `cat` makes one pool of shards (--shard 3/8): copy the settings of one.
"""
import argparse
import hashlib
import json
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from plumbing.checkpoint import fingerprint, load
from plumbing.files import write_whole
from plumbing.problems import load_problems
from plumbing.terminal import one_line, pick_device
from plumbing.text import decode, encode_all, stop_texts
from reward import score
from sample import check_lengths, sample

AT_ONCE = 16  # problems: their rollouts are written whole or not at all, from random numbers of their own


def write_pool(args, shard, shards):
    """Samples args.n rollouts of every problem of a shard. ValueError if args.out has other settings."""
    model, tokenizer, stops = load(args.model, pick_device(args.device), getattr(torch, args.dtype))
    problems = list(enumerate(load_problems(args.data)))[shard - 1::shards]
    prompts = encode_all([problem for _, problem in problems], tokenizer, args.thinking)
    check_lengths(model, prompts, args.max_new_tokens)
    until = stop_texts(args.stop, tokenizer)
    out, note = Path(args.out), Path(args.out + ".settings.json")
    settings = {name: x for name, x in vars(args).items() if name not in ("out", "device", "rollout_rows")}
    settings |= {"weights": fingerprint(model, tokenizer, stops), "stops": stops,
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
                              stops, args.temperature, top_p=args.top_p, rows=args.rollout_rows, until=until)
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
    add("--stop", nargs="+", default=[], help="texts that end a response; \\n is a new line")
    add("--temperature", type=float, default=1.0, help="the paper's is 0.7")
    add("--top-p", type=float, default=1.0, help="the paper's is 0.95")
    add("--rollout-rows", type=int, default=1024, help="rows sampled at once: lower it to save memory")
    add("--thinking", choices=("on", "off"), help="for chat templates that can")
    add("--seed", type=int, default=0, help="of the rollouts")
    add("--device", default="auto", help="auto: cuda, then mps, then cpu")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of weights")
    args = parser.parse_args(argv)
    with one_line("pool.py"):
        shard, shards = map(int, args.shard.split("/"))
        if not 1 <= shard <= shards:
            raise ValueError(f"--shard {args.shard}: not from 1/{shards} to {shards}/{shards}")
        write_pool(args, shard, shards)


if __name__ == "__main__":
    main()
