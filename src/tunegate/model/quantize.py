"""A checkpoint into one of 4 or 8 bits, tensor by tensor: what ``tunegate quantize`` does.

The architecture, built on the meta device, says which tensors are weights of linear layers; those become bitsandbytes'
parts (``bnb_files``), everything else is copied byte for byte. Sizes follow from shapes, so the shards are planned and
their headers written before the first tensor is read, and memory holds one tensor and its codes. The folder grows as
``.OUT.partial`` and gets its name when it is whole: there is no half-written OUT.

Kept as they are: norms, embeddings, the output head, tied weights, expert routers, and what the caller names. Blocks
of 4 bits run along the flat index, so no dimension has to divide by the block size. NaN and infinity are refused by
tensor.

It never loads the model, judges its answers (``benchmarks/quantization_error.py`` does) or quantizes twice.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tunegate import files
from tunegate.errors import InputError, Problem, TunegateError, collecting, nearest
from tunegate.kernels.formats import Recipe
from tunegate.kernels.linear import QuantizedWeight
from tunegate.kernels.nf4 import dequantize_rows, quantize
from tunegate.model import bnb_files
from tunegate.model.fingerprint import fingerprint_base
from tunegate.model.origin import MERGE, QUANTIZATION, origin_of
from tunegate.model.shards import DTYPES, ShardWriter, fill, size_of
from tunegate.model.streaming import checkpoint_names, on_meta, quantizable
from tunegate.model.weights import DTYPE_BITS, INDEX_FILE, SINGLE_FILE, TensorEntry, load_object, tensors_of

RECORD = QUANTIZATION
SHARD_BYTES = 5_000_000_000
_STATE_BYTES = 256  # room for the JSON beside each weight: the longest there is has about 200
_COPIED = (".json", ".jinja", ".model", ".txt", ".tiktoken")
_NOT_COPIED = {INDEX_FILE, RECORD, MERGE, "config.json", "quantize_config.json", "pytorch_model.bin.index.json"}
_ERROR_ROWS = 1 << 22  # elements at a time


@dataclass(frozen=True)
class Error:
    """How far a quantized tensor is from its original: root mean square error, ``|W - Q| / |W|``, and the cosine."""

    rmse: float
    relative: float
    cosine: float


@dataclass(frozen=True)
class _Item:
    """A tensor to read and what is written for it."""

    path: Path
    entry: TensorEntry
    writes: tuple[TensorEntry, ...]
    quantized: bool


@dataclass(frozen=True)
class Plan:
    """What will be written, checked. ``kept`` are paths of linear layers that stay as they are; ``shards`` hold the
    tensors of each output file in order."""

    base: Path
    out: Path
    recipe: Recipe
    shards: tuple[tuple[_Item, ...], ...]
    kept: tuple[str, ...]
    compute_dtype: torch.dtype

    @property
    def partial(self) -> Path:
        return files.partial_of(self.out)

    @property
    def items(self) -> list[_Item]:
        return [item for shard in self.shards for item in shard]

    def bytes_read(self) -> int:
        return sum(size_of(item.entry) for item in self.items)

    def bytes_written(self) -> int:
        return sum(size_of(entry) for item in self.items for entry in item.writes)

    def shard_name(self, number: int) -> str:
        count = len(self.shards)
        return SINGLE_FILE if count == 1 else f"model-{number + 1:05}-of-{count:05}.safetensors"


@dataclass(frozen=True)
class Done:
    """``errors``: checkpoint name -> format -> error, for the formats that were asked for."""

    folder: Path
    quantized: int
    copied: int
    bytes_before: int
    bytes_after: int
    errors: dict[str, dict[str, Error]] = field(default_factory=dict)


def plan_quantization(
    base: Path, out: Path, recipe: Recipe, *, skip: Iterable[str] = (), shard_bytes: int = SHARD_BYTES
) -> Plan:
    """Check everything that can be wrong before a byte is written. ``skip`` names further layers, or endings of their
    paths, to keep. :class:`InputError` with all problems found."""
    from transformers import AutoConfig

    found = tensors_of(base)
    config = load_object(base / "config.json")
    problems = _request_problems(out, recipe, shard_bytes)
    with collecting(problems):
        entries = [e for part in found.values() for e in part]
        if bnb_files.stored_quantization(config, entries, str(base)):
            problems.append(Problem("the base is quantized already", str(base), fix="use it as it is, or its original"))
    if problems:
        raise InputError(problems)
    model = on_meta(AutoConfig.from_pretrained(base, local_files_only=True), torch.float32, False)
    names = checkpoint_names(base, model, found)
    endings = tuple(skip)
    paths = quantizable(model, endings)
    problems = _model_problems(base, model, set(names.values())) + _skip_problems(model, endings)
    if not paths:
        what = f"{type(model).__name__} has no linear layer to quantize"
        problems.append(Problem(what, str(base), fix="transformers' Conv1D layers (GPT-2) are not quantized"))
    targets = {name for name, key in names.items() if key.endswith(".weight") and key[:-7] in paths}
    state = model.state_dict()
    for path, part in found.items():
        problems += [p for e in part if e.name in targets for p in _weight_problems(path, e, state[names[e.name]])]
    if problems:
        raise InputError(problems)
    linears = {path for path, module in model.named_modules() if type(module) is nn.Linear}
    dtypes = {e.dtype for e in entries if e.name in targets}
    compute = torch.float16 if dtypes == {"F16"} else torch.bfloat16 if dtypes == {"BF16"} else torch.float32
    shards = _shards(_items(found, targets, recipe), shard_bytes)
    plan = Plan(base, out, recipe, shards, tuple(sorted(linears - paths)), compute)
    _require_room(plan)
    return plan


def _request_problems(out: Path, recipe: Recipe, shard_bytes: int) -> list[Problem]:
    problems = []
    if out.exists() or out.is_symlink():
        problems.append(Problem("the output exists", str(out), fix="name another folder, or remove it"))
    if recipe.format not in bnb_files.STORED_FORMATS:
        formats = " or ".join(bnb_files.STORED_FORMATS)
        problems.append(Problem(f"{recipe.format} has no file format", "format", formats, recipe.format))
    if shard_bytes < 1_000_000:
        problems.append(Problem("the shards are too small", "--max-shard-size", "at least 1MB", f"{shard_bytes} bytes"))
    return problems


def _model_problems(base: Path, model: Any, present: set[str]) -> list[Problem]:
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    missing = sorted(name for name, _ in model.named_parameters() if name not in present and name not in tied)
    if not missing:
        return []
    fix = "the weights belong to another architecture or are not whole: fetch the base again"
    what = f"{len(missing)} tensors of the model are not in the weights"
    return [Problem(what, str(base), "every parameter of the architecture", ", ".join(missing[:5]), fix)]


def _skip_problems(model: Any, endings: Sequence[str]) -> list[Problem]:
    """A name that matches nothing is a spelling mistake."""
    paths = [path for path, module in model.named_modules() if type(module) is nn.Linear]
    last = sorted({path.rpartition(".")[2] for path in paths})
    return [
        Problem("no linear layer has this name", "--skip", "a layer's path or its ending", repr(e), nearest(e, last))
        for e in endings
        if not any(path == e or path.endswith(f".{e}") for path in paths)
    ]


def _weight_problems(path: Path, entry: TensorEntry, parameter: Tensor) -> list[Problem]:
    where = f"{path}: {entry.name}"
    if entry.shape != tuple(parameter.shape):
        what = "a tensor has another shape than config.json gives it"
        return [Problem(what, where, str(tuple(parameter.shape)), str(entry.shape))]
    if entry.dtype not in DTYPES:
        fix = "choose the base's 16-bit checkpoint; 8-bit weights need scales that are not read here"
        return [Problem("weights of this dtype cannot be quantized", where, ", ".join(DTYPES), entry.dtype, fix)]
    return []


def _items(found: Mapping[Path, Sequence[TensorEntry]], targets: set[str], recipe: Recipe) -> list[_Item]:
    items = []
    for path, entries in found.items():
        for entry in sorted(entries, key=lambda e: e.start):
            if entry.name in targets:
                shape = (entry.shape[0], entry.shape[1])
                writes = bnb_files.packed_entries(entry.name, shape, recipe, _STATE_BYTES)
                items.append(_Item(path, entry, tuple(writes), True))
            else:
                items.append(_Item(path, entry, (entry,), False))
    return items


def _shards(items: Sequence[_Item], most: int) -> tuple[tuple[_Item, ...], ...]:
    """Files of at most ``most`` bytes, unless one tensor is larger."""
    shards: list[list[_Item]] = [[]]
    size = 0
    for item in items:
        more = sum(size_of(e) for e in item.writes)
        if shards[-1] and size + more > most:
            shards.append([])
            size = 0
        shards[-1].append(item)
        size += more
    return tuple(map(tuple, shards))


def _require_room(plan: Plan) -> None:
    folder = plan.out.absolute().parent
    while not folder.exists():
        folder = folder.parent
    needed, free = plan.bytes_written(), shutil.disk_usage(folder).free
    if free < needed * 1.02:
        raise TunegateError(
            "not enough room on the disk", where=str(folder), expected=f"{needed / 1e9:.1f} GB",
            got=f"{free / 1e9:.1f} GB free", fix="free some space, or name a folder on another disk",
        )  # fmt: skip


@torch.no_grad()
def write_quantized(
    plan: Plan, *, name: str, compare: Sequence[str] = (), progress: Callable[[int], None] = lambda _: None
) -> Done:
    """Write the folder and publish it. ``name`` is what the record calls the base; ``compare`` are formats whose error
    is measured on every quantized tensor, with the plan's block size; ``progress`` gets the bytes read.

    :class:`InputError` names every tensor that holds NaN or infinity; then, as after any error, nothing is left.
    """
    errors: dict[str, dict[str, Error]] = {}
    with files.explain_os_error(plan.out), files.growing(plan.out) as partial:
        try:
            shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
            partial.mkdir(parents=True)
            problems: list[Problem] = []
            index: dict[str, str] = {}
            for number, shard in enumerate(plan.shards):
                target = partial / plan.shard_name(number)
                index |= {e.name: target.name for item in shard for e in item.writes}
                with collecting(problems):
                    _write_shard(shard, target, plan.recipe, compare, errors, progress)
            if problems:
                raise InputError(problems)
            _write_beside(plan, index, name)
            files.flush_path(partial)
            plan.out.parent.mkdir(parents=True, exist_ok=True)
            partial.rename(plan.out)
            files.flush_path(plan.out.parent)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    quantized = sum(item.quantized for item in plan.items)
    copied = len(plan.items) - quantized
    return Done(plan.out, quantized, copied, plan.bytes_read(), plan.bytes_written(), errors)


def _write_shard(
    shard: Sequence[_Item], target: Path, recipe: Recipe, compare: Sequence[str],
    errors: dict[str, dict[str, Error]], progress: Callable[[int], None],
) -> None:  # fmt: skip
    """One file. After a tensor that cannot be stored, the others are only looked at."""
    problems: list[Problem] = []
    entries = sorted((e for item in shard for e in item.writes), key=lambda e: -DTYPE_BITS[e.dtype])  # so all aligned
    with ShardWriter(target, entries) as writer:
        for item in shard:
            tensor = read_tensor(item.path, item.entry)
            found = _finite_problems(item, tensor)
            problems += found
            if not item.quantized and not problems:
                writer.write(item.entry.name, tensor)
            elif item.quantized and not found:
                weight = tensor.view(DTYPES[item.entry.dtype]).view(item.entry.shape)
                if not problems:
                    _write_weight(writer, item, quantize(weight, recipe))
                if compare:
                    errors[item.entry.name] = errors_of(weight, [_like(recipe, form) for form in compare])
            progress(size_of(item.entry))
        if problems:
            raise InputError(problems)


def _write_weight(writer: ShardWriter, item: _Item, made: QuantizedWeight) -> None:
    packed = bnb_files.pack(item.entry.name, made, state_bytes=size_of(item.writes[-1]))
    for entry in item.writes:
        writer.write(entry.name, packed[entry.name].contiguous())


def read_tensor(path: Path, entry: TensorEntry) -> Tensor:
    """The entry's bytes, (bytes,) uint8, read and not mapped."""
    buffer = torch.empty(size_of(entry), dtype=torch.uint8)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fill(descriptor, entry, buffer, path)
    finally:
        os.close(descriptor)
    return buffer


