"""Puts the fused layer in the place of a model's own decoder layers, on the instances, and takes it out again.

A layer keeps its class, its modules and the names of its parameters; only its ``forward`` is another. Each call reads
what is in place (adapters may have been added, switched off or removed) and falls back to the layer's own forward
where a projection is of a kind the kernels do not compute. Under autograd one layer is one node of the graph.

Only batches that carry an attention pass (see ``runner``) come here, only on the CPU, only with the C++ kernels. The
caller proves the result on a few tokens before using it.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tunegate.engine import fused_layer
from tunegate.engine.fused_layer import Context, Projections, Saved
from tunegate.engine.fused_shape import Shape, recognise, resolve
from tunegate.engine.memory import Layer
from tunegate.engine.workspace import Lease, Workspace
from tunegate.kernels import native, varlen

_SEED_STRIDE = 64  # dropout seeds of one layer lie closer together than this


@dataclass
class PassState:
    """What one pass over the layers shares: activations' memory and the seed of its dropout masks."""

    lease: Lease
    seed: int | None = None


@dataclass
class Partial:
    """For passes in a thread of their own over the same tokens again and again (``attention_pass.partial``): the first
    keeps what goes into each layer, later ones begin with layer ``first``, on what went into it then. Memory of its
    own."""

    first: int = 0
    inputs: dict[int, Tensor] = field(default_factory=dict)
    scratch: Workspace = field(default_factory=Workspace)
    temporary: Workspace = field(default_factory=Workspace)


class FusedLayers:
    """The decoder layers of ``backbone`` that the kernels can compute. The first ``recompute`` of them keep only their
    inputs for the backward pass, in a file of ``offload`` where that is a folder."""

    def __init__(self, backbone: nn.Module):
        self.recompute = 0
        self.offload: Path | None = None
        self.shapes: dict[nn.Module, Shape] = {}
        self._reasons: Counter[str] = Counter()
        self._pool: list[Workspace] = []
        self._scratch = Workspace()
        self.temporary = Workspace()  # for a forward pass that is thrown away within one layer
        self.count = 0
        layers = getattr(backbone, "layers", None)
        if not isinstance(layers, nn.ModuleList):
            self._reasons["the model has no list of decoder layers"] += 1
            return
        for layer in layers:
            found = recognise(layer)
            if isinstance(found, str):
                self._reasons[found] += 1
            elif found.head_dim % 8 or found.head_dim > varlen.LARGEST_DIM:
                self._reasons[f"heads of {found.head_dim} dimensions"] += 1
            else:
                self.shapes[layer] = found
        self.count = len(layers)
        self._order = {layer: number for number, layer in enumerate(self.shapes)}

    def install(self) -> None:
        for layer in self.shapes:
            layer.forward = _Forward(self, layer)

    def remove(self) -> None:
        for layer in self.shapes:
            if isinstance(layer.__dict__.get("forward"), _Forward):
                del layer.forward

    @contextlib.contextmanager
    def removed(self) -> Iterator[None]:
        """The layers' own forward inside."""
        self.remove()
        try:
            yield
        finally:
            self.install()

    def save_less(self, recompute: int, offload: Path | None = None) -> None:
        """From the next pass on. Memory held for passes before is given back."""
        if offload != self.offload:
            self._pool.clear()
        self.recompute, self.offload = recompute, offload

    def layers(self) -> list[Layer]:
        """Shapes and projections as they now are, in the model's order; a layer that falls back is left out."""
        found = []
        for layer, shape in self.shapes.items():
            projections = _projections(layer, shape)
            if projections is not None:
                found.append(Layer(shape, projections, shape.attention_norm.weight.shape[0]))
        return found

    def describe(self) -> str:
        """One line: how many layers are fused at which level, and why others are not."""
        level = native.describe()[0]
        line = f"{len(self.shapes)} of {self.count} layers fused, {level} kernels" if self.shapes else "no fused layers"
        if self._reasons:
            line += ": " + "; ".join(f"{reason} ({n} x)" for reason, n in self._reasons.most_common(3))
        return line

    def run(self, layer: Any, hidden: Tensor, position_embeddings: Any, attention_pass: Any) -> Tensor | None:
        """The layer on hidden (1, T, H), or None if it cannot be computed here as it now is."""
        number = self._order[layer]
        scratch, temporary = self._scratch, self.temporary
        partial: Partial | None = getattr(attention_pass, "partial", None)
        if partial is not None:
            if number < partial.first:
                return hidden
            hidden = hidden if number > partial.first else partial.inputs.get(number, hidden)
            partial.inputs.setdefault(number, hidden)
            scratch, temporary = partial.scratch, partial.temporary
        recorded = getattr(attention_pass, "recorded", None)
        if recorded is not None:
            out = recorded.replay(number, hidden, position_embeddings)
            if out is not None:
                return out
        projections = _projections(layer, self.shapes[layer])
        if projections is None:
            return None
        state = attention_pass.fused
        if state is None:
            state = attention_pass.fused = PassState(Lease(self._pool, self.offload))
        index = int(layer.self_attn.layer_idx)
        cos, sin = (part[0] for part in position_embeddings) if position_embeddings is not None else (hidden, hidden)
        seed = _dropout_seed(state, projections) + index * _SEED_STRIDE
        x = hidden[0].contiguous()
        parameters = [p for projection in projections.all() for p in projection.parameters]
        wants_grad = torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in parameters))
        attention: Any = _Passing(attention_pass, index)
        if wants_grad:
            attention = _Trained(attention_pass.plan.rows, self._scratch)
        context = Context(self.shapes[layer], projections, cos, sin, seed, attention, scratch)
        if wants_grad:
            again = number < self.recompute
            return _Layer.apply(x, self, context, state.lease, again, *parameters)[None]
        if recorded is not None:
            out = recorded.record(number, context, hidden, position_embeddings, index)
            if out is not None:
                return out
        out = torch.empty_like(x)
        with scratch.scope(), temporary.scope():
            fused_layer.forward(context, x, out, temporary, saving=False)
        return out[None]

    def order(self) -> dict[nn.Module, int]:
        """The fused layers, with their numbers among each other."""
        return dict(self._order)

    def reserved(self) -> int:
        """Bytes of activation memory held from the system, apart from passes still alive."""
        return sum(space.reserved() for space in (*self._pool, self._scratch, self.temporary))


