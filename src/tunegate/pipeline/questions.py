"""What regression, safety and a judge will ask, read and checked before anything is trained.

The sets that a task names are loaded, cut to the number of items asked for, and hashed; a guard's address and key are
looked at, tasks of lm-eval-harness loaded, a judge's rubric read. Regression and safety are off unless their section
stands in the task file or a rule of the gate is about them; a judge has to be named. It asks no model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from tunegate.config import Config, JudgeSection, RegressionSection, SafetySection
from tunegate.errors import InputError, Problem, collecting
from tunegate.evaluation.guard import Guard, GuardSettings
from tunegate.evaluation.judge.ask import Limits
from tunegate.evaluation.judge.providers import Model
from tunegate.evaluation.judge.rubric import DEFAULT, Rubric, load_rubric, read_rubric
from tunegate.evaluation.probes import ProbeSet, load_probes
from tunegate.evaluation.regression import check_sets
from tunegate.evaluation.safety import SafetySettings, check_settings
from tunegate.evaluation.sets import LM_EVAL_PREFIX, ItemSet, load_sets
from tunegate.gate_rules import Rule, parse_rule

REGRESSION, SAFETY, JUDGE = "regression", "safety", "judge"
_NAME_ONE = "for example `judge: {provider: openai, model: NAME}`; docs/judge.md"


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


@dataclass(frozen=True)
class Judge:
    """Who judges by what, and whose answers: ``subjects``, the adapter's first. ``binding``: a rule of the gate is
    about its scores, so that another judge makes another run."""

    settings: JudgeSection
    rubric: Rubric
    model: Model
    limits: Limits
    subjects: tuple[str, ...]
    binding: bool

    @property
    def against(self) -> str:
        """Whose answers the pairs are against; empty without pairs."""
        return "" if self.settings.pairs == "none" else self.settings.pairs

    @property
    def key(self) -> list[Any]:
        """Everything that can change a score, apart from the answers. What it costs and how fast it goes cannot."""
        given = self.settings
        asked = [given.items, given.samples, given.pairs, self.subjects]
        return [JUDGE, self.model.identity, self.rubric.hash, self.rubric.pass_at, asked]


def switched_on(config: Config) -> Config:
    """``config`` with the sections that its gate rules need."""
    for rule in config.task.gate.rules:
        family = parse_rule(rule.rule).metric.partition(".")[0]
        if family in (REGRESSION, SAFETY):
            config = switch_on(config, family, f"the rule {rule.rule!r} asks for it")
    return config


def switch_on(config: Config, name: str, reason: str) -> Config:
    """A copy with the section ``name`` at its defaults, unless it is there. :class:`InputError` for a judge: it has no
    default."""
    if getattr(config.task, name) is not None:
        return config
    if name == JUDGE:
        raise InputError("no judge is named", where=reason, expected="a section `judge:`", fix=_NAME_ONE)
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


def load_judge(config: Config) -> Judge | None:
    """The judge that the task names; None if it is off. :class:`InputError` with all problems, rules of the gate that
    it cannot serve among them. The key is not looked at: ``open_provider`` does that."""
    settings = config.task.judge
    rules = [rule for one in config.task.gate.rules if (rule := parse_rule(one.rule)).metric.startswith(f"{JUDGE}.")]
    if settings is None:
        told = "a section `judge:`"
        _raise([Problem("no judge is named", f"gate.rules: {rule}", told, fix=_NAME_ONE) for rule in rules])
        return None
    problems = [problem for rule in rules for problem in _unserved(rule, settings)]
    rubric, model, limits = DEFAULT, None, None
    with collecting(problems):
        if isinstance(settings.rubric, str):
            rubric = load_rubric(config.path(settings.rubric))
        elif settings.rubric is not None:
            rubric = read_rubric(settings.rubric, lambda key: f"judge.rubric.{key}".rstrip("."), "inline")
    with collecting(problems):
        model = Model(
            settings.provider, settings.model, settings.url, settings.temperature, settings.max_tokens,
            settings.timeout, settings.key_env, settings.structured,
        )  # fmt: skip
    with collecting(problems):
        limits = Limits(
            settings.attempts, settings.parallel, settings.requests_per_minute, budget=settings.budget,
            price_in=settings.price_in, price_out=settings.price_out,
        )  # fmt: skip
    _raise(problems)
    assert model is not None and limits is not None
    references = [rule.reference for rule in rules if rule.reference is not None]
    return Judge(settings, rubric, model, limits, ("adapter", *sorted(set(references))), bool(rules))


def _unserved(rule: Rule, settings: JudgeSection) -> Iterator[Problem]:
    """What the section lacks for ``rule``."""
    where, metric = f"gate.rules: {rule}", rule.metric
    if metric == "judge.win_rate" and settings.pairs == "none":
        yield Problem("there are no pairs to win", where, "judge.pairs: base or best_prompt", "none")
    if metric == "judge.alpha" and settings.samples < 2:
        yield Problem("one sample cannot agree with itself", where, "judge.samples of at least 2", "1")
    if rule.reference is not None and metric in ("judge.win_rate", "judge.alpha", "judge.kappa"):
        yield Problem(f"{metric} has no counterpart of {rule.reference}", where, "a number to compare with")


def _raise(problems: Sequence[Problem]) -> None:
    if problems:
        raise InputError(list(problems))


def _lm_eval_version() -> str:
    import importlib.metadata

    return importlib.metadata.version("lm_eval")
