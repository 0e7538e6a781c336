"""Which safetensors files make up a base, and what lies in them.

A safetensors file is 8 bytes (the header's length N, little endian), N bytes of JSON (name -> dtype, shape,
``data_offsets``), then the data. :func:`read_header` reads only the first two parts and believes nothing: the
length has a limit, every tensor's bytes must match its dtype and shape, and the tensors must cover the data
exactly, without overlap or hole, to the last byte of the file. A truncated download fails here.

Format: https://github.com/huggingface/safetensors (README, "Format"). It reads no weights and loads no model.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunegate.errors import InputError, Problem

MAX_HEADER_BYTES = 100_000_000
MAX_JSON_BYTES = 500_000_000
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

DTYPE_BITS = {
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8"), 8),
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
}

_OTHER_FORMATS = (".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".npz")
CONVERT_FIX = (
    "on a machine where you trust these files, load them with transformers and write "
    "`model.save_pretrained(folder, safe_serialization=True)`, then use that folder"
)
_FETCH_AGAIN = "the file is damaged or its download was cut off: copy or fetch it again"


@dataclass(frozen=True)
class TensorEntry:
    """One tensor in a file. ``start`` and ``end`` are byte positions counted from the start of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


class _Malformed(ValueError):
    """What is wrong with a header, in words, and the way out."""

    def __init__(self, text: str, fix: str = _FETCH_AGAIN):
        super().__init__(text)
        self.fix = fix


def load_json(path: Path, limit: int = MAX_JSON_BYTES) -> Any:
    """The JSON value of a file from outside; :class:`InputError` if it is too large, not UTF-8 or not JSON.

    ``NaN`` and ``Infinity``, which some configs carry, become strings, so that the value can be hashed.
    """
    size = path.stat().st_size
    if size > limit:
        raise InputError("too large", where=str(path), expected=f"at most {limit:,} bytes", got=f"{size:,}")
    try:
        return json.loads(path.read_bytes(), parse_constant=str)
    except (ValueError, RecursionError) as error:
        raise InputError(
            "not valid JSON", where=str(path), got=str(error) or type(error).__name__, fix=_FETCH_AGAIN
        ) from error


def load_object(path: Path) -> dict[str, Any]:
    """Like :func:`load_json`, and the value must be an object."""
    value = load_json(path)
    if not isinstance(value, dict):
        raise InputError("not a JSON object", where=str(path), expected="an object", got=type(value).__name__)
    return value


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        names = [name for name, _ in pairs]
        raise _Malformed(f"the name {next(n for n in names if names.count(n) > 1)!r} occurs twice")
    return value


