"""Named numbers for the gate, each with the per-item values behind it.

A step that measures something leaves ``measures.json`` in its folder of the run: for each name (``regression.math``,
``safety.bypass_rate``) the file with one line per item, the field that holds the number, and the same items' files
for the base or the best prompt. The gate reads every such file of a run and needs to know no step. Values are read
from the items files, never copied, so a decision and its texts cannot drift apart.

Items are matched by ``row_id``. Repeats of one item (several seeds, several system prompts) are no independent
items: ``group`` names the field they share, and their mean is taken first. An item without a number is an error
here, not a gap: the step that made it can be run again.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ConfigDict, TypeAdapter, ValidationError

from tunegate.errors import InputError, Problem, collecting
from tunegate.evaluation.intervals import UNIT, Range
from tunegate.files import read_json, read_jsonl, update_json
from tunegate.records import Comparison, Score

KINDS = ("proportion", "mean", "ratio", "excess", "count", "scalar")
FILE = "measures.json"
SCHEMA = "Measures/1"


@dataclass(frozen=True, eq=False)
class Measure:
    """One number of the adapter, and the same number of the base or the best prompt on the same items.

    ``kind``: a ``proportion`` (items are 0 or 1) or a ``mean`` of ``values`` (n,), which lie within ``limits``
    (infinite where the scale has no end); a ``ratio`` of two sums, ``values`` over ``weights`` (both (n,), none
    negative); the ``excess`` of the mean of ``values`` over that of ``others``, (m,) values of different items; a
    ``count`` or a ``scalar``: just ``value``, without an interval. ``references`` holds (n,) values of
    other subjects, in the order of the items. ``score`` and ``comparisons`` are intervals that were found when the
    items were at hand, at their own confidence; they stand in where no item values tell the number (corpus scores).
    ``items``: the per-item files, relative to the run, ``""`` being the adapter's own. ``moot``: why the number says
    nothing here; a rule about it then passes. ``got``: how the number reads, where its digits alone do not say it.
    """

    kind: str
    values: np.ndarray | None = None
    references: Mapping[str, np.ndarray] = field(default_factory=dict)
    weights: np.ndarray | None = None
    others: np.ndarray | None = None
    limits: Range = UNIT
    value: float | None = None
    score: Score | None = None
    comparisons: Mapping[str, Comparison] = field(default_factory=dict)
    items: Mapping[str, str] = field(default_factory=dict)
    moot: str = ""
    got: str = ""

    def __post_init__(self) -> None:
        problems = list(self._problems())
        if problems:
            raise InputError(problems)

    def _problems(self) -> Iterable[Problem]:
        where = self.items.get("", "")
        if self.kind not in KINDS:
            yield Problem("unknown kind of measure", where, f"one of {', '.join(KINDS)}", self.kind)
            return
        if self.values is None:
            if self.value is None and self.score is None:
                yield Problem("a measure without a number", where, "values per item, or one value")
            return
        if self.kind in ("count", "scalar"):
            yield Problem(f"a {self.kind} is one value, not one per item", where)
        if self.kind == "ratio" and self.weights is None:
            yield Problem("a ratio needs the weights it divides by", where)
        if self.kind == "excess" and (self.others is None or not len(self.others) or self.references):
            yield Problem("an excess needs the values of other items, and has no reference", where)
        series = {"": self.values, **self.references, **({} if self.weights is None else {"weights": self.weights})}
        for name, values in series.items():
            yield from self._wrong(f"the values of {name}" if name else "the values", values, where)

    def _wrong(self, what: str, values: np.ndarray, where: str) -> Iterable[Problem]:
        assert self.values is not None
        if values.shape != self.values.shape or values.ndim != 1 or not len(values):
            yield Problem(f"{what} do not fit the items", where, f"{self.values.shape}", f"{values.shape}")
        elif not np.isfinite(values).all():
            bad = int((~np.isfinite(values)).sum())
            yield Problem(f"{what} are not all finite", where, got=f"{bad} of {len(values)} are not")
        elif self.kind == "proportion" and not np.isin(values, (0.0, 1.0)).all():
            bad_value = values[~np.isin(values, (0.0, 1.0))][0]
            yield Problem(f"{what} of a proportion are 0 or 1", where, got=str(bad_value))
        elif self.kind == "ratio" and values.min() < 0.0:
            yield Problem(f"{what} of a ratio must not be negative", where, got=str(values.min()))
        elif self.kind in ("mean", "excess") and (values.min() < self.limits[0] or values.max() > self.limits[1]):
            limits = f"{self.limits[0]:g} to {self.limits[1]:g}"
            yield Problem(f"{what} leave their scale", where, limits, f"{values.min():g} to {values.max():g}")

    @property
    def n(self) -> int | None:
        if self.values is not None:
            return len(self.values)
        return self.score.n if self.score is not None else None

    @property
    def estimate(self) -> float:
        """The number itself, as it is reported; NaN if it is not defined."""
        if self.score is not None:
            return self.score.value
        if self.values is None:
            return float(self.value) if self.value is not None else math.nan
        if self.others is not None:
            return float(self.values.mean() - self.others.mean())
        if self.weights is None:
            return float(self.values.mean())
        total = float(self.weights.sum())
        return float(self.values.sum()) / total if total > 0.0 else math.nan


@dataclass(frozen=True)
class Source:
    """Where a measure's values lie: an entry of ``measures.json``.

    ``items``: JSONL file with one object per item, relative to the run; ``field``: dotted path to the number (true
    and false count as 1 and 0); ``where``: only the items whose fields equal these; ``references``: subject → its
    items file, with the same ``row_id``s. ``group``: the field that repeats of an item share; a proportion of repeats
    becomes a mean. ``others``: the items file of an excess. ``limits`` None on a side: no end. Without ``field`` the
    number is ``value``, and ``items`` says which file it comes from.
    """

    kind: str
    items: str
    field: str | None = None
    value: float | None = None
    weights: str | None = None
    group: str | None = None
    others: str | None = None
    where: dict[str, str] = dataclasses.field(default_factory=dict)
    references: dict[str, str] = dataclasses.field(default_factory=dict)
    limits: list[float | None] = dataclasses.field(default_factory=lambda: [0.0, 1.0])


# what pydantic does when it reads the class: nothing is converted, no field is surplus
Source.__pydantic_config__ = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)  # type: ignore[attr-defined]


def save_measures(folder: Path, sources: Mapping[str, Source]) -> None:
    """Write ``measures.json`` into the step's folder; written after the items files that it names."""
    update_json(folder / FILE, {"schema": SCHEMA, "measures": {n: dataclasses.asdict(s) for n, s in sources.items()}})


