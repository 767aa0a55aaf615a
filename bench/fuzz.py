"""Hostile input: each string must get a verdict and each broken file one line that names it, quickly and without a crash.

    python bench/fuzz.py strings --count 1000000    through the scorers: 4 to 5 minutes on 2 cores
    python bench/fuzz.py files --count 20000        through the loaders: 4 to 5 minutes on 2 cores

Strings are random bytes, deeply nested or endlessly repeated LaTeX, numbers of thousands of digits, and real answers with
pieces cut out, doubled and swapped, up to 20,000 characters (a response of 4,096 tokens is about that long); one in ten is
of hypothesis's invention, where that is installed. Each goes through score for two kinds of problem out of six, and against
another string through answers_equal.

Files are problems, pools, evaluations begun and checkpoint directories, with bytes, lines or JSON values cut, changed, doubled
or swapped. What is loaded must work, and the rest be refused by a ValueError or OSError of one line with the path.

Prints the slowest; a call that takes minutes ends the process and says where it was.
"""
import argparse
import collections
import contextlib
import faulthandler
import functools
import importlib.util
import io
import json
import multiprocessing
import os
import random
import sys
import tempfile
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import reward

PIECES = [*"{}[]()$\\,./^_=-+*%&~ \n\0 0123456789abcXYZ°≤−é", "\\boxed{", "\\frac{", "\\dfrac", "\\sqrt", "\\left(", "\\right)", "\\text{",
          "\\cup", "\\{", "\\}", "\\boxed", "####", "Answer:", "answer: ", "1/3", "1,000", "-0.5", "10^{", "x=", "\\pi", "^\\circ", "\\%",
          "dollars", "\\infty", "\\begin{pmatrix}", "&", "\\\\", "٣", "１", "²", "\ud800", "{}.__class__", "%s%n", "../../etc/passwd"]
PROBLEMS = [reward.Problem("What is 6*7?", "42"), reward.Problem("?", "\\frac{1}{2}"), reward.Problem("?", "\\{1, 2, (3, 4]\\}"),
            reward.Problem("Which?", "B", "choice"), reward.Problem("Bfa483920=", "2", "habit"), reward.Problem("3+4*2=", "1", "natural")]


