"""Reading: every row comes back as a value or a problem, and whole-file faults are one clear error."""

from __future__ import annotations

import csv
import gzip
import json
import math
import sys
import tempfile
import types
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tunegate.data.forms import load_examples
from tunegate.data.read import open_source, read_source
from tunegate.data.rows import JsonError, RawRow, excerpt, parse_json
from tunegate.errors import InputError
from tunegate.files import hash_file

TEXT_ENDINGS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".jsonl.gz", ".json.gz", ".csv.gz")


def rows_of(folder: Path, name: str, data: bytes | str) -> list[RawRow]:
    (folder / name).write_bytes(data.encode("utf-8") if isinstance(data, str) else data)
    return list(read_source(name, base_dir=folder))


def whole_file_error(folder: Path, name: str, data: bytes | str) -> str:
    with pytest.raises(InputError) as caught:
        rows_of(folder, name, data)
    assert name in str(caught.value)
    return str(caught.value)


def test_json_lines_keep_line_numbers_over_blank_lines(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, "a.jsonl", '{"a": 1}\r\n\n  \n{"a": "x\u2028y"}')
    assert [(row.source, row.line, row.value) for row in rows] == [
        ("a.jsonl", 1, {"a": 1}),
        ("a.jsonl", 4, {"a": "x\u2028y"}),
    ]


@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "a.json", "A.JSONL"])
def test_json_lines_under_every_ending_and_zipped(tmp_path: Path, name: str) -> None:
    data = b'{"a": 1}\n{"a": 2}\n'
    assert [row.value for row in rows_of(tmp_path, name, data)] == [{"a": 1}, {"a": 2}]
    assert [row.value for row in rows_of(tmp_path, name + ".gz", gzip.compress(data))] == [{"a": 1}, {"a": 2}]


@pytest.mark.parametrize(
    ("bad", "what", "got"),
    [
        ('{"a": 1,}', "column", "1,}"),
        ('{"a" 1}', "column 6", '{"a" 1}'),
        ('{"a": 1} {"b": 2}', "Extra data at column 10", '{"b": 2}'),
        ('{"a": {"b": 1, "b": 2}}', "the key 'b' stands twice", ""),
        ('{"a": NaN}', "NaN is not JSON", ""),
        ('{"a": -Infinity}', "-Infinity is not JSON", ""),
        ('{"a": 1e999}', "too large", "1e999"),
        ('{"a": ' + "9" * 5000 + "}", "not usable JSON" if sys.version_info >= (3, 10, 7) else "", ""),
        ('{"a": "\\ud800"}', "surrogate", ""),
        ('{"\\udfff": 1}', "surrogate", ""),
        ("[1, 2]", "not a JSON object", "a list"),
        ('"text"', "not a JSON object", "a str"),
        ("null", "not a JSON object", "NoneType"),
        ("[" * 20_000, "nested deeper", ""),
        ("[" * 20_000 + "]" * 20_000, "nested deeper", ""),
        ('{"a":' * 20_000 + "1" + "}" * 20_000, "nested deeper", ""),
        ('{"a": ' + "[" * 100 + "]" * 100 + "}", "nested deeper", ""),
    ],
)
def test_a_bad_line_is_a_problem_beside_good_ones(tmp_path: Path, bad: str, what: str, got: str) -> None:
    rows = rows_of(tmp_path, "a.jsonl", f'{{"a": 1}}\n{bad}\n{{"a": 3}}\n')
    assert [row.line for row in rows] == [1, 2, 3]
    assert [rows[0].value, rows[2].value] == [{"a": 1}, {"a": 3}]
    problem = rows[1].problem
    assert rows[1].value is None and problem is not None
    assert problem.where == "a.jsonl:2"
    assert what in problem.what
    assert got in problem.got
    assert len(str(problem)) < 400


def test_the_column_of_a_bad_line_points_at_the_fault(tmp_path: Path) -> None:
    (row,) = rows_of(tmp_path, "a.jsonl", '{"prompt": "p", "completion": oops}')
    assert row.problem is not None
    assert "at column 31" in row.problem.what  # counted by hand: the o of oops
    assert "oops}" in row.problem.got


