"""A model of 8 billion parameters on a laptop's memory: streaming NF4 load and one QLoRA step, with peak memory.

    python benchmarks/big_model.py --folder /tmp/8b            # writes 16 GB of random bf16 shards there first
    python benchmarks/big_model.py --folder /tmp/8b --quick    # a shape of 1.2 billion

The checkpoint has the shape of Llama 3.1 8B and random weights: memory and time do not depend on their values. The
disk is read bare, to hash it and by the loader, each time with the files dropped from the page cache, so the shares of
the disk's speed are of the same run. One step is one forward and backward pass over ``--tokens`` tokens in
rows of 128, rank 16 on all linear layers, layer inputs kept only, and AdamW. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import threading
import time
from pathlib import Path
from typing import Any

import common

SHAPES = {
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
           "num_key_value_heads": 8, "vocab_size": 128256},
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
           "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": True},
}  # fmt: skip
ROW = 128


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the small shape")
    parser.add_argument("--folder", type=Path, required=True, help="where the checkpoint is, or is written")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--output", type=Path, default=common.RESULTS)
    return parser.parse_args()


def config_of(shape: str) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(**SHAPES[shape], max_position_embeddings=8192, rope_theta=500000.0)


def write_checkpoint(folder: Path, shape: str) -> None:
    """bf16 shards of a layer each, one at a time in memory. Values are cut from one pool of random numbers, each tensor
    from another place of it: 8 billion draws take longer than everything that is measured."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    config = config_of(shape)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    folder.mkdir(parents=True, exist_ok=True)
    groups: dict[str, dict[str, Any]] = {}
    for name, tensor in model.state_dict().items():
        if config.tie_word_embeddings and name == "lm_head.weight":
            continue
        parts = name.split(".")
        groups.setdefault(parts[2] if parts[1] == "layers" else name, {})[name] = tensor
    weight_map, generator = {}, torch.Generator().manual_seed(0)
    pool = torch.empty(1 << 26, dtype=torch.bfloat16).normal_(0.0, 0.02, generator=generator)
    place = 0
    for number, tensors in enumerate(groups.values(), 1):
        file = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        made = {}
        for name, tensor in tensors.items():
            if "norm" in name:
                made[name] = torch.ones(tensor.shape, dtype=torch.bfloat16)
                continue
            place = (place + 1_000_003) % len(pool)
            turned = torch.roll(pool, place)
            made[name] = turned.repeat(-(-tensor.numel() // len(pool)))[: tensor.numel()].view(tensor.shape).clone()
        save_file(made, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)


def drop_from_cache(folder: Path) -> None:
    for path in folder.glob("*.safetensors"):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def disk_speed(folder: Path) -> float:
    """Bytes a second of a plain sequential read."""
    drop_from_cache(folder)
    buffer, total, began = bytearray(64 << 20), 0, time.perf_counter()
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb", buffering=0) as handle:
            while got := handle.readinto(buffer):
                total += got
    return total / (time.perf_counter() - began)


class Peak:
    """Largest resident memory inside the block, bytes, sampled every 5 ms."""

    def __enter__(self) -> Peak:
        self.bytes, self._done = 0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        page = resource.getpagesize()
        while not self._done.wait(0.005):
            self.bytes = max(self.bytes, int(Path("/proc/self/statm").read_text().split()[1]) * page)

    def __exit__(self, *_: Any) -> None:
        self._done.set()
        self._thread.join()


def train_step(model: Any, tokens: int) -> dict[str, Any]:
    import torch

    from tunegate.adapter.inject import inject
    from tunegate.adapter.spec import AdapterSpec
    from tunegate.data.pack import make_batch
    from tunegate.data.types import Rendered
    from tunegate.engine.runner import Runner
    from tunegate.kernels.adamw import FusedAdamW

    runner = Runner(model)
    injection = inject(model, AdapterSpec(16, 32.0), seed=0)
    if runner.fused is None:
        raise common.Skipped(f"no fused layers: {runner.path_reason}")
    runner.fused.save_less(runner.fused.count)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, model.config.vocab_size, (tokens // ROW, ROW), generator=generator).tolist()
    rows = [Rendered(f"row {n}", tuple(row), (False,) * (ROW - 8) + (True,) * 8) for n, row in enumerate(ids)]
    batch = make_batch(rows, share_prefix=False)
    optimizer = FusedAdamW(list(injection.parameters().values()), lr=1e-4)
    began = time.perf_counter()
    loss = runner.loss_sum(batch) / batch.n_targets
    loss.backward()
    optimizer.step()
    return {
        "loss": float(loss.detach()), "step_seconds": time.perf_counter() - began, "path": runner.path_reason,
        "trainable": injection.trainable,
    }  # fmt: skip


def main() -> None:
    args = arguments()
    shape = "1b" if args.quick else "8b"
    machine = common.machine()
    print(common.describe(machine), flush=True)
    if not (args.folder / "config.json").exists():
        print(f"writing random weights to {args.folder}", flush=True)
        write_checkpoint(args.folder, shape)
    size = sum(p.stat().st_size for p in args.folder.glob("*.safetensors"))
    disk = disk_speed(args.folder)
    import torch
    from transformers import AutoConfig

    from tunegate.kernels.formats import Recipe
    from tunegate.model.fingerprint import hash_weights
    from tunegate.model.streaming import load_streamed

    drop_from_cache(args.folder)
    with Peak() as hashing:
        began = time.perf_counter()
        hash_weights(args.folder, use_cache=False)
        hash_seconds = time.perf_counter() - began
    drop_from_cache(args.folder)
    with Peak() as loading:
        began = time.perf_counter()
        streamed = load_streamed(
            args.folder, AutoConfig.from_pretrained(args.folder), dtype=torch.float32, recipe=Recipe()
        )
        seconds = time.perf_counter() - began
    found = {
        "machine": machine, "shape": shape, "checkpoint_bytes": size,
        "hash_seconds": hash_seconds, "hash_peak_rss": hashing.bytes,
        "weight_bytes": streamed.weight_bytes, "load_seconds": seconds, "load_peak_rss": loading.bytes,
        "disk_bytes_per_second": disk, "load_share_of_disk": size / seconds / disk,
    }  # fmt: skip
    print(f"loaded {size / 1e9:.1f} GB into {streamed.weight_bytes / 1e9:.2f} GB in {seconds:.0f} s, peak "
          f"{loading.bytes / 1e9:.2f} GB", flush=True)  # fmt: skip
    with Peak() as training:
        found |= train_step(streamed.model, args.tokens)
    found["step_peak_rss"], found["tokens"] = training.bytes, args.tokens
    text = [
        "# An 8B model on a laptop" if shape == "8b" else "# A 1.2B model, quick run", common.describe(machine),
        common.table(
            ["", ""],
            [
                ["checkpoint, bf16", f"{size / 1e9:.2f} GB"],
                ["model in memory", f"{streamed.weight_bytes / 1e9:.2f} GB"],
                ["peak RSS while hashing the files", f"{hashing.bytes / 1e9:.2f} GB"],
                ["peak RSS while loading", f"{loading.bytes / 1e9:.2f} GB"], ["load", f"{seconds:.0f} s"],
                ["share of a bare sequential read's speed", f"{found['load_share_of_disk']:.0%}"],
                [f"peak RSS of a QLoRA step, {args.tokens} tokens, rank 16", f"{training.bytes / 1e9:.2f} GB"],
                ["that step", f"{found['step_seconds']:.0f} s"],
            ],
        ),
    ]  # fmt: skip
    common.write(f"big-model-{shape}", found, "\n\n".join(text), args.output)
    keys = ("load_share_of_disk", "load_peak_rss", "weight_bytes", "step_peak_rss", "step_seconds")
    print(json.dumps({key: found[key] for key in keys}))


if __name__ == "__main__":
    main()
