"""Splits: a row's side depends on the row alone."""

from __future__ import annotations

from collections import defaultdict

import pytest
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st

from tunegate.data.split import Splits, assign, position, split
from tunegate.data.types import Example
from tunegate.errors import InputError


def row(text: str, line: int = 1, group: str | None = None, answer: str = "a") -> Example:
    messages = ({"role": "user", "content": text}, {"role": "assistant", "content": answer})
    return Example("f.jsonl", line, messages=messages, group=group)


def test_position_is_the_first_53_bits_of_the_hash() -> None:
    example = row("q", group="g")
    assert position(example, "s") == (int(blake3(b"s\0g").hexdigest()[:16], 16) >> 11) / 2**53
    assert position(row("other", group="g"), "s") == position(example, "s")
    assert position(example, "t") != position(example, "s")


def test_an_empty_group_is_a_group() -> None:
    assert position(row("one", group="")) == position(row("two", group=""))


def test_thresholds() -> None:
    example = row("q")
    u = position(example)
    assert assign(example, 0.0, u + 1e-9) == "test"
    assert assign(example, 0.0, u) == "train"  # below, not at
    assert assign(example, 1e-9, u) == "valid"
    assert assign(example, 0.0, 0.0) == "train"


def test_shares_come_out_near_their_fractions() -> None:
    splits = split([row(f"question {i}", i) for i in range(4000)], valid_fraction=0.1, test_fraction=0.2)
    # five standard deviations of a binomial with n = 4000
    assert abs(len(splits.valid) - 400) < 5 * (4000 * 0.1 * 0.9) ** 0.5
    assert abs(len(splits.test) - 800) < 5 * (4000 * 0.2 * 0.8) ** 0.5
    assert len(splits.train) + len(splits.valid) + len(splits.test) == 4000


ROWS = st.lists(
    st.tuples(st.sampled_from("abcdefghij"), st.sampled_from([None, "g1", "g2", "g3"])), min_size=1, max_size=30
)


@given(ROWS, ROWS, st.floats(0, 0.45), st.floats(0, 0.45), st.text(max_size=3))
@settings(max_examples=150)
def test_added_rows_move_no_other_row(
    first: list[tuple[str, str | None]],
    more: list[tuple[str, str | None]],
    valid: float,
    test: float,
    salt: str,
) -> None:
    def sides(rows: list[tuple[str, str | None]]) -> dict[int, str]:
        found = {}
        for i, (text, group) in enumerate(rows):
            found[i] = assign(row(text, i, group), valid, test, salt)
        return found

    before, after = sides(first), sides(first + more)
    assert {i: after[i] for i in before} == before


@given(ROWS, st.floats(0.05, 0.45), st.floats(0.05, 0.45))
@settings(max_examples=150)
def test_groups_and_equal_inputs_stay_together(rows: list[tuple[str, str | None]], valid: float, test: float) -> None:
    sides = defaultdict(set)
    for i, (text, group) in enumerate(rows):
        # case, spacing and the answer are not part of what is hashed
        example = row(f"  {text.upper()} " if i % 2 else text, i, group, answer=str(i))
        sides[group or text].add(assign(example, valid, test))
    assert all(len(side) == 1 for side in sides.values())


def test_given_splits_win_and_only_train_is_carved() -> None:
    train, test = [row(f"q{i}", i) for i in range(200)], [row("held out")]
    splits = split(train, test=test, valid_fraction=0.2)
    assert splits.test == test
    assert sorted(e.line for e in splits.train + splits.valid) == list(range(200))
    assert 0 < len(splits.valid) < 100
    splits = split(train, valid=[row("v")], test=test)
    assert splits == Splits(train, [row("v")], test)
    assert split(train, valid_fraction=0, test_fraction=0).as_dict() == {"train": train, "valid": [], "test": []}


def test_every_empty_split_is_named_with_its_fix() -> None:
    with pytest.raises(InputError) as caught:
        split([row("q", i) for i in range(50)])  # one input: one side
    text = str(caught.value)
    assert len(caught.value.problems) == 2
    assert "50 rows with 1 different inputs" in text
    assert "raise" in text and "give a file" in text
    with pytest.raises(InputError, match=r"group_by with more groups"):
        split([row(f"q{i}", i, group="only") for i in range(50)])
    with pytest.raises(InputError, match="test file holds no usable row"):
        split([row(f"q{i}", i) for i in range(50)], valid=[row("v")], test=[])
    with pytest.raises(InputError, match="train split is empty"):
        split([], valid=[row("v")], test=[row("t")])


@pytest.mark.parametrize(("valid", "test"), [(-0.1, 0.1), (1.0, 0.1), (0.1, float("nan")), (0.6, 0.5)])
def test_fractions_are_checked(valid: float, test: float) -> None:
    with pytest.raises(InputError, match="fraction"):
        split([row("q")], valid_fraction=valid, test_fraction=test)
