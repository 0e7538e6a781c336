"""SIGKILL at any moment, then the same run again: the same bytes as a run that was never killed.

The file is also the program under test: started as a script it loads everything once and then forks one process per
attempt, so that dozens of processes are killed in seconds. A process kills itself inside a file operation, with half
of a write done, or is killed from outside once its log has so many lines.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

SIGNAL = getattr(signal, "SIGKILL", None)
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")

POINTS = 12  # file operations to die in, spread over the run
LINES = (1, 4, 7)  # log lines after which to be killed from outside


def count_operations(act: Callable[[int], None]) -> None:
    """Call ``act`` with a running number before every file operation of this process, and in the middle of writes."""
    done = [0]

    def now() -> None:
        act(done[0])
        done[0] += 1

    def before(owner: Any, name: str) -> None:
        plain = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            now()
            return plain(*args, **kwargs)

        setattr(owner, name, call)

    write = Path.write_bytes

    def write_bytes(path: Path, data: bytes) -> int:
        write(path, data[: len(data) // 2])
        now()
        return write(path, data)

    from tunegate.engine import checkpoint

    save = checkpoint.save_file

    def save_file(tensors: Any, path: Path) -> None:
        save(tensors, path)
        os.truncate(path, path.stat().st_size // 2)
        now()
        save(tensors, path)

    Path.write_bytes = write_bytes  # type: ignore[method-assign]
    checkpoint.save_file = save_file
    for owner, name in ((Path, "replace"), (Path, "rename"), (shutil, "rmtree"), (os, "rmdir")):
        before(owner, name)


def work(make: Callable[[], Any], folder: Path, slow: float) -> None:
    """One attempt: train to the end in ``folder``, then leave the adapter in ``final.bin``."""
    from tunegate.engine.train import Hooks, mean_loss, train

    runner, injection, rows, settings = make()
    log = folder.with_suffix(".log")

    def report(event: dict[str, Any]) -> None:
        with log.open("a", encoding="utf-8") as handle:
            handle.write(json.dumps(event["event"]) + "\n")
        time.sleep(slow)

    def evaluate(step: int) -> tuple[float, dict[str, Any]]:
        return (-1 if step > 5 else 1) * mean_loss(runner, rows, 200), {}  # the best is not the last

    train(runner, injection, rows, settings, folder, "b3:key", Hooks(evaluate, report))
    data = b"".join(p.detach().numpy().tobytes() for p in injection.parameters().values())
    with folder.with_suffix(".final").open("wb") as handle:
        handle.write(data)


def attempt(make: Callable[[], Any], folder: Path, act: Callable[[int], None], lines: int | None = None) -> int:
    """Fork, train, and wait; returns the signal that ended the process, 0 if it finished by itself."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            count_operations(act)
            work(make, folder, slow=0.02 if lines else 0.0)
            code = 0
        finally:
            os._exit(code)
    log = folder.with_suffix(".log")
    while lines is not None:
        if log.exists() and log.read_bytes().count(b"\n") >= lines:
            os.kill(pid, signal.SIGKILL)
            break
        time.sleep(0.001)
    status = os.waitpid(pid, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, status
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


def result(folder: Path) -> dict[str, str]:
    """What a run leaves: best adapter, last checkpoint, and the adapter in memory at its end."""
    last = max((folder / "checkpoints").glob("step-*"))
    kept = [*folder.glob("best-*/*"), *last.glob("*.safetensors"), folder.with_suffix(".final")]
    return {str(path.relative_to(folder.parent)).replace(folder.name, "run"): path.read_bytes().hex() for path in kept}


def main(root: Path) -> None:
    import torch

    from tiny import tiny_model
    from toy_runs import section, toy
    from tunegate.adapter.inject import inject
    from tunegate.adapter.spec import AdapterSpec
    from tunegate.engine.runner import Runner

    torch.set_num_threads(1)
    model = tiny_model()
    runner, rows = Runner(model), toy()
    settings = section(dropout=0.1, eval_every=4, checkpoint_every=3)

    def make() -> Any:  # in the forked process
        return runner, inject(model, AdapterSpec(4, 8.0, 0.1), seed=0), rows, settings

    total = root / "operations"
    attempt(make, root / "whole", lambda n: (total.write_text(str(n)), None)[1])
    wanted, operations = result(root / "whole"), int(total.read_text()) + 1
    report: dict[str, Any] = {"operations": operations, "wrong": [], "killed": 0, "twice": 0}

    def die(at: int) -> Callable[[int], None]:
        return lambda n: os.kill(os.getpid(), signal.SIGKILL) if n == at else None

    for point in sorted({operations * n // POINTS for n in range(POINTS)} | {operations - 1}):
        folder = root / f"at-{point}"
        report["killed"] += attempt(make, folder, die(point)) == signal.SIGKILL
        if point % 2:  # and once more on the way
            report["twice"] += attempt(make, folder, die(5)) == signal.SIGKILL
        assert attempt(make, folder, lambda n: None) == 0
        if result(folder) != wanted or list(folder.rglob(".tmp-*")):
            report["wrong"].append(point)
    for lines in LINES:
        folder = root / f"lines-{lines}"
        report["killed"] += attempt(make, folder, lambda n: None, lines) == signal.SIGKILL
        assert attempt(make, folder, lambda n: None) == 0
        if result(folder) != wanted or list(folder.rglob(".tmp-*")):
            report["wrong"].append(f"{lines} lines")
    (root / "report.json").write_text(json.dumps(report))


def test_a_killed_run_ends_in_the_bytes_of_one_never_killed(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, __file__, str(tmp_path)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["operations"] > 40
    assert report["killed"] >= POINTS + len(LINES)
    assert report["twice"] > 2
    assert report["wrong"] == []


if __name__ == "__main__":
    main(Path(sys.argv[1]))
