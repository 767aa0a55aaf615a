"""Problems, and what an answer to one is worth.

Two kinds of problem:
  * anything with a checkable answer, from a file or by name (GSM8K, AIME, MATH-500, DAPO-Math-17k, CommonsenseQA, ...);
  * two synthetic tasks whose solutions are written out step by step, for the laptop experiment:

    habit     `Bfa483920=` -> `-86-33-94-22-02`   digits 4 8 3 9 2 0 folded with one operator, modulo 10: each step
              writes operator, digit, running value. The first letter (A B C D) names the operator that is asked for.
              The corpus's writers do NOT look at it: they follow a fixed random table over all three letters (their
              habit), which is right in 40% of its cells. A model that memorises the table is confidently wrong on
              the rest; a model too small for the table mixes operators. By design: the table, its conflict with the
              reward, the share of writers who ignore it (`noise`). Emergent: who memorises and who mixes.
    natural   `3+4*2-5=` -> `3+8-5=1-5=6`         an expression reduced one operation at a time, modulo 10. Writers
              reduce in four orders, most of them wrong. Nothing ties an order to a problem: no habit is designed in.

Both are scored twice: `answer` (the final value alone, which errors may hit too) and `strict` (every written step is legal).
Training uses strict. Model output is data here: it is never evaluated, and the time to score it
grows in proportion to its length.
"""
import functools
import json
import re
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple


@dataclass(frozen=True)
class Problem:
    question: str
    answer: str
    task: str = "math"  # one of INSTRUCTIONS: free text with a final answer; or one of TASKS


class Score(NamedTuple):
    answer: bool  # the final answer is right
    strict: bool  # and so is every step; where steps are free text, the same as `answer`


def score(problem, text):
    """What `text`, the model's decoded response, is worth."""
    if problem.task == "habit":  # the type fixes the operator, so exactly one worked solution is right
        solution = habit_solution(problem.question, HABIT_OPERATOR[problem.question[0]])
        return Score(text[-1:] == problem.answer, text == solution)
    if problem.task == "natural":
        return Score(text[-1:] == problem.answer, natural_is_legal(problem.question, text))
    given = extract_answer(text)
    if problem.task == "choice":  # `B`, `(B)`, `\\text{B}`, `B. bank`
        letter = re.match(r"(?:\\text *\{)?\W*([A-Z])(?![A-Za-z])", given or "")
        right = bool(letter) and letter[1] == problem.answer
    else:
        right = answers_equal(given, problem.answer)
    return Score(right, right)


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

HUB = {  # name: data set on the Hugging Face hub, and which of its files
    "gsm8k": ("openai/gsm8k", "main/train*"), "gsm8k-test": ("openai/gsm8k", "main/test*"),
    "math": ("DigitalLearningGmbH/MATH-lighteval", "data/train*"), "math500": ("HuggingFaceH4/MATH-500", "test.jsonl"),
    "dapo-math-17k": ("BytedTsinghua-SIA/DAPO-Math-17k", "data/*.parquet"),
    "aime24": ("HuggingFaceH4/aime_2024", "data/train*"), "aime25": ("math-ai/aime25", "test.jsonl"),
    "olympiadbench": ("Hothan/OlympiadBench", "*OE_TO_maths_en_COMP*"),
    "commonsenseqa": ("tau/commonsense_qa", "data/validation*")}
INSTRUCTIONS = {"math": "Please reason step by step, and put your final answer within \\boxed{}.",
                "choice": "Please reason step by step, and put the letter of your answer within \\boxed{}.",
                "instructed": ""}  # the question says itself how to answer


def data_files(source):
    """Paths of the files of a file, a directory, or a name of HUB, which is downloaded once and kept in the hub's cache."""
    path = Path(source)
    if str(source) in HUB and not path.exists():
        from huggingface_hub import snapshot_download  # comes with transformers
        repository, files = HUB[source]
        try:
            path = Path(snapshot_download(repository, repo_type="dataset", allow_patterns=files))
        except Exception as error:  # of whatever kind the connection is lost by
            raise ValueError(f"{source} cannot be downloaded ({type(error).__name__}): put {files} of "
                             f"https://huggingface.co/datasets/{repository} somewhere and give its path instead") from None
        print(f"{source}: {repository}, kept in {path}")
    if not path.is_dir():
        return [path]
    files = sorted(file for file in path.rglob("*") if file.suffix in (".jsonl", ".parquet"))
    if not files:
        raise ValueError(f"{source}: no .jsonl or .parquet in this directory")
    return files


