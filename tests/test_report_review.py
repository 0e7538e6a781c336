"""The selection of a spot-check, its log, and what its verdicts come to."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reviews import SOURCE, begin, click, item, judge
from tunegate.errors import InputError
from tunegate.evaluation.measures import load_measures
from tunegate.files import read_jsonl
from tunegate.report.review import LABELS, LOG, Log, Refused, Review, reviewer_name
from tunegate.report.selection import OUTCOMES, Item, select
from tunegate.report.summary import describe, summarize

# --- the selection -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("base", "adapter", "outcome"),
    [(1, 1, 0), (0, 1, 1), (1, 0, 2), (0, 0, 3), (0.3, 0.5, 1), (0.55, 0.5, 0), (0.4, 0.45, 3), (0.9, 0.7, 2)],
)
def test_outcomes(base: float, adapter: float, outcome: int) -> None:
    assert item("x", base_score=base, adapter_score=adapter).outcome == OUTCOMES[outcome]


scored = st.tuples(st.sampled_from([0.0, 1.0]), st.sampled_from([0.0, 1.0]), st.sampled_from(["", "red", "blue"]))


def items_of(rows: list[tuple[float, float, str]]) -> list[Item]:
    return [item(str(n), base_score=b, adapter_score=a, kind=kind) for n, (b, a, kind) in enumerate(rows)]


@given(st.lists(scored, min_size=1, max_size=60), st.integers(1, 30), st.integers(0, 5))
def test_each_stratum_gets_its_share_within_one(rows: list[tuple[float, float, str]], n: int, seed: int) -> None:
    items = items_of(rows)
    chosen = select(items, n, seed)
    assert len(chosen) == len({i.row_id for i in chosen}) == min(n, len(items))
    assert select(list(reversed(items)), n, seed) == chosen  # neither the order nor the call matters
    share = len(chosen) / len(items)
    sizes, got = (Counter((i.outcome, i.kind) for i in found) for found in (items, chosen))
    assert all(abs(got[stratum] - share * size) < 1.0 for stratum, size in sizes.items())


def test_every_item_is_as_likely_as_any_other() -> None:
    """Over the starts of one order: each of 7 items stands in 3 of the 7 samples of 3."""
    taken = Counter((start + k * 7) // 3 for start in range(7) for k in range(3))
    assert taken == dict.fromkeys(range(7), 3)
    rows = [(0.0, 1.0, "")] * 37 + [(1.0, 0.0, "")] * 3
    found = Counter(i.row_id for seed in range(400) for i in select(items_of(rows), 8, seed))
    assert set(found) == {i.row_id for i in items_of(rows)}
    assert max(abs(n - 80) for n in found.values()) < 40  # binomial, 400 of 1/5: five standard deviations


def test_another_seed_is_another_sample() -> None:
    items = items_of([(0.0, 1.0, "")] * 100)
    assert {i.row_id for i in select(items, 24, 0)} != {i.row_id for i in select(items, 24, 1)}


# --- who sees what -------------------------------------------------------------------------------------------------


@given(st.integers(1, 30), st.text(min_size=1, max_size=5))
@settings(max_examples=30)
def test_half_of_the_items_have_the_adapter_on_the_left(n: int, reviewer: str) -> None:
    review = Review(Path(), "t", [item(str(i)) for i in range(n)], 100, 0, n, {}, "5e")
    left = [left for left, _ in review.sides(reviewer)]
    assert abs(left.count("adapter") - left.count("base")) <= 1
    assert all(set(pair) == {"adapter", "base"} for pair in review.sides(reviewer))


def test_sides_follow_from_the_secret_key_alone(tmp_path: Path) -> None:
    """Runs, seeds and texts being equal, two reviews hide the sides independently."""
    one, two = begin(tmp_path / "one", 24), begin(tmp_path / "two", 24)
    assert one.items == two.items and one.key != two.key
    assert one.sides("anna") != two.sides("anna")
    assert one.sides("anna") != one.sides("ben")
    assert Review.load(one.run).sides("anna") == one.sides("anna")


# --- clicks --------------------------------------------------------------------------------------------------------


def test_the_latest_click_counts_and_partial_ones_are_kept(tmp_path: Path) -> None:
    review = begin(tmp_path / "run")
    review.record("anna", 1, click("bad", None))
    assert review.seen("anna", review.log())[1] == click("bad", None)
    review.record("anna", 1, click("good", "bad", "left", "fine"))
    assert review.seen("anna", review.log())[1] == click("good", "bad", "left", "fine")
    assert review.seen("ben", review.log())[1] == click(None, None)
    assert len((review.folder / LOG).read_text(encoding="utf-8").splitlines()) == 2


@pytest.mark.parametrize(
    ("verdict", "preferred"),
    [
        (click("good", "bad"), "left"),
        (click("bad", "partly"), "right"),
        (click("good", "good", "tie"), "tie"),
        (click("bad", "bad", "right"), "right"),
        (click("good", "good"), None),
        (click("good", None), None),
    ],
)
def test_verdicts_settle_the_preference(tmp_path: Path, verdict: dict[str, str | None], preferred: str | None) -> None:
    review = begin(tmp_path / "run")
    given = review.record("anna", 0, verdict)
    assert review.seen("anna", review.log())[0]["preferred"] == preferred
    assert given.complete == (preferred is not None)


@pytest.mark.parametrize(
    "verdict", [click("good", "bad", "right"), click("good", "bad", "tie"), click("good", None, "left")]
)
def test_a_preference_against_the_verdicts_is_refused(tmp_path: Path, verdict: dict[str, str | None]) -> None:
    review = begin(tmp_path / "run")
    with pytest.raises(Refused, match="does not follow"):
        review.record("anna", 0, verdict)
    assert not (review.folder / LOG).exists()


def test_equal_texts_have_one_verdict(tmp_path: Path) -> None:
    review = begin(tmp_path / "run", [item("x", "same", "same")])
    assert review.record("anna", 0, click("bad", "bad")).preferred == "tie"
    for wrong in (click("good", "bad"), click("good", "good", "left")):
        with pytest.raises(Refused):
            review.record("anna", 0, wrong)


def test_who_has_finished_knows_and_changes_nothing_more(tmp_path: Path) -> None:
    review = begin(tmp_path / "run", 2)
    judge(review, "anna", 0, "good", "bad")
    with pytest.raises(Refused, match="1 of 2 items are not judged"):
        review.finish("anna")
    judge(review, "anna", 1, "bad", "bad")
    review.finish("anna")
    review.finish("anna")  # again: no harm
    with pytest.raises(Refused, match="final") as found:
        judge(review, "anna", 0, "bad", "bad")
    assert found.value.late
    judge(review, "ben", 0, "bad", "bad")  # another person may
    assert review.log().finished == ["anna"]


@pytest.mark.parametrize("cut", range(1, 12))
def test_a_line_that_was_cut_off_harms_no_other(tmp_path: Path, cut: int) -> None:
    review = begin(tmp_path / "run")
    review.record("anna", 0, click("good", "bad", note="ä€"))
    whole = (review.folder / LOG).read_bytes()
    review.record("anna", 1, click("good", "bad", note="日本"))
    (review.folder / LOG).write_bytes((review.folder / LOG).read_bytes()[: len(whole) + cut * 20])
    assert review.seen("anna", review.log())[0]["left"] == "good"
    review.record("anna", 2, click("bad", "bad", "tie"))
    seen = Review.load(review.run).seen("anna", review.log())
    assert (seen[0]["note"], seen[2]["preferred"]) == ("ä€", "tie")


@given(st.text(max_size=300))
@settings(max_examples=40)
def test_a_damaged_log_is_read_as_far_as_it_goes(tmp_path_factory: pytest.TempPathFactory, junk: str) -> None:
    review = begin(tmp_path_factory.mktemp("log") / "run")
    lines = [junk, '{"reviewer": []}', '{"reviewer": "x", "row_id": []}', "[1]", "null", json.dumps(junk)]
    (review.folder / LOG).write_text("\n".join(lines) + "\n", encoding="utf-8", errors="replace")
    review.record("anna", 0, click("good", "bad"))
    assert review.seen("anna", review.log())[0]["left"] == "good"


# --- what comes out ------------------------------------------------------------------------------------------------


def test_labels_have_the_promised_form_and_measures_wait_for_the_end(tmp_path: Path) -> None:
    review = begin(tmp_path / "run", 2)
    judge(review, "anna", 0, "good", "bad")
    review.record("anna", 1, click("good", None))  # not complete: no label
    (label,) = review.export()
    assert list(label) == ["row_id", "adapter", "base", "preferred", "note", "reviewer", "at"]
    assert (label["row_id"], label["adapter"], label["base"], label["preferred"]) == (
        "rows.jsonl:0", "good", "bad", "adapter",
    )  # fmt: skip
    assert read_jsonl(review.folder / LABELS) == [label]
    assert load_measures(review.run) == {}
    assert summarize(review, review.log()) is None


# adapter and base verdicts of two people on four items, and what they prefer where the verdicts are equal
ANNA = [("good", "bad"), ("good", "good", "adapter"), ("partly", "bad"), ("bad", "bad", "tie")]
BEN = [("good", "bad"), ("partly", "good"), ("good", "bad"), ("bad", "good")]


def judged(review: Review, people: dict[str, list[tuple[str, ...]]]) -> None:
    for name, verdicts in people.items():
        for place, verdict in enumerate(verdicts):
            judge(review, name, place, *verdict)
        review.finish(name)


def test_measures_by_hand_for_one_reviewer(tmp_path: Path) -> None:
    review = begin(tmp_path / "run")
    judged(review, {"anna": ANNA})
    found = load_measures(review.run)
    accept, preferred = found["review.accept"], found["review.preferred"]
    assert accept.kind == "proportion" and accept.values is not None and preferred.values is not None
    assert accept.values.tolist() == [1, 1, 0, 0]  # partly is not enough
    assert accept.references["base"].tolist() == [0, 1, 0, 0]
    assert preferred.values.tolist() == [1, 1, 1, 0.5]


def test_measures_by_hand_for_two_reviewers(tmp_path: Path) -> None:
    review = begin(tmp_path / "run")
    judged(review, {"anna": ANNA, "ben": BEN})
    judge(review, "carl", 0, "bad", "good")  # has not finished: does not count
    review.export()
    found = load_measures(review.run)
    accept, preferred = found["review.accept"], found["review.preferred"]
    assert accept.values is not None and preferred.values is not None
    assert accept.values.tolist() == [1, 0, 0, 0]  # more than half have to accept
    assert accept.references["base"].tolist() == [0, 1, 0, 0]
    assert preferred.values.tolist() == [1, 0.5, 1, 0.25]
    assert len(read_jsonl(review.folder / LABELS)) == 9
    summary = summarize(review, review.log())
    assert summary is not None
    assert summary["verdicts"]["adapter"] == {"good": 4, "partly": 2, "bad": 2}
    assert summary["preferences"] == {"adapter": 5, "tie": 1, "base": 2}
    assert summary["accept"]["adapter"]["value"] == 0.25


def test_agreement_by_hand(tmp_path: Path) -> None:
    """Preferences of two people on four items: (1, 1), (1, 0), (1, 1), (.5, 0). Ordinal alpha by the coincidences
    (values 0, .5, 1 occur 2, 1, 5 times; distances 1.5**2, 4.5**2, 3**2): observed 2 * (20.25 + 2.25) = 45; expected
    2 * (2*1*2.25 + 2*5*20.25 + 1*5*9) / 7 = 72; alpha = 1 - 45/72 = 0.375."""
    review = begin(tmp_path / "run")
    judged(review, {"anna": ANNA, "ben": BEN})
    summary = summarize(review, review.log())
    assert summary is not None and summary["agreement"]["preferred"] == pytest.approx(0.375)
    assert "2 reviewers" in describe(summary)[-1]


def test_agreement_is_not_defined_where_all_said_the_same(tmp_path: Path) -> None:
    review = begin(tmp_path / "run", 2)
    judged(review, {name: [("good", "bad"), ("good", "bad")] for name in ("anna", "ben")})
    summary = summarize(review, review.log())
    assert summary is not None and summary["agreement"] == {"adapter": None, "base": None, "preferred": None}
    assert "not defined" in describe(summary)[-1]


# --- what is refused -----------------------------------------------------------------------------------------------


def test_a_review_of_other_answers_is_refused(tmp_path: Path) -> None:
    review = begin(tmp_path / "run")
    (review.run / SOURCE).write_text("{} \n", encoding="utf-8")
    with pytest.raises(InputError, match="no longer those") as found:
        Review.load(review.run)
    assert "begin a new review" in found.value.problems[0].fix


@pytest.mark.parametrize("text", ["", "{", "[]", '{"schema": "Review/1"}', '{"schema": "Review/2"}', "null"])
def test_a_damaged_selection_is_refused(tmp_path: Path, text: str) -> None:
    review = begin(tmp_path / "run")
    (review.folder / "items.json").write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match="cannot read the review's items"):
        Review.load(review.run)


@pytest.mark.parametrize("name", ["", " ", "a" * 61, "tab\x00", "\u202e"])
def test_names_that_are_none(name: str) -> None:
    with pytest.raises(InputError, match="not a name"):
        reviewer_name(name)


def test_names_are_normalized() -> None:
    assert reviewer_name("  Zoe\u0308   K. ") == "Zo\u00eb K."


def test_an_empty_log_says_nothing() -> None:
    assert Log({}, []).complete() == []
