"""An adapter on disk: PEFT's folder of ``adapter_model.safetensors`` and ``adapter_config.json``, checked both ways.

Tensor names are ``base_model.model.<module path>.lora_A.weight`` (r, in), ``.lora_B.weight`` (out, r) and, for DoRA,
``.lora_magnitude_vector`` (out,), all fp32. Both files are written and verified under temporary names and renamed
together, the config last, so a failed save leaves what was there. The same adapter gives the same bytes.

Loading is all or nothing. The config must describe something this package computes, the file must hold exactly the
tensors of the modules it selects, with their shapes, finite, and some B must differ from zero; PEFT itself only warns
about missing or surplus tensors. Names, shapes and types are read from the header before any data. The model is
touched after the last check.

It does not verify that the adapter was trained on this base, and reads no pickle (``adapter_model.bin``).
"""

from __future__ import annotations

import contextlib
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor, nn

from tunegate.adapter.canonical import DTYPES, Header, content_hash, read_canonical
from tunegate.adapter.inject import Injection, find_targets, inject
from tunegate.adapter.layers import features
from tunegate.adapter.peft_config import config_from, read_config, spec_from_config
from tunegate.adapter.spec import AdapterSpec
from tunegate.errors import InputError, Problem, TunegateError, nearest
from tunegate.files import atomic_path, read_into
from tunegate.model.weights import TensorEntry, header_text, parse_header

TENSORS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
_PREFIX = "base_model.model."
_NAME = re.compile(  # no empty part, so no `..`; no separator of paths
    re.escape(_PREFIX) + r"(?P<path>\w+(\.\w+)*)\.(lora_[AB]\.weight|lora_magnitude_vector)", re.ASCII
)
_MOST_KNOWN = 64
_OTHER_BASE = "the adapter may belong to another base, or its file may be damaged: copy it again"
Shapes = Mapping[str, tuple[int, ...]]  # of tensors, by name


@dataclass
class Known:
    """What was found out about adapters of one model, so that the next ones like them cost less. ``selected``: by spec,
    the modules and the tensors' shapes. ``fitting``: by spec, the header's bytes and the file's size."""

    selected: dict[str, tuple[tuple[str, ...], Shapes]] = field(default_factory=dict)
    fitting: dict[tuple[str, bytes, int], Fitting] = field(default_factory=dict)


def _keep(found: dict[Any, Any], key: Any, value: Any) -> None:
    if len(found) >= _MOST_KNOWN:
        found.clear()
    found[key] = value


def tensor_name(path: str, parameter: str) -> str:
    """PEFT gives A and B a ``.weight`` because they are layers there; the magnitude is a bare vector."""
    return f"{_PREFIX}{path}.{parameter}" + ("" if parameter == "lora_magnitude_vector" else ".weight")


def module_paths(names: Iterable[str]) -> list[str]:
    """The adapted modules among tensor names, sorted."""
    end = ".lora_A.weight"
    return sorted(name[len(_PREFIX) : -len(end)] for name in names if name.endswith(end))


def _parameters(injection: Injection) -> dict[str, nn.Parameter]:
    found = {
        tensor_name(path, name): parameter
        for path, layer in injection.modules.items()
        for name, parameter in layer.adapter_parameters().items()
    }
    return dict(sorted(found.items()))


def read_state(injection: Injection) -> dict[str, Tensor]:
    """Copies of every adapter tensor, fp32 on the CPU, by file name in sorted order."""
    return {
        name: parameter.detach().to("cpu", torch.float32, copy=True).contiguous()
        for name, parameter in _parameters(injection).items()
    }


@torch.no_grad()
def load_state(injection: Injection, tensors: Mapping[str, Tensor]) -> None:
    """Copy ``tensors`` (names as in :func:`read_state`) into the adapter; all are checked before the first write."""
    parameters = _parameters(injection)
    problems = _coverage(
        {name: tuple(parameter.shape) for name, parameter in parameters.items()},
        {name: tuple(tensor.shape) for name, tensor in tensors.items()},
        "adapter state",
    )
    problems += non_finite(tensors, "adapter state")
    if problems:
        raise InputError(problems)
    for name, parameter in parameters.items():
        parameter.copy_(tensors[name])


