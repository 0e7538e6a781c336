"""The thread pool, through the bindings. Each case runs in a process of its own: a hang is a failure in a minute."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tunegate.kernels import native

pytestmark = pytest.mark.skipif(native.describe()[0] == "twins", reason="needs the compiled kernels")

PREAMBLE = """
import importlib.util, os, random, signal, sys, threading, time
spec = importlib.util.spec_from_file_location("_native", sys.argv[1])  # without torch, which takes seconds to import
lib = importlib.util.module_from_spec(spec)
spec.loader.exec_module(lib)

def total(outer, inner):
    got, count = lib._test_nested_tasks(outer, inner, -1), outer * inner
    assert got == count * (count - 1) // 2, (outer, inner, got)
"""


def run(body: str) -> None:
    library = native.library()
    assert library is not None and library.__file__ is not None
    program = PREAMBLE + body + "\nprint('done')"
    finished = subprocess.run(
        [sys.executable, "-c", program, library.__file__], capture_output=True, text=True, timeout=60
    )
    assert finished.returncode == 0 and finished.stdout.endswith("done\n"), finished.stderr


def test_every_task_runs_once_while_thread_counts_change():
    run("""
random.seed(1)
for _ in range(3000):
    lib.set_threads(random.choice([1, 2, 3, 8]))
    total(random.randrange(40), random.randrange(4))
    if random.random() < 0.02:
        time.sleep(0.002)  # the workers fall asleep
lib.set_threads(0)
assert lib.threads() == 1
lib.set_threads(10**6)
assert lib.threads() == 256
""")


def test_several_python_threads_at_once():
    run("""
failures = []
def caller(seed):
    own = random.Random(seed)
    try:
        for _ in range(500):
            lib.set_threads(own.choice([1, 2, 4]))
            total(own.randrange(30), 3)
    except BaseException as error:
        failures.append(error)
threads = [threading.Thread(target=caller, args=(k,)) for k in range(5)]
[t.start() for t in threads]
[t.join() for t in threads]
assert not failures, failures
""")


def test_children_of_fork_start_over():
    run("""
lib.set_threads(3)
stop = False
def busy():
    while not stop:
        total(20, 3)
other = threading.Thread(target=busy)  # holds the pool's locks at most forks
other.start()
for _ in range(20):
    total(50, 2)
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        for _ in range(50):
            total(50, 2)
        grandchild = os.fork()
        if grandchild == 0:
            total(50, 2)
            os._exit(0)
        os._exit(0 if os.waitpid(grandchild, 0)[1] == 0 else 1)
    assert os.waitpid(child, 0)[1] == 0
stop = True
other.join()
total(50, 2)
""")


def test_a_task_that_fails_is_an_error_and_the_pool_goes_on():
    run("""
for threads in (1, 2, 4):
    lib.set_threads(threads)
    for failing in list(range(8)) * 50:
        try:
            lib._test_nested_tasks(8, 3, failing)
        except MemoryError:
            pass
        else:
            raise AssertionError("no error")
        total(8, 3)
""")
