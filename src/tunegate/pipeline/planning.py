"""A task as ``plan`` sees it: its rows as lengths, its settings as inputs; and the prediction kept beside the run.

Before training the prediction is written to ``plan.json`` in the run folder, and a run that does not fit this machine
is refused with the changes that would make it fit. After training what was measured stands beside it, and the
machine's calibration learns from it.

It changes nothing about a run; a machine whose memory cannot be read is not refused.
"""

from __future__ import annotations

import math
import resource
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from tunegate.config import Config, TrainSection, parse_size
from tunegate.data.pack import SHORTEST_PREFIX, Batch, common_prefix, split_batches
from tunegate.data.render import Renderer
from tunegate.data.split import in_order
from tunegate.data.tokens import render_all
from tunegate.data.types import Example, Rendered
from tunegate.engine.schedule import StepPlan
from tunegate.errors import InputError, TunegateError
from tunegate.evaluation.prompts import FEW
from tunegate.files import read_json, write_json
from tunegate.model.loading import choose_device, choose_dtype, eos_ids, load_tokenizer
from tunegate.model.resolve import resolve_config
from tunegate.pipeline.base import base_name, keeps_16_bits, quantized_already
from tunegate.pipeline.folders import is_done
from tunegate.pipeline.prepare import Prepared
from tunegate.pipeline.reading import load_data
from tunegate.pipeline.reporter import Reporter
from tunegate.pipeline.session import adapter_spec
from tunegate.pipeline.steps import LOSS_ROWS
from tunegate.plan import calibrate
from tunegate.plan.devices import Device, available_memory, cpu_device, load_sheet, this_machine
from tunegate.plan.memory import EVALUATION_ROWS, Checkpointing, Evaluation, PlanInputs, estimate
from tunegate.plan.recommend import fit_problem
from tunegate.plan.shapes import ModelShape, packing, shape_of_folder
from tunegate.plan.time import Workload, answer_time, training_time
from tunegate.records import RunRecord

FILE = "plan.json"
STEPS_LOOKED_AT = 200
_FIXED = ("weights", "constants", "adapters", "gradients", "optimizer")
PROMPTS = 4  # baselines that a task with labels has by default
LEAST_STEPS = 3  # fewer are mostly warm-up and say nothing about speed


@dataclass(frozen=True)
class Answers:
    """The run's evaluations: ``prompts`` (lengths) of one answering pass of each kind, and how often it happens."""

    passes: tuple[tuple[str, int, int], ...]  # (what, items, times)
    prompt: int
    new: int

    @property
    def items(self) -> int:
        return sum(items * times for _, items, times in self.passes)


@dataclass(frozen=True)
class TaskPlan:
    """A task's memory and time inputs on this machine. ``longest`` is the longest row in tokens; ``unmet`` says that no
    way to keep activations meets ``train.memory``."""

    inputs: PlanInputs
    workload: Workload
    longest: int
    answers: Answers
    device: Device
    unmet: str = ""


def plan_task(config: Config, reporter: Reporter) -> TaskPlan:
    """From the task file: its data, the base's config and tokenizer. Weights are neither fetched nor read."""
    section = config.task.base
    data = load_data(config)
    name = base_name(config)
    folder, _ = resolve_config(name, section.revision, offline=section.offline, tokenizer=True, report=reporter.line)
    tokenizer = load_tokenizer(folder, trust_remote_code=section.trust_remote_code)
    renderer = Renderer(tokenizer, template=section.template, eos_ids=eos_ids(folder))
    limits = {"max_tokens": config.task.data.max_tokens, "on_long_row": config.task.data.on_long_row}
    train = render_all(data.splits.train, renderer, **limits)  # type: ignore[arg-type]
    valid = render_all(_chosen(data.splits.valid, config), renderer, **limits)  # type: ignore[arg-type]
    device = choose_device(config.task.train.device)
    dtype, _ = choose_dtype(section.compute_dtype, device=device)
    shape = shape_of_folder(folder, name, trust_remote_code=section.trust_remote_code)
    if shape.quantized and section.quantization != "none":
        raise quantized_already(folder, "quantization_config in config.json")
    wanted = config.task.task.prompts
    prompts = PROMPTS if wanted is None else 1 + len(wanted)
    return describe(config, shape, (train, valid, len(data.splits.test)), itemsize=dtype.itemsize, prompts=prompts)


