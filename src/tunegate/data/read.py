"""Rows as they stand in a file, each with the line it came from.

A text file is opened whole: its bytes are checked for encoding before the first row is handed on, so that a
file of the wrong kind is one error and not a thousand. After that every row is handed on, the ones that cannot be
read with a problem in place of a value. Blank lines are the only lines that make no row.

It does not know what the fields of a row mean: ``forms`` does.
"""

from __future__ import annotations

import codecs
import contextlib
import csv
import gzip
import io
import re
import threading
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from tunegate.data.columnar import DATASETS_PREFIX, open_dataset, parquet_rows
from tunegate.data.rows import JsonError, RawRow, bad_row, excerpt, json_row, parse_json
from tunegate.errors import InputError, nearest
from tunegate.files import hash_file

MAX_TEXT_BYTES = 4 << 30  # a small .gz can unpack to more than the memory holds
KINDS = {
    ".jsonl": "lines",
    ".ndjson": "lines",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
}
SUPPORTED = ".jsonl, .ndjson, .json, .csv, .tsv (each also with .gz), .parquet, or datasets:NAME[:CONFIG][#SPLIT]"


@dataclass(frozen=True)
class OpenSource:
    """A source that passed the whole-file checks: its content hash and its rows, to be read once."""

    source: str
    hash: str
    rows: Iterator[RawRow]


def read_source(source: str, *, base_dir: Path) -> Iterator[RawRow]:
    """The rows of ``source``; see :func:`open_source`."""
    return open_source(source, base_dir=base_dir).rows


def check_source(source: str, *, base_dir: Path) -> None:
    """:class:`InputError` for a file that is not there, empty or of no known kind; addresses are not looked up."""
    if not source.startswith(DATASETS_PREFIX):
        _kind(base_dir / Path(source).expanduser(), source)


def open_source(source: str, *, base_dir: Path) -> OpenSource:
    """Open a file (relative to ``base_dir``) or a ``datasets:NAME[:CONFIG][#SPLIT]`` address.

    Raises :class:`InputError` for what is wrong with the whole file: here, or while the rows are read where the
    file format shows it only then (Parquet pages, a file without a single row).
    """
    if source.startswith(DATASETS_PREFIX):
        fingerprint, dataset_rows = open_dataset(source, base_dir)
        return OpenSource(source, fingerprint, _at_least_one(dataset_rows, source))
    path = base_dir / Path(source).expanduser()
    kind, zipped = _kind(path, source)
    rows: Iterable[RawRow]
    if kind == "parquet":
        rows = parquet_rows(path, source)
    else:
        text = _decode(_read_bytes(path, zipped, source), source)
        if kind in ("csv", "tsv"):
            rows = _csv_rows(text, source, "," if kind == "csv" else "\t")
        elif kind == "json":
            rows = _json_rows(text, source)
        else:
            rows = _json_lines(text, source)
    return OpenSource(source, hash_file(path), _at_least_one(rows, source))


# Whole-file checks


def _kind(path: Path, source: str) -> tuple[str, bool]:
    """The reader for a path and whether it is gzipped; InputError if it cannot be one of ours."""
    try:
        if path.is_dir():
            inside = sorted(p.name for p in path.iterdir() if p.is_file() and _suffix(p.name)[0] in KINDS)
            raise InputError(
                "this is a folder, not a file",
                where=source,
                fix=f"name a file in it: {', '.join(inside[:5])}" if inside else "name a file",
            )
        if not path.exists():
            _missing(path, source)
        if not path.is_file():
            raise InputError("not a regular file", where=source, expected="a file on disk")
        empty = path.stat().st_size == 0
    except (OSError, ValueError) as error:
        raise InputError(f"cannot be opened: {error}", where=source) from error
    suffix, zipped = _suffix(path.name)
    if suffix not in KINDS or (zipped and KINDS[suffix] == "parquet"):
        fix = 'put each text on a line of a .jsonl file as {"text": ...}' if suffix == ".txt" else ""
        raise InputError(
            "unknown kind of file", where=source, expected=SUPPORTED, got=suffix or "no extension", fix=fix
        )
    if empty:
        raise InputError("the file is empty (0 bytes)", where=source)
    return KINDS[suffix], zipped


