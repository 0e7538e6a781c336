"""Recognises decoder layers that the fused layer can compute, and reads what is adapted in them.

A :class:`Shape` says what a layer of a known class does, from the layer itself: which norms it has, whether they add
one to their weight, its activation, window and scale. What is easily guessed wrong is measured, not assumed: a norm
and an activation are run on sample values and compared. :func:`resolve` turns a projection, plain or wrapped by an
adapter, into the tensors the kernels need; it is asked anew for each pass, because adapters come and go.

It does not know layers with LayerNorm, parallel attention and MLP, experts, or an odd order of norms: these keep
their own forward, with a reason.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tunegate.adapter.layers import DoRALinear, LoRALinear
from tunegate.adapter.segmented import SegmentedLinear
from tunegate.kernels.linear import QuantizedWeight
from tunegate.kernels.stored import StoredLinear

KNOWN = {
    f"{family}DecoderLayer"
    for family in ("Llama", "Mistral", "Qwen2", "Qwen3", "SmolLM3", "Gemma", "Gemma2", "Gemma3", "Granite", "Phi3")
}
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


@dataclass(frozen=True)
class Norm:
    """RMS norm: ``x / rms(x) * (weight + offset)``."""

    module: Any
    eps: float
    offset: float

    @property
    def weight(self) -> Tensor:
        return self.module.weight.detach()


@dataclass(frozen=True)
class Shape:
    """What a decoder layer computes. Sizes in elements; ``window`` counts the token itself."""

    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    window: int | None
    softcap: float | None
    rotary: bool
    activation: str
    attention_norm: Norm
    mlp_norm: Norm
    query_norm: Norm | None
    key_norm: Norm | None
    after_attention: Norm | None
    after_mlp: Norm | None
    residual: float
    qkv: tuple[str, ...]
    gate_up: tuple[str, ...]


@dataclass(frozen=True)
class Projection:
    """One linear layer as the kernels see it: ``gain * (x W^T + scale * drop(x) A^T B^T) + bias``.

    ``parameters`` are the adapter's own, in the order of the gradients: (), (A, B) or (A, B, magnitude). ``served``:
    rows of the pass may have adapters of their own on top.
    """

    weight: Tensor | QuantizedWeight
    shape: tuple[int, int]
    bias: Tensor | None
    parameters: tuple[nn.Parameter, ...] = ()
    scale: float = 1.0
    dropout: float = 0.0
    gain: Tensor | None = None
    served: SegmentedLinear | None = None

    @property
    def rank(self) -> int:
        return self.parameters[0].shape[0] if self.parameters else 0


def resolve(module: nn.Module) -> Projection | None:
    """The projection, or None if the fused layer cannot compute it as it now is."""
    if isinstance(module, SegmentedLinear):
        plain = resolve(module.now)
        return None if plain is None else replace(plain, served=module)
    adapter = module if isinstance(module, (LoRALinear, DoRALinear)) else None
    base = adapter.base if adapter is not None else module
    weight: Tensor | QuantizedWeight
    if isinstance(base, nn.Linear | StoredLinear) and type(base) in (nn.Linear, StoredLinear):
        weight = base.weight.detach()
        if base.weight.requires_grad or weight.stride(-1) != 1:
            return None
    elif isinstance(quantized := getattr(base, "quantized", None), QuantizedWeight):
        weight = quantized
    else:
        return None
    sizes = (int(base.out_features), int(base.in_features))  # type: ignore[arg-type]
    bias = None if base.bias is None else base.bias.detach()  # type: ignore[operator]
    if adapter is None or not adapter.enabled:
        return Projection(weight, sizes, bias)
    parameters = tuple(adapter.adapter_parameters().values())
    gain = None
    if isinstance(adapter, DoRALinear):
        magnitude = adapter.lora_magnitude_vector.detach()
        if bool((magnitude == 0).any()):  # the backward pass divides by it
            return None
        gain = magnitude / adapter.norm()
    dropout = adapter.dropout if adapter.training else 0.0
    return Projection(weight, sizes, bias, parameters, adapter.scale, dropout, gain)


def recognise(layer: nn.Module) -> Shape | str:
    """The layer's shape, or the reason why it has none here."""
    if type(layer).__name__ not in KNOWN:
        return f"{type(layer).__name__} is not a layer the fused path knows"
    try:
        return _read(layer)
    except (AttributeError, ValueError, NotImplementedError) as error:
        return f"{type(layer).__name__}: {error}"


