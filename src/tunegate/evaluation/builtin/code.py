"""What a few lines of Python print, and which line is right. No code of the model's is run here.

Values come from doing the same operation in the generator, so an answer cannot disagree with Python. The templates
in :data:`RUN_TEMPLATES` ask for a function instead and are scored by running it: a set of its own (``code_run``)
that needs consent.
"""

from __future__ import annotations

from typing import Any

from tunegate.evaluation.builtin.draw import Draw, Made, likeliest
from tunegate.evaluation.checks import Check

WORDS = ("apple", "river", "stone", "cloud", "tiger", "lemon", "chair", "music", "green", "horse", "bread", "light")


def _prints(code: str, value: Any) -> Made:
    """The output of a ``print`` of ``value``: texts are printed without quotes."""
    check = Check("exact") if isinstance(value, str) else Check("literal")
    prompt = f"```python\n{code}\n```\nWhat does this code print? Answer with the output only."
    return Made(prompt, (str(value),), check)


def arithmetic(draw: Draw, n: int) -> Made:
    operator = ("+", "-", "*", "//", "%", "**")[n % 6]
    a, b = draw.between(2, 6 + 3 * n), draw.between(2, 3 if operator == "**" else 9)
    value = {"+": a + b, "-": a - b, "*": a * b, "//": a // b, "%": a % b, "**": a**b}[operator]
    return _prints(f"a = {a}\nb = {b}\nprint(a {operator} b)", value)


def string_method(draw: Draw, n: int) -> Made:
    word = draw.pick(WORDS)
    call, value = (
        ("upper()", word.upper()),
        ("capitalize()", word.capitalize()),
        (f'replace("{word[0]}", "x")', word.replace(word[0], "x")),
        (f'startswith("{word[:2]}")', word.startswith(word[:2])),
        (f'index("{word[2]}")', word.index(word[2])),
        (f'count("{word[1]}")', word.count(word[1])),
    )[n % 6]
    return _prints(f'word = "{word}"\nprint(word.{call})', value)


def indexing(draw: Draw, n: int) -> Made:
    values: list[Any] = [draw.between(1, 50) for _ in range(4)] if n % 2 else list(draw.sample(WORDS, 3))
    shown = str(values).replace("'", '"')
    at = draw.pick((0, 1, -1) if n < 4 else (2, -2, 1))
    return _prints(f"items = {shown}\nprint(items[{at}])", values[at])


def slicing(draw: Draw, n: int) -> Made:
    word, low = draw.pick(WORDS), draw.between(0, 1)
    high = low + draw.between(2, 3)
    part, value = (
        (f"[{low}:{high}]", word[low:high]),
        (f"[:{high}]", word[:high]),
        (f"[{low + 1}:]", word[low + 1 :]),
        ("[::-1]", word[::-1]),
    )[n % 4]
    return _prints(f'word = "{word}"\nprint(word{part})', value)


def length(draw: Draw, n: int) -> Made:
    if n % 2:
        values = [draw.between(1, 9) for _ in range(draw.between(2, 6))]
        return _prints(f"items = {values}\nprint(len(items))", len(values))
    word = draw.pick(WORDS) + ("s" if n > 3 else "")
    return _prints(f'word = "{word}"\nprint(len(word))', len(word))


def aggregate(draw: Draw, n: int) -> Made:
    values = [draw.between(1, 9) for _ in range(3 + n % 2)]
    name, value = (("sum", sum(values)), ("max", max(values)), ("min", min(values)), ("sorted", sorted(values)))[n % 4]
    return _prints(f"items = {values}\nprint({name}(items))", value)


def loop(draw: Draw, n: int) -> Made:
    last, step = draw.between(3, 5), draw.between(1, 3)
    added, value = (step, last * step) if n % 2 else ("i", sum(range(last)))
    return _prints(f"total = 0\nfor i in range({last}):\n    total += {added}\nprint(total)", value)


def condition(draw: Draw, n: int) -> Made:
    x, limit = draw.between(1, 20), draw.between(5, 15)
    a, b = draw.sample(WORDS, 2)
    code = f'x = {x}\nif x > {limit}:\n    print("{a}")\nelse:\n    print("{b}")'
    return _prints(code, a if x > limit else b)


def lookup(draw: Draw, n: int) -> Made:
    keys = draw.sample(WORDS, 3)
    values = [draw.between(1, 30) for _ in keys]
    table = ", ".join(f'"{k}": {v}' for k, v in zip(keys, values, strict=True))
    at = draw.below(3)
    return _prints(f'table = {{{table}}}\nprint(table["{keys[at]}"])', values[at])


def boolean(draw: Draw, n: int) -> Made:
    a, b = draw.between(1, 9), draw.between(1, 9)
    text, value = (
        (f"{a} > {b}", a > b),
        (f"{a} == {b}", a == b),
        (f"not {a > b}", not a > b),
        (f"{a < b} and {b > 3}", a < b and b > 3),
        (f"{a < b} or {b > 3}", a < b or b > 3),
        (f"{b} in [{a}, {a + 1}, {a + 2}]", b in (a, a + 1, a + 2)),
    )[n % 6]
    return _prints(f"print({text})", value)


def joining(draw: Draw, n: int) -> Made:
    a, b = draw.sample(WORDS, 2)
    code, value = (
        (f'print("{a}" + "{b}")', a + b),
        (f'print("{a[:2]}" * {2 + n % 2})', a[:2] * (2 + n % 2)),
        (f'print("-".join(["{a}", "{b}"]))', f"{a}-{b}"),
        (f'print(f"{{1 + {n}}} {a}")', f"{1 + n} {a}"),
    )[n % 4]
    return _prints(code, value)


def function_call(draw: Draw, n: int) -> Made:
    x, k = draw.between(1, 9), draw.between(1, 5)
    body, value = (
        (f"return x + {k}", x + k),
        (f"return x * {k}", x * k),
        (f"return x * x + {k}", x * x + k),
        (f"return [x, {k}]", [x, k]),
    )[n % 4]
    return _prints(f"def f(x):\n    {body}\n\nprint(f({x}))", value)


def expression(draw: Draw, n: int) -> Made:
    values, k = [draw.between(1, 9) for _ in range(3)], draw.between(2, 4)
    text, value = (
        (f"[x + {k} for x in {values}]", [x + k for x in values]),
        (f"[x for x in {values} if x > {k}]", [x for x in values if x > k]),
        (f"list(range({k + 1}))", list(range(k + 1))),
        (f"{values} + [{k}]", [*values, k]),
    )[n % 4]
    prompt = f"What is the value of this Python expression?\n```python\n{text}\n```\nAnswer with the value only."
    return Made(prompt, (repr(value),), Check("literal"))


COMPLETIONS = (
    ("returns the sum of two numbers", "def add(a, b):", ("return a + b", "return a - b", "return a * b", "return a")),
    (
        "returns True if a number is even",
        "def is_even(n):",
        ("return n % 2 == 0", "return n % 2 == 1", "return n / 2", "return n == 2"),
    ),
    (
        "returns the last element of a list",
        "def last(items):",
        ("return items[-1]", "return items[0]", "return items[1]", "return len(items)"),
    ),
    (
        "returns the larger of two numbers",
        "def larger(a, b):",
        ("return a if a > b else b", "return a if a < b else b", "return a + b", "return a > b"),
    ),
    (
        "returns a word in capital letters",
        "def shout(word):",
        ("return word.upper()", "return word.lower()", "return len(word)", "return word[0]"),
    ),
    (
        "returns how many items a list has",
        "def size(items):",
        ("return len(items)", "return sum(items)", "return max(items)", "return items[0]"),
    ),
    (
        "returns a word backwards",
        "def backwards(word):",
        ("return word[::-1]", "return word[1:]", "return word[:-1]", "return word + word"),
    ),
)


def completion(draw: Draw, n: int) -> Made:
    task, head, (right, *wrong) = COMPLETIONS[n]
    return likeliest(f"Write the one missing line of a Python function that {task}.\n{head}", right, wrong, draw)


TEMPLATES = (
    (arithmetic, 6),
    (string_method, 6),
    (indexing, 6),
    (slicing, 4),
    (length, 6),
    (aggregate, 5),
    (loop, 4),
    (condition, 5),
    (lookup, 5),
    (boolean, 6),
    (joining, 4),
    (function_call, 4),
    (expression, 4),
    (completion, 7),
)

# name, parameters, what it does, what must hold, a body that does it
FUNCTIONS = (
    ("add", "a, b", "returns the sum of a and b", ("add(2, 3) == 5", "add(-1, 1) == 0"), "a + b"),
    ("double", "x", "returns twice x", ("double(4) == 8", "double(-3) == -6"), "2 * x"),
    (
        "is_even",
        "n",
        "returns True if n is even, else False",
        ("is_even(4) is True", "is_even(7) is False"),
        "n % 2 == 0",
    ),
    (
        "longest",
        "words",
        "returns the longest text of a list",
        ("longest(['a', 'bbb', 'cc']) == 'bbb'",),
        "max(words, key=len)",
    ),
    (
        "vowels",
        "text",
        "returns how many letters of text are a, e, i, o or u",
        ("vowels('banana') == 3", "vowels('xyz') == 0"),
        "sum(c in 'aeiou' for c in text)",
    ),
    ("backwards", "text", "returns text backwards", ("backwards('abc') == 'cba'", "backwards('') == ''"), "text[::-1]"),
    (
        "largest",
        "values",
        "returns the largest number of a list",
        ("largest([3, 9, 2]) == 9", "largest([-5, -7]) == -5"),
        "max(values)",
    ),
    (
        "factorial",
        "n",
        "returns the factorial of n",
        ("factorial(0) == 1", "factorial(5) == 120"),
        "1 if n < 2 else n * factorial(n - 1)",
    ),
    (
        "squares",
        "n",
        "returns the list of the squares of 1 to n",
        ("squares(3) == [1, 4, 9]", "squares(0) == []"),
        "[i * i for i in range(1, n + 1)]",
    ),
    (
        "unique",
        "values",
        "returns the values without repeats, in their order",
        ("unique([1, 2, 1, 3]) == [1, 2, 3]",),
        "list(dict.fromkeys(values))",
    ),
    ("mean", "values", "returns the mean of a list of numbers", ("mean([1, 2, 3]) == 2",), "sum(values) / len(values)"),
    (
        "palindrome",
        "word",
        "returns True if word reads the same backwards",
        ("palindrome('level') is True", "palindrome('abc') is False"),
        "word == word[::-1]",
    ),
    (
        "initials",
        "name",
        "returns the first letters of the words of name as one text",
        ("initials('Ada Lovelace') == 'AL'",),
        "''.join(w[0] for w in name.split())",
    ),
    (
        "clamp",
        "x, low, high",
        "returns x, but at least low and at most high",
        ("clamp(5, 0, 3) == 3", "clamp(-1, 0, 3) == 0", "clamp(2, 0, 3) == 2"),
        "max(low, min(x, high))",
    ),
    (
        "merge",
        "a, b",
        "returns one dictionary with the keys of both, where b wins",
        ("merge({'x': 1}, {'x': 2, 'y': 3}) == {'x': 2, 'y': 3}",),
        "{**a, **b}",
    ),
    (
        "fizz",
        "n",
        "returns 'Fizz' if n can be divided by 3, else n",
        ("fizz(9) == 'Fizz'", "fizz(4) == 4"),
        "'Fizz' if n % 3 == 0 else n",
    ),
)


def function(draw: Draw, n: int) -> Made:
    name, parameters, task, tests, value = FUNCTIONS[n]
    return Made(
        f"Write a Python function `{name}({parameters})` that {task}. Answer with the code only.",
        (f"```python\ndef {name}({parameters}):\n    return {value}\n```",),
        Check("python", {"tests": [f"assert {test}" for test in tests]}),
        max_new_tokens=128,
    )


RUN_TEMPLATES = ((function, len(FUNCTIONS)),)
