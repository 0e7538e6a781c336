"""A merge, checked before a byte is written: what to read, what to add, where to.

The adapters are checked against the architecture (on the meta device, without weights), every tensor of every shard
against its file's header, every adapted module against the checkpoint, and the room on the disk against what will be
written. All that is wrong is told together.

It reads no weights: ``stream`` does.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunegate.adapter.files import adapter_hash, checked_state, tensor_name
from tunegate.adapter.inject import find_targets
from tunegate.adapter.layers import is_conv1d
from tunegate.errors import InputError, Problem, nearest
from tunegate.export.deltas import METHODS, Mix, Update
from tunegate.files import hash_json, links_out, partial_of
from tunegate.model.loading import empty_model
from tunegate.model.shards import DTYPES
from tunegate.model.streaming import checkpoint_names, is_quantized, quantizable
from tunegate.model.weights import TensorEntry, tensors_of


@dataclass(frozen=True)
class Plan:
    """A merge, checked: what to read, what to add, where to."""

    base: Path
    out: Path
    config: Any
    files: dict[Path, list[TensorEntry]]
    names: dict[str, str]  # checkpoint name -> the model's name of the parameter
    paths: dict[str, str]  # checkpoint name -> module path of an adapted weight
    transposed: frozenset[str]  # module paths whose weight is stored (in, out)
    updates: dict[str, list[Update | None]]
    mix: Mix
    recipe: Mapping[str, Any] | None
    seen: frozenset[str]  # checkpoint names of the weights that ``recipe`` quantized, adapted or not
    key: str

    @property
    def partial(self) -> Path:
        return partial_of(self.out)


def plan_merge(
    base: Path, adapters: Sequence[Path], out: Path, mix: Mix, *, recipe: Mapping[str, Any] | None = None,
    checkpoint: bool = True,
) -> Plan:  # fmt: skip
    """Check everything that can be wrong before a byte is written: adapters against the architecture, tensor names,
    dtypes, room on the disk. ``recipe`` is the quantization the adapters were trained on, None for none. Without
    ``checkpoint`` the base's files are not written anew, and no room is asked for.
    """
    problems = _mix_problems(mix, len(adapters))
    what, fix = "a link leads out of the base's folder", "copy the file itself into the folder"
    problems += [Problem(what, str(link), fix=fix) for link in links_out(base)]
    if out.exists() or out.is_symlink():
        problems.append(Problem("the output exists", str(out), fix="name another folder, or remove it"))
    if partial_of(out).is_symlink():  # its content would be removed, wherever it points
        problems.append(Problem("a link stands where the output grows", str(partial_of(out)), fix="remove it"))
    if not problems and is_quantized(base):
        fix = "name the 16-bit original: --base, with --allow-base-mismatch, which is recorded"
        what = "the base is stored quantized, and nothing is merged into the grid of its codes"
        problems.append(Problem(what, str(base), fix=fix))
    if problems:
        raise InputError(problems)
    model = empty_model(base)
    updates: dict[str, list[Update | None]] = {}
    for number, folder in enumerate(adapters):
        spec, state = checked_state(model, folder)
        for path in find_targets(model, spec, strict=False)[0]:
            parts = [state.get(tensor_name(path, name)) for name in ("lora_A", "lora_B", "lora_magnitude_vector")]
            a, b, magnitude = parts
            assert a is not None and b is not None
            updates.setdefault(path, [None] * len(adapters))[number] = Update(a, b, spec.scale_for(path), magnitude)
    files = tensors_of(base)
    names = checkpoint_names(base, model, files)
    paths = {name: key.removesuffix(".weight") for name, key in names.items() if key.removesuffix(".weight") in updates}
    problems = _source_problems(files, paths, updates, base)
    transposed = frozenset(p for p in updates if is_conv1d(model.get_submodule(p)))
    hashes = [adapter_hash(folder) for folder in adapters]
    stamps = {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in files}
    seen: frozenset[str] = frozenset()
    if recipe is not None:
        quantized = {f"{path}.weight" for path in quantizable(model, tuple(recipe["keep"]))}
        seen = frozenset(name for name, key in names.items() if key in quantized)
    key = hash_json([hashes, mix.method, list(mix.weights), mix.density, mix.seed, recipe and dict(recipe), stamps])
    plan = Plan(base, out, model.config, files, names, paths, transposed, updates, mix, recipe, seen, key)
    if checkpoint:
        done = sum(p.stat().st_size for p in plan.partial.glob("*.safetensors")) if plan.partial.is_dir() else 0
        problems += room_problems(out, sum(path.stat().st_size for path in files), done)
    if problems:
        raise InputError(problems)
    return plan


def _mix_problems(mix: Mix, count: int) -> list[Problem]:
    problems = []
    if mix.method not in METHODS:
        fix = nearest(mix.method, METHODS)
        problems.append(
            Problem("unknown way to combine adapters", "--method", ", ".join(METHODS), repr(mix.method), fix)
        )
    if len(mix.weights) != count or not count:
        problems.append(Problem("one weight for each adapter", "--weights", f"{count}", f"{len(mix.weights)}"))
    if not all(map(math.isfinite, mix.weights)) or not any(mix.weights):
        got = ", ".join(f"{weight:g}" for weight in mix.weights)
        problems.append(Problem("nothing can be merged with these weights", "--weights", "numbers, not all 0", got))
    if not 0 < mix.density <= 1:
        problems.append(Problem("not a share", "--density", "above 0, at most 1", f"{mix.density:g}"))
    elif mix.method == "linear" and mix.density < 1:
        what, fix = "linear keeps every value", f"--method {' or '.join(METHODS[1:])}"
        problems.append(Problem(what, "--density", "1", f"{mix.density:g}", fix))
    return problems


def _source_problems(
    files: Mapping[Path, list[TensorEntry]], paths: Mapping[str, str], updates: Mapping[str, Any], base: Path
) -> list[Problem]:
    problems = []
    absent = sorted(set(updates) - set(paths.values()))
    if absent:
        problems.append(
            Problem(
                "adapted modules have no weight of their own in the base's files",
                str(base),
                got=", ".join(absent[:5]) + (" ..." if len(absent) > 5 else ""),
                fix="a quantized base cannot be merged into: merge into the 16-bit original",
            )
        )
    for path, entries in files.items():
        problems += [
            Problem("an adapted weight has a dtype that is not merged", f"{path}: {e.name}", ", ".join(DTYPES), e.dtype)
            for e in entries
            if e.name in paths and e.dtype not in DTYPES
        ]
    return problems


def room_problems(out: Path, needed: int, done: int = 0) -> list[Problem]:
    """A problem if ``needed`` bytes, of which ``done`` lie there already, do not fit where ``out`` goes."""
    folder = out.absolute().parent
    while not folder.exists():
        folder = folder.parent
    needed, free = int(needed * 1.02), shutil.disk_usage(folder).free + done
    if free > needed:
        return []
    what, fix = "not enough room on the disk", "free some space, or name a folder on another disk"
    return [Problem(what, str(folder), f"{needed / 1e6:,.1f} MB", f"{free / 1e6:,.1f} MB free", fix)]
