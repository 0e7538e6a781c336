"""Records come back as they were written or not at all; files are whole or absent; refusals of the disk are clear."""

from __future__ import annotations

import errno
import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunegate import files, records
from tunegate.errors import InputError, Problem, TunegateError, collecting, nearest
from tunegate.records import AdapterCard, Comparison, Decision, EvalRecord, RuleResult, RunRecord, Score

SCORE = Score("accuracy", 0.5, 10, 0.2, 0.8, 0.9)
EVALUATION = EvalRecord(
    subject="adapter",
    split="test",
    primary="accuracy",
    scores={"accuracy": SCORE},
    stop_rate=1.0,
    items_path="test/adapter.items.jsonl",
    hashes={"base": "b3:00"},
    settings={"prompt": "as_is", "temperature": 0.0},
    seconds=1.5,
    generated_tokens=42,
)
RUN = RunRecord(
    **{"config_hash": "b3:1", "method": "lora", "steps": 3, "epochs": 1.0, "best_step": 3, "best_score": 0.5},
    **{"train_loss": 0.1, "valid_loss": None, "stopped_early": False, "trainable_parameters": 8},
    **{"base_parameters": 80, "tokens": 9, "computed_tokens": 8, "target_tokens": 4, "seconds": 2.0},
    **{"tokens_per_second": 4.5, "peak_rss_bytes": 1, "device": "cpu", "compute_dtype": "float32", "path": "packed"},
)
COMPARISON = Comparison("accuracy", "base", 0.1, -0.1, 0.3, 10, 0.5, 2, 1, 7)
DECISION = Decision("ship", [RuleResult("min_score", "pass", "0.4", "0.5", "It reaches 0.4.")], "b3:2")
CARD = AdapterCard(
    **{"name": "käse", "base": {"name": "x"}, "adapter": {}, "data": {"rows": {"train": 3}}, "template": {}},
    **{"config": {"train": {"lr": 1e-3}}, "origins": {"train.lr": "default"}, "run": RUN},
    **{"evaluations": [EVALUATION], "comparisons": [COMPARISON], "decision": DECISION, "test_openings": []},
    **{"versions": {"torch": "2"}, "git": None, "created": "2024-01-01T00:00:00+00:00"},
)


@pytest.mark.parametrize("record", [SCORE, EVALUATION, RUN, COMPARISON, DECISION, CARD], ids=lambda r: type(r).__name__)
def test_a_record_comes_back_as_it_was_saved(tmp_path: Path, record: Any) -> None:
    records.save(tmp_path / "r.json", record)
    assert records.load(tmp_path / "r.json", type(record)) == record


def test_the_score_of_an_evaluation_is_that_of_its_primary_metric() -> None:
    assert EVALUATION.score is SCORE


def change(path: Path, edit: Any) -> None:
    data = json.loads(path.read_text())
    edit(data)
    path.write_text(json.dumps(data))


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (lambda d: d.update(schema="Decision/2"), "expected: Decision/1"),
        (lambda d: d.pop("schema"), "got: None"),
        (lambda d: d.update(schema="Score/1"), "got: Score/1"),
        (lambda d: d.update(mood="good"), "unknown field 'mood'"),
        (lambda d: d.pop("verdict"), "missing field 'verdict'"),
        (lambda d: d["rules"][0].update(mood="good"), "unknown field 'rules.0.mood'"),
        (lambda d: d["rules"][0].pop("got"), "missing field 'rules.0.got'"),
        (lambda d: d.update(rules=3), "field 'rules' has a wrong value"),
        (lambda d: d.update(verdict=1), "field 'verdict' has a wrong value"),
    ],
)
def test_a_record_of_another_shape_is_refused(tmp_path: Path, edit: Any, says: str) -> None:
    path = tmp_path / "decision.json"
    records.save(path, DECISION)
    change(path, edit)
    with pytest.raises(InputError) as error:
        records.load(path, Decision)
    assert says in str(error.value)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("text", ["", "[1", "3", "null", "[]", "\x00", "[" * 20_000])
def test_a_damaged_record_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "decision.json"
    path.write_text(text)
    with pytest.raises(InputError, match=str(path)):
        records.load(path, Decision)


def test_a_missing_record_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="No such file"):
        records.load(tmp_path / "none.json", Decision)


# --- files -------------------------------------------------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
).filter(lambda value: "\\ud" not in json.dumps(value))


@given(JSON)
def test_equal_json_has_one_hash(value: Any) -> None:
    again = json.loads(json.dumps(value))
    assert files.hash_json(again) == files.hash_json(value)
    assert json.loads(files.canonical_json(value)) == value


