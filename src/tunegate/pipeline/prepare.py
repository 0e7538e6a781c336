"""A task file turned into checked data, a checked base and settled settings, before any training.

Everything that can be wrong without running the model is found here: data, splits, rendering, metrics and their
references, the base's files. The result carries the content hashes that name runs and steps.

It does not load the base's weights (it hashes them) and writes nothing outside the cache.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import tunegate
from tunegate.config import Config, default_lr
from tunegate.data.check import CheckReport, Finding, check_examples
from tunegate.data.split import in_order
from tunegate.data.tokens import check_tokens, render_all
from tunegate.data.types import Example, Rendered
from tunegate.errors import InputError, Problem, collecting
from tunegate.evaluation.answering import takes_system
from tunegate.evaluation.evaluator import Scorer, build_scorer
from tunegate.evaluation.judge.providers import open_provider
from tunegate.evaluation.metrics import PYTHON_PREFIX
from tunegate.evaluation.prompts import AS_IS, Prompt, candidates
from tunegate.files import hash_file, hash_json
from tunegate.gate import Policy
from tunegate.pipeline.base import Base, load_base
from tunegate.pipeline.questions import Judge, Regression, Safety, guard_of, switched_on
from tunegate.pipeline.reading import Data, look, questions
from tunegate.pipeline.reporter import Reporter


@dataclass(frozen=True)
class Prepared:
    """A task ready to run. ``imported``: the hash of an adapter from elsewhere that takes the place of training."""

    config: Config
    data: Data
    base: Base
    scorer: Scorer
    prompts: tuple[Prompt, ...]
    train_rows: list[Rendered]
    valid_rows: list[Rendered]
    valid: list[Example]
    report: CheckReport
    policy: Policy
    regression: Regression | None = None
    safety: Safety | None = None
    judge: Judge | None = None
    imported: str | None = None

    @cached_property
    def base_key(self) -> list[Any]:
        """What an answer of the base depends on, apart from the prompt."""
        base, renderer = self.base, self.base.renderer
        stops = list(renderer.stop_ids) if self.scorer.generates else []
        key = [base.fingerprint.total, renderer.template_hash, stops, base.compute_dtype, tunegate.__version__]
        return key if base.recipe is None else [*key, base.recipe]

    @cached_property
    def baseline_items(self) -> list[Example]:
        return self.valid[: self.config.task.task.prompt_items]

    @cached_property
    def baseline_key(self) -> str:
        prompts = [prompt.hash for prompt in self.prompts]
        confidence = self.policy.confidence
        return hash_json([self.base_key, self._task_key, prompts, _content(self.baseline_items), confidence])

    @cached_property
    def advise_key(self) -> str:
        """What all measurements of `advise` have in common; each also has the hash of its prompt."""
        train, items = _content(self.data.splits.train), _content(self.baseline_items)
        return hash_json(["advise", self.base_key, self._task_key, train, items, self.policy.confidence])

    @cached_property
    def _task_key(self) -> Any:
        """How answers are asked for and scored; files by their content."""
        task = self.config.task.task
        apart = {"prompts", "prompt_items", "labels", "json_schema", "kind", "documents"}
        settings = task.model_dump(mode="json", exclude=apart)
        return [settings, self.scorer.labels, _metric_files(self.config)]

    @cached_property
    def train_key(self) -> str:
        settings = self.config.task.train.model_dump(mode="json", exclude={"threads", "checkpoint_every", "memory"})
        settings = settings if self.imported is None else {"imported": self.imported}
        rows = hash_json([[row.ids, row.target] for row in self.train_rows])
        return hash_json([self.base_key, settings, rows, self._task_key, _content(self.valid), self.policy.hash()])

    @cached_property
    def test_hash(self) -> str:
        return hash_json(_content(self.data.splits.test))

    @cached_property
    def run_key(self) -> str:
        asked = [one.key for one in (self.regression, self.safety) if one is not None]
        asked += [self.judge.key] if self.judge is not None and self.judge.binding else []
        return hash_json([self.train_key, self.test_hash, self.baseline_key, *asked])


def _content(examples: list[Example]) -> list[str]:
    return [e.content_hash for e in examples]


def _metric_files(config: Config) -> list[str]:
    """Hashes of the files that the metrics are made of: a JSON schema, the user's own modules."""
    task = config.task.task
    names = [name for name in (task.metric, *task.report) if name.startswith(PYTHON_PREFIX)]
    modules = [sys.modules.get(name.split(":")[1]) for name in names]
    paths = [Path(file) for module in modules if (file := getattr(module, "__file__", None))]
    paths += [config.folder / task.json_schema] if task.json_schema else []
    return [hash_file(path) for path in paths if path.is_file()]


