"""The loaded base with or without an adapter on it, and the evaluator over it. Loaded once, when first needed.

It holds one adapter at a time and does not merge.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from tunegate.adapter.files import load_adapter
from tunegate.adapter.inject import Injection, disabled, find_targets, inject, remove
from tunegate.adapter.spec import AdapterSpec
from tunegate.config import TrainSection
from tunegate.data.types import Example
from tunegate.engine.runner import Runner
from tunegate.errors import InputError, Problem
from tunegate.evaluation.evaluator import OWN_PROMPT, Evaluation, Evaluator
from tunegate.evaluation.prompts import Prompt
from tunegate.model.loading import choose_device, load_model
from tunegate.pipeline.base import keeps_16_bits
from tunegate.pipeline.prepare import Prepared
from tunegate.pipeline.reporter import Reporter, count


class Session:
    def __init__(self, prepared: Prepared, reporter: Reporter):
        self.prepared, self.reporter = prepared, reporter
        self.injection: Injection | None = None
        self.adapter_hash: str | None = None

    @cached_property
    def model(self) -> Any:
        config, base = self.prepared.config.task, self.prepared.base
        if config.train.threads:
            torch.set_num_threads(config.train.threads)
        kept = "" if base.recipe is None else f", linear layers in {base.recipe['format']}"
        self.reporter.line(
            f"loading {base.resolved.name}: {count(base.parameters)} parameters, "
            f"{base.compute_dtype} ({self.prepared.config.origins.get('base.compute_dtype', base.dtype_reason)}){kept}"
        )
        device = choose_device(config.train.device)
        model = load_model(
            base.resolved, dtype=getattr(torch, base.compute_dtype), recipe=base.recipe,
            narrow=keeps_16_bits(config.train, device), trust_remote_code=config.base.trust_remote_code,
        )  # fmt: skip
        return model.to(torch.device(device))  # type: ignore[arg-type]

    @cached_property
    def runner(self) -> Runner:
        runner = Runner(self.model)
        self.reporter.line(f"path: {runner.path} ({runner.path_reason})")
        return runner

    @cached_property
    def evaluator(self) -> Evaluator:
        return Evaluator(
            self.runner,
            self.prepared.base.renderer,
            self.prepared.scorer,
            self.prepared.config.task.train.tokens_per_batch,
        )

    def turn_to(self, prepared: Prepared) -> None:
        """Go on with other training settings of the same task, on the base that is loaded. An adapter in place goes."""
        if self.prepared is not prepared:
            self.drop_adapter()
            self.prepared = prepared

    def check_adapter(self, spec: AdapterSpec) -> None:
        """:class:`InputError` with every target, pattern and rank of ``spec`` that does not fit this base."""
        if self.injection is None:
            alike: dict[tuple[str, str, str], list[Problem]] = {}
            for problem in find_targets(self.model, spec)[1]:
                alike.setdefault((problem.what, problem.expected, problem.got), []).append(problem)
            if alike:
                raise InputError([_one_of(problems) for problems in alike.values()])

    def start_adapter(self, spec: AdapterSpec, seed: int) -> Injection:
        """A fresh adapter in place."""
        runner = self.runner  # probed on the plain base
        self.drop_adapter()
        self.injection = inject(runner.model, spec, seed=seed)
        return self.injection

    def use_adapter(self, folder: Path, digest: str) -> Injection:
        """The adapter in ``folder`` in place; kept if it is there already."""
        if self.injection is None or self.adapter_hash != digest:
            runner = self.runner
            self.drop_adapter()
            self.injection = load_adapter(runner.model, folder)
            self.adapter_hash = digest
        return self.injection

    def drop_adapter(self) -> None:
        if self.injection is not None:
            remove(self.model)
            self.injection, self.adapter_hash = None, None

    @contextlib.contextmanager
    def as_base(self) -> Iterator[None]:
        """The plain base inside, bit for bit, whether or not an adapter is in place."""
        with disabled(self.injection) if self.injection is not None else contextlib.nullcontext():
            yield

    def evaluate(
        self, examples: list[Example], subject: str, split: str, items: Path, prompt: Prompt = OWN_PROMPT
    ) -> Evaluation:
        """Score what is in place on ``examples`` with a progress bar."""
        base = self.prepared.base
        hashes = {"base": base.fingerprint.total, "template": base.renderer.template_hash}
        if subject == "adapter" and self.adapter_hash is not None:
            hashes["adapter"] = self.adapter_hash
        with self.reporter.progress(f"{subject} on {split}", len(examples)) as advance:
            return self.evaluator.evaluate(
                examples, subject=subject, split=split, items_path=items, hashes=hashes, prompt=prompt, progress=advance
            )


def _one_of(problems: list[Problem]) -> Problem:
    """The first of problems that differ in their module only, with the key of the task file."""
    more = f" and {len(problems) - 1} more like it" if len(problems) > 1 else ""
    where = problems[0].where.replace("layers_to_transform", "layers")
    is_key = where in TrainSection.model_fields
    return dataclasses.replace(problems[0], where=f"train.{where}" if is_key else f"train: {where}{more}")


def adapter_spec(train: TrainSection) -> AdapterSpec:
    """The adapter a task asks for."""
    assert train.alpha is not None
    return AdapterSpec(
        rank=train.rank,
        alpha=train.alpha,
        dropout=train.dropout,
        use_rslora=train.method == "rslora",
        use_dora=train.method == "dora",
        target_modules=train.target_modules,
        exclude_modules=train.exclude_modules,
        rank_pattern=train.rank_pattern,
        alpha_pattern=train.alpha_pattern,
        layers_to_transform=train.layers,
    )
