"""Facts to be written in a stated form: JSON, CSV, lists, key and value lines, dates, tags.

Many items show one worked example of the form, because what is measured is whether the form is kept, not whether a
description of it is understood. JSON is compared as JSON and must stand alone: a program is to read it.
"""

from __future__ import annotations

import json
from typing import Any

from tunegate.evaluation.builtin.draw import Draw, Made, escaped
from tunegate.evaluation.checks import Check

NAMES = ("Anna", "Ben", "Carla", "David", "Emma", "Farid", "Grace", "Hugo", "Ines", "Jonas", "Kira", "Leo")
CITIES = ("Lyon", "Boston", "Oslo", "Porto", "Dublin", "Vienna", "Turin", "Leeds")
FRUITS = ("apple", "pear", "plum", "grape", "lemon", "mango", "melon", "banana")
COLOURS = ("red", "blue", "green", "yellow", "black", "white")
MONTHS = (
    *("January", "February", "March", "April", "May", "June"),
    *("July", "August", "September", "October", "November", "December"),
)
REVIEWS = (
    ("I love this phone, it works perfectly.", "POSITIVE"),
    ("The food was cold and the waiter was rude.", "NEGATIVE"),
    ("What a wonderful holiday we had!", "POSITIVE"),
    ("It broke after one day. A waste of money.", "NEGATIVE"),
    ("Great service and friendly staff.", "POSITIVE"),
)
MEMBER = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "member": {"type": "boolean"}},
    "required": ["name", "member"],
    "additionalProperties": False,
}


def _json(prompt: str, value: Any) -> Made:
    return Made(prompt, (json.dumps(value),), Check("json_equal"), 48)


def _pattern(prompt: str, answer: str, pattern: str | None = None) -> Made:
    return Made(prompt, (answer,), Check("regex", {"pattern": pattern or escaped(answer)}), 48)


def _any_case(word: str) -> str:
    return f"[{word[0].lower()}{word[0].upper()}]{word[1:]}"


def json_person(draw: Draw, n: int) -> Made:
    who, age, city = draw.pick(NAMES), draw.between(18, 80), draw.pick(CITIES)
    return _json(
        "Write the person as JSON with the keys name, age and city. Answer with the JSON only.\n"
        'Text: Mia is 30 years old and lives in Rome.\nJSON: {"name": "Mia", "age": 30, "city": "Rome"}\n'
        f"Text: {who} is {age} years old and lives in {city}.\nJSON:",
        {"name": who, "age": age, "city": city},
    )


def json_order(draw: Draw, n: int) -> Made:
    fruit, count, colour = draw.pick(FRUITS), draw.between(2, 40), draw.pick(COLOURS)
    return _json(
        "Turn the order into JSON with the keys item, quantity and colour. Answer with the JSON only.\n"
        'Order: 5 pink cups\nJSON: {"item": "cup", "quantity": 5, "colour": "pink"}\n'
        f"Order: {count} {colour} {fruit}s\nJSON:",
        {"item": fruit, "quantity": count, "colour": colour},
    )


def json_array(draw: Draw, n: int) -> Made:
    values = [draw.between(1, 99) for _ in range(3 + n % 3)]
    shown = ", ".join(map(str, values))
    return _json(f"Write these numbers as a JSON array, in the same order, and nothing else: {shown}", values)


def json_any(draw: Draw, n: int) -> Made:
    who, flag = draw.pick(NAMES), n % 2 == 0
    asked = (
        f"{who} is {'a' if flag else 'not a'} member of the club. Answer with a JSON object that has two keys: name, "
        "a text, and member, true or false. Write only the JSON."
    )
    return Made(asked, (json.dumps({"name": who, "member": flag}),), Check("json_schema", {"schema": MEMBER}), 48)


def csv_row(draw: Draw, n: int) -> Made:
    who, age, city = draw.pick(NAMES), draw.between(18, 80), draw.pick(CITIES)
    return _pattern(
        "Write the person as one CSV row: name,age,city. No spaces after commas, nothing else.\n"
        f"Text: Mia is 30 and lives in Rome.\nCSV: Mia,30,Rome\nText: {who} is {age} and lives in {city}.\nCSV:",
        f"{who},{age},{city}",
    )


