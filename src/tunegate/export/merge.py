"""``W + delta`` for every adapted matrix, streamed from the base's shards into shards of the same layout.

One tensor is at work while the next one is read; the sum is formed in fp32, a few rows at a time where only one adapter
is merged, and stored in the base's dtype. For an adapter that was trained on an NF4 base, W is what that base computed
with, ``dequantize(quantize(W))``, unless the original is asked for; the result is never quantized again.

The output grows in a ``.partial`` folder beside its name: a finished shard is recorded there with its hash, so a merge
that was cut off goes on with the next shard. ``finish`` publishes the folder by a rename; the caller checks parity
before that. Every adapted tensor must have changed.

It does not load the model or judge the result: ``parity`` does.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tunegate.adapter.files import adapter_hash, checked_state, tensor_name
from tunegate.adapter.inject import find_targets
from tunegate.adapter.layers import is_conv1d
from tunegate.errors import InputError, Problem, TunegateError, nearest
from tunegate.export.deltas import METHODS, Mix, Update, combined, delta
from tunegate.files import explain_os_error, flush_folder, hash_file, hash_json, read_json, write_json
from tunegate.kernels.formats import Recipe
from tunegate.kernels.nf4 import dequantize, quantize
from tunegate.model.shards import DTYPES, ShardWriter, fill, size_of
from tunegate.model.streaming import checkpoint_names, is_quantized, on_meta, quantizable
from tunegate.model.weights import INDEX_FILE, TensorEntry, tensors_of

PROGRESS = "merge-progress.json"
REPORT = "merge.json"
_COPIED = (".json", ".jinja", ".model", ".txt", ".tiktoken", ".md")
_NOT_COPIED = {INDEX_FILE, "quantize_config.json"}
_CHUNK_ELEMENTS = 1 << 24  # 64 MiB of fp32 at a time


@dataclass(frozen=True)
class Merged:
    """What a merge did. ``changed`` counts tensors that differ from the base's; ``modules`` those that should."""

    folder: Path
    changed: int
    modules: int
    bytes: int


@dataclass(frozen=True)
class Plan:
    """A merge, checked: what to read, what to add, where to."""

    base: Path
    out: Path
    files: dict[Path, list[TensorEntry]]
    paths: dict[str, str]  # checkpoint name -> module path of an adapted weight
    transposed: frozenset[str]  # module paths whose weight is stored (in, out)
    updates: dict[str, list[Update | None]]
    mix: Mix
    recipe: Mapping[str, Any] | None
    seen: frozenset[str]  # checkpoint names of the weights that ``recipe`` quantized, adapted or not
    key: str

    @property
    def partial(self) -> Path:
        return self.out.with_name(f".{self.out.name}.partial")


def plan_merge(
    base: Path, adapters: Sequence[Path], out: Path, mix: Mix, *, recipe: Mapping[str, Any] | None = None,
    trust_remote_code: bool = False,
) -> Plan:  # fmt: skip
    """Check everything that can be wrong before a byte is written: adapters against the architecture, tensor names,
    dtypes, room on the disk. ``recipe`` is the quantization the adapters were trained on, None for none.
    """
    from transformers import AutoConfig

    problems = _mix_problems(mix, len(adapters))
    if out.exists():
        problems.append(Problem("the output exists", str(out), fix="name another folder, or remove it"))
    if not problems and is_quantized(base):
        fix = "name the 16-bit original: --base, with --allow-base-mismatch, which is recorded"
        what = "the base is stored in 4 bits, and nothing is merged into a 4-bit grid"
        problems.append(Problem(what, str(base), fix=fix))
    if problems:
        raise InputError(problems)
    config = AutoConfig.from_pretrained(base, local_files_only=True, trust_remote_code=trust_remote_code)
    model = on_meta(config, torch.float32, trust_remote_code)
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
    sizes = {path.name: [e.name for e in entries] for path, entries in files.items()}
    seen: frozenset[str] = frozenset()
    if recipe is not None:
        quantized = {f"{path}.weight" for path in quantizable(model, tuple(recipe["keep"]))}  # a stored one has no keep
        seen = frozenset(name for name, key in names.items() if key in quantized)
    key = hash_json([hashes, mix.method, list(mix.weights), mix.density, mix.seed, recipe and dict(recipe), sizes])
    plan = Plan(base, out, files, paths, transposed, updates, mix, recipe, seen, key)
    problems += _disk_problems(plan)
    if problems:
        raise InputError(problems)
    return plan


