"""Splits by content hash: a row's side depends on the row alone.

``u`` in [0, 1) is taken from BLAKE3 of the salt and the row's group, or of its input where there is no group.
``u < test`` is the test split, ``u < test + valid`` the validation split, the rest is for training. So rows of one
group, or with one input, are always on one side, and rows added to the data move no other row.

It does not balance labels, and it does not look for leaks between files given by hand: ``check`` does.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from blake3 import blake3

from tunegate.data.types import Example
from tunegate.errors import InputError, Problem

TRAIN, VALID, TEST = "train", "valid", "test"


@dataclass(frozen=True)
class Splits:
    """Rows by use, each in the order of the source."""

    train: list[Example]
    valid: list[Example]
    test: list[Example]

    def as_dict(self) -> dict[str, list[Example]]:
        return {TRAIN: self.train, VALID: self.valid, TEST: self.test}


def position(example: Example, salt: str = "") -> float:
    """``u`` in [0, 1), uniform over groups (over inputs where rows have no group)."""
    key = example.group if example.group is not None else example.input_hash
    digest = blake3(f"{salt}\0{key}".encode()).digest()
    return (int.from_bytes(digest[:8], "big") >> 11) / (1 << 53)  # 53 bits: exact in a float, below 1


def in_order(examples: Iterable[Example]) -> list[Example]:
    """The order in which items are taken where not all are: by a hash, so that it is no order of the file."""
    return sorted(examples, key=lambda e: (position(e, "order"), e.content_hash))


def assign(example: Example, valid_fraction: float, test_fraction: float, salt: str = "") -> str:
    """``train``, ``valid`` or ``test`` for one row."""
    u = position(example, salt)
    return TEST if u < test_fraction else VALID if u < test_fraction + valid_fraction else TRAIN


def split(
    train: list[Example],
    valid: list[Example] | None = None,
    test: list[Example] | None = None,
    *,
    valid_fraction: float = 0.1,
    test_fraction: float = 0.1,
    salt: str = "",
) -> Splits:
    """Given splits are taken as they are; missing ones (None) are carved out of ``train`` only.

    A fraction of 0 leaves a missing split empty on purpose. Raises :class:`InputError` for fractions outside
    [0, 1), and for every split that comes out empty although it was asked for.
    """
    fractions = {VALID: 0.0 if valid is not None else valid_fraction, TEST: 0.0 if test is not None else test_fraction}
    problems = [
        Problem("not a fraction", f"{name}_fraction", "0 <= fraction < 1", str(value))
        for name, value in fractions.items()
        if not 0 <= value < 1
    ]
    if not problems and sum(fractions.values()) >= 1:
        got = f"{fractions[VALID]} + {fractions[TEST]}"
        problems.append(Problem("nothing is left for training", "valid_fraction + test_fraction", "below 1", got))
    if problems:
        raise InputError(problems)
    sides: dict[str, list[Example]] = {TRAIN: [], VALID: list(valid or []), TEST: list(test or [])}
    for example in train:
        sides[assign(example, fractions[VALID], fractions[TEST], salt)].append(example)
    problems = _empty(sides, train, {VALID: valid, TEST: test}, fractions)
    if problems:
        raise InputError(problems)
    return Splits(sides[TRAIN], sides[VALID], sides[TEST])


def _empty(
    sides: dict[str, list[Example]],
    rows: list[Example],
    given: dict[str, list[Example] | None],
    fractions: dict[str, float],
) -> list[Problem]:
    """Empty splits as problems: what was found, and the way out."""
    keys = {e.group if e.group is not None else e.input_hash for e in rows}
    kind = "groups" if any(e.group is not None for e in rows) else "different inputs"
    found = f"{len(rows)} rows with {len(keys)} {kind}"
    problems = []
    if not sides[TRAIN]:
        fix = "add rows, or lower valid_fraction and test_fraction" if rows else "name a file with rows in it"
        problems.append(Problem("the train split is empty", "data.train", "at least one row", found, fix))
    for name in (VALID, TEST):
        if sides[name]:
            continue
        if given[name] is not None:
            fix = f"name another file, or leave `{name}` out to carve it from the training rows"
            problems.append(Problem(f"the {name} file holds no usable row", f"data.{name}", fix=fix))
        elif fractions[name]:
            more = " or a group_by with more groups" if kind == "groups" else ""
            fix = f"give a file for `{name}`, raise {name}_fraction, or add rows{more}"
            got = f"{found}; {name}_fraction {fractions[name]:g} takes none of them"
            problems.append(Problem(f"the {name} split is empty", f"data.{name}", "at least one row", got, fix))
    return problems
