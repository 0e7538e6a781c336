"""What an adapter kept of its base's general ability (catastrophic forgetting).

:func:`measure` asks one subject every item of some sets: greedy answers are checked by the item's own rule, fixed
choices are compared by likelihood, and the mean log-likelihood per token of each item's reference is taken, which
moves long before an answer flips. :func:`compare_regression` puts base and adapter side by side, item by item: ratio
to the base with a paired bootstrap interval, per domain and in all, and the items that lost most. ``divergence`` adds
what the adapter does to neutral text.

Code is run only with ``run_code``, see ``sandbox``. Whether a ratio is good enough is the gate's question.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from tunegate.errors import InputError, Problem
from tunegate.evaluation import intervals
from tunegate.evaluation.answering import Model, Progress, Reply, likelihoods, reply, silent
from tunegate.evaluation.checks import score_answer, unfenced
from tunegate.evaluation.divergence import TextDivergence
from tunegate.evaluation.measures import Source
from tunegate.evaluation.sandbox import SECONDS, check_available, run_tests
from tunegate.evaluation.sets import ItemSet, SetItem
from tunegate.evaluation.statistics import compare
from tunegate.evaluation.types import Measurement
from tunegate.files import read_jsonl, write_jsonl
from tunegate.records import Comparison, Ratio, RegressionRecord

TOTAL = "total"
RESERVED = (TOTAL, "likelihood", "divergence")  # names of measures; no domain is called so
WORST = 10
LOWEST = -50.0  # nats per token: below it a likelihood says nothing more
_ANY = (-math.inf, math.inf)


@dataclass
class ItemResult:
    """One item's outcome. ``score`` is 0 or 1; ``log_likelihood`` is nats per token of the first reference, None
    without one; ``note`` says why code failed."""

    item: str
    domain: str
    reference: str
    prediction: str = ""
    score: float = 0.0
    stopped: bool = True
    tokens: int = 0
    log_likelihood: float | None = None
    note: str = ""

    @property
    def likelihood(self) -> float | None:
        """Geometric mean probability per token of the reference."""
        return None if self.log_likelihood is None else math.exp(min(self.log_likelihood, 0.0))

    def row(self) -> dict[str, Any]:
        """The item's line in an items file; ``item`` is its ``row_id``."""
        facts = {name: value for name, value in asdict(self).items() if name != "item"}
        return {"row_id": self.item, **facts, "likelihood": self.likelihood, "referenced": self.likelihood is not None}


@dataclass(frozen=True)
class Measured:
    """One subject on some sets. ``sets`` maps names to hashes; results are in the sets' order."""

    subject: str
    sets: dict[str, str]
    results: tuple[ItemResult, ...]
    settings: dict[str, Any]
    seconds: float = 0.0
    items_path: str = ""

    def places(self) -> dict[str, list[int]]:
        """Places of the results per domain, and all of them as ``total``, which comes first."""
        found: dict[str, list[int]] = {TOTAL: list(range(len(self.results)))}
        for place, result in enumerate(self.results):
            found.setdefault(result.domain, []).append(place)
        return found

    def rates(self) -> dict[str, float]:
        """Share of right answers per domain and in ``total``."""
        return {name: float(np.mean([self.results[p].score for p in at])) for name, at in self.places().items()}


def read_results(path: Path) -> tuple[ItemResult, ...]:
    """The results that :func:`measure` wrote to ``path``."""
    names = {f.name for f in fields(ItemResult)} - {"item"}
    return tuple(ItemResult(row["row_id"], **{n: row[n] for n in names}) for row in read_jsonl(path))


def regression_measures(base: Measured, adapter: Measured, files: tuple[str, str], texts: str) -> dict[str, Source]:
    """What the gate may read: ``regression.DOMAIN`` and ``.total`` (share of right answers), ``.likelihood.DOMAIN``
    and ``.likelihood.total``, and ``.divergence`` if ``texts`` is the file with one line per neutral text.

    ``files``: the items of base and adapter, relative to the run.
    """
    theirs, mine = files
    found = {}
    for domain, places in base.places().items():
        results = [one.results[p] for p in places for one in (base, adapter)]
        where = {} if domain == TOTAL else {"domain": domain}
        kind = "proportion" if all(r.score in (0.0, 1.0) for r in results) else "mean"
        name = metric_name(domain)
        found[f"regression.{name}"] = Source(kind, mine, "score", where=where, references={"base": theirs})
        if any(r.likelihood is not None for r in results):
            found[f"regression.likelihood.{name}"] = Source(
                "mean", mine, "likelihood", where={**where, "referenced": "True"}, references={"base": theirs}
            )
    if texts:
        found["regression.divergence"] = Source("mean", texts, "kl", limits=[0.0, None])
    return found


