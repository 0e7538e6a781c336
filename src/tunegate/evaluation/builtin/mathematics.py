"""Arithmetic, from one-digit sums to two-step stories. Every answer is one number.

Numbers grow with the item's number within a template. Nothing here needs a formula beyond primary school.
"""

from __future__ import annotations

from tunegate.evaluation.builtin.draw import Draw, Made, mention, number

NAMES = ("Anna", "Ben", "Carla", "David", "Emma", "Farid", "Grace", "Hugo", "Ines", "Jonas", "Kira", "Leo")
THINGS = ("apples", "books", "marbles", "stamps", "pencils", "shells", "cards", "coins", "stickers", "buttons")
UNITS = (
    ("hours", "minutes", 60),
    ("days", "hours", 24),
    ("weeks", "days", 7),
    ("metres", "centimetres", 100),
    ("dozens of eggs", "eggs", 12),
    ("kilograms", "grams", 1000),
    ("years", "months", 12),
)


def addition(draw: Draw, n: int) -> Made:
    top = (9, 20, 50, 99, 300, 900)[n % 6]
    a, b = draw.between(2, top), draw.between(2, top)
    return number(draw.pick((f"What is {a} + {b}?", f"Add {a} and {b}.", f"{a} plus {b} is what number?")), a + b)


def subtraction(draw: Draw, n: int) -> Made:
    top = (12, 20, 50, 99, 300, 900)[n % 6]
    b, a = sorted((draw.between(2, top), draw.between(2, top)))
    asked = draw.pick((f"What is {a} - {b}?", f"Subtract {b} from {a}.", f"{a} minus {b} is what number?"))
    return number(asked, a - b)


def multiplication(draw: Draw, n: int) -> Made:
    top = (5, 9, 10, 12, 20, 40)[n % 6]
    a, b = draw.between(2, min(top, 12)), draw.between(2, top)
    return number(draw.pick((f"What is {a} x {b}?", f"Multiply {a} by {b}.", f"What is {a} times {b}?")), a * b)


def division(draw: Draw, n: int) -> Made:
    b, quotient = draw.between(2, (3, 5, 9, 10, 12, 12)[n % 6]), draw.between(2, (5, 9, 9, 12, 15, 30)[n % 6])
    return number(draw.pick((f"What is {b * quotient} / {b}?", f"Divide {b * quotient} by {b}.")), quotient)


def three_terms(draw: Draw, n: int) -> Made:
    a, b, c = (draw.between(1, 9 if n < 3 else 30) for _ in range(3))
    if n % 2 and a + b > c:
        return number(f"What is {a} + {b} - {c}?", a + b - c)
    return number(f"What is {a} + {b} + {c}?", a + b + c)


def next_in_sequence(draw: Draw, n: int) -> Made:
    start, step = draw.between(1, 12), draw.pick((1, 2, 5, 10) if n < 3 else (3, 4, 6, 7))
    values = [start + i * step for i in range(5)]
    if n == 5:
        first = draw.between(1, 4)
        values = [first * 2**i for i in range(5)]
    return number(f"Which number comes next? {', '.join(map(str, values[:4]))}, ...", values[4])


def largest(draw: Draw, n: int) -> Made:
    values = draw.sample(range(3, (20, 99, 99, 999, 999, 9999)[n % 6]), 3 + n % 2)
    word = draw.pick(("largest", "smallest"))
    best = max(values) if word == "largest" else min(values)
    shown = [str(v) for v in values]
    asked = f"Which of these numbers is the {word}: {', '.join(shown)}? Answer with the number only."
    return mention(asked, str(best), shown)


def gains(draw: Draw, n: int) -> Made:
    who, what = draw.pick(NAMES), draw.pick(THINGS)
    a, b = draw.between(3, 9 + 12 * n), draw.between(2, 9 + 8 * n)
    how = draw.pick(("finds", "buys", "is given"))
    return number(f"{who} has {a} {what} and {how} {b} more. How many {what} does {who} have now?", a + b)


def losses(draw: Draw, n: int) -> Made:
    who, what = draw.pick(NAMES), draw.pick(THINGS)
    a = draw.between(8, 12 + 15 * n)
    b = draw.between(2, a - 2)
    how = draw.pick(("gives away", "loses", "sells"))
    return number(f"{who} has {a} {what} and {how} {b} of them. How many {what} are left?", a - b)


def groups(draw: Draw, n: int) -> Made:
    what, box = draw.pick(THINGS), draw.pick(("boxes", "bags", "jars", "drawers"))
    a, b = draw.between(2, 4 + n), draw.between(2, 6 + n)
    return number(f"There are {a} {box} with {b} {what} in each. How many {what} are there in all?", a * b)


def two_steps(draw: Draw, n: int) -> Made:
    who, other = draw.sample(NAMES, 2)
    what = draw.pick(THINGS)
    a, b = draw.between(4, 8 + 4 * n), draw.between(2, 6 + 3 * n)
    c = draw.between(1, a + b - 1)
    text = f"{who} has {a} {what}. {other} gives {who} {b} more. Then {who} loses {c}."
    return number(f"{text} How many {what} does {who} have?", a + b - c)


def units(draw: Draw, n: int) -> Made:
    name, part, factor = draw.pick(UNITS)
    count = draw.between(2, 4 + n)
    return number(f"How many {part} are there in {count} {name}?", count * factor)


def halves(draw: Draw, n: int) -> Made:
    a = draw.between(2, 8 + 10 * n)
    asked, answer = draw.pick(
        (
            (f"What is half of {2 * a}?", a),
            (f"What is double {a}?", 2 * a),
            (f"What is 10% of {10 * a}?", a),
            (f"What is 50% of {2 * a}?", a),
        )
    )
    return number(asked, answer)


TEMPLATES = (
    (addition, 8),
    (subtraction, 8),
    (multiplication, 7),
    (division, 6),
    (three_terms, 5),
    (next_in_sequence, 6),
    (largest, 6),
    (gains, 5),
    (losses, 5),
    (groups, 4),
    (two_steps, 4),
    (units, 4),
    (halves, 4),
)
