"""The canonical bytes of an adapter's file: the hash of what they hold, whatever way it lies in the file."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tunegate.adapter.canonical import Header, content_hash, read_canonical
from tunegate.errors import InputError
from tunegate.files import read_scattered
from tunegate.model.weights import read_header

CONFIG = {"peft_type": "LORA", "r": 4, "target_modules": ["b", "a"]}
KINDS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
tensors = st.dictionaries(
    st.text("abcäz.019", max_size=9).map("n".__add__),  # `..` is refused
    st.tuples(st.sampled_from(sorted(KINDS)), st.lists(st.integers(1, 7), max_size=2)),
    max_size=8,
)


def write(path: Path, state: dict[str, torch.Tensor]) -> None:
    """A safetensors file with the tensors in this order."""
    header: dict[str, Any] = {}
    data = b""
    for name, tensor in state.items():
        raw = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        kind = next(k for k, dtype in KINDS.items() if dtype == tensor.dtype)
        header[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def canonical_of(path: Path, memory: Any = None) -> Any:
    with path.open("rb") as handle:
        return read_canonical(handle, Header.of(read_header(path)), CONFIG, memory)


@settings(max_examples=60, deadline=None)
@given(tensors, st.randoms(use_true_random=False))
def test_any_order_and_precision_gives_the_hash_of_the_values(tmp_path_factory, made, dice) -> None:
    path = tmp_path_factory.mktemp("c") / "x"
    state = {name: torch.randn(shape).to(KINDS[kind]) for name, (kind, shape) in made.items()}
    names = list(state)
    dice.shuffle(names)
    write(path, {name: state[name] for name in names})
    found = canonical_of(path)
    values = {name: tensor.float() for name, tensor in state.items()}
    assert found.hash() == content_hash(CONFIG, values)
    assert all(torch.equal(found.tensor(name), value) for name, value in values.items())
    assert canonical_of(path, found.data.copy()).hash() == found.hash()  # in memory that held something else


def test_every_flipped_bit_of_the_data_is_another_hash(tmp_path: Path) -> None:
    path = tmp_path / "x"
    write(path, {"b": torch.ones(3), "a": torch.ones(2, 2)})
    right, whole = canonical_of(path).hash(), path.read_bytes()
    begin = 8 + struct.unpack("<Q", whole[:8])[0]
    for at in range(begin, len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        assert canonical_of(path).hash() != right


def test_many_views_are_filled_in_turn_and_a_short_file_is_told(tmp_path: Path) -> None:
    path = tmp_path / "x"
    data = bytes(range(256)) * 30
    path.write_bytes(b"ahead" + data)
    sizes = [n % 7 for n in range(2200)]  # more than one call takes, some of them empty
    room = bytearray(sum(sizes))
    views, at = [], 0
    for size in sizes:
        views.append(memoryview(room)[at : at + size])
        at += size
    with path.open("rb") as handle:
        read_scattered(handle.fileno(), views, 5, path)
        assert bytes(room) == data[: len(room)]
        with pytest.raises(InputError, match="became shorter"):
            read_scattered(handle.fileno(), [memoryview(bytearray(40))], 5 + len(data) - 39, path)
