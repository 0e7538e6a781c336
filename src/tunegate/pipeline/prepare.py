"""A task file turned into checked data, a checked base and settled settings, before any training.

Everything that can be wrong without running the model is found here: data, splits, rendering, metrics and their
references, the base's files. The result carries the content hashes that name runs and steps.

It does not load the base's weights (it hashes them) and writes nothing outside the cache.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import tunegate
from tunegate.config import Config, default_lr
from tunegate.data.check import CheckReport, check_examples
from tunegate.data.forms import Loaded, load_examples
from tunegate.data.render import Renderer
from tunegate.data.split import Splits, position, split
from tunegate.data.tokens import check_tokens, render_all
from tunegate.data.types import Example, Rendered
from tunegate.errors import InputError, Problem
from tunegate.evaluation.evaluator import Scorer, build_scorer
from tunegate.evaluation.prompts import Prompt, candidates
from tunegate.files import hash_json
from tunegate.gate import Policy
from tunegate.model.fingerprint import BaseFingerprint, fingerprint_base
from tunegate.model.loading import choose_dtype, load_tokenizer
from tunegate.model.resolve import ResolvedBase, resolve_base
from tunegate.model.weights import tensors_of
from tunegate.pipeline.reporter import Reporter


@dataclass(frozen=True)
class Data:
    """What the task's sources hold. ``files`` maps each source to its content hash."""

    splits: Splits
    loaded: tuple[Loaded, ...]

    @property
    def files(self) -> dict[str, str]:
        return {name: digest for one in self.loaded for name, digest in one.files.items()}


@dataclass(frozen=True)
class Base:
    """A base on disk, hashed, with its renderer. ``parameters`` counts tied tensors once."""

    resolved: ResolvedBase
    fingerprint: BaseFingerprint
    renderer: Renderer
    parameters: int
    compute_dtype: str
    dtype_reason: str

    def card(self) -> dict[str, Any]:
        return {
            "name": self.resolved.name,
            "source": self.resolved.source,
            "revision": self.resolved.revision,
            "fingerprint": asdict(self.fingerprint),
            "parameters": self.parameters,
        }


@dataclass(frozen=True)
class Prepared:
    """A task ready to run."""

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

    @cached_property
    def base_key(self) -> list[str]:
        base = self.base
        return [base.fingerprint.total, base.renderer.template_hash, base.compute_dtype, tunegate.__version__]

    @cached_property
    def baseline_items(self) -> list[Example]:
        return self.valid[: self.config.task.task.prompt_items]

    @cached_property
    def baseline_key(self) -> str:
        prompts = [prompt.hash for prompt in self.prompts]
        return hash_json([self.base_key, self._task_key, prompts, _content(self.baseline_items)])

    @property
    def _task_key(self) -> Any:
        return self.config.task.task.model_dump(mode="json", exclude={"prompts", "prompt_items"})

    @cached_property
    def train_key(self) -> str:
        settings = self.config.task.train.model_dump(mode="json", exclude={"threads", "checkpoint_every"})
        rows = hash_json([[row.ids, row.target] for row in self.train_rows])
        return hash_json([self.base_key, settings, rows, self._task_key, _content(self.valid), self.policy.hash()])

    @cached_property
    def test_hash(self) -> str:
        return hash_json(_content(self.data.splits.test))

    @cached_property
    def run_key(self) -> str:
        return hash_json([self.train_key, self.test_hash, self.baseline_key])


def _content(examples: list[Example]) -> list[str]:
    return [e.content_hash for e in examples]


