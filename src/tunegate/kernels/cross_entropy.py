"""Head and cross-entropy in one pass over chunks of target positions, so full logits never exist.

Forward computes, chunk by chunk, the logits, the loss and, because the head is frozen, at once the gradient with
respect to the hidden states; backward only scales it. Memory is chunk x vocabulary whatever the batch. The loss is
a SUM over targets, in fp32: who divides, and by what, is the training loop's business.

With the C++ kernels, a frozen plain head, in fp32 or bf16, with a soft cap or without, writes fp32 logits into one
buffer per thread that later calls reuse; :func:`softmax_gradient_` turns them into their own gradient in place. For
bf16 hidden states that gradient is rounded to bf16 once, so that its product with the head runs on the matrix units.
Log-probabilities and greedy choices need no logits afterwards: they go through blocks of the vocabulary that stay in
the cache. Any other head, device or autocast takes the module's own forward, which rounds 16-bit logits.

It does not train the head: a head with trainable parameters goes through autograd, chunk by chunk, recomputed.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tunegate.kernels import native
from tunegate.kernels.linear import Product, Term, multiply
from tunegate.kernels.stored import StoredLinear

CHUNK_BYTES = 64 * 2**20
BLOCK_ROWS, BLOCK_ELEMENTS = 1024, 2**21  # logits that forward-only passes hold: 8 MiB, a part of a third-level cache


@dataclass(frozen=True)
class Head:
    """From hidden states to logits: ``softcap(scale * (hidden @ weight.T + bias))``.

    ``module`` is the model's own output layer; ``softcap`` c maps logits l to c*tanh(l/c).
    """

    module: nn.Module
    scale: float = 1.0
    softcap: float | None = None

    @property
    def frozen(self) -> bool:
        return not any(p.requires_grad for p in self.module.parameters())

    def logits(self, hidden: Tensor) -> Tensor:
        """(N, H) to (N, V), in fp32."""
        return _mapped(self.module(hidden).float(), self.scale, self.softcap)


def _mapped(logits: Tensor, scale: float, softcap: float | None) -> Tensor:
    """Logits as the model means them, from the products of its head."""
    if scale != 1.0:
        logits = logits * scale
    return logits if softcap is None else torch.tanh(logits / softcap) * softcap


def _chunk_rows(head: Head) -> int:
    out = getattr(head.module, "out_features", None) or next(head.module.parameters()).shape[0]
    return max(16, CHUNK_BYTES // (4 * out))


_kept = threading.local()


def _scratch(rows: int, columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """This thread's buffer as (rows, columns), kept for the next call: fresh pages cost as much as the loss."""
    if not hasattr(_kept, "buffers"):
        _kept.buffers = {}
    buffers: dict[torch.dtype, Tensor] = _kept.buffers
    buffer = buffers.get(dtype)
    if buffer is None or buffer.numel() < rows * columns:
        buffers.pop(dtype, None)
        with torch.inference_mode(False):
            buffer = buffers[dtype] = torch.empty(rows * columns, dtype=dtype)
    return buffer[: rows * columns].view(rows, columns)


def softmax_gradient_(
    logits: Tensor, labels: Tensor, losses: Tensor, scale: float = 1.0, softcap: float | None = None
) -> None:
    """Per row ``losses = logsumexp(z) - z[label]``; ``logits`` l become ``d losses / d l``, in place.

    z = scale * l, or softcap * tanh(scale * l / softcap). logits (N, V) fp32 with contiguous rows, labels (N,) int64
    in 0..V-1, losses (N,) fp32. The gradient is ``(softmax(z) - onehot) * dz/dl``.
    """
    rows, columns = logits.shape
    if logits.dtype != torch.float32 or (logits.stride(1) != 1 and columns > 1):
        raise ValueError(f"logits must be fp32 with contiguous rows, got {logits.dtype}, strides {logits.stride()}")
    if labels.shape != (rows,) or labels.dtype != torch.int64 or not labels.is_contiguous():
        raise ValueError(f"labels must be dense int64 ({rows},), got {labels.dtype} {tuple(labels.shape)}")
    if losses.shape != (rows,) or losses.dtype != torch.float32 or not losses.is_contiguous():
        raise ValueError(f"losses must be dense fp32 ({rows},), got {losses.dtype} {tuple(losses.shape)}")
    if not _in_range(labels, columns):
        raise ValueError(f"a label is outside 0..{columns - 1}")
    lib = native.library_for(logits)
    if lib is not None:
        block = (logits.data_ptr(), rows, columns, logits.stride(0), 0, labels.data_ptr(), scale, softcap or 0.0)
        lib.loss_gradient(block, losses.data_ptr())
        return
    z = _mapped(logits, scale, softcap)
    losses.copy_(F.cross_entropy(z, labels, reduction="none"))
    gradient = torch.softmax(z, 1)
    gradient[torch.arange(rows, device=labels.device), labels] -= 1.0
    logits.copy_(gradient * (scale if softcap is None else scale * (1.0 - (z / softcap) ** 2)))


