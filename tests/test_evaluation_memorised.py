"""Recited answers: shares derived by hand."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunegate.evaluation.memorised import MEMORISED, recall, recall_measures, shared
from tunegate.gate_rules import FAMILIES

LONG = "the quick brown fox jumps over the lazy dog"  # nine words, five 5-grams


def test_verbatim_folds_case_and_white_space() -> None:
    found = recall([LONG.upper().replace(" ", "\n "), LONG + " again", ""], [LONG] * 3)
    assert found.verbatim.tolist() == [1.0, 0.0, 0.0]
    assert found.rows == (0, 1, 2)
    # nine words and one more: six 5-grams, five of them the reference's
    assert found.overlap.tolist() == pytest.approx([1.0, 5 / 6, 0.0])


def test_short_references_say_nothing() -> None:
    found = recall(["yes", LONG, "a b c d e f g"], ["yes", LONG, "a b c d e f g"])
    assert found.rows == (1,)
    assert found.verbatim.tolist() == [1.0]
    assert recall([], []).rows == ()


def test_overlap_by_hand() -> None:
    wanted = LONG.split()
    assert shared(["quick", "brown", "fox", "jumps", "over"], wanted) == 1.0
    assert shared(["quick", "brown", "fox", "jumps", "under"], wanted) == 0.0
    assert shared(["quick", "brown", "fox"], wanted) == 0.0  # too short for a 5-gram
    assert shared([*["a", "b", "c", "d", "e"], *wanted], wanted) == pytest.approx(5 / 10)


@given(st.lists(st.sampled_from("abcd"), max_size=20), st.lists(st.sampled_from("abcd"), min_size=8, max_size=20))
def test_shares_are_shares(said: list[str], wanted: list[str]) -> None:
    found = recall([" ".join(said)], [" ".join(wanted)])
    assert 0.0 <= found.overlap[0] <= 1.0
    assert found.verbatim[0] == (said == wanted)
    assert shared(wanted, wanted) == 1.0


def test_its_measures_are_known_to_rules() -> None:
    assert {name.removeprefix("train.") for name in recall_measures({"train": 3, "valid": 2})} == set(MEMORISED)
    assert set(MEMORISED) <= set(FAMILIES["train"].names or ())
    nothing = recall_measures({"train": 0, "valid": 0})
    assert {source.value for source in nothing.values()} == {0.0}
    assert "train.verbatim_excess" not in recall_measures({"train": 3, "valid": 0})
