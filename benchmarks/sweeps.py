"""Sweeps of the training benchmark: one setting at a time, a few contestants, few steps each.

Each writes ``train-NAME.json`` and ``.md``. A cell that needs more than 80 % of the memory, or cannot be run, says so.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import common
import contestants
import rows
from common import Skipped
from contestants import Contestant

SWEEPS = {
    "lengths": "rows of 64 to 4096 tokens",
    "ranks": "LoRA ranks 4 to 128",
    "threads": "1 thread to all cores",
    "sizes": "random-weight bases of 0.5, 1 and 3 B parameters",
    "dora": "LoRA against DoRA",
    "checkpointing": "gradient checkpointing",
    "breakdown": "where the time of tunegate's step goes",
}
STEPS = (5, 2)
LENGTHS = (64, 128, 256, 512, 1024, 2048, 4096)
RANKS = (4, 8, 16, 32, 64, 128)
SHAPES: dict[str, dict[str, Any]] = {
    "0.5B": {"model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
             "num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True},
    "1B": {"model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
           "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": True},
    "3B": {"model_type": "llama", "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28,
           "num_attention_heads": 24, "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": True},
}  # fmt: skip

Cell = tuple[str, dict[str, Any]]


def run(
    name: str, spec: dict[str, Any], folder: Path, output: Path, machine: dict[str, Any], only: list[str] | None = None,
    steps: int | None = None,
) -> None:  # fmt: skip
    """Measure every cell of sweep ``name`` and write it; ``only``: contestants by the start of their names; ``steps``:
    timed steps of a cell, for everyone."""
    if name == "breakdown":
        _breakdown(spec, output, machine)
        return
    makers: dict[str, Callable[[dict[str, Any], Path], Iterator[Cell]]] = {
        "lengths": _lengths, "ranks": _ranks, "threads": _threads, "sizes": _sizes, "dora": _methods,
        "checkpointing": _checkpointing,
    }  # fmt: skip
    found = []
    for label, cell in makers[name](spec, folder):
        for contestant in (c for c in _few() if not only or any(c.name.startswith(o) for o in only)):
            found.append(_cell(label, contestant, cell, (steps, steps) if steps else STEPS))
    for one in found:
        first = next((c["speed"] for c in found if c["name"] == one["name"] and "speed" in c), None)
        ours = next((c["speed"] for c in found if c["cell"] == one["cell"] and "speed" in c), None)
        if first and ours and one.get("speed"):
            one["slower"], one["ours"] = round(first / one["speed"], 3), round(ours / one["speed"], 2)
    lines = [
        [c["cell"], c["name"], c.get("speed"), c.get("ours"), c.get("slower"), c.get("rss_gb"), c.get("skipped")]
        for c in found
    ]
    header = [name, "", "real tokens/s", "tunegate / it", "time over the first row's", "peak RSS, GB", "skipped"]
    text = f"# Training: {SWEEPS[name]}\n\n{common.describe(machine)}\n\n{common.table(header, lines)}"
    common.write(f"train-{name}", {"machine": machine, "cells": found}, text, output)


def _few() -> list[Contestant]:
    """tunegate, its NF4, and the tuned PEFT loop (the plain one without tcmalloc)."""
    everyone = {c.name: c for c in contestants.catalogue()}
    peft = [c for name, c in everyone.items() if name.startswith(("PEFT float", "PEFT bfloat")) and c.quick]
    peft = [c for c in peft if not c.why_not()][-1:]
    return [everyone["tunegate"], *(c for c in [everyone["tunegate nf4"]] if not c.why_not()), *peft]


def _cell(label: str, contestant: Contestant, spec: dict[str, Any], steps: tuple[int, int]) -> dict[str, Any]:
    found: dict[str, Any] = {"cell": label, "name": contestant.name}
    try:
        done = contestants.measure(contestant, spec, steps)
        found |= {
            "speed": round(sum(done["tokens"]) / sum(done["seconds"]), 1),
            "rss_gb": round(done["rss"] / 2**30, 2),
        }
        found["run"] = done
    except Skipped as error:
        found["skipped"] = str(error)
    print(f"{label}, {contestant.name}: {found.get('speed') or found['skipped']}", flush=True)
    return found


def _changed(spec: dict[str, Any], **train: Any) -> dict[str, Any]:
    return {**spec, "train": {**spec["train"], **train}}


def _lengths(spec: dict[str, Any], folder: Path) -> Iterator[Cell]:
    for length in LENGTHS:
        step = max(spec["train"]["tokens_per_step"], length)
        made = rows.of_length(length, max(6, 6 * step // length), seed=0)
        path = rows.save(made, folder / f"rows-{length}.json")
        yield str(length), {**_changed(spec, tokens_per_step=step), "rows": path}


def _ranks(spec: dict[str, Any], _folder: Path) -> Iterator[Cell]:
    for rank in RANKS:
        yield str(rank), _changed(spec, rank=rank, alpha=2.0 * rank)


def _threads(spec: dict[str, Any], _folder: Path) -> Iterator[Cell]:
    cores = common.machine()["cores"] or os.cpu_count() or 1
    counts = sorted({n for n in (1, 2, 4, 8, 16, 32, 64) if n <= cores} | {cores})
    for count in counts:
        yield str(count), {**spec, "threads": count}


def _methods(spec: dict[str, Any], _folder: Path) -> Iterator[Cell]:
    for method in ("lora", "dora"):
        yield method, _changed(spec, method=method)


def _checkpointing(spec: dict[str, Any], _folder: Path) -> Iterator[Cell]:
    layers = json.loads((Path(spec["base"]) / "config.json").read_text(encoding="utf-8"))["num_hidden_layers"]
    for label, layers_again in (("off", False), ("half of the layers", layers // 2), ("on", True)):
        yield label, _changed(spec, gradient_checkpointing=layers_again)


def _sizes(spec: dict[str, Any], folder: Path) -> Iterator[Cell]:
    yield "135M (real)", spec
    for name, shape in SHAPES.items():
        need = (2 if common.has_bf16() else 4) * _parameters(shape)
        if need > common.MEMORY_SHARE * common.memory_bytes():
            print(f"{name}: skipped, its weights alone take {need / 2**30:.1f} GB", flush=True)
            continue
        yield name, {**spec, "base": str(random_base(folder / name, shape, Path(spec["base"])))}


def _parameters(shape: dict[str, Any]) -> int:
    wide, deep, inner = shape["hidden_size"], shape["num_hidden_layers"], shape["intermediate_size"]
    share = shape["num_key_value_heads"] / shape["num_attention_heads"]
    return int(deep * wide * (wide * (2 + 2 * share) + 3 * inner) + shape["vocab_size"] * wide)


def random_base(folder: Path, shape: dict[str, Any], like: Path) -> Path:
    """A base of random bf16 weights in ``folder``, with the tokenizer of ``like``; made in a process of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    given = {**shape, "max_position_embeddings": 8192, "torch_dtype": "bfloat16"}
    code = (
        "import json, sys, torch\n"
        "from transformers import AutoConfig, AutoModelForCausalLM\n"
        "given = json.loads(sys.argv[1]); kind = given.pop('model_type')\n"
        "config = AutoConfig.for_model(kind, **given)\n"
        "torch.set_default_dtype(torch.bfloat16)\n"
        "model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)\n"
        "model.save_pretrained(sys.argv[2])\n"
    )
    import shutil
    import subprocess
    import sys

    subprocess.run([sys.executable, "-W", "ignore", "-c", code, json.dumps(given), str(folder)], check=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"):
        if (like / name).exists():
            shutil.copy(like / name, folder / name)
    return folder


def _breakdown(spec: dict[str, Any], output: Path, machine: dict[str, Any]) -> None:
    ours = contestants.catalogue()[0]
    found: dict[str, Any] = {}
    for method in ("lora", "dora"):
        train = {**spec["train"], **ours.train, "method": method}
        try:
            found[method] = common.run_worker({**spec, **ours.spec, "kind": "breakdown", "steps": 3, "train": train})
        except Skipped as error:
            print(f"breakdown: skipped, {error}", flush=True)
            return
    by_name = {method: {e["name"]: e for e in one["kernels"]} for method, one in found.items()}
    lines = [
        [
            name,
            *(
                f"{e['ms']:,.0f} ({e['ms'] / found[method]['step_ms']:.1%})" if (e := by_name[method].get(name)) else ""
                for method in found
            ),
            round(one["calls"]) if one["calls"] else "",
        ]
        for name, one in by_name["dora"].items()
        if one["ms"] >= 0.5
    ]
    lines.append(["a step", *(f"{one['step_ms']:,.0f}" for one in found.values()), ""])
    text = (
        f"# Where a step's time goes\n\n{common.describe(machine)}\n\n"
        f"Milliseconds a step in each compiled kernel, by a clock around its calls; below half a millisecond "
        f"left out.\n\n{common.table(['kernel', 'LoRA', 'DoRA', 'calls a step (DoRA)'], lines)}"
    )
    common.write("train-breakdown", {"machine": machine, **found}, text, output)
    print(text, flush=True)