def _in_range(labels: Tensor, columns: int) -> bool:
    if labels.numel() == 0:
        return True
    low, high = labels.aminmax()
    return int(low) >= 0 and int(high) < columns


@torch.library.custom_op("tunegate::linear_cross_entropy", mutates_args=())
def linear_cross_entropy_op(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    scale: float = 1.0,
    softcap: float | None = None,
    bias: Tensor | None = None,
    rows: int | None = None,
    with_gradient: bool = True,
) -> tuple[Tensor, Tensor]:
    """(sum of losses, its gradient by ``hidden``) of a frozen head: hidden (N, H) and weight (V, H) in fp32 or bf16.

    ``rows`` is how many logits rows exist at a time. Without ``with_gradient`` the second result is empty; autograd
    needs it.
    """
    count, columns = hidden.shape[0], weight.shape[0]
    rows = rows or max(16, CHUNK_BYTES // (4 * columns))
    losses = torch.empty(count)
    grad = torch.empty(hidden.shape if with_gradient else (0,), dtype=hidden.dtype)
    for start in range(0, count, rows):
        stop = min(count, start + rows)
        logits = _scratch(stop - start, columns)
        multiply(Product(logits, [Term(hidden[start:stop], weight)], bias=bias))
        softmax_gradient_(logits, labels[start:stop], losses[start:stop], scale, softcap)
        if with_gradient:
            if hidden.dtype != logits.dtype:
                logits = _scratch(stop - start, columns, hidden.dtype).copy_(logits)
            multiply(Product(grad[start:stop], [Term(logits, weight, w_is_kn=True)]))
    return losses.sum(), grad


@linear_cross_entropy_op.register_fake
def _(hidden, weight, labels, scale=1.0, softcap=None, bias=None, rows=None, with_gradient=True):  # type: ignore[no-untyped-def]  # noqa: ARG001
    return hidden.new_empty((), dtype=torch.float32), hidden.new_empty(hidden.shape if with_gradient else (0,))


def _keep_gradient(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:  # noqa: ARG001
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1])


def _scale_gradient(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    if any(ctx.needs_input_grad[1:]):
        raise RuntimeError("tunegate::linear_cross_entropy does not train the head; see linear_cross_entropy")
    (kept,) = ctx.saved_tensors
    return (kept * grad.to(kept.dtype), *[None] * 7)


linear_cross_entropy_op.register_autograd(_scale_gradient, setup_context=_keep_gradient)


def _plain_head(hidden: Tensor, head: Head) -> nn.Linear | StoredLinear | None:
    """The head's linear layer if the kernels can stand in for its forward."""
    module = head.module
    if not isinstance(module, nn.Linear | StoredLinear) or type(module) not in (nn.Linear, StoredLinear):
        return None
    if module._forward_hooks or module._forward_pre_hooks or not head.frozen:
        return None
    if hidden.dim() != 2:
        return None
    if torch.is_autocast_enabled("cpu") or hidden.stride(1) != 1 or module.weight.stride(1) != 1:
        return None
    tensors = (hidden, module.weight, module.bias)
    return module if native.library_for(*tensors) is not None else None


def _linear_loss(hidden: Tensor, labels: Tensor, head: Head) -> Tensor | None:
    """The loss through the kernels, or None where they do not apply (an ignored label of -100 included)."""
    layer = _plain_head(hidden, head)
    if layer is None or not _in_range(labels, layer.out_features):
        return None
    needs_grad = torch.is_grad_enabled() and hidden.requires_grad
    loss, _ = linear_cross_entropy_op(
        hidden, layer.weight, labels, head.scale, head.softcap, layer.bias, _chunk_rows(head), needs_grad
    )
    return loss


class _FrozenHeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, labels: Tensor, head: Head) -> Tensor:
        rows = _chunk_rows(head)
        needs_grad = hidden.requires_grad
        grad = torch.empty_like(hidden) if needs_grad else None
        total = hidden.new_zeros((), dtype=torch.float32)
        for start in range(0, hidden.shape[0], rows):
            part = hidden[start : start + rows].detach().requires_grad_(needs_grad)
            with torch.enable_grad():
                loss = F.cross_entropy(head.logits(part), labels[start : start + rows], reduction="sum")
            total += loss.detach()
            if grad is not None:
                grad[start : start + rows] = torch.autograd.grad(loss, part)[0]
        if grad is not None:
            ctx.save_for_backward(grad)
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        (grad,) = ctx.saved_tensors
        return grad * grad_outputs[0].to(grad.dtype), None, None