def _entry(name: str, value: Any, data_start: int) -> TensorEntry:
    if ".." in name.replace("\\", "/").split("/") or name.startswith("/") or "\0" in name:
        raise _Malformed(
            f"the tensor's name {name!r} is a path out of the folder",
            "names are modules and dots, as in layers.0.mlp.up_proj.weight: save it again with the tool that made it, "
            "and do not trust a file from elsewhere that has such names",
        )
    if not isinstance(value, dict) or not {"dtype", "shape", "data_offsets"} <= value.keys():
        raise _Malformed(f"tensor {name!r} lacks dtype, shape or data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise _Malformed(f"tensor {name!r} has the unknown dtype {dtype!r}")
    for what, numbers in (("shape", shape), ("data_offsets", offsets)):
        if not isinstance(numbers, list) or not all(type(n) is int and n >= 0 for n in numbers):
            raise _Malformed(f"tensor {name!r}: {what} is not a list of whole numbers >= 0")
    if len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _Malformed(f"tensor {name!r}: data_offsets {offsets} is not [start, end]")
    bits = math.prod(shape) * DTYPE_BITS[dtype]
    if bits != 8 * (offsets[1] - offsets[0]):
        raise _Malformed(
            f"tensor {name!r}: {dtype} {shape} needs {bits / 8:,.1f} bytes, data_offsets gives "
            f"{offsets[1] - offsets[0]:,}"
        )
    return TensorEntry(name, dtype, tuple(shape), data_start + offsets[0], data_start + offsets[1])


def _header_text(handle: Any, size: int) -> bytes:
    first = handle.read(8)
    if len(first) < 8:
        raise _Malformed(f"the file has {size} bytes, fewer than the 8 of the header's length")
    length = int.from_bytes(first, "little")
    if length > MAX_HEADER_BYTES:
        raise _Malformed(f"the header claims {length:,} bytes, more than the limit of {MAX_HEADER_BYTES:,}")
    if 8 + length > size:
        raise _Malformed(f"the header claims {length:,} bytes, the file has {size:,}")
    return bytes(handle.read(length))


def _parse(text: bytes, size: int) -> list[TensorEntry]:
    try:
        header = json.loads(text, object_pairs_hook=_no_duplicates)
    except _Malformed:
        raise
    except (ValueError, RecursionError) as error:
        raise _Malformed(f"the header is not valid JSON: {error}") from error
    if not isinstance(header, dict):
        raise _Malformed("the header is not a JSON object")
    header.pop("__metadata__", None)
    start = 8 + len(text)
    entries = [_entry(name, value, start) for name, value in header.items()]
    position = start
    for entry in sorted(entries, key=lambda e: (e.start, e.end)):
        if entry.start != position:
            kind = "overlaps the tensor before it" if entry.start < position else "leaves a hole before it"
            raise _Malformed(f"tensor {entry.name!r} {kind}")
        position = entry.end
    if position != size:
        raise _Malformed(f"the tensors end at byte {position:,}, the file has {size:,} bytes")
    return entries


def read_header(path: Path) -> list[TensorEntry]:
    """The tensors of one safetensors file in header order; :class:`InputError` if the file is not sound."""
    with path.open("rb") as handle:
        return parse_header(header_text(handle, path), os.fstat(handle.fileno()).st_size, path)


def header_text(handle: Any, path: Path) -> bytes:
    """The header of the safetensors file that was opened for reading as ``handle``, as it stands there."""
    with _sound(path):
        return _header_text(handle, os.fstat(handle.fileno()).st_size)


def parse_header(text: bytes, size: int, path: Path) -> list[TensorEntry]:
    """:func:`read_header` of a file of ``size`` bytes with the header ``text``: these alone say everything."""
    with _sound(path):
        return _parse(text, size)


@contextlib.contextmanager
def _sound(path: Path) -> Iterator[None]:
    try:
        yield
    except _Malformed as error:
        raise InputError("not a sound safetensors file", where=str(path), got=str(error), fix=error.fix) from error


def _index_files(folder: Path) -> tuple[dict[str, list[str]], list[Problem]]:
    """Shard name -> the tensors the index places in it, and what is wrong with the index."""
    where = str(folder / INDEX_FILE)
    try:
        weight_map = load_object(folder / INDEX_FILE).get("weight_map")
    except InputError as error:
        return {}, error.problems
    if not isinstance(weight_map, dict) or not weight_map:
        return {}, [Problem("no weight_map", where, "an object of tensor name -> file name", fix=_FETCH_AGAIN)]
    shards: dict[str, list[str]] = {}
    problems = []
    for tensor, shard in weight_map.items():
        # A shard is a file of this folder: a path could reach any file of the machine.
        if not isinstance(shard, str) or not shard.endswith(".safetensors") or set(shard) & set("/\\:\0"):
            problems.append(
                Problem(f"tensor {tensor!r}: not a shard's name", where, "a .safetensors name", repr(shard))
            )
        else:
            shards.setdefault(shard, []).append(tensor)
    return dict(sorted(shards.items())), problems


def _no_weights(folder: Path) -> Problem:
    present = sorted(p.name for p in folder.iterdir() if p.suffix in (".safetensors", *_OTHER_FORMATS))
    unsafe = any(not name.endswith(".safetensors") for name in present)
    return Problem(
        "no safetensors weights",
        str(folder),
        expected=f"{SINGLE_FILE}, or {INDEX_FILE} with its shards",
        got=", ".join(present[:5]) or "no weight files",
        fix=CONVERT_FIX if unsafe else "give the folder (or hub id) of a whole transformers model",
    )


def inspect_weights(folder: Path) -> tuple[dict[Path, list[TensorEntry]], list[Problem]]:
    """File -> tensors for the files that transformers would load, with all problems found.

    ``model.safetensors`` goes before the index, as in transformers. Tied weights that are left out, or stored
    under both names, are fine.
    """
    if (folder / SINGLE_FILE).is_file():
        shards: dict[str, list[str]] = {SINGLE_FILE: []}
        problems: list[Problem] = []
    elif (folder / INDEX_FILE).is_file():
        shards, problems = _index_files(folder)
    else:
        return {}, [_no_weights(folder)]
    found: dict[Path, list[TensorEntry]] = {}
    owner: dict[str, str] = {}
    for shard, promised in shards.items():
        path = folder / shard
        if not path.is_file():
            problems.append(
                Problem("shard is missing", str(path), f"a file, named by {INDEX_FILE}", "none", _FETCH_AGAIN)
            )
            continue
        try:
            found[path] = read_header(path)
        except InputError as error:
            problems += error.problems
            continue
        problems += _shard_problems(path, found[path], promised, owner)
    return found, problems


def _shard_problems(
    path: Path, entries: Sequence[TensorEntry], promised: Sequence[str], owner: dict[str, str]
) -> list[Problem]:
    problems = []
    absent = sorted(set(promised) - {entry.name for entry in entries})
    if absent:
        problems.append(
            Problem(
                "tensors are missing",
                str(path),
                f"what {INDEX_FILE} places here",
                f"{len(absent)} absent, such as {absent[0]!r}",
                _FETCH_AGAIN,
            )
        )
    for entry in entries:
        if entry.name in owner:
            problems.append(Problem(f"tensor {entry.name!r} is also in {owner[entry.name]}", str(path)))
        owner[entry.name] = path.name
    return problems


def tensors_of(folder: Path) -> dict[Path, list[TensorEntry]]:
    """:func:`inspect_weights`, raising :class:`InputError` with every problem."""
    found, problems = inspect_weights(folder)
    if problems:
        raise InputError(problems)
    return found
