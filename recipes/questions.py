"""Three kinds of short question for a small real model: few-shot prompts, answers of a few tokens.

    python -m recipes.questions --out data/questions.jsonl --held-out data/questions-test.jsonl

A model of 135 million parameters finds the largest of three numbers hard, the sum of three digits harder, and
three words in reverse order hardest.
"""
import argparse
import random
from pathlib import Path

from plumbing.problems import save_problems
from plumbing.terminal import one_line
from reward import Problem

WORDS = "apple river stone cloud tiger lamp paper garden silver winter bread music candle forest".split()
EXAMPLES = """Question: Which is the largest of 41, 35 and 88?
Answer: 88

Question: What is 7 + 2 + 6?
Answer: 15

Question: What are the words boat, green, hill in reverse order?
Answer: hill, green, boat

Question: {}
Answer:"""


def question(rng):
    """(question, answer) of a kind chosen at random."""
    kind, words = rng.choice(("largest", "sum", "reverse")), rng.sample(WORDS, 3)
    numbers, digits = rng.sample(range(10, 100), 3), rng.choices(range(1, 10), k=3)
    return {"largest": ("Which is the largest of {}, {} and {}?".format(*numbers), str(max(numbers))),
            "sum": ("What is {} + {} + {}?".format(*digits), str(sum(digits))),
            "reverse": ("What are the words {}, {}, {} in reverse order?".format(*words),
                        ", ".join(reversed(words)))}[kind]


def main(argv=None):
    parser = argparse.ArgumentParser(description="Write problems for a small model.")
    parser.add_argument("--count", type=int, default=2_200, help="problems, no two alike (2200)")
    parser.add_argument("--seed", type=int, default=0, help="other seeds give other problems (0)")
    parser.add_argument("--out", type=Path, required=True, help="JSONL to write")
    parser.add_argument("--held-out", type=Path, required=True, help="JSONL of 200 that --out has not")
    args = parser.parse_args(argv)
    rng, problems = random.Random(args.seed), {}
    while len(problems) < args.count:
        asked, answer = question(rng)
        problems[Problem(EXAMPLES.format(asked), answer, extra={"asked": asked}, exact=True)] = None
    with one_line("questions.py"):
        for path, some in ((args.out, [*problems][:-200]), (args.held_out, [*problems][-200:])):
            path.parent.mkdir(parents=True, exist_ok=True)
            save_problems(some, path)


if __name__ == "__main__":
    main()
