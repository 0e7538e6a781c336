"""The plain records that cross module borders, as JSON with a schema version.

A record is written once and never edited. Reading refuses an unknown schema version and unknown or missing
fields, so that an old tool never half-understands a new file.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from tunegate.errors import InputError, Problem
from tunegate.files import read_json, write_json

SCHEMA_VERSION = 1

T = TypeVar("T")


@dataclass(frozen=True)
class Score:
    """A metric over ``n`` items with its confidence interval. ``value`` and the bounds share the metric's unit."""

    metric: str
    value: float
    n: int
    low: float
    high: float
    confidence: float = 0.95


@dataclass(frozen=True)
class Comparison:
    """Candidate minus reference on the same items, pairwise. ``p_value`` is two-sided."""

    metric: str
    reference: str
    difference: float
    low: float
    high: float
    n: int
    p_value: float
    wins: int
    losses: int
    ties: int


@dataclass(frozen=True)
class EvalRecord:
    """One subject (base, prompt or adapter) on one split.

    ``hashes`` holds base, template, data and, where there is one, adapter and prompt. ``items_path`` is the
    JSONL with one line per item: ``{"row_id", "prediction", "reference", "scores": {metric: float}, "stopped"}``.
    ``stop_rate`` is the share of answers that ended with the end-of-turn token.
    """

    subject: str
    split: str
    primary: str
    scores: dict[str, Score]
    stop_rate: float
    items_path: str
    hashes: dict[str, str]
    settings: dict[str, Any]
    seconds: float
    generated_tokens: int
    loss: float | None = None
    step: int | None = None

    @property
    def score(self) -> Score:
        return self.scores[self.primary]


@dataclass(frozen=True)
class RunRecord:
    """What a training run did.

    ``train_loss`` and ``valid_loss`` are nats per target token at the best step. ``tokens`` counts the rows' tokens;
    ``computed_tokens`` is smaller where rows shared a prefix; ``tokens_per_second`` is tokens over ``seconds``,
    the time spent in steps.
    """

    config_hash: str
    method: str
    steps: int
    epochs: float
    best_step: int
    best_score: float
    train_loss: float | None
    valid_loss: float | None
    stopped_early: bool
    trainable_parameters: int
    base_parameters: int
    tokens: int
    computed_tokens: int
    target_tokens: int
    seconds: float
    tokens_per_second: float
    peak_rss_bytes: int
    device: str
    compute_dtype: str
    path: str


@dataclass(frozen=True)
class RuleResult:
    """One gate rule: ``verdict`` is pass, fail or inconclusive."""

    rule: str
    verdict: str
    expected: str
    got: str
    reason: str


@dataclass(frozen=True)
class Decision:
    """The gate's verdict: ship, hold or inconclusive, with a reason per rule."""

    verdict: str
    rules: list[RuleResult]
    policy_hash: str


@dataclass(frozen=True)
class AdapterCard:
    """Everything that travels with an adapter. ``golden`` pins prompts to their token ids."""

    name: str
    base: dict[str, Any]
    adapter: dict[str, Any]
    data: dict[str, Any]
    template: dict[str, Any]
    config: dict[str, Any]
    origins: dict[str, str]
    run: RunRecord
    evaluations: list[EvalRecord]
    comparisons: list[Comparison]
    decision: Decision
    test_openings: list[dict[str, Any]]
    versions: dict[str, str]
    git: str | None
    created: str


def to_json(record: Any) -> dict[str, Any]:
    """A record as JSON data, with its kind and schema version."""
    return {"schema": f"{type(record).__name__}/{SCHEMA_VERSION}", **dataclasses.asdict(record)}


def save(path: Path | str, record: Any) -> None:
    write_json(path, to_json(record))


def load(path: Path | str, kind: type[T]) -> T:
    """Read a record of ``kind``; :class:`InputError` if the file holds another kind, version or field set."""
    data = read_json(path)
    expected = f"{kind.__name__}/{SCHEMA_VERSION}"
    got = data.pop("schema", None) if isinstance(data, dict) else None
    if got != expected:
        raise InputError("not a record of this kind", where=str(path), expected=expected, got=str(got))
    return _build(kind, data, str(path))


_NESTED: dict[tuple[str, str], tuple[str, type]] = {
    ("EvalRecord", "scores"): ("dict", Score),
    ("Decision", "rules"): ("list", RuleResult),
    ("AdapterCard", "run"): ("one", RunRecord),
    ("AdapterCard", "evaluations"): ("list", EvalRecord),
    ("AdapterCard", "comparisons"): ("list", Comparison),
    ("AdapterCard", "decision"): ("one", Decision),
}


def _build(kind: Any, data: dict[str, Any], where: str) -> Any:
    fields = {f.name: f for f in dataclasses.fields(kind)}
    required = {
        name
        for name, f in fields.items()
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    }
    problems = [Problem(f"unknown field {name!r}", where) for name in data if name not in fields]
    problems += [Problem(f"missing field {name!r}", where) for name in sorted(required - set(data))]
    if problems:
        raise InputError(problems)
    values: dict[str, Any] = {}
    for name, value in data.items():
        shape, inner = _NESTED.get((kind.__name__, name), ("plain", object))
        if shape == "one":
            value = _build(inner, value, where)
        elif shape == "list":
            value = [_build(inner, item, where) for item in value]
        elif shape == "dict":
            value = {key: _build(inner, item, where) for key, item in value.items()}
        values[name] = value
    return kind(**values)
