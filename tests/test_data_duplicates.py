"""Duplicates and leaks, against brute force over all pairs."""

from __future__ import annotations

import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tunegate.data.boilerplate import fold, strip_shared
from tunegate.data.duplicates import (
    find_conflicts,
    find_duplicates,
    find_leaks,
    jaccard,
    sketch,
    user_text,
)
from tunegate.data.types import Example

WORDS = [
    "account",
    "balance",
    "card",
    "transfer",
    "refund",
    "cash",
    "bank",
    "rate",
    "fee",
    "limit",
    "top",
    "verify",
    "identity",
    "charge",
    "exchange",
    "currency",
    "order",
    "pending",
    "failed",
    "lost",
    "stolen",
    "activate",
    "delivery",
    "country",
    "mobile",
    "payment",
    "direct",
    "debit",
    "statement",
    "passcode",
    "contact",
]


def row(text: str, line: int = 1, answer: str = "a", system: str = "", source: str = "f") -> Example:
    head = ({"role": "system", "content": system},) if system else ()
    messages = (*head, {"role": "user", "content": text}, {"role": "assistant", "content": answer})
    return Example(source, line, messages=messages)


def rows(texts: list[str], source: str = "f", **fields: str) -> list[Example]:
    return [row(text, i, source=source, **fields) for i, text in enumerate(texts)]


def sentences(n: int, seed: int, words: int = 9) -> list[str]:
    """Random questions; every word carries a number, so that no two share much by chance."""
    rng = random.Random(seed)
    return [" ".join(rng.choice(WORDS) + str(rng.randrange(50)) for _ in range(words)) for _ in range(n)]


def damaged(text: str, rng: random.Random) -> str:
    """The text with a few typing errors."""
    letters = list(text)
    for _ in range(rng.randint(1, 4)):
        i = rng.randrange(len(letters))
        letters[i : i + 1] = rng.choice([[], ["x"], [letters[i], "y"]])
    return "".join(letters)


def test_jaccard_by_hand() -> None:
    # " abcdef ": abcd abcde bcdef cdef -> 4 sets of 5; " abcdeg " shares the first two
    assert jaccard("abcdef", "abcdef") == 1
    assert jaccard("abcdef", "abcdeg") == 2 / 6
    assert jaccard("a", "b") == 0
    assert jaccard("", "") == 1


def grams(text: str) -> set[str]:
    text = f" {fold(text)} "
    return {text[i : i + 5] for i in range(len(text) - 4)}


def all_pairs(left: list[str], right: list[str]) -> dict[tuple[int, int], float]:
    """Brute force: every pair of texts at 0.8 and more."""
    ours, theirs = [grams(text) for text in left], [grams(text) for text in right]
    similar = {(i, j): len(a & b) / len(a | b) for i, a in enumerate(ours) for j, b in enumerate(theirs)}
    return {pair: value for pair, value in similar.items() if value >= 0.8}


def test_near_pairs_against_all_pairs() -> None:
    rng = random.Random(1)
    texts = sentences(80, 0)
    texts = list(dict.fromkeys(texts + [damaged(text, rng) for text in texts for _ in range(3)]))
    expected = {(f"f:{i}", f"f:{j}"): value for (i, j), value in all_pairs(texts, texts).items() if i < j}
    assert len(expected) > 80
    found = {(a, b): similarity for a, b, similarity in find_duplicates(rows(texts)).near}
    assert found == {pair: expected[pair] for pair in found}  # verified on the exact sets: no false accusation
    assert len(found) >= 0.99 * len(expected)


