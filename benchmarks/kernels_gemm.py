"""GFLOP/s of the matrix products beside torch's, on the shapes of small language models.

Each line times our product and torch's equivalent alternately and shows the best and the median of both. torch gets
weights in the dtype of the activations (its fastest form); ours reads fp32, bf16 or NF4. ``--quick`` leaves out the
large shapes. The last line is one JSON object. It says nothing about the time of a whole training step.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import common
import torch
from torch import Tensor

from tunegate.kernels import native
from tunegate.kernels.linear import Product, QuantizedWeight, Term, multiply

MODELS = {  # name: (k, n) of its weights
    "135M qkv": (576, 960),
    "135M gate|up": (576, 3072),
    "135M down": (1536, 576),
    "0.5B gate": (896, 4864),
    "3B o": (2048, 2048),
}
ROWS = (1, 16, 64, 256, 1024, 4096)
RANK = 16
TOKENS = 2048
LARGEST = 4e10  # operations of the largest product that is timed


def random_nf4(n: int, k: int) -> QuantizedWeight:
    return QuantizedWeight(
        torch.randint(0, 256, (n * k // 2,), dtype=torch.uint8), (n, k), absmax=torch.rand(-(-n * k // 64))
    )


def seconds(run: Callable[[], object], repeat: int) -> float:
    start = time.perf_counter()
    for _ in range(repeat):
        run()
    return (time.perf_counter() - start) / repeat


def compare(ours: Callable[[], object], theirs: Callable[[], object], operations: float, rounds: int) -> dict:
    """GFLOP/s of both, best and median of alternating rounds."""
    repeat = max(1, int(1e8 / operations))
    ours(), theirs()
    pairs = [(seconds(ours, repeat), seconds(theirs, repeat)) for _ in range(rounds)]
    columns = [sorted(column) for column in zip(*pairs, strict=True)]
    giga = [(operations / column[0] / 1e9, operations / statistics.median(column) / 1e9) for column in columns]
    return {"ours_best": giga[0][0], "ours_median": giga[0][1], "torch_best": giga[1][0], "torch_median": giga[1][1]}


def layer_cases(largest: float, dtype: torch.dtype):  # type: ignore[no-untyped-def]
    """(name, ours, torch's, operations) of forward (x W^T) and backward (y W) products."""
    for name, (k, n) in MODELS.items():
        weight = torch.randn(n, k)
        stored: dict[str, Tensor | QuantizedWeight] = {
            "fp32": weight,
            "bf16": weight.bfloat16(),
            "nf4": random_nf4(n, k),
        }
        same = weight.to(dtype)
        for m in ROWS:
            operations = 2.0 * m * n * k
            if operations > largest:
                continue
            x, y = torch.randn(m, k, dtype=dtype), torch.randn(m, n, dtype=dtype)
            for kind, w in stored.items():
                forward, backward = Product(y, [Term(x, w)]), Product(x, [Term(y, w, w_is_kn=True)])
                yield f"{name} {m} x W^T {kind}", *_pair(forward, y, (x, same.T)), operations
                if m >= 64:
                    yield f"{name} {m} y W {kind}", *_pair(backward, x, (y, same)), operations


def adapter_cases(dtype: torch.dtype):  # type: ignore[no-untyped-def]
    """The thin products of a LoRA layer: h = x A^T, h B^T, dB = y^T h, dA = g^T x."""
    for name, (k, n) in MODELS.items():
        x, y, h = (torch.randn(TOKENS, width, dtype=dtype) for width in (k, n, RANK))
        a, b = torch.randn(RANK, k, dtype=dtype), torch.randn(n, RANK, dtype=dtype)
        for label, out, term, pair, width in (
            ("x A^T", torch.empty_like(h), Term(x, a), (x, a.T), k),
            ("h B^T", torch.empty_like(y), Term(h, b), (h, b.T), n),
            ("dB", torch.empty_like(b), Term(y, h, True, True), (y.T, h), n),
            ("dA", torch.empty_like(a), Term(h, x, True, True), (h.T, x), k),
        ):
            yield f"{name} {label} rank {RANK}", *_pair(Product(out, [term]), out, pair), 2.0 * TOKENS * RANK * width


def _pair(product: Product, like: Tensor, operands: tuple[Tensor, Tensor]):  # type: ignore[no-untyped-def]
    other = torch.empty_like(like)
    return (lambda: multiply(product)), (lambda: torch.mm(*operands, out=other))


def overhead() -> float:
    """Microseconds of one call with three tiny products of two terms."""
    x, w, h, b = (torch.ones(1, 1) for _ in range(4))
    products = [Product(torch.empty(1, 1), [Term(x, w), Term(h, b)]) for _ in range(3)]
    return min(seconds(lambda: multiply(*products), 1000) for _ in range(5)) * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--bf16", action="store_true", help="bf16 activations (machines with bf16 instructions)")
    parser.add_argument("--threads", type=int, nargs="*", help="default: 1 and all")
    options = parser.parse_args()
    dtype = torch.bfloat16 if options.bf16 else torch.float32
    machine = {"processor": common.machine()["cpu"], "level": native.describe()[0], "torch": torch.__version__}
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    results = []
    for threads in options.threads or sorted({1, torch.get_num_threads()}):
        torch.set_num_threads(threads)
        print(f"\n{threads} threads, GFLOP/s{'':22} ours best  median   torch best  median   ratio of bests")
        cases = [*layer_cases(1.5e9 if options.quick else LARGEST, dtype), *adapter_cases(dtype)]
        for name, ours, theirs, operations in cases:
            row = compare(ours, theirs, operations, 3 if options.quick else 7)
            results.append({"name": name, "threads": threads, **row})
            numbers = (row["ours_best"], row["ours_median"], row["torch_best"], row["torch_median"])
            ratio = row["ours_best"] / row["torch_best"]
            print(f"{name:42} {numbers[0]:9.1f} {numbers[1]:7.1f} {numbers[2]:12.1f} {numbers[3]:7.1f} {ratio:9.2f}")
    micros = overhead()
    print(f"\ncall of three products of two terms: {micros:.1f} us")
    print(json.dumps({"machine": machine, "call_microseconds": micros, "results": results}))


if __name__ == "__main__":
    main()
