"""The one training loop.

Each turn asks, in this order: is an evaluation due, is the run over, is a checkpoint due, was a stop asked for? Then
it takes one optimizer step. A step sums the cross-entropy over its target tokens, across all its micro-batches,
and divides once by their number, so neither accumulation nor packing changes the loss. Dropout draws from a seed
made of the run's seed and the step; nothing random outlives a step, which makes resuming exact.

The eval gate is a callable that scores the adapter on generated answers; the loop keeps the best scored adapter
(ties go to the earlier one), and stops after ``patience`` evaluations without improvement.

It does not know tasks, metrics or files outside its folder, and trains on one device.
"""

from __future__ import annotations

import contextlib
import functools
import math
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from torch.utils.checkpoint import checkpoint

from tunegate.adapter.inject import Injection
from tunegate.config import TrainSection, parse_size
from tunegate.data.pack import split_batches
from tunegate.data.types import Rendered
from tunegate.engine.checkpoint import (
    TrainState,
    find_checkpoint,
    load_checkpoint,
    load_parameters,
    save_checkpoint,
    save_tensors,
)
from tunegate.engine.memory import Saving, choose, give_back_freed, resident_bytes, step_need
from tunegate.engine.optimizers import make_optimizer, step_bytes
from tunegate.engine.runner import Runner, evaluating
from tunegate.engine.schedule import StepPlan, lr_factor
from tunegate.errors import InputError, Problem, TunegateError
from tunegate.files import remove_temporaries
from tunegate.kernels.adamw import clip_and_scale_

ADAPTER_FILE = "adapter.safetensors"


@dataclass(frozen=True)
class Hooks:
    """What the caller hands in. ``evaluate(step)`` returns the score (higher is better) and a JSON-able record;
    ``report`` receives one JSON-able event per step, evaluation and resume; ``stop`` is asked between steps."""

    evaluate: Callable[[int], tuple[float, dict[str, Any]]]
    report: Callable[[dict[str, Any]], None] = lambda event: None
    stop: Callable[[], bool] = lambda: False


@dataclass(frozen=True)
class TrainResult:
    state: TrainState
    total_steps: int
    epochs: float


class Interrupted(TunegateError):
    """The user asked to stop; the run is saved and can go on."""

    exit_code = 130


def train(
    runner: Runner,
    injection: Injection,
    rows: Sequence[Rendered],
    settings: TrainSection,
    folder: Path,
    key: str,
    hooks: Hooks,
) -> TrainResult:
    """Train ``injection`` on ``rows`` and leave the best adapter in it. ``key`` names the run a checkpoint is of.

    :class:`InputError` before the first step if a row cannot be trained on; :class:`Interrupted` when stopped.
    """
    check_rows(runner, rows)
    parameters = injection.parameters()
    optimizer = make_optimizer(parameters, settings)
    plan = StepPlan(rows, settings)
    state = _resume(folder, key, parameters, optimizer, hooks)
    saving = plan_saving(runner, injection, settings, max(settings.tokens_per_batch, max(map(len, rows))))
    if saving.reason:
        hooks.report({"event": "notice", "step": state.step, "text": f"memory: {saving.reason}"})
    folder.mkdir(parents=True, exist_ok=True)
    with _training_mode(runner, injection, settings, saving, folder):
        _loop(runner, parameters, optimizer, plan, state, settings, folder, key, hooks)
    del optimizer
    give_back_freed()  # gradients and moments, before baselines and test ask for memory
    drop_old_best(folder, state)  # again: a process may have been killed between checkpoint and drop
    load_parameters(parameters, read_best(folder, state.best_step))
    return TrainResult(state, plan.total, plan.epochs_done(state.step))