def load_measures(run: Path) -> dict[str, Measure]:
    """Every measure that the steps of ``run`` left. :class:`InputError` lists all that cannot be read."""
    problems: list[Problem] = []
    found: dict[str, Measure] = {}
    named_by: dict[str, str] = {}
    read = reader(run)
    for path in sorted(run.glob(f"*/{FILE}")):
        sources: dict[str, Source] = {}
        with collecting(problems):
            sources = _sources(path)
        for name, source in sources.items():
            if name in named_by:
                problems.append(Problem(f"{name} is measured twice", str(path), got=f"also in {named_by[name]}"))
                continue
            named_by[name] = str(path)
            with collecting(problems):
                found[name] = read_measure(source, read)
    if problems:
        raise InputError(problems)
    return found


def _sources(path: Path) -> dict[str, Source]:
    try:
        data = read_json(path)
    except (OSError, ValueError, RecursionError) as error:
        raise InputError("cannot read the measures", where=str(path), got=str(error)) from None
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        got = data.get("schema") if isinstance(data, dict) else type(data).__name__
        raise InputError("not a file of measures", where=str(path), expected=SCHEMA, got=str(got))
    try:
        # as JSON: strict validation of Python values takes no mapping for a dataclass
        return TypeAdapter(dict[str, Source]).validate_json(json.dumps(data.get("measures")))
    except ValidationError as error:
        items = error.errors(include_url=False)
        raise InputError(
            [Problem(".".join(map(str, i["loc"])), str(path), i["msg"], repr(i["input"])[:120]) for i in items]
        ) from None


