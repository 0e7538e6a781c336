"""What GGUF calls a model's tensors and settings, and how it lays them out, for the families llama.cpp runs as we do.

A table gives each ``model_type`` its GGUF architecture and the two things that differ in the tensors: Llama's q and k
rows are interleaved (rotary pair i of a head in rows 2i and 2i + 1; transformers keeps the pairs half a head apart),
and Gemma's norms are stored with the one that transformers adds. Names come from the ``gguf`` library's own map.

A setting that llama.cpp takes for granted is checked, because it would be computed wrongly there without a word: the
activation, the attention scale, the pattern of sliding windows, the rotary scaling. What the file cannot say is an
error here.

Sources: llama.cpp's ``conversion/`` (b11739) and ``src/models/``. It reads no weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from tunegate.errors import InputError, Problem

ROPE_FREQS = "rope_freqs.weight"
_SILU, _GELU = ("silu", "swish"), ("gelu_pytorch_tanh", "gelu_new")


@dataclass(frozen=True)
class Family:
    """One architecture of llama.cpp. ``window_period``: every so many-th layer attends to everything, the others to a
    window; 0: no windows. ``free_period``: the file says the period. ``scale_heads_at``: numbers of layers at which
    attention is divided by the root of hidden size / heads instead of the head's size."""

    arch: str
    interleaved: bool = False
    norm_shift: float = 0.0
    activations: tuple[str, ...] = _SILU
    tied: bool = False
    window_period: int = 0
    free_period: bool = False
    scale_heads_at: tuple[int, ...] = ()


_LLAMA = Family("llama", interleaved=True)
_GEMMA = Family("gemma", norm_shift=1.0, activations=_GELU, tied=True)
FAMILIES: dict[str, Family] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": Family("qwen2"),
    "qwen3": Family("qwen3"),
    "gemma": _GEMMA,
    "gemma2": Family(
        "gemma2", norm_shift=1.0, activations=_GELU, tied=True, window_period=2, scale_heads_at=(46,)
    ),
    "gemma3_text": Family(
        "gemma3", norm_shift=1.0, activations=_GELU, tied=True, window_period=6, free_period=True, scale_heads_at=(62,)
    ),
}  # fmt: skip


def family_of(config: Any) -> Family:
    """:class:`InputError` with everything about ``config`` that GGUF or llama.cpp cannot express."""
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise InputError(
            "this architecture is not exported to GGUF",
            where=f"model_type {config.model_type!r}",
            expected=", ".join(FAMILIES),
            fix="`tunegate merge`, then llama.cpp's own convert_hf_to_gguf.py on the merged folder",
        )
    problems = [
        Problem(f"llama.cpp computes this otherwise: {what}", "config.json", expected, got)
        for what, expected, got in _differences(config, family)
        if got
    ]
    if problems:
        raise InputError(problems)
    return family


def _differences(config: Any, family: Family) -> list[tuple[str, str, str]]:
    """(what, expected, found) for each setting; nothing found where it is as llama.cpp has it."""
    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    rope, _ = rope_parameters(config)
    kinds = ("default", "linear", "yarn", "llama3")
    found = [
        ("the activation", " or ".join(family.activations), "" if activation in family.activations else activation),
        ("rotary scaling", ", ".join(kinds), "" if rope["rope_type"] in kinds else str(rope["rope_type"])),
        ("the head", "tied to the embedding", "" if config.tie_word_embeddings or not family.tied else "a head apart"),
    ]
    scalar = getattr(config, "query_pre_attn_scalar", None)
    if scalar is not None:
        wanted = (
            config.hidden_size // config.num_attention_heads
            if config.num_hidden_layers in family.scale_heads_at
            else config.head_dim
        )
        found.append(("query_pre_attn_scalar", str(wanted), "" if scalar == wanted else str(scalar)))
    for cap in (
        "attn_logit_softcapping",
        "final_logit_softcapping",
    ):  # gemma2 always has both in llama.cpp, others none
        value, wanted = getattr(config, cap, None), "a number" if family.arch == "gemma2" else "none"
        found.append((cap, wanted, "" if (value is not None) == (wanted == "a number") else str(value)))
    if getattr(config, "use_bidirectional_attention", False):
        found.append(("attention", "causal", "bidirectional"))
    if family.window_period:
        period = window_period(config)
        fits = period is not None and (period == family.window_period or family.free_period)
        what = "one layer without a window in every " + ("period" if family.free_period else str(family.window_period))
        found.append(("layer_types", what, "" if fits else ", ".join(config.layer_types[:8])))
    return found


def window_period(config: Any) -> int | None:
    """n where layers n, 2n, ... (counted from 1) and no others attend to everything; None where there is no such n."""
    full = [i + 1 for i, kind in enumerate(config.layer_types) if kind == "full_attention"]
    period = full[0] if full else config.num_hidden_layers + 1
    wanted = list(range(period, config.num_hidden_layers + 1, period))
    return period if full == wanted and period > 1 else None


