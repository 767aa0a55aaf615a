"""Whether a response's final answer, written as free text or LaTeX, is the one that is wanted.

Training finds whatever is accepted wrongly. So equality is strict, and nothing is computed: after `tidy`,
numbers are compared by value, sets in any order, and all else letter by letter.
"""
import re
from fractions import Fraction


def after_thought(text):
    """What a response says after its last `</think>`, or "" if it ends within a thought.
    The opening tag may be missing, because some chat templates put it into the prompt. If such a thought is
    cut off, it has no tag and reads like an answer: whoever decodes it must put the `<think>` in front."""
    said = re.split("</think(?:ing)?>", text)[-1]
    return "" if re.search("<think(?:ing)?>", said) else said


def last_boxed(text):
    """Content of the last balanced `\\boxed{...}` that is not blank or dots, else of a blank one, else None.
    Without braces only a number or a capital letter counts: a response may mention `\\boxed` in passing."""
    text = re.sub(r"\\boxed +([^\s{}$\\]*[0-9][^\s{}$\\]*|[A-HJ-Z]\b)", r"\\boxed{\1}", text)  # `\boxed 4`
    closed, content = [], None
    tokens = list(re.finditer(r"\\boxed *\{|\\[\\{}]|[{}]", text)) if "\\boxed" in text else []
    for token in reversed(tokens):
        if token[0] == "}":
            closed.append(token.start())
        elif token[0][-1] == "{" and token[0] != r"\{" and closed:
            end = closed.pop()
            if len(token[0]) > 1 and (content := text[token.end():end]).strip(" .…\n\r\t"):
                break
    return content


def extract_answer(text):
    """The final answer in a response: the last `\\boxed{}`, else what follows the last `####`, else the last
    `Answer:`, up to the line's end. None if there is none: a bare number in the text is not an answer.

    A thought does not count. The last answer counts, because a response may correct itself, and no other one,
    because several guesses must not earn what one right answer earns. So a response that runs on and invents
    another question is judged by its answer to that: the sampler decides where a response ends."""
    text = after_thought(text)
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
            **dict.fromkeys("left right displaystyle quad qquad".split(), " "),
            **{size + side: " " for size in ("big", "Big", "bigg", "Bigg") for side in ("", "l", "m", "r")}}
START = r"(^|[,(\[{=∪&] ?|\\\\ ?|matrix\} ?)"  # where a value or a matrix's entry begins
TERM = r"((?:[0-9A-Za-zπ^]|\\sqrt|\{[^{}]*\})+)"
TIDY = [(re.compile(pattern), plain) for pattern, plain in (
    (r"\s+", " "), ("−", "-"),
    (r"(?<=[0-9])(?:\{,\}|,\\! ?|\\,)(?=[0-9]{3}(?![0-9]))", ""),  # 10{,}000
    (r"\\(?:text(?:bf|it|rm)?|math(?:bf|it|rm)|mbox|operatorname) ?\{([^{}]*)\}", r" \1 "),
    (r"\^ ?(?:\\circ|\{ ?\\circ ?\})|\\?degrees?\b", "°"), (r"\\%| percent\b", "%"),
    (r"\\\$ ?([0-9.,]*[0-9])", r" \1 dollar"),
    (r"\\([A-Za-z]+)", lambda command: COMMANDS.get(command[1], command[0])),
    (r"(?<!\\)(?:\\[,;:!()\[\] ]|\$)|~", " "), (r" +", " "), (r" ?,? ?\band\b ?", ", "),
    (r"(?<=[0-9π°%})]),? or (?=[-+.(\\{0-9π])", ", "),  # but not between words, where `or` is not `and`
    (r"(?<![0-9,]) | (?![0-9,])", ""),  # but not in `4 2`, which is not 42, nor in `10, 100`
    (r"[. ]+$", ""), (r"(?<![^,(\[=∪])\+", ""),  # +5
    (r"(\\frac|\\sqrt|[_^])([0-9A-Za-zπ])", r"\1{\2}"), (r"(\\frac\{[^{}]*\}) ?([0-9A-Za-zπ])", r"\1{\2}"),
    (START + r"(-?)(?:([0-9]+) )?" + TERM + r"/([0-9]+|[A-Za-zπ])(?= ?(?:$|[,)\]}∪&]|\\(?:[}\\]|end)))",
     r"\1\2\3\\frac{\4}{\5}"),  # π/2, 2 1/2
    (START + r"\\frac\{-" + TERM + r"\}", r"\1-\\frac{\2}"))]
NAME = re.compile(r"(?:([A-Za-z](?:_\{\\?\w+\})?(?:\([A-Za-z]\))?|\([A-Za-z](?:, ?[A-Za-z])+\))[=∈])?(.*)")
NUMBER = re.compile(r"(-?)(?:(\d*)\\frac\{(-?\d+)\}\{([1-9]\d*)\}|"
                    r"((?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d\d?)?))"
                    r"(?:(%|°|cent|dollar|cm|inch|foot|feet|yard|mile|meter|kg|gram|pound|liter|second|"
                    r"minute|hour|day|week|month|year|unit)(?:e?s)?((?<=[a-z])\^\{[23]\})?)?", re.ASCII)


def tidy(text):
    """(name, text): the `x` of `x = 5`, and the rest without what cannot change its meaning, such as `$`."""
    grouped = text.strip(" $\n")
    if grouped[:1] + grouped[-1:] == "{}" and split(grouped[1:-1], ","):  # `\boxed{{34}}`
        text = grouped[1:-1]
    for pattern, plain in TIDY:
        text = pattern.sub(plain, text)
    name, text = NAME.fullmatch(text).groups("")
    if name:  # x=1, x=-2
        text = re.sub(f"(?:,|,?or){re.escape(name)}=", ", ", text)
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


def unbraced(text):
    """`1, -2` of the set `\\{1, -2\\}`, and every other text as it is."""
    inside = text[2:-2]
    return inside if text == rf"\{{{inside}\}}" and len(split(inside, ",")) > 1 else text


def answers_equal(given, truth):
    """Whether two final answers mean the same. Where the truth is a number, only a number can be equal to it.
    A name or a unit may be left out, but not be another one. None (no answer found) equals nothing, an answer
    above 1,000 characters only itself.

    The solutions `1, -2` may also be written `x=1, x=-2`, `1 or -2` or `\\{1, -2\\}`, but in this order,
    because it may matter in a list. Only two sets may differ in it."""
    if given is None or max(len(given), len(truth)) > 1_000:
        return given == truth
    (name, given), (true_name, truth) = tidy(given), tidy(truth)
    if not truth or name and true_name and name != true_name:
        return False
    if not number(truth):
        return any(spelled(form(given)) == spelled(form(truth)) for form in (str, unbraced))
    (a, unit), (b, true_unit) = number(given) or (None, ""), number(truth)
    if a is not None and unit + true_unit == "%":  # 50% is 0.5, and 50 too where the question names
        percent, plain = (a, b) if unit else (b, a)  # the sign; but 0.5% is not 0.5
        return percent / 100 == plain or percent == plain and abs(plain) > 1
    return a == b and (unit == true_unit or not unit or not true_unit)
