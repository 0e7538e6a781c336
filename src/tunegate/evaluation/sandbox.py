"""Run Python code that a model wrote, in a process of its own with limits, and say whether its tests passed.

The child runs ``python -I`` in an empty temporary folder with an empty environment. Before the code it lowers its own
limits (CPU seconds, address space, file size, open files, no core dump) and installs an audit hook that refuses
sockets, new processes, signals to others, ``ctypes`` and opening files to write. The parent kills the whole process
group when the time is up. A pass is a token that only the driver is told, written after the last test.

This stops accidents: endless loops, memory, stray files, network. It is no wall against code that means to break
out; for that, run tunegate in a container without a network. Where the system has no resource limits, nothing is run.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass

from tunegate.errors import InputError

SECONDS = 5.0  # wall clock of one item's tests
MEMORY = 512 << 20  # bytes of address space
OUTPUT = 1 << 16  # bytes a child may write, its own output included
SHOWN = 400  # characters of an error that are kept

_DRIVER = r"""
import json, os, resource, sys
given = json.loads(sys.stdin.read())
for name, value in given["limits"].items():
    if hasattr(resource, name):
        resource.setrlimit(getattr(resource, name), (value, value))
out = os.dup(1)
refused = ("socket.", "subprocess.", "os.system", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "os.kill",
           "os.killpg", "signal.pthread_kill", "ctypes.", "os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.chmod",
           "os.chown", "os.link", "os.symlink", "os.truncate", "shutil.", "ftplib.", "urllib.", "pty.")
def watch(event, arguments):
    if event.startswith(refused):
        raise PermissionError("not allowed here: " + event)
    if event == "open":
        mode, flags = arguments[1], arguments[2] or 0
        if (mode and any(c in mode for c in "wax+")) or flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            raise PermissionError("not allowed here: writing files")
sys.addaudithook(watch)
def judge(given, run=exec, build=compile, write=os.write, leave=os._exit, kind=type, text=str):
    token, space = given.pop("token"), {"__name__": "answer"}  # names here are out of the code's sight
    tests = [build(test, "test", "exec") for test in given["tests"]]
    try:
        run(build(given["code"], "answer", "exec"), space)
        for test in tests:
            run(test, {**space})
    except BaseException as error:
        write(out, ("\nfailed " + kind(error).__name__ + ": " + text(error)[:400]).encode("utf-8", "replace"))
        leave(1)
    write(out, ("\npassed " + token).encode())
    leave(0)
taken, given = given, None
judge(taken)
"""


@dataclass(frozen=True)
class Ran:
    """``passed`` is True if every test ran without an error; ``reason`` says why not."""

    passed: bool
    reason: str = ""


def check_available() -> None:
    """:class:`InputError` where code cannot be run under limits."""
    try:
        import resource  # noqa: F401
    except ImportError:
        raise InputError(
            "code that a model wrote cannot be run here: the system has no resource limits",
            fix="leave out the items with the check 'python' (the set code_run), or use Linux or macOS",
        ) from None


def run_tests(code: str, tests: Sequence[str], *, seconds: float = SECONDS, memory: int = MEMORY) -> Ran:
    """Run ``code`` and then each of ``tests`` (Python statements) in its names. ``memory`` in bytes."""
    check_available()
    token = secrets.token_hex(16)
    limits = {
        "RLIMIT_CPU": max(1, round(seconds)),
        "RLIMIT_AS": memory,
        "RLIMIT_FSIZE": OUTPUT,
        "RLIMIT_NOFILE": 32,
        "RLIMIT_CORE": 0,
    }
    given = json.dumps({"limits": limits, "token": token, "code": code, "tests": list(tests)})
    with tempfile.TemporaryDirectory(prefix="tunegate-code-") as folder, tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _DRIVER],
            stdin=subprocess.PIPE,
            stdout=output,  # a file, not a pipe: its size is limited and reading it cannot block
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env={"PATH": "", "LANG": "C.UTF-8"},
            start_new_session=True,
        )
        try:
            process.communicate(given.encode("utf-8"), timeout=seconds)
        except subprocess.TimeoutExpired:
            return Ran(False, f"longer than {seconds:g} s")
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):  # the group of a child that has ended
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        output.seek(0)
        said = output.read(2 * OUTPUT).decode("utf-8", "replace")
    if process.returncode == 0 and said.endswith("passed " + token):
        return Ran(True)
    if "\nfailed " in said:
        return Ran(False, said[said.rindex("\nfailed ") + 8 :][:SHOWN])
    return Ran(False, f"the process ended with {process.returncode}")
