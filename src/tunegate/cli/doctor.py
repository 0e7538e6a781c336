"""``tunegate doctor``: what this machine and this install run, and why.

It measures nothing and changes nothing.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import sys
from pathlib import Path
from typing import Any

from rich.markup import escape

import tunegate
from tunegate.cli.console import Console

LIBRARIES = ("torch", "transformers", "tokenizers", "safetensors")
OPTIONAL = ("peft", "trl", "unsloth", "bitsandbytes", "liger-kernel", "flash-attn")


def doctor(_arguments: argparse.Namespace, console: Console) -> int:
    found = inspect()
    kernels, optional = found["kernels"], found["optional"].items()
    lines = [
        f"tunegate  {found['tunegate']}, Python {found['python']}, {found['system']}",
        f"cpu       {found['cpu']}, {found['threads']} threads, {found['memory_gib']} GiB",
        f"kernels   {kernels['level']} ({kernels['reason']})",
        f"numbers   {found['compute_dtype']['choice']} ({found['compute_dtype']['reason']})",
        f"gpu       {found['gpu'] or 'none that torch sees'}",
        *(f"  {name:8}{how}" for name, how in found["gpu_kernels"].items()),
        f"libraries {', '.join(f'{name} {version}' for name, version in found['libraries'].items())}",
        f"optional  {', '.join(f'{name} {version}' if version else f'no {name}' for name, version in optional)}",
    ]
    console.text("\n".join(escape(line) for line in lines))
    console.result(found)
    return 0


def inspect() -> dict[str, Any]:
    """Everything ``doctor`` prints, JSON-able."""
    import torch

    from tunegate.kernels import gpu, native
    from tunegate.model.loading import choose_dtype

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype, why = choose_dtype("auto", device=device)
    library = native.library()
    level, reason = native.describe()
    return {
        "tunegate": tunegate.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "kernels": {
            "level": level,
            "reason": reason,
            "runnable": library.levels_here().split(",") if library is not None else [],
        },
        "compute_dtype": {"choice": str(dtype).removeprefix("torch."), "reason": why},
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
        "gpu_kernels": gpu.describe() if device == "cuda" else {},
        "libraries": {name: _version(name) or "missing" for name in LIBRARIES},
        "optional": {name: _version(name) for name in OPTIONAL},
    }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
