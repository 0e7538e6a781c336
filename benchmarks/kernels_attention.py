"""Varlen attention, forward and backward: the native kernel, the grouped SDPA twin and SDPA on padded rows.

Every repetition times each of the three once, so that a busy machine slows all alike; medians are shown. Rows of one
length need no padding, so the padded column is SDPA at its best: one call, causal, key heads repeated.

    python benchmarks/kernels_attention.py [--quick] [--threads N] [--dtype float32|bfloat16]

The last line is one JSON object. Not measured: rows of mixed lengths, and what padding costs the rest of a model.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Callable
from statistics import median

import torch
import torch.nn.functional as F
from common import interleaved
from torch import Tensor

from tunegate.kernels import Layout, Plan, attention, native, varlen

HEADS, KV_HEADS, DIM = 9, 3, 64
LENGTHS = {32: 2048, 55: 2035, 128: 2048, 512: 2048, 2048: 2048, 4096: 4096}  # row length: tokens of the run
SCALE = DIM**-0.5


def step_of(run: Callable[..., Tensor], tensors: tuple[Tensor, ...], seen: Tensor) -> Callable[[], object]:
    return lambda: torch.autograd.grad(run(*tensors), tensors, seen)


def contestants(length: int, tokens: int, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    heads = (HEADS, KV_HEADS, KV_HEADS)
    tensors = tuple(torch.randn(tokens, n, DIM).to(dtype).requires_grad_() for n in heads)
    seen = torch.randn(tokens, HEADS, DIM).to(dtype)
    plan = Plan(Layout((length,) * (tokens // length)))

    def own(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, plan, scale=SCALE)

    def twin(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        supports, varlen.supports = varlen.supports, lambda *_: False
        try:
            return attention(q, k, v, plan, scale=SCALE)
        finally:
            varlen.supports = supports

    def padded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.view(-1, length, x.shape[1], DIM).transpose(1, 2) for x in (q, k, v))
        k, v = (x.repeat_interleave(HEADS // KV_HEADS, dim=1) for x in (k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=SCALE)
        return out.transpose(1, 2).reshape(tokens, HEADS, DIM)

    return {name: step_of(run, tensors, seen) for name, run in (("own", own), ("twin", twin), ("padded", padded))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="three lengths, three repetitions")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    level, reason = native.describe()
    print(f"{platform.processor() or platform.machine()}, {options.threads} threads, torch {torch.__version__}")
    print(f"kernels: {level} ({reason}); {HEADS}/{KV_HEADS} heads of {DIM}, {options.dtype}; ms for forward + backward")
    print(f"{'row':>6}{'tokens':>8}{'own':>9}{'twin':>9}{'padded':>9}{'twin/own':>10}{'padded/own':>12}{'GFLOP/s':>9}")
    rows = []
    for length, tokens in LENGTHS.items():
        if options.quick and length not in (55, 512, 2048):
            continue
        steps = contestants(length, tokens, getattr(torch, options.dtype))
        found = interleaved(steps, 3 if options.quick else 9)
        times = {name: 1e3 * median(seconds) for name, seconds in found.items()}
        # 7 products of 2 * DIM per visible pair: two forward, five backward
        rate = 14 * DIM * HEADS * tokens * (length + 1) / 2 / times["own"] / 1e6
        twin, padded = times["twin"] / times["own"], times["padded"] / times["own"]
        shown = "".join(f"{times[name]:>9.2f}" for name in ("own", "twin", "padded"))
        print(f"{length:>6}{tokens:>8}{shown}{twin:>10.1f}{padded:>12.1f}{rate:>9.0f}")
        rows.append({"length": length, "tokens": tokens, "ms": times, "gflops": rate})
    print(json.dumps({"threads": options.threads, "level": level, "dtype": options.dtype, "rows": rows}))


if __name__ == "__main__":
    main()