def _mix_problems(mix: Mix, count: int) -> list[Problem]:
    problems = []
    if mix.method not in METHODS:
        fix = nearest(mix.method, METHODS)
        problems.append(Problem("unknown way to combine adapters", "method", ", ".join(METHODS), repr(mix.method), fix))
    if len(mix.weights) != count or not count:
        problems.append(Problem("one weight for each adapter", "weights", f"{count}", f"{len(mix.weights)}"))
    if not 0 < mix.density <= 1:
        problems.append(Problem("not a share", "density", "above 0, at most 1", f"{mix.density:g}"))
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


def _disk_problems(plan: Plan) -> list[Problem]:
    needed = sum(path.stat().st_size for path in plan.files)
    done = sum(p.stat().st_size for p in plan.partial.glob("*.safetensors")) if plan.partial.is_dir() else 0
    folder = plan.out.absolute().parent
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free + done
    if free > needed * 1.02:
        return []
    what, fix = "not enough room on the disk", "free some space, or name a folder on another disk"
    return [Problem(what, str(folder), f"{needed / 1e9:.1f} GB", f"{free / 1e9:.1f} GB free", fix)]


@torch.no_grad()
def write_merged(plan: Plan, progress: Callable[[int], None] = lambda _: None) -> Merged:
    """Write every shard and the files beside them into ``plan.partial``; shards already there are kept.

    ``progress`` is called with the bytes of each tensor. :class:`TunegateError` if an adapted tensor is unchanged.
    """
    partial = plan.partial
    with explain_os_error(plan.out):
        partial.mkdir(parents=True, exist_ok=True)
        known = _known(plan)
        for source, entries in plan.files.items():
            if source.name in known["shards"]:
                progress(sum(map(size_of, entries)))
                continue
            target = partial / source.name
            changed = _write_shard(plan, source, entries, target, progress)
            known["shards"][source.name] = {"hash": hash_file(target), "changed": changed}
            write_json(partial / PROGRESS, known)
        _copy_rest(plan)
    changed = sorted(name for shard in known["shards"].values() for name in shard["changed"])
    expected = {n for n, p in plan.paths.items() if any(u is not None and _acts(u) for u in plan.updates[p])}
    if set(changed) != expected:
        still = sorted(expected - set(changed))
        raise TunegateError(
            f"{len(still)} adapted tensors came out as they were in the base",
            where=str(partial),
            got=", ".join(still[:5]),
            fix="the change is smaller than the base's dtype can store: merge a base in fp32, or serve unmerged",
        )
    return Merged(partial, len(changed), len(plan.updates), sum(p.stat().st_size for p in plan.files))


def _acts(update: Update) -> bool:
    return update.magnitude is not None or bool(update.b.any())


def _known(plan: Plan) -> dict[str, Any]:
    """What an earlier attempt finished; nothing if it was another merge or a shard is damaged."""
    path = plan.partial / PROGRESS
    fresh: dict[str, Any] = {"key": plan.key, "shards": {}}
    try:
        found = read_json(path)
        if found["key"] != plan.key:
            raise ValueError("another merge")
        shards = {n: s for n, s in found["shards"].items() if hash_file(plan.partial / Path(n).name) == s["hash"]}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        for leftover in plan.partial.iterdir():
            shutil.rmtree(leftover) if leftover.is_dir() and not leftover.is_symlink() else leftover.unlink()
        return fresh
    return {"key": plan.key, "shards": shards}


