"""The C++ kernels, if this install has them.

``library()`` is the compiled module or None. A kernel's Python side asks once per call, passes addresses
(:func:`address`) when it gets a module, and runs its plain PyTorch twin otherwise. ``TUNEGATE_KERNELS=off`` forces the
twins; ``TUNEGATE_CPU_LEVEL`` names an instruction-set level. An install without a compiler works, slower, and says so
once.

It does not decide per kernel or per shape; the kernels' own modules do.
"""

from __future__ import annotations

import os
import warnings
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

KERNEL_DTYPES = (torch.float32, torch.bfloat16)


SWITCHED_OFF = "switched off by TUNEGATE_KERNELS"


def switched_off() -> bool:
    """Whether the environment asks for plain PyTorch everywhere."""
    return os.environ.get("TUNEGATE_KERNELS", "").lower() in ("off", "0", "no")


@cache
def _load() -> tuple[ModuleType | None, str]:
    """The module and the reason for its level, or None and the reason why not."""
    if switched_off():
        return None, SWITCHED_OFF
    try:
        from tunegate.kernels import _native  # type: ignore[attr-defined]
    except ImportError as error:
        reason = f"not built ({error})"
        warnings.warn(
            f"the C++ kernels are {reason}: plain PyTorch runs instead, several times slower. "
            "Install g++ (or clang) and reinstall tunegate; `tunegate doctor` tells more.",
            stacklevel=3,
        )
        return None, reason
    return _native, _native.level_reason()


def library() -> ModuleType | None:
    """The compiled kernels, told of torch's present number of threads, or None."""
    module = _load()[0]
    if module is not None:
        module.set_threads(torch.get_num_threads())
    return module


def library_for(*tensors: Tensor | None) -> ModuleType | None:
    """The compiled kernels if they take these tensors, or None."""
    return library() if usable(*tensors) else None


def describe() -> tuple[str, str]:
    """(level, reason): the instruction-set level in use, or ``twins``."""
    module, reason = _load()
    return (module.level() if module is not None else "twins"), reason


def address(tensor: Tensor | None) -> int:
    """Where a tensor's elements begin, 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def usable(*tensors: Tensor | None) -> bool:
    """Whether the kernels take these: dense CPU tensors in fp32 or bf16."""
    return all(t is None or (t.device.type == "cpu" and t.dtype in KERNEL_DTYPES) for t in tensors)
