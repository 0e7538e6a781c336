"""Shared by the tests of row-wise kernels: inputs, bounds and the comparison over numbers of threads."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager

import torch
from torch import Tensor

DTYPES = [torch.float32, torch.bfloat16]
HALF_ULP = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8}  # one rounding to nearest, relative


def rows(count: int, columns: int, dtype: torch.dtype, seed: int, *, gap: int = 0, scale: float = 1.0) -> Tensor:
    """(count, columns) normal values; gap > 0 leaves so many foreign elements between rows."""
    values = torch.randn(count, columns + gap, generator=torch.Generator().manual_seed(seed)) * scale
    return values.to(dtype)[:, :columns]


def assert_rounded(got: Tensor, exact: Tensor, *, slack: float) -> None:
    """``got`` is ``exact`` (fp64) rounded once to its dtype, up to fp32 error of ``slack`` * (1 + |exact|)."""
    assert got.shape == exact.shape
    error = (got.double() - exact).abs()
    bound = HALF_ULP[got.dtype] * exact.abs() * 1.01 + slack * (1 + exact.abs())
    worst = (error - bound).max().item() if error.numel() else 0.0
    assert worst <= 0, f"error {error.max().item():.3g}, {worst:.3g} above its bound"


@contextmanager
def torch_threads(count: int):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def assert_same_bytes_on_any_threads(run: Callable[[], tuple[Tensor, ...]]) -> None:
    """``run`` returns new tensors; they must be the same bytes on 1, 2 and 3 threads."""
    results = []
    for count in (1, 2, 3):
        with torch_threads(count):
            results.append(run())
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