def _finite_problems(item: _Item, data: Tensor) -> list[Problem]:
    dtype = DTYPES.get(item.entry.dtype)
    if dtype is None or not data.numel():
        return []
    low, high = torch.aminmax(data.view(dtype))  # NaN goes through; no temporary of the tensor's size
    limit = torch.finfo(torch.float32).max if item.quantized else float("inf")
    if abs(low.item()) <= limit and abs(high.item()) <= limit and float("inf") not in (-low.item(), high.item()):
        return []
    got = "NaN" if low.isnan() else f"values from {low.item():g} to {high.item():g}"
    fix = "the checkpoint is damaged or its training diverged: fetch it again"
    return [Problem("a tensor holds numbers that are not finite", f"{item.path}: {item.entry.name}", got=got, fix=fix)]


def _like(recipe: Recipe, form: str) -> Recipe:
    same = recipe.code_bits == Recipe.of(form).code_bits
    return Recipe(form, recipe.block, recipe.double) if same else Recipe.of(form)


def errors_of(weight: Tensor, recipes: Iterable[Recipe]) -> dict[str, Error]:
    """Format -> the error of quantizing ``weight`` (n, k) so."""
    return {recipe.format: error_of(weight, quantize(weight, recipe)) for recipe in recipes}


@torch.no_grad()
def error_of(weight: Tensor, made: QuantizedWeight) -> Error:
    """The error of ``made`` against ``weight``, a few rows at a time; sums in fp64."""
    rows, columns = made.shape
    step = max(1, _ERROR_ROWS // max(1, columns))
    square = dot = original = restored = 0.0
    for start in range(0, rows, step):
        stop = min(rows, start + step)
        want = weight[start:stop].float()
        got = dequantize_rows(made, start, stop, torch.empty_like(want))
        original += _dot(want, want)
        restored += _dot(got, got)
        dot += _dot(want, got)
        square += _dot(got.sub_(want), got)
    n = max(1, rows * columns)
    relative = (square / original) ** 0.5 if original else 0.0
    cosine = dot / (original * restored) ** 0.5 if original and restored else 1.0
    return Error((square / n) ** 0.5, relative, cosine)


def mean_errors(errors: Mapping[str, Mapping[str, Error]]) -> dict[str, Error]:
    """Format -> the plain mean of each measure over tensors."""
    formats = list(next(iter(errors.values()), {}))
    found = {}
    for form in formats:
        rows = [row[form] for row in errors.values()]
        columns = zip(*((e.rmse, e.relative, e.cosine) for e in rows), strict=True)
        found[form] = Error(*(sum(column) / len(rows) for column in columns))
    return found


def _dot(a: Tensor, b: Tensor) -> float:
    return float(torch.sum(a * b, dtype=torch.float64))


def _write_beside(plan: Plan, index: Mapping[str, str], name: str) -> None:
    """Index, config, record, and the base's other files (tokenizer, template, licence)."""
    partial, base = plan.partial, plan.base
    if len(plan.shards) > 1:
        total = {"total_size": plan.bytes_written()}
        files.write_json(partial / INDEX_FILE, {"metadata": total, "weight_map": dict(sorted(index.items()))})
    config = load_object(base / "config.json")
    config["quantization_config"] = bnb_files.quantization_config(plan.recipe, plan.kept, plan.compute_dtype)
    files.write_json(partial / "config.json", config)
    made = fingerprint_base(base)
    record = {
        "schema": 1,
        "base": name,
        "fingerprint": asdict(made),
        "origin": origin_of(base, made.weights),
        "recipe": plan.recipe.to_json(),
        "kept": list(plan.kept),
    }
    files.write_json(partial / RECORD, record)
    for path in sorted(base.iterdir()):
        wanted = path.suffix in _COPIED or path.name.upper().startswith(("LICENSE", "NOTICE"))
        if path.is_file() and wanted and path.name not in _NOT_COPIED:
            files.write_bytes(partial / path.name, path.read_bytes())
    for path in sorted(base.glob("additional_chat_templates/*.jinja")):
        files.write_bytes(partial / path.parent.name / path.name, path.read_bytes())
