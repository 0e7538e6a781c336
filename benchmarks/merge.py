"""Merging a large checkpoint: time, peak memory and share of the disk's speed, and PEFT's merge on the packaged base.

    python benchmarks/merge.py --folder /tmp/merge                 # shape of Llama 3.1 8B: 16 GB read, 16 GB written
    python benchmarks/merge.py --folder /tmp/merge --shape 3b      # shape of Llama 3.2 3B
    python benchmarks/merge.py --folder /tmp/merge --quick         # only the packaged base, beside PEFT
    python benchmarks/merge.py --folder /tmp/merge --shape tiny    # does the script run?

The checkpoint has random bf16 weights, the adapter random factors of rank 16 on all linear layers. A plain copy of the
same files (read, write, flush) is timed before the merge, both with the files dropped from the page cache; the copy's
time over the merge's is the share of the disk's speed. Then tunegate and PEFT (load, ``merge_and_unload``, save) merge
the same adapter into the packaged base, in turn, ``--rounds`` times; both wait until the disk has what they wrote.
Every merge runs in a process of its own; its memory is that process's highest resident set (``VmHWM``). The parity
report is not part of the time. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import big_model
import common

SHAPES = {
    "8b": big_model.SHAPES["8b"],
    "3b": {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24,
           "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": True},
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 512},
}  # fmt: skip
RANK, CHUNK = 16, 64 << 20


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="where checkpoints and results lie; emptied after")
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--quick", action="store_true", help="only the packaged base")
    parser.add_argument("--rounds", type=int, default=3, help="of the packaged base; default 3")
    parser.add_argument("--keep", action="store_true", help="keep the random checkpoint for the next time")
    parser.add_argument("--no-peft", action="store_true", help="leave out the packaged base")
    parser.add_argument("--worker", nargs=4, metavar=("WHO", "BASE", "ADAPTER", "OUT"), help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, default=common.RESULTS)
    return parser.parse_args()


def write_adapter(base: Path, folder: Path) -> None:
    """A PEFT folder with random factors on every linear layer of ``base``."""
    import torch
    from safetensors.torch import save_file

    from tunegate.adapter.files import CONFIG, TENSORS, tensor_name
    from tunegate.adapter.inject import find_targets
    from tunegate.adapter.layers import features
    from tunegate.adapter.spec import AdapterSpec
    from tunegate.model.loading import empty_model

    folder.mkdir(parents=True, exist_ok=True)
    generator, tensors = torch.Generator().manual_seed(0), {}
    for path, layer in find_targets(empty_model(base), AdapterSpec(RANK, 32.0))[0].items():
        sizes = features(layer)
        assert sizes is not None
        tensors[tensor_name(path, "lora_A")] = 0.05 * torch.randn(RANK, sizes[0], generator=generator)
        tensors[tensor_name(path, "lora_B")] = 0.05 * torch.randn(sizes[1], RANK, generator=generator)
    save_file(tensors, folder / TENSORS, metadata={"format": "pt"})
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": 32}
    config |= {"target_modules": "all-linear", "base_model_name_or_path": str(base)}
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")


def copy_seconds(base: Path, out: Path) -> float:
    """A plain copy of the shards, each flushed to the disk."""
    big_model.drop_from_cache(base)
    out.mkdir()
    buffer, began = memoryview(bytearray(CHUNK)), time.perf_counter()
    for path in sorted(base.glob("*.safetensors")):
        with path.open("rb", buffering=0) as source, (out / path.name).open("wb", buffering=0) as target:
            while got := source.readinto(buffer):
                target.write(buffer[:got])
            os.fsync(target.fileno())
    seconds = time.perf_counter() - began
    shutil.rmtree(out)
    return seconds


def work(who: str, base: Path, adapter: Path, out: Path) -> dict[str, Any]:
    """One merge in this process."""
    began = time.perf_counter()
    if who == "tunegate":
        from tunegate.export.deltas import Mix
        from tunegate.export.merge import finish, write_merged
        from tunegate.export.plan import plan_merge

        plan = plan_merge(base, [adapter], out, Mix("linear", (1.0,)))
        ready = time.perf_counter()
        done = write_merged(plan)
        finish(plan, {})
        largest = max(e.end - e.start for entries in plan.files.values() for e in entries)
        more = {"prepared": ready - began, "changed": done.changed, "largest_tensor": largest}
    else:
        import torch
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
        PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out)
        for path in out.glob("*.safetensors"):  # as our shards are
            with path.open("rb") as handle:
                os.fsync(handle.fileno())
        more = {}
    return {"seconds": time.perf_counter() - began, "peak_rss": common.resident(what="VmHWM"), **more}


def measure(who: str, base: Path, adapter: Path, out: Path, folder: Path) -> dict[str, Any]:
    big_model.drop_from_cache(base)
    command = [sys.executable, __file__, "--folder", str(folder), "--worker", who, str(base), str(adapter), str(out)]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    shutil.rmtree(out, ignore_errors=True)
    if ran.returncode:
        raise SystemExit(f"{who} failed:\n{ran.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    print(f"{who:<10} {found['seconds']:8.2f} s  peak {found['peak_rss'] / 1e9:6.2f} GB", flush=True)
    return found


def large(folder: Path, shape: str) -> dict[str, Any]:
    base, adapter, out = folder / shape, folder / f"{shape}-adapter", folder / "out"
    big_model.SHAPES[shape] = SHAPES[shape]
    if not (base / "config.json").exists():
        big_model.write_checkpoint(base, shape)
    write_adapter(base, adapter)
    size = sum(p.stat().st_size for p in base.glob("*.safetensors"))
    copied = copy_seconds(base, out)
    print(f"{shape}: {size / 1e9:.2f} GB, a plain copy takes {copied:.2f} s")
    found = measure("tunegate", base, adapter, out, folder)
    bound = 2 * found["largest_tensor"] + 300e6
    writing = found["seconds"] - found["prepared"]
    return {
        "shape": shape, "bytes": size, "copy_seconds": copied, **found, "mb_per_second": size / writing / 1e6,
        "share_of_disk_speed": copied / writing, "peak_over_bound": found["peak_rss"] / bound,
    }  # fmt: skip


def packaged(folder: Path, rounds: int) -> dict[str, Any]:
    """Seconds and peak memory of both, with their range over the rounds."""
    from tunegate.model.packaged import packaged_base

    base, adapter, out = packaged_base(), folder / "packaged-adapter", folder / "out"
    write_adapter(base, adapter)
    runs: dict[str, list[dict[str, Any]]] = {"tunegate": [], "peft": []}
    for _ in range(rounds):
        for who, found in runs.items():
            found.append(measure(who, base, adapter, out, folder))
    return {
        who: {key: common.summary([one[key] for one in found]) for key in ("seconds", "peak_rss")}
        for who, found in runs.items()
    }


def of_large(found: dict[str, Any]) -> list[list[str]]:
    return [
        ["checkpoint, bf16", f"{found['bytes'] / 1e9:.2f} GB"],
        ["merge", f"{found['seconds']:.1f} s, of it {found['prepared']:.1f} s before the first byte"],
        ["read and written, of each", f"{found['mb_per_second']:.0f} MB/s"],
        ["share of a plain copy's speed", f"{found['share_of_disk_speed']:.0%}"],
        ["peak RSS", f"{found['peak_rss'] / 1e9:.2f} GB"],
        ["that over twice the largest tensor and 300 MB", f"{found['peak_over_bound']:.2f}"],
    ]


def of_packaged(both: dict[str, Any]) -> list[list[str]]:
    return [
        [f"packaged base, {who}", f"{common.spread(m['seconds'], 2)} s, {m['peak_rss']['median'] / 1e9:.2f} GB"]
        for who, m in both.items()
    ]


def main() -> None:
    given = arguments()
    if given.worker:
        who, *paths = given.worker
        print(json.dumps(work(who, *map(Path, paths))))
        return
    given.folder.mkdir(parents=True, exist_ok=True)
    machine = common.machine()
    found = None if given.quick else large(given.folder, given.shape)
    both = None if given.no_peft else packaged(given.folder, given.rounds)
    if not given.keep:
        shutil.rmtree(given.folder)
    line: dict[str, Any] = {}
    if found is not None:
        keys = ("shape", "seconds", "mb_per_second", "share_of_disk_speed", "peak_rss", "peak_over_bound")
        line |= {key: found[key] for key in keys}
    if both is not None:
        for name, key in (("time_vs_peft", "seconds"), ("memory_vs_peft", "peak_rss")):
            line[name] = common.ratio(both["tunegate"][key]["median"], both["peft"][key]["median"])
    rows = (of_large(found) if found else []) + (of_packaged(both) if both else [])
    name, what = ("merge-quick", "the packaged base") if found is None else (f"merge-{given.shape}", given.shape)
    text = [f"# Merging, {what}", common.describe(machine), common.table(["", ""], rows)]
    common.write(name, {"machine": machine, "merge": found, "packaged": both}, "\n\n".join(text), given.output)
    print(json.dumps(line))


if __name__ == "__main__":
    main()