def bullets(draw: Draw, n: int) -> Made:
    fruits = draw.sample(FRUITS, 3)
    return _pattern(
        f"Write these words as a bulleted list, one on each line: {', '.join(fruits)}. Write only the list.",
        "\n".join(f"- {fruit}" for fruit in fruits),
        r"\s*\n".join(f"[-*•] ?{_any_case(fruit)}" for fruit in fruits),
    )


def numbered(draw: Draw, n: int) -> Made:
    cities = draw.sample(CITIES, 3)
    asked = f"Write these cities as a numbered list (1., 2., 3.), one on each line: {', '.join(cities)}."
    return _pattern(
        f"{asked} Write only the list.",
        "\n".join(f"{i}. {city}" for i, city in enumerate(cities, 1)),
        r"\s*\n".join(f"{i}[.)] {city}" for i, city in enumerate(cities, 1)),
    )


def key_values(draw: Draw, n: int) -> Made:
    who, city, colour = draw.pick(NAMES), draw.pick(CITIES), draw.pick(COLOURS)
    answer = f"name: {who}\ncity: {city}\ncolour: {colour}"
    return _pattern(
        "Write the facts as lines of the form key: value, with the keys name, city and colour, in this order.\n"
        "Text: Mia from Rome likes the colour pink.\nname: Mia\ncity: Rome\ncolour: pink\n\n"
        f"Text: {who} from {city} likes the colour {colour}.",
        answer,
        answer.replace("\n", r"\s*\n"),
    )


def iso_date(draw: Draw, n: int) -> Made:
    month, day, year = draw.below(12), draw.between(1, 28), draw.between(1990, 2029)
    return _pattern(
        "Write the date as YYYY-MM-DD and nothing else.\n"
        "Date: March 5, 2021\n2021-03-05\nDate: July 19, 1998\n1998-07-19\n"
        f"Date: {MONTHS[month]} {day}, {year}",
        f"{year}-{month + 1:02d}-{day:02d}",
    )


def tagged(draw: Draw, n: int) -> Made:
    word, tag = draw.pick(FRUITS), draw.pick(("item", "word", "fruit", "b"))
    asked = f"Put the word {word} between an opening tag <{tag}> and a closing tag </{tag}>. Write nothing else."
    return _pattern(asked, f"<{tag}>{word}</{tag}>")


def comma_list(draw: Draw, n: int) -> Made:
    colours = draw.sample(COLOURS, 3)
    return _pattern(
        "Write the colours of the text in one line, in their order, separated by a comma and a space, and nothing "
        f"else.\nText: The flag is {colours[0]}, then {colours[1]}, and {colours[2]} at the bottom.",
        ", ".join(colours),
        r",\s?".join(map(_any_case, colours)) + r"\.?",
    )


def heading(draw: Draw, n: int) -> Made:
    city, signs = draw.pick(CITIES), "#" * (1 + n % 2)
    asked = (
        f"Write the title 'A day in {city}' as a Markdown heading of level {len(signs)} "
        f"(a line that starts with {signs} and a space). Write only that line."
    )
    return _pattern(asked, f"{signs} A day in {city}")


def label(draw: Draw, n: int) -> Made:
    text, answer = REVIEWS[n]
    return _pattern(
        "Is the review positive or negative? Answer with the single word POSITIVE or NEGATIVE, in capital letters.\n"
        f"Review: {text}",
        answer,
        rf"{answer}\.?",
    )


def money(draw: Draw, n: int) -> Made:
    dollars, cents = draw.between(1, 99), draw.between(10, 99)
    return _pattern(
        "Write the price with a dollar sign and two decimals, like $4.50, and nothing else.\n"
        f"Price: {dollars} dollars and {cents} cents",
        f"${dollars}.{cents}",
    )


TEMPLATES = (
    (json_person, 7),
    (json_order, 6),
    (json_array, 5),
    (json_any, 4),
    (csv_row, 6),
    (bullets, 5),
    (numbered, 5),
    (key_values, 5),
    (iso_date, 7),
    (tagged, 4),
    (comma_list, 5),
    (heading, 4),
    (label, 5),
    (money, 4),
)
