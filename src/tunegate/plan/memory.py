"""Memory of a training run, component by component, from its shape and settings.

The peak is what is held throughout plus the largest of five moments: loading, the loss, a layer's backward pass, an
evaluation between steps, and baselines or test, when no optimizer is held. On CPUs the activations are counted by
replaying the engine's own allocations (``engine.activations``), which are kept for good. Off the CPU, where autograd
keeps what it needs, they are counted per layer and token:

- ``eager``: each norm keeps an fp32 copy and its output; attention keeps q, k, v, its output and a log-sum-exp; the
  MLP keeps gate, activation, up and their product; dropout keeps a mask and the dropped input of each adapter;
- ``compiled``: elementwise results are computed again, as ``torch.compile`` and fused kernels do.

Quantized weights take 4 bits and their constants ``8/64 + 32/(64*256)`` bits a weight with double quantization
(arXiv:2305.14314, section 3), 32/64 without; in int8 they take 8 bits and an fp32 constant a row. AdamW keeps two
moments a parameter; blockwise 8-bit ones take a byte and an fp32 constant for every 256 (arXiv:2110.02861), in tensors
that are not small.

It measures nothing; ``calibrate`` corrects it by what was measured.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from tunegate.adapter.spec import named
from tunegate.engine.activations import (
    LayerPass,
    Replay,
    around_bytes,
    kernel_bytes,
    loss_bytes,
    replay,
    replay_evaluation,
)
from tunegate.kernels.adamw8 import LEAST, moment_bytes
from tunegate.kernels.linear import BLOCK, NESTED_BLOCK
from tunegate.plan.shapes import ModelShape, Packing, Target

Method = Literal["full", "lora", "dora"]
Engine = Literal["native", "eager", "compiled"]
Checkpointing = Literal["none", "some", "all", "offload"]
CHECKPOINTING: tuple[Checkpointing, ...] = ("none", "some", "all", "offload")
Phase = Literal["always", "loading", "kept", "steps", "training", "loss", "backward", "evaluation", "test"]

RUNTIME = 470e6  # Python, torch, transformers, tokenizers and what their allocators hold, measured: docs/plan.md
CONTEXT = 0.5e9  # CUDA context and libraries' workspaces: 0.4 to 0.6 GB on current cards
FRAGMENTATION = 0.05  # of what comes and goes
ROW_TOKEN = 48  # bytes of a rendered token: an id (a Python int and its pointer) and its target mark
EVALUATION_ROWS, PREFILL_TOKENS = 64, 4096  # engine.generate's rows, and tokens of prompts in a pass
PAGE_TOKENS = 16  # engine.scheduler's


@dataclass(frozen=True)
class Evaluation:
    """Generated answers: ``rows`` side by side in baselines and test, ``valid_rows`` in the evaluations between steps,
    ``prompt`` tokens each beside a shared ``prefix``, ``new`` tokens. ``loss_tokens`` are held at once where a loss is
    taken over rows without gradients."""

    rows: int = EVALUATION_ROWS
    valid_rows: int = EVALUATION_ROWS
    prompt: int = 256
    new: int = 32
    prefix: int = 0
    loss_tokens: int = 0


@dataclass(frozen=True)
class PlanInputs:
    """What memory and time depend on.

    ``tokens`` are computed tokens in memory at once, ``loss_tokens`` those of them that reach the vocabulary.
    ``itemsize`` is the bytes of a frozen weight and of an activation (2: bf16, 4: fp32), ``adapter_itemsize`` those of
    a trained parameter, its gradient and each moment. ``loss``: ``kernel`` for chunks of 64 MiB, ``chunks`` for eight
    parts with 16-bit logits kept, ``whole`` for full logits. ``data_tokens``: tokens of all rows held in memory.
    ``narrow``: weights that the checkpoint stores in fewer bytes keep these. ``unquantized`` names linear layers that
    are not quantized.
    """

    shape: ModelShape
    targets: tuple[Target, ...]
    tokens: int
    loss_tokens: int
    method: Method = "lora"
    engine: Engine = "native"
    itemsize: int = 4
    narrow: bool = True
    quantization: Packing | None = None
    double_quant: bool = True
    unquantized: tuple[str, ...] = ()
    adapter_itemsize: int = 4
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw_8bit"] = "adamw"
    dropout: bool = True
    checkpointing: Checkpointing = "none"
    kept_layers: int = 0
    loss: Literal["kernel", "chunks", "whole"] = "kernel"
    prefix: int = 0
    data_tokens: int = 0
    evaluation: Evaluation | None = None
    threads: int = 2

    @property
    def recomputed(self) -> int:
        """Layers whose activations are computed again."""
        kept = {"none": self.shape.layers, "some": self.kept_layers, "all": 0, "offload": 0}[self.checkpointing]
        return self.shape.layers - kept

    @property
    def trainable(self) -> int:
        """Trained parameters."""
        if self.method == "full":
            return self.shape.parameters
        low = sum(t.rank * (t.inputs + t.outputs) for t in self.targets)
        return low + (sum(t.outputs for t in self.targets) if self.method == "dora" else 0)

    def tensors(self) -> Iterator[int]:
        """Elements of each trained tensor of an adapter."""
        for t in self.targets:
            yield t.rank * t.inputs
            yield t.rank * t.outputs
            if self.method == "dora":
                yield t.outputs

    def to_json(self) -> dict[str, Any]:
        names = [name for name in self.__dataclass_fields__ if name not in ("shape", "targets", "evaluation")]
        ranks = sorted({t.rank for t in self.targets})
        return {
            **{name: getattr(self, name) for name in names},
            "shape": self.shape.to_json(),
            "targets": {"layers": len(self.targets), "ranks": ranks, "trainable": self.trainable},
            "evaluation": vars(self.evaluation) if self.evaluation else None,
        }


@dataclass(frozen=True)
class Part:
    """A component: its bytes, how they come about, and when they are held."""

    name: str
    bytes: int
    how: str
    phase: Phase = "always"


_MOMENTS: dict[Phase, tuple[Phase, ...]] = {
    "backward": ("always", "kept", "steps", "training", "backward"),
    "loss": ("always", "kept", "steps", "training", "loss"),
    "evaluation": ("always", "kept", "steps", "evaluation"),
    "test": ("always", "kept", "test"),
    "loading": ("always", "loading"),
}


@dataclass(frozen=True)
class MemoryPlan:
    parts: tuple[Part, ...] = field(default=())

    def of(self, *names: str) -> int:
        return sum(part.bytes for part in self.parts if part.name in names)

    @property
    def peak_phase(self) -> Phase:
        """When the peak is reached. What is ``kept`` is there once training has begun, what belongs to ``steps`` until
        the last one, what is held in ``training`` at the loss and in the backward pass."""
        return max(_MOMENTS, key=self._held)

    def _held(self, moment: Phase) -> int:
        return sum(part.bytes for part in self.parts if part.phase in _MOMENTS[moment])

    @property
    def total(self) -> int:
        """Bytes at the peak."""
        return self._held(self.peak_phase)

    def at_peak(self) -> list[Part]:
        """The parts that make up :attr:`total`, empty ones left out."""
        return [part for part in self.parts if part.phase in _MOMENTS[self.peak_phase] and part.bytes]

    def without(self, *names: str) -> MemoryPlan:
        return MemoryPlan(tuple(part for part in self.parts if part.name not in names))

    def to_json(self) -> dict[str, Any]:
        return {"total": self.total, "peak_phase": self.peak_phase, "parts": [vars(part) for part in self.parts]}


def estimate(p: PlanInputs) -> MemoryPlan:
    """Every component of a run, in bytes."""
    parts = [*_weights(p), *_trained(p)]
    parts += _native_parts(p) if p.engine == "native" else _autograd_parts(p)
    return MemoryPlan(tuple(parts))


def nf4_constants(elements: int, *, double: bool = True) -> int:
    """Bytes of the scales of ``elements`` quantized weights."""
    blocks = -(-elements // BLOCK)
    return blocks + 4 * -(-blocks // NESTED_BLOCK) if double else 4 * blocks


def weight_bytes(p: PlanInputs) -> tuple[int, int]:
    """(bytes of the frozen weights, bytes of quantization constants)."""
    shape = p.shape
    stored = min(p.itemsize, shape.stored) if p.narrow else p.itemsize
    if p.quantization is None:
        return (shape.embedding + shape.head + shape.linear) * stored + shape.other * p.itemsize, 0
    packed = [one for one in shape.linears if not (p.unquantized and named(p.unquantized, one.path))]
    counts = [one.elements for one in packed]
    rest = (shape.embedding + shape.head) * min(p.itemsize, shape.stored)
    rest += (shape.linear - sum(counts)) * stored + shape.other * p.itemsize
    if p.quantization == "int8":
        return rest + sum(counts), sum(4 * one.outputs for one in packed)
    codes = sum(-(-count // 2) for count in counts)
    return rest + codes, sum(nf4_constants(count, double=p.double_quant) for count in counts)


def _weights(p: PlanInputs) -> list[Part]:
    held, constants = weight_bytes(p)
    if p.quantization is None:
        how = f"{p.shape.parameters:,} x {held / p.shape.parameters:.2g} bytes"
    else:
        rest = p.shape.parameters - p.shape.linear
        bits = 8 if p.quantization == "int8" else 4
        how = f"{p.shape.linear:,} x {bits} bits and {rest:,} of 16 or 32 (embeddings, head, norms)"
    parts = [Part("weights", held, how)]
    if constants:
        double = "one 8-bit scale in 64 weights, one fp32 in 64 x 256" if p.double_quant else "one fp32 in 64 weights"
        parts.append(Part("constants", constants, "one fp32 a row" if p.quantization == "int8" else double))
    return parts


def _trained(p: PlanInputs) -> list[Part]:
    n, size = p.trainable, p.adapter_itemsize
    if p.optimizer == "adamw":
        state, how = 2 * n * size, f"two moments x {n:,} x {size} bytes"
    else:
        sizes = [n] if p.method == "full" else list(p.tensors())
        state = sum(moment_bytes(count, eight_bit=True) for count in sizes)
        large = sum(count for count in sizes if count >= LEAST)
        how = f"two 8-bit moments x {large:,}, one fp32 in 256 each"
        how += f"; fp32 for {n - large:,} in small tensors" if large < n else ""
    parts = [
        # on a CPU the allocator keeps these many small tensors' memory for the next step
        Part("gradients", n * size, f"{n:,} x {size} bytes", "steps" if p.engine == "native" else "training"),
        Part("optimizer", state, how, "steps"),
    ]
    if p.method == "full":
        return parts
    extra = 8 * sum(t.outputs for t in p.targets) if p.method == "dora" else 0  # squared row norms and gains, fp32
    held = f"{n:,} x {size} bytes" + (", row norms" if extra else "")
    return [Part("adapters", n * size + extra, held, "kept"), *parts]


# --- off the CPU -------------------------------------------------------------------------------------------------


def layer_bytes(p: PlanInputs) -> float:
    """Bytes that autograd keeps for one decoder layer and one token (mean over the layers)."""
    s, size = p.shape, p.itemsize
    query, key = s.heads * s.head_dim, s.kv_heads * s.head_dim
    norms = 4 if s.sandwich else 2
    inner = (4 if s.gated else 2) if p.engine == "eager" else (2 if s.gated else 1)
    kept = (
        norms * s.hidden * size + (query + 2 * key) * size + query * size + 4 * s.heads + inner * s.intermediate * size
    )
    kept += norms * 4 * s.hidden if p.engine == "eager" else s.hidden * size
    adapters = sum(t.rank for t in p.targets) * size
    if p.dropout and p.engine == "eager":
        adapters += sum(t.inputs for t in p.targets) * (size + 1)
    if p.method == "dora" and p.engine == "eager":  # the base's output, the branch's, and their scaled sum
        adapters += sum(t.outputs for t in p.targets) * size * 3
    return kept + adapters / s.layers


def _autograd_parts(p: PlanInputs) -> list[Part]:
    s, size, tokens = p.shape, p.itemsize, p.tokens
    each = layer_bytes(p) * tokens
    boundary = s.hidden * size * tokens
    working = (3 * s.intermediate + 4 * s.hidden) * size * tokens
    kept = s.layers - p.recomputed
    inputs = 2 if p.checkpointing == "offload" else s.layers - kept
    recomputed = each if kept < s.layers else 0.0
    activations = kept * each + inputs * boundary
    how = f"{tokens:,} tokens: {kept} layers x {layer_bytes(p) / 1e3:,.0f} kB, "
    how += f"{inputs} layer inputs x {s.hidden * size / 1e3:,.1f} kB"
    logits, loss_how = _logits(p)
    at_work = "its activations again, and gradients" if recomputed else "gradients of its activations"
    parts = [
        Part("activations", round(activations), how, "training"),
        Part("logits", logits, loss_how, "loss"),
        Part("layer at work", round(recomputed + working), at_work, "backward"),
    ]
    if p.quantization:
        whole = max(one.elements for one in s.linears) * size
        parts.append(Part("dequantized", whole, "the largest matrix, one at a time", "training"))
    dynamic = activations + max(logits, recomputed + working) + p.trainable * p.adapter_itemsize
    if p.evaluation:
        for phase, e in _passes(p.evaluation):
            parts.append(_cache(p, e, phase))
            parts.append(Part("answers' logits", e.rows * s.vocab * 8, f"{e.rows} rows x {s.vocab:,}, twice", phase))
    parts.append(Part("context", round(CONTEXT), "CUDA context and workspaces"))
    parts.append(Part("fragmentation", round(FRAGMENTATION * dynamic), "5 % of what comes and goes", "kept"))
    return parts


def _logits(p: PlanInputs) -> tuple[int, str]:
    vocab, n = p.shape.vocab, p.loss_tokens
    if p.loss == "kernel":
        return loss_bytes(n, vocab, p.itemsize), f"{n:,} positions, a chunk at a time, x {vocab:,}"
    if p.loss == "chunks":
        # compiled, the fp32 copies of a part are never stored
        part = -(-n // 8) * vocab * (12 if p.engine == "eager" else 2 * p.itemsize)
        return n * vocab * p.itemsize + part, f"{n:,} x {vocab:,} in {8 * p.itemsize} bits, the loss on 1/8 at a time"
    # 16-bit logits and their gradient, fp32 log-probabilities and theirs
    return n * vocab * (2 * p.itemsize + 8), f"{n:,} x {vocab:,} x (2 x {p.itemsize} + 2 x 4) bytes"


def _passes(e: Evaluation) -> tuple[tuple[Phase, Evaluation], ...]:
    """When answers are generated, and ``rows`` of them then."""
    return ("evaluation", replace(e, rows=e.valid_rows)), ("test", e)


def prompt_tokens(e: Evaluation) -> int:
    """Tokens of prompts that ``engine.generate`` computes in one pass."""
    return min(e.rows * e.prompt, PREFILL_TOKENS)


def _cache(p: PlanInputs, e: Evaluation, phase: Phase) -> Part:
    """The pages of ``engine.generate``: its bound, or what one row needs, and what all prompts share."""
    one = -(-(e.prompt + e.new - 1) // PAGE_TOKENS) * PAGE_TOKENS  # the last new token is never read
    own = max(one, min(e.rows * one, PREFILL_TOKENS + e.rows * e.new))
    how = f"{e.rows} rows, {own:,} tokens" + (f" and {e.prefix:,} shared" if e.prefix else "")
    s = p.shape
    held = (own + e.prefix) * 2 * s.kv_heads * s.head_dim * s.layers * p.itemsize
    return Part("KV cache", held, how, phase)


# --- on the CPU ---------------------------------------------------------------------------------------------------


def layer_pass(p: PlanInputs, tokens: int, *, training: bool = True) -> LayerPass:
    """What a fused layer sees of a batch of ``tokens``."""
    return LayerPass(
        shape=p.shape.layer,
        tokens=tokens,
        itemsize=p.itemsize,
        ranks=_ranks(p),
        dropout=p.dropout and training,
        dora=p.method == "dora",
        prefix=p.prefix,
    )


def _ranks(p: PlanInputs) -> tuple[int, int, int, int, int, int, int]:
    """The rank at q, k, v, o, gate, up and down: from the sizes of the targets, the largest where they differ."""
    s = p.shape
    wide, narrow = s.heads * s.head_dim, s.kv_heads * s.head_dim
    if s.packed:
        qkv, gate_up = (s.hidden, wide + 2 * narrow), (s.hidden, 2 * s.intermediate)
        roles = [qkv, qkv, qkv, (wide, s.hidden), gate_up, gate_up, (s.intermediate, s.hidden)]
    else:
        inner = (s.hidden, s.intermediate)
        roles = [(s.hidden, wide), (s.hidden, narrow), (s.hidden, narrow), (wide, s.hidden), inner, inner,
                 (s.intermediate, s.hidden)]  # fmt: skip
    ranks: dict[tuple[int, int], int] = {}
    for target in p.targets:
        key = (target.inputs, target.outputs)
        ranks[key] = max(ranks.get(key, 0), target.rank)
    q, k, v, o, gate, up, down = (ranks.get(role, 0) for role in roles)
    return q, k, v, o, gate, up, down


def workspaces(p: PlanInputs) -> Replay:
    """The engine's activation memory after a training step and an evaluation."""
    layers = [layer_pass(p, p.tokens)] * p.shape.layers
    memory = replay(layers, p.recomputed, offload=p.checkpointing == "offload")
    if p.evaluation:
        e = p.evaluation
        tokens = max(e.prefix, prompt_tokens(e), e.loss_tokens)
        replay_evaluation(layer_pass(p, tokens, training=False), memory)
    return memory