def _loop(
    runner: Runner,
    parameters: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    plan: StepPlan,
    state: TrainState,
    settings: TrainSection,
    folder: Path,
    key: str,
    hooks: Hooks,
) -> None:
    saved = state.step
    while True:
        if plan.is_evaluation(state.step) and state.evaluated != state.step:
            evaluate_adapter(state, parameters, settings, folder, hooks)
            save_checkpoint(folder / "checkpoints", key, state, parameters, optimizer)
            drop_old_best(folder, state)
            saved = state.step
        if state.step >= plan.total or state.stopped_early:
            break
        stopping = hooks.stop()
        if (stopping or state.step % settings.checkpoint_every == 0) and state.step > saved:
            save_checkpoint(folder / "checkpoints", key, state, parameters, optimizer)
            saved = state.step
        if stopping:
            raise Interrupted(f"stopped after step {state.step} of {plan.total}; the same command goes on from there")

        started = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * lr_factor(state.step, plan.total, settings.warmup, settings.schedule)
        loss, norm = _step(runner, parameters, optimizer, plan.rows(state.step), state, settings)
        state.seconds += time.perf_counter() - started
        state.step += 1
        hooks.report(
            {
                "event": "step", "step": state.step, "of": plan.total, "loss": loss, "grad_norm": norm,
                "lr": optimizer.param_groups[0]["lr"], "epoch": round(plan.epochs_done(state.step), 4),
                "tokens_per_second": state.tokens / state.seconds,
            }
        )  # fmt: skip


def check_rows(runner: Runner, rows: Sequence[Rendered]) -> None:
    if not rows:
        raise InputError("there are no rows to train on", where="data.train")
    silent = [row.row_id for row in rows if row.n_targets == 0]
    if silent:
        raise InputError([Problem("the row has no target token to learn", row_id) for row_id in silent])
    runner.check_fit((row.row_id, len(row)) for row in rows)


def _step(
    runner: Runner,
    parameters: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    rows: list[Rendered],
    state: TrainState,
    settings: TrainSection,
) -> tuple[float, float]:
    """One optimizer step; returns mean loss over its target tokens and the gradient norm before clipping."""
    torch.manual_seed(step_seed(settings.seed, state.step))
    batches = split_batches(
        rows, settings.tokens_per_batch, share_prefix=settings.share_prefix and runner.shares_prefix
    )
    targets = sum(batch.n_targets for batch in batches)
    total = 0.0
    for batch in batches:
        loss = runner.loss_sum(batch)
        value = float(loss.detach())
        if not math.isfinite(value):
            raise not_finite_error("loss", value, state, batch.row_ids)
        total += value
        loss.backward()
        del loss  # the last reference to the pass: its memory is free for the next batch
    gradients = [p.grad for p in parameters.values() if p.grad is not None]
    norm = clip_and_scale_(gradients, 1.0 / targets, settings.clip or None)
    if not math.isfinite(norm):
        raise not_finite_error("gradient", norm, state, tuple(row.row_id for row in rows))
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    state.tokens += sum(batch.row_tokens for batch in batches)
    state.computed_tokens += sum(batch.layout.tokens for batch in batches)
    state.target_tokens += targets
    return total / targets, norm


def not_finite_error(what: str, value: float, state: TrainState, row_ids: tuple[str, ...]) -> TunegateError:
    shown = ", ".join(row_ids[:12]) + (f" and {len(row_ids) - 12} more" if len(row_ids) > 12 else "")
    return TunegateError(
        f"the {what} is {value} at step {state.step + 1}",
        where=f"rows {shown}",
        fix="look at these rows (`tunegate check --show`), lower train.lr or train.clip; "
        "the last checkpoint before this step is kept",
    )


def step_seed(seed: int, step: int) -> int:
    return int.from_bytes(blake3(f"{seed}/{step}".encode()).digest(length=8), "little") >> 1


def _resume(
    folder: Path,
    key: str,
    parameters: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    hooks: Hooks,
) -> TrainState:
    if folder.exists():
        remove_temporaries(folder)
    checkpoint = find_checkpoint(folder / "checkpoints", key)
    if checkpoint is None:
        return TrainState()
    state = load_checkpoint(checkpoint, parameters, optimizer)
    hooks.report({"event": "resume", "step": state.step})
    return state


def plan_saving(runner: Runner, injection: Injection, settings: TrainSection, tokens: int) -> Saving:
    """Which layers are recomputed: those that the settings ask for, and more where ``train.memory`` needs it.

    ``tokens`` are the computed tokens of the largest batch. :class:`InputError` for a budget that cannot be met or that
    no exact figure exists for.
    """
    asked, fused = settings.gradient_checkpointing, runner.fused
    count = len(fused.shapes) if fused is not None else len(_recomputable(runner)) if asked else 0
    least = count if asked is True or asked == "offload" else min(count, int(asked))
    if settings.memory is None:
        return Saving(least, offload=asked == "offload")
    layers = fused.layers() if fused is not None else []
    if fused is None or len(layers) != fused.count:
        raise InputError(
            "a memory budget needs fused layers, whose activations are known",
            where="train.memory",
            got=f"{len(layers)} of them; {runner.path_reason}",
            fix="remove it, and set `train.gradient_checkpointing: true` to save memory",
        )
    trained = step_bytes(injection.parameters(), settings)
    vocab = int(runner.model.config.get_text_config().vocab_size)
    need = step_need(layers, tokens, runner.dtype.itemsize, trained, vocab)
    return choose(parse_size(settings.memory), resident_bytes(), need, least)