def _suffix(name: str) -> tuple[str, bool]:
    name = name.lower()
    zipped = name.endswith(".gz")
    return Path(name[:-3] if zipped else name).suffix, zipped


def _missing(path: Path, source: str) -> NoReturn:
    if not path.parent.is_dir():
        raise InputError("no such folder", where=str(path.parent), fix=f"check the path of {source!r}")
    names = sorted(p.name for p in path.parent.iterdir())
    near = nearest(path.name, names) or f"{path.parent} holds: {', '.join(names[:8]) or 'nothing'}"
    raise InputError("no such file", where=source, fix=near)


def _read_bytes(path: Path, zipped: bool, source: str) -> bytearray:
    data = bytearray()
    try:
        with gzip.open(path) if zipped else path.open("rb") as handle:
            while chunk := handle.read(1 << 20):
                data += chunk
                if len(data) > MAX_TEXT_BYTES:
                    fix = "split it into several files, or use Parquet"
                    raise InputError(f"holds more than {MAX_TEXT_BYTES >> 30} GiB of text", where=source, fix=fix)
    except EOFError as error:
        raise InputError("the gzip file is cut off", where=source, fix="copy or make it again") from error
    except (gzip.BadGzipFile, zlib.error) as error:
        raise InputError(f"not a sound gzip file: {error}", where=source) from error
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror or error}", where=source) from error
    return data


_MARKS = (
    (codecs.BOM_UTF32_LE, "UTF-32"),  # before UTF-16, whose mark it starts with
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)
_MAGIC = ((b"\x1f\x8b", "gzip", ".gz"), (b"PAR1", "Parquet", ".parquet"), (b"PK\x03\x04", "zip or Excel", ""))


def _decode(data: bytearray, source: str) -> str:
    """UTF-8 text without its byte order mark, or InputError that names the encoding or the byte."""
    for mark, name in _MARKS:
        if data.startswith(mark):
            _not_utf8(f"the text is {name}", source, name)
    for magic, name, ending in _MAGIC:
        if data.startswith(magic):
            fix = f"give the file its ending {ending}" if ending else "save it as .csv or .jsonl"
            raise InputError(f"a binary file ({name}), not text", where=source, fix=fix)
    start = len(codecs.BOM_UTF8) if data.startswith(codecs.BOM_UTF8) else 0
    null = data.find(b"\0")
    if null >= 0:
        head = data[:1000]
        for first, name in ((1, "UTF-16LE"), (0, "UTF-16BE")):
            if head[first::2].count(0) * 2 > len(head[first::2]):
                _not_utf8(f"the text looks like {name}", source, name)
        raise InputError(f"a binary file, not text: zero byte at offset {null}", where=source)
    try:
        text = str(memoryview(data)[start:], "utf-8")
    except UnicodeDecodeError as error:
        offset = start + error.start
        line = data.count(b"\n", 0, offset) + 1
        _not_utf8(f"not UTF-8: byte 0x{data[offset]:02x} at offset {offset} (line {line})", source, "WINDOWS-1252")
    if not text.strip():
        raise InputError("the file is empty (white space only)", where=source)
    return text


def _not_utf8(what: str, source: str, encoding: str) -> NoReturn:
    raise InputError(
        what, where=source, expected="UTF-8", fix=f"iconv -f {encoding} -t UTF-8 {source} > utf8-{Path(source).name}"
    )


def _at_least_one(rows: Iterable[RawRow], source: str) -> Iterator[RawRow]:
    found = False
    for row in rows:
        found = True
        yield row
    if not found:
        raise InputError("the file holds no rows", where=source)


# JSON


def _json_lines(text: str, source: str) -> Iterator[RawRow]:
    # split, not splitlines: JSON texts may hold U+2028 and other line ends that are not the file's
    for line, row in enumerate(text.split("\n"), 1):
        if row.strip():
            yield json_row(row, source, line)


