"""Problems from files, and back: JSONL, which docs/data.md shows.

It needs the standard library alone, so that recipes.data starts at once.
"""
import ast
import hashlib
import json
import re
from pathlib import Path

import reward
from plumbing import answers, tasks
from plumbing.answers import after_thought, answers_equal, extract_answer, last_boxed, tidy
from plumbing.files import write_whole
from reward import TASKS, Problem


def load_problems(path):
    """[Problem], each once, from JSONL with `answer`, with `question` (which is asked) or `prompt` (which is
    given as it is), and, optionally, `task` and anything else.
    ValueError names the file and line of a record that cannot be used; OSError if the file cannot be read."""
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such file; recipes/data.py writes problems from published data sets")
    problems, records = {}, 0  # a dictionary: DAPO-Math-17k has every problem about a hundred times
    with open(path, "rb") as file:
        try:
            for number, line in enumerate(file, 1):
                if line.strip():
                    problems[as_problem(json.loads(line.decode("utf-8-sig")))] = None
                    records += 1
        except json.JSONDecodeError as error:
            why = f"no JSONL, which recipes/data.py makes: {error}"
            raise ValueError(f"{path}, line {number}: {why}") from error
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}, line {number}: {str(error)[:200]}") from error
    if records > len(problems):
        print(f"{path}: {records - len(problems):,} of {records:,} problems left out: duplicates")
    return matchable(problems, path)


def matchable(problems, path):
    """[Problem] of those whose answers a response can match. Prints how many of `path` it leaves out. It asks
    the answers and not `score`, which is yours to change. ValueError if none is left."""
    kept = [problem for problem in problems if can_be_matched(problem)]
    if left_out := len(problems) - len(kept):
        print(f"{path}: {left_out:,} of {len(problems):,} problems left out. No response matches their "
              "answers: nothing, a proof, a whole solution, or not the letter or digit the task asks for")
    if not kept:
        raise ValueError(f"{path}: no problems in this file whose answers can be matched")
    return kept


def can_be_matched(problem):
    answer, gold = problem.answer, TASKS[problem.task].gold
    if gold or len(answer) > 300 or "\n" in answer:
        return bool(gold and re.fullmatch(gold, answer))
    return (tidy(answer)[1].lower() not in ("proof", "notfound")  # NuminaMath's, where there is no answer
            and answers_equal(extract_answer(f"\\boxed{{{answer}}}"), answer))


def as_problem(record):
    """Problem of a JSON record. ValueError says what is wrong with it."""
    exact = isinstance(record, dict) and "question" not in record
    asked = "prompt" if exact else "question"
    if not isinstance(record, dict) or not {asked, "answer"} <= record.keys():
        found = ", ".join(record) if isinstance(record, dict) else type(record).__name__
        raise ValueError(f"needs `question` or `prompt`, and `answer`, found {found}: recipes/data.py "
                         "converts data sets")
    extra = dict(record)
    question, answer, task = extra.pop(asked), extra.pop("answer"), extra.pop("task", "math")
    answer = "" if answer is None else answer
    if type(question) is not str or type(answer) not in (str, int, float) or answer != answer:
        raise ValueError(f"`{asked}` must be text and `answer` text or a number")
    f"{question}{answer}".encode()  # ValueError: half of a surrogate pair, which no tokeniser takes
    if task not in [*TASKS] or (pattern := TASKS[task].pattern) and not re.fullmatch(pattern, question):
        raise ValueError(f"{question[:40]!r} is no question of a task {task!r} ({', '.join(TASKS)})")
    answer = after_thought(str(answer)).rpartition("####")[2].strip()  # GSM8K's answers end so
    if answer.count("\\boxed") == 1:  # several boxes may hold a part of the answer each
        answer = (last_boxed(answer) or "").strip()
    return Problem(question, answer, task, extra, exact)


def save_problems(problems, path):
    """Writes what load_problems reads: the whole file or, if the disk is full, none."""
    records = [{"prompt" if p.exact else "question": p.question, "answer": p.answer, "task": p.task} | p.extra
               for p in problems]
    write_whole(Path(path), lambda file: file.writelines(json.dumps(r).encode() + b"\n" for r in records))


def scorer_hash():
    """A hash of the rules, without comments but with docstrings: a figure belongs to the rules that gave it.
    What your own reward imports from elsewhere is not in it."""
    files = reward.__file__, answers.__file__, tasks.__file__
    sources = [Path(file).read_text(encoding="utf-8") for file in files]
    return hashlib.sha256("".join(ast.unparse(ast.parse(x)) for x in sources).encode()).hexdigest()[:16]
