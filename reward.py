"""Problems, and what a response to one is worth.

Two kinds of problem:
  * anything with a checkable answer, from a JSONL file (recipes/data.py makes it of the published data sets);
  * two synthetic tasks whose solutions are written out step by step, for the laptop: plumbing/tasks.py.

Model output is data here: it is never evaluated, and the time to score it grows in proportion to its length.
"""
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from plumbing.answers import answers_equal, extract_answer, tidy
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
        """Whether it is asked in words: with the task's instruction, and through a chat template where there
        is one. The synthetic tasks' questions are whole prompts."""
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


# ---- the tasks and their checks ----------------------------------------------------------------------------

def check_habit(problem, text):
    """The type fixes the operator, so exactly one worked solution is right."""
    question, answer = problem.question, text[-1:] == problem.answer
    return answer and text == habit_solution(question, HABIT_OPERATOR[question[0]]), answer


def check_natural(problem, text):
    answer = text[-1:] == problem.answer
    return answer and natural_is_legal(problem.question, text), answer


OPENED = re.compile(r"(?:Answer:\**|####|\\boxed *\{|<think(?:ing)?>)\s*$", re.IGNORECASE)


def said(problem, text):
    """A response, after the `Answer:` that an exact prompt may end with. Nothing else in a prompt counts."""
    opened = problem.exact and OPENED.search(problem.question)
    return opened[0] + text if opened else text


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
    check: Callable        # (problem, text) -> (strict, answer)
    instruction: str = ""  # what follows the question
    pattern: str = ""      # what its questions look like, if they are whole prompts and not words
    gold: str = ""         # what its answers look like, "(?s).*" anything; "": short and equal to themselves


SYNTHETIC = ("habit", "natural")
ASK = "Please reason step by step, and put {} within \\boxed{{}}.".format
TASKS = {
    "math": Task(check_words, ASK("your final answer")),
    "instructed": Task(check_words),  # the question says itself how to answer
    "choice": Task(check_choice, ASK("the letter of your answer"), gold="[A-Z]"),
    "habit": Task(check_habit, pattern="[A-D][a-l]{2}[0-9]{2,}=", gold="[0-9]"),
    "natural": Task(check_natural, pattern="[0-9]([-+*][0-9])+=", gold="[0-9]")}