def test_leaks_against_all_pairs() -> None:
    rng = random.Random(2)
    train = sentences(120, 3)
    test = [damaged(text, rng) for text in train] + sentences(60, 4) + [train[0].upper(), train[1]]
    test = [text for text in test[:180] if text not in train] + test[180:]
    n = len(test)
    leaks = find_leaks(rows(train, "train"), rows(test, "test"))
    assert leaks.exact == [(f"test:{n - 2}", "train:0"), (f"test:{n - 1}", "train:1")]
    expected: dict[str, tuple[float, str]] = {}
    for (i, j), value in all_pairs(test[: n - 2], train).items():
        expected[f"test:{i}"] = max(expected.get(f"test:{i}", (0.0, "")), (value, f"train:{j}"))
    assert len(expected) > 30
    found = {candidate: (value, reference) for candidate, reference, value in leaks.near}
    assert found == {row_id: expected[row_id] for row_id in found}
    assert len(found) >= 0.99 * len(expected)


@given(st.lists(st.text(max_size=12), max_size=25))
@settings(max_examples=60)
def test_reported_pairs_hold_for_any_text(texts: list[str]) -> None:
    found = find_duplicates(rows(texts))
    hashes = {e.row_id: e.input_hash for e in rows(texts)}
    for group in found.exact:
        assert len({hashes[row_id] for row_id in group}) == 1
    for a, b, similarity in found.near:
        assert hashes[a] != hashes[b] and 0.8 <= similarity <= 1
    assert sorted(row_id for group in found.exact for row_id in group) == sorted(
        row_id for row_id in hashes if list(hashes.values()).count(hashes[row_id]) > 1
    )


def test_exact_groups_and_conflicts_part_by_answer() -> None:
    examples = [row("Same  Q", 1, "a"), row("same q", 2, "a"), row("same q", 3, "b"), row("other", 4, "a")]
    duplicates = find_duplicates(examples)
    assert duplicates.exact == [["f:1", "f:2"]]
    assert duplicates.near == []
    assert find_conflicts(examples) == [("'Same  Q'", {"a": ["f:1", "f:2"], "b": ["f:3"]})]
    assert find_conflicts(examples[:2]) == []


def test_tool_calls_are_answers() -> None:
    def calling(name: str, line: int) -> Example:
        call = {"type": "function", "function": {"name": name, "arguments": {}}}
        answer = {"role": "assistant", "content": "", "tool_calls": [call]}
        return Example("f", line, messages=({"role": "user", "content": "q"}, answer))

    examples = [calling("f", 1), calling("f", 2), calling("g", 3)]
    assert find_duplicates(examples).exact == [["f:1", "f:2"]]
    ((_, answers),) = find_conflicts(examples)
    assert sorted(map(len, answers.values())) == [1, 2]


def test_plain_texts_have_duplicates_but_no_conflicts() -> None:
    examples = [Example("f", i, text=text) for i, text in enumerate(["one text", "one  TEXT", "another"])]
    assert find_duplicates(examples).exact == [["f:0", "f:1"]]
    assert find_conflicts(examples) == []


SHORT = [
    "card lost",
    "cash rate",
    "top up",
    "pin change",
    "fee refund",
    "verify me",
    "bank limit",
    "passcode forgotten",
    "currency list",
    "exchange time",
    "order kit",
    "mobile wallet",
    "direct debit",
    "balance wrong",
    "crypto buy",
]
INSTRUCTION = "Classify the customer's question into one of the intents. Answer with the intent name only. Question: "


@pytest.mark.parametrize(
    "build",
    [
        lambda text: row(text, system=INSTRUCTION),
        lambda text: row(INSTRUCTION + text),
        lambda text: row(text + "\n\n" + INSTRUCTION),
        lambda text: row(INSTRUCTION + text + "\n\nAnswer in one word, without a full stop, please."),
        lambda text: Example("f", 1, text=INSTRUCTION + text),
    ],
    ids=["system", "before", "after", "around", "plain text"],
)
def test_a_shared_instruction_does_not_make_rows_alike(build: object) -> None:
    examples = [
        Example("f", i, messages=made.messages, text=made.text)
        for i, made in enumerate(build(text) for text in SHORT)  # type: ignore[operator]
    ]
    assert jaccard(user_text(build(SHORT[0] + " " + INSTRUCTION)), INSTRUCTION) > 0.5  # type: ignore[operator]
    assert find_duplicates(examples).near == []
    assert find_leaks(examples[:10], examples[10:]).near == []


