"""What an adapter is, in plain values: which modules it sits on, and each module's rank and scale.

The rules are PEFT's, so that one set of names means the same on both sides:

- a list of names selects a module whose path equals a name or ends with ``"." + name``;
- a string selects by regular expression over the whole path, except ``"all-linear"``;
- ``rank_pattern`` and ``alpha_pattern`` map a regular expression to a value; the first key for which
  ``(.*\\.)?(KEY)$`` matches from the start of the path wins;
- the scale is ``alpha / rank``, or ``alpha / sqrt(rank)`` for rsLoRA (Kalajdzievski 2023, arXiv 2312.03732).

Expressions may come from a downloaded file, so they run on the ``regex`` engine with a time limit: one that
backtracks without end is an error, not a hang.

It does not look at a model: ``inject`` does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import regex

from tunegate.errors import InputError, Problem

ALL_LINEAR = "all-linear"
_SECONDS_PER_MATCH = 1.0  # an honest expression over a module path needs microseconds
# PEFT 0.21's default: the first number that follows a container which itself has a parent ("model.layers.3.").
_ANY_LAYER_LIST = r".*?\.[^.]*\.(?P<idx>\d+)\."


def _run(expression: str, path: str, *, whole: bool) -> Any:
    run = regex.fullmatch if whole else regex.match
    try:
        return run(expression, path, timeout=_SECONDS_PER_MATCH)
    except TimeoutError as error:
        raise InputError(
            "a regular expression needs too long on one module path",
            where=shorten(expression),
            got=f"more than {_SECONDS_PER_MATCH:g} s on {path!r}",
            fix="write it without nested repeats such as (a+)+",
        ) from error


def shorten(text: str, limit: int = 120) -> str:
    return text if len(text) <= limit else text[: limit - 3] + "..."


def named(names: str | Sequence[str], path: str) -> bool:
    """PEFT's rule for ``target_modules`` and ``exclude_modules``: a regex if a string, else names or suffixes."""
    if isinstance(names, str):
        return _run(names, path, whole=True) is not None
    return any(path == name or path.endswith("." + name) for name in names)


def pattern_key(keys: Sequence[str], path: str) -> str | None:
    """The first key that matches ``path`` by PEFT's pattern rule, or None."""
    for key in keys:
        if _run(rf"(.*\.)?({key})$", path, whole=False):
            return key
    # PEFT falls back to the literal path, which matters for names with characters special to regexes.
    return path if path in keys else None


@dataclass(frozen=True)
class AdapterSpec:
    """One adapter's shape. Raises :class:`InputError` with every problem when the values make no sense.

    ``layers_to_transform`` keeps only the layers with these indices, counted as PEFT does: by the first number in
    the module path after a container (``layers_pattern`` names the container, as a regex). A target given by its
    full path is kept whatever its index, again as in PEFT.
    """

    rank: int
    alpha: float
    dropout: float = 0.0
    use_rslora: bool = False
    use_dora: bool = False
    target_modules: str | tuple[str, ...] = ALL_LINEAR
    exclude_modules: str | tuple[str, ...] = ()
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    layers_to_transform: tuple[int, ...] | None = None
    layers_pattern: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        problems = _range_problems(self) + _selection_problems(self)
        if problems:
            raise InputError(problems)

    def rank_for(self, path: str) -> int:
        key = pattern_key(tuple(self.rank_pattern), path)
        return self.rank if key is None else self.rank_pattern[key]

    def alpha_for(self, path: str) -> float:
        key = pattern_key(tuple(self.alpha_pattern), path)
        return self.alpha if key is None else self.alpha_pattern[key]

    def scale_for(self, path: str) -> float:
        """The factor on B A x for the module at ``path``."""
        rank = self.rank_for(path)
        return self.alpha_for(path) / (math.sqrt(rank) if self.use_rslora else rank)

    @property
    def all_linear(self) -> bool:
        return isinstance(self.target_modules, str) and self.target_modules.lower() == ALL_LINEAR

    def excludes(self, path: str) -> bool:
        return bool(self.exclude_modules) and named(self.exclude_modules, path)

    def selects(self, path: str, in_all_linear: bool) -> bool:
        """Whether ``path`` is a target; ``in_all_linear`` says whether ``all-linear`` would include it."""
        if self.excludes(path):
            return False
        if self.all_linear:
            return in_all_linear and self.layer_selected(path)
        if isinstance(self.target_modules, str):
            return named(self.target_modules, path)
        return path in self.target_modules or (named(self.target_modules, path) and self.layer_selected(path))

    def layer_index(self, path: str) -> int | None:
        """The index of the layer that holds ``path``, or None for a module outside the layers."""
        lists = [rf"(?:^|.*?\.){name}\.(?P<idx>\d+)\." for name in self.layers_pattern] or [_ANY_LAYER_LIST]
        found = next((match for item in lists if (match := _run(item, path, whole=False))), None)
        return int(found["idx"]) if found else None

    def layer_selected(self, path: str) -> bool:
        return self.layers_to_transform is None or self.layer_index(path) in self.layers_to_transform


def _range_problems(spec: AdapterSpec) -> list[Problem]:
    ranks = {"rank": spec.rank, **{f"rank_pattern[{key!r}]": v for key, v in spec.rank_pattern.items()}}
    alphas = {"alpha": spec.alpha, **{f"alpha_pattern[{key!r}]": v for key, v in spec.alpha_pattern.items()}}
    problems = [
        Problem("not a rank", shorten(where), "an integer of at least 1", repr(value))
        for where, value in ranks.items()
        if isinstance(value, bool) or not isinstance(value, int) or value < 1
    ]
    problems += [
        Problem("not an alpha", shorten(where), "a finite number above 0", repr(value))
        for where, value in alphas.items()
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf
    ]
    if not 0 <= spec.dropout < 1:
        problems.append(Problem("not a dropout", "dropout", "0 <= dropout < 1", repr(spec.dropout)))
    return problems


def _selection_problems(spec: AdapterSpec) -> list[Problem]:
    problems = []
    if not spec.target_modules or "" in tuple(spec.target_modules):
        problems.append(Problem("empty target", "target_modules", f"{ALL_LINEAR!r}, a regex, or names"))
    layers = spec.layers_to_transform
    if layers is not None:
        if not layers or any(isinstance(i, bool) or not isinstance(i, int) or i < 0 for i in layers):
            problems.append(Problem("not layers", "layers_to_transform", "indices from 0", repr(layers)))
        if isinstance(spec.target_modules, str) and not spec.all_linear:
            fix = "write the layer numbers into the expression, or list names"
            problems.append(Problem("not allowed with a regex in target_modules", "layers_to_transform", fix=fix))
    elif spec.layers_pattern:
        problems.append(Problem("needs layers_to_transform", "layers_pattern"))
    expressions = [("rank_pattern", key) for key in spec.rank_pattern]
    expressions += [("alpha_pattern", key) for key in spec.alpha_pattern]
    expressions += [("layers_pattern", key) for key in spec.layers_pattern]
    if isinstance(spec.target_modules, str) and not spec.all_linear:
        expressions.append(("target_modules", spec.target_modules))
    if isinstance(spec.exclude_modules, str):
        expressions.append(("exclude_modules", spec.exclude_modules))
    for where, expression in expressions:
        try:
            regex.compile(rf"({expression})")
        except (regex.error, OverflowError, RecursionError) as error:
            what = f"not a regular expression: {shorten(expression)!r}"
            problems.append(Problem(what, where, got=str(error)))
    return problems
