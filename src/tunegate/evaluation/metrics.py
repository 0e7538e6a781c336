"""Build a metric by name and score answers with it.

The registry maps each name to a function that builds the :class:`Metric` from the task's labels, schema or
pattern. ``python:module:function`` is the user's own: ``(prediction: str, reference: str, example: dict)`` to a
number in [0, 1] or a bool. Its module is imported from the task's folder, which stands on ``sys.path`` for the
import only.

References are checked before the first answer is generated (:func:`check_references`), so that a bad one costs
no compute. Intervals and comparisons are in ``statistics``.
"""

from __future__ import annotations

import dataclasses
import importlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tunegate.data.types import Example
from tunegate.errors import InputError, Problem, nearest
from tunegate.evaluation import metrics_json, metrics_text
from tunegate.evaluation.metrics_json import Schema
from tunegate.evaluation.metrics_text import shorten
from tunegate.evaluation.types import Item, Measurement, Metric

PYTHON_PREFIX = "python:"


@dataclass(frozen=True)
class _Options:
    """What a builder may need; it asks only for its own."""

    labels: Sequence[str] | None
    schema: Schema | str | Path | None
    pattern: str | None
    base_dir: Path

    def need_labels(self) -> Sequence[str]:
        if self.labels is None:
            raise InputError("metric accuracy needs the set of labels", where="task.labels")
        return self.labels

    def need_schema(self) -> Schema | str | Path:
        if self.schema is None:
            raise InputError("metric json_schema needs a JSON schema", where="task.json_schema")
        return self.schema

    def need_pattern(self) -> str:
        if self.pattern is None:
            raise InputError("metric regex needs a regular expression", where="task.pattern")
        return self.pattern


_BUILDERS: dict[str, Callable[[_Options], Metric]] = {
    "exact_match": lambda _: metrics_text.exact_match_metric(),
    "accuracy": lambda options: metrics_text.accuracy_metric(options.need_labels()),
    "token_f1": lambda _: metrics_text.token_f1_metric(),
    "rouge1": lambda _: metrics_text.rouge_metric("rouge1"),
    "rouge2": lambda _: metrics_text.rouge_metric("rouge2"),
    "rougeL": lambda _: metrics_text.rouge_metric("rougeL"),
    "bleu": lambda _: metrics_text.bleu_metric(),
    "chrf": lambda _: metrics_text.chrf_metric(),
    "json_valid": lambda _: metrics_json.json_valid_metric(),
    "json_schema": lambda options: metrics_json.json_schema_metric(options.need_schema(), options.base_dir),
    "json_equal": lambda _: metrics_json.json_equal_metric(),
    "field_f1": lambda _: metrics_json.field_f1_metric(),
    "number": lambda _: metrics_text.number_metric(),
    "choice": lambda _: metrics_text.choice_metric(),
    "regex": lambda options: metrics_text.regex_metric(options.need_pattern()),
    "contains": lambda _: metrics_text.contains_metric(),
}

METRIC_NAMES: tuple[str, ...] = tuple(_BUILDERS)


def build_metric(
    name: str,
    *,
    labels: Sequence[str] | None = None,
    schema: Schema | str | Path | None = None,
    pattern: str | None = None,
    base_dir: Path | str | None = None,
) -> Metric:
    """The metric called ``name``; :class:`InputError` if it is unknown or lacks what it needs.

    ``labels`` is for accuracy, ``schema`` (a mapping or a file) for json_schema, ``pattern`` for regex; other
    metrics ignore them. ``base_dir`` is the folder that schema files and Python modules are looked for in,
    default the current one.
    """
    options = _Options(labels, schema, pattern, Path(base_dir) if base_dir is not None else Path.cwd())
    if name.startswith(PYTHON_PREFIX):
        return _user_metric(name, options.base_dir)
    if name not in _BUILDERS:
        known = f"one of {', '.join(METRIC_NAMES)}, or {PYTHON_PREFIX}module:function"
        raise InputError(f"unknown metric {name!r}", expected=known, fix=nearest(name, METRIC_NAMES) or "see the list")
    return _BUILDERS[name](options)


def check_references(metrics: Sequence[Metric], references: Sequence[str], row_ids: Sequence[str]) -> None:
    """:class:`InputError` with every reference that one of the metrics cannot score against."""
    problems = [
        Problem(text, where=row_id, expected=f"a reference that metric {metric.name} can score against")
        for metric in metrics
        if metric.check_reference is not None
        for reference, row_id in zip(references, row_ids, strict=True)
        if (text := metric.check_reference(reference)) is not None
    ]
    if problems:
        raise InputError(problems)