def check_data(data: Data, base: Base, config: Config) -> CheckReport:
    """Everything ``check`` reports about rows: with and without their tokens."""
    section = config.task.data
    guard = guard_of(config.task.safety)
    unsafe = None if guard is None else lambda messages, answer: not guard.judge(messages, answer).safe
    report = check_examples(data.splits.as_dict(), data.loaded, guard=unsafe)
    check_tokens(data.splits.as_dict(), base.renderer, section.max_tokens, report, section.on_long_row)
    _check_room(base, config, report)
    return report


def _check_room(base: Base, config: Config, report: CheckReport) -> None:
    """Rows longer than the base has positions for. What exceeds ``max_tokens`` is cut, skipped or an error already."""
    longest = min(report.stats["tokens"]["max"], config.task.data.max_tokens)
    if base.positions is not None and longest > base.positions:
        message = (
            f"rows of {longest:,} tokens, and the base takes {base.positions:,} (its max_position_embeddings): "
            f"set `data.max_tokens: {base.positions}` with `data.on_long_row: truncate` or `skip`"
        )
        report.add(Finding("error", "positions", message, 1))


@dataclass(frozen=True)
class Opened:
    """A task whose files could all be read, with what its base and data settled."""

    config: Config
    data: Data
    base: Base
    labels: list[str] | None


def open_task(config: Config, reporter: Reporter, *, strict: bool = True) -> Opened:
    """Read everything a task names. :class:`InputError` with all problems together; a base that would have to be
    fetched is left out where there are others. ``strict``: bad rows are a problem too."""
    found = look(config, strict=strict)
    if found.problems:
        raise InputError(found.problems)
    assert found.data is not None
    base = load_base(config, reporter, found.device)
    config, labels = _settle(config, found.data, base, found.labels)
    return Opened(config, found.data, base, labels)


def check_task(config: Config, reporter: Reporter) -> tuple[Opened, CheckReport]:
    """What ``check`` says about a task; answers that the metric cannot score against are findings too."""
    opened = open_task(config, reporter, strict=False)
    report = check_data(opened.data, opened.base, opened.config)
    try:
        judge = questions(switched_on(opened.config))[2]
        if judge is not None:
            open_provider(judge.model)
    except InputError as error:
        shown = [str(problem) for problem in error.problems[:5]]
        message = f"regression, safety or the judge cannot be asked: {len(error.problems)} problems"
        report.add(Finding("error", "questions", message, len(error.problems), shown))
    try:
        _scorer(opened)
    except InputError as error:
        shown = [str(problem) for problem in error.problems[:5]]
        message = f"the metric cannot be used: {len(error.problems)} problems"
        report.add(Finding("error", "metric", message, len(error.problems), shown))
    return opened, report


def _scorer(opened: Opened) -> Scorer:
    config, splits = opened.config, opened.data.splits
    examples = [*splits.valid, *splits.test]
    return build_scorer(config.task.task, opened.labels, config.folder, config.task.gate.confidence, examples)


