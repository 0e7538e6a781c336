"""One rank and one scale for a whole adapter, for formats that cannot say more.

PEFT lets every module have its own rank, alpha and, for rsLoRA, another rule for the scale. Other formats know one
scale, some of them one rank. Here the smaller factors are padded with zeros to the largest rank, and where a module's
scale differs from the common one the ratio goes into its B; ``scale * B A`` stays what it was (to one rounding of B).

It reads no files and computes no deltas.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from tunegate.adapter.files import module_paths, tensor_name
from tunegate.adapter.spec import AdapterSpec


@dataclass(frozen=True)
class Factors:
    """a (r, in), b (out, r) and, for DoRA, magnitude (out,); fp32."""

    a: Tensor
    b: Tensor
    magnitude: Tensor | None = None


@dataclass(frozen=True)
class Flat:
    """An adapter whose modules all have ``rank`` and ``scale``. ``folded`` names those whose B was rescaled, ``padded``
    those whose factors were widened."""

    rank: int
    scale: float
    modules: Mapping[str, Factors]
    folded: tuple[str, ...]
    padded: tuple[str, ...]

    @property
    def alpha(self) -> float:
        """What formats that divide by the rank call alpha. For rsLoRA this is its alpha times the root of the rank."""
        return self.scale * self.rank


def factors_of(spec: AdapterSpec, state: Mapping[str, Tensor], path: str) -> Factors:
    magnitude = state[tensor_name(path, "lora_magnitude_vector")] if spec.use_dora else None
    return Factors(state[tensor_name(path, "lora_A")], state[tensor_name(path, "lora_B")], magnitude)


def flatten(spec: AdapterSpec, state: Mapping[str, Tensor], rank: int | None = None) -> Flat:
    """The adapter at its largest rank, or at ``rank`` (at least that), and at its most frequent scale."""
    paths = module_paths(state)
    largest = max(spec.rank_for(path) for path in paths)
    wide = largest if rank is None else rank
    if wide < largest:
        raise ValueError(f"rank {wide} cannot hold factors of rank {largest}")
    counts = Counter(spec.scale_for(path) for path in paths)
    scale = max(counts, key=lambda value: (counts[value], value))
    modules, folded, padded = {}, [], []
    for path in paths:
        own, found = spec.scale_for(path), factors_of(spec, state, path)
        a, b = found.a, found.b
        if own != scale:
            b = b * (own / scale)
            folded.append(path)
        missing = wide - a.shape[0]
        if missing:
            a = torch.nn.functional.pad(a, (0, 0, 0, missing))
            b = torch.nn.functional.pad(b, (0, missing))
            padded.append(path)
        modules[path] = Factors(a.contiguous(), b.contiguous(), found.magnitude)
    return Flat(wide, scale, modules, tuple(folded), tuple(padded))