def _read(layer: Any) -> Shape:
    attention, mlp = layer.self_attn, layer.mlp
    split = hasattr(attention, "q_proj")
    qkv = ("q_proj", "k_proj", "v_proj") if split else ("qkv_proj",)
    gate_up = ("gate_proj", "up_proj") if hasattr(mlp, "gate_proj") else ("gate_up_proj",)
    sandwich = hasattr(layer, "pre_feedforward_layernorm")
    config, dim = attention.config, int(attention.head_dim)
    expected = {"input_layernorm", "post_attention_layernorm", "self_attn.o_proj", "mlp.down_proj"}
    expected |= {f"self_attn.{name}" for name in qkv} | {f"mlp.{name}" for name in gate_up}
    if sandwich:
        expected |= {"pre_feedforward_layernorm", "post_feedforward_layernorm"}
    head_norms = hasattr(attention, "q_norm")
    if head_norms:
        expected |= {"self_attn.q_norm", "self_attn.k_norm"}
    base_names = {_plain(name) for name, _ in layer.named_parameters()}
    base_names |= {_plain(name) for name, _ in layer.named_buffers() if name.endswith(".codes")}  # quantized weights
    if base_names != expected:
        raise ValueError(f"unknown parameters {sorted(base_names ^ expected)}")
    if not getattr(attention, "is_causal", True):
        raise ValueError("its attention is not causal")
    activation = getattr(mlp, "act_fn", None) or mlp.activation_fn
    names = ("pre_feedforward_layernorm", "post_attention_layernorm", "post_feedforward_layernorm")
    before_mlp, after_attention, after_mlp = names if sandwich else ("post_attention_layernorm", None, None)
    return Shape(
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=dim,
        scale=float(attention.scaling),
        window=window_of(config, attention.layer_idx),
        softcap=getattr(attention, "attn_logit_softcapping", None),
        rotary=bool(getattr(attention, "use_rope", True)),
        activation=_activation(activation),
        attention_norm=_norm(layer.input_layernorm),
        mlp_norm=_norm(getattr(layer, before_mlp)),
        query_norm=_norm(attention.q_norm) if head_norms else None,
        key_norm=_norm(attention.k_norm) if head_norms else None,
        after_attention=_norm(getattr(layer, after_attention)) if after_attention else None,
        after_mlp=_norm(getattr(layer, after_mlp)) if after_mlp else None,
        residual=float(getattr(layer, "residual_multiplier", 1.0)),
        qkv=qkv,
        gate_up=gate_up,
    )


def _plain(parameter: str) -> str:
    """The module a parameter belongs to, without a wrapper around it."""
    module = parameter.rpartition(".")[0]
    return module.removesuffix(".base")


def window_of(config: Any, layer: int) -> int | None:
    """The sliding window ``config`` gives ``layer``."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if not kinds:
        return window
    if kinds[layer] not in ("full_attention", "sliding_attention"):
        raise NotImplementedError(f"layers of type {kinds[layer]!r}")
    return window if kinds[layer] == "sliding_attention" else None


@torch.no_grad()
def _norm(module: Any) -> Norm:
    weight = module.weight
    eps = getattr(module, "variance_epsilon", None)
    eps = float(module.eps if eps is None else eps)
    x = torch.linspace(-2.0, 3.0, weight.shape[0], dtype=torch.float32, device=weight.device)[None]
    got = module(x.to(weight.dtype)).float()
    close = 1e-4 if weight.dtype == torch.float32 else 3e-2
    unit = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    for offset in (0.0, 1.0):
        if torch.allclose(got, unit * (weight.float() + offset), rtol=close, atol=close):
            return Norm(module, eps, offset)
    raise ValueError(f"{type(module).__name__} is no RMS norm")


@torch.no_grad()
def _activation(function: Callable[[Tensor], Tensor]) -> str:
    x = torch.linspace(-6.0, 6.0, 241)
    got = function(x)
    for name, known in _ACTIVATIONS.items():
        if torch.allclose(got, known(x), rtol=1e-6, atol=1e-6):
            return name
    raise ValueError(f"unknown activation {type(function).__name__}")
