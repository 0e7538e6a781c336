"""Each metric against values worked out by hand, the library it stands on, or a law."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tunegate.data.types import Example
from tunegate.errors import InputError
from tunegate.evaluation.metrics import METRIC_NAMES, build_metric, check_references, score_items
from tunegate.evaluation.metrics_json import MAX_DEPTH, parse_json
from tunegate.evaluation.metrics_text import choice_letter, last_number
from tunegate.evaluation.types import Measurement, Metric

SCHEMA = {
    "type": "object",
    "properties": {"intent": {"enum": ["book", "cancel"]}, "n": {"type": "integer"}},
    "required": ["intent"],
}


def rows(n: int) -> list[Example]:
    return [Example("test.jsonl", i + 1, meta={"i": i}) for i in range(n)]


def build(name: str) -> Metric:
    return build_metric(name, labels=["yes", "no"], schema=SCHEMA, pattern=r"[a-z]+")


def measure(metric: Metric, pairs: list[tuple[str, str]]) -> Measurement:
    predictions, references = [p for p, _ in pairs], [r for _, r in pairs]
    return score_items([metric], predictions, references, rows(len(pairs)))[1][metric.name]


def one(name: str, prediction: str, reference: str, **options: Any) -> float:
    return float(measure(build_metric(name, **options), [(prediction, reference)]).scores[0])


@pytest.mark.parametrize(
    ("name", "prediction", "reference", "expected"),
    [
        ("exact_match", " Paris\n", "Paris", 1.0),
        ("exact_match", "paris", "Paris", 0.0),
        ("exact_match", "Paris.", "Paris", 0.0),
        ("token_f1", "The cat sat!", "a cat", 2 * 1 / (2 + 1)),  # cat sat / cat
        ("token_f1", "cat cat dog", "cat dog dog", 2 * 2 / 6),
        ("token_f1", "", "", 1.0),
        ("token_f1", "the", "", 1.0),  # nothing is left of an article
        ("token_f1", "cat", "", 0.0),
        ("token_f1", "x", "y", 0.0),
        ("number", "It costs $1,234.50.", "1234.5", 1.0),
        ("number", "First 3, then 5", "3", 0.0),
        ("number", "1000000", "1000001", 1.0),
        ("number", "100000", "100001", 0.0),
        ("number", "none", "7", 0.0),
        ("number", "0.0000001", "0", 0.0),
        ("choice", "(b) Paris", "B", 1.0),
        ("choice", "A cat", "A", 0.0),
        ("contains", "The capital is\n  PARIS, of course", "paris, of", 1.0),
        ("contains", "Rome", "Paris", 0.0),
        ("json_valid", ' {"a": 1}\n', "", 1.0),
        ("json_valid", '```json\n{"a": 1}\n```', "", 0.0),
        ("json_valid", '{"a": 1, "a": 1}', "", 0.0),
        ("json_valid", '{"a": NaN}', "", 0.0),
        ("json_valid", "-Infinity", "", 0.0),
        ("json_valid", "", "", 0.0),
        ("json_valid", "null", "", 1.0),
        ("json_equal", '{"b": [1, 2], "a": null}', '{"a": null, "b": [1, 2.0]}', 1.0),
        ("json_equal", "[1, 2]", "[2, 1]", 0.0),
        ("json_equal", "true", "1", 0.0),
        ("json_equal", '{"a": null}', "{}", 0.0),
        ("json_equal", "not json", "{}", 0.0),
        ("field_f1", '{"a": 1, "b": {"c": 2}}', '{"a": 1, "b": {"c": 3}}', 0.5),
        ("field_f1", '{"a": ["x", "y", "y"]}', '{"a": ["y", "x"]}', 2 * 2 / (2 * 2 + 1)),
        ("field_f1", '{"a.b": 1}', '{"a": {"b": 1}}', 0.0),
        ("field_f1", '{"a": []}', '{"a": []}', 1.0),
        ("field_f1", '{"a": []}', '{"a": {}}', 0.0),
        ("field_f1", "oops", '{"a": 1}', 0.0),
    ],
)
def test_golden_scores(name: str, prediction: str, reference: str, expected: float) -> None:
    assert one(name, prediction, reference) == pytest.approx(expected, abs=1e-12)


# ---------------------------------------------------------------------------------------------- labels


def test_accuracy_counts_answers_outside_the_labels() -> None:
    metric = build_metric("accuracy", labels=["Refund", "card lost?", "C", "C++"])
    result = measure(
        metric,
        [("refund.", "Refund"), (" CARD LOST ", "card lost?"), ("C++", "C"), ("Refund please", "Refund"), ("", "C")],
    )
    assert result.scores.tolist() == [1, 1, 0, 0, 0]
    assert result.unreadable == 2
    assert result.value == pytest.approx(0.4)


@pytest.mark.parametrize(
    ("labels", "says"),
    [(["a", "A."], "cannot be told apart"), (["a"], "at least two"), (["a", " ", "b"], "empty"), (None, "labels")],
)
def test_accuracy_refuses_unusable_labels(labels: list[str] | None, says: str) -> None:
    with pytest.raises(InputError, match=says):
        build_metric("accuracy", labels=labels)


# ------------------------------------------------------------------------------------- numbers, letters


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("-5", -5.0),
        ("−5 °C", -5.0),
        ("$-5", -5.0),
        ("-$5", -5.0),
        ("+5", 5.0),
        ("10-20", 20.0),
        ("GPT-4", 4.0),
        ("- 5 apples", 5.0),
        ("1,234,567", 1234567.0),
        ("1, 2, 3", 3.0),
        ("1,2345", 2345.0),
        ("about .5", 0.5),
        ("3.", 3.0),
        ("50%", 50.0),
        ("6.02e23", 6.02e23),
        ("€ 12", 12.0),
        ("x = (1) - (2)", 2.0),
        ("9" * 400, None),
        ("1e999", None),
        ("none at all", None),
    ],
)
def test_last_number(text: str, expected: float | None) -> None:
    assert last_number(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("B", "B"),
        (" b. ", "B"),
        ("(C)", "C"),
        ("**D**: because", "D"),
        ("A) Paris", "A"),
        ("The answer is B because", "B"),
        ("Not option: A. The answer is (C).", "C"),
        ("Answer: D", "D"),
        ("the answer is a dog", None),
        ("A cat", None),
        ("", None),
        ("The answer is Because", None),
    ],
)
def test_choice_letter(text: str, expected: str | None) -> None:
    assert choice_letter(text) == expected


def test_long_white_space_is_read_in_linear_time() -> None:
    for text in ("answer" + " " * 200_000, " " * 200_000 + "(", "1," * 100_000, "111," * 50_000 + "1111"):
        choice_letter(text)
        last_number(text)


def test_regex_wants_the_whole_answer() -> None:
    assert one("regex", " abc ", "unused", pattern="[a-z]+") == 1.0
    assert one("regex", "abc1", "unused", pattern="[a-z]+") == 0.0
    assert one("regex", "see abc1", "unused", pattern=".*[a-z]+.*") == 1.0
    with pytest.raises(InputError, match="not valid"):
        build_metric("regex", pattern="(")
    with pytest.raises(InputError, match="pattern"):
        build_metric("regex")


# ------------------------------------------------------------------------------- ROUGE, BLEU and chrF

TEXTS = [
    ("the cat sat on the mat", "the cat is on the mat"),
    ("a completely different sentence here", "the quick brown fox jumps over the lazy dog"),
    ("hello", "hello there, general Kenobi"),
    ("", "an empty answer"),
    ("the quick brown fox jumps over the dog", "the quick brown fox jumps over the lazy dog"),
    ("Größe: 5 €", "Größe: 5 €"),
]


@pytest.mark.parametrize("name", ["rouge1", "rouge2", "rougeL"])
def test_rouge_is_that_of_the_library(name: str) -> None:
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer([name], use_stemmer=False)
    expected = [scorer.score(target=reference, prediction=text)[name].fmeasure for text, reference in TEXTS]
    assert measure(build_metric(name), TEXTS).scores.tolist() == pytest.approx(expected, abs=1e-12)


def test_rouge_by_hand() -> None:
    # 5 of 6 words shared; bigrams "the cat", "on the", "the mat" of 5; longest common subsequence of 5 words
    scores = {name: one(name, *TEXTS[0]) for name in ("rouge1", "rouge2", "rougeL")}
    assert scores == pytest.approx({"rouge1": 5 / 6, "rouge2": 3 / 5, "rougeL": 5 / 6})


@pytest.mark.parametrize("name", ["bleu", "chrf"])
def test_bleu_and_chrf_are_those_of_sacrebleu(name: str) -> None:
    import sacrebleu

    corpus = sacrebleu.BLEU() if name == "bleu" else sacrebleu.CHRF()
    sentence = sacrebleu.BLEU(effective_order=True) if name == "bleu" else corpus
    result = measure(build_metric(name), TEXTS)
    expected = [sentence.sentence_score(text, [reference]).score / 100 for text, reference in TEXTS]
    assert result.scores.tolist() == pytest.approx(expected, abs=1e-9)
    whole = corpus.corpus_score([t for t, _ in TEXTS], [[r for _, r in TEXTS]]).score / 100
    assert result.value == pytest.approx(whole, abs=1e-9)
    assert result.value != pytest.approx(float(result.scores.mean()), abs=1e-3)


@given(st.lists(st.tuples(st.text("ab c", max_size=9), st.text("ab c", max_size=9)), min_size=1, max_size=5))
def test_chrf_equals_sacrebleu_on_short_texts(pairs: list[tuple[str, str]]) -> None:
    import sacrebleu

    whole = sacrebleu.CHRF().corpus_score([p for p, _ in pairs], [[r for _, r in pairs]]).score / 100
    assert measure(build_metric("chrf"), pairs).value == pytest.approx(whole, abs=1e-9)


# ------------------------------------------------------------------------------------------------ JSON


def test_field_f1_is_micro_averaged() -> None:
    result = measure(
        build_metric("field_f1"),
        [('{"a": 1}', '{"a": 1}'), ('{"a": 1, "b": 2, "c": 3}', '{"a": 9, "b": 9, "c": 9}'), ("no", '{"a": 1}')],
    )
    assert result.scores.tolist() == [1, 0, 0]
    assert result.counts is not None
    assert result.counts.tolist() == [[1, 0, 0], [0, 3, 3], [0, 0, 1]]
    assert result.value == pytest.approx(2 * 1 / (2 * 1 + 3 + 4))
    assert result.unreadable == 1


def test_depth_and_length_of_json() -> None:
    assert one("json_valid", "[" * MAX_DEPTH + "]" * MAX_DEPTH, "") == 1.0
    assert one("json_valid", "[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1), "") == 0.0
    for n in (900, 20_000):
        assert one("json_valid", '{"a":' * n + "1" + "}" * n, "") == 0.0
    deep = "[" * MAX_DEPTH + "1" + "]" * MAX_DEPTH
    assert one("json_equal", deep, deep) == one("field_f1", deep, deep) == 1.0


def test_integers_of_any_length() -> None:
    digits = "123456789" * 2000
    assert one("json_equal", f'{{"n": {digits}}}', f'{{"n": {digits}}}') == 1.0
    assert one("json_equal", f"-{digits}", f"-{digits[:-1]}8") == 0.0
    big = "9" * 10_000
    assert (parse_json(f"-{big}") + 10**10_000) == 1
    assert one("json_schema", f'{{"intent": "book", "n": {digits}}}', "", schema=SCHEMA) == 1.0
    assert one("json_schema", digits, "", schema=SCHEMA) == 0.0


@pytest.mark.parametrize(
    ("prediction", "expected"),
    [
        ('{"intent": "book", "n": 2}', 1.0),
        ('{"intent": "book", "n": 2.5}', 0.0),
        ('{"intent": "fly"}', 0.0),
        ("{}", 0.0),
        ("nothing", 0.0),
    ],
)
def test_json_schema(prediction: str, expected: float) -> None:
    assert one("json_schema", prediction, "", schema=SCHEMA) == expected


def test_json_schema_honours_its_draft(tmp_path: Path) -> None:
    tuple_schema = {"items": [{"type": "string"}, {"type": "integer"}]}  # an array of schemas: draft 7, not 2020-12
    schema = {"$schema": "http://json-schema.org/draft-07/schema#", **tuple_schema}
    (tmp_path / "s.json").write_text(json.dumps(schema), encoding="utf-8")
    assert one("json_schema", '["a", 1]', "", schema="s.json", base_dir=tmp_path) == 1.0
    assert one("json_schema", '["a", "b"]', "", schema="s.json", base_dir=tmp_path) == 0.0
    with pytest.raises(InputError, match="not valid"):
        build_metric("json_schema", schema=tuple_schema)


@pytest.mark.parametrize(
    ("schema", "says"),
    [
        ({"type": "strin"}, "at /type"),
        ({"$schema": "https://example.org/mine"}, "draft"),
        ({"$schema": 7}, "draft"),
        ({"properties": {"a": {"$ref": "#/$defs/b"}}}, "leads nowhere"),
        ({"allOf": [{"$ref": "https://example.org/s.json"}]}, "leads nowhere"),
        ({"$ref": "#"}, "without end"),
        ("absent.json", "cannot be read"),
        (None, "needs a JSON schema"),
    ],
)
def test_wrong_schemas_are_refused_up_front(schema: Any, says: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=says):
        build_metric("json_schema", schema=schema, base_dir=tmp_path)


def test_references_inside_a_schema_resolve() -> None:
    tree = {
        "$defs": {"node": {"type": "object", "properties": {"next": {"$ref": "#/$defs/node"}}, "required": ["v"]}},
        "$ref": "#/$defs/node",
    }
    assert one("json_schema", '{"v": 1, "next": {"v": 2}}', "", schema=tree) == 1.0
    assert one("json_schema", '{"v": 1, "next": {}}', "", schema=tree) == 0.0


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda children: st.lists(children, max_size=4) | st.dictionaries(st.text(max_size=3), children, max_size=4),
    max_leaves=12,
)


def shuffled(value: Any, random: Any) -> Any:
    if isinstance(value, dict):
        keys = list(value)
        random.shuffle(keys)
        return {key: shuffled(value[key], random) for key in keys}
    return [shuffled(child, random) for child in value] if isinstance(value, list) else value


@given(json_values, st.randoms(use_true_random=False))
def test_key_order_is_free(value: Any, random: Any) -> None:
    text, other = json.dumps(value), json.dumps(shuffled(value, random), indent=1)
    assert one("json_equal", other, text) == one("field_f1", other, text) == 1.0


@given(json_values, json_values)
def test_equal_json_has_all_fields_equal(left: Any, right: Any) -> None:
    texts = json.dumps(left), json.dumps(right)
    forth, back = (one("field_f1", *pair) for pair in (texts, texts[::-1]))
    assert forth == pytest.approx(back)
    if one("json_equal", *texts):
        assert forth == 1.0


# --------------------------------------------------------------------------------------- every metric


@pytest.mark.parametrize("name", METRIC_NAMES)
@given(prediction=st.text(), reference=st.text())
@example(prediction="[" * 5000, reference='{"a": 1}')
@example(prediction="1" * 5000, reference="1" * 300)
@example(prediction="\ud800", reference="\ud800")
@example(prediction="yes", reference="yes")
def test_no_text_breaks_a_metric(name: str, prediction: str, reference: str) -> None:
    metric = BUILT.setdefault(name, build(name))
    if metric.check_reference is not None and metric.check_reference(reference) is not None:
        with pytest.raises(InputError, match=r"test\.jsonl:1"):
            measure(metric, [(prediction, reference)])
        return
    result = measure(metric, [(prediction, reference), (reference, reference)])
    assert ((result.scores >= 0) & (result.scores <= 1)).all()
    assert 0.0 <= result.value <= 1.0


BUILT: dict[str, Metric] = {}


@pytest.mark.parametrize("name", sorted(set(METRIC_NAMES) - {"json_valid", "json_schema", "regex"}))
def test_the_reference_itself_is_a_perfect_answer(name: str) -> None:
    references = {
        "accuracy": "yes",
        "choice": "B",
        "number": "-1,200.5",
        "json_equal": '{"a": [1]}',
        "field_f1": '{"a": [1]}',
    }
    reference = references.get(name, "the quick brown fox jumps over the lazy dog")
    result = measure(build(name), [(reference, reference)] * 2)
    assert result.scores.tolist() == [pytest.approx(1.0)] * 2
    assert result.value == pytest.approx(1.0)


def test_all_unusable_references_are_reported_together() -> None:
    metrics = [build("accuracy"), build("number")]
    with pytest.raises(InputError) as caught:
        check_references(metrics, ["maybe", "yes", "3"], ["r:1", "r:2", "r:3"])
    assert [problem.where for problem in caught.value.problems] == ["r:1", "r:3", "r:1", "r:2"]


def test_scores_of_several_metrics_per_item() -> None:
    items, measured = score_items([build("exact_match"), build("json_valid")], ["a", "1"], ["a", "2"], rows(2))
    assert items == [{"exact_match": 1.0, "json_valid": 0.0}, {"exact_match": 0.0, "json_valid": 1.0}]
    assert measured["exact_match"].row_ids == ("test.jsonl:1", "test.jsonl:2")
    assert measured["exact_match"].unreadable is None
    assert measured["json_valid"].unreadable == 1


@pytest.mark.parametrize(("predictions", "references"), [([], []), (["a"], ["a", "b"])])
def test_lengths_must_agree(predictions: list[str], references: list[str]) -> None:
    with pytest.raises(InputError, match="cannot score"):
        score_items([build("exact_match")], predictions, references, rows(len(predictions)))


def test_unknown_metric_names_the_nearest_and_the_list() -> None:
    with pytest.raises(InputError, match="'rougeL'") as caught:
        build_metric("rouge_l")
    assert all(name in str(caught.value) for name in METRIC_NAMES)


# ---------------------------------------------------------------------------------- the user's own metric


def write_module(folder: Path, name: str, text: str) -> None:
    (folder / f"{name}.py").write_text(text, encoding="utf-8")


def test_user_metric_sees_the_example_and_leaves_sys_path_alone(tmp_path: Path) -> None:
    write_module(
        tmp_path,
        "own_metric_ok",
        "import numpy\n"
        "def half(p, r, e):\n"
        "    second = e['meta']['i'] == 1 and e['row_id'] == 'test.jsonl:2'\n"
        "    return numpy.float32(0.5) if second else p == r\n",
    )
    before = list(sys.path)
    metric = build_metric("python:own_metric_ok:half", base_dir=tmp_path)
    assert sys.path == before
    assert measure(metric, [("a", "a"), ("a", "a")]).scores.tolist() == [1.0, 0.5]


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("return 1.5", "1.5"),
        ("return -1", "-1"),
        ("return float('nan')", "nan"),
        ("return 'good'", "good"),
        ("return None", "NoneType"),
        ("return 10 ** 400", "int"),
        ("raise ValueError('boom')", "ValueError: boom"),
    ],
)
def test_user_metric_errors_name_every_row(body: str, says: str, tmp_path: Path) -> None:
    name = f"own_metric_{abs(hash(body))}"
    write_module(tmp_path, name, f"def score(p, r, e):\n    {body}\n")
    metric = build_metric(f"python:{name}:score", base_dir=tmp_path)
    with pytest.raises(InputError, match=says) as caught:
        measure(metric, [("a", "a"), ("b", "b")])
    assert [problem.where for problem in caught.value.problems] == ["test.jsonl:1", "test.jsonl:2"]


def test_user_modules_that_cannot_be_used(tmp_path: Path) -> None:
    write_module(tmp_path, "own_metric_broken", "1 / 0")
    write_module(tmp_path, "own_metric_names", "def score_row(p, r, e): return 1\nvalue = 3")
    write_module(tmp_path, "json", "def score(p, r, e): return 1")
    for name, says in (
        ("python:own_metric_broken:f", "ZeroDivisionError"),
        ("python:own_metric_absent:f", "ModuleNotFoundError"),
        ("python:own_metric_names:score_rows", "'score_row'"),
        ("python:own_metric_names:value", "no function"),
        ("python:json:score", "already imported"),
        ("python:own_metric_names", "module:function"),
        ("python:../x:f", "module:function"),
    ):
        with pytest.raises(InputError, match=says):
            build_metric(name, base_dir=tmp_path)


def test_measurement_value_of_a_subset_needs_no_text() -> None:
    metric = build_metric("chrf")
    whole, part = measure(metric, TEXTS), measure(metric, TEXTS[:3])
    assert whole.counts is not None and metric.aggregate is not None
    assert metric.aggregate(whole.counts[:3].sum(axis=0)) == pytest.approx(part.value)
    assert whole.counts.dtype == np.float64
