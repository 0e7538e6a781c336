"""Which optimizer a setting means, and its state as a file and back."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from toy_runs import section
from tunegate.engine.checkpoint import TrainState, load_checkpoint, save_checkpoint
from tunegate.engine.optimizers import check_optimizer, from_bitsandbytes, make_optimizer, state_tensors
from tunegate.errors import InputError
from tunegate.kernels.adamw import FusedAdamW

OPTIONS: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}


def _adapter() -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"q.lora_A": (64, 64), "q.lora_B": (80, 64), "k.lora_A": (4, 64)}
    return {name: nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in shapes.items()}


def _steps(parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        for parameter in parameters.values():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()


def test_settings_name_their_optimizer() -> None:
    for name, eight_bit in (("adamw", False), ("adamw_8bit", True)):
        made = make_optimizer(_adapter(), section(optimizer=name, lr_plus_ratio=4.0))
        assert isinstance(made, FusedAdamW) and made.eight_bit is eight_bit
        slow, fast = made.param_groups
        assert [p.shape[0] for p in fast["params"]] == [80] and fast["peak"] == 4 * slow["peak"]


def test_what_a_device_does_not_have_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    paged, plain = section(optimizer="paged_adamw_8bit"), section(optimizer="adamw_8bit")
    with pytest.raises(InputError, match=r"(?s)^train\.optimizer.*a CUDA device.*cpu.*adamw_8bit"):
        check_optimizer(paged, "cpu")
    with pytest.raises(InputError, match="paged"):
        make_optimizer(_adapter(), paged)
    check_optimizer(plain, "cpu")
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    check_optimizer(section(), "cuda")
    for settings in (paged, plain):
        with pytest.raises(InputError, match=r"(?s)bitsandbytes, which is not installed.*pip install bitsandbytes"):
            check_optimizer(settings, "cuda:0")
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: object())
    check_optimizer(paged, "cuda:0")


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit", "bitsandbytes", "bitsandbytes paged"])
def test_a_state_returns_as_it_was(name: str, tmp_path: Path) -> None:
    def build() -> tuple[dict[str, nn.Parameter], torch.optim.Optimizer]:
        parameters = _adapter()
        if not name.startswith("bitsandbytes"):
            return parameters, make_optimizer(parameters, section(optimizer=name))
        pytest.importorskip("bitsandbytes")
        groups = [{"params": [p]} for p in parameters.values()]
        kind = "paged_adamw_8bit" if "paged" in name else "adamw_8bit"
        return parameters, from_bitsandbytes(kind, groups, OPTIONS)

    parameters, optimizer = build()
    _steps(parameters, optimizer, 0, 3)
    save_checkpoint(tmp_path, "b3:x", TrainState(step=3), parameters, optimizer)
    again, restored = build()
    load_checkpoint(tmp_path / "step-00000003", again, restored)
    before, after = state_tensors(parameters, optimizer), state_tensors(again, restored)
    assert before.keys() == after.keys() and not any("qmap" in key for key in before)
    assert ("q.lora_A/state1" in before) is (name != "adamw")
    for key, value in before.items():
        assert value.dtype is after[key].dtype and torch.equal(value, after[key]), key
    _steps(parameters, optimizer, 3, 6)
    _steps(again, restored, 3, 6)
    for key, parameter in parameters.items():
        assert torch.equal(parameter, again[key])
