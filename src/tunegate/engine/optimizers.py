"""The optimizer that ``train.optimizer`` names, its parameter groups, and its state as tensors.

``adamw`` and, on CPUs, ``adamw_8bit`` are tunegate's own (``kernels.adamw``). On CUDA the 8-bit ones are
bitsandbytes' ``AdamW8bit`` and ``PagedAdamW8bit``, imported when they are asked for; paged states lie in memory that
the driver moves between GPU and CPU. All keep moments of small tensors in fp32.

A state is written as named tensors and read back as it was. It does not convert the state of one optimizer to another:
the setting is part of a run's key, so a checkpoint of another one is never met.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tunegate.config import TrainSection
from tunegate.errors import InputError, Problem
from tunegate.kernels.adamw import FusedAdamW
from tunegate.kernels.adamw8 import LEAST, moment_bytes

_BITSANDBYTES = {"adamw_8bit": "AdamW8bit", "paged_adamw_8bit": "PagedAdamW8bit"}


def check_optimizer(settings: TrainSection, device: str) -> None:
    """:class:`InputError` if ``settings.optimizer`` does not exist on ``device``. Imports nothing."""
    name = settings.optimizer
    if name == "adamw":
        return
    cuda = device.startswith("cuda")
    problem = None
    if name == "paged_adamw_8bit" and not cuda:
        problem = Problem(
            "a paged optimizer moves its state between GPU and CPU memory, and this run has no GPU",
            "train.optimizer",
            "a CUDA device",
            device,
            "set `optimizer: adamw_8bit`: its state is as small",
        )
    elif cuda and importlib.util.find_spec("bitsandbytes") is None:
        problem = Problem(
            f"{name} on a GPU needs bitsandbytes, which is not installed",
            "train.optimizer",
            fix="pip install bitsandbytes, or set `optimizer: adamw`",
        )
    if problem is not None:
        raise InputError(problem)


def make_optimizer(parameters: dict[str, nn.Parameter], settings: TrainSection) -> torch.optim.Optimizer:
    """AdamW over the adapter. With LoRA+ (arXiv:2402.12354) B learns ``lr_plus_ratio`` times as fast as A.

    Each group's ``peak`` is its largest learning rate. :class:`InputError` as :func:`check_optimizer`.
    """
    fast = [p for name, p in parameters.items() if name.endswith("lora_B")]
    slow = [p for name, p in parameters.items() if not name.endswith("lora_B")]
    assert settings.lr is not None
    groups = [
        {"params": slow, "peak": settings.lr},
        {"params": fast, "peak": settings.lr * settings.lr_plus_ratio},
    ]
    options: dict[str, Any] = {
        "lr": settings.lr,
        "betas": (settings.beta1, settings.beta2),
        "eps": settings.epsilon,
        "weight_decay": settings.weight_decay,
    }
    device = next((str(p.device) for p in parameters.values()), "cpu")
    check_optimizer(settings, device)
    if settings.optimizer != "adamw" and device.startswith("cuda"):
        return from_bitsandbytes(settings.optimizer, groups, options)
    return FusedAdamW(groups, eight_bit=settings.optimizer == "adamw_8bit", **options)


def step_bytes(parameters: Mapping[str, nn.Parameter], settings: TrainSection) -> int:
    """Bytes that the first step adds for fp32 ``parameters``: a gradient and two moments of each."""
    eight_bit = settings.optimizer != "adamw"
    counts = [p.numel() for p in parameters.values()]
    return sum(4 * count + moment_bytes(count, eight_bit=eight_bit) for count in counts)


def from_bitsandbytes(name: str, groups: list[dict[str, Any]], options: dict[str, Any]) -> torch.optim.Optimizer:
    """bitsandbytes' optimizer of one of our names, with our smallest quantized tensor."""
    kind = getattr(importlib.import_module("bitsandbytes.optim"), _BITSANDBYTES[name])
    made: torch.optim.Optimizer = kind(groups, min_8bit_size=LEAST, **options)
    return made


def state_tensors(parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """``NAME/KIND`` -> tensor for everything the optimizer remembers of the parameters. Tables of values that
    bitsandbytes keeps with each state (``qmap1``, ``qmap2``) are constants and left out."""
    return {
        f"{name}/{kind}": value if isinstance(value, Tensor) else torch.tensor(value)
        for name, parameter in parameters.items()
        for kind, value in optimizer.state[parameter].items()
        if not kind.startswith("qmap")
    }


def restore_state(
    parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, stored: Mapping[str, Tensor]
) -> None:
    """Put back what :func:`state_tensors` gave. A parameter that had no state has none afterwards."""
    names = {id(parameter): name for name, parameter in parameters.items()}
    kinds: dict[str, dict[str, Tensor]] = {name: {} for name in parameters}
    for key, value in stored.items():
        name, _, kind = key.rpartition("/")
        kinds[name][kind] = value
    for group, place, parameter in _members(optimizer):
        found = kinds[names[id(parameter)]]
        state = optimizer.state[parameter]
        if found and hasattr(optimizer, "init_state"):  # bitsandbytes allocates (paged) and knows its tables
            optimizer.init_state(optimizer.param_groups[group], parameter, group, place)
        for kind, value in found.items():
            there = state.get(kind)
            if isinstance(there, int):
                state[kind] = int(value)
            elif isinstance(there, Tensor) and there.dtype is value.dtype:
                there.copy_(value)
            else:
                state[kind] = value if kind == "step" else value.to(parameter.device)


def _members(optimizer: torch.optim.Optimizer) -> Iterator[tuple[int, int, nn.Parameter]]:
    """(index of the group, place in it, parameter)."""
    for index, group in enumerate(optimizer.param_groups):
        for place, parameter in enumerate(group["params"]):
            yield index, place, parameter