def save_adapter(
    folder: Path | str,
    injection: Injection,
    *,
    base_name: str,
    revision: str | None = None,
    allow_untrained: bool = False,
) -> None:
    """Write the adapter to ``folder``. :class:`TunegateError` if a tensor is not finite or every B is still zero
    (unless ``allow_untrained``), or if the file does not read back as written; nothing is replaced then."""
    from safetensors.torch import save

    folder = Path(folder)
    state = read_state(injection)
    problems = non_finite(state, str(folder))
    if not allow_untrained:
        problems += untrained(state, str(folder))
    if problems:
        raise TunegateError(problems)
    data = save(state, metadata={"format": "pt"})
    text = _config_text(config_from(injection, base_name, revision))
    # The inner block is renamed first: both files are complete before either appears, and the config appears last.
    with atomic_path(folder / CONFIG) as config_path, atomic_path(folder / TENSORS) as tensors_path:
        config_path.write_bytes(text)
        tensors_path.write_bytes(data)
        _verify(tensors_path, state, folder / TENSORS)
        _verify_config(config_path, injection, folder / CONFIG)


def load_adapter(model: nn.Module, folder: Path | str, *, allow_untrained: bool = False, seed: int = 0) -> Injection:
    """Put the adapter in ``folder`` on the plain ``model`` and return it, in fp32.

    :class:`InputError` names every key, tensor and module that is wrong, and leaves the model as it was.
    """
    spec, state = checked_state(model, folder, allow_untrained=allow_untrained)
    injection = inject(model, spec, seed=seed, strict=False)
    load_state(injection, state)
    return injection


def checked_state(
    model: nn.Module, folder: Path | str, *, allow_untrained: bool = False, known: Known | None = None
) -> tuple[AdapterSpec, dict[str, Tensor]]:
    """The adapter in ``folder`` as spec and fp32 tensors by file name, checked against the plain ``model``, which may
    be on the meta device. :class:`InputError` names everything that is wrong. ``known`` spares who reads many adapters
    of one model the search for what their specs select."""
    contents = checked_contents(model, folder, allow_untrained=allow_untrained, known=known)
    return contents.spec, contents.state


@dataclass(frozen=True)
class Contents:
    """An adapter in memory, from one reading of its files: ``state`` are fp32 tensors by file name."""

    config: Mapping[str, Any]
    spec: AdapterSpec
    state: dict[str, Tensor]

    def hash(self) -> str:
        """:func:`adapter_hash` of what was read."""
        return content_hash(self.config, self.state)


def checked_contents(
    model: nn.Module, folder: Path | str, *, allow_untrained: bool = False, known: Known | None = None
) -> Contents:
    """:func:`checked_state` with the config that it was checked by. The files are opened once, so what was checked is
    what is returned."""
    folder = Path(folder)
    where = str(folder / TENSORS)
    with opened_fitting(model, folder, known) as (handle, config, fitting):
        state, finite = _tensors(handle, fitting.header.entries)
    problems = [] if finite else non_finite(state, where)
    if not allow_untrained:
        problems += untrained(state, where)
    if problems:
        raise InputError(problems)
    return Contents(config, fitting.spec, state)


@dataclass(frozen=True, eq=False)
class Fitting:
    """A header that fits a model, with what the config beside it means, and the modules. :class:`Known` has one for all
    adapters that are alike in these."""

    header: Header
    spec: AdapterSpec
    paths: tuple[str, ...]


