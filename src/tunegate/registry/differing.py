"""Two versions side by side: settings, data, scores, and the test items that they answer differently.

Items are matched by row id and compared where both adapters answered the same sealed set; that is in the evidence that
`tunegate run` leaves and `registry add` takes along. Two versions without it differ in settings and scores only.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from tunegate.registry.entries import Version, read_entity, resolve
from tunegate.registry.intake import EVIDENCE
from tunegate.registry.opening import Registry
from tunegate.registry.pulling import parts_of

ITEMS = EVIDENCE + "test/adapter.items.jsonl"


@dataclass(frozen=True)
class Difference:
    """``settings`` and ``data``: key to the two values, None where one has none. ``scores``: metric to the two means on
    the test split. ``items``: those answered or scored differently, None if they cannot be compared (``why_not``)."""

    one: Version
    two: Version
    settings: dict[str, tuple[Any, Any]]
    data: dict[str, tuple[Any, Any]]
    scores: dict[str, tuple[float | None, float | None]]
    items: list[dict[str, Any]] | None
    compared: int
    why_not: str


def diff(registry: Registry, one: str, two: str) -> Difference:
    """What distinguishes two versions."""
    with registry.database.reading() as connection:
        versions = [resolve(connection, one), resolve(connection, two)]
        bodies = [read_entity(connection, v.adapter).body for v in versions]
        parts = [parts_of(connection, v.adapter).get(ITEMS) for v in versions]
    cards = [body.get("card") or {} for body in bodies]
    tests = [(card.get("data") or {}).get("test") for card in cards]
    items, compared, why_not = None, 0, ""
    if not all(parts):
        why_not = "no stored answers of " + " and ".join(v.ref for v, p in zip(versions, parts, strict=True) if not p)
    elif tests[0] != tests[1]:
        why_not = "the two were tested on different items"
    else:
        answers = [_items(b"".join(registry.store.get(d) for d in digests or ())) for digests in parts]
        compared = len(answers[0].keys() & answers[1].keys())
        items = _different(*answers)
    settings = [_flat(card.get("config") or body.get("config") or {}) for card, body in zip(cards, bodies, strict=True)]
    settings = [{**s, **_facts(c)} for s, c in zip(settings, cards, strict=True)]
    data = [_flat(card.get("data") or {}) for card in cards]
    scores = [_scores(card) for card in cards]
    return Difference(
        versions[0], versions[1], _unequal(*settings), _unequal(*data), _unequal(*scores), items, compared, why_not
    )


def _facts(card: dict[str, Any]) -> dict[str, Any]:
    base = card.get("base") or {}
    return {
        "base.fingerprint": (base.get("fingerprint") or {}).get("total"),
        "base.recipe": base.get("recipe"),
        "template.hash": (card.get("template") or {}).get("hash"),
        "run.best_step": (card.get("run") or {}).get("best_step"),
    }


def _scores(card: dict[str, Any]) -> dict[str, float]:
    return {
        f"{e['subject']} {name}": score["value"]
        for e in card.get("evaluations") or []
        for name, score in e["scores"].items()
    }


def _flat(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, inner in value.items():
        if isinstance(inner, dict) and inner:
            found |= _flat(inner, f"{prefix}{key}.")
        else:
            found[prefix + key] = inner
    return found


def _unequal(one: dict[str, Any], two: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    return {k: (one.get(k), two.get(k)) for k in sorted(one.keys() | two.keys()) if one.get(k) != two.get(k)}


def _items(data: bytes) -> dict[str, dict[str, Any]]:
    rows = (json.loads(line) for line in data.split(b"\n") if line.strip())
    return {str(row["row_id"]): row for row in rows}


def _different(one: dict[str, dict[str, Any]], two: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    found = []
    for id in sorted(one.keys() & two.keys()):
        a, b = one[id], two[id]
        if a["prediction"] != b["prediction"] or a["scores"] != b["scores"]:
            found.append(
                {
                    "row_id": id, "reference": a["reference"], "predictions": [a["prediction"], b["prediction"]],
                    "scores": [a["scores"], b["scores"]],
                }
            )  # fmt: skip
    return found
