"""Problems, and what a response to one is worth.

Two kinds of problem:
  * anything with a checkable answer, from a JSONL file (recipes/data.py makes it of the published data sets);
  * two synthetic tasks whose solutions are written out step by step, for the laptop experiment:

    habit     `Bfa483920=` -> `-86-33-94-22-02`   digits 4 8 3 9 2 0 folded with one operator, modulo 10: each step
              writes operator, digit, running value. The first letter (A B C D) names the operator that is asked for.
              The corpus's writers do NOT look at it: they follow a fixed random table over all three letters (their
              habit), which is right in 40% of its cells. A model that memorises the table is confidently wrong on
              the rest; a model too small for the table mixes operators. By design: the table, its conflict with the
              reward, the share of writers who ignore it (`noise`). Emergent: who memorises and who mixes.
    natural   `3+4*2-5=` -> `3+8-5=1-5=6`         an expression reduced one operation at a time, modulo 10. Writers
              reduce in four orders, most of them wrong. Nothing ties an order to a problem: no habit is designed in.

Model output is data here: it is never evaluated, and the time to score it grows in proportion to its length.
"""
import json
import re
from dataclasses import dataclass
from fractions import Fraction
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
        """Whether it is text for a chat model, not one of the synthetic tasks, whose questions are whole prompts."""
        return self.task not in TASKS

    @property
    def prompt(self):
        """What the model is given to read."""
        return f"{self.question}\n{INSTRUCTIONS[self.task]}".rstrip("\n") + "\n" if self.in_words else self.question


class Score(NamedTuple):
    reward: float  # what training maximises
    strict: bool   # the answer is right, and so is every step; where steps are free text, the same as `answer`
    answer: bool   # the final answer is right, which errors in the steps may hit too


def score(problem, text):
    """What `text`, a model's decoded response to a problem, is worth."""
    if problem.task == "habit":  # the type fixes the operator, so exactly one worked solution is right
        answer = text[-1:] == problem.answer
        strict = text == habit_solution(problem.question, HABIT_OPERATOR[problem.question[0]])
    elif problem.task == "natural":
        answer = text[-1:] == problem.answer
        strict = answer and natural_is_legal(problem.question, text)
    elif problem.task == "choice":  # `B`, `(B)`, `\\text{B}`, `B. bank`
        letter = re.match(r"(?:\\text *\{)?\W*([A-Z])(?![A-Za-z])", extract_answer(text) or "")
        answer = strict = bool(letter) and letter[1] == problem.answer
    else:
        answer = strict = answers_equal(extract_answer(text), problem.answer)
    return Score(reward=float(strict), strict=strict, answer=answer)  # your own reward: change `reward=` here


# ---- task "habit" ----------------------------------------------------------------------------------------------

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


# ---- task "natural" --------------------------------------------------------------------------------------------

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
    """Every expression in `text` follows from the one before by one legal reduction, down to a single digit."""
    expression, *rest = [question.removesuffix("="), *text.split("=")]
    for following in rest:
        if following not in {reduce_at(expression, i) for i in legal_reductions(expression)}:
            return False
        expression = following
    return len(expression) == 1


TASKS = {"habit": re.compile("[A-D][a-l]{2}[0-9]{6}="), "natural": re.compile("[0-9]([-+*][0-9])+=")}  # their questions


# ---- problems from files ---------------------------------------------------------------------------------------

def load_problems(path):
    """[Problem], each once, from JSONL with `question`, `answer` and, optionally, `task`.
    ValueError names the file and the line of a record that cannot be used; OSError if the file cannot be read."""
    problems = {}  # a dictionary: DAPO-Math-17k is published with every problem about a hundred times
    with open(path, encoding="utf-8-sig") as file:
        try:
            number = 0
            for number, line in enumerate(file, 1):
                if line.strip():
                    problems[as_problem(json.loads(line))] = None
        except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
            raise ValueError(f"{path}, line {number + isinstance(error, UnicodeDecodeError)}: {str(error)[:200]}") from error
    if not problems:
        raise ValueError(f"{path}: no problems in this file")
    return list(problems)


def as_problem(record):
    """ValueError says what is wrong with it."""
    if not isinstance(record, dict) or not {"question", "answer"} <= record.keys():
        found = ", ".join(record) if isinstance(record, dict) else type(record).__name__
        raise ValueError(f"needs `question` and `answer`, found {found}: recipes/data.py reads the published layouts")
    question, answer, task = record["question"], record["answer"], record.get("task", "math")
    if type(question) is not str or type(answer) not in (str, int, float):
        raise ValueError("`question` must be text and `answer` text or a number")
    if task not in INSTRUCTIONS or task in TASKS and not TASKS[task].fullmatch(question):
        raise ValueError(f"{question[:40]!r} is no question of a task {task!r} ({', '.join(INSTRUCTIONS)})")
    answer = str(answer).rpartition("####")[2].strip()  # GSM8K's answers end so
    if not answer:
        raise ValueError("the answer is empty")
    return Problem(question, answer, task)


