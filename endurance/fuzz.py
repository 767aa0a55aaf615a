"""Hostile input: each string must get a verdict and each broken file one line that names it, quickly and
without a crash.

    python -m endurance.fuzz strings --count 1000000    through the scorers: 4 to 5 minutes on 2 cores
    python -m endurance.fuzz files --count 20000        through the loaders: 3 to 4 minutes on 2 cores
    python -m endurance.fuzz golds --data math500.jsonl     real answers with one mistake put in: 10 seconds

Strings are random bytes, deeply nested or endlessly repeated LaTeX, numbers of thousands of digits, and real
answers with pieces cut out, doubled and swapped, up to 20,000 characters (a response of 4,096 tokens is about
that long); a tenth are of hypothesis's invention. Each goes through score for two kinds of problem out of six
and, with another, through answers_equal. Files are problems, pools and checkpoints, with bytes, lines or JSON
values cut, changed, doubled or swapped. What is loaded must work, and all else be refused by a ValueError or
OSError of one line with the path. Prints the counts and the slowest. A call that takes minutes ends the
process and says where it was.
"""
import argparse
import collections
import contextlib
import faulthandler
import functools
import json
import multiprocessing
import os
import random
import re
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tqdm import tqdm

import reward
from plumbing import answers
from plumbing.checkpoint import load
from plumbing.family import make_family
from plumbing.pool import open_pool
from plumbing.problems import load_problems
from plumbing.text import encode

try:
    import hypothesis
except ImportError:
    hypothesis = print("without hypothesis: pip install hypothesis adds strings of its invention")

PIECES = [*"{}[]()$\\,./^_=-+*%&~ \n\0 0123456789abcXYZ°≤−é", "\\boxed{", "\\frac{", "\\dfrac", "\\sqrt",
          "\\left(", "\\right)", "\\text{", "\\cup", "\\{", "\\}", "\\boxed", "####", "Answer:", "answer: ",
          "1/3", "1,000", "-0.5", "10^{", "x=", "\\pi", "^\\circ", "\\%", "dollars", "\\infty",
          "\\begin{pmatrix}", "&", "\\\\", " or ", ", x=", "<think>", "</think>", "٣", "１", "²", "\ud800",
          "{}.__class__", "%s%n", "../../etc/passwd"]
PROBLEMS = [reward.Problem("What is 6*7?", "42"), reward.Problem("?", "\\frac{1}{2}"),
            reward.Problem("?", "\\{1, 2, (3, 4]\\}"), reward.Problem("Which?", "B", "choice"),
            reward.Problem("Bfa483920=", "2", "habit"), reward.Problem("3+4*2=", "1", "natural")]


