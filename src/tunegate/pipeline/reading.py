"""A task file and the files it names, read, and everything that is wrong with them said at once.

Looked at without the base's weights: the device, metrics and labels by name, the gate's rules, what regression, safety
and a judge would ask, the data, the base's files. Where the task file itself has problems, its sound sections are still
looked at, so a user mends one list of problems and not one after the other.

It renders no row and fetches no base.
"""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path

from tunegate.config import STAND_IN, Config, FaultyTask, load_config
from tunegate.data.forms import Loaded, load_examples
from tunegate.data.read import check_source
from tunegate.data.rows import parse_json
from tunegate.data.split import Splits, split
from tunegate.engine.backends import check_backend
from tunegate.engine.optimizers import check_optimizer
from tunegate.errors import InputError, Problem, collecting, nearest
from tunegate.evaluation.evaluator import LIKELIHOOD, build_scorer, unknown_metrics
from tunegate.evaluation.metrics import METRIC_NAMES
from tunegate.gate_rules import parse_rule
from tunegate.model.loading import choose_device
from tunegate.model.resolve import resolve_base
from tunegate.pipeline.base import base_name, is_local
from tunegate.pipeline.questions import Judge, Regression, Safety, load_judge, load_regression, load_safety, switched_on

Asked = tuple[Regression | None, Safety | None, Judge | None]


@dataclass(frozen=True)
class Data:
    """What the task's sources hold. ``files`` maps each source to its content hash."""

    splits: Splits
    loaded: tuple[Loaded, ...]

    @property
    def files(self) -> dict[str, str]:
        return {name: digest for one in self.loaded for name, digest in one.files.items()}


def load_data(config: Config, *, strict: bool = True) -> Data:
    """Read and split; problems of all sources are reported together, bad rows too unless they are skipped.

    Without ``strict`` bad rows are left in ``loaded`` for a report to show.
    """
    section = config.task.data
    loaded: dict[str, Loaded] = {}
    problems: list[Problem] = []
    for name in ("train", "valid", "test"):
        sources = getattr(section, name)
        if sources is None:
            continue
        try:
            loaded[name] = load_examples(
                sources,
                base_dir=config.folder,
                form=section.form,
                columns=section.columns,
                system=section.system,
                group_by=section.group_by,
                on_bad_row=section.on_bad_row,
            )
            if strict:
                loaded[name].raise_bad_rows()
        except InputError as error:
            problems += error.problems
    if problems:
        raise InputError(problems)
    splits = split(
        loaded["train"].examples,
        loaded["valid"].examples if "valid" in loaded else None,
        loaded["test"].examples if "test" in loaded else None,
        valid_fraction=section.valid_fraction,
        test_fraction=section.test_fraction,
        salt=section.split_salt,
    )
    return Data(splits, tuple(loaded.values()))


def labels_of(config: Config) -> list[str] | None:
    """The task's own list of labels, read if it is a file; None without one."""
    given = config.task.task.labels
    if given is None:
        return None
    if not isinstance(given, str):
        return list(given)
    path = config.path(given)
    try:
        found = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        fix = "a JSON list of texts, or the labels themselves in the task file"
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError("cannot read the labels", where=f"task.labels: {path}", got=reason, fix=fix) from None
    if not isinstance(found, list) or not all(isinstance(label, str) for label in found):
        raise InputError("not a list of labels", where=f"task.labels: {path}", expected='["label", ...]')
    return found


def questions(config: Config, faulty: AbstractSet[str] = frozenset()) -> Asked:
    """What regression, safety and the judge will ask, the problems of all together; None for what is off or in
    ``faulty``."""
    problems: list[Problem] = []
    regression, safety, judge = None, None, None
    with collecting(problems):
        regression = None if "regression" in faulty else load_regression(config)
    with collecting(problems):
        safety = None if "safety" in faulty else load_safety(config)
    with collecting(problems):
        judge = None if "judge" in faulty else load_judge(config)
    task = config.task.task
    if judge is not None and {task.metric, *task.report} == {LIKELIHOOD}:
        fix = "take the section out, or a metric that scores answers"
        problems.append(
            Problem("this task generates no answers to judge", "judge", got=f"task.metric: {task.metric}", fix=fix)
        )
    if problems:
        raise InputError(problems)
    return regression, safety, judge


@dataclass(frozen=True)
class Look:
    """What a task's files hold as far as they could be read, and everything that is wrong with them."""

    problems: list[Problem]
    device: str
    labels: list[str] | None
    data: Data | None


def look(config: Config, *, strict: bool = True, faulty: AbstractSet[str] = frozenset()) -> Look:
    """Read everything that a task names but its base, whose files are looked at where there are problems and they are
    on this disk. Of the sections in ``faulty`` only names are checked. ``strict``: bad rows are a problem too."""
    problems: list[Problem] = []
    task = config.task.task
    device, labels, data = "cpu", None, None
    if "train" not in faulty:
        with collecting(problems):
            device = choose_device(config.task.train.device)
            check_backend(config.task.train, device)
        with collecting(problems):
            check_optimizer(config.task.train, device)
    if "task" in faulty:
        problems += unknown_metrics(task)
    else:
        with collecting(problems):
            labels = labels_of(config)
        with collecting(problems):  # by name, before there are labels or references
            build_scorer(task, labels or ["yes", "no"], config.folder, config.task.gate.confidence, [])
    problems += _unmeasured(config, METRIC_NAMES if "task" in faulty else ())
    with collecting(problems):
        if "data" not in faulty:
            data = load_data(config, strict=strict)
        else:
            _check_sources(config)
    if (problems or faulty) and "base" not in faulty and is_local(config):
        with collecting(problems):
            resolve_base(base_name(config), trust_remote_code=config.task.base.trust_remote_code)
    return Look(problems, device, labels, data)


def load_task(path: Path | str, overrides: Sequence[str] = ()) -> Config:
    """``config.load_config``; where the file has problems, what is wrong with its sound sections is said with them."""
    try:
        return load_config(path, overrides)
    except FaultyTask as error:
        problems, rest, faulty = error.problems, switched_on(error.rest), error.sections
    with collecting(problems):
        questions(rest, faulty)
    raise InputError(problems + look(rest, faulty=faulty).problems)


def _check_sources(config: Config) -> None:
    """:class:`InputError` for files of data that are not there, empty or of no known kind."""
    section = config.task.data
    problems: list[Problem] = []
    for source in (*section.train, *(section.valid or ()), *(section.test or ())):
        if source != STAND_IN:
            with collecting(problems):
                check_source(source, base_dir=config.folder)
    if problems:
        raise InputError(problems)


def _unmeasured(config: Config, more: Sequence[str]) -> list[Problem]:
    """Rules about task metrics that are none of this task's; ``more``: names that it may have too."""
    task = config.task.task
    names = dict.fromkeys([task.metric, *task.report, *more])
    known = ["task", "task.items", "task.stop_rate", *(f"task.{name}" for name in names)]
    return [
        Problem("this task has no such metric", f"gate.rules: {rule.rule}", ", ".join(known), parsed.metric,
                nearest(parsed.metric, known) or "add it to task.report")
        for rule in config.task.gate.rules
        if (parsed := parse_rule(rule.rule)).metric.partition(".")[0] == "task"
        and not any(parsed.matches(name) for name in known)
    ]  # fmt: skip
