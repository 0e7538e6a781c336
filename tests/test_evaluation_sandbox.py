"""Code of a model's: what passes, what fails, what it must not do and how long it may take."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tunegate.evaluation.sandbox import run_tests

ADD = "def add(a, b):\n    return a + b\n"


def test_right_and_wrong_code() -> None:
    assert run_tests(ADD, ["assert add(2, 3) == 5", "assert add(0, 0) == 0"]).passed
    failed = run_tests(ADD, ["assert add(2, 3) == 6"])
    assert not failed.passed and failed.reason.startswith("AssertionError")
    assert "NameError" in run_tests("x = 1", ["assert y"]).reason
    assert "SyntaxError" in run_tests("def f(:", ["f()"]).reason
    assert "ZeroDivisionError" in run_tests("1 / 0", ["pass"]).reason


def test_ordinary_modules_work() -> None:
    code = "import math, collections, itertools, re, json, random, datetime, functools\nx = math.sqrt(16)"
    assert run_tests(code, ["assert x == 4"]).passed


def test_a_loop_is_stopped_and_the_next_item_runs() -> None:
    started = time.monotonic()
    found = run_tests("while True: pass", ["pass"], seconds=1.0)
    assert not found.passed
    assert time.monotonic() - started < 20
    assert run_tests(ADD, ["assert add(1, 1) == 2"]).passed


def test_sleeping_is_stopped_by_the_clock() -> None:
    found = run_tests("import time\ntime.sleep(60)", ["pass"], seconds=1.0)
    assert not found.passed and found.reason == "longer than 1 s"


def test_memory_is_limited() -> None:
    found = run_tests("x = bytearray(2 << 30)", ["pass"])
    assert not found.passed and "MemoryError" in found.reason


@pytest.mark.parametrize(
    "code",
    [
        "import socket\nsocket.socket()",
        "import urllib.request\nurllib.request.urlopen('http://127.0.0.1:9')",
        "import os\nos.system('true')",
        "import subprocess\nsubprocess.run(['true'])",
        "import os\nos.fork()",
        "import os\nos.execv('/bin/true', ['true'])",
        "import os\nos.kill(os.getppid(), 0)",
        "import ctypes\nctypes.CDLL(None)",
        "open('left.txt', 'w')",
        "import os\nos.open('left.txt', os.O_WRONLY | os.O_CREAT)",
        "from pathlib import Path\nPath('left.txt').write_text('x')",
        "import shutil\nshutil.rmtree('.')",
        "import os\nos.remove('x')",
        "import os\nos.mkdir('x')",
    ],
)
def test_what_code_may_not_do(code: str) -> None:
    found = run_tests(code, ["pass"])
    assert not found.passed
    assert "not allowed here" in found.reason


@pytest.mark.parametrize(
    "code",
    [
        "import os\nos._exit(0)",
        "raise SystemExit(0)",
        "import sys\nsys.exit()",
        "import os\nos.write(1, b'\\npassed ')\nos._exit(0)",
        "import os\nfor fd in (1, 3):\n    try: os.write(fd, b'passed')\n    except OSError: pass\nos._exit(0)",
        "import __main__, os\nos.write(1, ('passed ' + __main__.token).encode())\nos._exit(0)",
        "import __main__, os\nos.write(1, ('passed ' + __main__.given['token']).encode())\nos._exit(0)",
        "import builtins\nbuiltins.exec = builtins.compile = lambda *a: None",
        "print('passed')",
        "import signal, os\nsignal.raise_signal(signal.SIGKILL)",
        "import sys\nsys.setrecursionlimit(10**9)\ndef f(): f()\nf()",
    ],
)
def test_ending_early_or_shouting_is_no_pass(code: str) -> None:
    assert not run_tests(code, ["assert False"]).passed


def test_code_sees_neither_the_environment_nor_this_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("A_SECRET_KEY", "value")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here.txt").write_text("x", encoding="utf-8")
    code = "import os\nseen = dict(os.environ)\nfiles = os.listdir('.')"
    assert run_tests(code, ["assert 'A_SECRET_KEY' not in seen", "assert files == []"]).passed


def test_the_folder_is_gone_afterwards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    run_tests(ADD, ["pass"])
    assert list(tmp_path.iterdir()) == []


def test_tests_do_not_see_each_other_s_names() -> None:
    assert not run_tests("y = 1", ["z = 2", "assert z == 2"]).passed


def test_output_is_limited() -> None:
    assert not run_tests("print('x' * (1 << 20))\nraise ValueError", ["pass"]).passed