def test_nesting_up_to_the_limit_is_read() -> None:
    assert parse_json("[" * 100 + "]" * 100) is not None
    with pytest.raises(JsonError):
        parse_json("[" * 101 + "]" * 101)


def test_a_json_array_gives_the_line_of_each_element(tmp_path: Path) -> None:
    text = '\n[\n  {"a": "]},{"},\n  {\n    "a": 2\n  }, {"a": 3}\n]\n'
    rows = rows_of(tmp_path, "a.json", text)
    assert [(row.line, row.value) for row in rows] == [(3, {"a": "]},{"}), (4, {"a": 2}), (6, {"a": 3})]


def test_a_bad_array_element_does_not_hide_the_rest(tmp_path: Path) -> None:
    deep = "[" * 20_000 + "]" * 20_000
    rows = rows_of(tmp_path, "a.json", f'[{{"a": 1}},\n{{"a": }},\n{deep},\n7,\n{{"a": 1 "b": 2}},\n{{"a": 5}}]')
    assert [row.line for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [row.value for row in rows] == [{"a": 1}, None, None, None, None, {"a": 5}]


@pytest.mark.parametrize(
    ("text", "good", "what"),
    [
        ('[{"a": 1}, {"a": 2}', 1, "not closed"),
        ('[{"a": 1}, {"a": "cut', 1, "not closed"),
        ('[{"a": 1},]', 1, "missing beside a comma"),
        ('[,{"a": 1}]', 1, "missing beside a comma"),
        ('[{"a": 1}] {"a": 2}', 1, "after the array"),
        ('[{"a": 1}}', 1, "after the array"),
    ],
)
def test_a_malformed_array_is_reported(tmp_path: Path, text: str, good: int, what: str) -> None:
    rows = rows_of(tmp_path, "a.json", text)
    assert [row.value for row in rows if row.value is not None] == [{"a": 1}] * good
    assert [row.problem.what for row in rows if row.problem and what in row.problem.what]


def test_an_array_of_only_quotes_is_scanned_once(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, "a.json", '["' + '\\"' * 300_000)
    assert len(rows) == 1 and rows[0].problem is not None


def test_a_wrapped_list_is_told_how_to_unwrap(tmp_path: Path) -> None:
    message = whole_file_error(tmp_path, "a.json", '{\n "version": 1,\n "data": [\n  {"a": 1}\n ]\n}\n')
    assert "jq -c '.data[]' a.json" in message


def test_csv_with_quotes_and_line_ends(tmp_path: Path) -> None:
    text = 'text,label\n"two\nlines, ""quoted""",a\n\nplain,b\n'
    rows = rows_of(tmp_path, "a.csv", text)
    assert [(row.line, row.value) for row in rows] == [
        (2, {"text": 'two\nlines, "quoted"', "label": "a"}),
        (5, {"text": "plain", "label": "b"}),
    ]
    assert [row.value for row in rows_of(tmp_path, "a.tsv", "x\ty\n1\t2,3\n")] == [{"x": "1", "y": "2,3"}]


def test_csv_problems_per_row(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, "a.csv", 'text,label\none\na,b,c\n"x"y,z\ngood,one\n"never closed,a\nmore,b\n')
    assert [row.line for row in rows] == [2, 3, 4, 5, 6]
    assert rows[3].value == {"text": "good", "label": "one"}
    whats = [row.problem.what if row.problem else "" for row in rows]
    assert whats[0] == whats[1] == "wrong number of cells"
    assert "not valid CSV" in whats[2]
    assert "lines 6 to 7 read as one row" in whats[4]


def test_a_long_csv_cell_is_read_and_the_limit_restored(tmp_path: Path) -> None:
    before = csv.field_size_limit()
    long = "word " * 100_000
    assert rows_of(tmp_path, "a.csv", f"text,label\n{long},a\n")[0].value == {"text": long, "label": "a"}
    assert csv.field_size_limit() == before


def test_csv_headers(tmp_path: Path) -> None:
    assert "'a' stands twice" in whole_file_error(tmp_path, "a.csv", "a,b,a\n1,2,3\n")
    assert "save it with commas" in whole_file_error(tmp_path, "b.csv", "text;label\nx;y\n")
    assert ".tsv" in whole_file_error(tmp_path, "c.csv", "text\tlabel\nx\ty\n")
    assert "no rows" in whole_file_error(tmp_path, "d.csv", "text,label\n")


@pytest.mark.parametrize(
    ("name", "data", "say"),
    [
        ("a.jsonl", b"", ["empty (0 bytes)"]),
        ("a.jsonl", b" \n\n", ["empty (white space only)"]),
        ("a.json", b"[]", ["no rows"]),
        ("a.jsonl", '{"a": 1}'.encode("utf-16"), ["UTF-16", "iconv -f UTF-16 -t UTF-8 a.jsonl"]),
        ("a.jsonl", '{"a": 1}'.encode("utf-16-le"), ["UTF-16LE", "iconv"]),
        ("a.jsonl", '{"a": 1}'.encode("utf-16-be"), ["UTF-16BE", "iconv"]),
        ("a.jsonl", '{"a": 1}'.encode("utf-32"), ["UTF-32", "iconv"]),
        ("a.jsonl", b'{"a": 1}\n{"a": "caf\xe9"}\n', ["0xe9 at offset 19 (line 2)", "iconv"]),
        ("a.jsonl", b'\xef\xbb\xbf{"a": "caf\xe9"}', ["0xe9 at offset 13 (line 1)"]),
        ("a.jsonl", b'{"a": 1}\n\x00\x01\x02', ["binary", "zero byte at offset 9"]),
        ("a.jsonl", gzip.compress(b'{"a": 1}'), ["gzip", ".gz"]),
        ("a.csv", b"PK\x03\x04rest", ["zip or Excel"]),
        ("a.jsonl.gz", gzip.compress(b'{"a": 1}' * 1000)[:-12], ["cut off"]),
        ("a.jsonl.gz", b'{"a": 1}', ["not a sound gzip file"]),
        ("a.parquet", b"PAR1 but not really", ["not a sound Parquet file"]),
        ("a.xlsx", b"PK", ["unknown kind of file", ".jsonl", ".parquet", "datasets:", "got: .xlsx"]),
        ("a.txt", b"hello", ["unknown kind of file", '{"text": ...}']),
        ("a", b"hello", ["no extension"]),
    ],
)
def test_whole_file_errors_say_what_and_the_way_out(tmp_path: Path, name: str, data: bytes, say: list[str]) -> None:
    message = whole_file_error(tmp_path, name, data)
    for words in say:
        assert words in message


def test_a_byte_order_mark_is_accepted(tmp_path: Path) -> None:
    assert rows_of(tmp_path, "a.jsonl", b'\xef\xbb\xbf{"a": 1}')[0].value == {"a": 1}
    assert rows_of(tmp_path, "a.csv", b"\xef\xbb\xbfa,b\n1,2\n")[0].value == {"a": "1", "b": "2"}


def test_missing_files_and_folders(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text("{}")
    with pytest.raises(InputError, match=r"did you mean 'train\.jsonl'"):
        read_source("trian.jsonl", base_dir=tmp_path)
    with pytest.raises(InputError, match="no such folder"):
        read_source("nowhere/train.jsonl", base_dir=tmp_path)
    (tmp_path / "data.jsonl").mkdir()
    with pytest.raises(InputError, match="a folder, not a file"):
        read_source("data.jsonl", base_dir=tmp_path)
    with pytest.raises(InputError, match=r"name a file in it: train\.jsonl"):
        read_source(str(tmp_path), base_dir=tmp_path)
    with pytest.raises(InputError):
        read_source("nul\0byte.jsonl", base_dir=tmp_path)


def test_the_hash_is_the_files(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"a": 1}')
    opened = open_source("a.jsonl", base_dir=tmp_path)
    assert opened.hash == hash_file(tmp_path / "a.jsonl")


def test_parquet_rows(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table(
        {
            "messages": [[{"role": "user", "content": "q"}], None],
            "score": [math.nan, 1.5],
            "label": [1, 2],
        }
    )
    pq.write_table(table, tmp_path / "a.parquet")
    rows = list(read_source("a.parquet", base_dir=tmp_path))
    assert [(row.line, row.value) for row in rows] == [
        (1, {"messages": [{"role": "user", "content": "q"}], "score": None, "label": 1}),
        (2, {"messages": None, "score": 1.5, "label": 2}),
    ]
    whole = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "b.parquet").write_bytes(whole[:-20])
    with pytest.raises(InputError, match="not a sound Parquet file"):
        list(read_source("b.parquet", base_dir=tmp_path))
    pq.write_table(table.slice(0, 0), tmp_path / "c.parquet")
    with pytest.raises(InputError, match="no rows"):
        list(read_source("c.parquet", base_dir=tmp_path))


class FakeDataset:
    """What :mod:`tunegate.data.columnar` uses of ``datasets.Dataset``."""

    def __init__(self, rows: list[dict[str, Any]], features: dict[str, Any], split: str = "train"):
        self.rows, self.features, self.split, self._fingerprint = rows, features, split, "abc123"

    def __iter__(self) -> Any:
        return iter([dict(row) for row in self.rows])


class FakeLabel:
    """Stands in for ``datasets.ClassLabel``."""

    def int2str(self, number: int) -> str:
        return ["no", "yes"][number]


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> types.SimpleNamespace:
    """``datasets`` replaced by a record of how it was called: importing the real one takes seconds."""
    calls: list[tuple[Any, ...]] = []
    train = FakeDataset([{"text": "a", "label": 1}, {"text": "b", "label": -1}], {"label": FakeLabel(), "text": None})
    fake = types.SimpleNamespace(
        calls=calls,
        DatasetDict=dict,
        ClassLabel=FakeLabel,
        result={"train": train, "test": FakeDataset([{"text": "t", "label": 0}], {"text": None})},
    )

    def load_dataset(*arguments: Any, **keywords: Any) -> Any:
        calls.append((arguments, keywords))
        if isinstance(fake.result, Exception):
            raise fake.result
        return fake.result

    fake.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", fake)  # type: ignore[arg-type]
    return fake


def test_a_datasets_address(tmp_path: Path, library: types.SimpleNamespace) -> None:
    opened = open_source("datasets:owner/name:config#train", base_dir=tmp_path)
    assert opened.hash == "hf:abc123"
    assert [(row.line, row.value) for row in opened.rows] == [
        (1, {"text": "a", "label": "yes"}),  # the class's name, as the dataset gives it
        (2, {"text": "b", "label": None}),
    ]
    assert library.calls == [(("owner/name", "config"), {})]


def test_datasets_splits_are_never_guessed(tmp_path: Path, library: types.SimpleNamespace) -> None:
    with pytest.raises(InputError, match=r"several splits(.|\n)*train, test(.|\n)*datasets:name#train"):
        open_source("datasets:name", base_dir=tmp_path)
    with pytest.raises(InputError, match="did you mean 'train'"):
        open_source("datasets:name#trian", base_dir=tmp_path)
    library.result = {"only": library.result["train"]}
    assert len(list(read_source("datasets:name", base_dir=tmp_path))) == 2
    library.result = library.result["only"]
    with pytest.raises(InputError, match="no split 'test'"):
        open_source("datasets:name#test", base_dir=tmp_path)


def test_datasets_errors(tmp_path: Path, library: types.SimpleNamespace) -> None:
    library.result = ConnectionError("Couldn't reach 'x' on the Hub\nsecond line")
    with pytest.raises(InputError, match=r"ConnectionError: Couldn't reach 'x' on the Hub\n(.|\n)*offline"):
        open_source("datasets:x", base_dir=tmp_path)
    for address in ("datasets:", "datasets:./nowhere"):
        with pytest.raises(InputError, match=r"no dataset named|no such folder"):
            open_source(address, base_dir=tmp_path)


def test_real_datasets_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "train.csv").write_text("text,label\na,x\nb,y\n")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    opened = open_source("datasets:set#train", base_dir=tmp_path)
    assert opened.hash.startswith("hf:")
    assert [row.value for row in opened.rows] == [{"text": "a", "label": "x"}, {"text": "b", "label": "y"}]
    datasets.Dataset.from_list([{"text": "c"}]).save_to_disk(str(tmp_path / "saved"))
    assert [row.value for row in read_source("datasets:saved", base_dir=tmp_path)] == [{"text": "c"}]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
OBJECTS = st.lists(st.dictionaries(st.text(), JSON, max_size=5), min_size=1, max_size=6)


@given(OBJECTS, st.booleans(), st.sampled_from(["lines", "array", "indented"]))
@settings(max_examples=70)
def test_what_json_writes_is_read_back(rows: list[dict[str, Any]], escape: bool, layout: str) -> None:
    def dump(value: Any, indent: int | None = None) -> str:
        return json.dumps(value, ensure_ascii=escape, indent=indent)

    with tempfile.TemporaryDirectory() as folder:
        if layout == "lines":
            read = rows_of(Path(folder), "a.jsonl", "".join(dump(row) + "\n" for row in rows))
            assert [row.line for row in read] == list(range(1, len(rows) + 1))
        else:
            read = rows_of(Path(folder), "a.json", dump(rows, 1 if layout == "indented" else None))
    assert [row.value for row in read] == rows
    assert all(row.problem is None for row in read)


CELLS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))


