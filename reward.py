"""Problems, and what a response to one is worth.

Two kinds of problem:
  * anything with a checkable answer, from a JSONL file (recipes/data.py makes it of the published data sets);
  * two synthetic tasks whose solutions are written out step by step, for the laptop experiment:

    habit     `Bfa483920=` -> `-86-33-94-22-02`   digits 4 8 3 9 2 0 folded with one operator, modulo 10: each
              step writes operator, digit, running value. The first letter (A B C D) names the operator that
              is asked for. The corpus's writers do NOT look at it: they follow a fixed random table over all
              three letters (their habit), which is right in 40% of its cells. A model that memorises it is
              confidently wrong on the rest; a model too small for the table mixes operators. By design: the
              table, its conflict with the reward, the share of writers who ignore it (`noise`). Emergent: who
              memorises and who mixes.
    natural   `3+4*2-5=` -> `3+8-5=1-5=6`         an expression reduced one operation at a time, modulo 10.
              Writers reduce in four orders, most of them wrong. Nothing ties an order to a problem: no habit
              is designed in.

Model output is data here: it is never evaluated, and the time to score it grows in proportion to its length.
"""
import json
import re
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

INSTRUCTIONS = {"math": "Please reason step by step, and put your final answer within \\boxed{}.",
                "choice": "Please reason step by step, and put the letter of your answer within \\boxed{}.",
                "instructed": "",  # the question says itself how to answer
                "habit": "", "natural": ""}


@dataclass(frozen=True)
class Problem:
    question: str
    answer: str
    task: str = "math"  # one of INSTRUCTIONS

    @property
    def in_words(self):
        """Whether it is text for a chat model. The synthetic tasks' questions are whole prompts."""
        return self.task not in TASKS

    @property
    def prompt(self):
        """What the model is given to read."""
        asked = f"{self.question}\n{INSTRUCTIONS[self.task]}".rstrip("\n") + "\n"
        return asked if self.in_words else self.question


class Score(NamedTuple):
    reward: float  # what training maximises
    strict: bool   # the answer is right, and so is every step; where steps are free text, as `answer`
    answer: bool   # the final answer is right, which errors in the steps may hit too


def score(problem, text):
    """What `text`, a model's decoded response to a problem, is worth."""
    if problem.task == "habit":  # the type fixes the operator, so exactly one worked solution is right
        answer = text[-1:] == problem.answer
        strict = answer and text == habit_solution(problem.question, HABIT_OPERATOR[problem.question[0]])
    elif problem.task == "natural":
        answer = text[-1:] == problem.answer
        strict = answer and natural_is_legal(problem.question, text)
    elif problem.task == "choice":
        final = tidy((extract_answer(text) or "")[:1_000])[1]  # `B`, `Option B`, `(B) bank`, but not `B or C`
        found = re.fullmatch(r"(?:[Oo]ption)?\(?([A-Z])(?:[).:](?!\W*(?:or\W*)?[A-Z](?![A-Za-z])).*)?", final)
        answer = strict = bool(found) and found[1] == problem.answer
    else:
        answer = strict = answers_equal(extract_answer(text), problem.answer)
    return Score(reward=float(strict), strict=strict, answer=answer)  # your own reward: change `reward=` here


# ---- task "habit" ------------------------------------------------------------------------------------------

OPERATIONS = {"+": lambda a, b: (a + b) % 10, "-": lambda a, b: (a - b) % 10,
              "~": lambda a, b: (b - a) % 10, "*": lambda a, b: a * b % 10}
HABIT_OPERATOR = dict(zip("ABCD", OPERATIONS))  # what each problem type asks for


def habit_solution(question, operator):
    """`Bfa483920=`, `-` -> `-86-33-94-22-02`: 4-8=6, 6-3=3, 3-9=4, 4-2=2, 2-0=2, one triple a step."""
    running, *digits = map(int, question[3:9])
    steps = []
    for digit in digits:
        running = OPERATIONS[operator](running, digit)
        steps.append(f"{operator}{digit}{running}")
    return "".join(steps)


