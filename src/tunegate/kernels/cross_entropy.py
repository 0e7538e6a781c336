"""Head and cross-entropy in one pass over chunks of target positions, so full logits never exist.

Forward computes, chunk by chunk, the logits, the loss and, because the head is frozen, at once the gradient with
respect to the hidden states; backward only scales it. Memory is chunk x vocabulary whatever the batch. The loss is
a SUM over targets, in fp32: who divides, and by what, is the training loop's business.

It does not train the head: a head with trainable parameters goes through autograd, chunk by chunk, recomputed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

CHUNK_BYTES = 64 * 2**20


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
        logits = self.module(hidden).float()
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap


def _chunk_rows(head: Head) -> int:
    out = getattr(head.module, "out_features", None) or next(head.module.parameters()).shape[0]
    return max(16, CHUNK_BYTES // (4 * out))


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
        loss: Tensor = _FrozenHeadLoss.apply(hidden, labels, head)
        return loss

    def chunk_loss(part: Tensor, wanted: Tensor) -> Tensor:
        return F.cross_entropy(head.logits(part), wanted, reduction="sum")

    rows = _chunk_rows(head)
    parts = zip(hidden.split(rows), labels.split(rows), strict=True)
    losses = [checkpoint(chunk_loss, part, wanted, use_reentrant=False) for part, wanted in parts]
    return torch.stack(losses).sum()


def target_log_probs(hidden: Tensor, labels: Tensor, head: Head) -> Tensor:
    """Log-probability of each label, (N,) fp32, in nats."""
    rows = _chunk_rows(head)
    parts = zip(hidden.split(rows), labels.split(rows), strict=True)
    return torch.cat([-F.cross_entropy(head.logits(part), wanted, reduction="none") for part, wanted in parts])