@contextlib.contextmanager
def opened_fitting(
    model: nn.Module, folder: Path, known: Known | None = None
) -> Iterator[tuple[BinaryIO, Mapping[str, Any], Fitting]]:
    """The tensors' file of the adapter in ``folder``, open, its config, and its header, which holds exactly the tensors
    of the modules that the config selects in ``model``; :class:`InputError` otherwise."""
    config, spec = _read_meaning(folder)
    known = Known() if known is None else known
    with _open(folder) as (handle, text, size):
        key = repr(spec), text, size
        found = known.fitting.get(key)
        if found is None:
            header = _parsed(text, size, folder)
            found = Fitting(header, spec, _check_header(model, spec, header, str(folder / TENSORS), known))
            _keep(known.fitting, key, found)
        yield handle, config, found


def checked_header(
    model: nn.Module, folder: Path | str, known: Known | None = None
) -> tuple[AdapterSpec, tuple[str, ...]]:
    """The spec of the adapter in ``folder`` and the modules it adapts, from the config and the header of the tensors'
    file alone; :class:`InputError` if the tensors are not exactly those of the modules that the config selects."""
    with opened_fitting(model, Path(folder), known) as (_, _, fitting):
        return fitting.spec, fitting.paths


def _check_header(model: nn.Module, spec: AdapterSpec, header: Header, where: str, known: Known) -> tuple[str, ...]:
    """The modules that ``spec`` selects; :class:`InputError` unless the tensors are exactly theirs."""
    problems: list[Problem] = []
    selected = known.selected.get(repr(spec))
    if selected is None:
        targets, problems = find_targets(model, spec, strict=False)
        selected = tuple(targets), _expected(targets, spec)
        if not problems:
            _keep(known.selected, repr(spec), selected)
    paths, expected = selected
    problems += _coverage(expected, header.shapes, where)
    problems += _wrong_types(header.entries, where)
    if problems:
        raise InputError(problems)
    return paths


def read_spec(folder: Path | str) -> AdapterSpec:
    """The spec in a PEFT folder's config; :class:`InputError` with everything in it that cannot be expressed."""
    return _read_meaning(Path(folder))[1]


def _read_meaning(folder: Path) -> tuple[dict[str, Any], AdapterSpec]:
    config = read_config(folder / CONFIG)
    return config, spec_from_config(config, str(folder / CONFIG))


def adapter_hash(folder: Path | str) -> str:
    """Content hash of an adapter: its tensors (name, shape, fp32 bytes, sorted) and what its config means.

    Independent of the order and precision a writer chose for equal values; PEFT's version and the dropout used in
    training are left out, the base's name and revision are in.
    """
    folder = Path(folder)
    config, _ = _read_meaning(folder)
    with _opened(folder) as (handle, header):
        problems = _wrong_types(header.entries, str(folder / TENSORS))
        if problems:
            raise InputError(problems)
        return read_canonical(handle, header, config).hash()


def check_alone(folder: Path | str) -> None:
    """What can be said of an adapter without its base: :class:`InputError` unless its tensors are named like modules'
    factors, come in pairs of the rank that the config gives, are finite, and some B is not zero."""
    folder = Path(folder)
    where, spec = str(folder / TENSORS), read_spec(folder)
    with _opened(folder) as (handle, header):
        entries = header.entries
        problems = [
            Problem("not a tensor of an adapter on a module", f"{where}: {name[:200]!r}", f"{_PREFIX}M.lora_A.weight")
            for name in sorted(entries)
            if not _NAME.fullmatch(name)
        ]
        problems += _wrong_types(entries, where)
        problems += _unpaired({n: shape for n, shape in header.shapes.items() if _NAME.fullmatch(n)}, spec, where)
        if not entries:
            problems.append(Problem("the file holds no tensor", where))
        if problems:
            raise InputError(problems)
        state, finite = _tensors(handle, entries)
    problems = ([] if finite else non_finite(state, where)) + untrained(state, where)
    if problems:
        raise InputError(problems)


