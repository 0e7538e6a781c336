"""Head and cross-entropy with the hidden states' gradient: the kernels at several chunk sizes, the chunked PyTorch
path, and ``F.cross_entropy`` on full logits; the softmax step alone; greedy choice at decoding sizes.

Every repetition times each contestant once, so that a busy machine slows all alike; medians and bests are shown.

    python benchmarks/kernels_loss.py [--quick] [--threads N]

The last line is one JSON object. Not measured: peak memory, bf16 heads.
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
from torch import nn

from tunegate.kernels import native
from tunegate.kernels.cross_entropy import (
    Head,
    _FrozenHeadLoss,
    argmax_logits,
    linear_cross_entropy_op,
    softmax_gradient_,
)

HIDDEN, VOCABULARY = 576, 49152


def contestants(rows: int, chunks: tuple[int, ...]) -> dict[str, Callable[[], object]]:
    layer = nn.Linear(HIDDEN, VOCABULARY, bias=False).requires_grad_(False)
    head = Head(layer)
    hidden = torch.randn(rows, HIDDEN).requires_grad_()
    labels = torch.randint(VOCABULARY, (rows,))
    logits, losses = layer(hidden.detach()), torch.empty(rows)
    leaf = logits.clone().requires_grad_()

    def full() -> object:
        return torch.autograd.grad(F.cross_entropy(layer(hidden), labels, reduction="sum"), hidden)

    def chunked() -> object:
        return torch.autograd.grad(_FrozenHeadLoss.apply(hidden, labels, head), hidden)

    def own(chunk: int) -> Callable[[], object]:
        return lambda: linear_cross_entropy_op(hidden, layer.weight, labels, rows=chunk)

    runs: dict[str, Callable[[], object]] = {f"kernels, chunks of {chunk}": own(chunk) for chunk in chunks}
    runs["PyTorch, chunked"] = chunked
    runs["F.cross_entropy, full logits"] = full
    runs["softmax step: kernel"] = lambda: softmax_gradient_(logits, labels, losses)
    runs["softmax step: torch"] = lambda: torch.autograd.grad(F.cross_entropy(leaf, labels, reduction="sum"), leaf)
    few = torch.randn(16, HIDDEN)
    runs["greedy, 16 rows: kernel"] = lambda: argmax_logits(few, head)
    runs["greedy, 16 rows: torch"] = lambda: layer(few).argmax(1)
    return runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="64 rows, 3 repetitions")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows, repetitions = (64, 3) if arguments.quick else (300, 9)
    level, _ = native.describe()
    print(f"{platform.machine()}, torch {torch.__version__}, {level}, {arguments.threads} threads")
    print(f"{rows} targets, hidden {HIDDEN}, vocabulary {VOCABULARY}, fp32")
    results = []
    for name, times in interleaved(contestants(rows, (rows, 150, 64)), repetitions).items():
        milliseconds = [1e3 * t for t in (median(times), min(times))]
        print(f"{name:30} median {milliseconds[0]:8.2f} ms  best {milliseconds[1]:8.2f}")
        results.append({"name": name, "median_ms": milliseconds[0], "best_ms": milliseconds[1]})
    print(json.dumps({"level": level, "threads": arguments.threads, "rows": rows, "results": results}))


if __name__ == "__main__":
    main()