def linear_cross_entropy(hidden: Tensor, labels: Tensor, head: Head) -> Tensor:
    """Sum over targets of the cross-entropy, a fp32 scalar. ``hidden`` (N, H), ``labels`` (N,) int64."""
    if head.frozen:
        quick = _linear_loss(hidden, labels, head)
        if quick is not None:
            return quick
        loss: Tensor = _FrozenHeadLoss.apply(hidden, labels, head)
        return loss

    def chunk_loss(part: Tensor, wanted: Tensor) -> Tensor:
        return F.cross_entropy(head.logits(part), wanted, reduction="sum")

    rows = _chunk_rows(head)
    parts = zip(hidden.split(rows), labels.split(rows), strict=True)
    losses = [checkpoint(chunk_loss, part, wanted, use_reentrant=False) for part, wanted in parts]
    return torch.stack(losses).sum()


def _logit_blocks(hidden: Tensor, layer: nn.Linear | StoredLinear) -> Iterator[tuple[int, int, int, Tensor]]:
    """(first row, first column, columns, logits) of every block; a block's buffer is the next one's too."""
    for start in range(0, hidden.shape[0], BLOCK_ROWS):
        part = hidden[start : start + BLOCK_ROWS]
        width = max(1024, BLOCK_ELEMENTS // part.shape[0])
        for first in range(0, layer.out_features, width):
            weight = layer.weight[first : first + width]
            logits = _scratch(part.shape[0], weight.shape[0])
            bias = None if layer.bias is None else layer.bias[first : first + width]
            multiply(Product(logits, [Term(part, weight)], bias=bias))
            yield start, first, weight.shape[0], logits


@torch.no_grad()
def _blocked_log_probs(
    lib: ModuleType, hidden: Tensor, labels: Tensor, head: Head, layer: nn.Linear | StoredLinear
) -> Tensor:
    count = hidden.shape[0]
    most, total, target = torch.full((count,), -torch.inf), torch.zeros(count), torch.zeros(count)
    labels = labels.contiguous()
    for start, first, columns, logits in _logit_blocks(hidden, layer):
        size = (logits.data_ptr(), logits.shape[0], columns, columns, first)
        block = (*size, labels[start:].data_ptr(), head.scale, head.softcap or 0.0)
        lib.loss_update(block, most[start:].data_ptr(), total[start:].data_ptr(), target[start:].data_ptr())
    return target - most - total.log()


def target_log_probs(hidden: Tensor, labels: Tensor, head: Head) -> Tensor:
    """Log-probability of each label, (N,) fp32, in nats."""
    differentiable = torch.is_grad_enabled() and hidden.requires_grad
    layer = None if differentiable else _plain_head(hidden, head)
    lib = native.library()
    if lib is not None and layer is not None and _in_range(labels, layer.out_features):
        return _blocked_log_probs(lib, hidden, labels, head, layer)
    rows = _chunk_rows(head)
    parts = zip(hidden.split(rows), labels.split(rows), strict=True)
    return torch.cat([-F.cross_entropy(head.logits(part), wanted, reduction="none") for part, wanted in parts])


@torch.no_grad()
def all_logits(hidden: Tensor, head: Head) -> Tensor:
    """(N, H) to (N, V) fp32. By the kernels where they take the head: a row's logits do not depend on the others."""
    layer = _plain_head(hidden, head)
    if native.library() is None or layer is None:
        return head.logits(hidden)
    logits = torch.empty(len(hidden), layer.weight.shape[0])
    multiply(Product(logits, [Term(hidden, layer.weight)], bias=layer.bias))
    return _mapped(logits, head.scale, head.softcap)


def logit_chunks(hidden: Tensor, head: Head) -> Iterator[Tensor]:
    """:func:`all_logits` of (N, H), some rows at a time."""
    return (all_logits(part, head) for part in hidden.split(_chunk_rows(head)))


@torch.no_grad()
def argmax_logits(hidden: Tensor, head: Head) -> Tensor:
    """The id of each row's largest logit, (N,) int64; the lowest of equal ones.

    A soft cap keeps the order and is left out: logits that it rounds to the same value are still told apart.
    """
    layer = _plain_head(hidden, head)
    lib = native.library()
    if lib is None or layer is None:
        plain = Head(head.module, head.scale)
        return torch.cat([plain.logits(part).argmax(1) for part in hidden.split(_chunk_rows(head))])
    best, ids = torch.full((hidden.shape[0],), -torch.inf), torch.zeros(hidden.shape[0], dtype=torch.int64)
    for start, first, columns, logits in _logit_blocks(hidden, layer):
        block = (logits.data_ptr(), logits.shape[0], columns, columns, first, 0, head.scale, 0.0)
        lib.loss_best(block, best[start:].data_ptr(), ids[start:].data_ptr())
    return ids