def _unpaired(shapes: Mapping[str, tuple[int, ...]], spec: AdapterSpec, where: str) -> list[Problem]:
    """Modules whose factors are not A (r, in) and B (out, r), with a magnitude (out,) under DoRA."""
    paths = {found["path"] for name in shapes if (found := _NAME.fullmatch(name))}
    problems = []
    for path in sorted(paths):
        rank = spec.rank_for(path)
        a, b = (shapes.get(tensor_name(path, p)) for p in ("lora_A", "lora_B"))
        magnitude = shapes.get(tensor_name(path, "lora_magnitude_vector"))
        fits = a is not None and b is not None and len(a) == len(b) == 2 and a[0] == b[1] == rank
        if not fits or (magnitude is not None) != spec.use_dora or (magnitude and b and magnitude != b[:1]):
            expected = f"A ({rank}, in), B (out, {rank})" + (", magnitude (out,)" if spec.use_dora else "")
            parts = {"A": a, "B": b, **({"magnitude": magnitude} if spec.use_dora or magnitude else {})}
            got = ", ".join(f"{name} {shape or 'missing'}" for name, shape in parts.items())
            problems.append(Problem("the factors do not fit together", f"{where}: {path}", expected, got))
    return problems


def _config_text(config: Mapping[str, Any]) -> bytes:
    import json

    return json.dumps(config, indent=2, sort_keys=True, allow_nan=False).encode("utf-8")


def _verify(path: Path, state: Mapping[str, Tensor], where: Path) -> None:
    from safetensors.torch import load_file

    read = load_file(path)
    if set(read) != set(state) or not all(torch.equal(read[name], state[name]) for name in state):
        raise TunegateError(
            "the file does not read back as written", where=str(where), fix="check the disk, then save again"
        )


def _verify_config(path: Path, injection: Injection, where: Path) -> None:
    """The written config must select the trained modules, each with its rank and scale, and nothing else."""
    read, spec = spec_from_config(read_config(path), str(where)), injection.spec
    selected = {name for name in injection.names if read.selects(name, False)}
    same = selected == set(injection.modules) and all(
        read.rank_for(name) == spec.rank_for(name) and read.scale_for(name) == spec.scale_for(name) for name in selected
    )
    if not same or read.use_dora != spec.use_dora:
        raise TunegateError(
            "the config does not describe the adapter", where=str(where), fix="report this: nothing was written"
        )


def _expected(targets: Mapping[str, nn.Module], spec: AdapterSpec) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for path, layer in targets.items():
        sizes, rank = features(layer), spec.rank_for(path)
        assert sizes is not None  # find_targets returns only layers that have sizes
        shapes[tensor_name(path, "lora_A")] = (rank, sizes[0])
        shapes[tensor_name(path, "lora_B")] = (sizes[1], rank)
        if spec.use_dora:
            shapes[tensor_name(path, "lora_magnitude_vector")] = (sizes[1],)
    return shapes


@contextlib.contextmanager
def _open(folder: Path) -> Iterator[tuple[BinaryIO, bytes, int]]:
    """The tensors' file, open, the bytes of its header, and its size."""
    path = folder / TENSORS
    if not path.is_file():
        pickled = (folder / "adapter_model.bin").is_file()
        fix = "it holds a pickle (adapter_model.bin), which is never read: save it again with PEFT" if pickled else ""
        raise InputError("no such file", where=str(path), fix=fix or "give the folder of a complete adapter")
    with path.open("rb") as handle:
        yield handle, header_text(handle, path), os.fstat(handle.fileno()).st_size


@contextlib.contextmanager
def _opened(folder: Path) -> Iterator[tuple[BinaryIO, Header]]:
    """The tensors' file, open, and what its header says, without reading data."""
    with _open(folder) as (handle, text, size):
        yield handle, _parsed(text, size, folder)


def _parsed(text: bytes, size: int, folder: Path) -> Header:
    return Header.of(parse_header(text, size, folder / TENSORS))