def save_problems(problems, path):
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(vars(problem)) + "\n" for problem in problems)


# ---- final answers in free text --------------------------------------------------------------------------------
#
# A model is trained against these rules, so they are strict: what they accept wrongly, it will find. Nothing is
# computed. Texts are equal if they are the same letters after `tidy`, apart from: numbers, equal by value; sets,
# equal in any order; and what may be left out but not be wrong, a name in front (`x =`) and one unit behind.

def last_boxed(text):
    """Content of the last balanced `\\boxed{...}` that is not blank, or of `\\boxed 4`; None if there is no box."""
    if "\\boxed" not in text:
        return None  # at once: a response of nothing but braces has many thousands
    opened, start, content = [], -1, None
    for token in re.finditer(r"\\boxed *\{|\\boxed +([^\s{}$\\]+)|\\[\\{}]|[{}]", text):
        if token[1]:
            start, content = token.span()[0], token[1]
        elif token[0].endswith("{") and token[0] != r"\{":
            opened.append(token)
        elif token[0] == "}" and opened:
            box = opened.pop()
            inside = text[box.end():token.start()]
            if len(box[0]) > 1 and box.start() > start and (content is None or inside.strip()):
                start, content = box.start(), inside
    return content


def extract_answer(text):
    """The final answer in a response: the last `\\boxed{}`, else the line that starts behind the last `####`, else
    behind the last `Answer:`. None if there is none: a bare number somewhere in the text is not an answer."""
    boxed = last_boxed(text)
    if boxed is not None:
        return boxed.strip()
    for marker in ("####", "answer:"):
        ends = [match.end() for match in re.finditer(marker, text, re.IGNORECASE)]
        if ends:
            start = re.compile(r"(?:[\s*]|\\\[)*").match(text, ends[-1]).end()  # the value may be on the next line
            return text[start:].partition("\n")[0].strip(" *#")
    return None


COMMANDS = {"pi": "π", "infty": "∞", "cup": "∪", "in": "∈", "pm": "±", "degree": "°", "le": "≤", "leq": "≤",
            "leqslant": "≤", "ge": "≥", "geq": "≥", "geqslant": "≥", "dfrac": r"\frac", "tfrac": r"\frac",
            **dict.fromkeys("left right big Big bigg Bigg displaystyle quad qquad".split(), " ")}
TIDY = [(re.compile(pattern), plain) for pattern, plain in (
    (r"\s+", " "), ("−", "-"),
    (r"(?<=[0-9])(?:\{,\}|,\\! ?|\\,)(?=[0-9]{3}(?![0-9]))", ""),                # 10{,}000
    (r"\\(?:text(?:bf|it|rm)?|math(?:bf|it|rm)|mbox|operatorname) ?\{([^{}]*)\}", r" \1 "),
    (r"\^ ?(?:\\circ|\{ ?\\circ ?\})|\bdegrees?\b", "°"),
    (r"\\([A-Za-z]+)", lambda command: COMMANDS.get(command[1], command[0])),
    (r"(?<!\\)(?:\\[,;:!()\[\] ]|\$)|~", " "),
    (r"[ ,]*\band\b", ", "),
    (r"(?<![0-9,]) +| +(?![0-9, ])", ""),   # a space stays where it separates: `4 2` is not 42, `10, 100` not 10100
    (r"[. ]+$", ""),
    (r"(?<![^,(\[=∪])\+", ""),                                                   # +5
    (r"(\\frac|\\sqrt|[_^])([0-9A-Za-zπ])", r"\1{\2}"), (r"(\\frac\{[^{}]*\}) ?([0-9A-Za-zπ])", r"\1{\2}"),
    (r"(^|[,(\[{=∪] ?)(-?)(?:([0-9]+) )?((?:[0-9A-Za-zπ^.]|\\sqrt|\{[^{}]*\})+)/([0-9]+|[A-Za-zπ])(?= ?(?:$|[,)\]}∪]|\\}))",
     r"\1\2\3\\frac{\4}{\5}"))]                                                  # π/2, 2 1/2