def hostile(rng):
    kind, length = rng.randrange(5), int(10 ** rng.uniform(0, 4.3))
    if kind == 0:
        return rng.randbytes(length).decode("utf-8", "replace")
    if kind == 1:  # one or two pieces again and again
        few = rng.choices(PIECES, k=rng.randint(1, 2))
        return "".join(few * (length // len("".join(few)) + 1))[:length]
    if kind == 2:  # nested, and closed again or not
        opened, depth = rng.choice(["{", "\\boxed{", "\\frac{", "(", "\\{", "[", "\\sqrt{", "\\text{"]), max(1, length // 10)
        return opened * depth + "".join(rng.choices(PIECES, k=5)) + rng.choice(["}", ")", "\\}", "]", ""]) * depth
    if kind == 3:
        text = "".join(rng.choices(PIECES, k=max(1, length // 3)))
        return text + "\\boxed{" + "".join(rng.choices(PIECES, k=rng.randint(0, 300))) + "}"
    text = list(rng.choice(["\\boxed{\\frac{1}{2}}", "#### 1,234.50", "So $x = \\{1, 2\\} \\cup (3, 4]$. Answer: 10\\%", "3+8=1", "-86-33"]) * 3)
    for _ in range(rng.randint(0, 10)):
        i, j = sorted(rng.randrange(len(text) + 1) for _ in range(2))
        text = rng.choice([text[:i] + text[j:], text[:j] + text[i:], text[:i] + [rng.choice(PIECES)] + text[i:]])
    return "".join(text)


def invented(seed, count):
    """Strings of hypothesis's invention; none where it is not installed."""
    try:
        import hypothesis
    except ImportError:  # main() says how to install it
        return []
    texts = []
    keep = hypothesis.given(hypothesis.strategies.text())(lambda text: texts.append(text))
    quiet = {"database": None, "deadline": None, "suppress_health_check": list(hypothesis.HealthCheck)}
    hypothesis.seed(seed)(hypothesis.settings(max_examples=count, **quiet)(keep))()
    return texts


def strings(job):
    """({"scored": number}, slowest seconds, its string) of a seeded batch."""
    faulthandler.dump_traceback_later(300, exit=True)
    seed, count = job
    rng, slowest, before = random.Random(seed), (0.0, ""), "1"
    texts = invented(seed, count // 10)
    for _ in range(count):
        text = texts.pop() if texts else hostile(rng)
        started = time.thread_time()  # of this process alone, whatever else the machine does
        try:
            for problem in rng.sample(PROBLEMS, 2):
                answer, strict = reward.score(problem, text)
                assert answer in (True, False) and strict in (True, False)
            reward.answers_equal(reward.extract_answer(text) or text, before)
        except Exception as error:
            raise RuntimeError(f"seed {seed}: {type(error).__name__}: {error} on {text[:300]!r}") from error
        slowest = max(slowest, (time.thread_time() - started, repr(text[:100])))
        before = text[:rng.choice([20, 1000])]
    return {"scored": count}, *slowest


VALUES = [None, True, -1, 0, 1, 2 ** 24, 2 ** 31, 2 ** 63, 10 ** 400, -0.5, 1e308, float("nan"), "", "x", "\ud800", "\0", "../x", "/etc/passwd",
          "model.safetensors", "é" * 300, [], [0], [-1], ["x"], {}, {"a": {}}, {"rope_type": "llama3"}]
FAULTS = [b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"\xc3", b"NaN", b"-Infinity", b'"', b"{", b"[" * 5_000, b"9" * 5_000, b"\n", b"\r", b'"a":1,"a":2,']


def other_value(rng, value):
    """JSON with one of its values replaced, left out, renamed or doubled."""
    if not isinstance(value, (dict, list)) or not value or rng.random() < 0.05:
        return rng.choice(VALUES)
    value, kind = value.copy(), rng.randrange(6)
    place = rng.choice(list(value) if isinstance(value, dict) else range(len(value)))
    if kind == 0:
        del value[place]
    elif kind == 1 and isinstance(value, dict):
        value[rng.choice([*value, "x"])] = value[place]
    elif kind == 1:
        value.insert(place, value[place])
    else:
        value[place] = other_value(rng, value[place])
    return value


def damaged(rng, data, other):
    """Bytes with a fault in them; `other` are those of another file of the kind."""
    lines, kind = data.splitlines(keepends=True), rng.randrange(9)
    i, k = rng.randrange(len(data) + 1), rng.randrange(len(lines) or 1)
    if kind == 0:
        return data[:i] + rng.choice([b"", data[i + 1:], data[i + 1000:], other[i:]])
    if kind == 1:
        return data[:i] + bytes([rng.randrange(256)]) + data[i + 1:]
    if kind == 2 or not lines:
        return data[:i] + rng.choice(FAULTS) + data[i:]
    if kind == 3:
        lines[k:k + 1] = rng.choice([[], [lines[k]] * 2, lines[k:] + lines[:k], [lines[k][:i % len(lines[k])] + b"\n"], [b"\n"]])
        return b"".join(lines)
    if kind == 4:  # a key twice
        return data.replace(b"{", rng.choice([b'{"a": 1, "a": 2, ', b'{"question": "", "vocab_size": 38, "prompt_ids": [1], ']), 1)
    start, end = (8, 8 + int.from_bytes(data[:8], "little")) if data[8:10] == b'{"' else (0, len(data))  # of a safetensors header
    text = data[start:end] if start else rng.choice([data, lines[k]])
    try:
        new = json.dumps(other_value(rng, json.loads(text))).encode() + b"\n" * text.endswith(b"\n")
    except ValueError:
        return data[:i]
    return len(new).to_bytes(8, "little") + new + data[end:] if start else data.replace(text, new, 1)


@functools.cache
def good_files():
    """{kind: ({name: bytes} of a good one, {name: bytes} of another)}, and a model with its tokeniser."""
    import torch
    import transformers
    import model as models
    from recipes.family import make_family
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    tqdm.__init__ = functools.partialmethod(tqdm.__init__, disable=True)
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory, "family")
        make_family(out, "natural", sizes={"learner": (16, 2), "explorer": (24, 1)}, corpus_size=640, epochs=4)
        both = [{file.name: file.read_bytes() for file in (out / name).iterdir()} for name in ("learner", "explorer")]
        pair = models.load(out / "learner")
        shards = {name: data for name, data in both[0].items() if name != "model.safetensors"}
        weights, map_ = list(models.read_safetensors(out / "learner" / "model.safetensors")), {}
        for number, part in enumerate((weights[::2], weights[1::2])):
            models.write_safetensors(out / "shard", dict(part))
            shards[f"model-{number}.safetensors"] = (out / "shard").read_bytes()
            map_ |= {name: f"model-{number}.safetensors" for name, _ in part}
        shards["model.safetensors.index.json"] = json.dumps({"metadata": {}, "weight_map": map_}).encode()
        problems = [line + b"\n" for line in (out / "train.jsonl").read_bytes().splitlines()[:20]]
    as_lines = lambda records: "".join(json.dumps(record) + "\n" for record in records).encode()
    pool = [{"prompt": "1+2*3-4=", "prompt_ids": [i, 2, 3], "response_ids": [1, i, 0], "small_model_log_probs": [-.5, -1., -.1]} for i in range(9)]
    begun = [{"question": f"{i}+1=", "answer": 1, "strict": 0, "texts": ["é", "b"], "truncated": 2, "tokens": 3} for i in range(9)]
    files = {"problems": b"".join(problems), "pool": as_lines(pool), "evaluation": as_lines(begun), "checkpoint": both[0], "shards": shards}
    return files, both[1], pair


def use(kind, path):
    """Loads a file of this kind and uses what is loaded."""
    import torch
    import eval as evaluation
    import model as models
    import sample as sampling
    model, tokenizer = good_files()[2]
    with contextlib.redirect_stdout(io.StringIO()):
        if kind == "problems":
            for problem in reward.load_problems(path):
                sampling.encode_prompt(problem, tokenizer)
        elif kind == "pool":
            pool = sampling.Pool([path], model.num_tokens, model.config.max_position_embeddings)
            if pool.places:
                pool.draw(list(pool.places), 1, torch.Generator(), model)
        elif kind == "evaluation":
            args = SimpleNamespace(n=2, seed=0, max_new_tokens=4, template=None, thinking=None, temperature=1.0, top_k=0, top_p=1.0,
                                   presence_penalty=0.0, rollout_rows=64)
            evaluation.evaluate_resumably(args, model, tokenizer, [reward.Problem(f"{i}+1=", "1") for i in range(9)], path, "")
        else:
            model, tokenizer = models.load(path)
            model(torch.zeros(1, 3, dtype=torch.long))
            tokenizer.decode(sampling.encode_prompt(reward.Problem("1+2=", "3"), tokenizer))


def files(job):
    """({"kind loaded" or "kind refused": number}, slowest seconds, what it was) of a seeded batch."""
    faulthandler.dump_traceback_later(300, exit=True)
    seed, count = job
    (good, another, _), rng, found, slowest = good_files(), random.Random(seed), collections.Counter(), (0.0, "")
    for i in range(count):
        kind = rng.choice(list(good))
        with tempfile.TemporaryDirectory() as directory:
            path, fault = Path(directory, "file.jsonl"), None
            if isinstance(good[kind], bytes):
                path.write_bytes(damaged(rng, good[kind], good["pool"]))
            else:
                fault = rng.choice(list(good[kind]))
                for name, data in good[kind].items():
                    Path(directory, name).write_bytes(damaged(rng, data, another.get(name, b"")) if name == fault else data)
                path = Path(directory)
            started, verdict = time.thread_time(), "loaded"
            try:
                use(kind, path)
            except (ValueError, OSError) as error:
                verdict = "refused"
                if directory not in str(error) or "\n" in str(error):
                    raise RuntimeError(f"seed {seed}, {i}: {kind} {fault}: {type(error).__name__}: {error}") from error
            except BaseException as error:  # a panic of a library in Rust is no Exception
                raise RuntimeError(f"seed {seed}, {i}: {kind} {fault}: {type(error).__name__}: {error}") from error
            found[f"{kind} {verdict}"] += 1
            slowest = max(slowest, (time.thread_time() - started, f"seed {seed}, {i}: {kind} {fault}"))
    return found, *slowest


def main():
    parser = argparse.ArgumentParser(description="Fuzz the scorers or the loaders.")
    parser.add_argument("what", nargs="?", choices=("strings", "files"), default="strings", help="what to feed in")
    parser.add_argument("--count", type=int, help="how many; 1,000,000 strings or 20,000 files where not given")
    args = parser.parse_args()
    work, batch = {"strings": (strings, 1_000), "files": (files, 100)}[args.what]
    count = args.count or {"strings": 1_000_000, "files": 20_000}[args.what]
    os.environ["HF_HUB_OFFLINE"] = "1"
    if args.what == "strings" and not importlib.util.find_spec("hypothesis"):
        print("without strings of hypothesis's invention: pip install hypothesis adds them")
    found, slowest = collections.Counter(), (0.0, "")
    with multiprocessing.get_context("spawn").Pool() as pool:
        jobs = [(seed, batch) for seed in range(-(-count // batch))]
        for verdicts, *time_and_case in tqdm(pool.imap_unordered(work, jobs), total=len(jobs), unit="batches", dynamic_ncols=True):
            found, slowest = found + collections.Counter(verdicts), max(slowest, tuple(time_and_case))
    print(*(f"{verdict:20} {number:10,}" for verdict, number in sorted(found.items())), sep="\n")
    print(f"no crash; the slowest took {slowest[0] * 1000:.1f} ms: {slowest[1]}")


if __name__ == "__main__":
    main()