@given(st.lists(st.lists(CELLS, min_size=2, max_size=2), min_size=1, max_size=6), st.sampled_from([",", "\t"]))
@settings(max_examples=100)
def test_what_csv_writes_is_read_back(cells: list[list[str]], delimiter: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        name = "a.csv" if delimiter == "," else "a.tsv"
        with (Path(folder) / name).open("w", encoding="utf-8", newline="") as handle:
            writer = csv.writer(handle, delimiter=delimiter, quoting=csv.QUOTE_ALL)
            writer.writerows([["first", "second"], *cells])
        read = list(read_source(name, base_dir=Path(folder)))
    assert [row.value for row in read] == [{"first": a, "second": b} for a, b in cells]


PIECES = st.lists(
    st.sampled_from(
        [
            b"{",
            b"}",
            b"[",
            b"]",
            b'"',
            b",",
            b":",
            b"\\",
            b"\n",
            b'{"text": "a", "label": "b"}',
            b"text,label\n",
            b"\xff",
        ]
    )
    | st.binary(max_size=6),
    max_size=25,
).map(b"".join)


@given(PIECES | st.binary(max_size=80), st.sampled_from([*TEXT_ENDINGS, ".parquet"]), st.booleans())
@example(b'["\\', ".json", False)
@example(b'{"a":1}\n{', ".json", False)
@example(b'"', ".csv", False)
@settings(max_examples=300)
def test_garbage_is_an_input_error_or_a_problem(data: bytes, ending: str, zipped: bool) -> None:
    if ending.endswith(".gz") and zipped:
        data = gzip.compress(data)
    with tempfile.TemporaryDirectory() as folder:
        try:
            rows = rows_of(Path(folder), "a" + ending, data)
        except InputError as error:
            assert error.problems
            return
        assert all((row.value is None) != (row.problem is None) for row in rows)
        try:
            loaded = load_examples(["a" + ending], base_dir=Path(folder))
        except InputError:
            return
        assert loaded.rows == len(rows) == len(loaded.examples) + len({problem.where for problem in loaded.bad})


def test_excerpts_are_short_and_on_one_line() -> None:
    assert excerpt("a\nb") == "'a\\nb'"
    assert excerpt("x" * 100, 10) == "'xxxxxxxxxx'..."
    assert len(excerpt({"k": "v" * 1000})) <= 63
