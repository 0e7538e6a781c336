"""Training by TRL's ``SFTTrainer`` with a PEFT adapter, on tunegate's rows, steps and gate.

The base's weights are shared, not copied: the model's modules are copied around the same tensors, the adapter's
wrappers are taken out of the copy, and PEFT puts its own in, started from the same A and B. Every item of the
trainer's data loader is one optimizer step: the rows :class:`StepPlan` gives it, as padded batches of ids, labels
(-100 off target) and masks. Before an evaluation the PEFT tensors are copied into the adapter that the gate scores.

What maps exactly: rows, targets, the rows of each step, loss (summed over the step, divided once by its targets),
AdamW with its groups, learning rate by step, clipping, evaluations, patience, the best adapter. What does not:

- ``tokens_per_batch`` bounds padded tokens, and no prefix is shared: TRL pads;
- dropout draws other masks from the same seed, and for DoRA PEFT drops the base product's input too;
- a run that was stopped starts again: TRL's checkpoints are not ours, so ``checkpoint_every`` has no effect.

The base's own dropout stays off, as in the native loop; with gradient checkpointing, transformers' switch needs the
decoder layers in train mode, so dropout that a layer itself (not a module in it) applies is on then.

It does not train quantized bases, adapters on the output head (TRL reads the head's weight directly), or on several
devices.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import math
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from tunegate.adapter.inject import Injection, remove
from tunegate.adapter.layers import is_conv1d
from tunegate.adapter.peft_config import config_from
from tunegate.config import TrainSection
from tunegate.data.types import Rendered
from tunegate.engine import train as native
from tunegate.engine.backends import check_backend
from tunegate.engine.checkpoint import TrainState, load_parameters
from tunegate.engine.optimizers import make_optimizer
from tunegate.engine.runner import Runner
from tunegate.engine.schedule import StepPlan, lr_factor
from tunegate.engine.train import Hooks, TrainResult
from tunegate.errors import InputError, Problem, TunegateError

_LORA_FIELDS = (
    "alpha_pattern",
    "bias",
    "fan_in_fan_out",
    "lora_alpha",
    "lora_dropout",
    "r",
    "rank_pattern",
    "target_modules",
    "task_type",
    "use_dora",
    "use_rslora",
)


def train(
    runner: Runner,
    injection: Injection,
    rows: Sequence[Rendered],
    settings: TrainSection,
    folder: Path,
    key: str,  # noqa: ARG001 names a checkpoint's run, and this backend has none
    hooks: Hooks,
) -> TrainResult:
    """Train ``injection`` with TRL and leave the best adapter in it. Hooks are called as by the native loop."""
    check_backend(settings, str(runner.device))
    _check_bases(injection)
    native.check_rows(runner, rows)
    model = _with_peft(_plain_copy(runner), injection)
    return fit(model, runner, injection, rows, settings, folder, hooks)


def _check_bases(injection: Injection) -> None:
    head = [path for path in injection.modules if path.rpartition(".")[2] in ("lm_head", "embed_out")]
    problems = [
        Problem("TRL cannot train an adapter on the output head", path, fix="exclude it, or set `backend: native`")
        for path in head
    ]
    other = [layer.base for layer in injection.modules.values() if not _is_plain(layer.base)]
    if other:
        problems.append(
            Problem(
                "the trl backend takes plain linear layers only",
                "train.backend",
                "Linear or Conv1D",
                type(other[0]).__name__,
                "set `backend: native`, or leave the base unquantized",
            )
        )
    if problems:
        raise InputError(problems)


def _is_plain(layer: nn.Module) -> bool:
    return type(layer) is nn.Linear or is_conv1d(layer)


def _plain_copy(runner: Runner) -> Any:
    """The runner's model without adapter and with its own attention, around the same tensors."""
    tensors = itertools.chain(runner.model.parameters(), runner.model.buffers())
    with runner.fused.removed() if runner.fused is not None else contextlib.nullcontext():
        model = copy.deepcopy(runner.model, {id(tensor): tensor for tensor in tensors})
    remove(model)
    if runner.path == "packed":
        model.set_attn_implementation("sdpa" if model._supports_sdpa else "eager")
    return model


def _with_peft(model: Any, injection: Injection) -> Any:
    """``model`` under a PEFT adapter of the injection's shape and values."""
    from peft import LoraConfig, get_peft_model

    given = config_from(injection, "", None)
    wrapped = get_peft_model(model, LoraConfig(**{name: given[name] for name in _LORA_FIELDS}))
    load_parameters(peft_parameters(wrapped), {n: p.detach() for n, p in injection.parameters().items()})
    return wrapped