# ---- task "natural" ----------------------------------------------------------------------------------------

def reduce_at(expression, i):
    """Replaces the digits around the operator at index i by their value: `3+4*2`, 3 -> `3+8`."""
    value = OPERATIONS[expression[i]](int(expression[i - 1]), int(expression[i + 1]))
    return f"{expression[:i - 1]}{value}{expression[i + 2:]}"


def legal_reductions(expression):
    """Indices of the operators that may be evaluated next under normal precedence: a product always; a sum or
    difference with no product beside it and no minus before it (a-b+c is not a-(b+c))."""
    operators = range(1, len(expression), 2)
    return [i for i in operators if expression[i] == "*"
            or (expression[i + 2:i + 3] != "*" and expression[max(i - 2, 0)] not in "*-")]


def natural_is_legal(question, text):
    """Every expression in `text` follows from the one before by one legal reduction, down to one digit."""
    expression, *rest = [question.removesuffix("="), *text.split("=")]
    for following in rest:
        if following not in {reduce_at(expression, i) for i in legal_reductions(expression)}:
            return False
        expression = following
    return len(expression) == 1


TASKS = {"habit": re.compile("[A-D][a-l]{2}[0-9]{6}="),  # what their questions look like
         "natural": re.compile("[0-9]([-+*][0-9])+=")}


# ---- problems from files -----------------------------------------------------------------------------------

def load_problems(path):
    """[Problem], each once, from JSONL with `question`, `answer` and, optionally, `task`.
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
    matchable = [problem for problem in problems if not problem.in_words or len(problem.answer) <= 300 and
                 "\n" not in problem.answer and score(problem, f"\\boxed{{{problem.answer}}}").answer]
    if records > len(problems):
        print(f"{path}: {records - len(problems):,} of {records:,} problems left out: duplicates")
    if left_out := len(problems) - len(matchable):
        print(f"{path}: {left_out:,} of {len(problems):,} problems left out. No response matches "
              "their answers: a proof, a whole solution, or no letter where the task is `choice`")
    if not matchable:
        raise ValueError(f"{path}: no problems in this file whose answers can be matched")
    return matchable


def as_problem(record):
    """Problem of a JSON record. ValueError says what is wrong with it."""
    if not isinstance(record, dict) or not {"question", "answer"} <= record.keys():
        found = ", ".join(record) if isinstance(record, dict) else type(record).__name__
        raise ValueError(f"needs `question` and `answer`, found {found}: recipes/data.py converts data sets")
    question, answer, task = record["question"], record["answer"], record.get("task", "math")
    if type(question) is not str or type(answer) not in (str, int, float) or answer != answer:
        raise ValueError("`question` must be text and `answer` text or a number")
    f"{question}{answer}".encode()  # ValueError: half of a surrogate pair, which no tokeniser takes
    if task not in [*INSTRUCTIONS] or task in TASKS and not TASKS[task].fullmatch(question):
        raise ValueError(f"{question[:40]!r} is no question of a task {task!r} ({', '.join(INSTRUCTIONS)})")
    answer = str(answer).rpartition("####")[2].strip()  # GSM8K's answers end so
    if answer.count("\\boxed") == 1:  # several boxes may hold a part of the answer each
        answer = (last_boxed(answer) or "").strip()
    if not tidy(answer[:1_000])[1]:  # a bare `$`, `.` or `x=` too
        raise ValueError("the answer is empty")
    if task in TASKS and not re.fullmatch("[0-9]", answer):
        raise ValueError(f"the answer {answer[:40]!r} is not one digit, as those of task {task!r} are")
    return Problem(question, answer, task)


def save_problems(problems, path):
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(vars(problem)) + "\n" for problem in problems)


# ---- final answers in free text ----------------------------------------------------------------------------
# Training finds whatever is accepted wrongly. So equality is strict, and nothing is computed: after `tidy`,
# numbers are compared by value, sets in any order, and all else letter by letter.

def last_boxed(text):
    """Content of the last balanced `\\boxed{...}` that is not blank, else of a blank one, else None."""
    text = re.sub(r"\\boxed +([^\s{}$\\]+)", r"\\boxed{\1}", text)  # `\boxed 4`
    closed, content = [], None
    tokens = list(re.finditer(r"\\boxed *\{|\\[\\{}]|[{}]", text)) if "\\boxed" in text else []
    for token in reversed(tokens):
        if token[0] == "}":
            closed.append(token.start())
        elif token[0][-1] == "{" and token[0] != r"\{" and closed:
            end = closed.pop()
            if len(token[0]) > 1 and (content := text[token.end():end]).strip():
                break
    return content


def extract_answer(text):
    """The final answer in a response: the last `\\boxed{}`, else what follows the last `####`, else the last
    `Answer:`, up to the line's end. None if there is none: a bare number in the text is not an answer."""
    boxed = last_boxed(text)
    if boxed is not None:
        return boxed.strip()
    for marker in ("####", "answer:"):
        ends = [match.end() for match in re.finditer(marker, text, re.IGNORECASE)]
        if ends:
            rest = re.sub(r"^(?:[\s*]|\\\[)+", "", text[ends[-1]:])  # the value may be on the next line
            return rest.partition("\n")[0].strip(" *#")
    return None