def _native_parts(p: PlanInputs) -> list[Part]:
    s, size, tokens = p.shape, p.itemsize, p.tokens
    if s.fused:
        memory = workspaces(p)
        kept = {"none": "every layer kept", "some": f"{p.kept_layers} of {s.layers} layers kept",
                "all": "layer inputs kept, the rest computed again", "offload": "layer inputs in a file"}  # fmt: skip
        how = f"{tokens:,} tokens: {kept[p.checkpointing]} ({_gb(memory.kept.touched)}), one layer "
        how += f"{_gb(memory.temporary.touched)}, scratch {_gb(memory.scratch.touched)}"
        parts = [Part("activations", memory.touched, how, "kept")]
    else:
        found = _autograd_parts(replace(p, engine="eager", evaluation=None))
        parts = [part for part in found if part.name in ("activations", "layer at work")]
    logits, how = _logits(p)
    around = around_bytes(tokens, p.loss_tokens, s.hidden, size)
    parts += [
        Part("logits", logits, how, "kept"),
        Part("around the layers", around, "embeddings, last norm, their gradients", "training"),
        Part("kernels", kernel_bytes(p.threads), "packed weights: 8 MiB, about 2 MiB a thread", "kept"),
        Part("rows", p.data_tokens * ROW_TOKEN, f"{p.data_tokens:,} tokens x {ROW_TOKEN} bytes"),
        Part("runtime", round(RUNTIME), "Python, torch, transformers"),
        Part("loading", round(_loading(p)), "the checkpoint's pages while it is read", "loading"),
    ]
    if p.evaluation:
        for phase, e in _passes(p.evaluation):
            parts.append(_cache(p, e, phase))
            texts = prompt_tokens(e) * s.hidden * max(size, 4) * 4 + e.rows * s.vocab * 4
            parts.append(Part("answers' logits", texts, f"{e.rows} rows x {s.vocab:,} and hidden states", phase))
    return parts