def peft_parameters(model: Any) -> dict[str, nn.Parameter]:
    """The parameters of a PEFT model's adapter, named and sorted as :meth:`Injection.parameters` does."""
    from peft.tuners.lora.layer import LoraLayer

    found: dict[str, Any] = {}
    for path, layer in model.get_base_model().named_modules():
        if isinstance(layer, LoraLayer):
            found[f"{path}.lora_A"] = layer.lora_A["default"].weight
            found[f"{path}.lora_B"] = layer.lora_B["default"].weight
            if "default" in layer.lora_magnitude_vector:
                found[f"{path}.lora_magnitude_vector"] = layer.lora_magnitude_vector["default"].weight
    return dict(sorted(found.items()))


# --- rows into padded batches ---------------------------------------------------------------------------------------


def padded_batches(rows: Sequence[Rendered], tokens: int) -> list[dict[str, Tensor]]:
    """``rows``, the short ones first, as batches of at most ``tokens`` tokens with padding (a longer row has its own).

    Each is ``input_ids``, ``attention_mask`` and ``labels``, (rows, longest) int64; labels are -100 off target.
    """
    groups: list[list[Rendered]] = []
    for row in sorted(rows, key=len):
        if not groups or len(row) * (len(groups[-1]) + 1) > tokens:  # the newest row is the longest
            groups.append([])
        groups[-1].append(row)
    return [_pad(group) for group in groups]


def _pad(rows: list[Rendered]) -> dict[str, Tensor]:
    shape = (len(rows), max(len(row) for row in rows))
    ids, mask, labels = torch.zeros(shape).long(), torch.zeros(shape).long(), torch.full(shape, -100)
    for place, row in enumerate(rows):
        ids[place, : len(row)] = torch.tensor(row.ids)
        mask[place, : len(row)] = 1
        labels[place, : len(row)] = torch.where(torch.tensor(row.target), torch.tensor(row.ids), -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


# --- the run --------------------------------------------------------------------------------------------------------


@dataclass
class _Job:
    """One run, and what its steps leave for the events. ``ours`` are the parameters the gate's adapter reads."""

    model: Any
    runner: Runner
    ours: dict[str, nn.Parameter]
    settings: TrainSection
    plan: StepPlan
    folder: Path
    hooks: Hooks
    state: TrainState = field(default_factory=TrainState)
    loss: float = 0.0
    norm: float = 0.0
    clock: float = field(default_factory=time.perf_counter)

    def after_step(self, lr: float) -> bool:
        """Report the step, evaluate where one is due; returns whether the run goes on."""
        state, plan = self.state, self.plan
        state.seconds += time.perf_counter() - self.clock
        state.step += 1
        self.hooks.report(
            {
                "event": "step", "step": state.step, "of": plan.total, "loss": self.loss, "grad_norm": self.norm,
                "lr": lr, "epoch": round(plan.epochs_done(state.step), 4),
                "tokens_per_second": state.tokens / state.seconds,
            }
        )  # fmt: skip
        if plan.is_evaluation(state.step):
            load_parameters(self.ours, {n: p.detach() for n, p in peft_parameters(self.model).items()})
            native.evaluate_adapter(state, self.ours, self.settings, self.folder, self.hooks)
            native.drop_old_best(self.folder, state)
        elif self.hooks.stop():
            raise native.Interrupted(
                f"stopped after step {state.step} of {plan.total}; `backend: {self.settings.backend}` keeps no "
                "checkpoints, so the same command starts again from the first step"
            )
        self.clock = time.perf_counter()
        return not state.stopped_early


class _Steps(torch.utils.data.Dataset[dict[str, Any]]):
    """Item ``n`` is optimizer step ``n``: the rows' names and their padded batches."""

    def __init__(self, plan: StepPlan, tokens_per_batch: int):
        self.plan, self.tokens_per_batch = plan, tokens_per_batch

    def __len__(self) -> int:
        return self.plan.total

    def __getitem__(self, step: int) -> dict[str, Any]:
        rows = self.plan.rows(step)
        return {"rows": rows, "batches": padded_batches(rows, self.tokens_per_batch)}


def fit(
    model: Any,
    runner: Runner,
    injection: Injection,
    rows: Sequence[Rendered],
    settings: TrainSection,
    folder: Path,
    hooks: Hooks,
) -> TrainResult:
    """Train the PEFT ``model`` with TRL; evaluations, and the result, go through ``injection``."""
    _start_over(folder)
    plan = StepPlan(rows, settings)
    job = _Job(model, runner, injection.parameters(), settings, plan, folder, hooks)
    parameters = peft_parameters(model)
    if set(parameters) != set(job.ours):
        raise TunegateError("PEFT adapted other layers than tunegate", got=f"{len(parameters)} tensors")
    optimizer = make_optimizer(parameters, settings)
    for group in optimizer.param_groups:
        group["lr"] = group["peak"]
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: lr_factor(step, plan.total, settings.warmup, settings.schedule)
    )
    hooks.report({"event": "notice", "step": 0, "text": _notice(settings)})
    trainer = _make_trainer(job, optimizer, schedule)
    job.clock = time.perf_counter()
    try:
        trainer.train()
    finally:
        model.eval()
        shutil.rmtree(folder / "trl", ignore_errors=True)
    load_parameters(job.ours, native.read_best(folder, job.state.best_step))
    return TrainResult(job.state, plan.total, plan.epochs_done(job.state.step))


