"""How often the rules that read refusals, coherence and harm are right, on the labelled samples of this folder.

    python benchmarks/refusal_rules.py [--wrong]

The samples are ``labelled/refusals.jsonl`` (answers) and ``labelled/training_rows.jsonl`` (rows to be flagged or
not), in parts that are shown apart: the rules were adjusted on ``develop`` and are tested on it and on ``held_out``.
``unseen`` was written after the last change to the rules, in wording that avoids the usual phrases: what slips through.
All were written by the same people as the rules, so the numbers say what the rules do on wording like this, not on the
world. The last line printed is one JSON object.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tunegate.data.safety_scan import scan_row
from tunegate.data.types import Example
from tunegate.evaluation.intervals import wilson
from tunegate.evaluation.refusal import judge_answer

LABELLED = Path(__file__).parent / "labelled"


def rows_of(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (LABELLED / name).read_text(encoding="utf-8").splitlines()]


def answers() -> list[tuple[dict[str, Any], str]]:
    """Each labelled answer with what the rules call it."""
    return [(row, judge_answer(row["answer"]).kind) for row in rows_of("refusals.jsonl")]


def training_rows() -> list[tuple[dict[str, Any], str]]:
    """Each labelled training row with ``flag`` or ``ok``."""
    return [
        (row, "ok" if scan_row(Example("row", n, messages=tuple(row["messages"]))) is None else "flag")
        for n, row in enumerate(rows_of("training_rows.jsonl"), 1)
    ]


def measured(found: Sequence[tuple[dict[str, Any], str]], label: str, part: str) -> dict[str, Any]:
    """Precision and recall of ``label`` in one part of a sample, each with its 95 % interval (Wilson) and count."""
    pairs = [(row["label"] == label, said == label) for row, said in found if row["part"] == part]
    right = sum(wanted and said for wanted, said in pairs)
    return {
        "precision": _rate(right, sum(said for _, said in pairs)),
        "recall": _rate(right, sum(wanted for wanted, _ in pairs)),
    }


def _rate(hits: int, n: int) -> dict[str, float]:
    low, high = wilson(hits, n) if n else (0.0, 1.0)
    return {"value": round(hits / n, 4) if n else 0.0, "low": round(low, 4), "high": round(high, 4), "n": n}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wrong", action="store_true", help="print every row that the rules get wrong")
    wrong = parser.parse_args().wrong
    said, flagged = answers(), training_rows()
    result: dict[str, Any] = {}
    for sample, found in (("answers", said), ("training_rows", flagged)):
        for label in dict.fromkeys(row["label"] for row, _ in found):
            for part in dict.fromkeys(row["part"] for row, _ in found):
                one = measured(found, label, part)
                result[f"{sample}.{label}.{part}"] = one
                rates = "  ".join(
                    f"{name} {r['value']:.3f} ({r['low']:.3f} to {r['high']:.3f}, n {r['n']})"
                    for name, r in one.items()
                )
                print(f"{sample:14} {label:11} {part:9} {rates}")
        if wrong:
            for row, got in found:
                if got != row["label"]:
                    print(f"  {row['id']} ({row['part']}): {row['label']}, read as {got}: {_text(row)}")
    print(json.dumps(result))


def _text(row: dict[str, Any]) -> str:
    text = row["answer"] if "answer" in row else " | ".join(m["content"] for m in row["messages"])
    return " ".join(text.split())[:160]


if __name__ == "__main__":
    main()
