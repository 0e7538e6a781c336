"""Rows of columnar sources: Parquet files and the ``datasets`` library.

A row is a dict of its columns; its line is its number, counted from 1. A NaN cell is a missing cell, as pandas
writes it, and a class number becomes the name that the dataset gives it.

It runs no code that comes with a dataset, and copies none into memory whole.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tunegate.data.rows import JsonError, RawRow, bad_row, check_value
from tunegate.errors import InputError, nearest

DATASETS_PREFIX = "datasets:"


def _column_row(value: dict[str, Any], source: str, line: int) -> RawRow:
    value = {key: None if isinstance(v, float) and math.isnan(v) else v for key, v in value.items()}
    try:
        check_value(value)
    except JsonError as error:
        return bad_row(source, line, error.what, got=error.got)
    return RawRow(source, line, value)


def parquet_rows(path: Path, source: str) -> Iterator[RawRow]:
    """Rows of a Parquet file, read batch by batch. InputError if it is broken, here or at the broken page."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    def broken(error: Exception) -> InputError:
        return InputError(f"not a sound Parquet file: {_first_line(error)}", where=source, fix="write it again")

    try:
        file = pq.ParquetFile(path)
        names = list(file.schema_arrow.names)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise broken(error) from error
    if len(set(names)) != len(names):
        raise InputError("a column name stands twice", where=source, got=", ".join(names)[:200])

    def rows() -> Iterator[RawRow]:
        line = 0
        with file:
            try:
                for batch in file.iter_batches(batch_size=1024):
                    for value in batch.to_pylist():
                        line += 1
                        yield _column_row(value, source, line)
            except (pa.ArrowException, OSError, ValueError) as error:
                raise broken(error) from error

    return rows()


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]}"


def open_dataset(source: str, base_dir: Path) -> tuple[str, Iterator[RawRow]]:
    """Rows of ``datasets:NAME[:CONFIG][#SPLIT]`` and its fingerprint as ``hf:...``. Remote code never runs."""
    address, _, split = source[len(DATASETS_PREFIX) :].partition("#")
    folder = base_dir / Path(address).expanduser()
    local = bool(address) and folder.exists()
    if not address or (address.startswith((".", "~", os.sep)) and not local):
        what = "no such folder" if address else "no dataset named"
        raise InputError(what, where=source, expected="datasets:NAME[:CONFIG][#SPLIT]", got=str(folder))
    import datasets

    try:
        if local and any((folder / name).is_file() for name in ("state.json", "dataset_dict.json")):
            data = datasets.load_from_disk(str(folder))  # a folder written by save_to_disk
        else:
            name, _, config = (str(folder), "", "") if local else address.partition(":")
            data = datasets.load_dataset(name, config or None)
    except Exception as error:  # the library's errors share no base class
        fix = "check name and config; offline, only datasets already in the cache and local folders can be read"
        raise InputError(f"the dataset cannot be loaded: {_first_line(error)}", where=source, fix=fix) from error
    if isinstance(data, datasets.DatasetDict):
        splits = list(data)
        split = split or (splits[0] if len(splits) == 1 else "")
        if split not in data:
            what = f"no split {split!r}" if split else "the dataset has several splits"
            fix = nearest(split, splits) or f"add the split: {source.partition('#')[0]}#{splits[0]}"
            raise InputError(what, where=source, expected=f"one of {', '.join(splits)}", fix=fix)
        data = data[split]
    elif split and split != str(data.split):
        raise InputError(f"no split {split!r}", where=source, expected=f"{data.split}, or no split named")
    return f"hf:{data._fingerprint}", _dataset_rows(data, source)


def _dataset_rows(data: Any, source: str) -> Iterator[RawRow]:
    import datasets

    labels = {name: kind for name, kind in data.features.items() if isinstance(kind, datasets.ClassLabel)}
    try:
        for line, value in enumerate(data, 1):
            for name, kind in labels.items():  # the dataset's own name of a class, not its number
                number = value[name]
                value[name] = kind.int2str(number) if isinstance(number, int) and number >= 0 else None
            yield _column_row(value, source, line)
    except Exception as error:  # decoders of images and sound raise what they like
        fix = "remove columns that are not text before"
        raise InputError(f"a row cannot be read: {_first_line(error)}", where=source, fix=fix) from error