def _json_rows(text: str, source: str) -> Iterator[RawRow]:
    """A ``.json`` file: an array of objects, or one object a line."""
    if text.lstrip()[0] == "[":
        return _json_array(text, source)
    first = [line for line in text.split("\n", 50) if line.strip()][:2]
    if len(first) > 1 and all(json_row(line, source, 0).value is None for line in first):
        try:
            value = parse_json(text)
        except JsonError:
            return _json_lines(text, source)
        inside = [k for k, v in value.items() if isinstance(v, list)] if isinstance(value, dict) else []
        fix = f"take the list out: jq -c '.{inside[0]}[]' {source} > rows.jsonl" if inside else ""
        raise InputError(
            "one JSON value, not rows", where=source, expected="an array of objects, or one object a line", fix=fix
        )
    return _json_lines(text, source)


# A string (the closing quote optional, so that a cut-off file is scanned once) or a structural sign.
_TOKEN = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"?|[\[\]{},]', re.DOTALL)


def _json_array(text: str, source: str) -> Iterator[RawRow]:
    """Elements are cut out by counting brackets first, so that one bad element does not hide the rest."""
    start = text.index("[") + 1
    line, counted, depth, rows = 1, 0, 0, 0
    for token in _TOKEN.finditer(text, start):
        sign = token.group()[0]
        if sign in "[{":
            depth += 1
        elif sign in "]}" and depth:
            depth -= 1
        elif sign in "]}," and not depth:
            element = text[start : token.start()]
            at = start + len(element) - len(element.lstrip())
            line, counted = line + text.count("\n", counted, at), at
            if element.strip():
                yield json_row(element.strip(), source, line)
                rows += 1
            elif sign == "," or rows:
                yield bad_row(source, line, "an element is missing beside a comma")
            start = token.end()
            if sign != ",":
                if sign == "}" or text[start:].strip():
                    yield bad_row(source, line, "something stands after the array", got=excerpt(text[start - 1 :]))
                return
    line += text.count("\n", counted, start + len(text[start:]) - len(text[start:].lstrip()))
    yield bad_row(source, line, "the array is not closed: the file may be cut off", got=excerpt(text[start:].strip()))


# CSV

_FIELD_LIMIT_LOCK = threading.Lock()


@contextlib.contextmanager
def _long_fields() -> Iterator[None]:
    """The csv module refuses cells over 128 Ki characters by a limit of the whole process: lift, then restore."""
    with _FIELD_LIMIT_LOCK:
        before = csv.field_size_limit(2**31 - 1)
        try:
            yield
        finally:
            csv.field_size_limit(before)


def _csv_rows(text: str, source: str, delimiter: str) -> list[RawRow]:
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    rows: list[RawRow] = []
    with _long_fields():
        while True:
            line = reader.line_num + 1
            try:
                cells = next(reader)
            except StopIteration:
                return rows
            except csv.Error as error:
                over = f" (lines {line} to {reader.line_num} read as one row)" if reader.line_num > line else ""
                what = f"not valid CSV: {error}{over}"
                fix = 'a cell with quotes is written "like ""this"" one"'
                if header is None:
                    raise InputError(what, where=f"{source}:{line}", fix=fix) from error
                rows.append(bad_row(source, line, what, fix=fix))
                continue
            if not cells:
                continue
            if header is None:
                header = _csv_header(cells, source, line, delimiter)
            elif len(cells) != len(header):
                want = f"{len(header)} cells: {', '.join(header)}"[:80]
                got = f"{len(cells)}: {excerpt(delimiter.join(cells))}"
                fix = f"quote cells that hold {excerpt(delimiter)} or a line end"
                rows.append(bad_row(source, line, "wrong number of cells", expected=want, got=got, fix=fix))
            else:
                rows.append(RawRow(source, line, dict(zip(header, cells, strict=True))))


def _csv_header(cells: list[str], source: str, line: int, delimiter: str) -> list[str]:
    names = [cell.strip() for cell in cells]
    twice = sorted(name for name, n in Counter(names).items() if n > 1)
    if twice:
        raise InputError(f"the column {twice[0]!r} stands twice in the header", where=f"{source}:{line}")
    other = next((sign for sign in ",;\t" if sign != delimiter and sign in names[0]), None)
    if len(names) == 1 and other:
        fix = "name the file .tsv" if other == "\t" else "name the file .csv" if other == "," else "save it with commas"
        what = f"one column only, but the header holds {other!r}"
        raise InputError(what, where=f"{source}:{line}", expected=f"columns parted by {delimiter!r}", fix=fix)
    return names