def _chosen(valid: list[Example], config: Config) -> list[Example]:
    most = max(config.task.train.eval_items, config.task.task.prompt_items)
    return in_order(valid)[:most]


def plan_prepared(prepared: Prepared, *, tested: bool = True) -> TaskPlan:
    """The same for a task that is ready to run; without ``tested``, for training alone."""
    base, config = prepared.base, prepared.config
    trusted = config.task.base.trust_remote_code
    shape = shape_of_folder(base.resolved.path, base.resolved.name, trust_remote_code=trusted)
    itemsize = 2 if base.compute_dtype == "bfloat16" else 4
    rows = prepared.train_rows, prepared.valid_rows, len(prepared.data.splits.test) if tested else 0
    if base.recipe is not None and base.recipe["stored"]:  # its config.json need not say so
        shape = replace(shape, quantized=packing(base.recipe["format"]), double_quant=base.recipe["double"])
    return describe(config, shape, rows, itemsize=itemsize, prompts=len(prepared.prompts) if tested else 0)


def describe(
    config: Config,
    shape: ModelShape,
    rows: tuple[Sequence[Rendered], Sequence[Rendered], int],
    *,
    itemsize: int,
    prompts: int,
) -> TaskPlan:
    """Inputs from settings and rendered rows (training, validation, number of test items). ``prompts`` baselines are
    measured."""
    train, valid, test = rows
    if not train:
        raise InputError("there are no rows to train on", where="data.train")
    settings = config.task.train
    machine, device = this_machine(), choose_device(settings.device)
    cuda = device.startswith("cuda")
    threads = settings.threads or torch.get_num_threads()
    batches = _batches(train, settings)
    answers = _answers(config, valid, test, len(batches.steps), prompts)
    method = "dora" if settings.method == "dora" else "lora"
    base = config.task.base
    checkpointing, kept = _recomputation(settings, shape.layers)
    fused = shape.fused and machine.level != "twins"
    inputs = PlanInputs(
        shape=shape if cuda else replace(shape, fused=fused),
        targets=shape.targets(adapter_spec(settings)),
        tokens=batches.tokens,
        loss_tokens=batches.targets,
        method=method,  # type: ignore[arg-type]
        engine="eager" if cuda else "native",
        itemsize=itemsize,
        narrow=keeps_16_bits(settings, device),
        quantization=shape.quantized or packing(base.quantization),
        double_quant=shape.double_quant if shape.quantized else base.double_quantization,
        unquantized=shape.kept if shape.quantized else base.keep_unquantized,
        optimizer=settings.optimizer,
        dropout=settings.dropout > 0,
        checkpointing=checkpointing,
        kept_layers=kept,
        prefix=batches.prefix,
        data_tokens=sum(len(row) for row in (*train, *valid)),
        evaluation=Evaluation(
            rows=min(EVALUATION_ROWS, max(items for _, items, _ in answers.passes)),
            valid_rows=min(EVALUATION_ROWS, len(valid), settings.eval_items),
            prompt=answers.prompt,
            new=answers.new,
            prefix=_prompt_prefix(train, prompts),
            loss_tokens=largest_loss(
                train, valid, settings.tokens_per_batch, share_prefix=settings.share_prefix
            ).layout.tokens,
        ),
        threads=threads,
    )
    unmet = ""
    if settings.memory is not None:
        inputs = within(inputs, parse_size(settings.memory))
        least = estimate(replace(inputs, evaluation=None)).total
        if least > parse_size(settings.memory):
            unmet = f"train.memory: {settings.memory} is not met: the least is about {least / 1e9:.2f} GB (offload)"
    longest = max(len(row) for row in train)
    return TaskPlan(inputs, batches.workload, longest, answers, _here(cuda, itemsize, threads), unmet)


def _recomputation(settings: TrainSection, layers: int) -> tuple[Checkpointing, int]:
    """(choice, layers that keep their activations) as the settings ask for it."""
    asked = settings.gradient_checkpointing
    if isinstance(asked, str):
        return "offload", 0
    if isinstance(asked, bool):
        return ("all", 0) if asked else ("none", 0)
    return ("some", layers - asked) if asked < layers else ("all", 0)


def within(p: PlanInputs, budget: int) -> PlanInputs:
    """``p`` with as few more layers recomputed as a budget needs, as the engine chooses them (its own sum leaves out
    evaluation); inputs in a file where that is not enough."""
    for recomputed in range(p.recomputed, p.shape.layers + 1):
        option = replace(p, checkpointing="some", kept_layers=p.shape.layers - recomputed)
        if estimate(replace(option, evaluation=None)).total <= budget:
            return option if recomputed else replace(p, checkpointing="none")
    return replace(p, checkpointing="offload")