def _start_over(folder: Path) -> None:
    for old in (*folder.glob("best-*"), folder / "checkpoints", folder / "trl"):
        shutil.rmtree(old, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)


def _notice(settings: TrainSection) -> str:
    import trl

    return (
        f"steps are computed by {settings.backend} (TRL {trl.__version__}, PEFT): rows are padded, "
        "and a run that is stopped starts again from the first step"
    )


def _make_trainer(job: _Job, optimizer: torch.optim.Optimizer, schedule: Any) -> Any:
    """An ``SFTTrainer`` whose every step is one of the plan's."""
    from datasets import Dataset
    from transformers import PrinterCallback, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    settings, device = job.settings, job.runner.device

    class StepTrainer(SFTTrainer):
        def get_train_dataloader(self) -> Any:
            return DataLoader(_Steps(job.plan, settings.tokens_per_batch), batch_size=None, shuffle=False)

        def training_step(self, model: Any, inputs: dict[str, Any], _items: Any = None) -> Tensor:
            torch.manual_seed(native.step_seed(settings.seed, job.state.step))
            rows, batches = inputs["rows"], inputs["batches"]
            targets = sum(row.n_targets for row in rows)
            losses = [super(StepTrainer, self).training_step(model, batch, targets) for batch in batches]
            total = torch.stack(losses).sum()
            job.loss = float(total)
            if not math.isfinite(job.loss):
                raise native.not_finite_error("loss", job.loss, job.state, tuple(row.row_id for row in rows))
            job.state.tokens += sum(len(row) for row in rows)
            job.state.computed_tokens += sum(batch["input_ids"].numel() for batch in batches)
            job.state.target_tokens += targets
            return total

        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            _only_adapters_train(self.model, bool(settings.gradient_checkpointing))
            return super().compute_loss(model, inputs, *args, **kwargs)

        def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
            norm = super()._get_grad_norm(model, grad_norm=grad_norm)
            job.norm = float(norm)
            if not math.isfinite(job.norm):
                names = tuple(row.row_id for row in job.plan.rows(job.state.step))
                raise native.not_finite_error("gradient", job.norm, job.state, names)
            return norm

        def floating_point_ops(self, _inputs: Any) -> int:
            return 0  # it looks for input_ids, and nobody reads the number

    class AfterStep(TrainerCallback):
        lr = 0.0

        def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
            self.lr = optimizer.param_groups[0]["lr"]

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002 by name
            if not job.after_step(self.lr):
                control.should_training_stop = True

    arguments = SFTConfig(
        output_dir=str(job.folder / "trl"),
        max_steps=job.plan.total,
        gradient_accumulation_steps=1,
        max_grad_norm=settings.clip or 0.0,
        gradient_checkpointing=bool(settings.gradient_checkpointing),
        bf16=False,  # no autocast: the base computes in the dtype it was loaded in
        seed=settings.seed % 2**32,
        use_cpu=device.type == "cpu",
        dataset_kwargs={"skip_prepare_dataset": True},
        remove_unused_columns=False,
        max_length=None,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = StepTrainer(
        model=job.model,
        args=arguments,
        train_dataset=Dataset.from_dict({"input_ids": [[0]], "labels": [[0]]}),  # the data loader above has the rows
        data_collator=_as_is,
        processing_class=_no_tokenizer(),
        optimizers=(optimizer, schedule),
        callbacks=[AfterStep()],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _only_adapters_train(model: Any, checkpointing: bool) -> None:
    """Train mode for the adapters alone, so that the base's own dropout stays off; the root's flag steers TRL."""
    from peft.tuners.lora.layer import LoraLayer
    from transformers.modeling_layers import GradientCheckpointingLayer

    model.eval()
    model.training = True
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.training = True  # type: ignore[attr-defined]
            module.lora_dropout.train()
        elif checkpointing and isinstance(module, GradientCheckpointingLayer):
            module.training = True


def _as_is(items: Any) -> Any:
    return items


def _no_tokenizer() -> Any:
    """``SFTTrainer`` asks for a tokenizer; the rows are ids already, so an empty one will do."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    empty = Tokenizer(models.WordLevel({"<pad>": 0}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=empty, pad_token="<pad>", eos_token="<pad>")
