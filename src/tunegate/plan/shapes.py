"""The shape of a model without its weights: which linear layers it has, and how many parameters of each kind.

From a ``config.json``: transformers' own class is built on the meta device, where tensors have shapes and no memory,
and its parameters are counted. From flags: a Llama-shaped decoder by closed formula,
``n = V H (1 or 2) + L (H D (2 heads + 2 kv_heads) + 3 H I + 2 H) + H``, with D a head's dimensions and I the width of
the MLP; what is not given is derived, and every assumption is listed.

It opens no weights and downloads no more than one JSON file.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from tunegate.adapter.spec import AdapterSpec
from tunegate.engine.activations import LayerSizes
from tunegate.errors import InputError, Problem
from tunegate.kernels.formats import INT8

HEAD_DIM = 128
Packing = Literal["nf4", "int8"]  # 4 bits of whatever format, 8 bits
_FUSED_NORMS = 2  # RMS norms of hidden width in a plain decoder layer; Gemma 2 and 3 have four

# (parameters, layers, hidden) of well-known decoders, for a size that comes alone.
_KNOWN = (
    (0.135e9, 30, 576), (0.36e9, 32, 960), (0.5e9, 24, 896), (1.2e9, 16, 2048), (1.7e9, 24, 2048),
    (3.2e9, 28, 3072), (7e9, 32, 4096), (8e9, 32, 4096), (14e9, 48, 5120), (32e9, 64, 5120), (70e9, 80, 8192),
    (123e9, 88, 12288), (405e9, 126, 16384),
)  # fmt: skip


def packing(format: str) -> Packing | None:
    """How large a format's weights are: those of all 4-bit formats are of one size. ``none`` is no packing."""
    return None if format == "none" else "int8" if format == INT8 else "nf4"


@dataclass(frozen=True)
class Linear:
    """A linear layer that ``all-linear`` adapts and quantization packs: its path in the model and (in, out)."""

    path: str
    inputs: int
    outputs: int

    @property
    def elements(self) -> int:
        return self.inputs * self.outputs


@dataclass(frozen=True)
class Target:
    """An adapted layer: (in, out) and the rank of its adapter."""

    inputs: int
    outputs: int
    rank: int


@dataclass(frozen=True)
class ModelShape:
    """Sizes in elements. ``embedding`` and ``head`` are the input table and the output layer (0 where they are one
    tensor); ``other`` is everything that is none of the linear layers: norms, biases, experts, convolutions.

    ``fused`` says that the decoder layers are of a class the CPU engine fuses; ``packed`` that q, k and v (gate and
    up) are one layer. ``stored`` is the bytes of a parameter in the checkpoint; ``quantized`` how its linear
    layers are stored (with ``double_quant``) but for those named by ``kept``. ``assumed`` tells what was not given.
    """

    name: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    linears: tuple[Linear, ...]
    embedding: int
    head: int
    other: int
    gated: bool = True
    fused: bool = True
    head_norms: bool = False
    sandwich: bool = False
    packed: bool = False
    stored: int = 2
    quantized: Packing | None = None
    double_quant: bool = True
    kept: tuple[str, ...] = ()
    assumed: tuple[str, ...] = ()

    @property
    def linear(self) -> int:
        return sum(one.elements for one in self.linears)

    @property
    def parameters(self) -> int:
        return self.linear + self.embedding + self.head + self.other

    @property
    def largest(self) -> int:
        """Elements of the largest tensor."""
        return max(self.embedding, self.head, *(one.elements for one in self.linears), 0)

    @property
    def layer(self) -> LayerSizes:
        """A decoder layer's sizes."""
        return LayerSizes(
            self.hidden, self.heads, self.kv_heads, self.head_dim, self.intermediate,
            head_norms=self.head_norms, sandwich=self.sandwich, packed=self.packed,
        )  # fmt: skip

    def targets(self, spec: AdapterSpec) -> tuple[Target, ...]:
        """The layers ``spec`` adapts."""
        return tuple(
            Target(one.inputs, one.outputs, spec.rank_for(one.path))
            for one in self.linears
            if spec.selects(one.path, in_all_linear=True)
        )

    def to_json(self) -> dict[str, Any]:
        names = ("name", "hidden", "layers", "heads", "kv_heads", "head_dim", "intermediate", "vocab")
        counts = {"linear": self.linear, "embedding": self.embedding, "head": self.head, "other": self.other}
        return {
            **{name: getattr(self, name) for name in names},
            "parameters": self.parameters,
            "parts": counts,
            "assumed": list(self.assumed),
        }


