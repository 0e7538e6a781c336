"""What an adapter must meet, fixed and hashed before the first training step.

The short keys (``min_score``, ``min_gain_over_base``, ...) and the rules of ``gate.rules`` become one list of
clauses, which ``verdict`` applies alike. A threshold of None switches its key off. It judges nothing.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from typing import Any

from tunegate.errors import InputError, Problem, collecting
from tunegate.files import hash_json
from tunegate.gate_rules import Rule, parse_rule

PASS, FAIL, INCONCLUSIVE = "pass", "fail", "inconclusive"
SHIP, HOLD = "ship", "hold"
CORRECTIONS = ("none", "holm")
BOUND, ESTIMATE, STRICT = "bound", "estimate", "strict"


@dataclass(frozen=True)
class RuleSetting:
    """A rule as text, with what it does not take from the policy. Under ``min_items`` it does not pass; unless
    ``required`` it is reported only."""

    rule: str
    confidence: float | None = None
    min_items: int | None = None
    required: bool = True

    @cached_property
    def parsed(self) -> Rule:
        return parse_rule(self.rule)


@dataclass(frozen=True)
class Clause:
    """One rule to judge. ``by``: the ``bound`` of the interval; the ``estimate`` alone; or ``strict``, where the
    estimate must meet it and the interval too. ``shortfall`` is the verdict where it is not met."""

    name: str
    rule: Rule
    confidence: float
    by: str = BOUND
    min_items: int | None = None
    required: bool = True
    shortfall: str = FAIL

    def of(self, metric: str) -> Clause:
        """This clause for one of the metrics that its pattern matches."""
        if metric == self.rule.metric:
            return self
        rule = dataclasses.replace(self.rule, metric=metric)
        return dataclasses.replace(self, name=str(rule), rule=rule)


@dataclass(frozen=True)
class Policy:
    """Thresholds. Scores, gains and rates are in [0, 1], gains are differences of scores.

    ``min_score``: the adapter's test score reaches it; with ``strict_intervals`` its whole interval must, else the
    rule is inconclusive. ``min_gain_over_base`` and ``min_gain_over_prompt``: the gain exceeds it (0.0: better at
    all). ``max_leaked_test_rows``: exact duplicates of training rows in the test set. ``max_overfit_ratio``:
    validation loss over training loss at the kept step. ``rules``: further rules (:class:`RuleSetting`, or mappings
    of its fields). ``correction``: ``holm`` corrects the levels of all rules that have an interval for their number.
    Raises :class:`InputError` with every threshold that is not a number, every text that is no rule, and for a
    confidence outside (0, 1).
    """

    min_score: float | None = None
    min_gain_over_base: float | None = 0.0
    min_gain_over_prompt: float | None = 0.0
    confidence: float = 0.95
    min_test_items: int | None = 50
    min_stop_rate: float | None = 0.95
    max_leaked_test_rows: int | None = 0
    max_overfit_ratio: float | None = 3.0
    strict_intervals: bool = False
    rules: tuple[RuleSetting, ...] = ()
    correction: str = "none"

    def __post_init__(self) -> None:
        made = tuple(RuleSetting(**r) if isinstance(r, Mapping) else r for r in self.rules)
        object.__setattr__(self, "rules", made)
        problems = [
            Problem(f"{name} is not a finite number", where="gate", got=str(value))
            for name, value in self._thresholds().items()
            if value is not None and not math.isfinite(value)
        ]
        if not problems:
            problems = _wrong_confidence("", self.confidence)
        for rule in self.rules:
            with collecting(problems):
                parse_rule(rule.rule)
            problems += _wrong_confidence(f" of {rule.rule!r}", rule.confidence)
        if self.correction not in CORRECTIONS:
            problems.append(Problem("unknown correction", "gate", f"one of {', '.join(CORRECTIONS)}", self.correction))
        if problems:
            raise InputError(problems)

    def _thresholds(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("rules", "correction")}

    def hash(self) -> str:
        """Hash of the thresholds by value: 0 and 0.0 are one policy, and so are two spellings of a rule."""
        values: dict[str, Any] = {n: float(v) if v is not None else None for n, v in self._thresholds().items()}
        if self.rules:
            values["rules"] = [{**asdict(rule), "rule": str(rule.parsed)} for rule in self.rules]
        if self.correction != "none":
            values["correction"] = self.correction
        return hash_json({"policy": values})

    def clauses(self) -> list[Clause]:
        """Every rule that is on, the short keys first."""
        gains = (("min_gain_over_base", "base"), ("min_gain_over_prompt", "best_prompt"))
        short = [
            self._short("min_test_items", Rule("task.items", ">=", 0), shortfall=INCONCLUSIVE),
            self._short("max_leaked_test_rows", Rule("data.leaked_rows", "<=", 0)),
            self._short("min_score", Rule("task", ">=", 0), by=STRICT if self.strict_intervals else ESTIMATE),
            *(self._short(key, Rule("task", ">", 0, "gain", against), by=BOUND) for key, against in gains),
            self._short("min_stop_rate", Rule("task.stop_rate", ">=", 0)),
            self._short("max_overfit_ratio", Rule("train.loss_ratio", "<=", 0)),
        ]
        own = [
            Clause(str(r.parsed), r.parsed, r.confidence or self.confidence, BOUND, r.min_items, r.required)
            for r in self.rules
        ]
        return [clause for clause in short if clause is not None] + own

    def _short(self, key: str, rule: Rule, by: str = ESTIMATE, shortfall: str = FAIL) -> Clause | None:
        threshold = getattr(self, key)
        if threshold is None:
            return None
        rule = dataclasses.replace(rule, number=float(threshold))
        return Clause(key, rule, self.confidence, by, shortfall=shortfall)


def _wrong_confidence(whose: str, value: float | None) -> list[Problem]:
    if value is None or 0.0 < value < 1.0:
        return []
    return [Problem(f"confidence{whose} must lie between 0 and 1", "gate", got=str(value))]