def prepare(config: Config, reporter: Reporter) -> Prepared:
    """Read, check and settle everything a run needs. :class:`InputError` with all problems of a kind together."""
    config = switched_on(config)
    problems: list[Problem] = []
    opened, regression, safety, judge = None, None, None, None
    with collecting(problems):
        regression, safety, judge = questions(config)
    with collecting(problems):
        opened = open_task(config, reporter)
    if problems:
        raise InputError(problems)
    assert opened is not None
    config, data, base = opened.config, opened.data, opened.base
    section, task, splits = config.task.data, config.task.task, data.splits
    if not splits.valid:
        raise InputError(
            "there are no validation rows, and the eval gate needs some",
            where="data.valid_fraction",
            fix="name a file as `data.valid`, or raise valid_fraction above 0",
        )
    scorer = _scorer(opened)
    report = check_data(data, base, config)
    if not report.ok:
        raise InputError([_as_problem(f) for f in report.findings if f.level == "error"])

    def render(examples: list[Example]) -> list[Rendered]:
        return render_all(examples, base.renderer, max_tokens=section.max_tokens, on_long_row=section.on_long_row)

    valid = in_order(splits.valid)[: max(config.task.train.eval_items, task.prompt_items)]
    return Prepared(
        config=config,
        data=data,
        base=base,
        scorer=scorer,
        prompts=_prompts(opened, report, reporter) if scorer.generates else (Prompt(AS_IS),),
        train_rows=render(splits.train),
        valid_rows=render(valid),
        valid=valid,
        report=report,
        policy=Policy(**config.task.gate.model_dump()),
        regression=regression,
        safety=safety,
        judge=judge,
    )


def _as_problem(finding: Finding) -> Problem:
    fix = "`tunegate check` shows everything that was found"
    if finding.code == "long_rows":
        fix = "raise data.max_tokens, or set `data.on_long_row: truncate` (cuts the oldest tokens) or `skip`"
    return Problem(finding.message, "data", got=", ".join(finding.examples), fix=fix)


def _prompts(opened: Opened, report: CheckReport, reporter: Reporter) -> tuple[Prompt, ...]:
    """The prompt baselines that the base's template can render and its positions can hold."""
    task, renderer = opened.config.task.task, opened.base.renderer
    splits, positions = opened.data.splits, opened.base.positions
    found = candidates(splits.train, opened.labels, task.prompts, takes_system=takes_system(renderer))
    if positions is None:
        return tuple(found)
    example = splits.valid[0]
    lengths = {p.name: len(renderer.prompt_ids(p.messages(example), example.tools)) for p in found}
    room = positions - report.stats["tokens"]["max"] - (task.max_new_tokens or 0)
    fitting = [p for p in found if p.name == AS_IS or lengths[p.name] - lengths[AS_IS] <= room]
    for prompt in found:
        if prompt not in fitting:
            reporter.line(f"prompt {prompt.name} is left out: it does not fit in the base's {positions:,} tokens")
    return tuple(fitting)


def _settle(config: Config, data: Data, base: Base, labels: list[str] | None) -> tuple[Config, list[str] | None]:
    """Fill in what depends on base and data, each with its reason."""
    train, task = config.task.train, config.task.task
    if train.lr is None:
        config = config.settle("train.lr", *default_lr(base.parameters))
    if config.task.base.compute_dtype == "auto":
        config = config.settle("base.compute_dtype", base.compute_dtype, f"auto: {base.dtype_reason}")
    answers = [e.answer for e in data.splits.train if e.text is None]
    if labels is None and (task.metric == "accuracy" or "accuracy" in task.report or task.answer_by == "likelihood"):
        labels = sorted(set(answers))
        config = config.settle("task.labels", tuple(labels), f"default: the {len(labels)} answers in train")
    if task.max_new_tokens is None and answers:
        encode = base.renderer.tokenizer
        unique = sorted(set(answers), key=len)[-200:]  # the longest in characters hold the longest in tokens
        longest = max(len(encode(a, add_special_tokens=False)["input_ids"]) for a in unique)
        config = config.settle(
            "task.max_new_tokens", longest + longest // 4 + 8, f"default: longest answer ({longest}) + 25 % + 8"
        )
    return config, labels