def load_data(config: Config, *, strict: bool = True) -> Data:
    """Read and split; whole-file problems of all sources are reported together, bad rows too unless skipped.

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


def load_base(config: Config, reporter: Reporter, device: str) -> Base:
    """Find, check and hash the base; the weights stay on disk."""
    section = config.task.base
    local = config.folder / section.name
    name = str(local) if local.is_dir() else section.name
    resolved = resolve_base(
        name,
        section.revision,
        offline=section.offline,
        trust_remote_code=section.trust_remote_code,
        report=reporter.line,
    )
    fingerprint = fingerprint_base(resolved.path)
    tokenizer = load_tokenizer(resolved.path, trust_remote_code=section.trust_remote_code)
    renderer = Renderer(tokenizer, template=section.template, eos_ids=_eos_ids(resolved.path))
    dtype, reason = choose_dtype(section.compute_dtype, device=device)
    entries = {e.name: e for part in tensors_of(resolved.path).values() for e in part}
    parameters = sum(_elements(e.shape) for e in entries.values())
    return Base(resolved, fingerprint, renderer, parameters, str(dtype).removeprefix("torch."), reason)


def _elements(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total


def _eos_ids(folder: Path) -> tuple[int, ...]:
    """The end-of-text ids of the base's generation config."""
    path = folder / "generation_config.json"
    if not path.exists():
        return ()
    found = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
    return tuple(found) if isinstance(found, list) else () if found is None else (int(found),)


def check_data(data: Data, base: Base | None, max_tokens: int) -> CheckReport:
    """Everything ``check`` reports; without a base, the part that needs no tokenizer."""
    report = check_examples(data.splits.as_dict(), data.loaded)
    if base is not None:
        check_tokens(data.splits.as_dict(), base.renderer, max_tokens, report)
    return report


def prepare(config: Config, reporter: Reporter) -> Prepared:
    """Read, check and settle everything a run needs. :class:`InputError` with all problems of a kind together."""
    device = choose_device(config.task.train.device)
    data = load_data(config)
    base = load_base(config, reporter, device)
    config, labels = _settle(config, data, base)
    section, task = config.task.data, config.task.task
    splits = data.splits
    scorer = build_scorer(task, labels, config.folder, config.task.gate.confidence, [*splits.valid, *splits.test])
    report = check_data(data, base, section.max_tokens)

    def render(examples: list[Example]) -> list[Rendered]:
        return render_all(
            examples, base.renderer, max_tokens=section.max_tokens, on_long_row=section.on_long_row, report=report
        )

    valid = sorted(splits.valid, key=lambda e: (position(e, "order"), e.content_hash))
    valid = valid[: max(config.task.train.eval_items, task.prompt_items)]
    scored = [e for e in valid if e.text is None] if scorer.generates else valid
    return Prepared(
        config=config,
        data=data,
        base=base,
        scorer=scorer,
        prompts=tuple(candidates(splits.train, labels, task.prompts)) if scorer.generates else (Prompt("as_is"),),
        train_rows=render(splits.train),
        valid_rows=render(valid),
        valid=scored,
        report=report,
        policy=Policy(**config.task.gate.model_dump()),
    )


def choose_device(wanted: str) -> str:
    """``auto`` is CUDA where torch sees it, else the CPU."""
    import torch

    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(wanted)
    except RuntimeError:
        raise InputError(
            "unknown device", where="train.device", expected="auto, cpu, cuda or cuda:N", got=wanted
        ) from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError("torch sees no CUDA GPU", where="train.device", got=wanted, fix="use auto or cpu")
    return wanted


def _settle(config: Config, data: Data, base: Base) -> tuple[Config, list[str] | None]:
    """Fill in what depends on base and data, each with its reason."""
    train, task = config.task.train, config.task.task
    if train.lr is None:
        config = config.settle("train.lr", *default_lr(base.parameters))
    if config.task.base.compute_dtype == "auto":
        config = config.settle("base.compute_dtype", base.compute_dtype, f"auto: {base.dtype_reason}")
    labels = _labels(config)
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


def _labels(config: Config) -> list[str] | None:
    given = config.task.task.labels
    if given is None:
        return None
    if not isinstance(given, str):
        return list(given)
    path = config.path(given)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError("cannot read the labels", where=f"task.labels: {path}", got=str(error)) from None
    if not isinstance(found, list) or not all(isinstance(label, str) for label in found):
        raise InputError("not a list of labels", where=f"task.labels: {path}", expected='["label", ...]')
    return found
