"""Liger's Triton kernels for norms and gated products, put in on the instances of a model's decoder layers on CUDA.

Layers are recognised as the fused CPU layers are (``fused_shape``): by what they compute, not by their class. Norms
become ``LigerRMSNormFunction``, a layer's gated product ``LigerSiLUMulFunction`` or, for the tanh GELU,
``LigerGELUMulFunction``; linear layers stay, with the adapters in them. The caller proves the result on a few tokens
and takes it out again where it differs.

Rotary positions and residual additions stay the model's own: Liger's versions replace functions of the modelling
module, for every model of the process. The loss is ``kernels.cross_entropy``'s, by chunks, on every device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from tunegate.engine.fused_shape import Norm, Shape, recognise


@dataclass(frozen=True)
class Operations:
    """``rms_norm(x, weight, eps, offset)``; ``gated`` maps an activation to ``f(gate, up)``."""

    rms_norm: Callable[[Tensor, Tensor, float, float], Tensor]
    gated: dict[str, Callable[[Tensor, Tensor], Tensor]]


def operations() -> Operations | str:
    """Liger's, or the reason why there are none."""
    try:
        from liger_kernel.ops.geglu import LigerGELUMulFunction
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction
        from liger_kernel.ops.swiglu import LigerSiLUMulFunction
    except Exception as error:  # it imports Triton, which looks for a driver
        return f"no Liger kernels ({type(error).__name__}: {error})"

    def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
        # Gemma multiplies in fp32 and rounds once, Llama rounds before the weight; in_place would overwrite gradients
        # that the residual still needs.
        casting = "gemma" if offset else "llama"
        out: Tensor = LigerRMSNormFunction.apply(x, weight, eps, offset, casting, False)
        return out

    return Operations(rms_norm, {"silu": LigerSiLUMulFunction.apply, "gelu_tanh": LigerGELUMulFunction.apply})


class LigerLayers:
    """The decoder layers of ``backbone`` that are recognised, with ``operations`` in them once :meth:`install` ran."""

    def __init__(self, backbone: nn.Module, operations: Operations):
        layers = getattr(backbone, "layers", None)
        found = [(layer, recognise(layer)) for layer in layers] if isinstance(layers, nn.ModuleList) else []
        self.count = len(found)
        self.shapes: dict[nn.Module, Shape] = {layer: shape for layer, shape in found if isinstance(shape, Shape)}
        self.operations = operations
        self._changed: list[nn.Module] = []

    def install(self) -> None:
        for layer, shape in self.shapes.items():
            norms = (
                shape.attention_norm, shape.mlp_norm, shape.query_norm, shape.key_norm, shape.after_attention,
                shape.after_mlp,
            )  # fmt: skip
            for norm in norms:
                if norm is not None:
                    self._replace(norm.module, _Normed(norm, self.operations))
            product = self.operations.gated.get(shape.activation)
            if product is not None:
                self._replace(layer.mlp, _Gated(layer.mlp, shape, product))

    def _replace(self, module: Any, forward: Callable[[Tensor], Tensor]) -> None:
        module.forward = forward
        self._changed.append(module)

    def remove(self) -> None:
        for module in self._changed:
            module.__dict__.pop("forward", None)
        self._changed.clear()

    def describe(self) -> str:
        return f"Liger's norms and gated products in {len(self.shapes)} of {self.count} layers"


@dataclass(frozen=True)
class _Normed:
    norm: Norm
    operations: Operations

    def __call__(self, x: Tensor) -> Tensor:
        return self.operations.rms_norm(x, self.norm.weight, self.norm.eps, self.norm.offset)


@dataclass(frozen=True)
class _Gated:
    mlp: Any
    shape: Shape
    product: Callable[[Tensor, Tensor], Tensor]

    def __call__(self, x: Tensor) -> Tensor:
        parts = [getattr(self.mlp, name)(x) for name in self.shape.gate_up]
        gate, up = parts if len(parts) == 2 else (part.contiguous() for part in parts[0].chunk(2, dim=-1))
        out: Tensor = self.mlp.down_proj(self.product(gate, up))
        return out
