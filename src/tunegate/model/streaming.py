"""A checkpoint into a quantized model, tensor by tensor, so that the whole never lies in memory.

The model is built on the meta device and its tensors are read in file order, one ahead of the one at work. The weight
of a linear layer is quantized as it arrives and its bytes are dropped; what stays as it is keeps the buffer it was
read into. Memory while loading: the finished model, two tensors, and the interpreter. Files are read, not mapped: pages
of a mapped file count as the process's own.

Embeddings, the output head, norms and expert routers are never quantized. In a 16-bit checkpoint that computes in fp32
a plain embedding and head keep 16 bits (``kernels.stored``). What "preparing for k-bit training" means elsewhere holds
by construction: norms are in the compute dtype, nothing of the base requires a gradient, and activations carry theirs
through every layer.

Architectures whose checkpoints are rearranged on the way in (experts fused from single matrices) are refused. It does
not read other formats than safetensors and moves nothing to a device.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tunegate.errors import InputError, Problem
from tunegate.kernels.nf4 import NF4Linear, quantize
from tunegate.kernels.stored import StoredEmbedding, StoredLinear
from tunegate.model.weights import TensorEntry, tensors_of

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
ROUTERS = ("router", "mlp.gate", "block_sparse_moe.gate")
_OTHER_DTYPE = "choose the base's 16-bit checkpoint; 8-bit weights need scales that are not read here"


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


def load_quantized(
    folder: Path, config: Any, *, dtype: torch.dtype, double: bool = True, keep: Iterable[str] = (),
    trust_remote_code: bool = False,
) -> Streamed:  # fmt: skip
    """The checkpoint in ``folder`` as a frozen model in eval mode, linear layers in NF4, the rest in ``dtype``.

    ``keep`` names further layers (or endings of their paths) to leave as they are; ``double`` quantizes the scales
    too. :class:`InputError` names missing tensors, wrong shapes, dtypes that are not read, and NaN or infinity.
    """
    model = _on_meta(config, dtype, trust_remote_code)
    jobs, problems = _plan(folder, model)
    if problems:
        raise InputError(problems)
    names = _quantizable(model, tuple(keep))
    if not names:
        raise InputError(
            f"{type(model).__name__} has no linear layer to quantize",
            where="base.quantization",
            fix="set it to none; transformers' Conv1D layers (GPT-2) are not quantized",
        )
    passing = {f"{name}.weight" for name in names}
    for job, tensor in _read_ahead(jobs, passing):
        _place(model, job, tensor, dtype, names, double)
    _tie(model)
    _fill_buffers(model)
    missing = [name for name, p in [*model.named_parameters(), *model.named_buffers()] if p.is_meta]
    if missing:
        raise InputError(_missing(folder, missing))
    model.requires_grad_(False)
    model.eval()
    held = {t.data_ptr(): t.nbytes for t in [*model.parameters(), *model.buffers()]}
    return Streamed(model, tuple(sorted(names)), sum(held.values()))


def _on_meta(config: Any, dtype: torch.dtype, trust_remote_code: bool) -> Any:
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)


def _plan(folder: Path, model: Any) -> tuple[list[_Job], list[Problem]]:
    """Which tensor of which file goes where, in file order, and everything wrong with it."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    mapping = get_model_conversion_mapping(model)
    renamings = [m for m in mapping if isinstance(m, WeightRenaming)]
    converters: list[Any] = [m for m in mapping if not isinstance(m, WeightRenaming)]
    state = model.state_dict()
    jobs, problems, rearranged = [], [], []
    for path, entries in tensors_of(folder).items():
        for entry in sorted(entries, key=lambda e: e.start):
            name, converter = rename_source_key(entry.name, renamings, converters, model.base_model_prefix, state)
            if converter is not None:
                rearranged.append(entry.name)
            elif name in state:  # others are not the model's: transformers leaves them out too
                jobs.append(_Job(path, entry, name))
                problems += _entry_problems(path, entry, tuple(state[name].shape))
    stored, tied = {job.name for job in jobs}, _tied_names(model)
    jobs = [job for job in jobs if tied.get(job.name) not in stored]  # stored under both names: read once
    if rearranged:
        problems.append(
            Problem(
                f"{type(model).__name__} rearranges tensors while loading, and quantizing on the way does not",
                str(folder),
                got=f"{len(rearranged)} tensors, such as {rearranged[0]!r}",
                fix="set `base.quantization: none`",
            )
        )
    return jobs, problems


def _entry_problems(path: Path, entry: TensorEntry, shape: tuple[int, ...]) -> list[Problem]:
    where = f"{path}: {entry.name}"
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


def _quantizable(model: Any, keep: tuple[str, ...]) -> set[str]:
    """Paths of the linear layers to quantize."""
    head, tied = model.get_output_embeddings(), set(_tied_names(model))
    endings = (*ROUTERS, *keep)
    return {
        path
        for path, module in model.named_modules()
        if type(module) is nn.Linear and module is not head and f"{path}.weight" not in tied
        if not any(path == ending or path.endswith(f".{ending}") for ending in endings)
    }


def _tied_names(model: Any) -> dict[str, str]:
    """Parameter -> the one whose tensor it shares, as the architecture says."""
    return dict(getattr(model, "all_tied_weights_keys", None) or {})


def _read_ahead(jobs: list[_Job], passing: set[str]) -> Iterator[tuple[_Job, Tensor]]:
    """Every job's tensor in order, the next one being read while one is at work.

    Tensors in ``passing`` are gone when the next one is asked for: they share two buffers, in turn.
    """
    largest = max((j.entry.end - j.entry.start for j in jobs if j.name in passing), default=0)
    ring = [torch.empty(largest, dtype=torch.uint8) for _ in range(2)]
    files: dict[Path, int] = {}

    def read(number: int) -> Tensor:
        job = jobs[number]
        size = job.entry.end - job.entry.start
        buffer = ring[number % 2][:size] if job.name in passing else torch.empty(size, dtype=torch.uint8)
        _fill(files[job.path], job, buffer)
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


def _fill(descriptor: int, job: _Job, buffer: Tensor) -> None:
    """Read the job's bytes into ``buffer`` (bytes,) uint8."""
    view, done = memoryview(buffer.numpy()), 0  # type: ignore[arg-type]
    while done < len(view):
        got = os.preadv(descriptor, [view[done:]], job.entry.start + done)
        if got == 0:
            raise InputError("the file became shorter while it was read", where=str(job.path), fix="fetch it again")
        done += got


def _place(model: Any, job: _Job, tensor: Tensor, dtype: torch.dtype, names: set[str], double: bool) -> None:
    path, _, kind = job.name.rpartition(".")
    parent_path, _, child = path.rpartition(".")
    module, parent = model.get_submodule(path), model.get_submodule(parent_path)
    if path in names and kind == "weight":
        try:
            layer = NF4Linear(quantize(tensor, double=double))
        except ValueError as error:
            raise InputError(str(error), where=f"{job.path}: {job.entry.name}") from None
        layer.bias = module.bias  # on the meta device until its turn comes, or here already
        layer.train(module.training)
        setattr(parent, child, layer)
        return
    narrow = tensor.dtype == torch.bfloat16 and dtype == torch.float32 and kind == "weight"
    if narrow and type(module) is nn.Embedding:
        kept = StoredEmbedding(nn.Parameter(tensor, requires_grad=False), dtype, module.padding_idx)
        setattr(parent, child, kept)
    elif narrow and type(module) is nn.Linear and module is model.get_output_embeddings():
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
