"""What every test shares: threads, the cache folder, hypothesis settings and a tiny base.

Tests see an empty ``TUNEGATE_HOME`` of their own. Tests marked ``real_base`` keep the user's, so that the packaged
base is unpacked once per machine, and may use every core.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import settings

from tiny import tiny_base

pytest_plugins = ["registry_fixtures"]

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

settings.register_profile("tunegate", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("tunegate")

_USER_HOME = os.environ.get("TUNEGATE_HOME")
_USER_THREADS = os.environ.get("OMP_NUM_THREADS")
_TEST_HOME = tempfile.mkdtemp(prefix="tunegate-test-home-")


def pytest_configure(config: pytest.Config) -> None:
    """``make sanitize`` must not run on other kernels than those it built."""
    if os.environ.get("TUNEGATE_SANITIZED"):
        from tunegate.kernels import native

        library = native.library()
        if library is None or b"__asan_init" not in Path(str(library.__file__)).read_bytes():
            raise pytest.UsageError(f"these kernels are not built with the sanitizers: {native.describe()}")


def pytest_unconfigure(config: pytest.Config) -> None:
    shutil.rmtree(_TEST_HOME, ignore_errors=True)


def _set(name: str, value: str | None) -> None:
    if value is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = value


def _use_threads(count: int) -> None:
    """Tiny tensors are fastest on one thread; a number the user has chosen stands. Subprocesses inherit it."""
    if _USER_THREADS is None:
        os.environ["OMP_NUM_THREADS"] = str(count)
        if "torch" in sys.modules:
            sys.modules["torch"].set_num_threads(count)


_use_threads(1)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Runs before the test's fixtures, so that those of wider scope see the same environment."""
    real = item.get_closest_marker("real_base") is not None
    _set("TUNEGATE_HOME", _USER_HOME if real else _TEST_HOME)
    _use_threads((os.cpu_count() or 1) if real else 1)


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny random Llama (see ``tiny.py``). Shared: read it, do not write to it."""
    return tiny_base(tmp_path_factory.mktemp("base") / "tiny-llama", "llama")
