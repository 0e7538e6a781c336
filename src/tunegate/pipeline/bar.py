"""What an adapter has to beat: the best way to ask the base that was measured before training.

That is the best of the run's own baselines, or the best option of ``advise`` where one was measured for the same base,
task, rows and items and scored higher: looked-up examples, passages and answers held to a form count too. The choice
is written to ``bar.json`` before the first training step and stands; a later ``advise`` does not move it.

A reference model is never the bar.
"""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

from tunegate.errors import TunegateError
from tunegate.evaluation.prompts import Prompt
from tunegate.files import read_json, write_json
from tunegate.pipeline import steps
from tunegate.pipeline.advise import BEST, Request, Ways, advise_folder
from tunegate.pipeline.folders import STEP
from tunegate.pipeline.prepare import Prepared
from tunegate.pipeline.reporter import Reporter
from tunegate.records import EvalRecord

BAR = "bar.json"


def settle_bar(prepared: Prepared, run: Path, baselines: dict[str, EvalRecord], reporter: Reporter) -> Prompt:
    """The prompt that the adapter of ``run`` is compared with; chosen once. :class:`TunegateError` if the stored
    choice cannot be made again."""
    measured = steps.best_prompt(prepared, baselines)
    if (run / BAR).exists():
        stored = read_json(run / BAR)
        if stored["from"] == "baseline":
            return measured
        prompt = _rebuild(prepared, stored)
        if prompt is None:
            raise TunegateError(
                "the bar of this run cannot be made again: what it looks up has changed", where=str(run / BAR),
                expected=f"prompt {stored['prompt']} with hash {stored['hash']}",
                fix="restore the documents (task.documents) and the installation that `advise` ran with",
            )  # fmt: skip
        return prompt
    if (run / "test" / STEP).exists():  # a run from before bars were written
        return measured
    own = baselines[measured.name].score.value
    stored = {"from": "baseline", "prompt": measured.name, "hash": measured.hash, "value": own}
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        found = read_json(advise_folder(prepared) / BEST)
        prompt = _rebuild(prepared, found) if found["value"] > own else None
        if prompt is not None:
            reporter.line(
                f"the bar is {prompt.name} of advise: {found['value']:.4f}, against {own:.4f} of {measured.name}"
            )
            stored, measured = {"from": "advise", **found}, prompt
    write_json(run / BAR, stored)
    return measured


def _rebuild(prepared: Prepared, stored: dict[str, Any]) -> Prompt | None:
    """The prompt that ``advise`` measured, if it can still be made with the same hash."""
    documents = stored["documents"]
    if documents is not None and not prepared.config.path(documents).is_dir():
        return None
    if documents != prepared.config.task.task.documents:
        config = prepared.config.settle("task.documents", documents, "advise")
        prepared = dataclasses.replace(prepared, config=config)
    way = Ways(prepared, Request(**stored["request"])).find(stored["prompt"])
    return way.prompt if way is not None and way.prompt.hash == stored["hash"] else None