def _write_shard(
    plan: Plan, source: Path, entries: list[TensorEntry], target: Path, progress: Callable[[int], None]
) -> list[str]:
    """Names of the tensors that changed."""
    changed = []
    ordered = sorted(entries, key=lambda e: e.start)
    with ShardWriter(target, ordered) as writer:
        for entry, data in _read_ahead(source, ordered):
            path = plan.paths.get(entry.name)
            if path is not None or entry.name in plan.seen:
                weight = data.view(DTYPES[entry.dtype]).view(entry.shape)
                if entry.name in plan.seen:
                    assert plan.recipe is not None
                    weight.copy_(dequantize(quantize(weight, Recipe.from_json(plan.recipe)), dtype=torch.float32))
                if path is not None and _add(plan, path, weight):
                    changed.append(entry.name)
            writer.write(entry.name, data)
            progress(size_of(entry))
    return changed


def _read_ahead(source: Path, entries: list[TensorEntry]) -> Iterator[tuple[TensorEntry, Tensor]]:
    """Each tensor's bytes, the next one being read while one is at work."""
    descriptor = os.open(source, os.O_RDONLY)

    def read(entry: TensorEntry) -> Tensor:
        buffer = torch.empty(size_of(entry), dtype=torch.uint8)
        fill(descriptor, entry, buffer, source)
        return buffer

    try:
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(read, entries[0]) if entries else None
            for number, entry in enumerate(entries):
                assert waiting is not None
                data = waiting.result()
                waiting = pool.submit(read, entries[number + 1]) if number + 1 < len(entries) else None
                yield entry, data
                del data  # before the next one's memory is asked for
    finally:
        os.close(descriptor)


def _add(plan: Plan, path: str, weight: Tensor) -> bool:
    """Add the adapters' change to ``weight`` in place; whether any stored value changed."""
    updates, matrix = plan.updates[path], weight.t() if path in plan.transposed else weight
    if len(updates) == 1 and plan.mix.method == "linear":
        (update,), changed = updates, False
        assert update is not None
        rows = max(1, _CHUNK_ELEMENTS // matrix.shape[1])
        for start in range(0, matrix.shape[0], rows):
            part = matrix[start : start + rows]
            magnitude = None if update.magnitude is None else update.magnitude[start : start + rows]
            own = part.float()
            step = delta(own, Update(update.a, update.b[start : start + rows], update.scale, magnitude))
            changed |= _store(part, own + plan.mix.weights[0] * step)
        return changed
    own = matrix.float()
    return _store(matrix, own + combined(own, updates, plan.mix, path))


def _store(target: Tensor, values: Tensor) -> bool:
    if not torch.isfinite(values).all():
        raise TunegateError("a merged weight is not finite", fix="check the adapter; `tunegate show` names its run")
    rounded = values.to(target.dtype)
    changed = not torch.equal(rounded, target)
    target.copy_(rounded)
    return changed


def _copy_rest(plan: Plan) -> None:
    """Config, tokenizer and templates; an index is written anew. Links and code are left behind."""
    for source in sorted(plan.base.iterdir()):
        wanted = source.suffix in _COPIED and source.name not in _NOT_COPIED
        if wanted and source.is_file() and source.resolve().suffix != ".py":
            shutil.copyfile(source, plan.partial / source.name)
    if len(plan.files) > 1 or any(path.name != "model.safetensors" for path in plan.files):
        weight_map = {e.name: path.name for path, entries in plan.files.items() for e in entries}
        total = sum(size_of(e) for entries in plan.files.values() for e in entries)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (plan.partial / INDEX_FILE).write_text(json.dumps(index, indent=2), encoding="utf-8")


def finish(plan: Plan, report: Mapping[str, Any]) -> Path:
    """Publish the folder under its name, with ``report`` inside."""
    with explain_os_error(plan.out):
        write_json(plan.partial / REPORT, dict(report))
        (plan.partial / PROGRESS).unlink(missing_ok=True)
        plan.partial.rename(plan.out)
        flush_folder(plan.out.absolute().parent)
    return plan.out


def discard(plan: Plan) -> None:
    shutil.rmtree(plan.partial, ignore_errors=True)
