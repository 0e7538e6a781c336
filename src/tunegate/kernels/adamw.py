"""AdamW in one native call a step, and gradient scaling, norm and clipping in two passes.

All tensors of all groups are laid end to end and cut into tasks of equal size, so the hundreds of small matrices of an
adapter cost a pass over memory and not hundreds of kernel launches. The formula and the state are those of
torch.optim.AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101): its checkpoints load here and the other way round.
With ``eight_bit`` the large tensors' moments are 8-bit codes (see ``adamw8``).

No amsgrad, no maximize, no sparse gradients; parameters are fp32.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, overload

import torch
from torch import Tensor

from tunegate.kernels import adamw8, native

_UNSUPPORTED = ("amsgrad", "maximize", "capturable", "differentiable")


class FusedAdamW(torch.optim.AdamW):
    """torch.optim.AdamW with its own ``step``; arguments, param_groups and state_dict are those of the parent.

    ``eight_bit`` keeps the moments of tensors of 4,096 elements or more in 8 bits: state ``step``, ``state1``,
    ``state2`` (uint8 codes), ``absmax1`` and ``absmax2`` (fp32), as bitsandbytes names them.

    Parameters must be contiguous fp32 tensors. Off the CPU and without the kernels PyTorch's foreach operations run.
    """

    def __init__(self, params: Any, *, eight_bit: bool = False, **settings: Any) -> None:
        asked = [name for name in _UNSUPPORTED if settings.get(name)]
        if asked:
            raise ValueError(f"FusedAdamW has no {', '.join(asked)}; use torch.optim.AdamW")
        self.eight_bit = eight_bit
        super().__init__(params, **settings)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        for parameter in self.param_groups[-1]["params"]:
            if parameter.dtype != torch.float32 or not parameter.is_contiguous():
                raise ValueError(
                    f"FusedAdamW takes contiguous fp32 parameters, got {parameter.dtype} {tuple(parameter.shape)} with "
                    f"strides {parameter.stride()}; convert it with .float().contiguous() or use torch.optim.AdamW"
                )

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One update of every parameter that has a gradient; returns the closure's loss, if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        work, packed = [], []
        for index, group in enumerate(self.param_groups):
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                if self.eight_bit and parameter.numel() >= adamw8.LEAST:
                    packed.append(adamw8.ready(parameter, _gradient(parameter), self.state[parameter], index))
                else:
                    work.append(_ready(parameter, self.state[parameter], index))
        groups = [
            (float(group["lr"]), *map(float, group["betas"]), float(group["eps"]), float(group["weight_decay"]))
            for group in self.param_groups
        ]
        adamw8.step(packed, groups)
        lib = native.library()
        if lib is not None and all(parts[0].is_cpu for parts in work):
            addresses = [(*[t.data_ptr() for t in tensors], tensors[0].numel(), index) for *tensors, index in work]
            lib.adamw(addresses, groups)
            torch.autograd.graph.increment_version([parts[0] for parts in work])  # as an in-place operation does
        else:
            _step_twin(work, groups)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As the parent's, which makes fp32 of codes on the way: they become codes again."""
        super().load_state_dict(state_dict)
        for state in self.state.values():
            for name in adamw8.CODES:
                if name in state:
                    state[name] = state[name].to(torch.uint8)


# parameter, gradient, exp_avg, exp_avg_sq, step, index of the group
_Parts = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, int]


def _gradient(parameter: Tensor) -> Tensor:
    """Its gradient, contiguous; ValueError for one that is not dense fp32."""
    gradient = parameter.grad
    assert gradient is not None
    if gradient.dtype is not torch.float32 or gradient.layout is not torch.strided:
        raise ValueError(f"FusedAdamW takes dense fp32 gradients, got {gradient.layout}, {gradient.dtype}")
    return gradient.contiguous()


def _ready(parameter: Tensor, state: dict[str, Any], index: int) -> _Parts:
    if not state:
        state["step"] = torch.tensor(0.0)
        state["exp_avg"] = torch.zeros_like(parameter)
        state["exp_avg_sq"] = torch.zeros_like(parameter)
    first, second, step = state["exp_avg"], state["exp_avg_sq"], state["step"]
    count = parameter.numel()
    for tensor, expected in ((first, count), (second, count), (step, 1)):
        if tensor.numel() != expected or tensor.dtype is not torch.float32 or not tensor.is_contiguous():
            raise ValueError(
                f"optimizer state must be contiguous fp32 tensors of {expected} elements, got {tensor.dtype} "
                f"{tuple(tensor.shape)}, strides {tensor.stride()}; was it loaded for other parameters?"
            )
    return parameter, _gradient(parameter), first, second, step, index


def _step_twin(work: list[_Parts], groups: list[tuple[float, ...]]) -> None:
    batches: dict[tuple[int, float], list[_Parts]] = {}
    for parts in work:
        parts[4].add_(1)
        batches.setdefault((parts[5], float(parts[4])), []).append(parts)
    for (index, step), batch in batches.items():
        lr, beta1, beta2, eps, decay = groups[index]
        parameters, gradients, firsts, seconds, _, _ = map(list[Any], zip(*batch, strict=True))
        torch._foreach_mul_(parameters, 1 - lr * decay)
        torch._foreach_lerp_(firsts, gradients, 1 - beta1)
        torch._foreach_mul_(seconds, beta2)
        torch._foreach_addcmul_(seconds, gradients, gradients, 1 - beta2)
        denominators = torch._foreach_sqrt(seconds)
        torch._foreach_div_(denominators, math.sqrt(1 - beta2**step))
        torch._foreach_add_(denominators, eps)
        torch._foreach_addcdiv_(parameters, firsts, denominators, -lr / (1 - beta1**step))


@torch.no_grad()
def clip_and_scale_(gradients: list[Tensor], scale: float, max_norm: float | None) -> float:
    """Multiply all gradients by ``scale`` in place, then clip their global L2 norm to ``max_norm`` (None: no clipping)
    as torch.nn.utils.clip_grad_norm_ does: by max_norm / (norm + 1e-6), if that is below 1.

    Returns the norm between the two, summed in fp64 over fixed blocks: the same on any number of threads. A gradient
    that is not finite gives a norm that is not finite; the caller decides what to do about it.
    """
    for gradient in gradients:
        if gradient.layout != torch.strided or gradient.dtype != torch.float32 or not gradient.is_contiguous():
            raise ValueError(
                f"gradients must be dense, contiguous and fp32, got {gradient.layout}, {gradient.dtype}, "
                f"{tuple(gradient.shape)}; use torch.nn.utils.clip_grad_norm_"
            )
    if not gradients:
        return 0.0
    lib = native.library_for(*gradients)
    if lib is None:
        return _clip_twin(gradients, scale, max_norm)
    norm: float = lib.clip_and_scale([g.data_ptr() for g in gradients], [g.numel() for g in gradients], scale, max_norm)
    return norm


def _clip_twin(gradients: list[Tensor], scale: float, max_norm: float | None) -> float:
    torch._foreach_mul_(gradients, scale)
    # Blocks that torch sums on one thread, so that here too the sum is the same on any number of them.
    blocks = [block for gradient in gradients for block in gradient.flatten().split(16384)]
    squares = [float(block.double().square().sum()) for block in blocks]
    norm = math.sqrt(math.fsum(squares)) if all(map(math.isfinite, squares)) else math.sqrt(sum(squares))
    if max_norm is not None:
        ratio = max_norm / (norm + 1e-6)
        torch._foreach_mul_(gradients, 1.0 if ratio > 1 else ratio)
    return norm
