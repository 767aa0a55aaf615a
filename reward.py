"""Problems, and what a response to one is worth.

Two kinds of problem:
  * anything with a checkable answer, from a JSONL file (recipes/data.py makes it of the published data sets);
  * two synthetic tasks whose solutions are written out step by step, for the laptop: plumbing/tasks.py.

Model output is data here: it is never evaluated, and the time to score it grows in proportion to its length.
"""
import ast
import hashlib
import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from plumbing import answers, tasks
from plumbing.answers import after_thought, answers_equal, extract_answer, last_boxed, tidy
from plumbing.tasks import HABIT_OPERATOR, habit_solution, natural_is_legal


@dataclass(frozen=True)
class Problem:
    question: str
    answer: str
    task: str = "math"  # one of TASKS
    extra: dict = field(default_factory=dict, compare=False)  # the rest of its record
    exact: bool = False  # whether the question is a whole prompt, for a base model say, to be given as it is

    @property
    def in_words(self):
        """Whether it is asked in words: with the task's instruction, and through a chat template where there is
        one. The synthetic tasks' questions are whole prompts."""
        return not (self.exact or TASKS[self.task].pattern)

    @property
    def prompt(self):
        """What the model is given to read."""
        asked = f"{self.question}\n{TASKS[self.task].instruction}".rstrip("\n") + "\n"
        return asked if self.in_words else self.question


class Score(NamedTuple):
    reward: float  # what training maximises
    strict: bool   # the answer is right, and so is every step; where steps are free text, as `answer`
    answer: bool   # the final answer is right, which errors in the steps may hit too


def score(problem, text):
    """What `text`, a model's decoded response to a problem, is worth."""
    strict, answer = TASKS[problem.task].check(problem, text)
    return Score(reward=float(strict), strict=strict, answer=answer)  # your own reward: change `reward=` here


def scorer_hash():
    """A hash of the rules without their comments: a figure belongs to the rules that gave it. What your own
    reward imports from elsewhere is not in it."""
    files = __file__, answers.__file__, tasks.__file__
    sources = [Path(file).read_text(encoding="utf-8") for file in files]
    return hashlib.sha256("".join(ast.unparse(ast.parse(x)) for x in sources).encode()).hexdigest()[:16]


# ---- the tasks and their checks ----------------------------------------------------------------------------

def check_habit(problem, text):
    """The type fixes the operator, so exactly one worked solution is right."""
    question, answer = problem.question, text[-1:] == problem.answer
    return answer and text == habit_solution(question, HABIT_OPERATOR[question[0]]), answer


def check_natural(problem, text):
    answer = text[-1:] == problem.answer
    return answer and natural_is_legal(problem.question, text), answer


def said(problem, text):
    """A response, behind the last line of a prompt that is given exactly: it may end with `Answer:`."""
    return problem.question.rpartition("\n")[2] + text if problem.exact else text


def check_choice(problem, text):
    """Right are `B`, `Option B` and `(B) bank`, but not `B or C`."""
    final = tidy((extract_answer(said(problem, text)) or "")[:1_000])[1]
    found = re.fullmatch(r"(?:[Oo]ption)?\(?([A-Z])(?:[).:](?!\W*(?:or\W*)?[A-Z](?![A-Za-z])).*)?", final)
    right = bool(found) and found[1] == problem.answer
    return right, right


def check_words(problem, text):
    right = answers_equal(extract_answer(said(problem, text)), problem.answer)
    return right, right


class Task(NamedTuple):
    check: callable        # (problem, text) -> (strict, answer)
    instruction: str = ""  # what follows the question
    pattern: str = ""      # what its questions look like, if they are whole prompts and not words
    gold: str = ""         # what its answers look like, "(?s).*" anything; "": short and equal to themselves


SYNTHETIC = ("habit", "natural")
ASK = "Please reason step by step, and put {} within \\boxed{{}}.".format
TASKS = {
    "math": Task(check_words, ASK("your final answer")),
    "instructed": Task(check_words),  # the question says itself how to answer
    "choice": Task(check_choice, ASK("the letter of your answer"), gold="[A-Z]"),
    "habit": Task(check_habit, pattern="[A-D][a-l]{2}[0-9]{6}=", gold="[0-9]"),
    "natural": Task(check_natural, pattern="[0-9]([-+*][0-9])+=", gold="[0-9]")}


# ---- problems from files -----------------------------------------------------------------------------------

def load_problems(path):
    """[Problem], each once, from JSONL with `answer`, `question` (which is asked) or `prompt` (which is given as
    it is), and, optionally, `task` and anything else.
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
        except (ValueError, RecursionError) as error:  # JSONDecodeError is a ValueError
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
        raise ValueError(f"needs `question` or `prompt`, and `answer`, found {found}: recipes/data.py converts "
                         "data sets")
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
    beside = f"{path}.partial"
    with open(beside, "w", encoding="utf-8") as file:
        for p in problems:
            record = {"prompt" if p.exact else "question": p.question, "answer": p.answer, "task": p.task}
            record |= p.extra
            file.write(json.dumps(record) + "\n")
        file.flush()
        os.fsync(file.fileno())  # else a power cut may leave the name of an empty file
    os.replace(beside, path)
