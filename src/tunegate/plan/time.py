"""Operations of a training run, and the time and money they take.

A linear weight costs 2 operations a token forward and 2 for the gradient of its input; a frozen one has no gradient
of its own, an adapter's and a fully trained one's cost 2 more. The head works on target positions only. Causal
attention of a row of L tokens costs ``2 * 2 * heads * D * L (L + 1) / 2`` forward and 2.5 times that backward (flash
attention computes the scores again). Recomputed layers cost their forward once more.

Seconds are operations / (peak x utilisation). ``UTILISATION`` is the share of the data sheet's peak that a training
step reaches, recomputed work counted; its values and where they come from stand in docs/plan.md. On a CPU they are a
first guess until a run or a probe has been measured there.

It knows nothing of input pipelines, start-up or the network.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tunegate.plan.devices import Device
from tunegate.plan.memory import PlanInputs, weight_bytes

# Share of the peak: (fast: fused kernels, no padding; plain: a padded loop on the model's own code)
UTILISATION = {"cuda": (0.60, 0.50), "apple": (0.39, 0.39), "cpu": (0.60, 0.30)}
NF4_COST = 1.08  # dequantizing each weight for each product, at thousands of tokens a product
DORA_COST = 1.25  # PEFT measures +26 % (docs/plan.md)
STEP_SECONDS = 0.01  # what a step costs besides its tokens
LAUNCH_SECONDS = 1e-3  # a GPU's decoder layer, forward and backward: about 200 launches of 5 microseconds
ITEM_SECONDS = 0.002  # rendering and scoring an answer


@dataclass(frozen=True)
class Workload:
    """Rows as lengths in tokens, all of them ``repeat`` times. ``computed`` is the share of tokens that is computed
    (shared prefixes once), ``targets`` the share that reaches the vocabulary. ``steps`` counts optimizer steps of the
    whole run."""

    lengths: tuple[int, ...]
    epochs: float
    steps: int
    computed: float = 1.0
    targets: float = 1.0
    repeat: int = 1

    @property
    def rows(self) -> int:
        return len(self.lengths) * self.repeat

    @property
    def row_tokens(self) -> int:
        return sum(self.lengths) * self.repeat

    @property
    def tokens(self) -> float:
        """Row tokens of the whole run."""
        return self.row_tokens * self.epochs

    @property
    def mean_context(self) -> float:
        """Keys that a token sees, on average."""
        return sum(n * (n + 1) / 2 for n in self.lengths) / max(1, sum(self.lengths))


def even_rows(rows: int, tokens: int, epochs: float, tokens_per_step: int, *, targets: float = 1.0) -> Workload:
    """``rows`` rows of ``tokens`` tokens each."""
    each = max(1, tokens_per_step // tokens)
    return Workload((tokens,), epochs, math.ceil(rows / each * epochs), targets=targets, repeat=rows)


def operations_per_token(p: PlanInputs, w: Workload) -> dict[str, float]:
    """Operations of training for one computed token, by part."""
    s = p.shape
    linear, head = 2.0 * s.linear, 2.0 * s.vocab * s.hidden * min(1.0, w.targets / max(w.computed, 1e-9))
    scores = 4.0 * s.layers * s.heads * s.head_dim * w.mean_context
    adapters = 2.0 * sum(t.rank * (t.inputs + t.outputs) for t in p.targets)
    again = p.recomputed / s.layers
    forward = linear + scores
    weights = linear if p.method == "full" else 0.0
    return {
        "forward": forward + head,
        "backward": linear + 2.5 * scores + head + weights + (head if p.method == "full" else 0.0),
        "adapters": 3.0 * adapters,
        "recomputed": again * (forward + adapters),
    }


@dataclass(frozen=True)
class TimePlan:
    """Seconds of training, with what they were computed from."""

    seconds: float
    operations: float
    tflops: float
    utilisation: float
    tokens: float

    @property
    def hours(self) -> float:
        return self.seconds / 3600

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "tokens_per_second": self.tokens_per_second}


def training_time(p: PlanInputs, w: Workload, device: Device, *, fast: bool = True) -> TimePlan:
    """Time of the optimizer steps on ``device``."""
    operations = sum(operations_per_token(p, w).values()) * w.tokens * w.computed
    share = UTILISATION[device.kind][0 if fast else 1]
    if p.quantization:
        share /= NF4_COST
    if p.method == "dora":
        share /= DORA_COST
    least = STEP_SECONDS + (0.0 if device.kind == "cpu" else LAUNCH_SECONDS * p.shape.layers)
    seconds = operations / (device.tflops * 1e12 * share) + least * w.steps
    return TimePlan(seconds, operations, device.tflops, share, w.tokens)


def answer_time(p: PlanInputs, prompts: Sequence[int], new: int, device: Device, *, rows: int = 64) -> float:
    """Seconds to answer ``prompts`` (lengths) with up to ``new`` tokens each, in groups of ``rows``: every new token
    of a group reads all weights once, or computes, whichever takes longer."""
    if not prompts:
        return 0.0
    s = p.shape
    rate = device.tflops * 1e12 * UTILISATION[device.kind][0]
    per_token = 2.0 * s.linear
    fill = sum(prompts) * per_token / rate
    groups = math.ceil(len(prompts) / rows)
    held, constants = weight_bytes(p)
    read = (held + constants) / (device.bandwidth * 1e9)
    compute = min(rows, len(prompts)) * (per_token + 2.0 * s.vocab * s.hidden) / rate
    return fill + groups * new * max(read, compute) + ITEM_SECONDS * len(prompts)


def cost(seconds: float, device: Device) -> tuple[float | None, float | None]:
    """(on demand, spot), None where the sheet has no price."""
    hours = seconds / 3600
    on_demand = None if device.on_demand is None else hours * device.on_demand
    return on_demand, None if device.spot is None else hours * device.spot
