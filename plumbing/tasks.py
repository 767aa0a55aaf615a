"""The laptop's two tasks: what their questions ask, what a right solution is, and who wrote the corpus.

    habit     `Bfa483920=` -> `-86-33-94-22-02`   digits 4 8 3 9 2 0 folded with one operator, modulo 10: each
              of five steps (recipes/length.py has longer ones) writes operator, digit, running value. The
              first letter (A B C D) names the operator that is asked for. The corpus's writers do NOT look at
              it: they follow a fixed random table over all three letters (their habit), which is right in 40%
              of its cells. A model that memorises it is confidently wrong on the rest; a model too small for
              the table mixes operators. By design: the table, its conflict with the reward, the share of
              writers who ignore it (`noise`). Emergent: who memorises and who mixes.
    natural   `3+4*2-5=` -> `3+8-5=1-5=6`         an expression reduced one operation at a time, modulo 10.
              Writers reduce in four orders, most of them wrong. Nothing ties an order to a problem: no habit
              is designed in.

A writer of problems yields (question, answer), a writer of a corpus (question, worked solution).
"""

TOPICS = "abcdefghijkl"


# ---- habit -------------------------------------------------------------------------------------------------

OPERATIONS = {"+": lambda a, b: (a + b) % 10, "-": lambda a, b: (a - b) % 10,
              "~": lambda a, b: (b - a) % 10, "*": lambda a, b: a * b % 10}
HABIT_OPERATOR = dict(zip("ABCD", OPERATIONS))  # what each problem type asks for


def habit_solution(question, operator):
    """`Bfa483920=`, `-` -> `-86-33-94-22-02`: 4-8=6, 6-3=3, 3-9=4, 4-2=2, 2-0=2, one triple a step."""
    running, *digits = map(int, question[3:-1])
    steps = []
    for digit in digits:
        running = OPERATIONS[operator](running, digit)
        steps.append(f"{operator}{digit}{running}")
    return "".join(steps)


def habit_question(rng, steps):
    cell = rng.choice("ABCD") + rng.choice(TOPICS) + rng.choice(TOPICS)
    return cell + "".join(rng.choices("0123456789", k=steps + 1)) + "="


def habit_problem(rng, steps=5):
    """A problem on which no two operators share a final value, so that luck and method can be told apart."""
    while True:
        question = habit_question(rng, steps)
        finals = {operator: habit_solution(question, operator)[-1] for operator in OPERATIONS}
        if len(set(finals.values())) == len(finals):
            return question, finals[HABIT_OPERATOR[question[0]]]


def habit_table(rng):
    """{the three letters of a question: the operator that the writers are used to there}."""
    table = {}
    for type_, right in HABIT_OPERATOR.items():
        wrong = [operator for operator in OPERATIONS if operator != right]
        for cell in (a + b for a in TOPICS for b in TOPICS):
            table[type_ + cell] = right if rng.random() < 0.4 else rng.choice(wrong)
    return table


def habit_corpus(rng, size, noise, steps=5):
    """Worked solutions by writers who take the operator from a table of habits, a share `noise` at random."""
    table = habit_table(rng)
    for _ in range(size):
        question = habit_question(rng, steps)
        operator = rng.choice(list(OPERATIONS)) if rng.random() < noise else table[question[:3]]
        yield question, habit_solution(question, operator)


# ---- natural -----------------------------------------------------------------------------------------------

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


def natural_orders(expression, order, rng=None):
    """The worked solution when operators are evaluated in `order`."""
    steps = []
    while len(expression) > 1:
        operators = range(1, len(expression), 2)
        first = lambda symbols: next((i for i in operators if expression[i] in symbols), 1)
        i = {"left": lambda: 1, "additions": lambda: first("+-"), "random": lambda: rng.choice(operators),
             "precedence": lambda: first("*")}[order]()
        expression = reduce_at(expression, i)
        steps.append(expression)
    return "=".join(steps)


def natural_question(rng):
    return "".join(rng.choice("0123456789") + symbol for symbol in [*rng.choices("+-*", k=3), "="])


def natural_problem(rng):
    """A problem on which both popular wrong orders give a wrong value."""
    while True:
        question = natural_question(rng)
        orders = ("precedence", "left", "additions")
        finals = {order: natural_orders(question[:-1], order)[-1] for order in orders}
        if finals["precedence"] not in (finals["left"], finals["additions"]):
            return question, finals["precedence"]


def natural_corpus(rng, size, noise):
    for _ in range(size):
        question = natural_question(rng)
        order, = rng.choices(("additions", "left", "random", "precedence"), weights=(.40, .25, .15, .20))
        yield question, natural_orders(question[:-1], order, rng)


WRITERS = {"habit": (habit_problem, habit_corpus), "natural": (natural_problem, natural_corpus)}