NAME = re.compile(r"([A-Za-z](?:_\{\\?\w+\})?(?:\([A-Za-z]\))?|\([A-Za-z](?:, ?[A-Za-z])+\))[=∈](.*)")
NUMBER = re.compile(r"""(?P<minus>-?) (?P<money>\\\$|[€£])?
    (?: (?P<whole>[0-9]*) [ ]? \\frac \{ (?P<top>-?[0-9]+) \} \{ (?P<bottom>[0-9]+) \}
      | (?P<decimal> (?: [0-9]{1,3} (?:,[0-9]{3})+ | [0-9]+ ) (?:\.[0-9]*)? | \.[0-9]+ ) (?P<power>[eE][+-]?[0-9]{1,2})? )
    (?: \\? (?P<percent>%|percent) | (?P<unit>(?:square|cubic)? (?:cent|dollar|°|cm|inch|foot|feet|yard|mile|meter|kg|gram
      |pound|liter|second|minute|hour|day|week|month|year|unit)) (?:e?s)? (?P<square>\^\{[23]\}|[²³])? )?""", re.VERBOSE)


def tidy(text):
    """(name, text) of a final answer without what cannot change its meaning: `$`, spaces, \\left, \\text, a full stop,
    brackets around a single value. The name is `x` of `x = 5`."""
    for pattern, plain in TIDY:
        text = pattern.sub(plain, text)
    name, text = match.groups() if (match := NAME.fullmatch(text)) else ("", text)
    return name, re.sub(r"^\(([^(),]*)\)$", r"\1", text)


def number(text):
    """(exact value, unit) of `1,234`, `18.00`, `-3`, `.5`, `1e3`, `\\frac{1}{2}`, `2\\frac{1}{2}`, `\\$5`, `50\\%`, `5 cm`;
    None of all else, and of `84/2`, a division that nobody did."""
    match = NUMBER.fullmatch(text)
    if not match or (match["money"] and (match["unit"] or match["percent"])):
        return None
    if match["bottom"]:
        whole, top, bottom = int(match["whole"] or 0), int(match["top"]), int(match["bottom"])
        if not math.gcd(top, bottom) == 1 <= bottom or match["whole"] and not 0 < top < bottom:
            return None
        value = whole + Fraction(top, bottom)
    else:
        value = Fraction(match["decimal"].replace(",", "").rstrip(".") + (match["power"] or ""))
    unit = {"\\$": "dollar"}.get(match["money"], match["money"]) or (match["percent"] and "%") or match["unit"] or ""
    return (-value if match["minus"] else value), unit + (match["square"] or "")


def same_number(first, second):
    """A unit may be left out, but not be another one. `50%` is 0.5, and 50 too, since data sets whose question says
    "what percentage" leave the sign out; 0.5% is not 0.5."""
    (a, unit), (b, other) = sorted((first, second), key=lambda value: value[1] != "%")
    if unit == "%" != other:
        return not other and (a / 100 == b or a == b and abs(a) > 1)
    return a == b and (unit == other or not unit or not other)


def split(text, separator):
    """The parts of a text between separators outside all brackets; [] if a bracket closes that never opened."""
    parts, start, depth = [], 0, 0
    for token in re.finditer(rf"\\?[(\[{{)\]}}]|{separator}", text):
        depth += (token[0][-1] in "([{") - (token[0][-1] in ")]}")
        if depth < 0:
            return []
        if depth == 0 and token[0] == separator:
            parts.append(text[start:token.start()].strip())
            start = token.end()
    return [*parts, text[start:].strip()]


def spelled(text, depth=0, ordered=True):
    """One spelling of a tidy text for all that are equal: sets and unions are sorted, numbers written by value.
    Lists, points and intervals keep their order and brackets. What is nested deeper than 5 stays as it is."""
    for separator in ",∪" if depth <= 5 else "":
        parts = split(text, separator)
        if len(parts) > 1:
            parts = [spelled(part, depth + 1) for part in parts]
            return separator.join(parts if ordered and separator == "," else sorted(parts))
    bracket = re.fullmatch(r"(\\\{|[(\[])(.*)(\\\}|[)\]])", text)
    if depth <= 5 and bracket and split(bracket[2], ","):
        return bracket[1] + spelled(bracket[2], depth + 1, ordered=bracket[1] != r"\{") + bracket[3]
    if value := number(text):
        return "{}{}".format(*value)
    return text.lower() if re.fullmatch("[A-Z][a-z]{2,}", text) else re.sub(" ?, ?", ",", text)  # Even is even


def answers_equal(given, truth):
    """Whether two final answers mean the same. If the truth is a number, nothing but a number can be equal to it.
    None (no answer found) equals nothing; an answer above 1,000 characters equals only itself."""
    if given is None or max(len(given), len(truth)) > 1_000:
        return given == truth
    (name, given), (true_name, truth) = tidy(given), tidy(truth)
    if not truth or (name and true_name and name != true_name):
        return False
    value, true_value = number(given), number(truth)
    if true_value:
        return value is not None and same_number(value, true_value)
    return spelled(given) == spelled(truth)
