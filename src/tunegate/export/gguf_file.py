"""GGUF files: the merged model, streamed tensor by tensor, and the adapter alone.

The model file begins with every key and the name, shape and type of every tensor, all known beforehand; then the
merged tensors are written as they come (``stream``), so no more lies in memory than a merge needs. Matrices become f16,
bf16 or q8_0 (blocks of 32 with one scale); vectors stay fp32, as llama.cpp wants them. Rows that q8_0 cannot cut into
blocks become f16. To f16 the sum is rounded once, also where the base is bf16.

The adapter file holds A and B of every module under the base tensor's name. llama.cpp computes ``alpha / rank * B A``
with one alpha for all modules, so the factors are flattened first (``flat``) and alpha is that scale times the rank;
q and k rows are laid out as in the base's file.

Sources: the ``gguf`` library, llama.cpp's ``convert_lora_to_gguf.py`` and ``src/llama-adapter.cpp``. It publishes
nothing.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from tunegate.errors import InputError, Problem, TunegateError
from tunegate.export.flat import Flat
from tunegate.export.gguf_families import (
    ROPE_FREQS,
    Family,
    family_of,
    gguf_name,
    rope_freqs,
    to_gguf,
    write_settings,
)
from tunegate.export.gguf_vocab import Vocabulary, write_vocabulary
from tunegate.export.plan import Plan
from tunegate.export.stream import check_changed, merged_tensors
from tunegate.model.shards import DTYPES, size_of
from tunegate.model.weights import TensorEntry

OUT_TYPES = ("f16", "bf16", "q8_0")
_FILE_TYPES = {"f32": 0, "f16": 1, "q8_0": 7, "bf16": 32}  # gguf.LlamaFileType
_DTYPES = {"f16": torch.float16, "bf16": torch.bfloat16}
_ELEMENTS_AT_ONCE = 1 << 21


@dataclass(frozen=True)
class _Slot:
    """One tensor of the file: where it comes from and as what it is written."""

    entry: TensorEntry
    name: str  # the model's name of it
    target: str  # GGUF's
    kind: str

    @property
    def dtype(self) -> torch.dtype:
        """In which the merged values come: the base's, or at once the file's where that is as wide."""
        own = DTYPES[self.entry.dtype]
        wanted = _DTYPES.get(self.kind, own)
        return wanted if wanted.itemsize == own.itemsize else own


@dataclass(frozen=True)
class Layout:
    """A model file that can be written: its family, its tensors by source file, and what it says about itself."""

    plan: Plan
    family: Family
    slots: Mapping[Path, Mapping[str, _Slot]]
    vocabulary: Vocabulary
    out_type: str

    def dtypes(self, source: Path) -> dict[str, torch.dtype]:
        """As what the merged tensors of ``source`` come where it is not the base's dtype."""
        found = {name: slot.dtype for name, slot in self.slots[source].items()}
        return {name: dtype for name, dtype in found.items() if dtype != DTYPES[self.slots[source][name].entry.dtype]}


def lay_out(plan: Plan, vocabulary: Vocabulary, out_type: str) -> Layout:
    """:class:`InputError` with everything that GGUF cannot hold."""
    if out_type not in OUT_TYPES:
        raise InputError("unknown number format", where="--outtype", expected=", ".join(OUT_TYPES), got=out_type)
    family, blocks = family_of(plan.config), plan.config.num_hidden_layers
    slots: dict[Path, dict[str, _Slot]] = {}
    problems: list[Problem] = []
    for path, entries in plan.files.items():
        slots[path] = {}
        for entry in entries:
            name = plan.names.get(entry.name)
            if name is None or (name == "lm_head.weight" and plan.config.tie_word_embeddings):
                continue  # not a parameter of the model, or one that GGUF shares by leaving it out
            try:
                target = gguf_name(family, blocks, name)
            except InputError as error:
                problems += error.problems
                continue
            if entry.dtype not in DTYPES:
                problems.append(Problem("a dtype that is not exported", entry.name, ", ".join(DTYPES), entry.dtype))
            slots[path][entry.name] = _Slot(entry, name, target, _kind(entry, out_type))
    if problems:
        raise InputError(problems)
    return Layout(plan, family, slots, vocabulary, out_type)


def _kind(entry: TensorEntry, out_type: str) -> str:
    if len(entry.shape) < 2:
        return "f32"
    return "f16" if out_type == "q8_0" and entry.shape[-1] % 32 else out_type


def file_bytes(layout: Layout) -> int:
    """About the size of the file, for the room on the disk."""
    widths = {"f32": 4.0, "f16": 2.0, "bf16": 2.0, "q8_0": 34 / 32}
    sizes = (
        np.prod(s.entry.shape, dtype=float) * widths[s.kind] for part in layout.slots.values() for s in part.values()
    )
    return int(sum(sizes)) + sum(len(t.encode()) + 24 for t in [*layout.vocabulary.tokens, *layout.vocabulary.merges])


