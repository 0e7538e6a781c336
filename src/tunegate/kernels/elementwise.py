"""What the row-wise kernels share: the checks and the shape before an address is handed over.

A kernel gets a base address, a shape and a row stride, and trusts them. So shapes, dtypes and strides are checked
here, for the native call and for its twin alike. It computes nothing.
"""

from __future__ import annotations

from torch import Tensor

from tunegate.kernels.native import KERNEL_DTYPES


def check_rows(name: str, tensor: Tensor, like: Tensor, *, written: bool = False) -> None:
    """``tensor`` must have the (rows, columns) and dtype of ``like``, with adjacent elements in each row."""
    if tensor.dim() != 2 or tensor.shape != like.shape:
        raise ValueError(f"{name} must be (rows, columns) = {tuple(like.shape)}, got {tuple(tensor.shape)}")
    if tensor.dtype != like.dtype or not like.dtype.is_floating_point:
        raise ValueError(f"{name} must be {like.dtype} like the input, got {tensor.dtype}")
    row_stride, stride = tensor.stride()
    rows, columns = tensor.shape
    if stride != 1 and columns > 1:
        raise ValueError(f"{name} needs adjacent elements in a row (inner stride 1), got {stride}; call contiguous()")
    if written and rows > 1 and row_stride < columns:
        raise ValueError(f"{name} is written, so its rows must not overlap; its row stride is {row_stride}")


def check_vector(name: str, tensor: Tensor, length: int) -> None:
    """``tensor`` must be one contiguous row of ``length`` fp32 or bf16 elements."""
    if tensor.shape != (length,) or not tensor.is_contiguous() or tensor.dtype not in KERNEL_DTYPES:
        raise ValueError(
            f"{name} must be a contiguous ({length},) tensor in fp32 or bf16, "
            f"got {tuple(tensor.shape)}, strides {tensor.stride()}, {tensor.dtype}"
        )


def flattened(x: Tensor) -> Tensor:
    """x (..., columns) as a contiguous (rows, columns), for the stand-alone operators."""
    return x.reshape(-1, x.shape[-1]).contiguous()


def rows(tensor: Tensor | None) -> tuple[int, int]:
    """Address and row stride in elements; (0, 0) for None."""
    return (0, 0) if tensor is None else (tensor.data_ptr(), tensor.stride(0))
