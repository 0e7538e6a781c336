"""Learning rates and plans by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from toy_runs import section
from tunegate.data.types import Rendered
from tunegate.engine.optimizers import make_optimizer
from tunegate.engine.schedule import StepPlan, lr_factor


def _ten_steps() -> list[Rendered]:
    """Ten rows of which each fills a step of 16 tokens."""
    return [Rendered(f"r:{n}", (n + 3,) * 15, (False,) * 14 + (True,)) for n in range(10)]


@pytest.mark.parametrize(
    "epochs, max_steps, done",
    [
        (1.0, None, {0: 0.0, 5: 0.5, 10: 1.0}),
        (2.5, None, {5: 0.5, 10: 1.0, 19: 1.9, 25: 2.5}),
        (0.5, None, {1: 0.1, 5: 0.5}),
        (3.0, 5, {0: 0.0, 3: 0.3, 5: 0.5}),  # once a division by zero
        (2.0, 10, {10: 1.0}),
        (3.0, 12, {12: 1.2}),
        (1.0, 50, {10: 1.0}),
    ],
)
def test_epochs_done(epochs: float, max_steps: int | None, done: dict[int, float]) -> None:
    plan = StepPlan(_ten_steps(), section(epochs=epochs, max_steps=max_steps, tokens_per_step=16))
    assert plan.total == max(done)
    assert {step: pytest.approx(plan.epochs_done(step)) for step in done} == done


def test_a_plan_gives_every_row_once_an_epoch_in_a_new_order_from_any_step() -> None:
    plan = StepPlan(_ten_steps(), section(epochs=2.5, tokens_per_step=16))
    order = [plan.rows(step)[0].row_id for step in range(plan.total)]
    assert len(order) == 25
    assert set(order[:10]) == set(order[10:20]) == {f"r:{n}" for n in range(10)}
    assert order[:10] != order[10:20]
    jumping = StepPlan(_ten_steps(), section(epochs=2.5, tokens_per_step=16))
    assert [jumping.rows(step)[0].row_id for step in (24, 3, 17, 0)] == [order[n] for n in (24, 3, 17, 0)]


@pytest.mark.parametrize(
    "every, epochs, max_steps, expected",
    [
        ("epoch", 2.0, None, [10, 20]),
        ("epoch", 1.5, None, [10, 15]),
        ("epoch", 0.3, None, [3]),
        ("epoch", 0.01, None, [1]),
        (4, 1.0, None, [4, 8, 10]),
        (7, 2.0, None, [7, 14, 20]),
        (5, 1.0, None, [5, 10]),
        (100, 1.0, None, [10]),
        ("epoch", 3.0, 4, [4]),
        ("epoch", 3.0, 13, [10, 13]),
        (3, 3.0, 4, [3, 4]),
    ],
)
def test_when_the_gate_opens(every: Any, epochs: float, max_steps: int | None, expected: list[int]) -> None:
    plan = StepPlan(_ten_steps(), section(eval_every=every, epochs=epochs, max_steps=max_steps, tokens_per_step=16))
    assert [step for step in range(plan.total + 5) if step <= plan.total and plan.is_evaluation(step)] == expected
    assert plan.total == expected[-1]


@pytest.mark.parametrize(
    "kind, warmup, total, expected",
    [
        ("constant", 0.0, 3, [1, 1, 1]),
        ("constant", 0.5, 4, [0.5, 1, 1, 1]),
        ("linear", 0.0, 4, [1, 0.75, 0.5, 0.25]),
        ("linear", 0.4, 5, [0.5, 1, 1, 2 / 3, 1 / 3]),
        ("cosine", 0.0, 4, [1, 0.5 + math.sqrt(0.125), 0.5, 0.5 - math.sqrt(0.125)]),
        ("cosine", 0.2, 5, [1, 1, 0.5 + math.sqrt(0.125), 0.5, 0.5 - math.sqrt(0.125)]),
        ("linear", 0.05, 1, [1]),
        ("linear", 0.99, 2, [0.5, 1]),
    ],
)
def test_learning_rate_by_hand(kind: str, warmup: float, total: int, expected: list[float]) -> None:
    assert [lr_factor(step, total, warmup, kind) for step in range(total)] == pytest.approx(expected)


def test_the_warm_up_has_as_many_steps_as_asked() -> None:
    # 0.07 * 100 is a little more than 7 in floating point, and would make it 8
    assert [lr_factor(step, 100, 0.07, "constant") for step in range(8)] == pytest.approx(
        [n / 7 for n in range(1, 8)] + [1]
    )


def test_lora_plus_gives_b_its_own_rate() -> None:
    shapes = {"x.lora_A": (2, 3), "x.lora_B": (3, 2), "x.lora_magnitude_vector": (3,)}
    parameters = {name: nn.Parameter(torch.ones(shape)) for name, shape in shapes.items()}
    optimizer = make_optimizer(parameters, section(lr=1e-3, lr_plus_ratio=16.0, weight_decay=0.1, beta1=0.8))
    slow, fast = optimizer.param_groups
    assert [id(p) for p in fast["params"]] == [id(parameters["x.lora_B"])]
    assert {id(p) for p in slow["params"]} == {id(parameters["x.lora_A"]), id(parameters["x.lora_magnitude_vector"])}
    assert (slow["peak"], fast["peak"]) == (1e-3, 16e-3)
    assert slow["weight_decay"] == fast["weight_decay"] == 0.1
    assert slow["betas"] == (0.8, 0.999)
