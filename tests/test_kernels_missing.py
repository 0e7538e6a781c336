"""An install without the compiled kernels: it works, says so once, and ``doctor`` names the reason."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent

PROGRAM = """
import sys
sys.path.insert(0, {here!r})
if {missing}:
    sys.modules["tunegate.kernels._native"] = None  # what an import finds where no compiler was
from tiny import tiny_model
from tunegate.cli import main
from tunegate.engine.generate import Sampling, generate
from tunegate.engine.runner import Runner
code = main(["doctor"])
runner = Runner(tiny_model())
print("path:", runner.path, runner.path_reason)
print(len(generate(runner, [[5, 6, 7], [5, 9]], Sampling(3, ()))), "answers, exit", code)
"""


def run(missing: bool, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {
        k: v for k, v in os.environ.items() if k not in ("TUNEGATE_KERNELS", "TUNEGATE_CPU_LEVEL", "PYTHONWARNINGS")
    }
    program = PROGRAM.format(here=str(HERE), missing=missing)
    return subprocess.run(
        [sys.executable, "-c", program], env={**kept, **environment}, capture_output=True, text=True, timeout=300
    )


@pytest.mark.parametrize("missing", [True, False], ids=["not built", "switched off"])
def test_it_runs_and_says_so_once(missing: bool) -> None:
    result = run(missing) if missing else run(False, TUNEGATE_KERNELS="off")
    assert result.returncode == 0, result.stderr
    assert "2 answers, exit 0" in result.stdout
    reason = "not built (" if missing else "switched off by TUNEGATE_KERNELS"
    assert f"kernels   twins ({reason}" in result.stdout
    assert f"path: packed its attention runs on flat batches; no fused layers ({reason}" in result.stdout
    # nobody has to be told what they asked for
    assert result.stderr.count("the C++ kernels are not built") == missing
    if missing:
        assert "reinstall tunegate" in result.stderr and "tunegate doctor" in result.stderr
