"""8-bit weights, bit for bit as LLM.int8() stores them: signed bytes and one scale for each row.

Dettmers et al. 2022 (arXiv 2208.07339): a row's scale is its largest magnitude, an element's code is
``round(w * (1 / scale * 127))``, ties to even, and stands for ``code * scale * (1 / 127)``, every step rounded to fp32.
Codes, scales and what they give back are those of bitsandbytes' ``int8_vectorwise_quant`` on CPUs, for fp32, bf16 and
fp16 weights. A row of zeros, or of magnitudes below 3.7e-37 whose factor is infinite, has the code 0 everywhere, there
as here.

Only the weight is quantized. LLM.int8() also rounds activations to 8 bits and takes outlying columns out of that; here
activations keep their 16 or 32 bits, so that no column has to be treated apart. What the codes are computed with is
``linear``, the layer is ``nf4.QuantizedLinear``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tunegate.kernels import native


def codes_of(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(codes int8 (n * k,), scales fp32 (n,)) of a dense (n, k) matrix in fp32, bf16 or fp16. Where it holds NaN or
    infinity, so do the scales."""
    rows, columns = weight.shape
    lib = native.library_for(weight)
    if lib is None:
        return _codes_twin(weight)
    codes, absmax = torch.empty(rows * columns, dtype=torch.int8), torch.empty(rows)
    wide = weight.dtype == torch.float32
    lib.int8_quantize(weight.data_ptr(), wide, rows, columns, codes.data_ptr(), absmax.data_ptr())
    return codes, absmax


def _codes_twin(weight: Tensor) -> tuple[Tensor, Tensor]:
    absmax = weight.abs().amax(1).float() if weight.shape[1] else torch.zeros(len(weight), device=weight.device)
    scaled = (weight * (127.0 / absmax)[:, None]).round()
    return scaled.nan_to_num(0, 0, 0).to(torch.int8).view(-1), absmax


def decode_into(codes: Tensor, absmax: Tensor, out: Tensor) -> None:
    """The kernels' way from ``codes`` (n * k,) and ``absmax`` (n,) to ``out`` (n, k), fp32 or bf16, all dense."""
    lib = native.library_for(out)
    assert lib is not None
    wide = out.dtype == torch.float32
    lib.int8_dequantize(codes.data_ptr(), absmax.data_ptr(), *out.shape, out.data_ptr(), wide)
