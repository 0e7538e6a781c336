"""Compute kernels, each beside its plain PyTorch twin, and the one place that picks between them.

Callers import :func:`attention`, :func:`decode_attention` and :func:`linear_cross_entropy` from here. Today every
call runs the PyTorch twin; a faster kernel is added beside its twin and chosen here, nowhere else.
"""

from tunegate.kernels.attention import DecodeStore, Layout, Plan, attention, decode_attention, similar_lengths
from tunegate.kernels.cross_entropy import Head, linear_cross_entropy, target_log_probs

__all__ = [
    "DecodeStore",
    "Head",
    "Layout",
    "Plan",
    "attention",
    "decode_attention",
    "linear_cross_entropy",
    "similar_lengths",
    "target_log_probs",
]
