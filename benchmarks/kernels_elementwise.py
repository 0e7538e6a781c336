"""RMS norm, rotary positions, gated activation, dropout and AdamW: the kernels against eager PyTorch.

The first four are a forward and a backward each at 1024 tokens: the kernels write into buffers that exist, PyTorch
goes through autograd and allocates its results, as a model written with it does. AdamW and clipping run over the 420
adapter tensors (r = 16) of a 30-layer model of width 576, against torch's foreach and fused forms. Every repetition
times each contestant once, so that a busy machine slows all alike; medians and bests are shown.

    python benchmarks/kernels_elementwise.py [--quick] [--threads N] [--dtype float32|bfloat16]

The last line is one JSON object. Not measured: torch.compile, which would fuse most of the eager forms.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Callable
from statistics import median

import torch
from common import interleaved
from torch import Tensor
from torch.nn import functional as F

from tunegate.kernels import native
from tunegate.kernels.adamw import FusedAdamW, clip_and_scale_
from tunegate.kernels.dropout import add_dropped, dropped
from tunegate.kernels.glu import gated, gated_backward
from tunegate.kernels.norm import rms_norm, rms_norm_backward
from tunegate.kernels.rope import rope_

Runs = dict[str, Callable[[], object]]


def through_autograd(forward: Callable[..., Tensor], grad_out: Tensor, *leaves: Tensor) -> Callable[[], object]:
    leaves = tuple(leaf.detach().clone().requires_grad_() for leaf in leaves)
    return lambda: torch.autograd.grad(forward(*leaves), leaves, grad_out)


def norms(tokens: int, width: int, dtype: torch.dtype) -> Runs:
    x, grad_out = torch.randn(2, tokens, width).to(dtype)
    weight, out, grad = torch.randn(width).to(dtype), torch.empty_like(x), torch.empty_like(x)
    inverse = torch.empty(tokens)

    def own() -> None:
        rms_norm(x, weight, 1e-5, out, inverse)
        rms_norm_backward(grad_out, x, weight, inverse, grad)

    def llama(x: Tensor) -> Tensor:  # as transformers writes it
        wide = x.float()
        return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)).to(dtype)

    name = f"RMS norm {width}"
    return {
        f"{name}: kernel": own,
        f"{name}: as in transformers": through_autograd(llama, grad_out, x),
        f"{name}: F.rms_norm": through_autograd(lambda x: F.rms_norm(x, (width,), weight, 1e-5), grad_out, x),
    }


def ropes(tokens: int, width: int, dtype: torch.dtype) -> Runs:
    heads = width // 64
    x = torch.randn(tokens, heads, 64).to(dtype)
    own_x = x.clone()
    angles = torch.outer(torch.arange(float(tokens)), 10000 ** (-torch.arange(32.0) / 32)).repeat(1, 2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)

    def own() -> None:
        rope_(own_x, cos, sin)
        rope_(own_x, cos, sin, inverse=True)

    def eager(x: Tensor) -> Tensor:
        turned = torch.cat((-x[..., 32:], x[..., :32]), dim=-1)
        return x * cos[:, None] + turned * sin[:, None]

    return {f"rotary {heads} heads: kernel": own, f"rotary {heads} heads: eager": through_autograd(eager, x, x)}


def gates(tokens: int, width: int, dtype: torch.dtype) -> Runs:
    gate, up, grad_out = torch.randn(3, tokens, width).to(dtype)
    out, grad_gate, grad_up = (torch.empty_like(gate) for _ in range(3))
    eager = {
        "silu": lambda gate, up: F.silu(gate) * up,
        "gelu_tanh": lambda gate, up: F.gelu(gate, approximate="tanh") * up,
        "gelu": lambda gate, up: F.gelu(gate) * up,
    }

    def own(activation: str) -> Callable[[], object]:
        def run() -> None:
            gated(gate, up, out, activation)
            gated_backward(grad_out, gate, up, grad_gate, grad_up, activation)

        return run

    runs: Runs = {}
    for activation, forward in eager.items():
        runs[f"{activation} gate {width}: kernel"] = own(activation)
        runs[f"{activation} gate {width}: eager"] = through_autograd(forward, grad_out, gate, up)
    return runs


def dropouts(tokens: int, width: int, dtype: torch.dtype) -> Runs:
    x, grad_out = torch.randn(2, tokens, width).to(dtype)
    out, grad = torch.empty_like(x), torch.zeros_like(x)

    def own() -> None:
        dropped(x, out, rate=0.05, seed=1)
        add_dropped(grad_out, grad, rate=0.05, seed=1)

    eager = through_autograd(lambda x: F.dropout(x, 0.05), grad_out, x)
    return {f"dropout {width}: kernel": own, f"dropout {width}: F.dropout": eager}


def optimizers() -> Runs:
    linears = [(576, 576), (576, 192), (576, 192), (576, 576), (576, 1536), (576, 1536), (1536, 576)]
    shapes = [shape for _ in range(30) for k, n in linears for shape in ((16, k), (n, 16))]

    def fresh() -> list[Tensor]:
        parameters = [torch.randn(shape).requires_grad_() for shape in shapes]
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
        return parameters

    own, foreach, fused = fresh(), fresh(), fresh()
    gradients, others = [p.grad for p in own], [p.grad for p in foreach]

    def torchs_clip() -> None:
        torch._foreach_mul_(others, 0.999)
        torch.nn.utils.clip_grad_norm_(foreach, 1.0)

    return {
        "AdamW, 420 tensors: kernel": FusedAdamW(own, lr=1e-4).step,
        "AdamW, 420 tensors: torch foreach": torch.optim.AdamW(foreach, lr=1e-4, foreach=True).step,
        "AdamW, 420 tensors: torch fused": torch.optim.AdamW(fused, lr=1e-4, fused=True).step,
        "scale, norm, clip: kernel": lambda: clip_and_scale_(gradients, 0.999, 1.0),
        "scale, norm, clip: torch foreach": torchs_clip,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="256 tokens, the small width, 3 repetitions")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    dtype = getattr(torch, arguments.dtype)
    tokens, repetitions = (256, 3) if arguments.quick else (1024, 15)
    level, _ = native.describe()
    software = f"Python {platform.python_version()}, torch {torch.__version__}, {level}"
    print(f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; {software}")
    print(f"{arguments.threads} threads, {tokens} tokens, {arguments.dtype}")
    families: list[Runs] = [optimizers()]
    for width, inner in [(576, 1536)] if arguments.quick else [(576, 1536), (2048, 8192)]:
        for make, size in ((norms, width), (ropes, width), (gates, inner), (dropouts, width)):
            families.append(make(tokens, size, dtype))
    results = []
    for runs in families:
        own = None
        for name, times in interleaved(runs, repetitions, warm_up=2).items():
            typical, best = 1e3 * median(times), 1e3 * min(times)
            own = typical if name.endswith(": kernel") or own is None else own
            ratio = "" if name.endswith(": kernel") else f"  {typical / own:5.1f} x the kernel"
            print(f"{name:36} median {typical:8.3f} ms  best {best:8.3f}{ratio}")
            results.append({"name": name, "median_ms": typical, "best_ms": best})
    about = {"level": level, "threads": arguments.threads, "tokens": tokens, "dtype": arguments.dtype}
    print(json.dumps({**about, "torch": torch.__version__, "results": results}))


if __name__ == "__main__":
    main()