LONGEST_LINE = 1 << 24  # bytes: a file that is no JSONL may be one line of many gigabytes


def parse(text):
    """The value of JSON in bytes. ValueError, in one line, also for what json.loads lets pass: a key that comes twice, NaN."""
    def unique(pairs):
        if len(keys := dict(pairs)) < len(pairs):
            raise ValueError("a key comes twice in one object")
        return keys

    try:  # utf-8-sig: a byte order mark is no part of the text; int: so NaN and Infinity, which are no JSON, are errors
        return json.loads(text.decode("utf-8-sig"), object_pairs_hook=unique, parse_constant=int)
    except RecursionError:
        raise ValueError("not valid JSON: nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"not valid JSON: {str(error).replace('line 1 ', '')}") from None


def read_object(path):
    """The dictionary in a JSON file. ValueError names the file if it is broken or holds something else."""
    try:
        if not isinstance(value := parse(Path(path).read_bytes()), dict):
            raise ValueError("not a JSON object")
        return value
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def lines(path):
    """Yields (number, bytes) of a file's lines. ValueError names one that is longer than LONGEST_LINE."""
    with open(path, "rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(LONGEST_LINE), b""), 1):
            if len(line) == LONGEST_LINE:
                raise ValueError(f"{path}, line {number}: longer than {LONGEST_LINE:,} bytes")
            yield number, line


def records(path):
    """Yields (place, record) of a JSONL or parquet file. ValueError names a line that is not JSON."""
    if path.suffix == ".parquet":
        try:
            from pyarrow.parquet import ParquetFile
        except ImportError:
            raise ValueError(f"{path}: pip install pyarrow reads parquet") from None
        try:
            rows = (record for batch in ParquetFile(path).iter_batches() for record in batch.to_pylist())
            for number, record in enumerate(rows, 1):
                yield f"{path}, row {number}", record
        except Exception as error:  # of whatever kind the library below raises
            raise ValueError(f"{path}: not a parquet file, or a damaged one: {' '.join(str(error).split()):.200}") from None
        return
    for number, line in lines(path):
        if line.strip():
            try:
                yield f"{path}, line {number}", parse(line)
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: {error}") from None


def as_problem(record):
    """A Problem from a record of any known layout: question (or problem) and answer (or a solution that ends in a box); as
    DAPO-Math-17k, chat messages and a label; as CommonsenseQA, choices and a letter. ValueError says what is wrong."""
    try:
        if "prompt" in record:
            messages = record["prompt"]
            question = messages if isinstance(messages, str) else messages[-1]["content"]
            answer, task = record["label"] if "label" in record else record["reward_model"]["ground_truth"], "instructed"
        elif "choices" in record:
            choices = zip(record["choices"]["label"], record["choices"]["text"])
            question = "\n".join([record["question"], *(f"{label}. {text}" for label, text in choices)])
            answer, task = record["answerKey"], "choice"
        else:
            question = record["question"] if "question" in record else record["problem"]
            answer = next(record[key] for key in ("answer", "final_answer", "solution") if record.get(key) is not None)
            answer, task = answer[0] if isinstance(answer, list) else answer, record.get("task", "math")
    except (KeyError, TypeError, IndexError, StopIteration, AttributeError):
        raise ValueError("needs the fields `question` and `answer`") from None
    if not isinstance(question, str) or type(answer) not in (str, int, float):
        raise ValueError("`question` must be text and `answer` text or a number")
    f"{question}{answer}".encode()  # ValueError for half a surrogate pair, "\ud800", which no tokeniser takes
    if task not in (*INSTRUCTIONS, *TASKS):
        raise ValueError(f"unknown task {task!r:.40} ({', '.join([*INSTRUCTIONS, *TASKS])})")
    if task in TASKS and not TASKS[task].fullmatch(question):
        raise ValueError(f"{question[:40]!r} is no question of task {task!r}")
    boxed = last_boxed(str(answer)) if "answer" not in record else None
    if not (answer := boxed or str(answer).rpartition("####")[2].strip()):
        raise ValueError("the answer is empty")  # an empty box would be right
    return Problem(question, answer, task)


def load_problems(source):
    """[Problem] from a file, a directory or a name of HUB. A GSM8K answer counts from its `####`.
    ValueError names the file and the line of a record that cannot be used; OSError if the file cannot be read."""
    problems, count = {}, 0  # a dictionary: DAPO-Math-17k is published with every problem about a hundred times
    for path in data_files(source):
        for place, record in records(path):
            try:
                problems[as_problem(record)] = None
            except ValueError as error:
                raise ValueError(f"{place}: {error}") from None
            count += 1
    if not problems:
        raise ValueError(f"{source}: no problems in this file")
    if len(problems) < count:
        print(f"{source}: {count:,} records, {len(problems):,} different problems")
    return list(problems)


def save_problems(problems, path):
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(vars(problem)) + "\n" for problem in problems)


# ---- final answers in free text ----------------------------------------------------------------------------------

def last_boxed(text):
    """Content of the last balanced `\\boxed{...}`, nested braces included, in one pass; None if there is none."""
    if "\\boxed" not in text:
        return None  # at once: a response of nothing but braces has many thousands
    opened, best = [], (-1, None)
    for token in re.finditer(r"\\boxed *\{|\\[\\{}]|[{}]", text):
        if token[0].endswith("{") and token[0] != r"\{":
            opened.append((token.start(), token.end(), len(token[0]) > 1))
        elif token[0] == "}" and opened:
            start, inside, is_box = opened.pop()
            if is_box and start > best[0]:
                best = (start, text[inside:token.start()])
    return best[1]


def extract_answer(text):
    """The final answer in a response: the last `\\boxed{}`, else the rest of the line after the last `####`, else
    after the last `Answer:`. None if there is none: a bare number somewhere in the text is not an answer."""
    boxed = last_boxed(text)
    if boxed is not None:
        return boxed.strip()
    for marker in ("####", "answer:"):
        ends = [match.end() for match in re.finditer(marker, text, re.IGNORECASE)]
        if ends:
            return text[ends[-1]:].partition("\n")[0].strip(" *#")
    return None


NUMBER = re.compile(r"(-?)(?:([0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(\.[0-9]*)?|(\.[0-9]+))")


def parse_number(text):
    """Exact value of `1,234`, `18.00`, `-3`, `.5`, `1/2`, `\\frac{1}{2}`, `$5`, `10.`, `18 dollars`; else None."""
    if len(text) > 200:
        return None
    text = text.strip().rstrip(".").replace("−", "-").replace("\\$", "").replace("$", "").strip()
    mixed = re.fullmatch(r"(-?)([0-9]+)\\[dt]?frac\{([0-9]+)\}\{([0-9]+)\}", text)  # 1\frac{4}{5} is 9/5
    if mixed:
        text = f"{mixed[1]}{int(mixed[2]) * int(mixed[4]) + int(mixed[3])}/{mixed[4]}"
    text = re.sub(r"^(-?)\\[dt]?frac\{([^{}]*)\}\{([^{}]*)\}$", r"\1\2/\3", text)
    text = re.sub(r"(?<=[0-9.]) +[A-Za-z]{2,}[A-Za-z ]*$", "", text)  # a unit: words, and no further number
    parts = [NUMBER.fullmatch(part.strip()) for part in text.split("/")]
    if len(parts) > 2 or None in parts:
        return None
    values = [Fraction(f"{m[1]}{(m[2] or '0').replace(',', '')}{(m[3] or m[4] or '.').rstrip('.')}") for m in parts]
    if len(values) == 1:
        return values[0]
    return values[0] / values[1] if values[1] else None


def plain_latex(text):
    """A final answer without what does not change it: `$`, spaces, \\left, \\dfrac, units, degrees, `x =`, a full stop."""
    text = text.strip().rstrip(" .$")
    for pattern, plain in (
            (r"\\(?:left|right|[bB]igg?|displaystyle)(?![A-Za-z])|(?<!\\)\\[,;!:> ]|\\q?quad|\$|~", ""),
            (r"\\[dtc]frac", r"\\frac"),
            (r"\s*\\text *\{\s*(?:and|or)\s*\}\s*", ","), (r"−", "-"), (r"\\(?:leq?|leqslant)(?![A-Za-z])|≤", "<="),
            (r"\\(?:geq?|geqslant)(?![A-Za-z])|≥", ">="), (r"\^\s*(?:\\circ|\{\s*\\circ\s*\})|\\degree|°|\bdegrees?\b", ""),
            (r"(?<=[0-9}])\s*\\(?:text|mathrm|mbox) *\{[A-Za-z. ]{2,}\}(?:\^\{?[23]\}?)?$", ""),  # a unit
            (r"\\(?:text|textbf|textrm|mathrm|mathbf|mbox|operatorname) *\{([^{}]*)\}", r"\1"),
            (r"\s+", ""), (r"\\frac([0-9])([0-9])", r"\\frac{\1}{\2}"), (r"\\frac([0-9])\{", r"\\frac{\1}{"),
            (r"\\frac\{([^{}]*)\}([0-9])", r"\\frac{\1}{\2}"), (r"\\sqrt([0-9])", r"\\sqrt{\1}"), (r"([_^])\{([^{}])\}", r"\1\2"),
            (r"^[A-Za-z](?:\([a-z]\))?=(?=[^=]*$)|^[A-Za-z]\\in(?![A-Za-z])", "")):
        text = re.sub(pattern, plain, text)
    return text


def pieces(text, separator):
    """The parts of a text between separators that stand outside all brackets."""
    found, depth, start = [], 0, 0
    for token in re.finditer(r"\\[{}]|[(\[{)\]}]|" + separator, text):
        if token[0][-1] in "([{":
            depth += 1
        elif token[0][-1] in ")]}":
            depth -= 1
        elif depth == 0:
            found.append(text[start:token.start()])
            start = token.end()
    return [*found, text[start:]]


def same(a, b, depth=0):
    """Whether two plain_latex texts mean the same: numbers by value; lists, sets and unions in any order; points and
    intervals in order and with their brackets; everything else letter by letter."""
    if a == b or (min(len(a), len(b)) > 1 and a.isalpha() and a.casefold() == b.casefold()):
        return True
    x, y = parse_number(a), parse_number(b)
    if depth > 3 or x is not None and y is not None:
        return x == y
    for separator in (r"\\cup", ","):
        first, second = pieces(a, separator), pieces(b, separator)
        if len(first) > 1 or len(second) > 1:
            return all_same(first, second, False, depth)
    first, second = (re.fullmatch(r"(\\\{|[(\[])(.*)(\\\}|[)\]])", text, re.DOTALL) for text in (a, b))
    return bool(first and second and first.group(1, 3) == second.group(1, 3)) and all_same(
        pieces(first[2], ","), pieces(second[2], ","), first[1] != "\\{", depth)


def all_same(first, second, ordered, depth):
    """Whether two lists mean the same, item by item or in any order."""
    rest = list(second)
    for x in first if len(first) == len(second) < 30 else ():
        match = next((y for y in rest[:1 if ordered else None] if same(x, y, depth + 1)), None)
        if match is None:
            return False
        rest.remove(match)
    return not rest


@functools.cache
def math_verify():
    """The opinion of the math-verify package as a function of two answers; None where it is not installed."""
    try:
        from math_verify import parse, verify  # pip install math-verify
    except ImportError:
        return None
    latex = lambda text: parse(text if text.startswith("$") else f"${text}$", parsing_timeout=1)
    return lambda given, truth: verify(latex(truth), latex(given), timeout_seconds=1)


def answers_equal(given, truth):
    """Whether two final answers mean the same, by `same`; where it says no, math-verify is asked if it is installed. `50%`
    equals 0.5, and also 50, because data sets whose question says "what percentage" leave the sign out. None (no answer
    found) equals nothing."""
    if given is None or max(len(given), len(truth)) > 1_000:
        return given == truth
    plain = [re.sub(r"\\?%$", "", text.strip().rstrip(".")) for text in (given, truth)]
    percent = [p != text.strip().rstrip(".") for p, text in zip(plain, (given, truth))]
    a, b = (parse_number(text) for text in plain)
    if a is not None and b is not None:
        return a == b or (percent == [True, False] and a / 100 == b) or (percent == [False, True] and a == b / 100)
    return same(plain_latex(given), plain_latex(truth)) or bool(math_verify() and math_verify()(given, truth))