def rope_parameters(config: Any) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Rotary settings of layers that attend to everything, and of layers with a window where those differ."""
    found = dict(config.rope_parameters)
    full = dict(found.get("full_attention", found))
    window = found.get("sliding_attention")
    full.setdefault("rope_type", "default")
    return full, dict(window) if window else None


@cache
def _name_map(arch: str, blocks: int) -> Any:
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    return get_tensor_name_map(next(key for key, name in MODEL_ARCH_NAMES.items() if name == arch), blocks)


def gguf_name(family: Family, blocks: int, name: str) -> str:
    """GGUF's name of a parameter, ``model.layers.0.mlp.up_proj.weight`` for one. :class:`InputError` if it has none."""
    path, _, kind = name.rpartition(".")
    found = _name_map(family.arch, blocks).get_name(path)
    if found is None:
        raise InputError("GGUF has no name for this tensor", where=name, expected=f"a tensor of {family.arch}")
    return f"{found}.{kind}"


def interleave(rows: Tensor, heads: int) -> Tensor:
    """q or k rows (heads * dim, ...) in llama.cpp's order: row i + dim/2 of a head goes beside row i."""
    return rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def separate(rows: Tensor, heads: int) -> Tensor:
    """The inverse of :func:`interleave`."""
    return rows.reshape(heads, rows.shape[0] // heads // 2, 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def heads_of(config: Any, family: Family, name: str) -> int | None:
    """How many heads the rows of ``name`` (with or without ``.weight``) are interleaved in; None: they are not."""
    last = name.removesuffix(".weight").removesuffix(".bias").rpartition(".")[2]
    counts = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    return counts.get(last) if family.interleaved else None


def to_gguf(config: Any, family: Family, name: str, values: Tensor) -> Tensor:
    """A parameter's values as GGUF lays them out."""
    heads = heads_of(config, family, name)
    if heads is not None:
        return interleave(values, heads)
    if family.norm_shift and name.endswith("norm.weight"):
        return values.float() + family.norm_shift
    return values


def from_gguf(config: Any, family: Family, name: str, values: Tensor) -> Tensor:
    """The inverse of :func:`to_gguf`."""
    heads = heads_of(config, family, name)
    if heads is not None:
        return separate(values, heads)
    return values - family.norm_shift if family.norm_shift and name.endswith("norm.weight") else values


def rope_freqs(config: Any) -> Tensor | None:
    """Llama 3's divisors of the rotary frequencies (head_dim / 2,) fp32, which GGUF holds as a tensor."""
    rope, _ = rope_parameters(config)
    if rope["rope_type"] != "llama3":
        return None
    dim = _head_dim(config)
    freqs = 1.0 / (rope["rope_theta"] ** (torch.arange(0, dim, 2, dtype=torch.float64) / dim))
    length, factor = rope["original_max_position_embeddings"], rope["factor"]
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    waves = length / (2 * math.pi / freqs)  # how many turns a pair makes within the first training's context
    smooth = ((waves - low) / (high - low)).clamp(0.0, 1.0)
    return (1.0 / ((1.0 - smooth) / factor + smooth)).float()


def _head_dim(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def write_settings(writer: Any, config: Any, family: Family) -> None:
    """The architecture's keys into a ``gguf.GGUFWriter``."""
    for put, value in _settings(config, family).items():
        getattr(writer, f"add_{put}")(value)
    rope, window = rope_parameters(config)
    writer.add_rope_freq_base(rope["rope_theta"])
    if window is not None:
        writer.add_rope_freq_base_swa(window["rope_theta"])
    _write_rope_scaling(writer, rope)


def _settings(config: Any, family: Family) -> Mapping[str, Any]:
    window = getattr(config, "sliding_window", None)
    length = config.max_position_embeddings
    if window and not family.window_period:  # llama.cpp knows no window here; within it, the two are the same
        length = min(length, window)
    values = {
        "block_count": config.num_hidden_layers,
        "context_length": length,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "head_count": config.num_attention_heads,
        "head_count_kv": config.num_key_value_heads,
        "layer_norm_rms_eps": config.rms_norm_eps,
        "key_length": _head_dim(config),
        "value_length": _head_dim(config),
        "rope_dimension_count": _head_dim(config),
        "vocab_size": config.vocab_size,
    }
    optional: dict[str, Callable[[], Any]] = {
        "attn_logit_softcapping": lambda: getattr(config, "attn_logit_softcapping", None),
        "final_logit_softcapping": lambda: getattr(config, "final_logit_softcapping", None),
        "sliding_window": lambda: window if family.window_period else None,
        "sliding_window_pattern": lambda: window_period(config) if family.free_period else None,
    }
    return {**values, **{key: value for key, get in optional.items() if (value := get()) is not None}}


def _write_rope_scaling(writer: Any, rope: Mapping[str, Any]) -> None:
    from gguf import RopeScalingType

    if rope["rope_type"] not in ("linear", "yarn"):
        return  # default needs none, llama3 is a tensor
    writer.add_rope_scaling_type(RopeScalingType(rope["rope_type"]))
    writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        names = {"attention_factor": "attn_factor", "beta_fast": "beta_fast", "beta_slow": "beta_slow"}
        for key, name in names.items():
            if rope.get(key) is not None:
                getattr(writer, f"add_rope_scaling_yarn_{name}")(rope[key])
