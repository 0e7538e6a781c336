"""Runs and merges that are killed, interrupted or out of disk, then started again: the same bytes.

Processes are forked from a server that has loaded torch and transformers, so that each costs a second instead of
ten. In a forked process the operations a run goes through (renames, flushes, events) are counted, and at the chosen
one the process kills itself with SIGKILL, which no code of ours can see coming. One test kills a plain
``python -m tunegate.cli`` from outside.
"""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from task import call, replace_line, write_task
from test_export_merge import sharded
from tunegate.files import read_json

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")

ADAPTER = "adapter/adapter_model.safetensors"
PRELOAD = ["tunegate.cli.commands", "tunegate.pipeline.run", "transformers.models.llama.modeling_llama"]


@dataclass(frozen=True)
class Point:
    """The ``nth`` time that ``operation`` happens to a path or event with ``name`` in it."""

    operation: str  # rename, flush, half (the first half of a file is written) or event
    name: str = ""
    nth: int = 1

    def __str__(self) -> str:
        return f"{self.operation} {self.name} {self.nth}"


# In the order in which a run meets them.
POINTS = [
    Point("rename", "policy.json"),
    Point("half", "as_is.json"),
    Point("event", "baseline"),
    Point("event", "step", 3),
    Point("rename", "checkpoints/step-00000004"),
    Point("event", "step", 2),
    Point("half", "state.json"),
    Point("rename", "best-"),
    Point("flush", "", 2),
    Point("rename", "checkpoints/step-00000012"),
    Point("rename", "adapter/adapter_model.safetensors"),
    Point("rename", "adapter/adapter_config.json"),
    Point("rename", "train/step.json"),
    Point("rename", "ledger.json"),
    Point("rename", "test/adapter.items.jsonl"),
    Point("rename", "test/step.json"),
    Point("rename", "ledger.json"),
    Point("half", "card.json"),
    Point("rename", "adapter/manifest.json"),
]


# --- the forked process ------------------------------------------------------------------------------------------


def _act(how: str) -> None:
    if how == "full":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    os.kill(os.getpid(), {"interrupt": signal.SIGINT, "pause": signal.SIGSTOP}.get(how, signal.SIGKILL))


