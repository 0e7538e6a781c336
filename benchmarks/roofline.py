"""The bare matrix products of one training step: what a step cannot beat without doing less.

For every adapted linear layer of the base: forward ``x W^T`` and the input's gradient ``dy W`` at the step's tokens,
and both for the output head at its targets, with a weight of its own per layer as in the model. Adapters, attention,
norms and the optimizer are left out. Timed by torch (oneDNN or MKL) in fp32 and bf16, and by tunegate's own product.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

HOPELESS = 3.0  # ways that are so much slower are not timed: bf16 without bf16 instructions takes minutes
Multiply = Callable[[Tensor, Tensor, Tensor, bool], None]


def run(spec: dict[str, Any]) -> dict[str, Any]:
    """Seconds a step for each way to multiply; ``tokens`` and ``targets`` are the step's."""
    shapes, head = linear_shapes(Path(spec["base"]))
    tokens, targets, repeats = spec["tokens"], spec["targets"], spec.get("repeats", 3)
    found: dict[str, Any] = {}
    fastest = float("inf")
    for name, dtype, multiply in contestants():
        try:
            layers = [torch.randn(out, into, dtype=torch.float32).to(dtype) for out, into in shapes]
            top = torch.randn(*head).to(dtype)
            probe = min(step(layers[:7], top[:64], tokens, 64, multiply) for _ in range(2))
            fastest = min(probe, fastest)
            if probe > HOPELESS * fastest:
                raise ValueError(f"{probe / fastest:.0f} times slower than the fastest on a few layers")
            times = [step(layers, top, tokens, targets, multiply) for _ in range(repeats)]
            found[name] = min(times)  # a limit: what a busy neighbour adds is not part of it
        except (RuntimeError, ValueError, ImportError) as error:
            found[name] = None
            found.setdefault("reasons", {})[name] = str(error)[:200]
    flops = 4 * (tokens * sum(a * b for a, b in shapes) + targets * head[0] * head[1])
    return {"seconds_by": found, "flops": flops, "layers": len(shapes)}


def linear_shapes(base: Path) -> tuple[list[tuple[int, int]], tuple[int, int]]:
    """(out, in) of every linear layer but the head, and of the head."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base))
    top = model.get_output_embeddings()
    shapes = [tuple(m.weight.shape) for m in model.modules() if isinstance(m, nn.Linear) and m is not top]
    return shapes, tuple(top.weight.shape)


def contestants() -> list[tuple[str, torch.dtype, Multiply]]:
    found: list[tuple[str, torch.dtype, Multiply]] = [
        ("torch float32", torch.float32, by_torch),
        ("torch bfloat16", torch.bfloat16, by_torch),
    ]
    try:
        from tunegate.kernels import linear, native

        if native.library() is not None and hasattr(linear, "multiply"):
            found += [
                ("tunegate float32", torch.float32, by_tunegate),
                ("tunegate bfloat16", torch.bfloat16, by_tunegate),
            ]
    except ImportError:
        pass
    return found


def by_torch(out: Tensor, x: Tensor, weight: Tensor, transposed: bool) -> None:
    torch.mm(x, weight.t() if transposed else weight, out=out)


def by_tunegate(out: Tensor, x: Tensor, weight: Tensor, transposed: bool) -> None:
    from tunegate.kernels.linear import Product, Term, multiply

    multiply(Product(out, [Term(x, weight, w_is_kn=not transposed)]))


def step(layers: list[Tensor], head: Tensor, tokens: int, targets: int, multiply: Multiply) -> float:
    """Seconds for the products of one step. Buffers are made once and shared by layers of one shape."""
    buffers: dict[tuple[int, int], Tensor] = {}

    def buffer(rows: int, width: int) -> Tensor:
        return buffers.setdefault((rows, width), torch.randn(rows, width).to(head.dtype))

    work = [(weight, tokens) for weight in layers] + [(head, targets)]
    for weight, rows in work:
        buffer(rows, weight.shape[0]), buffer(rows, weight.shape[1])
    spare = {key: torch.empty_like(value) for key, value in buffers.items()}
    began = time.perf_counter()
    for weight, rows in work:
        multiply(spare[rows, weight.shape[0]], buffer(rows, weight.shape[1]), weight, True)
    for weight, rows in reversed(work):
        multiply(spare[rows, weight.shape[1]], buffer(rows, weight.shape[0]), weight, False)
    return time.perf_counter() - began
