"""Writes orders.jsonl: orders in a customer's words, and the same order as a JSON object.

Fields: item (singular), quantity, colour and city (null where not said) and express. Messages carry numbers, places
and colours that do not belong to the order ("I have four already"), so reading is needed and copying is not enough.
Message and object are made from the same drawn values, so they agree by construction.

The same Python or another gives the same bytes: only ``Random.random`` is used, whose sequence is guaranteed.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROWS = 400
SEED = 7

ITEMS = {
    "desk lamp": "desk lamps",
    "wool blanket": "wool blankets",
    "bread bin": "bread bins",
    "wall clock": "wall clocks",
    "garden chair": "garden chairs",
    "bath mat": "bath mats",
    "floor mirror": "floor mirrors",
    "picture frame": "picture frames",
    "shower curtain": "shower curtains",
    "shoe rack": "shoe racks",
    "cushion": "cushions",
    "coffee grinder": "coffee grinders",
    "wine glass": "wine glasses",
    "bookshelf": "bookshelves",
    "knife": "knives",
}
COLOURS = ("grey", "dark green", "navy", "cream", "rust", "black", "pale blue", "white", "mustard", "oak")
CITIES = ("Leeds", "Bristol", "Dundee", "Cork", "Norwich", "Swansea", "Derby", "Exeter", "York", "Truro", "Perth")
NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")

OPENINGS = (
    "I would like {what}",
    "Please send me {what}",
    "Can I get {what}",
    "We need {what}",
    "Put me down for {what}",
    "My order: {what}",
    "Hello, it would be {what} this time",
    "Could you pack {what} for us",
    "Make it {what}",
    "The office wants {what}",
)
TO_CITY = ("to {city}", "for our flat in {city}", "shipped to {city}", "delivered in {city}", "for {city}")
EXPRESS = ("with express delivery", "as fast as you can, express", "by express", "express please")
NO_EXPRESS = ("no express needed", "standard delivery is fine", "normal post will do", "")
ASIDES = (
    "I have {number} already.",
    "The {colour} one from last year is still good.",
    "My sister in {city} has the same.",
    "I paid £{price} last time.",
    "Nothing in {colour}, please.",
    "We moved away from {city} in May.",
    "It is a present for {number} friends.",
    "Call me before {hour} if there is a problem.",
    "Thanks a lot.",
    "You are always quick.",
    "Do not send it to {city} again.",
    "",
)


class Writer:
    """Draws every choice from one seeded sequence."""

    def __init__(self, seed: int):
        self.random = random.Random(seed).random

    def below(self, n: int) -> int:
        return int(self.random() * n)

    def pick(self, options: Sequence[Any]) -> Any:
        return options[self.below(len(options))]

    def chance(self, share: float) -> bool:
        return self.random() < share

    def order(self) -> dict[str, Any]:
        return {
            "item": self.pick(list(ITEMS)),
            "quantity": 1 if self.chance(0.3) else 2 + self.below(11),
            "colour": self.pick(COLOURS) if self.chance(0.7) else None,
            "city": self.pick(CITIES) if self.chance(0.75) else None,
            "express": self.chance(0.35),
        }

    def what(self, order: dict[str, Any]) -> str:
        quantity, colour = order["quantity"], order["colour"]
        noun = order["item"] if quantity == 1 else ITEMS[order["item"]]
        if quantity == 1:
            first = (colour or noun)[0]
            count = self.pick(("one", "1", "an" if first in "aeiou" else "a", "a single"))
        elif quantity == 2 and self.chance(0.3):
            count = "a pair of"
        elif quantity == 12 and self.chance(0.5):
            count = "a dozen"
        else:
            count = self.pick((NUMBERS[quantity - 1], str(quantity)))
        if colour and self.chance(0.35):
            return f"{count} {noun} in {colour}"
        return f"{count} {colour} {noun}" if colour else f"{count} {noun}"

    def message(self, order: dict[str, Any]) -> str:
        parts = [self.pick(OPENINGS).format(what=self.what(order))]
        if order["city"]:
            parts.append(self.pick(TO_CITY).format(city=order["city"]))
        text = " ".join(parts)
        speed = self.pick(EXPRESS if order["express"] else NO_EXPRESS)
        text += f", {speed}." if speed else "."
        fields = {
            "number": self.pick(NUMBERS[1:]),
            "colour": self.pick([c for c in COLOURS if c != order["colour"]]),
            "city": self.pick([c for c in CITIES if c != order["city"]]),
            "price": str(15 + self.below(200)),
            "hour": self.pick(("noon", "four", "ten", "six")),
        }
        aside = self.pick(ASIDES).format(**fields)
        text = f"{aside} {text}" if aside and self.chance(0.3) else f"{text} {aside}".strip()
        return text.lower() if self.chance(0.12) else text


def pieces(text: str) -> set[str]:
    """The 5-character pieces of a text."""
    text = text.lower()
    return {text[i : i + 5] for i in range(len(text) - 4)}


def orders(rows: int = ROWS, seed: int = SEED) -> list[dict[str, str]]:
    """``rows`` messages with their objects; none nearly equals another."""
    writer = Writer(seed)
    before: list[set[str]] = []
    found: list[dict[str, str]] = []
    while len(found) < rows:
        order = writer.order()
        text = writer.message(order)
        new = pieces(text)
        if any(len(new & old) > 0.7 * len(new | old) for old in before):
            continue
        before.append(new)
        found.append({"prompt": text, "completion": json.dumps(order, ensure_ascii=False)})
    return found


def main() -> None:
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in orders()]
    (Path(__file__).parent / "orders.jsonl").write_bytes("".join(lines).encode("utf-8"))


if __name__ == "__main__":
    main()
