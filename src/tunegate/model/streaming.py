"""A checkpoint into a model, tensor by tensor, quantized on the way or as it is stored.

The model is built on the meta device and its tensors are read in file order, one ahead of the one at work. The weight
of a linear layer is quantized as it arrives and its bytes are dropped; what stays as it is keeps the buffer it was
read into. Memory while loading: the finished model, two tensors, and the interpreter. Files are read, not mapped: pages
of a mapped file count as the process's own.

In a bf16 checkpoint that computes in fp32, linear layers, a plain embedding and the head keep 16 bits
(``kernels.stored``). Embeddings, the output head, norms and expert routers are never quantized. What "preparing for
k-bit training" means elsewhere holds by construction: norms are in the compute dtype, nothing of the base requires a
gradient, and activations carry theirs through every layer.

Architectures whose checkpoints are rearranged on the way in (experts fused from single matrices) are refused. It does
not read other formats than safetensors and moves nothing to a device.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tunegate.errors import InputError, Problem
from tunegate.kernels.formats import Recipe
from tunegate.kernels.linear import QuantizedWeight
from tunegate.kernels.nf4 import QuantizedLinear, quantize
from tunegate.kernels.stored import StoredEmbedding, StoredLinear
from tunegate.model.bnb_files import StoredWeight, quantized_names, unpack
from tunegate.model.experts import is_router
from tunegate.model.shards import DTYPES, fill, size_of
from tunegate.model.weights import TensorEntry, tensors_of

_CODES = {"U8": torch.uint8, "I8": torch.int8}
_OTHER_DTYPE = "choose the base's 16-bit checkpoint; 8-bit weights need scales that are not read here"


class Rearranged(InputError):
    """The architecture makes its tensors of several that are stored."""


@dataclass(frozen=True)
class Streamed:
    """A loaded model and what was done: names of quantized layers, bytes of all weights as they lie in memory."""

    model: Any
    quantized: tuple[str, ...]
    weight_bytes: int


@dataclass(frozen=True)
class _Job:
    path: Path
    entry: TensorEntry
    name: str
    stored: StoredWeight | None = None


def load_streamed(
    folder: Path, config: Any, *, dtype: torch.dtype, recipe: Recipe | None, keep: Iterable[str] = (),
    trust_remote_code: bool = False,
) -> Streamed:  # fmt: skip
    """The checkpoint in ``folder`` as a frozen model in eval mode that computes in ``dtype``.

    ``recipe`` says how linear layers are quantized; None leaves them alone. ``keep`` names further ones (or endings of
    their paths) to leave as they are. Weights stored in bitsandbytes' forms are taken as they are.
    :class:`InputError` names missing tensors, wrong shapes, dtypes that are not read, NaN or infinity in what is
    quantized, and, as :class:`Rearranged`, an architecture that cannot be read tensor by tensor.
    """
    model = on_meta(config, dtype, trust_remote_code)
    files = tensors_of(folder)
    stored = quantized_names(entry.name for entries in files.values() for entry in entries)
    jobs, problems = _plan(folder, model, files, stored)
    if problems:
        raise InputError(problems)
    names = set() if recipe is None else quantizable(model, tuple(keep))
    names -= {job.name.removesuffix(".weight") for job in jobs if job.stored is not None}
    if recipe is not None and not names and not stored:
        raise InputError(
            f"{type(model).__name__} has no linear layer to quantize",
            where="base.quantization",
            fix="set it to none; transformers' Conv1D layers (GPT-2) are not quantized",
        )
    entries = {entry.name: (path, entry) for path, part in files.items() for entry in part}
    done = set(names)
    passing = {f"{name}.weight" for name in names}
    for job, tensor in _read_ahead(jobs, passing):
        if job.stored is not None:
            _put(model, job, unpack(job.stored, lambda name: _any_tensor(*entries[name])))
            done.add(job.name.removesuffix(".weight"))
        elif job.name in passing:
            _put(model, job, _quantized(job, tensor, recipe))
        else:
            _place(model, job, tensor, dtype)
    _tie(model)
    _fill_buffers(model)
    missing = [name for name, p in [*model.named_parameters(), *model.named_buffers()] if p.is_meta]
    if missing:
        raise InputError(_missing(folder, missing))
    model.requires_grad_(False)
    model.eval()
    held = {t.data_ptr(): t.nbytes for t in [*model.parameters(), *model.buffers()]}
    return Streamed(model, tuple(sorted(done)), sum(held.values()))


def keeps_16_bits(folder: Path) -> bool:
    """Whether most of the weights in ``folder`` are stored in bf16."""
    sizes = [(size_of(entry), entry.dtype) for entries in tensors_of(folder).values() for entry in entries]
    return 2 * sum(size for size, dtype in sizes if dtype == "BF16") > sum(size for size, _ in sizes)


def is_quantized(folder: Path) -> bool:
    """Whether weights in ``folder`` are stored quantized."""
    return bool(quantized_names(entry.name for entries in tensors_of(folder).values() for entry in entries))


def on_meta(config: Any, dtype: torch.dtype, trust_remote_code: bool) -> Any:
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)


def _plan(
    folder: Path, model: Any, files: Mapping[Path, list[TensorEntry]], stored: Mapping[str, StoredWeight]
) -> tuple[list[_Job], list[Problem]]:
    """Which tensor of which file goes where, in file order, and everything wrong with it."""
    state, names = model.state_dict(), checkpoint_names(folder, model, files)
    jobs = [
        _Job(path, entry, names[entry.name], stored.get(entry.name))
        for path, entries in files.items()
        for entry in sorted(entries, key=lambda e: e.start)
        if entry.name in names
    ]
    problems = [p for j in jobs if j.stored is None for p in _entry_problems(j, tuple(state[j.name].shape))]
    problems += [p for j in jobs if j.stored is not None for p in _stored_problems(j, model)]
    present, tied = {job.name for job in jobs}, _tied_names(model)
    return [job for job in jobs if tied.get(job.name) not in present], problems  # stored under both names: read once


def _stored_problems(job: _Job, model: Any) -> list[Problem]:
    module = model.get_submodule(job.name.rpartition(".")[0])
    if type(module) is nn.Linear and module is not model.get_output_embeddings():
        return []
    what = "quantized weights are read for linear layers only"
    return [Problem(what, f"{job.path}: {job.entry.name}", got=type(module).__name__)]


def checkpoint_names(folder: Path, model: Any, files: Mapping[Path, list[TensorEntry]]) -> dict[str, str]:
    """Name in the files -> name in ``model``'s state, for every tensor that the model takes. Others are left out, as
    transformers leaves them out. :class:`InputError` if the architecture rearranges tensors while loading."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    mapping = get_model_conversion_mapping(model)
    renamings = [m for m in mapping if isinstance(m, WeightRenaming)]
    converters: list[Any] = [m for m in mapping if not isinstance(m, WeightRenaming)]
    state, names, rearranged = model.state_dict(), {}, []
    for entry in (e for entries in files.values() for e in entries):
        name, converter = rename_source_key(entry.name, renamings, converters, model.base_model_prefix, state)
        if converter is not None:
            rearranged.append(entry.name)
        elif name in state:
            names[entry.name] = name
    if rearranged:
        raise Rearranged(
            f"{type(model).__name__} rearranges tensors while loading; they cannot be worked on one by one",
            where=str(folder),
            got=f"{len(rearranged)} tensors, such as {rearranged[0]!r}",
            fix="train it with `base.quantization: none`, and serve its adapters unmerged",
        )
    return names