@contextlib.contextmanager
def _training_mode(
    runner: Runner,
    injection: Injection,
    settings: TrainSection,
    saving: Saving | None = None,
    folder: Path | None = None,
) -> Iterator[None]:
    """Base in eval mode (its own dropout stays off), adapters in train mode, decoder layers recomputed in the
    backward pass as ``saving`` (default: the settings) says, with a file in ``folder``; all as it was afterwards."""
    saving = saving or plan_saving(runner, injection, settings, settings.tokens_per_batch)
    layers = _recomputable(runner)[: saving.recompute] if saving.recompute else []
    with evaluating(runner.model):
        for adapter in injection.modules.values():
            adapter.training = True
        if runner.fused is not None:
            runner.fused.save_less(saving.recompute, folder if saving.offload else None)
        for layer in layers:
            layer.forward = functools.partial(_recomputed, layer.forward)
        try:
            yield
        finally:
            for layer in layers:
                del layer.forward
            if runner.fused is not None:
                runner.fused.save_less(0)


def _recomputable(runner: Runner) -> Sequence[nn.Module]:
    """The decoder layers that are not fused (those recompute by themselves). Their calls are wrapped here:
    transformers' own switch needs them in train mode, which turns on the base's dropout in some architectures (OPT)."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    fused = runner.fused.shapes if runner.fused is not None else {}
    layers = [m for m in runner.backbone.modules() if isinstance(m, GradientCheckpointingLayer) and m not in fused]
    if not layers and not fused:
        raise InputError(
            f"{type(runner.model).__name__} does not support gradient checkpointing",
            where="train.gradient_checkpointing",
            fix="set it to false, and lower train.tokens_per_batch to save memory",
        )
    return layers


def _recomputed(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)


def evaluate_adapter(
    state: TrainState, parameters: dict[str, nn.Parameter], settings: TrainSection, folder: Path, hooks: Hooks
) -> None:
    score, record = hooks.evaluate(state.step)
    better = state.best_score is None or score > state.best_score
    state.without_gain = 0 if better else state.without_gain + 1
    state.evaluated = state.step
    if better:
        state.best_step, state.best_score = state.step, score
        _save_best(folder, state.step, parameters)
    state.stopped_early = state.without_gain >= settings.patience
    state.evaluations.append({"step": state.step, "score": score, "best": better, **record})
    hooks.report({"event": "evaluation", **state.evaluations[-1]})


def _best_folder(folder: Path, step: int) -> Path:
    return folder / f"best-{step:08d}"


def _save_best(folder: Path, step: int, parameters: dict[str, nn.Parameter]) -> None:
    save_tensors(_best_folder(folder, step) / ADAPTER_FILE, {name: p.detach() for name, p in parameters.items()})


def read_best(folder: Path, step: int) -> dict[str, torch.Tensor]:
    path = _best_folder(folder, step) / ADAPTER_FILE
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise TunegateError(
            "the best adapter of this run cannot be read",
            where=str(path),
            got=str(error),
            fix=f"delete {folder} and train again",
        ) from error


def drop_old_best(folder: Path, state: TrainState) -> None:
    """Only once a checkpoint that points to the new best is on disk may the old best go."""
    for old in folder.glob("best-*"):
        if old != _best_folder(folder, state.best_step):
            shutil.rmtree(old, ignore_errors=True)


@torch.no_grad()
def mean_loss(runner: Runner, rows: Sequence[Rendered], tokens_per_batch: int) -> float:
    """Cross-entropy per target token over ``rows``, nats, dropout off."""
    total, targets = 0.0, 0
    with evaluating(runner.model):
        for batch in split_batches(rows, tokens_per_batch, share_prefix=runner.shares_prefix):
            total += float(runner.loss_sum(batch))
            targets += batch.n_targets
    return total / max(targets, 1)