def hostile(rng):
    kind, length = rng.randrange(5), int(10 ** rng.uniform(0, 4.3))
    if kind == 0:
        return rng.randbytes(length).decode("utf-8", "replace")
    if kind == 1:  # one or two pieces again and again
        few = rng.choices(PIECES, k=rng.randint(1, 2))
        return "".join(few * (length // len("".join(few)) + 1))[:length]
    if kind == 2:  # nested, and closed again or not
        opened = rng.choice(["{", "\\boxed{", "\\frac{", "(", "\\{", "[", "\\sqrt{", "\\text{"])
        depth, inside = max(1, length // 10), "".join(rng.choices(PIECES, k=5))
        return opened * depth + inside + rng.choice(["}", ")", "\\}", "]", ""]) * depth
    if kind == 3:
        text = "".join(rng.choices(PIECES, k=max(1, length // 3)))
        return text + "\\boxed{" + "".join(rng.choices(PIECES, k=rng.randint(0, 300))) + "}"
    text = list(rng.choice(["\\boxed{\\frac{1}{2}}", "#### 1,234.50", "So $x = \\{1, 2\\} \\cup (3, 4]$.",
                            "Answer: 10\\%", "3+8=1", "-86-33"]) * 3)
    for _ in range(rng.randint(0, 10)):
        i, j = sorted(rng.randrange(len(text) + 1) for _ in range(2))
        text = rng.choice([text[:i] + text[j:], text[:j] + text[i:],
                           text[:i] + [rng.choice(PIECES)] + text[i:]])
    return "".join(text)


def strings(count, seed):
    """({"scored": number}, slowest seconds, its string) of a seeded batch."""
    faulthandler.dump_traceback_later(300, exit=True)
    rng, slowest, before, texts = random.Random(seed), (0.0, ""), "1", []
    if hypothesis:
        how = hypothesis.settings(max_examples=count // 10, database=None, deadline=None)
        given = hypothesis.given(hypothesis.strategies.text())
        hypothesis.seed(seed)(how(given(lambda text: texts.append(text))))()
    for _ in range(count):
        text = texts.pop() if texts else hostile(rng)
        calls = [functools.partial(reward.score, problem, text) for problem in rng.sample(PROBLEMS, 2)]
        for call in (*calls, lambda: answers.answers_equal(answers.extract_answer(text) or text, before)):
            started = time.thread_time()  # of this process alone, whatever else the machine does
            try:
                verdict = call()
            except Exception as error:
                raise RuntimeError(f"seed {seed}: {error!r} on {text[:300]!r}") from error
            slowest = max(slowest, (time.thread_time() - started, repr(text[:100])))
            verdict = verdict if isinstance(verdict, tuple) else (verdict,)
            assert all(part in (True, False) for part in verdict)
        before = text[:rng.choice([20, 1000])]
    return {"scored": count}, *slowest


VALUES = [None, True, -1, 0, 1, 2 ** 24, 2 ** 31, 2 ** 63, 10 ** 400, -0.5, 1e308, float("nan"), "", "x",
          "\ud800", "\0", "../x", "/etc/passwd", "model.safetensors", "é" * 300, [], [0],
          [-1], ["x"], {}, {"a": {}}, {"rope_type": "llama3"}]
FAULTS = [b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"\xc3", b"NaN", b"-Infinity", b'"', b"{", b"[" * 5_000,
          b"9" * 5_000, b"\n", b"\r", b'"a":1,"a":2,']


def other_value(rng, value):
    """JSON with one of its values replaced or left out."""
    if not isinstance(value, (dict, list)) or not value or rng.random() < 0.05:
        return rng.choice(VALUES)
    value, kind = value.copy(), rng.randrange(6)
    place = rng.choice(list(value) if isinstance(value, dict) else range(len(value)))
    swap = kind == 1 and isinstance(value, dict)
    value[place] = value[rng.choice(list(value))] if swap else other_value(rng, value[place])
    if kind == 0:
        del value[place]
    return value


def damaged(rng, data, other):
    """Bytes with a fault in them; `other` are those of another file of the kind."""
    i, k = rng.randrange(len(data) + 1), rng.randrange(len(lines := data.splitlines(keepends=True)))
    if rng.random() < 0.6:
        cut = lines[k][:i % len(lines[k])] + b"\n"
        line = rng.choice([[], [lines[k]] * 2, lines[k:] + lines[:k], [cut], [b"\n"]])
        return rng.choice([
            data[:i], data[:i] + data[i + 1:], data[:i] + data[i + 1000:], data[:i] + other[i:],
            *[data[:i] + rng.choice(FAULTS) + data[i:]] * 4,
            *[data[:i] + rng.randbytes(1) + data[i + 1:]] * 4, data.replace(b"{", b'{"a": 1, "a": 2, ', 1),
            *[b"".join(lines[:k] + line + lines[k + 1:])] * 3])
    start, end = 0, len(data)
    if data[8:10] == b'{"':  # the header of safetensors
        start, end = 8, 8 + int.from_bytes(data[:8], "little")
    text = data[start:end] if start else rng.choice([data, lines[k]])
    try:
        new = json.dumps(other_value(rng, json.loads(text))).encode() + b"\n" * text.endswith(b"\n")
    except ValueError:
        return data[:i]
    return len(new).to_bytes(8, "little") + new + data[end:] if start else data.replace(text, new, 1)


@functools.cache
def good_files():
    """({kind: {name: bytes}}, {name: bytes} of another checkpoint, model, tokeniser, stop tokens)."""
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory, "family")
        sizes = {"learner": (16, 2), "explorer": (24, 1)}
        make_family(out, "natural", sizes=sizes, corpus_size=640, epochs=4)
        whole, another = ({file.name: file.read_bytes() for file in (out / name).iterdir()} for name in sizes)
        weights, loaded = load_file(out / "learner" / "model.safetensors"), load(out / "learner")
        shard_of = {name: f"model-{i % 2}.safetensors" for i, name in enumerate(weights)}
        index = json.dumps({"metadata": {}, "weight_map": shard_of}).encode()
        shards = whole | {"model.safetensors.index.json": index}
        del shards["model.safetensors"]
        for shard in shard_of.values():
            save_file({name: weights[name] for name in weights if shard_of[name] == shard}, out / shard)
            shards[shard] = (out / shard).read_bytes()
        problems = b"".join((out / "train.jsonl").read_bytes().splitlines(keepends=True)[:20])
    rollout = b'{"prompt_ids": [%d, 2], "response_ids": [1, 3, 0], "small_model_log_probs": [-1, -2, -0.1]}\n'
    pool = {"a.jsonl": b"".join(rollout % i for i in range(9)),
            "a.jsonl.settings.json": b'{"model": "x", "stops": [0]}'}
    kinds = {"problems": {"a.jsonl": problems}, "pool": pool, "checkpoint": whole, "shards": shards}
    return kinds, another, *loaded


def use(kind, directory):
    """Loads what is there, files of this kind, and uses it."""
    model, tokenizer, stops = good_files()[2:]
    if kind == "problems":
        for problem in load_problems(Path(directory, "a.jsonl")):
            encode(problem.prompt, tokenizer)
    elif kind == "pool":
        args = argparse.Namespace(
            explorer=str(Path(directory, "a.jsonl")), data="a.jsonl", max_new_tokens=4, steps=1, mix_steps=1,
            schedule="step", explorer_share=1, group_size=1, prompts_per_step=1, seed=0)
        for i in range(9):
            run = argparse.Namespace(learner=model, stops=stops, prompts=[[i, 2]], hashes={},
                                     problems=[reward.Problem("1+2=", "3")])
            assert open_pool(args, run)(run.prompts, 1, torch.Generator()).lengths.shape == (1, 1)
    else:
        model, tokenizer, _ = load(directory)
        model(torch.zeros(1, 3, dtype=torch.long))
        tokenizer.decode(encode(reward.Problem("1+2=", "3").prompt, tokenizer))


def files(count, seed):
    """({"kind loaded" or "kind refused": number}, slowest seconds, what it was) of a seeded batch."""
    faulthandler.dump_traceback_later(300, exit=True)
    good, another, *_ = good_files()
    rng, found, slowest = random.Random(seed), collections.Counter(), (0.0, "")
    for i in range(count):
        kind = rng.choice(list(good))
        broken, verdict = rng.choice(list(good[kind])), "loaded"
        with tempfile.TemporaryDirectory() as directory, contextlib.redirect_stdout(None):
            for name, data in good[kind].items():
                other = another.get(name, good["pool"]["a.jsonl"])
                Path(directory, name).write_bytes(damaged(rng, data, other) if name == broken else data)
            case, started = f"seed {seed}, number {i}: {kind}, {broken}", time.thread_time()
            try:
                use(kind, directory)
            except BaseException as error:  # a panic of a library in Rust is no Exception
                verdict = "refused"
                named = directory in str(error) and "\n" not in str(error)
                if not isinstance(error, (ValueError, OSError)) or not named:
                    raise RuntimeError(f"{case}: {error!r}") from error
        found[f"{kind} {verdict}"] += 1
        slowest = max(slowest, (time.thread_time() - started, case))
    return found, *slowest


BEHIND = "million|dozen|is wrong|or more|\\text{ or not}|pi|\\pi|!|i|km/h|^2|_7|,7|, 345|/7|% off".split("|")
BEFORE = "not |\\neq |\\geq|about |\\sqrt|7|7, |y=7+|x\\not=|5=|\\{".split("|")
UNITS = {"\\$": "€", "cents": "dollars", "inches": "feet", "cm": "feet", "\\circ": "\\prime", "%": "°"}


def mutations(gold):
    """{kind: [wrong answers]}, each one mistake away from the gold."""
    put = lambda i, new, length=1: gold[:i] + new + gold[i + length:]
    numbers = [range(*m.span()) for m in re.finditer(r"[0-9]*\.?[0-9]+", gold)]
    digits = [(i, span[0]) for span in numbers for i in span if gold[i] != "."]
    zeros = [i for i, start in digits if gold[i] == "0" and (i == start or "." in gold[start:i])]
    skipped = r"\\[A-Za-z]+\{?|cents|inches|degrees|cm"
    marks = [m.start() for m in re.finditer(skipped + r"|([0-9A-Za-z+*/=<>|!()\[\]-])", gold) if m[1]]
    body = re.fullmatch(r"(\$?[(\[]?)([^\\{}()\[\]$=]+)([)\]]?\$?)", gold)  # elements without inner brackets
    parts = body[2].split(",") if body and "," in body[2] else []
    lists = [parts[:i] + parts[i + 1:] for i in range(len(parts))] + [parts + parts[:1]] * bool(parts)
    lists += [parts[:i] + [b, a] + parts[i + 2:] for i, (a, b) in enumerate(zip(parts, parts[1:]))
              if a.strip() != b.strip()]
    return {"digit": [put(i, new) for i, _ in digits for new in set("0123456789") - {gold[i]}],
            "sign": [put(span[0], "-", 0) for span in numbers if gold[span[0]:span[-1] + 1].strip("0.")],
            "bracket": [put(i, new) for i in marks if gold[i] in "()[]" for new in set("()[]") - {gold[i]}],
            "elements": [body[1] + ", ".join(other) + body[3] for other in lists],
            "unit": [gold.replace(unit, other) for unit, other in UNITS.items() if unit in gold],
            "words": [f"{gold} {word}" for word in BEHIND] + [word + gold for word in BEFORE],
            "dropped": [put(i, "") for i in marks if i not in zeros]}


def golds(paths, count, seed):
    """({"kind refused": number}, slowest seconds, its text) of a seeded batch of real answers made wrong."""
    rng, found, slowest = random.Random(seed), collections.Counter(), (0.0, "")
    with contextlib.redirect_stdout(None):
        problems = {problem.answer: problem for path in paths for problem in load_problems(path)}
    while found.total() < count:
        problem = rng.choice(list(problems.values()))
        kind, wrong = rng.choice(list(mutations(problem.answer).items()))
        if wrong:
            text = rng.choice(["\\boxed{%s}", "#### %s", "Answer: $%s$"]) % rng.choice(sorted(wrong))
            started = time.thread_time()
            assert not reward.score(problem, text).answer, f"{kind}: {text} is accepted for {problem.answer}"
            slowest = max(slowest, (time.thread_time() - started, repr(text)))
            found[f"{kind} refused"] += 1
    return found, *slowest


def main():
    parser = argparse.ArgumentParser(description="Fuzz the scorers or the loaders.")
    parser.add_argument("what", nargs="?", choices=("strings", "files", "golds"), default="strings")
    parser.add_argument("--count", type=int, help="1,000,000 strings, 20,000 files or 10,000 golds")
    parser.add_argument("--data", nargs="+", default=[], help="JSONL files of problems, for golds")
    args = parser.parse_args()
    if args.what == "golds" and not args.data:
        parser.error("golds needs --data")
    work, batch, count = {"strings": (strings, 1_000, 1_000_000), "files": (files, 100, 20_000),
                          "golds": (functools.partial(golds, args.data), 2_500, 10_000)}[args.what]
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "TQDM_DISABLE": "1",
                   "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}  # of the workers
    found, slowest = collections.Counter(), (0.0, "")
    with multiprocessing.get_context("spawn").Pool() as pool:
        work, seeds = functools.partial(work, batch), range(-(-(args.count or count) // batch))
        for verdicts, *case in tqdm(pool.imap_unordered(work, seeds), total=len(seeds), dynamic_ncols=True):
            found, slowest = found + collections.Counter(verdicts), max(slowest, tuple(case))
    print(*(f"{verdict:20} {number:10,}" for verdict, number in sorted(found.items())),
          f"no crash; the slowest took {slowest[0] * 1000:.1f} ms: {slowest[1]}", sep="\n")


if __name__ == "__main__":
    main()