def _entry_problems(job: _Job, shape: tuple[int, ...]) -> list[Problem]:
    entry, where = job.entry, f"{job.path}: {job.entry.name}"
    if entry.shape != shape:
        return [Problem("a tensor has another shape than config.json gives it", where, str(shape), str(entry.shape))]
    if entry.dtype not in DTYPES:
        return [
            Problem("weights of this dtype cannot be quantized", where, ", ".join(DTYPES), entry.dtype, _OTHER_DTYPE)
        ]
    return []


def _missing(folder: Path, missing: list[str]) -> Problem:
    return Problem(
        f"{len(missing)} tensors of the model are not in the weights",
        str(folder),
        "every parameter of the architecture in config.json",
        ", ".join(missing[:5]) + (" ..." if len(missing) > 5 else ""),
        "the weights belong to another architecture or are not whole: fetch the base again",
    )


def quantizable(model: Any, keep: tuple[str, ...]) -> set[str]:
    """Paths of the linear layers to quantize."""
    head, tied = model.get_output_embeddings(), set(_tied_names(model))
    return {
        path
        for path, module in model.named_modules()
        if type(module) is nn.Linear and module is not head and f"{path}.weight" not in tied
        if not is_router(model, path) and not any(path == ending or path.endswith(f".{ending}") for ending in keep)
    }


def _tied_names(model: Any) -> dict[str, str]:
    """Parameter -> the one whose tensor it shares, as the architecture says."""
    return dict(getattr(model, "all_tied_weights_keys", None) or {})