def metric_name(domain: str) -> str:
    """``domain`` as gate rules write it: anything but letters, digits, ``_`` and ``:`` is ``_``."""
    return re.sub(r"[^A-Za-z0-9_:]", "_", domain)


def check_sets(sets: Sequence[ItemSet], *, run_code: bool) -> None:
    """:class:`InputError` for sets that cannot be scored as they are: empty, reserved names, code without consent."""
    problems = [Problem("the set has no items", one.name) for one in sets if not one.items]
    if not sets:
        problems.append(Problem("no sets to measure on"))
    for one in sets:
        taken = {item.category for item in one.items} & set(RESERVED)
        problems += [Problem(f"the category {name!r} is reserved", one.name, fix="rename it") for name in sorted(taken)]
        code = sum(item.check.kind == "python" for item in one.items)
        if code and not run_code:
            problems.append(
                Problem(
                    f"{code} items are scored by running code that the model wrote",
                    one.name,
                    expected="consent: run_code: true",
                    fix="give it, best inside a container without a network, or leave the set out",
                )
            )
    if problems:
        raise InputError(problems)
    if any(item.check.kind == "python" for one in sets for item in one.items):
        check_available()


def measure(
    model: Model,
    sets: Sequence[ItemSet],
    *,
    subject: str,
    run_code: bool = False,
    items_path: Path | None = None,
    progress: Progress = silent,
) -> Measured:
    """Ask what is in place (base or adapter) every item of ``sets``; write one line per item to ``items_path``.

    ``progress`` is told of :func:`steps` steps in all.
    """
    started = time.perf_counter()
    check_sets(sets, run_code=run_code)
    items = [item for one in sets for item in one.items]
    results = [ItemResult(i.name, i.category, i.references[0] if i.references else "") for i in items]
    _choose(model, items, results, progress)
    _answer(model, items, results, progress)
    _likelihood(model, items, results, progress)
    path = ""
    if items_path is not None:
        write_jsonl(items_path, [result.row() for result in results])
        path = f"{items_path.parent.name}/{items_path.name}"
    settings = {"temperature": 0.0, "run_code": run_code}
    hashes = {one.name: one.hash for one in sets}
    return Measured(subject, hashes, tuple(results), settings, time.perf_counter() - started, path)


def steps(sets: Sequence[ItemSet]) -> int:
    """How far :func:`measure` counts: one for each answer or choice, one for each likelihood."""
    items = [item for one in sets for item in one.items]
    picks = sum(len(item.check.options["choices"]) for item in items if item.check.kind == "likelihood")
    return picks + sum(item.check.kind != "likelihood" for item in items) + sum(bool(item.references) for item in items)


def _choose(model: Model, items: Sequence[SetItem], results: Sequence[ItemResult], progress: Progress) -> None:
    """Items with fixed choices: the one with the highest summed log-likelihood is the prediction."""
    places = [n for n, item in enumerate(items) if item.check.kind == "likelihood"]
    pairs = [(items[n].messages, choice) for n in places for choice in items[n].check.options["choices"]]
    found = iter(likelihoods(model, pairs, progress))
    for n in places:
        choices = items[n].check.options["choices"]
        totals = [next(found).total for _ in choices]
        results[n].prediction = choices[int(np.argmax(totals))]
        results[n].score = float(results[n].prediction in items[n].references)


def _answer(model: Model, items: Sequence[SetItem], results: Sequence[ItemResult], progress: Progress) -> None:
    places = [n for n, item in enumerate(items) if item.check.kind != "likelihood"]
    limits = [items[n].max_new_tokens for n in places]
    replies = reply(model, [items[n].messages for n in places], limits, progress=progress)
    for n, given in zip(places, replies, strict=True):
        _judge(items[n], given, results[n])


def _judge(item: SetItem, given: Reply, result: ItemResult) -> None:
    result.prediction, result.stopped, result.tokens = given.text, given.stopped, given.tokens
    if item.check.kind == "python":
        options = item.check.options
        ran = run_tests(unfenced(given.text), options["tests"], seconds=float(options.get("timeout", SECONDS)))
        result.score, result.note = float(ran.passed), ran.reason
    else:
        result.score = score_answer(item.check, given.text, item.references)


def _likelihood(model: Model, items: Sequence[SetItem], results: Sequence[ItemResult], progress: Progress) -> None:
    places = [n for n, item in enumerate(items) if item.references]
    found = likelihoods(model, [(items[n].messages, items[n].references[0]) for n in places], progress)
    for n, one in zip(places, found, strict=True):
        results[n].log_likelihood = max(one.mean, LOWEST)