@torch.no_grad()
def write_model(
    layout: Layout, path: Path, about: Mapping[str, str], progress: Callable[[int], None] = lambda _: None
) -> int:
    """Write the merged model to ``path`` and return how many tensors differ from the base's.

    ``about`` are keys that say where it came from. ``progress`` is called with the bytes read of each tensor.
    :class:`TunegateError` if an adapted tensor is unchanged or a value is too large for f16.
    """
    import gguf

    plan, config = layout.plan, layout.plan.config
    writer = gguf.GGUFWriter(path, layout.family.arch)
    writer.add_type(gguf.GGUFType.MODEL)
    _describe(writer, about)
    writer.add_file_type(_FILE_TYPES[layout.out_type])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    write_settings(writer, config, layout.family)
    write_vocabulary(writer, layout.vocabulary)
    extra = rope_freqs(config)
    if extra is not None:
        _announce(writer, ROPE_FREQS, tuple(extra.shape), "f32")
    for source in plan.files:
        for slot in _in_file_order(layout, source):
            _announce(writer, slot.target, slot.entry.shape, slot.kind)
    _begin(writer)
    changed = set()
    try:
        if extra is not None:
            _put(writer, extra.numpy())
        for source in plan.files:
            for entry, data, differs in merged_tensors(plan, source, layout.dtypes(source)):
                if differs:
                    changed.add(entry.name)
                here = layout.slots[source].get(entry.name)
                if here is not None:
                    values = to_gguf(config, layout.family, here.name, data.view(here.dtype).view(entry.shape))
                    _put(writer, _encoded(values, here))
                    del values
                del data  # else it would be held until the next one is ready
                progress(size_of(entry))
    finally:
        _end(writer)
    check_changed(plan, changed, str(path))
    return len(changed)


def write_adapter(flat: Flat, config: Any, path: Path, about: Mapping[str, str]) -> int:
    """Write A and B of every module, fp32, to ``path``; returns how many modules there are."""
    import gguf

    family = family_of(config)
    writer = gguf.GGUFWriter(path, family.arch)
    writer.add_type(gguf.GGUFType.ADAPTER)
    _describe(writer, about)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, flat.alpha)
    writer.add_file_type(_FILE_TYPES["f32"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    tensors = {}
    for module, factors in flat.modules.items():
        if module == "lm_head" and config.tie_word_embeddings:
            what = "the output head shares the embedding's weight, so llama.cpp has nothing to put its adapter on"
            raise InputError(what, where=module, fix="export the merged model: --to gguf")
        name = gguf_name(family, config.num_hidden_layers, f"{module}.weight")
        tensors[f"{name}.lora_a"] = factors.a
        tensors[f"{name}.lora_b"] = to_gguf(config, family, f"{module}.weight", factors.b).contiguous()
    for name, tensor in tensors.items():
        _announce(writer, name, tuple(tensor.shape), "f32")
    _begin(writer)
    try:
        for tensor in tensors.values():
            _put(writer, tensor.numpy())
    finally:
        _end(writer)
    return len(flat.modules)


def check_no_magnitude(flat: Flat) -> None:
    """:class:`InputError` for DoRA, which llama.cpp's adapters cannot say."""
    if any(f.magnitude is not None for f in flat.modules.values()):
        what = "a GGUF adapter holds A and B only, and DoRA also scales every row"
        raise InputError(what, where="use_dora", fix="export the merged model: --to gguf")


def _describe(writer: Any, about: Mapping[str, str]) -> None:
    for key, value in about.items():
        writer.add_string(key, value)


def _in_file_order(layout: Layout, source: Path) -> list[_Slot]:
    return sorted(layout.slots[source].values(), key=lambda slot: slot.entry.start)


def _announce(writer: Any, name: str, shape: tuple[int, ...], kind: str) -> None:
    from gguf import GGMLQuantizationType
    from gguf.quants import quant_shape_to_byte_shape

    form = GGMLQuantizationType[kind.upper()]
    if kind in ("f32", "f16"):
        dtype = np.dtype(np.float32 if kind == "f32" else np.float16)
        stored = shape
    else:
        dtype, stored = np.dtype(np.uint8), quant_shape_to_byte_shape(shape, form)
    size = int(np.prod(stored, dtype=np.int64)) * dtype.itemsize
    writer.add_tensor_info(name, stored, dtype, size, raw_dtype=form)


def _begin(writer: Any) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()


@dataclass(frozen=True)
class _Bytes:
    """What ``GGUFWriter`` uses of an array, written through the file's own buffer: on a full disk numpy's ``tofile``
    does not say why it fails, and the end of a small tensor is lost without a word."""

    values: np.ndarray[Any, Any]

    @property
    def nbytes(self) -> int:
        return self.values.nbytes

    def tofile(self, handle: IO[bytes]) -> None:
        handle.write(self.values.data)


def _put(writer: Any, values: np.ndarray[Any, Any]) -> None:
    writer.write_tensor_data(_Bytes(values))


def _end(writer: Any) -> None:
    """Flush to the disk and close."""
    for handle in writer.fout:
        handle.flush()
        os.fsync(handle.fileno())
    writer.close()


def _encoded(values: Tensor, slot: _Slot) -> np.ndarray[Any, Any]:
    """A tensor as its bytes in the file, made a few rows at a time."""
    from gguf import GGMLQuantizationType
    from gguf.quants import quantize

    if slot.kind == "f32":
        return values.float().contiguous().numpy()
    if slot.kind == "bf16":
        return values.to(torch.bfloat16).contiguous().view(torch.uint8).numpy()
    if slot.kind == "f16" and values.dtype == torch.float16:
        return values.contiguous().numpy()
    rows = max(1, _ELEMENTS_AT_ONCE // values.shape[-1])
    parts = (values[start : start + rows].float() for start in range(0, values.shape[0], rows))
    if slot.kind == "f16":
        out = torch.empty(values.shape, dtype=torch.float16)
        for start, part in zip(range(0, values.shape[0], rows), parts, strict=True):
            out[start : start + rows] = part
            if not torch.isfinite(out[start : start + rows]).all():
                raise TunegateError("a weight is too large for f16", where=slot.name, fix="--outtype bf16")
        return out.numpy()
    blocks = np.empty((values.shape[0], values.shape[1] // 32 * 34), dtype=np.uint8)
    for start, part in zip(range(0, values.shape[0], rows), parts, strict=True):
        blocks[start : start + rows] = quantize(part.contiguous().numpy(), GGMLQuantizationType.Q8_0)
    return blocks
