"""Two versions side by side: settings, data, scores, and the test items that they answer differently.

Items are matched by row id and compared where both adapters answered the same sealed set; that is in the evidence that
`tunegate run` leaves and `registry add` takes along. Of a version without a card only the adapter's own config is
known, so that is what is compared then.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from tunegate.adapter.files import CONFIG
from tunegate.registry.entries import Version, read_entity, resolve
from tunegate.registry.intake import EVIDENCE
from tunegate.registry.opening import Registry
from tunegate.registry.pulling import parts_of

ITEMS = EVIDENCE + "test/adapter.items.jsonl"


@dataclass(frozen=True)
class Difference:
    """``settings`` and ``data``: key to the two values, None where one has none. ``scores``: metric to the two means on
    the test split; ``metric`` is the main one. ``items``: those answered or scored differently, by how far they are
    apart in it; None if they cannot be compared (``why_not``). ``cardless``: versions of which data and scores are not
    known."""

    one: Version
    two: Version
    settings: dict[str, tuple[Any, Any]]
    data: dict[str, tuple[Any, Any]]
    scores: dict[str, tuple[float | None, float | None]]
    metric: str | None
    items: list[dict[str, Any]] | None
    compared: int
    why_not: str
    cardless: tuple[str, ...]


def diff(registry: Registry, one: str, two: str) -> Difference:
    """What distinguishes two versions."""
    with registry.database.reading() as connection:
        versions = [resolve(connection, one), resolve(connection, two)]
        cards = [read_entity(connection, v.adapter).body.get("card") or {} for v in versions]
        parts = [parts_of(connection, v.adapter) for v in versions]
    cardless = tuple(v.ref for v, card in zip(versions, cards, strict=True) if not card)
    if cardless:
        settings = [json.loads(_file(registry, p[CONFIG])) for p in parts]
        cards = [{}, {}]
    else:
        settings = [{**card["config"], **_facts(card)} for card in cards]
    data = [card.get("data") or {} for card in cards]
    metric = next((e["primary"] for card in cards for e in card.get("evaluations") or [] if _is_main(e)), None)
    items, compared, why_not = None, 0, ""
    if silent := [v.ref for v, p in zip(versions, parts, strict=True) if ITEMS not in p]:
        why_not = "no stored answers of " + " and ".join(silent)
    elif data[0].get("test") != data[1].get("test"):
        why_not = "the two were tested on different items"
    else:
        try:
            first, second = (_items(_file(registry, p[ITEMS])) for p in parts)
            items = _different(first, second, str(metric))
            compared = len(first.keys() & second.keys())
        except (ValueError, LookupError, TypeError, AttributeError) as error:  # as they were when they were added
            why_not = f"stored answers that cannot be read: {type(error).__name__}: {error}"
    return Difference(
        versions[0], versions[1], _unequal(*map(_flat, settings)), _unequal(*map(_flat, data)),
        _unequal(*map(_scores, cards)), metric, items, compared, why_not, cardless,
    )  # fmt: skip


def _file(registry: Registry, digests: list[str]) -> bytes:
    return b"".join(map(registry.store.get, digests))


def _is_main(evaluation: dict[str, Any]) -> bool:
    return bool(evaluation["subject"] == "adapter" and evaluation["split"] == "test")


def _facts(card: dict[str, Any]) -> dict[str, Any]:
    return {
        "base.fingerprint": card["base"]["fingerprint"]["total"],
        "base.recipe": card["base"].get("recipe"),
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


def _different(one: dict[str, dict[str, Any]], two: dict[str, dict[str, Any]], metric: str) -> list[dict[str, Any]]:
    found = []
    for id in one.keys() & two.keys():
        a, b = one[id], two[id]
        if a["prediction"] != b["prediction"] or a["scores"] != b["scores"]:
            found.append(
                {
                    "row_id": id, "reference": a["reference"], "predictions": [a["prediction"], b["prediction"]],
                    "scores": [a["scores"], b["scores"]],
                }
            )  # fmt: skip

    def order(item: dict[str, Any]) -> tuple[float, bool, str]:
        first, second = item["predictions"]
        return (-abs(_gap(item, metric)), first == second, item["row_id"])

    return sorted(found, key=order)


def _gap(item: dict[str, Any], metric: str) -> float:
    first, second = (scores.get(metric) or 0.0 for scores in item["scores"])
    return float(second - first)
