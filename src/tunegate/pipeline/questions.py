"""What regression and safety will ask, read and checked before anything is trained.

The sets that a task names are loaded, cut to the number of items asked for, and hashed; a guard's address and key are
looked at, tasks of lm-eval-harness loaded. Both are off unless their section stands in the task file or a rule of the
gate is about them. It asks no model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from tunegate.config import Config, RegressionSection, SafetySection
from tunegate.errors import Problem, collecting
from tunegate.evaluation.guard import Guard, GuardSettings
from tunegate.evaluation.probes import ProbeSet, load_probes
from tunegate.evaluation.regression import check_sets
from tunegate.evaluation.safety import SafetySettings, check_settings
from tunegate.evaluation.sets import LM_EVAL_PREFIX, ItemSet, load_sets
from tunegate.gate_rules import parse_rule

REGRESSION, SAFETY = "regression", "safety"


@dataclass(frozen=True)
class Regression:
    """Sets of items, and tasks of lm-eval-harness by name (loaded)."""

    settings: RegressionSection
    sets: tuple[ItemSet, ...]
    tasks: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> list[Any]:
        """Everything that can change a score, apart from the subject."""
        hashes = {one.name: one.hash for one in self.sets}
        return [REGRESSION, self.settings.model_dump(mode="json"), hashes, _lm_eval_version() if self.tasks else None]


@dataclass(frozen=True)
class Safety:
    """Sets of requests, how they are asked, and who judges the answers."""

    settings: SafetySection
    sets: tuple[ProbeSet, ...]

    @property
    def asking(self) -> SafetySettings:
        given = self.settings
        return SafetySettings(
            systems=tuple(given.system_prompts.items()),
            seeds=given.seeds,
            temperature=given.temperature,
            max_new_tokens=given.max_new_tokens,
        )

    @property
    def key(self) -> list[Any]:
        """Everything that can change a rate, apart from the subject."""
        settings = self.settings.model_dump(mode="json")
        if settings["guard"]:
            settings["guard"] = {name: settings["guard"][name] for name in ("url", "model")}
        return [SAFETY, settings, {one.name: one.hash for one in self.sets}]


def switched_on(config: Config) -> Config:
    """``config`` with the sections that its gate rules need."""
    for rule in config.task.gate.rules:
        family = parse_rule(rule.rule).metric.partition(".")[0]
        if family in (REGRESSION, SAFETY):
            config = switch_on(config, family, f"the rule {rule.rule!r} asks for it")
    return config


def switch_on(config: Config, name: str, reason: str) -> Config:
    """A copy with the section ``name`` at its defaults, unless it is there."""
    if getattr(config.task, name) is not None:
        return config
    section = RegressionSection() if name == REGRESSION else SafetySection()
    told = {f"{name}.{key}": f"default; {reason}" for key in type(section).model_fields}
    task = config.task.model_copy(update={name: section})
    return replace(config, task=task, origins={**config.origins, **told})


def load_regression(config: Config) -> Regression | None:
    """What the task asks about general ability; None if it is off. :class:`InputError` with all problems."""
    settings = config.task.regression
    if settings is None:
        return None
    named = [name for name in settings.sets if name.startswith(LM_EVAL_PREFIX)]
    own = [name for name in settings.sets if name not in named]
    problems: list[Problem] = []
    sets: list[ItemSet] = []
    tasks: dict[str, Any] = {}
    with collecting(problems):
        sets = [one.first(settings.items) for one in load_sets(own, base_dir=config.folder)]
        if own or not named:
            check_sets(sets, run_code=settings.run_code)
    with collecting(problems):
        if named:
            from tunegate.evaluation.lm_eval import load_tasks

            tasks = load_tasks(named, run_code=settings.run_code)
    _raise(problems)
    return Regression(settings, tuple(sets), tasks)


def load_safety(config: Config) -> Safety | None:
    """What the task asks about refusals; None if it is off. :class:`InputError` with all problems."""
    settings = config.task.safety
    if settings is None:
        return None
    problems: list[Problem] = []
    found: Safety | None = None
    with collecting(problems):
        sets = [one.first(settings.items) for one in load_probes(settings.sets, base_dir=config.folder)]
        found = Safety(settings, tuple(sets))
        check_settings(found.asking, sets)
    with collecting(problems):
        guard_of(settings)
    _raise(problems)
    return found


def guard_of(settings: SafetySection | None) -> Guard | None:
    """The guard that a task names, ready to ask; None without one."""
    if settings is None or settings.guard is None:
        return None
    given = settings.guard
    return Guard(GuardSettings(given.url, given.model, given.key_env, given.timeout, parallel=given.parallel))


def _raise(problems: Sequence[Problem]) -> None:
    from tunegate.errors import InputError

    if problems:
        raise InputError(list(problems))


def _lm_eval_version() -> str:
    import importlib.metadata

    return importlib.metadata.version("lm_eval")
