"""Scorers against hostile strings: every call must end quickly, with a verdict and not an exception.

    python bench/fuzz.py --count 1000000            4 to 5 minutes on 2 cores

Strings are random bytes, deeply nested or endlessly repeated LaTeX, numbers of thousands of digits, and real answers with
pieces cut out, doubled and swapped, up to 20,000 characters (a response of 4,096 tokens is about that long). Each goes through
score for two kinds of problem out of six, and against another string through answers_equal. Prints the slowest; a call that
takes minutes ends the process and says where it was.
"""
import argparse
import faulthandler
import multiprocessing
import random
import sys
import time
from pathlib import Path

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


def work(job):
    """(slowest seconds, its string) of a seeded batch."""
    faulthandler.dump_traceback_later(300, exit=True)
    seed, count = job
    rng, slowest, before = random.Random(seed), (0.0, ""), "1"
    for _ in range(count):
        text = hostile(rng)
        started = time.thread_time()  # of this process alone, whatever else the machine does
        try:
            for problem in rng.sample(PROBLEMS, 2):
                answer, strict = reward.score(problem, text)
                assert answer in (True, False) and strict in (True, False)
            reward.answers_equal(reward.extract_answer(text) or text, before)
        except Exception as error:
            raise RuntimeError(f"seed {seed}: {type(error).__name__}: {error} on {text[:300]!r}") from error
        slowest = max(slowest, (time.thread_time() - started, text))
        before = text[:rng.choice([20, 1000])]
    return slowest


def main():
    parser = argparse.ArgumentParser(description="Fuzz reward.py.")
    parser.add_argument("--count", type=int, default=1_000_000, help="strings")
    args = parser.parse_args()
    batch, slowest = 1_000, (0.0, "")
    with multiprocessing.get_context("spawn").Pool() as pool:
        jobs = [(seed, batch) for seed in range(-(-args.count // batch))]
        for found in tqdm(pool.imap_unordered(work, jobs), total=len(jobs), unit="k strings", dynamic_ncols=True):
            slowest = max(slowest, found)
    print(f"{len(jobs) * batch:,} strings, no exception; the slowest took {slowest[0] * 1000:.1f} ms for three verdicts: "
          f"{slowest[1][:100]!r} ({len(slowest[1]):,} characters)")


if __name__ == "__main__":
    main()
