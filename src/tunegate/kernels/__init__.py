"""Compute kernels, each beside its plain PyTorch twin, and the one place that picks between them.

Callers import :func:`attention`, :func:`decode_attention` and :func:`linear_cross_entropy` from here; the fused layers
call the families' own modules. Each function runs its C++ kernel where :mod:`~tunegate.kernels.native` has one for the
tensors at hand, and its twin otherwise.
"""

from tunegate.kernels.attention import DecodeStore, Layout, Plan, attention, decode_attention, similar_lengths
from tunegate.kernels.cross_entropy import (
    Head,
    all_logits,
    argmax_logits,
    linear_cross_entropy,
    logit_chunks,
    target_log_probs,
)

__all__ = [
    "DecodeStore",
    "Head",
    "Layout",
    "Plan",
    "all_logits",
    "argmax_logits",
    "logit_chunks",
    "attention",
    "decode_attention",
    "linear_cross_entropy",
    "similar_lengths",
    "target_log_probs",
]