COMMANDS = {"pi": "π", "infty": "∞", "cup": "∪", "in": "∈", "pm": "±", "le": "≤", "leq": "≤",
            "leqslant": "≤", "ge": "≥", "geq": "≥", "geqslant": "≥", "dfrac": r"\frac", "tfrac": r"\frac",
            **dict.fromkeys("left right big Big bigg Bigg displaystyle quad qquad".split(), " ")}
TIDY = [(re.compile(pattern), plain) for pattern, plain in (
    (r"\s+", " "), ("−", "-"),
    (r"(?<=[0-9])(?:\{,\}|,\\! ?|\\,)(?=[0-9]{3}(?![0-9]))", ""),  # 10{,}000
    (r"\\(?:text(?:bf|it|rm)?|math(?:bf|it|rm)|mbox|operatorname) ?\{([^{}]*)\}", r" \1 "),
    (r"\^ ?(?:\\circ|\{ ?\\circ ?\})|\\?degrees?\b", "°"), (r"\\%| percent\b", "%"),
    (r"\\\$ ?([0-9.,]*[0-9])", r" \1 dollar"),
    (r"\\([A-Za-z]+)", lambda command: COMMANDS.get(command[1], command[0])),
    (r"(?<!\\)(?:\\[,;:!()\[\] ]|\$)|~", " "), (r" +", " "), (r" ?,? ?\band\b ?", ", "),
    (r"(?<![0-9,]) | (?![0-9,])", ""),  # but not in `4 2`, which is not 42, nor in `10, 100`
    (r"[. ]+$", ""), (r"(?<![^,(\[=∪])\+", ""),  # +5
    (r"(\\frac|\\sqrt|[_^])([0-9A-Za-zπ])", r"\1{\2}"), (r"(\\frac\{[^{}]*\}) ?([0-9A-Za-zπ])", r"\1{\2}"),
    (r"(^|[,(\[{=∪] ?)(-?)(?:([0-9]+) )?((?:[0-9A-Za-zπ^]|\\sqrt|\{[^{}]*\})+)/([0-9]+|[A-Za-zπ])"
     r"(?= ?(?:$|[,)\]}∪]|\\}))", r"\1\2\3\\frac{\4}{\5}"))]  # π/2, 2 1/2