def largest_loss(train: Sequence[Rendered], valid: Sequence[Rendered], tokens: int, *, share_prefix: bool) -> Batch:
    """Of the batches whose loss is measured without training, the one with the most computed tokens."""
    parts = [rows[:LOSS_ROWS] for rows in (train, valid) if rows]
    batches = [batch for rows in parts for batch in split_batches(rows, tokens, share_prefix=share_prefix)]
    return max(batches, key=lambda batch: batch.layout.tokens)


def _here(cuda: bool, itemsize: int, threads: int) -> Device:
    """What the run computes on."""
    if not cuda:
        return cpu_device(this_machine(), itemsize, threads)
    name, memory = torch.cuda.get_device_name(), torch.cuda.mem_get_info()[0]
    plain = name.lower().replace("nvidia", "").replace("geforce", "").replace(" ", "-").strip("-")
    known = [d for d in load_sheet().devices if d.kind == "cuda" and d.name.split("-")[0] in plain.split("-")]
    like = min(known, key=lambda d: abs(d.memory - memory), default=None)
    return Device(name, "cuda", memory, like.tflops if like else 100.0, like.bandwidth if like else 500.0)


@dataclass(frozen=True)
class _Batches:
    """The run's batches: most computed tokens and targets at once, the longest shared prefix, steps and shares."""

    tokens: int
    targets: int
    prefix: int
    steps: tuple[int, ...]
    workload: Workload