# --- from config.json --------------------------------------------------------------------------------------------


def shape_of_folder(folder: Path, name: str, *, trust_remote_code: bool = False) -> ModelShape:
    """The shape of the model that ``folder/config.json`` describes. :class:`InputError` if it is no causal LM."""
    from tunegate.model.bnb_files import stored_in_config
    from tunegate.model.loading import empty_model
    from tunegate.model.weights import load_object

    shape = shape_of_model(empty_model(folder, trust_remote_code=trust_remote_code), name)
    packed = stored_in_config(load_object(folder / "config.json"))
    if packed is None:
        return shape
    return replace(shape, quantized=packing(packed[0]), double_quant=packed[1], kept=packed[2])


def shape_of_model(model: Any, name: str) -> ModelShape:
    """The shape of a transformers causal LM, on the meta device or loaded."""
    from tunegate.adapter.inject import find_targets
    from tunegate.adapter.layers import features
    from tunegate.engine.fused_shape import KNOWN

    config = model.config.get_text_config()
    found, _ = find_targets(model, AdapterSpec(rank=1, alpha=1.0), strict=False)
    linears = []
    for path, module in found.items():
        sizes = features(module)
        assert sizes is not None
        linears.append(Linear(path, *sizes))
    table, output = model.get_input_embeddings(), model.get_output_embeddings()
    embedding = table.weight.numel()
    tied = output is None or output.weight is table.weight or bool(getattr(config, "tie_word_embeddings", False))
    head = 0 if tied else output.weight.numel()
    skipped = {id(output.weight)} if tied and output is not None else set()
    total = sum(p.numel() for p in model.parameters() if id(p) not in skipped or p is table.weight)
    layer = _first_layer(model)
    names = {path.rpartition(".")[2] for path in found}
    heads = int(config.num_attention_heads)
    return ModelShape(
        name=name,
        hidden=int(config.hidden_size),
        layers=int(config.num_hidden_layers),
        heads=heads,
        kv_heads=int(getattr(config, "num_key_value_heads", None) or heads),
        head_dim=int(getattr(config, "head_dim", None) or config.hidden_size // heads),
        intermediate=_intermediate(config, linears),
        vocab=int(config.vocab_size),
        linears=tuple(linears),
        embedding=embedding,
        head=head,
        other=total - embedding - head - sum(one.elements for one in linears),
        gated=bool(names & {"gate_proj", "gate_up_proj"}),
        fused=type(layer).__name__ in KNOWN,
        head_norms=any(path.endswith("q_norm") for path, _ in layer.named_modules()) if layer is not None else False,
        sandwich=hasattr(layer, "pre_feedforward_layernorm"),
        packed="qkv_proj" in names,
        stored=4 if str(getattr(config, "dtype", None)) == "torch.float32" else 2,
    )


def _first_layer(model: Any) -> Any:
    layers = getattr(model.base_model, "layers", None)
    return layers[0] if layers is not None and len(layers) else None


def _intermediate(config: Any, linears: list[Linear]) -> int:
    size = getattr(config, "intermediate_size", None)
    if isinstance(size, int):
        return size
    widest = [one.outputs for one in linears if one.inputs == config.hidden_size]
    return max(widest, default=4 * int(config.hidden_size))


# --- from flags --------------------------------------------------------------------------------------------------


def shape_of_sizes(sizes: Mapping[str, int | None], *, tied: bool = False, name: str = "") -> ModelShape:
    """A Llama-shaped model. ``sizes``: params, layers, hidden, heads, kv_heads, head_dim, intermediate, vocab; those
    that are None are derived. :class:`InputError` if they contradict each other or say too little."""
    given = {key: value for key, value in sizes.items() if value}
    _check_enough(given)
    assumed: list[str] = []

    def choose(key: str, default: int, why: str) -> int:
        if key not in given:
            assumed.append(f"{key} {default:,} ({why})")
        return given.get(key, default)

    wanted = given.get("params")
    near = min(_KNOWN, key=lambda known: abs(math.log((wanted or known[0]) / known[0])))
    layers = choose("layers", near[1], "as known models of this size")
    hidden = choose("hidden", near[2], "as known models of this size")
    head_dim = choose("head_dim", HEAD_DIM if hidden >= 1024 else 64, "usual")
    heads = choose("heads", max(1, hidden // head_dim), "hidden / head_dim")
    kv_heads = choose("kv_heads", min(8, heads), "grouped-query attention, usual")
    vocab = choose("vocab", 32_000, "Llama 2's; newer models have 128,000 to 152,000")
    intermediate = given.get("intermediate")
    if intermediate is None:
        intermediate = _solve_intermediate(wanted, (layers, hidden, heads, kv_heads, head_dim, vocab), tied)
        reason = "solved from the parameter count" if wanted else "8/3 of hidden"
        assumed.append(f"intermediate {intermediate:,} ({reason})")
    shape = llama_shape(
        name or f"{(wanted or 0) / 1e9:g}B" if wanted else name or "by flags",
        (layers, hidden, heads, kv_heads, head_dim, intermediate, vocab),
        tied=tied,
    )
    if wanted and "intermediate" in given and abs(shape.parameters / wanted - 1) > 0.05:
        raise InputError(
            "the sizes do not give the parameter count",
            where="--params",
            expected=f"{wanted:,}",
            got=f"{shape.parameters:,} from {layers} layers of width {hidden:,} and MLP {intermediate:,}",
            fix="leave out --params or --intermediate: it is derived",
        )
    return replace(shape, assumed=tuple(assumed))


def _check_enough(given: Mapping[str, int]) -> None:
    problems = [
        Problem("not a size", f"--{key.replace('_', '-')}", "a whole number above 0", str(value))
        for key, value in given.items()
        if value < 1
    ]
    if "params" not in given and not {"layers", "hidden"} <= given.keys():
        fix = "--params 8B, or --layers 32 --hidden 4096, or --base with a config.json"
        problems.append(Problem("the model's size is not given", "--params", fix=fix))
    if "heads" in given and "kv_heads" in given and given["heads"] % given["kv_heads"]:
        expected = f"a divisor of --heads {given['heads']}"
        problems.append(Problem("not a number of key heads", "--kv-heads", expected, str(given["kv_heads"])))
    if problems:
        raise InputError(problems)


def _solve_intermediate(wanted: int | None, sizes: tuple[int, int, int, int, int, int], tied: bool) -> int:
    layers, hidden, heads, kv_heads, head_dim, vocab = sizes
    if not wanted:
        return max(64, round(8 * hidden / 3 / 64) * 64)
    attention = hidden * head_dim * (2 * heads + 2 * kv_heads)
    left = wanted - vocab * hidden * (1 if tied else 2) - hidden - layers * (attention + 2 * hidden)
    width = left / (3 * hidden * layers)
    if width < hidden / 2:
        raise InputError(
            "the sizes leave no room for the MLP",
            where="--params",
            got=f"{wanted:,} with {layers} layers of width {hidden:,} and a vocabulary of {vocab:,}",
            fix="fewer --layers, a smaller --hidden or --vocab, or --tied",
        )
    step = 128 if width >= 1024 else 8
    return max(step, round(width / step) * step)


def llama_shape(name: str, sizes: tuple[int, int, int, int, int, int, int], *, tied: bool = False) -> ModelShape:
    """A Llama model: (layers, hidden, heads, kv_heads, head_dim, intermediate, vocab)."""
    layers, hidden, heads, kv_heads, head_dim, intermediate, vocab = sizes
    q, kv = heads * head_dim, kv_heads * head_dim
    parts = {
        "self_attn.q_proj": (hidden, q),
        "self_attn.k_proj": (hidden, kv),
        "self_attn.v_proj": (hidden, kv),
        "self_attn.o_proj": (q, hidden),
        "mlp.gate_proj": (hidden, intermediate),
        "mlp.up_proj": (hidden, intermediate),
        "mlp.down_proj": (intermediate, hidden),
    }
    linears = [Linear(f"model.layers.{n}.{part}", *io) for n in range(layers) for part, io in parts.items()]
    return ModelShape(
        name=name,
        hidden=hidden,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate=intermediate,
        vocab=vocab,
        linears=tuple(linears),
        embedding=vocab * hidden,
        head=0 if tied else vocab * hidden,
        other=hidden * (_FUSED_NORMS * layers + 1),
    )