def test_an_instruction_shared_by_most_rows_is_left_out_too() -> None:
    texts = [INSTRUCTION + text for text in SHORT] + ["a row without it"]
    assert find_duplicates(rows(texts)).near == []


def test_near_duplicates_below_a_shared_instruction_are_found() -> None:
    pair = ["I cannot find where to change my passcode", "I cannot find where to change my passcodes!"]
    texts = [INSTRUCTION + text for text in [*SHORT, *pair]]
    ((a, b, similarity),) = find_duplicates(rows(texts)).near
    assert (a, b) == ("f:15", "f:16") and 0.8 <= similarity < 1


def test_several_instructions_and_different_tasks_on_one_text() -> None:
    tasks = ["Translate the following sentence into German, keeping names: ",
             "Translate the following sentence into French, keeping names: "]  # fmt: skip
    texts = sentences(40, 5)
    examples = rows([task + text for task in tasks for text in texts])
    assert find_duplicates(examples).near == []
    by_system = [row(text, i, system=task) for task in tasks for i, text in enumerate(texts)]
    assert find_duplicates(by_system).near == []


def test_rare_system_messages_do_not_hide_near_duplicates() -> None:
    days = ("Monday", "Friday")
    examples = [row("where is my new card", i, system=f"Today is {day}") for i, day in enumerate(days)]
    ((_, _, similarity),) = find_duplicates(examples).near
    assert similarity == 1


def test_few_rows_keep_their_common_opening() -> None:
    found = find_duplicates(rows(["how do I change my pin code", "how do I change my pin code now"]))
    assert len(found.near) == 1


def test_signs_count_only_where_they_carry_meaning() -> None:
    assert fold("Don't  STOP, now!") == "dont stop now"
    assert fold("3.14 + 1,000 = x-1") == "3.14 + 1,000 = x-1"
    assert fold("ﬁne Straße") == "fine strasse"


def test_stripping_cuts_between_words() -> None:
    texts = [f"say the word wo{end} please now" for end in "abcdefghijkl"]
    stripped, templates = strip_shared(texts, [""] * len(texts))
    assert stripped == [f"wo{end}" for end in "abcdefghijkl"]
    assert set(templates) == {0}


def test_sketches_of_a_part_are_those_of_the_rows() -> None:
    examples = rows(sentences(30, 6))
    whole, part = sketch(examples), sketch(examples).take(10, 20)
    assert part.texts == whole.texts[10:20]
    assert (part.signatures == whole.signatures[10:20]).all()
    leaks = find_leaks(examples[:10], examples[10:20], sketches=(whole.take(0, 10), part))
    assert leaks == find_leaks(examples[:10], examples[10:20])


def test_no_rows() -> None:
    assert find_duplicates([]).near == [] and find_leaks([], []).exact == []
    assert find_leaks(rows(["a question"]), []).near == find_leaks([], rows(["a question"])).near == []
    assert find_duplicates(rows(["", " ", "?", "!"])).near == []


def test_many_rows_of_one_template_stay_bounded() -> None:
    rng = random.Random(7)
    texts = [
        f"{rng.choice(WORDS)} order {rng.randrange(100)} is late, what can I do {rng.choice(WORDS)}"
        for _ in range(3000)
    ]
    start = time.process_time()
    find_duplicates(rows(texts))
    assert time.process_time() - start < 10  # all pairs would be 4.5 million set comparisons


def test_a_large_bucket_still_reports_every_row() -> None:
    texts = [f"where is my card{'!' * i}" for i in range(200)]  # equal once signs are dropped
    near = find_duplicates(rows(texts)).near
    assert {row_id for pair in near for row_id in pair[:2]} == {f"f:{i}" for i in range(200)}
    assert len(near) <= 8 * 200
