"""Training through unsloth's ``FastLanguageModel``, with TRL's trainer around it (see ``trl``).

unsloth loads the base a second time, from the same folder, with its patched layers and kernels, and gives it a PEFT
adapter; tunegate starts that adapter from its own A and B, and takes the optimizer steps as the trl backend does.
Evaluations run on tunegate's model with the tensors copied over, so the gate scores what will be served.

It needs a CUDA GPU and memory for two copies of the base, takes LoRA and rsLoRA with one rank for all layers, and
was not run on a GPU by its authors so far: compare its first losses with ``backend: native``.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tunegate.adapter.inject import Injection
from tunegate.adapter.peft_config import config_from
from tunegate.config import TrainSection
from tunegate.data.types import Rendered
from tunegate.engine import train as native
from tunegate.engine.backends import check_backend
from tunegate.engine.backends.trl import fit, peft_parameters
from tunegate.engine.checkpoint import load_parameters
from tunegate.engine.runner import Runner
from tunegate.engine.train import Hooks, TrainResult
from tunegate.errors import InputError


def train(
    runner: Runner,
    injection: Injection,
    rows: Sequence[Rendered],
    settings: TrainSection,
    folder: Path,
    key: str,  # noqa: ARG001 names a checkpoint's run, and this backend has none
    hooks: Hooks,
) -> TrainResult:
    """Train ``injection`` with unsloth and leave the best adapter in it. Hooks are called as by the native loop."""
    check_backend(settings, str(runner.device))
    if injection.spec.rank_pattern or injection.spec.alpha_pattern:
        raise InputError(
            "unsloth takes one rank and one alpha for all layers",
            where="train.rank_pattern, train.alpha_pattern",
            fix="leave them out, or set `backend: native` or `trl`",
        )
    native.check_rows(runner, rows)
    model = _fast_model(_folder_of(runner), injection, settings, max(len(row) for row in rows), runner)
    load_parameters(peft_parameters(model), {n: p.detach() for n, p in injection.parameters().items()})
    return fit(model, runner, injection, rows, settings, folder, hooks)


def _folder_of(runner: Runner) -> Path:
    folder = Path(str(getattr(runner.model.config, "_name_or_path", "")))
    if not (folder / "config.json").is_file():
        raise InputError(
            "unsloth loads the base from its folder, and this model does not say where that is",
            where="train.backend",
            got=str(folder),
            fix="set `backend: native` or `trl`",
        )
    return folder


def _fast_model(folder: Path, injection: Injection, settings: TrainSection, longest: int, runner: Runner) -> Any:
    from unsloth import FastLanguageModel

    model, _ = FastLanguageModel.from_pretrained(
        model_name=str(folder), max_seq_length=longest, dtype=runner.model.dtype, load_in_4bit=False
    )
    given = config_from(injection, "", None)
    return FastLanguageModel.get_peft_model(
        model,
        r=given["r"],
        target_modules=given["target_modules"],
        lora_alpha=given["lora_alpha"],
        lora_dropout=given["lora_dropout"],
        bias="none",
        use_rslora=given["use_rslora"],
        use_gradient_checkpointing="unsloth" if settings.gradient_checkpointing else False,
        random_state=settings.seed % 2**32,
    )