def _loading(p: PlanInputs) -> float:
    if p.quantization:  # streamed: a tensor at work and the next one
        return 2.0 * p.shape.largest * p.shape.stored
    return float(p.shape.stored * p.shape.parameters)


def _gb(count: float) -> str:
    return f"{count / 1e9:.2f} GB"


# --- what fits ------------------------------------------------------------------------------------------------------


def with_tokens(p: PlanInputs, tokens: int) -> PlanInputs:
    """The same run with ``tokens`` at once; the share of them that reaches the vocabulary stays."""
    return replace(p, tokens=tokens, loss_tokens=max(1, math.ceil(p.loss_tokens * tokens / p.tokens)))


def largest_tokens(p: PlanInputs, budget: float, *, most: int = 1 << 20) -> int:
    """The largest number of tokens at once that stays within ``budget`` bytes, in steps of 64; 0 if none does."""
    low, high = 0, most // 64
    while low < high:
        middle = (low + high + 1) // 2
        if estimate(with_tokens(p, 64 * middle)).total <= budget:
            low = middle
        else:
            high = middle - 1
    return 64 * low


def cheapest_checkpointing(
    p: PlanInputs, budget: float, choices: Sequence[Checkpointing] = ("none", "all")
) -> PlanInputs | None:
    """``p`` with the first of ``choices`` (in order of time lost) that fits ``budget``, or None."""
    for choice in choices:
        candidate = replace(p, checkpointing=choice, kept_layers=0)
        if estimate(candidate).total <= budget:
            return candidate
    return None