def test_key_order_does_not_change_a_hash_and_values_do() -> None:
    assert files.hash_json({"a": 1, "b": 2}) == files.hash_json({"b": 2, "a": 1})
    assert files.hash_json({"a": 1}) != files.hash_json({"a": 2})
    with pytest.raises(ValueError):
        files.hash_json(float("nan"))


@pytest.mark.parametrize("data", [b"", b"tunegate", b"x" * 300_000])
def test_a_file_and_its_bytes_have_one_hash(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "f").write_bytes(data)
    assert files.hash_file(tmp_path / "f") == files.hash_bytes(data)


@given(st.binary(max_size=300), st.integers(0, 300), st.integers(0, 300))
def test_a_part_of_a_file_is_hashed_piece_by_piece(tmp_path_factory: Any, data: bytes, start: int, end: int) -> None:
    """Pieces of 16 bytes, the last one short or whole; a part beyond the end is an error."""
    path = tmp_path_factory.mktemp("digest") / "f"
    path.write_bytes(data)
    start, end = sorted((start, end))
    with pytest.MonkeyPatch.context() as patch, path.open("rb") as handle:
        patch.setattr(files, "_PIECE", 16)
        if end > len(data) and end > start:
            with pytest.raises(InputError, match="became shorter"):
                files.digest(handle.fileno(), start, end, path)
        else:
            found = files.digest(handle.fileno(), start, end, path)
            assert f"b3:{found}" == files.hash_bytes(data[start:end])


_HASH = """
import resource, sys
from tunegate import files
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
files.hash_file(sys.argv[1])
before = peak()
files.hash_file(sys.argv[2])
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="sizes of resident memory as Linux counts them")
def test_hashing_holds_two_pieces_of_a_file_and_not_the_file(tmp_path: Path) -> None:
    small, large = tmp_path / "small", tmp_path / "large"
    small.write_bytes(b"x" * 2_000_000)
    with large.open("wb") as handle:
        handle.truncate(400 << 20)  # a file of holes
    command = [sys.executable, "-c", _HASH, str(small), str(large)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert int(done.stdout) < 3 * files._PIECE


def test_the_hash_is_blake3() -> None:
    """The empty input of the BLAKE3 paper's test vectors."""
    empty = "b3:af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262"
    assert files.hash_bytes(b"") == empty


def test_a_write_replaces_the_file_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "f.txt"
    files.write_text(path, "one")
    files.write_text(path, "zwei ä")
    assert path.read_text(encoding="utf-8") == "zwei ä"
    assert list(path.parent.iterdir()) == [path]
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failed_write_leaves_the_old_file(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "f.txt"
    path.write_text("old")
    with pytest.raises(error), files.atomic_path(path) as temporary:
        temporary.write_text("half")
        raise error
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_update_writes_only_what_changed(tmp_path: Path) -> None:
    path = tmp_path / "f.json"
    assert files.update_json(path, {"a": 1})
    before = path.stat().st_mtime_ns
    assert not files.update_json(path, {"a": 1})
    assert path.stat().st_mtime_ns == before
    assert files.update_json(path, {"a": 2})
    path.write_text("{")
    assert files.update_json(path, {"a": 2})
    assert files.read_json(path) == {"a": 2}


def test_jsonl_comes_back(tmp_path: Path) -> None:
    rows = [{"a": "ä\n"}, {"b": [1, None]}]
    files.write_jsonl(tmp_path / "f.jsonl", rows)
    assert files.read_jsonl(tmp_path / "f.jsonl") == rows


def test_temporaries_go_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / ".tmp-x").write_text("")
    (tmp_path / ".tmp-d" / "inside").mkdir(parents=True)
    (tmp_path / "a" / "kept").write_text("")
    files.remove_temporaries(tmp_path)
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["a", "kept"]


def test_home_is_the_users_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNEGATE_HOME", "~/somewhere")
    assert files.home() == Path.home() / "somewhere"
    monkeypatch.setenv("TUNEGATE_HOME", "")
    assert files.home() == Path.home() / ".cache" / "tunegate"
    monkeypatch.delenv("TUNEGATE_HOME")
    assert files.home() == Path.home() / ".cache" / "tunegate"


# --- what the disk refuses ---------------------------------------------------------------------------------------


