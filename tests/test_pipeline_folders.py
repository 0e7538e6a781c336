"""Steps that are done, the ledger of test openings, one process per run folder, and the state of git."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tunegate.errors import InputError, TunegateError
from tunegate.files import read_json
from tunegate.pipeline.folders import STEP, Ledger, begin, finish, git_state, is_done, owned, short

# --- steps -------------------------------------------------------------------------------------------------------


def test_a_step_is_done_for_the_inputs_it_was_finished_with(tmp_path: Path) -> None:
    folder = tmp_path / "step"
    assert not is_done(folder, "k1")
    begin(folder)
    assert not is_done(folder, "k1")
    finish(folder, "k1", adapter="b3:1")
    assert is_done(folder, "k1")
    assert not is_done(folder, "k2")
    assert read_json(folder / STEP)["adapter"] == "b3:1"


def test_a_step_that_begins_again_is_not_done(tmp_path: Path) -> None:
    folder = tmp_path / "step"
    begin(folder)
    finish(folder, "k")
    (folder / "result").write_text("x")
    begin(folder, keep=True)
    assert not is_done(folder, "k")
    assert (folder / "result").exists()
    begin(folder)
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "{}", '{"key": 1}', "\xff"])
def test_a_damaged_mark_means_not_done(tmp_path: Path, text: str) -> None:
    (tmp_path / STEP).write_text(text, encoding="latin-1")
    assert not is_done(tmp_path, "k")


def test_folder_names_are_the_beginning_of_the_hash() -> None:
    assert short("b3:0123456789abcdef") == "0123456789"


# --- ledger ------------------------------------------------------------------------------------------------------


def test_the_first_opening_is_recorded_before_it_is_completed(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    assert ledger.entries() == []
    ledger.open("run1", "test1", None)
    (entry,) = Ledger(tmp_path).entries()
    assert (entry["run"], entry["test"], entry["reason"], entry["completed"]) == ("run1", "test1", None, None)
    ledger.close("run1", "test1")
    assert ledger.entries()[0]["completed"]


def test_a_cut_off_opening_goes_on(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.open("run1", "test1", None)
    ledger.open("run1", "test1", None)
    assert len(ledger.entries()) == 1


def test_a_completed_opening_is_final(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.open("run1", "test1", None)
    ledger.close("run1", "test1")
    with pytest.raises(InputError) as error:
        ledger.open("run1", "test1", None)
    assert "already opened" in str(error.value)
    assert "--reopen-test" in str(error.value)
    ledger.open("run1", "test1", "a metric was wrong")
    assert [e["reason"] for e in ledger.entries()] == [None, "a metric was wrong"]
    assert [bool(e["completed"]) for e in ledger.entries()] == [True, False]


def test_another_run_and_another_test_set_are_their_own(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    for run, test in (("run1", "test1"), ("run2", "test1"), ("run1", "test2")):
        ledger.open(run, test, None)
        ledger.close(run, test)
    assert [(e["run"], e["test"]) for e in ledger.of("test1")] == [("run1", "test1"), ("run2", "test1")]


def test_closing_again_changes_nothing(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.close("run1", "test1")
    assert not ledger.path.exists()
    ledger.open("run1", "test1", None)
    ledger.close("run1", "test1")
    before = ledger.path.stat().st_mtime_ns
    ledger.close("run1", "test1")
    assert ledger.path.stat().st_mtime_ns == before


@pytest.mark.parametrize("text", ["", "{", "{}", "[1]", '[{"run": "a"}]', "[" * 20_000])
def test_a_damaged_ledger_is_an_error_and_is_not_overwritten(tmp_path: Path, text: str) -> None:
    ledger = Ledger(tmp_path)
    ledger.path.write_text(text)
    for use in (ledger.entries, lambda: ledger.open("r", "t", "why"), lambda: ledger.close("r", "t")):
        with pytest.raises(InputError, match="damaged"):
            use()
    assert ledger.path.read_text() == text


# --- one process a folder ----------------------------------------------------------------------------------------

HOLD = """
import sys, time
from pathlib import Path
from tunegate.pipeline.folders import owned
with owned(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no flock")
def test_a_second_process_is_kept_out_until_the_first_is_gone(tmp_path: Path) -> None:
    root = tmp_path / "runs"
    first = subprocess.Popen([sys.executable, "-c", HOLD, str(root)], stdout=subprocess.PIPE, text=True)
    try:
        assert first.stdout is not None
        assert first.stdout.readline() == "held\n"
        with pytest.raises(TunegateError, match="another tunegate process"), owned(root):
            pass
        first.send_signal(signal.SIGKILL)
        first.wait()
        with owned(root):
            pass
    finally:
        first.kill()
        first.wait()
        if first.stdout is not None:
            first.stdout.close()


def test_a_folder_is_free_again_afterwards(tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(RuntimeError), owned(tmp_path):
            raise RuntimeError
    with owned(tmp_path):
        pass


def test_what_a_killed_process_left_half_written_is_removed(tmp_path: Path) -> None:
    leftover = tmp_path / "run-1" / "train" / "checkpoints" / ".tmp-abc"
    leftover.mkdir(parents=True)
    (leftover / "state.json").write_text("{")
    (tmp_path / "run-1" / "adapter").mkdir()
    (tmp_path / "run-1" / "adapter" / ".tmp-x.safetensors").write_text("")
    (tmp_path / "run-1" / "adapter" / "card.json").write_text("{}")
    with owned(tmp_path):
        assert not list(tmp_path.rglob(".tmp-*"))
    assert (tmp_path / "run-1" / "adapter" / "card.json").exists()


def test_a_file_in_the_place_of_the_run_folder(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("")
    with pytest.raises(TunegateError, match="a file stands where a folder is needed"), owned(tmp_path / "runs"):
        pass


# --- git ---------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not shutil.which("git"), reason="no git")
def test_the_state_of_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", "/dev/null")
    assert git_state(tmp_path) is None

    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
        done = subprocess.run(["git", "-C", str(tmp_path), *identity, *arguments], capture_output=True, check=True)
        return done.stdout.decode().strip()

    git("init", "-q")
    assert git_state(tmp_path) is None  # no commit yet
    (tmp_path / "task.yaml").write_text("a")
    git("add", ".")
    git("commit", "-qm", "first")
    assert git_state(tmp_path) == git("rev-parse", "HEAD")
    (tmp_path / "other").write_text("untracked")
    assert git_state(tmp_path) == git("rev-parse", "HEAD")
    (tmp_path / "task.yaml").write_text("b")
    assert git_state(tmp_path) == git("rev-parse", "HEAD") + "-dirty"


def test_no_git_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_state(tmp_path) is None
