"""What fits where, what to choose and why, and what to change when nothing fits.

A method is chosen by the loss it risks, not by the memory it saves: 16-bit LoRA where it fits, QLoRA where that does
not, DoRA and full fine-tuning only as rows of the table. The rank follows the number of rows: LoRA needs little
capacity for format and style, and a high rank learns a small set by heart. ``tokens_per_step`` aims at enough steps
per epoch to learn from and enough rows per step for a steady gradient.

Thresholds are rules of thumb with their reasons beside them; the measured baseline and the eval gate decide.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tunegate.errors import Problem
from tunegate.plan.devices import Device
from tunegate.plan.memory import MemoryPlan, PlanInputs, cheapest_checkpointing, estimate, largest_tokens, with_tokens
from tunegate.plan.shapes import Target
from tunegate.plan.time import TimePlan, Workload, cost, training_time

METHODS = ("full", "lora", "dora", "qlora", "qdora")
FEW_ROWS, SOME_ROWS, MANY_ROWS = 500, 5_000, 50_000
STEPS_PER_EPOCH = 50  # fewer leave the schedule no room
ROWS_PER_STEP = 4  # fewer make the gradient of a step depend on single rows


def as_method(p: PlanInputs, name: str) -> PlanInputs:
    """The same run by another of :data:`METHODS`."""
    if name not in METHODS:
        raise ValueError(f"unknown method {name!r}")
    if name == "full":  # 16-bit weights, gradients and moments, as full fine-tuning recipes for one node have them
        return replace(p, method="full", quantization=None, targets=(), itemsize=2, adapter_itemsize=2, dropout=False)
    packing = (p.quantization or "nf4") if name[0] == "q" else None
    return replace(p, method="dora" if name.endswith("dora") else "lora", quantization=packing)


def methods_for(p: PlanInputs) -> tuple[str, ...]:
    """Those of :data:`METHODS` that the base allows: one stored quantized stays so."""
    return tuple(name for name in METHODS if name[0] == "q" or p.shape.quantized is None)


def method_name(p: PlanInputs) -> str:
    return "full" if p.method == "full" else ("q" if p.quantization else "") + p.method


def on_device(p: PlanInputs, device: Device) -> PlanInputs:
    """The run as it computes on ``device``: fused layers on a CPU, autograd in bf16 elsewhere."""
    return p if device.kind == "cpu" else replace(p, engine="eager", itemsize=2)


@dataclass(frozen=True)
class Option:
    """One method on one device. ``inputs`` is None where nothing fits; ``most_tokens`` fit in memory at once."""

    device: Device
    method: str
    inputs: PlanInputs | None
    memory: MemoryPlan
    most_tokens: int
    time: TimePlan | None

    @property
    def money(self) -> tuple[float | None, float | None]:
        return cost(self.time.seconds, self.device) if self.time else (None, None)

    def to_json(self) -> dict[str, Any]:
        on_demand, spot = self.money
        return {
            "device": self.device.name,
            "method": self.method,
            "fits": self.inputs is not None,
            "bytes": self.memory.total,
            "checkpointing": self.inputs.checkpointing if self.inputs else None,
            "most_tokens": self.most_tokens,
            "seconds": self.time.seconds if self.time else None,
            "cost_on_demand": on_demand,
            "cost_spot": spot,
        }


def option(p: PlanInputs, w: Workload, device: Device, method: str) -> Option:
    """``method`` on ``device`` with the least recomputation that fits."""
    wanted = on_device(as_method(p, method), device)
    found = cheapest_checkpointing(wanted, device.memory)
    shown = found or replace(wanted, checkpointing="all")
    most = largest_tokens(replace(shown, checkpointing="all"), device.memory) if found else 0
    time = training_time(found, w, device) if found else None
    return Option(device, method, found, estimate(shown), most, time)


def best_option(p: PlanInputs, w: Workload, device: Device, methods: Sequence[str]) -> Option:
    """The first of ``methods`` that fits ``device``, else the last one tried."""
    tried = [option(p, w, device, name) for name in methods]
    return next((one for one in tried if one.inputs is not None), tried[-1])


@dataclass(frozen=True)
class Advice:
    """A recommended value with its reason."""

    what: str
    value: str
    reason: str


def advise(w: Workload, options: Sequence[Option], here: Option | None) -> list[Advice]:
    """Method, rank, tokens per step and device, each with its reason."""
    rows = w.rows
    return [_method(here, options), _rank(rows), _tokens_per_step(w), *_device(options, here)]


def _method(here: Option | None, options: Sequence[Option]) -> Advice:
    found = here if here is not None and here.inputs is not None else _cheapest(options)
    found = found or next((o for o in options if o.inputs is not None), None)
    if found is None:
        return Advice("method", "none", "no device of the table holds it, not even quantized with recomputation")
    name = found.method
    if name in ("lora", "dora"):
        return Advice("method", name, f"16- or 32-bit weights fit {found.device.name}; nothing is lost to quantization")
    if name == "full":
        return Advice("method", name, f"asked for, and it fits {found.device.name}")
    return Advice("method", name, f"{name[1:]} on unquantized weights does not fit {found.device.name}")


def _rank(rows: int) -> Advice:
    if rows < FEW_ROWS:
        return Advice("rank", "8", f"{rows:,} rows: a small set is learned by heart at a high rank; begin at 4 to 8")
    if rows < SOME_ROWS:
        return Advice("rank", "16", f"{rows:,} rows: 8 to 16 carry format, style and labels")
    if rows < MANY_ROWS:
        return Advice("rank", "16", f"{rows:,} rows: 16 first, 32 to 64 for a new domain if 16 underfits")
    return Advice("rank", "32", f"{rows:,} rows: enough to fill rank 32; 128 only if lower ranks provably underfit")


def _tokens_per_step(w: Workload) -> Advice:
    rows, total = w.rows, w.row_tokens
    mean = total / max(1, rows)
    by_steps, by_rows = total / STEPS_PER_EPOCH, ROWS_PER_STEP * mean
    wanted = max(by_rows, min(by_steps, 16_384.0))
    value = 1 << max(8, round(wanted).bit_length() - 1)
    if value < by_rows:
        value *= 2
    steps = max(1, round(total / value))
    reason = f"about {steps:,} steps an epoch of {max(1, round(value / mean)):,} rows ({mean:,.0f} tokens each)"
    return Advice("tokens_per_step", str(value), reason)


def _device(options: Sequence[Option], here: Option | None) -> list[Advice]:
    cheapest = _cheapest(options)
    fitting = [o for o in options if o.inputs is not None and o.time is not None]
    found = []
    if here is not None and here.time is not None:
        found.append(Advice("this machine", _hours(here.time.seconds), f"{here.method} fits here and costs no rent"))
    if cheapest is not None and cheapest.time is not None:
        price, hours = cheapest.money[0], _hours(cheapest.time.seconds)
        reason = f"the lowest price on demand: {price:,.2f} for {hours}, {cheapest.method}"
        found.append(Advice("device", cheapest.device.name, reason))
    if fitting:
        quick = min(fitting, key=lambda o: o.time.seconds if o.time else 0.0)
        assert quick.time is not None
        found.append(Advice("fastest", quick.device.name, f"{_hours(quick.time.seconds)}, {quick.method}"))
    return found


def _cheapest(options: Sequence[Option]) -> Option | None:
    """The lowest price on demand."""
    priced = [(price, o) for o in options if (price := o.money[0]) is not None]
    return min(priced, key=lambda pair: (pair[0], pair[1].device.name))[1] if priced else None


def _hours(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


# --- what to change -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Change:
    """A setting that lowers the peak. ``loss`` orders changes: what they cost in time or quality."""

    setting: str
    inputs: PlanInputs
    loss: str


def _smaller_rank(p: PlanInputs) -> PlanInputs:
    targets = tuple(Target(t.inputs, t.outputs, max(1, t.rank // 2)) for t in p.targets)
    return replace(p, targets=targets)


def changes(p: PlanInputs, longest: int, *, quantizes: bool, eight_bit: bool, offloads: bool) -> list[Change]:
    """Single changes, the cheapest first. ``longest`` is the longest row: a batch cannot be smaller. The flags say
    which settings this version of the engine has."""
    found = []
    tokens = p.tokens
    while tokens > longest:
        tokens = max(longest, tokens // 2)
        found.append(
            Change(f"train.tokens_per_batch: {tokens}", with_tokens(p, tokens), "the same steps, a little slower")
        )
    if p.checkpointing in ("none", "some"):
        again = replace(p, checkpointing="all")
        found.append(Change("train.gradient_checkpointing: true", again, "the same result, about a third more time"))
        if longest < p.tokens:
            both = with_tokens(again, longest)
            setting = f"train.gradient_checkpointing: true with train.tokens_per_batch: {longest}"
            found.append(Change(setting, both, "the same result, about a third more time"))
    if offloads and p.checkpointing != "offload":
        setting = "train.gradient_checkpointing: offload"
        found.append(Change(setting, replace(p, checkpointing="offload"), "the same result, layer inputs in a file"))
    if eight_bit and p.optimizer == "adamw":
        found.append(Change("train.optimizer: adamw_8bit", replace(p, optimizer="adamw_8bit"), "moments in 8 bits"))
    if quantizes and p.quantization is None:
        packed = replace(p, quantization="nf4")
        found.append(Change("base.quantization: nf4", packed, "the weights lose some precision"))
        least = with_tokens(replace(packed, checkpointing="all"), min(longest, p.tokens))
        setting = f"base.quantization: nf4, train.gradient_checkpointing: true, train.tokens_per_batch: {least.tokens}"
        found.append(Change(setting, least, "less precise weights, about a third more time"))
    if p.targets and max(t.rank for t in p.targets) > 4:
        rank = max(t.rank for t in p.targets) // 2
        found.append(Change(f"train.rank: {rank}", _smaller_rank(p), "a smaller adapter"))
    return found


def fit_problem(
    p: PlanInputs,
    available: int,
    longest: int,
    *,
    correct: Callable[[PlanInputs, int], int] = lambda inputs, total: total,
    quantizes: bool = False,
    eight_bit: bool = False,
    offloads: bool = False,
) -> Problem | None:
    """None if the run fits ``available`` bytes; else what is too large and the three cheapest changes that fit.

    ``correct`` turns an estimate into what this machine was seen to need.
    """

    def needed(inputs: PlanInputs) -> int:
        return correct(inputs, estimate(inputs).total)

    total = needed(p)
    if total <= available:
        return None
    options = changes(p, longest, quantizes=quantizes, eight_bit=eight_bit, offloads=offloads)
    fitting: dict[str, tuple[Change, int]] = {}  # of one setting's values, the first that fits
    for change in options:
        size = needed(change.inputs)
        if size <= available:
            fitting.setdefault(change.setting.partition(":")[0], (change, size))
    if fitting:
        fix = "; or ".join(f"`{c.setting}` ({size / 1e9:.1f} GB: {c.loss})" for c, size in list(fitting.values())[:3])
    else:
        least = min([needed(change.inputs) for change in options], default=total)
        fix = f"no setting brings it below {least / 1e9:.1f} GB: free memory, use a smaller base, or a larger machine"
    biggest = sorted(estimate(p).at_peak(), key=lambda part: -part.bytes)[:4]
    got = ", ".join(f"{part.name} {part.bytes / 1e9:.1f} GB" for part in biggest)
    return Problem(
        f"the run will not fit in memory: it needs about {total / 1e9:.1f} GB",
        "this machine",
        f"at most {available / 1e9:.1f} GB, which are free",
        got,
        fix,
    )