def compare_regression(
    base: Measured,
    adapter: Measured,
    confidence: float = 0.95,
    *,
    divergence: Sequence[TextDivergence] | None = None,
) -> RegressionRecord:
    """Adapter against base on the same items; :class:`InputError` if the items are not the same."""
    _check_same(base, adapter)
    mine, theirs = (np.array([r.score for r in one.results]) for one in (adapter, base))
    accuracy, comparisons, likelihood = {}, {}, {}
    for domain, places in base.places().items():
        accuracy[domain] = _ratio(domain, mine[places], theirs[places], confidence)
        comparisons[domain] = _compared(domain, adapter, base, places, confidence)
        pairs = [(adapter.results[p].likelihood, base.results[p].likelihood) for p in places]
        known = np.array([pair for pair in pairs if None not in pair], dtype=float)
        if len(known):
            likelihood[domain] = _ratio(domain, known[:, 0], known[:, 1], confidence)
    return RegressionRecord(
        reference=base.subject,
        candidate=adapter.subject,
        sets=base.sets,
        accuracy=accuracy,
        likelihood=likelihood,
        comparisons=comparisons,
        divergence=None if divergence is None else summarise_divergence(divergence, confidence),
        worst=worst_items(base, adapter),
        items_paths={one.subject: one.items_path for one in (base, adapter)},
        settings={**base.settings, "confidence": confidence},
    )


def _ratio(name: str, candidate: np.ndarray, reference: np.ndarray, confidence: float) -> Ratio:
    found = intervals.ratio(candidate, reference, confidence)
    return Ratio(
        name,
        found.value if math.isfinite(found.value) else None,
        found.low,
        found.high if math.isfinite(found.high) else None,
        float(candidate.mean()),
        float(reference.mean()),
        found.n,
        confidence,
        found.method,
    )


def summarise_divergence(texts: Sequence[TextDivergence], confidence: float = 0.95) -> dict[str, float]:
    """Mean KL per token over texts (each text counts once) with its interval, and the change of log-likelihood."""
    kl = np.array([t.kl for t in texts])
    gains = np.array([t.adapter_log_likelihood - t.base_log_likelihood for t in texts])
    moved, change = intervals.mean(kl, confidence, (0.0, math.inf)), intervals.mean(gains, confidence, _ANY)
    return {
        "kl": moved.value,
        "kl_low": moved.low,
        "kl_high": moved.high if math.isfinite(moved.high) else moved.value,
        "largest_kl": float(kl.max()),
        "log_likelihood_change": change.value,
        "log_likelihood_change_low": change.low if math.isfinite(change.low) else change.value,
        "log_likelihood_change_high": change.high if math.isfinite(change.high) else change.value,
        "texts": float(len(texts)),
        "tokens": float(sum(t.tokens for t in texts)),
    }


def worst_items(base: Measured, adapter: Measured, n: int = WORST) -> list[dict[str, Any]]:
    """The ``n`` items that lost most: right answers turned wrong first, then by likelihood lost."""
    losses = []
    for before, after in zip(base.results, adapter.results, strict=True):
        change = 0.0
        if before.log_likelihood is not None and after.log_likelihood is not None:
            change = after.log_likelihood - before.log_likelihood
        if after.score < before.score or (after.score == before.score and change < 0):
            losses.append((after.score - before.score, change, before, after))
    losses.sort(key=lambda loss: (loss[0], loss[1], loss[2].item))
    return [
        {
            "item": before.item,
            "domain": before.domain,
            "reference": before.reference,
            "base_answer": before.prediction,
            "adapter_answer": after.prediction,
            "base_score": before.score,
            "adapter_score": after.score,
            "log_likelihood_change": change,
        }
        for _, change, before, after in losses[:n]
    ]


def _compared(domain: str, adapter: Measured, base: Measured, places: list[int], confidence: float) -> Comparison:
    def measurement(one: Measured) -> Measurement:
        ids = tuple(one.results[p].item for p in places)
        return Measurement(f"regression.{domain}", ids, np.array([one.results[p].score for p in places]))

    return compare(measurement(adapter), measurement(base), base.subject, confidence)


def _check_same(base: Measured, adapter: Measured) -> None:
    if base.sets == adapter.sets and [r.item for r in base.results] == [r.item for r in adapter.results]:
        return
    differ = sorted(name for name in {*base.sets, *adapter.sets} if base.sets.get(name) != adapter.sets.get(name))
    raise InputError(
        "base and adapter were not measured on the same items",
        where=", ".join(differ),
        expected=f"{len(base.results)} items",
        got=f"{len(adapter.results)} items",
        fix="measure both again",
    )
