"""From a run folder to a review: its test answers beside the questions they were given to.

A run keeps its answers and not the prompts, so the task's data are read again, and the hash that the test left of its
items proves that they are the same rows. A review that was begun holds its own copies and needs no data.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tunegate import records
from tunegate.config import Config, Task, freeze, load_config
from tunegate.data.types import Example
from tunegate.errors import InputError, Problem
from tunegate.files import hash_json, read_json, read_jsonl
from tunegate.pipeline.folders import STEP, task_folder
from tunegate.records import EvalRecord
from tunegate.report.review import FOLDER, ITEMS, LOG, Review, new_review
from tunegate.report.selection import Item, select

ANSWERS = {"base": "test/base.items.jsonl", "adapter": "test/adapter.items.jsonl"}
DEFAULT_ITEMS, DEFAULT_SEED = 24, 0


def open_review(path: Path, items: int | None = None, seed: int | None = None) -> Review:
    """The review of the run that ``path`` leads to (a task's YAML, its run folder, or one run), begun if there is none.

    :class:`InputError` if there is no tested run, or if a review with another number of items or seed has verdicts.
    """
    run, folder = find_run(path)
    if (run / FOLDER / ITEMS).exists():
        review = Review.load(run)
        if items in (None, review.asked) and seed in (None, review.seed):
            return review
        if (run / FOLDER / LOG).exists():
            raise InputError(
                "a review of this run has begun with other settings", where=str(run / FOLDER),
                expected=f"--items {review.asked} --seed {review.seed}, or neither",
                fix="leave them out to go on with it, or remove the folder to begin anew",
            )  # fmt: skip
    asked, seed = DEFAULT_ITEMS if items is None else items, DEFAULT_SEED if seed is None else seed
    config = _config_of(run, folder)
    found = answered(run, config)
    return new_review(run, config.name, select(found, asked, seed), len(found), seed, asked, list(ANSWERS.values()))


def find_run(path: Path) -> tuple[Path, Path | None]:
    """The tested run that ``path`` leads to, and the task's folder where ``path`` is its YAML."""
    config = load_config(path) if path.suffix in (".yaml", ".yml") else None
    folder = config.run_dir if config is not None else path
    latest = folder / "latest.json"
    run = folder / str(read_json(latest)["run"]) if latest.exists() else folder
    if not (run / "test" / STEP).exists():
        raise InputError(
            "there is no tested run here" if folder.exists() else "no such folder", where=str(run),
            expected="a task that was run, its run folder, or one run of it", fix="`tunegate run` makes one",
        )  # fmt: skip
    return run, config.folder if config is not None else None


def _config_of(run: Path, folder: Path | None) -> Config:
    """The settings that ``run`` began with. ``folder`` is the task's; without it the usual place of runs tells, or what
    the run noted down."""
    try:
        begun = read_json(run / "run.json")
        task = Task.model_validate(freeze(begun["task"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        got = str(error).splitlines()[0]
        raise InputError("cannot read the settings of the run", where=str(run / "run.json"), got=got) from None
    if folder is None:
        folder = task_folder(run, begun.get("folder"), task.output)
    if folder is None:
        raise InputError(
            "the task's data are not to be found from here", where=str(run), expected="a run in FOLDER/runs/NAME",
            fix="name the task file instead: `tunegate review TASK`",
        )  # fmt: skip
    return Config(task, folder, {})


def answered(run: Path, config: Config) -> list[Item]:
    """Every test item of ``run`` with its prompt and both answers."""
    record = records.load(run / "test" / "adapter.json", EvalRecord)
    rows = {subject: read_jsonl(run / name) for subject, name in ANSWERS.items()}
    if not all("prediction" in row for row in rows["adapter"]):
        raise InputError(
            "this task generates no answers, so there is nothing to look at", where=str(run), got=record.primary
        )
    examples = _test_rows(config)
    if hash_json([e.content_hash for e in examples]) != record.hashes["items"]:
        raise InputError(
            "the task's test rows are not those that the run answered", where=str(run),
            fix="restore the data and the data settings of this run, or run the task as it is now",
        )  # fmt: skip
    labels = set(read_json(run / "run.json")["task"]["task"].get("labels") or [])
    return [
        Item(
            row_id=example.row_id,
            prompt=list(example.prompt),
            reference=example.answer,
            base=base["prediction"],
            adapter=mine["prediction"],
            base_score=base["scores"][record.primary],
            adapter_score=mine["scores"][record.primary],
            kind=example.answer if example.answer in labels else example.group or "",
            tools=list(example.tools),
        )
        for example, base, mine in zip(examples, rows["base"], rows["adapter"], strict=True)
    ]


def _test_rows(config: Config) -> Iterable[Example]:
    from tunegate.pipeline.reading import load_data

    try:
        return load_data(config).splits.test
    except InputError as error:
        first = Problem(
            "the prompts of the test rows are needed, and the task's data cannot be read", str(config.folder)
        )
        raise InputError([first, *error.problems]) from None