class _Forward:
    """A decoder layer's ``forward``."""

    def __init__(self, owner: FusedLayers, layer: nn.Module):
        self.owner, self.layer = owner, layer

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        attention_pass = kwargs.get("attention_pass")
        if attention_pass is not None and not args:
            out = self.owner.run(self.layer, hidden_states, kwargs.get("position_embeddings"), attention_pass)
            if out is not None:
                return out
        return type(self.layer).forward(self.layer, hidden_states, *args, **kwargs)


def _projections(layer: Any, shape: Shape) -> Projections | None:
    found = [
        [resolve(getattr(parent, name)) for name in names]
        for parent, names in (
            (layer.self_attn, shape.qkv),
            (layer.self_attn, ("o_proj",)),
            (layer.mlp, shape.gate_up),
            (layer.mlp, ("down_proj",)),
        )
    ]
    if any(p is None for group in found for p in group):
        return None
    return Projections(*found)  # type: ignore[arg-type]


def _dropout_seed(state: PassState, projections: Projections) -> int:
    if not any(p.dropout for p in projections.all()):
        return 0
    if state.seed is None:
        state.seed = int(torch.randint(2**62, ()))
    return state.seed


class _Trained:
    """Attention with a backward pass, on the kernels."""

    def __init__(self, rows: varlen.Rows, scratch: Workspace):
        self.rows, self.scratch = rows, scratch

    def forward(self, shape: Shape, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> None:
        varlen.attention_forward(q, k, v, self.rows, _options(shape), out=out, lse=lse)

    def backward(
        self, shape: Shape, grad_out: Tensor, saved: Saved, grad_q: Tensor, grad_k: Tensor, grad_v: Tensor
    ) -> None:
        kept = varlen.Saved(saved.q, saved.k, saved.v, saved.attended, saved.lse)
        needed = varlen.workspace_floats(saved.q, saved.k, saved.v, self.rows)
        with self.scratch.scope():
            memory = self.scratch.take(needed)
            varlen.attention_backward(
                grad_out, kept, self.rows, _options(shape), (grad_q, grad_k, grad_v), workspace=memory
            )


class _Passing:
    """Attention without gradients, by whatever the pass does (batch, prefill, decoding)."""

    def __init__(self, attention_pass: Any, layer: int):
        self.attention_pass, self.layer = attention_pass, layer

    def forward(self, shape: Shape, q: Tensor, k: Tensor, v: Tensor, out: Tensor, _lse: Tensor) -> None:
        out.copy_(self.attention_pass.attend(self.layer, q, k, v, shape.scale, shape.window, shape.softcap))

    def backward(self, *args: Any) -> None:
        raise NotImplementedError("no gradients on this path")


def _options(shape: Shape) -> varlen.Options:
    return varlen.Options(shape.scale, shape.window, shape.softcap)


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, owner: FusedLayers, context: Context, lease: Lease, again: bool, *_parameters: Tensor
    ) -> Tensor:
        keep = lease.workspace
        out = keep.take(*x.shape, dtype=x.dtype)
        ctx.owner, ctx.context, ctx.lease, ctx.x = owner, context, lease, x.detach()
        ctx.saved = None
        if again:
            with owner.temporary.scope():
                fused_layer.forward(context, ctx.x, out, owner.temporary, saving=False)
            keep.put_away(ctx.x)  # not read before the backward pass
        else:
            ctx.saved = fused_layer.forward(context, ctx.x, out, keep)
        return out

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Any, ...]:
        if ctx.lease is None:
            raise RuntimeError(
                "a fused layer's backward pass ran twice: its activations are gone; run the forward again"
            )
        context, x = ctx.context, ctx.x
        grad_out = grad_outputs[0].contiguous()
        grad_x = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        with context.scratch.scope(), ctx.owner.temporary.scope():
            saved = ctx.saved
            if saved is None:
                saved = fused_layer.forward(context, x, None, ctx.owner.temporary)
            found = fused_layer.backward(context, saved, grad_out, grad_x)
        ctx.lease.workspace.put_away(x)
        ctx.saved = ctx.lease = ctx.context = ctx.x = None
        return (grad_x, None, None, None, None, *found)
