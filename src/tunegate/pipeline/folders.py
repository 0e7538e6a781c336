"""Where a run lies, which steps are done, and who opened the test set.

::

    runs/NAME/
      ledger.json              every opening of a test set, by any run of this name
      latest.json              the newest run's folder
      baseline-KEY/            the base's scores, per prompt, on validation items; shared by runs with equal inputs
      run-KEY/                 one run; KEY is a hash of everything that went in, gate policy included
        run.json policy.json check.json
        train/ test/ decision.json adapter/

A step is done when its folder holds ``step.json`` with the key of its inputs; that file is written last. Another
key means that an input changed, and the step runs again. Changing the policy changes the run's key, so it makes a
new run. One process works in ``runs/NAME`` at a time.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tunegate.errors import InputError, TunegateError
from tunegate.files import explain_os_error, held, read_json, remove_temporaries, write_json

STEP = "step.json"


def short(key: str) -> str:
    """The part of a content hash that names a folder."""
    return key.removeprefix("b3:")[:10]


def is_done(folder: Path, key: str) -> bool:
    """Whether the step in ``folder`` was completed for exactly these inputs."""
    try:
        return bool(read_json(folder / STEP)["key"] == key)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def begin(folder: Path, *, keep: bool = False) -> None:
    """Make ``folder`` ready for a step that is not done; what lies there goes, unless ``keep``."""
    with explain_os_error(folder):
        if folder.exists() and not keep:
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / STEP).unlink(missing_ok=True)


def finish(folder: Path, key: str, **facts: Any) -> None:
    """Mark the step in ``folder`` as done; written last."""
    write_json(folder / STEP, {"key": key, **facts})


def now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


@contextlib.contextmanager
def owned(root: Path) -> Iterator[None]:
    """Hold ``root`` for this process and remove what a killed one left half-written; one that still runs there is an
    error, a dead one is not."""
    fix = "wait for it, or give this run another `output:`"
    busy = TunegateError("another tunegate process is working in this run folder", where=str(root), fix=fix)
    with held(root / ".lock", busy, stays=True):  # a run that has nothing to do changes nothing
        remove_temporaries(root)
        yield


class Ledger:
    """Openings of test sets, oldest first, in ``runs/NAME/ledger.json``. Entries are only ever added or completed."""

    def __init__(self, root: Path):
        self.path = root / "ledger.json"

    def entries(self) -> list[dict[str, Any]]:
        if not self.path.exists():
            return []
        try:
            found = read_json(self.path)
        except (ValueError, RecursionError):
            found = None
        keys = {"run", "test", "opened", "reason", "completed"}
        if not isinstance(found, list) or not all(isinstance(e, dict) and keys <= e.keys() for e in found):
            raise InputError(
                "the ledger of test openings is damaged", where=str(self.path), fix="restore it from a backup"
            )
        return found

    def open(self, run: str, test_hash: str, reason: str | None) -> None:
        """Record an opening before any test item is scored.

        An opening of the same run that was cut off goes on. A completed one is final: scoring again needs
        ``reason``, which is recorded.
        """
        entries = self.entries()
        mine = [e for e in entries if e["run"] == run and e["test"] == test_hash]
        if mine and not mine[-1]["completed"]:
            return
        if mine and not reason:
            raise InputError(
                "the test set was already opened by this run",
                where=f"{self.path}: {mine[-1]['opened']}",
                expected="one opening per run",
                fix='--reopen-test "WHY" opens it again; the reason is recorded on the card',
            )
        entry = {"run": run, "test": test_hash, "opened": now(), "reason": reason, "completed": None}
        write_json(self.path, [*entries, entry])

    def close(self, run: str, test_hash: str) -> None:
        """The opening's scores are on disk. One that was closed before stays as it is."""
        entries = self.entries()
        mine = [e for e in entries if e["run"] == run and e["test"] == test_hash]
        if mine and not mine[-1]["completed"]:
            mine[-1]["completed"] = now()
            write_json(self.path, entries)

    def of(self, test_hash: str) -> list[dict[str, Any]]:
        """Every opening of this test set, by whichever run."""
        return [e for e in self.entries() if e["test"] == test_hash]


def newest_differs(root: Path, task: Mapping[str, Any]) -> str:
    """In what the settings of the newest run in ``root`` are not those of ``task``, for a message that there is no run
    of these; empty without a run."""
    try:
        name = str(read_json(root / "latest.json")["run"])
        there = _flat(read_json(root / name / "run.json")["task"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return ""
    here = _flat(task)
    keys = [key for key in {**there, **here} if there.get(key) != here.get(key)]
    told = [f"{key}={json.dumps(there.get(key))} (here {json.dumps(here.get(key))})" for key in keys]
    return f"the newest run, {name}, has {', '.join(told) or 'other data, base or version'}"


def _flat(task: Mapping[str, Any]) -> dict[str, Any]:
    """``section.key`` to value. Where a task keeps its files changes no run."""
    sections = {name: part if isinstance(part, dict) else {"": part} for name, part in task.items()}
    pairs = {f"{name}.{key}".rstrip("."): value for name, part in sections.items() for key, value in part.items()}
    return {key: value for key, value in pairs.items() if key not in ("name", "output", "registry")}


def task_folder(run: Path, noted: str | None, output: str | None) -> Path | None:
    """Where the relative paths of ``run``'s task start: the usual place of runs tells, also after a move, else what the
    run ``noted``. ``output`` is the task's setting. None if neither is there."""
    if run.resolve().parent.parent.name == "runs" and not output:
        return run.resolve().parents[2]
    return Path(noted) if noted and Path(noted).is_dir() else None


def git_state(folder: Path) -> str | None:
    """The commit of the repository ``folder`` lies in, ``-dirty`` with uncommitted changes; None outside git."""
    import subprocess

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10, check=False,
                env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},
            )  # fmt: skip
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit = git("rev-parse", "HEAD")
    return f"{commit}-dirty" if commit and git("status", "--porcelain", "--untracked-files=no") else commit