def _count(point: Point | None, how: str, log: Path) -> None:
    """Act at ``point``; every operation goes to ``log``."""
    from tunegate.cli.console import Console

    seen = 0

    def met(operation: str, name: str) -> bool:
        nonlocal seen
        with log.open("a") as handle:
            handle.write(f"{operation}\t{name}\n")
        if point is None or operation != point.operation or point.name not in name:
            return False
        seen += 1
        return seen == point.nth

    def before(operation: str, original: Callable[..., Any], name_of: Callable[..., str]) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **named: Any) -> Any:
            if met(operation, name_of(*arguments, **named)):
                _act(how)
            return original(*arguments, **named)

        return wrapped

    write_bytes = Path.write_bytes

    def half(path: Path, data: bytes) -> int:
        # the temporary file's final name is known to its writer alone: the content tells records apart
        if met("half", _half_name(path, data)):
            write_bytes(path, data[: len(data) // 2])
            _act(how)
        return write_bytes(path, data)

    Path.write_bytes = half  # type: ignore[method-assign,assignment]
    Path.replace = before("rename", Path.replace, lambda _, to: str(to))  # type: ignore[method-assign]
    Path.rename = before("rename", Path.rename, lambda _, to: str(to))  # type: ignore[method-assign]
    os.fsync = before("flush", os.fsync, lambda _: "")
    Console.event = before("event", Console.event, lambda _, e: e["event"])  # type: ignore[method-assign]


def _half_name(path: Path, data: bytes) -> str:
    kinds = {
        b'"schema": "EvalRecord': "as_is.json",
        b'"state": {': "state.json",
        b'"schema": "AdapterCard': "card.json",
    }
    return next((name for text, name in kinds.items() if text in data[:200]), path.name)


def _child(arguments: list[str], point: Point | None, how: str, said: Path) -> None:
    out = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(out, 1)
    os.dup2(out, 2)
    import torch

    from tunegate.cli import main

    torch.set_num_threads(1)
    _count(point, how, said.with_suffix(".log"))
    sys.exit(main(arguments))


class Server:
    """Forks processes that run one command each."""

    def __init__(self, folder: Path):
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(PRELOAD)
        self.folder, self.number = folder, 0

    def start(self, arguments: list[str], point: Point | None, how: str) -> tuple[Any, Path]:
        """A process with this command, and where it writes what it says."""
        self.number += 1
        said = self.folder / f"{self.number}.txt"
        process = self.context.Process(target=_child, args=(arguments, point, how, said))
        process.start()
        return process, said

    def run(self, *arguments: object, point: Point | None = None, how: str = "kill") -> tuple[int, str, list[str]]:
        """Exit code (minus the signal's number if killed), what was said, and the operations met; of `run` where
        the first argument is a task."""
        command = [*(["run"] if isinstance(arguments[0], Path) else []), *map(str, arguments)]
        process, said = self.start(command, point, how)
        process.join(120)
        assert process.exitcode is not None
        log = said.with_suffix(".log")
        operations = log.read_text().splitlines() if log.exists() else []
        return process.exitcode, said.read_text(), operations


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Server:
    return Server(tmp_path_factory.mktemp("said"))


def make_task(folder: Path, base: Path) -> Path:
    task = write_task(folder, base, rows=60)
    replace_line(task, "tokens_per_step: 256", "tokens_per_step: 160")
    replace_line(task, "eval_items: 12", "eval_items: 4")
    replace_line(task, "prompt_items: 8", "prompt_items: 2")
    replace_line(task, "report: likelihood", "report: []")
    replace_line(task, "min_test_items: 5", "min_test_items: 1")
    return task


@pytest.fixture(scope="module")
def unkilled(server: Server, tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> tuple[bytes, list[str]]:
    """The adapter of a run that nobody disturbed, and the operations it went through."""
    task = make_task(tmp_path_factory.mktemp("unkilled"), tiny_llama)
    code, said, operations = server.run(task)
    assert code in (0, 1), said
    return one_run(task).joinpath(ADAPTER).read_bytes(), operations


def one_run(task: Path) -> Path:
    (run,) = (task.parent / "runs" / "task").glob("run-*")
    return run


def is_whole(task: Path, expected: bytes) -> None:
    """A finished run, as if it had never been disturbed."""
    run = one_run(task)
    assert (run / ADAPTER).read_bytes() == expected
    assert not list(task.parent.rglob(".tmp-*"))
    assert (run / "adapter" / "manifest.json").exists()
    (entry,) = read_json(run.parent / "ledger.json")
    assert entry["completed"]
    assert entry["reason"] is None
    events = [json.loads(line) for line in (run / "train" / "log.jsonl").read_text().splitlines()]
    steps = [e["step"] for e in events if e["event"] == "step"]
    assert steps == list(range(1, read_json(run / "train" / "run.json")["steps"] + 1))


# --- kills -------------------------------------------------------------------------------------------------------


def test_one_run_killed_at_every_stage(
    server: Server, unkilled: tuple[bytes, list[str]], tmp_path: Path, tiny_llama: Path
) -> None:
    """The same command again and again, each time killed a little further on."""
    task = make_task(tmp_path, tiny_llama)
    for point in POINTS:
        code, said, _ = server.run(task, point=point)
        assert code == -signal.SIGKILL, f"{point} was not met:\n{said}"
    code, said, _ = server.run(task)
    assert code in (0, 1), said
    is_whole(task, unkilled[0])


def test_a_process_killed_from_outside(
    server: Server, unkilled: tuple[bytes, list[str]], tmp_path: Path, tiny_llama: Path
) -> None:
    task = make_task(tmp_path, tiny_llama)
    command = [sys.executable, "-m", "tunegate.cli", "run", str(task)]
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(command, stdout=said, stderr=said)
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            if list(tmp_path.glob("runs/task/run-*/train/checkpoints/step-*")):
                break
            time.sleep(0.005)
        process.kill()
        assert process.wait() in (-signal.SIGKILL, 0, 1)  # on a fast machine it may have been done
    server.run(task)
    is_whole(task, unkilled[0])


@pytest.mark.slow
@pytest.mark.parametrize("point", dict.fromkeys(POINTS), ids=str)
def test_a_kill_at_one_point(
    server: Server, unkilled: tuple[bytes, list[str]], tmp_path: Path, tiny_llama: Path, point: Point
) -> None:
    task = make_task(tmp_path, tiny_llama)
    assert server.run(task, point=point)[0] == -signal.SIGKILL
    server.run(task)
    is_whole(task, unkilled[0])


@pytest.mark.slow
@pytest.mark.parametrize("operation", ["rename", "flush", "half"])
def test_a_kill_at_many_file_operations(
    server: Server, unkilled: tuple[bytes, list[str]], tmp_path: Path, tiny_llama: Path, operation: str
) -> None:
    count = sum(line.startswith(operation) for line in unkilled[1])
    assert count > 10
    for nth in range(1, count, 5):  # the first run wrote the fingerprint of the base too
        task = make_task(tmp_path / f"{nth}", tiny_llama)
        assert server.run(task, point=Point(operation, nth=nth))[0] == -signal.SIGKILL
        server.run(task)
        is_whole(task, unkilled[0])
        shutil.rmtree(task.parent)


# --- interruptions -----------------------------------------------------------------------------------------------


def test_an_interrupt_stops_after_the_step_and_the_run_goes_on(
    server: Server, unkilled: tuple[bytes, list[str]], tmp_path: Path, tiny_llama: Path
) -> None:
    task = make_task(tmp_path, tiny_llama)
    code, said, _ = server.run(task, point=Point("event", "step", 6), how="interrupt")
    assert code == 130
    assert "Traceback" not in said
    assert "stopped after step" in said
    assert "the same command goes on from there" in said
    code, said, _ = server.run(task)
    assert "resuming after step" in said
    assert code in (0, 1)
    is_whole(task, unkilled[0])


@pytest.mark.parametrize(
    "point", [Point("event", "baseline"), Point("event", "evaluation"), Point("rename", "test/base.json")], ids=str
)
def test_an_interrupt_elsewhere_stops_at_once(
    server: Server, unkilled: tuple[bytes, list[str]], tmp_path: Path, tiny_llama: Path, point: Point
) -> None:
    task = make_task(tmp_path, tiny_llama)
    code, said, _ = server.run(task, point=point, how="interrupt")
    assert code == 130
    assert "Traceback" not in said
    assert "interrupted; what was finished is kept" in said
    assert not list(tmp_path.rglob(".tmp-*"))
    server.run(task)
    is_whole(task, unkilled[0])


# --- the disk ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("point", [Point("half", "state.json"), Point("rename", "adapter_model.safetensors")], ids=str)
def test_a_full_disk_stops_the_run_and_loses_nothing(
    server: Server, unkilled: tuple[bytes, list[str]], tmp_path: Path, tiny_llama: Path, point: Point
) -> None:
    task = make_task(tmp_path, tiny_llama)
    code, said, _ = server.run(task, point=point, how="full")
    assert code == 1
    assert "cannot write: No space left on device" in said
    assert "free some space" in said
    assert "Traceback" not in said
    assert not list(tmp_path.rglob(".tmp-*"))
    server.run(task)
    is_whole(task, unkilled[0])


@pytest.mark.parametrize("place", ["run folder", "cache"])
def test_a_read_only_file_system(tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    task = make_task(tmp_path, tiny_llama)
    original = tempfile.mkstemp
    home = tmp_path / "home"
    monkeypatch.setenv("TUNEGATE_HOME", str(home))

    def mkstemp(*arguments: Any, **named: Any) -> tuple[int, str]:
        below_home = home in Path(named["dir"]).parents
        if below_home == (place == "cache"):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), named["dir"])
        return original(*arguments, **named)

    monkeypatch.setattr(tempfile, "mkstemp", mkstemp)
    said = call("run", task)
    if place == "cache":  # hashes of the base are kept where that is possible, and a run can do without
        assert said.code in (0, 1)
    else:
        assert said.code == 1
        assert said.out == ""
        assert "cannot write: Read-only file system" in said.err
        assert "`output:`" in said.err
        assert not list(tmp_path.rglob(".tmp-*"))


@pytest.mark.skipif(sys.platform != "win32" and os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder(tmp_path: Path, tiny_llama: Path) -> None:
    task = make_task(tmp_path, tiny_llama)
    tmp_path.chmod(0o500)
    try:
        said = call("run", task)
    finally:
        tmp_path.chmod(0o700)
    assert said.code == 1
    assert "cannot write: Permission denied" in said.err
    assert "change the permissions of the folder" in said.err


# --- merges ------------------------------------------------------------------------------------------------------


MERGE_POINTS = [
    Point("flush", "", 2),  # inside of the first shard
    Point("rename", "merge-progress.json"),
    Point("rename", "merge-progress.json"),
    Point("flush", "", 2),
    Point("rename", "merge.json"),
    Point("rename", "out"),
]


def shard_times(folder: Path) -> dict[str, int]:
    """When each finished shard below ``folder`` was written."""
    known = read_json(folder / "merge-progress.json")["shards"]
    return {name: (folder / name).stat().st_mtime_ns for name in known}


def test_a_merge_killed_at_every_stage(server: Server, tmp_path: Path) -> None:
    """Again and again, each time a little further on; finished shards are not written again."""
    base, adapter = sharded(tmp_path)
    code, said, _ = server.run("merge", adapter, "-o", tmp_path / "whole", "--base", base)
    assert code == 0, said
    partial, times = tmp_path / ".out.partial", dict[str, int]()
    for point in MERGE_POINTS:
        code, said, _ = server.run("merge", adapter, "-o", tmp_path / "out", "--base", base, point=point)
        assert code == -signal.SIGKILL, f"{point} was not met:\n{said}"
        assert not (tmp_path / "out").exists()
        now = shard_times(partial) if (partial / "merge-progress.json").exists() else {}
        assert now.items() >= times.items()
        times = now
    code, said, _ = server.run("merge", adapter, "-o", tmp_path / "out", "--base", base)
    assert code == 0, said
    for path in (tmp_path / "whole").iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes(), path.name
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "base", "out", "whole"]


def test_two_merges_of_one_output(server: Server, tmp_path: Path) -> None:
    """The second is told, changes nothing, and goes on from the first one's shards once that is dead."""
    base, adapter = sharded(tmp_path)
    command = ["merge", str(adapter), "-o", str(tmp_path / "out"), "--base", str(base)]
    first, said = server.start(command, Point("flush", "", 6), "pause")
    deadline = time.monotonic() + 120
    while "T (stopped)" not in Path(f"/proc/{first.pid}/status").read_text():
        assert time.monotonic() < deadline and first.is_alive(), said.read_text()
        time.sleep(0.05)
    partial = tmp_path / ".out.partial"
    before = {p.name: p.stat().st_mtime_ns for p in partial.iterdir()}
    for other in (command, ["export", str(adapter), "--to", "peft", "-o", str(tmp_path / "out"), "--base", str(base)]):
        code, told, _ = server.run(*other)
        assert code == 1 and "another process is writing this output" in told, told
    assert {p.name: p.stat().st_mtime_ns for p in partial.iterdir()} == before
    first.kill()
    first.join()
    times = shard_times(partial)
    assert times
    code, told, _ = server.run(*command)
    assert code == 0, told
    assert {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in times} == times
    code, told, _ = server.run(*command)
    assert code == 2 and "the output exists" in told
