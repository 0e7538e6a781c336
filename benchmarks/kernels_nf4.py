"""NF4 and int8: quantize and dequantize, against bitsandbytes' CPU code where it is installed.

Every repetition times each contestant once, so that a busy machine slows all alike; medians and bests are shown.
GB/s are those of the weight in 16 bits, read (quantize) or written (dequantize), whatever the dtype.

    python benchmarks/kernels_nf4.py [--quick] [--threads N]

The last line is one JSON object. Not measured: products with such weights (see kernels_gemm.py).
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Callable
from importlib import import_module
from statistics import median
from typing import Any

import torch
from common import interleaved

from tunegate.kernels import native, nf4
from tunegate.kernels.formats import Recipe


def bitsandbytes() -> Any:
    try:
        return import_module("bitsandbytes.functional")
    except ImportError:
        return None


def contestants(size: int, dtype: torch.dtype, recipe: Recipe) -> dict[str, Callable[[], object]]:
    weight = (torch.randn(size, size) * 0.02).to(dtype)
    made, out = nf4.quantize(weight, recipe), torch.empty_like(weight)
    runs: dict[str, Callable[[], object]] = {
        "quantize": lambda: nf4.quantize(weight, recipe),
        "dequantize": lambda: nf4.dequantize(made, out),
    }
    peer = bitsandbytes()
    if peer is not None and recipe.format == "int8":
        rows, scales, _ = peer.int8_vectorwise_quant(weight)
        runs["quantize, bitsandbytes"] = lambda: peer.int8_vectorwise_quant(weight)
        runs["dequantize, bitsandbytes"] = lambda: peer.int8_vectorwise_dequant(rows, scales)
    elif peer is not None:
        options = {"quant_type": recipe.format, "compress_statistics": recipe.double}
        codes, state = peer.quantize_4bit(weight, **options)
        runs["quantize, bitsandbytes"] = lambda: peer.quantize_4bit(weight, **options)
        runs["dequantize, bitsandbytes"] = lambda: peer.dequantize_4bit(codes, state)
    return runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a 2048 x 2048 weight, 3 repetitions")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    size, repetitions = (2048, 3) if arguments.quick else (4096, 7)
    level, _ = native.describe()
    print(f"{platform.machine()}, torch {torch.__version__}, {level}, {arguments.threads} threads, {size} x {size}")
    results = []
    for dtype in (torch.bfloat16, torch.float32):
        for recipe in (Recipe(double=False), Recipe(), Recipe.of("int8")):
            for name, times in interleaved(contestants(size, dtype, recipe), repetitions).items():
                rate = [2 * size * size / t / 1e9 for t in (median(times), min(times))]
                kind = f"{str(dtype).removeprefix('torch.')}, {recipe}"
                print(f"{kind:24} {name:26} median {rate[0]:6.2f} GB/s  best {rate[1]:6.2f}")
                results.append({"kind": kind, "name": name, "median_gb_s": rate[0], "best_gb_s": rate[1]})
    print(json.dumps({"level": level, "threads": arguments.threads, "size": size, "results": results}))


if __name__ == "__main__":
    main()