def _tensors(handle: BinaryIO, entries: Mapping[str, TensorEntry]) -> tuple[dict[str, Tensor], bool]:
    """Every tensor in fp32, and whether it is known already that all values are finite. One read into memory of our
    own: a mapped file could change after it was checked."""
    if not entries:
        return {}, True
    start, end = min(e.start for e in entries.values()), max(e.end for e in entries.values())
    data = np.empty(end - start, np.uint8)
    read_into(handle.fileno(), data.data, start, handle.name)
    state = {}
    for name, entry in entries.items():
        part, dtype = data[entry.start - start : entry.end - start], DTYPES[entry.dtype]
        if (entry.start - start) % dtype.itemsize:
            part = part.copy()  # a tensor's bytes may begin anywhere
        state[name] = torch.from_numpy(part).view(dtype).view(entry.shape).to(torch.float32)
    single = data.size > 0 and all(entry.dtype == "F32" for entry in entries.values())
    values = data.view(np.float32) if single else None  # extremes tell of NaN and infinity, in one go
    return state, values is not None and bool(np.isfinite(values.max()) and np.isfinite(values.min()))


def _coverage(
    expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]], where: str
) -> list[Problem]:
    """Missing, surplus and misshapen tensors, by name."""
    surplus = sorted(set(found) - set(expected))
    missing = sorted(set(expected) - set(found))
    problems = [
        Problem("wrong shape", f"{where}: {name}", str(list(expected[name])), str(list(found[name])), _OTHER_BASE)
        for name in sorted(set(found) & set(expected))
        if expected[name] != found[name]
    ]
    problems += [
        Problem("a tensor is missing", f"{where}: {name}", str(list(expected[name])), "nothing", _OTHER_BASE)
        for name in missing
    ]
    for name in surplus:
        fix = _explain(name) or nearest(name, missing, n=1) or _OTHER_BASE
        problems.append(
            Problem("no adapted module takes this tensor", f"{where}: {name}", got=str(list(found[name])), fix=fix)
        )
    return problems


def _explain(name: str) -> str:
    if "lora_embedding_" in name:
        return "adapters on embeddings are not supported: train without them"
    if "trainable_tokens" in name:
        return "trained token embeddings are not supported: train without them"
    if "lora_magnitude_vector" in name:
        return "a DoRA tensor: is use_dora set in adapter_config.json?"
    if ".lora_" not in name:
        return "a full weight, not an adapter: save without modules_to_save, trained biases or embedding layers"
    return ""


def _wrong_types(entries: Mapping[str, TensorEntry], where: str) -> list[Problem]:
    return [
        Problem("wrong type", f"{where}: {name}", " or ".join(DTYPES), entry.dtype)
        for name, entry in sorted(entries.items())
        if entry.dtype not in DTYPES
    ]


def non_finite(tensors: Mapping[str, Tensor], where: str) -> list[Problem]:
    return [
        Problem(
            "values that are not finite",
            f"{where}: {name}",
            "finite values",
            _count_bad(tensor),
            "train it again: the training diverged, or the file was changed",
        )
        for name, tensor in sorted(tensors.items())
        if not _finite(tensor)
    ]


def _finite(tensor: Tensor) -> bool:
    # a sum is several times faster, and finite only if all of it is; a sum too large proves nothing
    return math.isfinite(float(tensor.sum())) or bool(torch.isfinite(tensor).all())


def _count_bad(tensor: Tensor) -> str:
    bad = int((~torch.isfinite(tensor)).sum())
    return f"{bad} of {tensor.numel()} are NaN or infinite"


def untrained(state: Mapping[str, Tensor], where: str) -> list[Problem]:
    factors: Iterable[Tensor] = (t for name, t in state.items() if name.endswith(".lora_B.weight"))
    if any(bool(tensor.any()) for tensor in factors):
        return []
    what = "every lora_B is zero, so the adapter does nothing"
    return [Problem(what, where, fix="train it; pass allow_untrained=True where a fresh adapter is meant")]