def _batches(rows: Sequence[Rendered], settings: TrainSection) -> _Batches:
    plan = StepPlan(rows, settings)
    every = max(1, plan.total // STEPS_LOOKED_AT)
    looked_at = range(0, plan.total, every)
    tokens = targets = prefix = computed = whole = reached = 0
    for step in looked_at:
        for batch in split_batches(plan.rows(step), settings.tokens_per_batch, share_prefix=settings.share_prefix):
            tokens, targets = max(tokens, batch.layout.tokens), max(targets, batch.n_targets)
            prefix = max(prefix, batch.layout.prefix)
            computed, whole = computed + batch.layout.tokens, whole + batch.row_tokens
            reached += batch.n_targets
    lengths = tuple(len(row) for row in rows)
    epochs = plan.epochs_done(plan.total)
    workload = Workload(lengths, epochs, plan.total, computed / whole, reached / whole)
    return _Batches(tokens, max(1, targets), prefix, tuple(plan.ends), workload)


def _prompt_prefix(rows: Sequence[Rendered], prompts: int) -> int:
    """Tokens that prompts share: what rows share, and with prompt baselines their examples."""
    shared = common_prefix([row.ids for row in rows]) if len(rows) > 1 else 0
    shared = shared if shared >= SHORTEST_PREFIX else 0
    return shared + (FEW * sum(len(row) for row in rows) // len(rows) if prompts > 1 else 0)


def _answers(config: Config, valid: Sequence[Rendered], test: int, epochs: int, prompts: int) -> Answers:
    task, train = config.task.task, config.task.train
    firsts = [next((n for n, hit in enumerate(row.target) if hit), len(row)) for row in valid]
    longest = max((row.n_targets for row in valid), default=1)
    new = task.max_new_tokens or longest + longest // 4 + 8
    passes = (
        ("baselines", min(len(valid), task.prompt_items), prompts),
        ("evaluations", min(len(valid), train.eval_items), epochs if train.eval_every == "epoch" else 1),
        ("test", test, 3 if prompts > 1 else 2),
    )
    return Answers(passes, math.ceil(sum(firsts) / max(1, len(firsts))) if firsts else 1, new)


# --- beside the run -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prediction:
    """What a run is expected to take here: as estimated, and corrected by earlier runs."""

    plan: TaskPlan
    raw_bytes: int
    raw_seconds: float
    corrected: calibrate.Corrected

    @property
    def answer_seconds(self) -> float:
        """Evaluations of the whole run, by the same correction as training."""
        answers = self.plan.answers
        raw = sum(
            times * answer_time(self.plan.inputs, [answers.prompt] * items, answers.new, self.plan.device)
            for _, items, times in answers.passes
        )
        return raw * self.corrected.seconds / max(self.raw_seconds, 1e-9)

    def to_json(self) -> dict[str, Any]:
        return {
            "inputs": self.plan.inputs.to_json(),
            "memory": estimate(self.plan.inputs).to_json(),
            "estimated": {"bytes": self.raw_bytes, "seconds": self.raw_seconds},
            "predicted": {**self.corrected.to_json(), "evaluation_seconds": self.answer_seconds},
        }


def predict(plan: TaskPlan) -> Prediction:
    """Memory and time of the training steps on this machine."""
    total = estimate(plan.inputs).total
    seconds = training_time(plan.inputs, plan.workload, plan.device).seconds
    found = calibrate.load_observations(this_machine())
    return Prediction(plan, total, seconds, calibrate.correct(plan.inputs, total, seconds, found))


def check_fit(prediction: Prediction) -> None:
    """:class:`TunegateError` with the cheapest ways out if the run will not fit this machine's memory."""
    inputs, device = prediction.plan.inputs, prediction.plan.device
    found = calibrate.load_observations(this_machine())

    def correct(changed: PlanInputs, total: int) -> int:
        return calibrate.correct(changed, total, 1.0, found).bytes

    available = device.memory if device.kind == "cuda" else available_memory()
    problem = fit_problem(
        inputs,
        available,
        prediction.plan.longest,
        correct=correct,
        quantizes=True,
        eight_bit=True,
        offloads=device.kind == "cpu",
    )
    if problem is not None:
        raise TunegateError(problem)


def check_budget(plan: TaskPlan, memory: str | None) -> None:
    """:class:`InputError` for a ``train.memory`` below what no way to keep activations changes."""
    if memory is None:
        return
    fixed = [p for p in estimate(plan.inputs).parts if p.name in _FIXED]
    least = sum(part.bytes for part in fixed)
    if least > parse_size(memory):
        raise InputError(
            "weights and adapter alone are above the budget",
            where="train.memory",
            expected=f"more than {least / 1e9:.2f} GB",
            got=f"{memory}, against " + ", ".join(f"{part.name} {part.bytes / 1e9:.2f} GB" for part in fixed),
            fix="set `base.quantization: nf4` (weights), lower train.rank, or give more memory",
        )


def begin(prepared: Prepared, run: Path, reporter: Reporter, *, tested: bool) -> Prediction | None:
    """Predict, refuse what does not fit, and write ``plan.json``; None for a run that is trained already or whose
    steps another trainer computes. ``tested``: baselines and test belong to the run, not training alone."""
    if is_done(run / "train", prepared.train_key) or prepared.config.task.train.backend != "native":
        return None
    prediction = predict(plan_prepared(prepared, tested=tested))
    check_budget(prediction.plan, prepared.config.task.train.memory)
    check_fit(prediction)
    corrected = prediction.corrected
    reporter.line(
        f"plan: {corrected.bytes / 2**30:.2f} GiB at the peak ({corrected.bytes_from}), "
        f"{_duration(corrected.seconds)} of training ({corrected.seconds_from})"
    )
    content = {"schema": "Plan/1", "machine": vars(this_machine()), **prediction.to_json(), "measured": None}
    write_json(run / FILE, content)
    return prediction


def finish(prediction: Prediction | None, run: Path, record: RunRecord, peak_before: int) -> None:
    """Write what was measured beside the prediction and teach the calibration. ``peak_before``: the process's peak
    when the run began; a peak that did not rise is an earlier run's and says nothing."""
    if prediction is None:
        return
    peak = peak_rss()
    grown = prediction.plan.device.kind == "cpu" and peak > peak_before
    planned = prediction.plan.workload.steps
    measured = {"bytes": peak if grown else None, "seconds": record.seconds, "steps": record.steps}
    write_json(run / FILE, {**read_json(run / FILE), "measured": measured})
    observation = calibrate.Observation(
        kind=calibrate.kind_of(prediction.plan.inputs),
        tokens=prediction.plan.inputs.tokens,
        predicted_bytes=prediction.raw_bytes,
        measured_bytes=peak if grown else None,
        predicted_seconds=prediction.raw_seconds * record.steps / max(1, planned),  # it may have stopped early
        measured_seconds=record.seconds if record.steps >= LEAST_STEPS else None,
        source="run",
        when=calibrate.now(),
    )
    calibrate.observe(this_machine(), observation)


def peak_rss() -> int:
    """The process's peak so far, bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