NAME = re.compile(r"(?:([A-Za-z](?:_\{\\?\w+\})?(?:\([A-Za-z]\))?|\([A-Za-z](?:, ?[A-Za-z])+\))[=∈])?(.*)")
NUMBER = re.compile(r"(-?)(?:(\d*)\\frac\{(-?\d+)\}\{([1-9]\d*)\}|"
                    r"((?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d\d?)?))"
                    r"(?:(%|°|cent|dollar|cm|inch|foot|feet|yard|mile|meter|kg|gram|pound|liter|second|"
                    r"minute|hour|day|week|month|year|unit)(?:e?s)?((?<=[a-z])\^\{[23]\})?)?", re.ASCII)


def tidy(text):
    """(name, text): the `x` of `x = 5`, and the rest without what cannot change its meaning, such as `$`."""
    for pattern, plain in TIDY:
        text = pattern.sub(plain, text)
    name, text = NAME.fullmatch(text).groups("")
    return name, re.sub(r"^\(([^(),]*)\)$", r"\1", text)


def number(text):
    """(value, unit) of `1,234`, `.5`, `1e3`, `\\frac{1}{2}`, `2\\frac{1}{2}`, `50%`, `5cm`; None of all else.
    A fraction must be in lowest terms: `84/2` is a division that nobody did."""
    match = NUMBER.fullmatch(text)
    if not match:
        return None
    minus, whole, top, bottom, decimal, unit, power = match.groups("")
    value = Fraction(int(top), int(bottom)) if bottom else Fraction(decimal.replace(",", ""))
    if bottom and str(value.denominator) != bottom or whole and not 0 < value < 1:
        return None
    return (value + int(whole or 0)) * (-1 if minus else 1), unit + power


def split(text, separator):
    """The parts of a text between separators outside all brackets; [] if a bracket closes too many."""
    parts, depth = [""], 0
    for char in text:
        depth += (char in "([{") - (char in ")]}")
        if depth < 0:
            return []
        if char == separator and depth == 0:
            parts.append("")
        else:
            parts[-1] += char
    return [part.strip() for part in parts]


def spelled(text, depth=0, ordered=True):
    """One spelling for all tidy texts that equal this one: numbers by value; sets and unions sorted; lists,
    points and intervals in order, with their brackets. What more than 5 brackets enclose stays as it is."""
    if depth > 5:
        return text
    for separator in ",∪":
        parts = split(text, separator)
        if len(parts) > 1:
            parts = [spelled(part, depth + 1) for part in parts]
            return separator.join(parts if ordered and separator == "," else sorted(parts))
    bracket = re.fullmatch(r"(\\\{|[(\[])(.*)(\\\}|[)\]])", text)
    if bracket and split(bracket[2], ","):
        return bracket[1] + spelled(bracket[2], depth + 1, bracket[1] != r"\{") + bracket[3]
    if value := number(text):
        return "{}{}".format(*value)
    return text.lower() if re.fullmatch("[A-Z][a-z]{2,}", text) else re.sub(" ?, ?", ",", text)


def answers_equal(given, truth):
    """Whether two final answers mean the same. Where the truth is a number, only a number can be equal to it.
    A name or a unit may be left out, but not be another one. None (no answer found) equals nothing, an answer
    above 1,000 characters only itself."""
    if given is None or max(len(given), len(truth)) > 1_000:
        return given == truth
    (name, given), (true_name, truth) = tidy(given), tidy(truth)
    if not truth or name and true_name and name != true_name:
        return False
    if not number(truth):
        return spelled(given) == spelled(truth)
    (a, unit), (b, true_unit) = number(given) or (None, ""), number(truth)
    if a is not None and unit + true_unit == "%":  # 50% is 0.5, and 50 too where the question names
        percent, plain = (a, b) if unit else (b, a)  # the sign; but 0.5% is not 0.5
        return percent / 100 == plain or percent == plain and abs(plain) > 1
    return a == b and (unit == true_unit or not unit or not true_unit)
