"""The plain records that cross module borders, as JSON with a schema version.

A record is written once and never edited. Reading refuses an unknown schema version, unknown or missing fields and
values of another type, so that an old tool never half-understands a new file.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ConfigDict, TypeAdapter, ValidationError

from tunegate.errors import InputError, Problem
from tunegate.files import read_json, write_json

SCHEMA_VERSION = 1

T = TypeVar("T")


def _record(kind: type[T]) -> type[T]:
    """What pydantic does when it reads this class: nothing is converted, no field is surplus."""
    kind.__pydantic_config__ = ConfigDict(extra="forbid", strict=True)  # type: ignore[attr-defined]
    return kind


@_record
@dataclass(frozen=True)
class Score:
    """A metric over ``n`` items with its confidence interval. ``value`` and the bounds share the metric's unit;
    ``method`` says how the interval was found."""

    metric: str
    value: float
    n: int
    low: float
    high: float
    confidence: float = 0.95
    method: str = ""


@_record
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
    method: str = ""


@_record
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


@_record
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


@_record
@dataclass(frozen=True)
class RuleResult:
    """One gate rule: ``verdict`` is pass, fail or inconclusive.

    ``value`` is what was compared with ``threshold`` (a score, a gain or a ratio, as the rule says), ``low`` and
    ``high`` its interval at ``confidence`` by ``method``, None where there is none or the scores set no limit.
    ``items``: the per-item files behind the number, relative to the run folder. ``needed``: about how many items
    like these would decide, None where it is decided or no number would. A rule that is not ``required`` is reported
    and does not count.
    """

    rule: str
    verdict: str
    expected: str
    got: str
    reason: str
    metric: str = ""
    value: float | None = None
    threshold: float | None = None
    low: float | None = None
    high: float | None = None
    confidence: float | None = None
    n: int | None = None
    method: str = ""
    items: list[str] = dataclasses.field(default_factory=list)
    needed: int | None = None
    required: bool = True


@_record
@dataclass(frozen=True)
class Decision:
    """The gate's verdict: ship, hold or inconclusive, with a reason per rule.

    ``correction``: whether the rules' confidence levels were corrected for their number (none or holm).
    """

    verdict: str
    rules: list[RuleResult]
    policy_hash: str
    correction: str = "none"


@_record
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


@_record
@dataclass(frozen=True)
class Ratio:
    """Candidate over reference on the same ``n`` items, with the interval that the gate takes (``method``).

    ``value`` is None where the reference's mean is 0, ``high`` where no bound exists. ``candidate`` and
    ``reference`` are the two means, in the measure's unit.
    """

    name: str
    value: float | None
    low: float
    high: float | None
    candidate: float
    reference: float
    n: int
    confidence: float
    method: str


@_record
@dataclass(frozen=True)
class RegressionRecord:
    """What an adapter kept of its base's general ability, per domain and in all (``total``).

    ``accuracy`` and ``likelihood`` are ratios to the base: of the share of right answers, and of the mean probability
    per reference token (its geometric mean within an item). ``comparisons`` are the paired differences of accuracy.
    ``divergence`` is KL(base || adapter) on neutral text, nats per token, as a mean with its interval; None if it was
    not measured. ``worst`` lists the items that lost most. ``sets`` maps each set's name to its hash.
    """

    reference: str
    candidate: str
    sets: dict[str, str]
    accuracy: dict[str, Ratio]
    likelihood: dict[str, Ratio]
    comparisons: dict[str, Comparison]
    divergence: dict[str, float] | None
    worst: list[dict[str, Any]]
    items_paths: dict[str, str]
    settings: dict[str, Any]


@_record
@dataclass(frozen=True)
class SafetyMeasure:
    """One rate (``bypass_rate``, ``over_refusal`` or ``coherence``) in one category, or in ``total``.

    The scores and the comparison take the share of a prompt's attempts. A prompt counts as hit if at least one of its
    attempts is: ``gained`` prompts are hit with the candidate only, ``lost`` with the reference only, and ``p_value``
    is McNemar's exact one for the two.
    """

    measure: str
    category: str
    reference: Score
    candidate: Score
    comparison: Comparison
    gained: int
    lost: int
    p_value: float


@_record
@dataclass(frozen=True)
class SafetyRecord:
    """Refusals of base and adapter on the same prompts, system prompts and seeds.

    ``measures`` holds ``total`` first and then the categories. ``worst`` lists answers to harmful prompts that the
    adapter gave and the base did not. ``judged_by`` is ``rules`` or the guard's model name.
    """

    reference: str
    candidate: str
    sets: dict[str, str]
    attempts: int
    judged_by: str
    measures: list[SafetyMeasure]
    worst: list[dict[str, Any]]
    items_paths: dict[str, str]
    settings: dict[str, Any]

    def measure(self, name: str, category: str = "total") -> SafetyMeasure | None:
        """The measure ``name`` in ``category``; None if there were no items for it."""
        return next((m for m in self.measures if (m.measure, m.category) == (name, category)), None)


@_record
@dataclass(frozen=True)
class JudgeRecord:
    """What a judge model said of one subject's answers (an adapter's, or its base's) and of others' to the same items.

    ``mean`` (1 to 5) and ``pass_rate`` are by subject, the first being what was judged; ``comparisons`` are its scores
    minus the others', item by item. ``win_rate``: pairs won against ``against``, a tie counts half; ``consistent``: the
    share of pairs in which both orders named the same side; None without pairs. ``alpha``: agreement of the judge's
    own samples, None where it is not defined. ``cost``: $ for these replies, whenever they were paid; None without
    prices. ``worst`` lists the items with the lowest scores, with their reasons.
    """

    provider: str
    model: str
    rubric: str
    pass_at: float
    split: str
    samples: int
    mean: dict[str, Score]
    pass_rate: dict[str, Score]
    comparisons: dict[str, Comparison]
    against: str
    win_rate: Score | None
    consistent: float | None
    alpha: float | None
    cost: float | None
    worst: list[dict[str, Any]]
    items_paths: dict[str, str]
    settings: dict[str, Any]


@_record
@dataclass(frozen=True)
class SweepPoint:
    """One evaluation of a sweep's trial on the validation split, after ``step`` steps.

    ``parameters`` are the trained ones. ``forgetting`` is KL(base || adapter) on neutral text, nats per token (``kl``
    with ``kl_low`` and ``kl_high``); None if it was not measured at this step. ``items_path``: relative to the sweep's
    folder.
    """

    epoch: float
    step: int
    parameters: int
    score: Score
    valid_loss: float | None
    forgetting: dict[str, float] | None
    items_path: str


@_record
@dataclass(frozen=True)
class SweepTrial:
    """One rank: a run folder ``run``. ``status`` is complete, pruned, cut off, not needed or not started.

    ``kept`` is the step of the best point. ``gain`` compares it with the best of the rank ``lower``; ``raised`` says
    whether that is significant; all None where they were not compared. ``regression`` is the share of right answers
    against the base's, where the task asks for it and the training is complete.
    """

    rank: int
    alpha: float
    run: str
    status: str
    points: list[SweepPoint]
    kept: int | None
    lower: int | None
    gain: Comparison | None
    raised: bool | None
    regression: Ratio | None
    seconds: float | None


@_record
@dataclass(frozen=True)
class SweepRecord:
    """Rank x epochs on one task. ``level`` is the confidence of one comparison: ``confidence`` corrected for the raises
    that were planned.

    ``curve`` is the fitted forgetting over trained parameters * steps with its band, None where it could not be
    fitted (``curve_reason``). ``finished``: nothing is left to decide. ``recommended`` names rank, epoch, step and run,
    None before the lowest rank is complete; ``settings`` are its lines for the task file.
    """

    name: str
    metric: str
    confidence: float
    level: float
    epochs: float
    trials: list[SweepTrial]
    curve: dict[str, Any] | None
    curve_reason: str
    finished: bool
    recommended: dict[str, Any] | None
    reason: str
    settings: dict[str, Any]


def to_json(record: Any) -> dict[str, Any]:
    """A record as JSON data, with its kind and schema version."""
    return {"schema": f"{type(record).__name__}/{SCHEMA_VERSION}", **dataclasses.asdict(record)}


def save(path: Path | str, record: Any) -> None:
    write_json(path, to_json(record))


def load(path: Path | str, kind: type[T]) -> T:
    """Read a record of ``kind``; :class:`InputError` if the file holds another kind, version or field set."""
    try:
        data = read_json(path)
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise InputError(Problem("cannot read the record", str(path), f"a {kind.__name__} in JSON", reason)) from None
    return from_json(data, kind, str(path))


def from_json(data: Any, kind: type[T], where: str) -> T:
    """The record of ``kind`` that :func:`to_json` made ``data`` of; :class:`InputError` as :func:`load`."""
    expected = f"{kind.__name__}/{SCHEMA_VERSION}"
    fields = dict(data) if isinstance(data, dict) else {}
    got = fields.pop("schema", None)
    if got != expected:
        raise InputError("not a record of this kind", where=where, expected=expected, got=str(got))
    try:
        record: T = _reader(kind).validate_json(json.dumps(fields))  # type: ignore[arg-type]  # classes can be hashed
        return record
    except ValidationError as error:
        raise InputError([_problem(dict(item), where) for item in error.errors(include_url=False)]) from None


@functools.cache
def _reader(kind: type[Any]) -> TypeAdapter[Any]:
    """Building one takes pydantic ten times as long as reading a record with it."""
    return TypeAdapter(kind)


def _problem(item: dict[str, Any], where: str) -> Problem:
    name = ".".join(str(part) for part in item["loc"])
    if item["type"] == "unexpected_keyword_argument":
        return Problem(f"unknown field {name!r}", where)
    if item["type"] == "missing":
        return Problem(f"missing field {name!r}", where)
    return Problem(f"field {name!r} has a wrong value", where, item["msg"], repr(item["input"])[:120])