def _read_ahead(jobs: list[_Job], passing: set[str]) -> Iterator[tuple[_Job, Tensor]]:
    """Every job's tensor in order, the next one being read while one is at work.

    Tensors in ``passing`` are gone when the next one is asked for: they share two buffers, in turn.
    """
    largest = max((size_of(j.entry) for j in jobs if j.name in passing), default=0)
    ring = [torch.empty(largest, dtype=torch.uint8) for _ in range(2)]
    files: dict[Path, int] = {}

    def read(number: int) -> Tensor:
        job = jobs[number]
        size = size_of(job.entry)
        buffer = ring[number % 2][:size] if job.name in passing else torch.empty(size, dtype=torch.uint8)
        if job.stored is not None:
            return buffer[:0]  # read with its parts
        fill(files[job.path], job.entry, buffer, job.path)
        return buffer.view(DTYPES[job.entry.dtype]).view(job.entry.shape)

    try:
        for job in jobs:
            if job.path not in files:
                files[job.path] = os.open(job.path, os.O_RDONLY)
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(read, 0) if jobs else None
            for number, job in enumerate(jobs):
                assert waiting is not None
                tensor = waiting.result()
                waiting = pool.submit(read, number + 1) if number + 1 < len(jobs) else None
                yield job, tensor
                del tensor  # before the next one's memory is asked for
    finally:
        for descriptor in files.values():
            os.close(descriptor)


def _any_tensor(path: Path, entry: TensorEntry) -> Tensor:
    """A tensor of a stored quantized weight; of a dtype that none has, its bytes."""
    buffer = torch.empty(size_of(entry), dtype=torch.uint8)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fill(descriptor, entry, buffer, path)
    finally:
        os.close(descriptor)
    dtype = _CODES.get(entry.dtype) or DTYPES.get(entry.dtype)
    return buffer if dtype is None else buffer.view(dtype).view(entry.shape)


def _quantized(job: _Job, tensor: Tensor, recipe: Recipe | None) -> QuantizedWeight:
    assert recipe is not None
    try:
        return quantize(tensor, recipe)
    except ValueError as error:
        raise InputError(str(error), where=f"{job.path}: {job.entry.name}") from None


def _put(model: Any, job: _Job, weight: QuantizedWeight) -> None:
    """A quantized layer in the place of the linear layer whose weight the job is."""
    path = job.name.rpartition(".")[0]
    parent, _, child = path.rpartition(".")
    module = model.get_submodule(path)
    if tuple(weight.shape) != (module.out_features, module.in_features):
        expected = str((module.out_features, module.in_features))
        where = f"{job.path}: {job.entry.name}"
        what = "a tensor has another shape than config.json gives it"
        raise InputError(what, where=where, expected=expected, got=str(weight.shape))
    layer = QuantizedLinear(weight)
    layer.bias = module.bias  # on the meta device until its turn comes, or here already
    layer.train(module.training)
    setattr(model.get_submodule(parent), child, layer)


def _place(model: Any, job: _Job, tensor: Tensor, dtype: torch.dtype) -> None:
    path, _, kind = job.name.rpartition(".")
    parent_path, _, child = path.rpartition(".")
    module, parent = model.get_submodule(path), model.get_submodule(parent_path)
    narrow = tensor.dtype == torch.bfloat16 and dtype == torch.float32 and kind == "weight"
    if narrow and type(module) is nn.Embedding:
        kept = StoredEmbedding(nn.Parameter(tensor, requires_grad=False), dtype, module.padding_idx)
        setattr(parent, child, kept)
    elif narrow and type(module) is nn.Linear:
        setattr(parent, child, StoredLinear(nn.Parameter(tensor, requires_grad=False), module.bias))
    else:
        _set(module, kind, tensor.to(dtype))


def _set(module: nn.Module, name: str, tensor: Tensor) -> None:
    if name in module._parameters:
        parameter = nn.Parameter(tensor, requires_grad=False)
        parameter._is_hf_initialized = True  # type: ignore[attr-defined]  # transformers' mark of a loaded weight
        setattr(module, name, parameter)
    else:
        module._buffers[name] = tensor


def _tie(model: Any) -> None:
    """Shared weights shared again: the head takes the embedding's tensor, however that is stored."""
    for name, source in _tied_names(model).items():
        path, _, kind = name.rpartition(".")
        source_path, _, source_kind = source.rpartition(".")
        module, owner = model.get_submodule(path), model.get_submodule(source_path)
        weight = getattr(owner, source_kind)
        if isinstance(owner, StoredEmbedding) and type(module) is nn.Linear:
            parent_path, _, child = path.rpartition(".")
            module = StoredLinear(weight, module.bias)
            setattr(model.get_submodule(parent_path), child, module)
        setattr(module, kind, weight)


def _fill_buffers(model: Any) -> None:
    """Tables that a checkpoint does not hold (rotary frequencies), by the architecture's own initialisation."""
    for module in model.modules():
        buffers = {name: module._buffers.get(name) for name in module._non_persistent_buffers_set}
        empty = {name: buffer for name, buffer in buffers.items() if buffer is not None and buffer.is_meta}
        for name, buffer in empty.items():
            module._buffers[name] = torch.empty_like(buffer, device="cpu")
        if empty:
            for parameter in module.parameters(recurse=False):
                parameter._is_hf_initialized = True
            model._init_weights(module)