def score_items(
    metrics: Sequence[Metric],
    predictions: Sequence[str],
    references: Sequence[str],
    examples: Sequence[Example],
) -> tuple[list[dict[str, float]], dict[str, Measurement]]:
    """Score n answers: one ``{metric: score}`` per item, and one :class:`Measurement` per metric.

    The three sequences run in parallel. :class:`InputError` if their lengths differ, if there is no item, if a
    reference cannot be scored against, or if a user's metric fails on a row (every such row is named).
    """
    lengths = {"predictions": len(predictions), "references": len(references), "examples": len(examples)}
    if len(set(lengths.values())) > 1 or not predictions:
        raise InputError("cannot score", expected="as many of each, at least one", got=str(lengths))
    row_ids = tuple(example.row_id for example in examples)
    check_references(metrics, references, row_ids)
    items = [
        Item(prediction, reference, example)
        for prediction, reference, example in zip(predictions, references, examples, strict=True)
    ]
    measurements = {metric.name: _measure(metric, items, row_ids) for metric in metrics}
    rows = [
        {name: float(measurement.scores[i]) for name, measurement in measurements.items()} for i in range(len(items))
    ]
    return rows, measurements


def _measure(metric: Metric, items: Sequence[Item], row_ids: tuple[str, ...]) -> Measurement:
    scores = np.zeros(len(items), dtype=np.float64)
    problems: list[Problem] = []
    for i, item in enumerate(items):
        try:
            scores[i] = metric.per_item(item)
        except InputError as error:
            problems += error.problems
    if problems:
        raise InputError(problems)
    counts = None
    if metric.counts is not None:
        counts = np.array([metric.counts(item) for item in items], dtype=np.float64)
    unreadable = None
    if metric.readable is not None:
        unreadable = sum(not metric.readable(item.prediction) for item in items)
    return Measurement(metric.name, row_ids, scores, counts, metric.aggregate, unreadable)


def _user_metric(name: str, base_dir: Path) -> Metric:
    function = _import_function(name, base_dir.resolve())

    def per_item(item: Item) -> float:
        example = {"row_id": item.row_id, **dataclasses.asdict(item.example)}
        try:
            value = function(item.prediction, item.reference, example)
        except Exception as error:
            raise InputError(
                f"metric {name} failed", where=item.row_id, got=f"{type(error).__name__}: {error}"
            ) from error
        if isinstance(value, (int, float, np.number, np.bool_)) and 0 <= value <= 1:
            return float(value)
        raise InputError(
            f"metric {name} gave no score",
            where=item.row_id,
            expected="a number from 0 to 1, or a bool",
            got=f"{shorten(repr(value))[1:-1]} ({type(value).__name__})",
        )

    return Metric(name, per_item)


def _import_function(name: str, folder: Path) -> Callable[[str, str, dict[str, Any]], Any]:
    parts = name.removeprefix(PYTHON_PREFIX).split(":")
    if len(parts) != 2 or not all(part.isidentifier() for part in (*parts[0].split("."), parts[1])):
        raise InputError(f"not the name of a function: {name!r}", expected="python:module:function")
    module_name, function_name = parts
    sys.path.insert(0, str(folder))
    try:
        importlib.invalidate_caches()
        module = importlib.import_module(module_name)
    except Exception as error:
        raise InputError(
            f"cannot import module {module_name!r}",
            where=name,
            expected=f"a module in {folder} or an installed one",
            got=f"{type(error).__name__}: {error}",
        ) from error
    finally:
        sys.path.remove(str(folder))
    _check_origin(module, name, folder)
    function = getattr(module, function_name, None)
    if not callable(function):
        callables = [key for key, value in vars(module).items() if callable(value)]
        raise InputError(
            f"module {module_name!r} has no function {function_name!r}",
            where=name,
            fix=nearest(function_name, callables) or "define it as (prediction, reference, example) -> float",
        )
    return function


def _check_origin(module: Any, name: str, folder: Path) -> None:
    """Refuse a module of the same name that was imported before from elsewhere: it would score instead."""
    stem = folder.joinpath(*module.__name__.split("."))
    beside = [path for path in (stem.with_name(stem.name + ".py"), stem / "__init__.py") if path.is_file()]
    loaded = Path(getattr(module, "__file__", None) or "built-in").resolve()
    if beside and loaded not in [path.resolve() for path in beside]:
        raise InputError(
            f"another module named {module.__name__!r} is already imported",
            where=name,
            expected=str(beside[0]),
            got=str(loaded),
            fix="give the file another name",
        )
