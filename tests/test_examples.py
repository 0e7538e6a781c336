"""The shipped examples are what their generators write, and what they say they are."""

from __future__ import annotations

import json
import runpy
from collections import Counter
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from tunegate.config import load_config
from tunegate.data.duplicates import find_duplicates
from tunegate.data.types import Example

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def generator(name: str) -> dict[str, Any]:
    return runpy.run_path(str(EXAMPLES / name / "generate.py"))


def rows(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def tickets() -> list[dict[str, str]]:
    return rows(EXAMPLES / "support" / "tickets.jsonl")


@pytest.fixture(scope="module")
def orders() -> list[dict[str, str]]:
    return rows(EXAMPLES / "json" / "orders.jsonl")


@pytest.mark.parametrize(("name", "file"), [("support", "tickets.jsonl"), ("json", "orders.jsonl")])
def test_committed_file_is_the_generators_output(name: str, file: str, tmp_path: Path) -> None:
    copy = tmp_path / "generate.py"
    copy.write_bytes((EXAMPLES / name / "generate.py").read_bytes())
    runpy.run_path(str(copy), run_name="__main__")
    assert (tmp_path / file).read_bytes() == (EXAMPLES / name / file).read_bytes()


def test_another_seed_gives_other_rows() -> None:
    space = generator("support")
    assert space["tickets"](50, seed=1) != space["tickets"](50, seed=2)


def test_tickets_shape(tickets: list[dict[str, str]]) -> None:
    assert len(tickets) == 600
    assert all(set(row) == {"prompt", "completion", "customer"} for row in tickets)
    assert all(8 <= len(row["prompt"].split()) <= 40 for row in tickets)
    assert set(Counter(row["completion"] for row in tickets).values()) == {50}
    assert len({row["completion"] for row in tickets}) == 12
    assert set(Counter(row["customer"] for row in tickets).values()) == {1, 2, 3}
    assert not any("{" in row["prompt"] or "  " in row["prompt"] for row in tickets)


@pytest.mark.parametrize("kind", ["tickets", "orders"])
def test_no_duplicates_near_or_exact(kind: str, request: pytest.FixtureRequest) -> None:
    """So no row of the test split is in the training set either, and no message has two answers."""
    examples = [
        Example(
            kind,
            line,
            ({"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}),
        )
        for line, row in enumerate(request.getfixturevalue(kind), 1)
    ]
    found = find_duplicates(examples)
    assert (found.exact, found.near) == ([], [])
    assert len({example.input_hash for example in examples}) == len(examples)


def test_label_words_do_not_give_the_intent_away(tickets: list[dict[str, str]]) -> None:
    """Answering with the intent whose name shares most words with the message is right for few of them."""
    intents = sorted({row["completion"] for row in tickets})

    def guess(text: str) -> str:
        return max(intents, key=lambda intent: sum(word in text.lower() for word in intent.split("_")))

    right = sum(guess(row["prompt"]) == row["completion"] for row in tickets)
    assert right / len(tickets) < 0.3


def test_orders_follow_the_schema_and_the_message(orders: list[dict[str, str]]) -> None:
    schema = json.loads((EXAMPLES / "json" / "schema.json").read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator.check_schema(schema)
    check = jsonschema.Draft202012Validator(schema)
    plural = generator("json")["ITEMS"]
    assert len(orders) == 400
    for row in orders:
        order, text = json.loads(row["completion"]), row["prompt"].lower()
        check.validate(order)
        assert (order["item"] if order["quantity"] == 1 else plural[order["item"]]) in text
        assert order["city"] is None or order["city"].lower() in text
        assert order["colour"] is None or order["colour"] in text
        assert ("express" in text.replace("no express", "")) == order["express"]


def test_tasks_are_small_enough_for_a_demo(tickets: list[dict[str, str]]) -> None:
    """About 1.4 tokens a word, and ten of the template: under 30,000 trained tokens."""
    task = load_config(EXAMPLES / "support" / "task.yaml").task
    share = 1 - task.data.valid_fraction - task.data.test_fraction
    words = sum(len(row["prompt"].split()) for row in tickets)
    assert share * task.train.epochs * (1.4 * words + 10 * len(tickets)) < 30_000
