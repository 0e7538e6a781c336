"""An adapter for mlx-lm: ``adapters.safetensors`` and ``adapter_config.json``, and both read back.

mlx-lm multiplies ``x @ lora_a @ lora_b`` by one scale, so its factors are PEFT's transposed: ``lora_a`` (in, r),
``lora_b`` (r, out), and for DoRA ``m`` (out,). One rank and one scale hold for all modules (``flat``). The config names
the adapted modules within a layer; a layer without one of them keeps mlx-lm's zero factor, which changes nothing.

Source: mlx-lm 0.32, ``tuner/lora.py``, ``tuner/dora.py``, ``tuner/utils.py``. It converts no base: mlx-lm reads the
same safetensors.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tunegate.adapter.files import tensor_name
from tunegate.adapter.spec import AdapterSpec
from tunegate.errors import InputError
from tunegate.export.flat import Flat
from tunegate.files import read_json, write_json

TENSORS, CONFIG = "adapters.safetensors", "adapter_config.json"
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3")  # same module names in mlx-lm
_IN_LAYER = re.compile(r"model\.layers\.\d+\.(.+)")
_PARTS = {"lora_A": "lora_a", "lora_B": "lora_b", "lora_magnitude_vector": "m"}


def check_family(config: Any) -> None:
    """:class:`InputError` for an architecture whose modules mlx-lm may name otherwise."""
    if config.model_type not in FAMILIES:
        what = "the modules of this architecture are not known to have the same names in mlx-lm"
        raise InputError(what, where=f"model_type {config.model_type!r}", expected=", ".join(FAMILIES))


def write_mlx(flat: Flat, config: Any, base_name: str, folder: Path) -> None:
    """Write both files."""
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    for path, factors in flat.modules.items():
        tensors[f"{path}.lora_a"] = factors.a.t().contiguous()
        tensors[f"{path}.lora_b"] = factors.b.t().contiguous()
        if factors.magnitude is not None:
            tensors[f"{path}.m"] = factors.magnitude
    dora = any(f.magnitude is not None for f in flat.modules.values())
    save_file(tensors, folder / TENSORS, metadata={"format": "mlx"})
    document = {
        "fine_tune_type": "dora" if dora else "lora",
        "lora_parameters": {"rank": flat.rank, "scale": flat.scale, "dropout": 0.0, "keys": _keys(list(flat.modules))},
        "model": base_name,
        "num_layers": config.num_hidden_layers,
    }
    write_json(folder / CONFIG, document)


def _keys(paths: Sequence[str]) -> list[str]:
    """What mlx-lm calls keys: names within a layer, and whole paths outside the layers."""
    inside = {path: _IN_LAYER.fullmatch(path) for path in paths}
    return sorted({match[1] if match else path for path, match in inside.items()})


def read_mlx(folder: Path) -> tuple[AdapterSpec, dict[str, Tensor]]:
    """The adapter that the two files describe, by mlx-lm's rules, as spec and PEFT tensors."""
    from safetensors.torch import load_file

    document, tensors = read_json(folder / CONFIG), load_file(folder / TENSORS)
    parameters, dora = document["lora_parameters"], document["fine_tune_type"] == "dora"
    paths = sorted(name.removesuffix(".lora_a") for name in tensors if name.endswith(".lora_a"))
    rank = int(parameters["rank"])
    spec = AdapterSpec(rank, float(parameters["scale"]) * rank, use_dora=dora, target_modules=tuple(paths))
    state: dict[str, Tensor] = {}
    for path in paths:
        for ours, theirs in _PARTS.items():
            if theirs != "m" or dora:
                found = tensors[f"{path}.{theirs}"]
                state[tensor_name(path, ours)] = (
                    (found.t() if found.ndim == 2 else found).to(torch.float32).contiguous()
                )
    return spec, state