def refuse(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def fsync(fd: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fsync)


@pytest.mark.parametrize(
    ("number", "says"),
    [
        (errno.ENOSPC, "free some space"),
        (errno.EDQUOT, "quota"),
        (errno.EROFS, "read-only"),
        (errno.EACCES, "permissions"),
        (errno.EIO, "disk"),
    ],
)
def test_a_refusal_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, says: str) -> None:
    path = tmp_path / "f.txt"
    path.write_text("old")
    refuse(monkeypatch, number)
    with pytest.raises(TunegateError) as error:
        files.write_text(path, "new")
    assert error.value.exit_code == 1
    assert len(error.value.problems) == 1
    problem = error.value.problems[0]
    assert (problem.where, problem.what) == (str(path), f"cannot write: {os.strerror(number)}")
    assert says in problem.fix
    assert "`output:`" in problem.fix
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_the_way_out_fits_the_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNEGATE_HOME", str(tmp_path))
    refuse(monkeypatch, errno.ENOSPC)
    with pytest.raises(TunegateError, match="point TUNEGATE_HOME at another folder") as error:
        files.write_text(tmp_path / "cache" / "f", "x")
    assert "output" not in str(error.value)


def test_other_errors_pass_through(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), files.explain_os_error(tmp_path):
        (tmp_path / "none").read_text()


def test_a_file_where_a_folder_is_needed(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("")
    with pytest.raises(TunegateError, match="a part of the path is a file"):
        files.write_text(tmp_path / "f" / "x" / "g", "x")
    with pytest.raises(TunegateError, match="a folder stands where a file is needed"):
        files.write_text(tmp_path, "x")


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(TunegateError, match="change the permissions"):
            files.write_text(tmp_path / "f", "x")
    finally:
        tmp_path.chmod(0o700)


def test_a_full_disk_inside_safetensors_is_the_same_error(tmp_path: Path) -> None:
    """safetensors reports the system's error as text; here a limit on file sizes stands for the disk's end."""
    code = f"""
import resource, torch
from pathlib import Path
from tunegate.engine.checkpoint import TrainState, save_checkpoint
from tunegate.errors import TunegateError
parameters = {{"w": torch.nn.Parameter(torch.zeros(100_000))}}
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
folder = Path({str(tmp_path)!r})
try:
    save_checkpoint(folder, "key", TrainState(), parameters, torch.optim.AdamW(parameters.values()))
except TunegateError as error:
    print(error)
print(list(folder.iterdir()))
"""
    pytest.importorskip("resource")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    first, *_, last = done.stdout.splitlines()
    assert first.startswith(str(tmp_path)) and first.endswith(f": cannot write: {os.strerror(errno.EFBIG)}")
    assert last == "[]"


def test_a_really_full_disk(tmp_path: Path) -> None:
    """A file system of 64 KiB, where the system lets a user have one."""
    unshare = shutil.which("unshare")
    mount = ["-Urm", "sh", "-c", 'mount -t tmpfs -o size=64k none "$0" && exec "$@"', str(tmp_path)]
    if not unshare or subprocess.run([unshare, *mount, "true"], capture_output=True, check=False).returncode:
        pytest.skip("no file system of one's own here")
    code = f"""
from pathlib import Path
from tunegate.errors import TunegateError
from tunegate.files import write_text
path = Path({str(tmp_path)!r}) / "f"
write_text(path, "old")
try:
    write_text(path, "new" * 100_000)
except TunegateError as error:
    print(error)
print(path.read_text(), [p.name for p in path.parent.iterdir()])
"""
    command = [unshare, *mount, sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    first, *_, last = done.stdout.splitlines()
    assert first == f"{tmp_path / 'f'}: cannot write: {os.strerror(errno.ENOSPC)}"
    assert last == "old ['f']"


# --- errors ------------------------------------------------------------------------------------------------------


def test_a_problem_says_what_where_expected_got_and_the_way_out() -> None:
    text = str(Problem("wrong", "f.yaml:3", "a", "b\nc", "mend it"))
    assert text == "f.yaml:3: wrong\n    expected: a\n    got: b c\n    fix: mend it"
    assert str(Problem("wrong")) == "wrong"


def test_many_problems_fit_on_one_screen() -> None:
    short = str(InputError([Problem(f"p{n}") for n in range(100)]))
    assert short.endswith("p19\n... and 80 more of 100")
    long = InputError([Problem(f"p{n}", "w", "e", "g" * 5000, "f") for n in range(100)])
    assert len(str(long).splitlines()) <= 25
    assert str(long).endswith("more of 100")
    assert len(long.problems) == 100
    assert max(map(len, str(long).splitlines())) < 520


def test_collecting_goes_on_and_passes_other_errors() -> None:
    problems: list[Problem] = []
    with collecting(problems):
        raise InputError([Problem("a"), Problem("b")])
    with collecting(problems):
        pass
    assert [p.what for p in problems] == ["a", "b"]
    with pytest.raises(ValueError), collecting(problems):
        raise ValueError


def test_the_nearest_names() -> None:
    assert nearest("q_prj", ["q_proj", "k_proj", "zzz"]).startswith("did you mean 'q_proj'")
    assert nearest("xyz", ["q_proj"]) == ""
