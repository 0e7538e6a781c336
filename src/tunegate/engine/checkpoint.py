"""Checkpoints that are whole or absent.

A checkpoint is a folder built under a temporary name, flushed, and renamed: adapter and optimizer tensors as
safetensors, the training state as JSON, and a manifest with the hash of each file. Reading verifies the hashes and
takes the newest checkpoint that is whole. The two newest are kept. Together with the stateless parts of a run
(row order, learning rate and dropout seeds are functions of seed and step) it restores a run exactly.

It does not store the base, the data or the configuration; the run's key ties it to them.
"""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tunegate.engine.optimizers import restore_state, state_tensors
from tunegate.files import (
    TEMPORARY_PREFIX,
    atomic_path,
    explain_os_error,
    flush_path,
    hash_file,
    read_json,
    write_json,
)

KEPT = 2
FILES = ("adapter.safetensors", "optimizer.safetensors", "state.json")


@dataclass
class TrainState:
    """Where a run stands after ``step`` optimizer steps. Times are seconds spent in steps, evaluations excluded."""

    step: int = 0
    best_step: int = -1
    best_score: float | None = None
    without_gain: int = 0
    evaluated: int = -1  # step of the last evaluation
    stopped_early: bool = False
    tokens: int = 0
    computed_tokens: int = 0
    target_tokens: int = 0
    seconds: float = 0.0
    evaluations: list[dict[str, Any]] = field(default_factory=list)


def save_checkpoint(
    folder: Path, key: str, state: TrainState, parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> None:
    """Publish ``folder/step-N``. Older checkpoints beyond the newest two go, and so do those of later steps: they
    are damaged or another run's, or this run would have gone on from them."""
    target = folder / f"step-{state.step:08d}"
    with explain_os_error(folder):
        folder.mkdir(parents=True, exist_ok=True)
        building = Path(tempfile.mkdtemp(prefix=TEMPORARY_PREFIX, dir=folder))
        try:
            save_tensors(building / FILES[0], {name: p.detach() for name, p in parameters.items()})
            save_tensors(building / FILES[1], state_tensors(parameters, optimizer))
            write_json(building / FILES[2], {"key": key, "state": asdict(state)})
            write_json(building / "manifest.json", {name: hash_file(building / name) for name in FILES})
            if target.exists():
                shutil.rmtree(target)
            building.rename(target)
            flush_path(folder)
        except BaseException:
            shutil.rmtree(building, ignore_errors=True)
            raise
    found = sorted(folder.glob("step-*"))
    here = found.index(target) + 1
    for old in (*found[:here][:-KEPT], *found[here:]):
        shutil.rmtree(old, ignore_errors=True)


def save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """``tensors`` at ``path``, flushed to disk. They are written from where they lie: a file's bytes are never held."""
    with atomic_path(path) as temporary:
        save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, temporary)


def find_checkpoint(folder: Path, key: str) -> Path | None:
    """The newest whole checkpoint of the run ``key``; damaged or foreign ones are passed over."""
    for candidate in sorted(folder.glob("step-*"), reverse=True):
        try:
            manifest = read_json(candidate / "manifest.json")
            whole = all(hash_file(candidate / name) == manifest[name] for name in FILES)
            if whole and read_json(candidate / "state.json")["key"] == key:
                return candidate
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return None


def load_checkpoint(path: Path, parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> TrainState:
    """Put adapter and optimizer back as they were; returns the state."""
    load_parameters(parameters, load_file(path / FILES[0]))
    restore_state(parameters, optimizer, load_file(path / FILES[1]))
    return TrainState(**read_json(path / FILES[2])["state"])


@torch.no_grad()
def load_parameters(parameters: dict[str, nn.Parameter], tensors: dict[str, Tensor]) -> None:
    if set(parameters) != set(tensors):
        raise ValueError("checkpoint and adapter have different parameters")
    for name, parameter in parameters.items():
        parameter.copy_(tensors[name])