Reader = Callable[[str], list[dict[str, Any]]]


def reader(run: Path) -> Reader:
    """Items files by their path from ``run``, each read once; none outside the folder that holds the run."""
    known: dict[str, list[dict[str, Any]]] = {}

    def read(name: str) -> list[dict[str, Any]]:
        path = run / name
        if not path.resolve().is_relative_to(run.resolve().parent):
            raise InputError("an items file lies outside the task's run folder", where=str(run), got=name)
        if name not in known:
            try:
                known[name] = read_jsonl(path)
            except (OSError, ValueError, RecursionError) as error:
                raise InputError("cannot read the items", where=str(path), got=str(error)) from None
        return known[name]

    return read


def read_measure(source: Source, read: Reader) -> Measure:
    """The measure that ``source`` describes, its values matched item by item with those of the references."""
    low, high = (*source.limits, None, None)[:2]
    limits = (-math.inf if low is None else low, math.inf if high is None else high)
    items = {"": source.items, **source.references}
    if source.field is None:
        return Measure(source.kind, value=source.value, items=items)
    wanted = _series(source, source.items, source.field, read)
    references = {}
    for subject, name in source.references.items():
        series = _series(source, name, source.field, read)
        if set(series) != set(wanted):
            only = sorted(set(series) ^ set(wanted))
            raise InputError(
                f"the items of {subject} are not those of the adapter",
                where=name,
                expected=f"{len(wanted)} items",
                got=f"{len(series)} items; {only[0]} is in one of them only",
            )
        references[subject] = np.array([series[row] for row in wanted])
    weights = None
    if source.weights is not None:
        series = _series(source, source.items, source.weights, read)
        weights = np.array([series[row] for row in wanted])
    others = None
    if source.others is not None:
        others = np.array(list(_series(source, source.others, source.field, read).values()))
        items["others"] = source.others
    kind = "mean" if source.kind == "proportion" and source.group is not None else source.kind
    return Measure(kind, np.array(list(wanted.values())), references, weights, others, limits, items=items)


def _series(source: Source, name: str, field: str, read: Reader) -> dict[str, float]:
    """Item (or group of repeats) → its number, in the order of the file."""
    found: dict[str, list[float]] = {}
    seen: set[str] = set()
    for line, row in enumerate(read(name), start=1):
        if any(str(_at(row, key)) != value for key, value in source.where.items()):
            continue
        where, row_id, value = f"{name}:{line}", _at(row, "row_id"), _at(row, field)
        if not isinstance(row_id, str) or row_id in seen:
            raise InputError("every item needs a row_id of its own", where=where, got=repr(row_id))
        seen.add(row_id)
        if not isinstance(value, (bool, int, float)) or not math.isfinite(value):
            fix = "run the step again: it goes on where it stopped"
            raise InputError(f"no number in {field!r}", where=where, got=repr(value)[:80], fix=fix)
        key = row_id if source.group is None else str(_at(row, source.group))
        found.setdefault(key, []).append(float(value))
    if not found:
        raise InputError("no items to measure", where=name, expected=f"lines with {source.where}" * bool(source.where))
    return {key: sum(values) / len(values) for key, values in found.items()}


def _at(row: Any, path: str) -> Any:
    """The value at a dotted path, None if there is none. A key with dots in it (a metric's name) is found too."""
    if not isinstance(row, dict):
        return None
    if path in row:
        return row[path]
    head, _, rest = path.partition(".")
    return _at(row.get(head), rest) if rest else None
