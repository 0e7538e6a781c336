"""AdamW in one native call a step, and gradient scaling, norm and clipping in two passes.

All tensors of all groups are laid end to end and cut into tasks of equal size, so the hundreds of small matrices of an
adapter cost a pass over memory and not hundreds of kernel launches. The formula and the state are those of
torch.optim.AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101): its checkpoints load here and the other way round.

No amsgrad, no maximize, no sparse gradients; parameters are fp32.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, overload

import torch
from torch import Tensor

from tunegate.kernels import native

_UNSUPPORTED = ("amsgrad", "maximize", "capturable", "differentiable")


class FusedAdamW(torch.optim.AdamW):
    """torch.optim.AdamW with its own ``step``; arguments, param_groups and state_dict are those of the parent.

    Parameters must be contiguous fp32 tensors. Off the CPU and without the kernels PyTorch's foreach operations run.
    """

    def __init__(self, params: Any, **settings: Any) -> None:
        asked = [name for name in _UNSUPPORTED if settings.get(name)]
        if asked:
            raise ValueError(f"FusedAdamW has no {', '.join(asked)}; use torch.optim.AdamW")
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
        native_work, twin_work = _Work(), _Work()
        lib = native.library()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    usable = lib is not None and native.usable(parameter)
                    (native_work if usable else twin_work).add(parameter, self.state[parameter], group)
        if lib is not None and native_work.tensors:
            native_work.run_native(lib)
        twin_work.run_twin()
        return loss


class _Work:
    """What one step updates: tensors, and the distinct hyperparameters (lr, beta1, beta2, eps, decay, step)."""

    def __init__(self) -> None:
        self.tensors: list[tuple[Tensor, Tensor, Tensor, Tensor, int]] = []
        self.hyper: dict[tuple[float, float, float, float, float, float], int] = {}

    def add(self, parameter: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        gradient = parameter.grad
        assert gradient is not None
        if gradient.layout != torch.strided or gradient.dtype != torch.float32:
            raise ValueError(f"FusedAdamW takes dense fp32 gradients, got {gradient.layout}, {gradient.dtype}")
        if not state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        state["step"] += 1
        beta1, beta2 = group["betas"]
        key = (float(group["lr"]), beta1, beta2, group["eps"], group["weight_decay"], float(state["step"]))
        index = self.hyper.setdefault(key, len(self.hyper))
        first, second = state["exp_avg"], state["exp_avg_sq"]
        if not (first.is_contiguous() and second.is_contiguous() and first.dtype == second.dtype == torch.float32):
            raise ValueError("the loaded optimizer state must be contiguous fp32 tensors, like the parameters")
        self.tensors.append((parameter, gradient.contiguous(), first, second, index))

    def run_native(self, lib: Any) -> None:
        pointers = [(p.data_ptr(), g.data_ptr(), m.data_ptr(), v.data_ptr(), i) for p, g, m, v, i in self.tensors]
        lib.adamw(pointers, [p.numel() for p, *_ in self.tensors], list(self.hyper))

    def run_twin(self) -> None:
        for (lr, beta1, beta2, eps, decay, step), index in self.hyper.items():
            own: list[Any] = [t for t in self.tensors if t[4] == index]
            parameters, gradients, firsts, seconds = ([t[k] for t in own] for k in range(4))
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
    lib = native.library()
    if lib is None or not native.usable(*gradients):
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
