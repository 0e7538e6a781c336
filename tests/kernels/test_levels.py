"""The kernel tests again at every other instruction-set level that this build holds and this machine can run.

A process has one level, so each runs in its own. The matrix products, where levels differ most, run at every level in
the fast tests, and bf16 attention where a level has matrix units; everything else with ``make test-all``.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tunegate.kernels import native

HERE = Path(__file__).parent
LIBRARY = native.library()
LEVELS = [] if LIBRARY is None else [x for x in LIBRARY.levels_here().split(",") if x != LIBRARY.level()]

pytestmark = pytest.mark.skipif(
    "TUNEGATE_CPU_LEVEL" in os.environ or "TUNEGATE_KERNELS" in os.environ, reason="one level was asked for"
)


def run_tests(paths: list[str], **environment: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *paths]
    result = subprocess.run(
        command, cwd=HERE.parent.parent, env={**os.environ, **environment}, capture_output=True, text=True, timeout=1500
    )
    assert result.returncode == 0, (result.stdout + result.stderr)[-4000:]


@pytest.mark.parametrize("level", [x for x in LEVELS if x != "emulatedbf16"])  # its own part runs below
def test_the_matrix_products_at_this_level(level: str) -> None:
    run_tests([str(HERE / "test_gemm.py")], TUNEGATE_CPU_LEVEL=level)


@pytest.mark.parametrize("level", [x for x in LEVELS if x in ("emulatedbf16", "emulatedamx", "avx512bf16", "amx")])
def test_bf16_attention_on_the_matrix_units(level: str) -> None:
    run_tests([str(HERE / "test_attention.py"), "-k", "bf16"], TUNEGATE_CPU_LEVEL=level)


@pytest.mark.slow
@pytest.mark.parametrize("level", LEVELS)
def test_every_kernel_at_this_level(level: str) -> None:
    run_tests([str(HERE)], TUNEGATE_CPU_LEVEL=level)


@pytest.mark.slow
def test_the_twins_alone() -> None:
    run_tests([str(HERE)], TUNEGATE_KERNELS="off")


def test_an_unknown_level_is_refused_with_those_that_run() -> None:
    if LIBRARY is None:
        pytest.skip("the C++ kernels are not built")
    code = "from tunegate.kernels import _native"
    result = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "TUNEGATE_CPU_LEVEL": "avx9"}, capture_output=True, text=True
    )
    assert result.returncode == 1
    assert "avx9" in result.stderr and "plain" in result.stderr
