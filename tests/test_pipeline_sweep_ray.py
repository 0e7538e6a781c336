"""``tunegate sweep --ray`` on a real local Ray: the same runs and the same decision as one rank after another."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from task import call, write_task
from test_pipeline_sweep import task as task_with_regression
from tunegate.files import read_json

ARGUMENTS = ("--ranks", "2,4,8", "--epochs", 2)
ADAPTER = "adapter/adapter_model.safetensors"
needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs ray")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A local Ray with two CPUs, shared by the tests; the command finds it running."""
    import ray

    paths = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    environment = {"env_vars": {"PYTHONPATH": paths}}  # for tasks that are defined here
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env=environment)
    yield ray
    ray.shutdown()


def result(said: Any) -> dict[str, Any]:
    assert said.code == 0, said.err + said.out
    found: dict[str, Any] = json.loads(said.out)
    return found


@needs_ray
def test_all_ranks_at_once_decide_as_one_after_another(cluster: Any, tmp_path: Path, tiny_llama: Path) -> None:
    here, there = (task_with_regression(tmp_path / name, tiny_llama) for name in ("here", "ray"))
    one, all_at_once = (
        result(call("sweep", here, *ARGUMENTS, "--json")),
        result(call("sweep", there, *ARGUMENTS, "--ray", "--json")),
    )
    assert all_at_once["finished"] and all_at_once["recommended"]["run"] == one["recommended"]["run"]
    for alone, other in zip(one["trials"], all_at_once["trials"], strict=True):
        assert alone["run"] == other["run"]
        for mine, theirs in zip(alone["points"], other["points"], strict=False):  # one may have trained on
            assert mine == theirs
        if alone["status"] == other["status"]:
            assert alone["regression"] == other["regression"]
        both = [path.parent / "runs" / "task" / alone["run"] / ADAPTER for path in (here, there)]
        if all(path.exists() for path in both):
            assert both[0].read_bytes() == both[1].read_bytes()
    assert not (there.parent / "runs" / "task" / "ledger.json").exists()
    again = call("sweep", there, *ARGUMENTS, "--ray")
    assert again.code == 0 and "Ray:" not in again.err  # nothing is left to train


@needs_ray
def test_a_trial_that_fails_says_why(cluster: Any, tmp_path: Path, tiny_llama: Path) -> None:
    """The tasks prepare the run again on their node; one that finds another base refuses."""
    from tunegate.config import load_config
    from tunegate.pipeline.prepare import prepare
    from tunegate.pipeline.reporter import Silent
    from tunegate.pipeline.sweep_ray import Board, _train

    base = Path(shutil.copytree(tiny_llama, tmp_path / "base"))
    prepared = prepare(load_config(write_task(tmp_path / "task", base)), Silent())
    board = cluster.remote(Board).options(num_cpus=0).remote()
    task = cluster.remote(_train)
    (problem,) = cluster.get(task.remote(prepared.config, 2, 1.0, "b3:another", board, 1, {}))
    assert "would train another run" in problem["what"] and problem["expected"] == "b3:another"
    cluster.get(board.stop.remote([2]))
    assert cluster.get(task.remote(prepared.config, 2, 1.0, "b3:another", board, 1, {})) == []  # told to stop
    assert not list(prepared.config.run_dir.glob("run-*"))


def dies_once(marker: Path, *arguments: Any) -> list[dict[str, str]]:
    """A task whose process is killed at its second evaluation, the first time."""
    from test_pipeline_kill import Point, _count
    from tunegate.pipeline.sweep_ray import _train

    if not marker.exists():
        marker.touch()
        _count(Point("rename", "divergence.jsonl", 2), "kill", marker.with_suffix(".log"))
    return _train(*arguments)


@needs_ray
def test_a_task_that_dies_goes_on_from_its_checkpoint(cluster: Any, tmp_path: Path, tiny_llama: Path) -> None:
    from tunegate.config import load_config
    from tunegate.pipeline.prepare import prepare
    from tunegate.pipeline.reporter import Silent
    from tunegate.pipeline.sweep import trial_of
    from tunegate.pipeline.sweep_ray import Board

    path, marker = write_task(tmp_path / "dies", tiny_llama), tmp_path / "died"
    trial = trial_of(prepare(load_config(path), Silent()), 2, 2.0)
    board = cluster.remote(Board).options(num_cpus=0).remote()
    arguments = (trial.prepared.config, 2, 2.0, trial.prepared.run_key, board, 1, {})
    assert cluster.get(cluster.remote(max_retries=2)(dies_once).remote(marker, *arguments)) == []
    assert "divergence.jsonl" in marker.with_suffix(".log").read_text().splitlines()[-1]  # there it was killed
    assert trial.complete and '"event": "resume"' in (trial.folder / "train" / "log.jsonl").read_text()
    other = write_task(tmp_path / "lives", tiny_llama)
    assert call("sweep", other, "--ranks", "2", "--epochs", 2).code == 0
    alone = other.parent / "runs" / "task" / trial.folder.name / ADAPTER
    assert (trial.folder / ADAPTER).read_bytes() == alone.read_bytes()


@needs_ray
def test_a_budget_leaves_checkpoints_and_one_machine_goes_on(cluster: Any, tmp_path: Path, tiny_llama: Path) -> None:
    path = write_task(tmp_path, tiny_llama)
    found = result(call("sweep", path, *ARGUMENTS, "--ray", "--budget", "0.00001", "--json"))
    assert not found["finished"]
    assert result(call("sweep", path, *ARGUMENTS, "--json"))["finished"]
    assert read_json(next((path.parent / "runs" / "task").glob("sweep-*")) / "sweep.json")["finished"]


@pytest.mark.skipif(importlib.util.find_spec("ray") is not None, reason="ray is installed")
def test_without_ray_it_says_what_to_install(tmp_path: Path, tiny_llama: Path) -> None:
    said = call("sweep", write_task(tmp_path, tiny_llama), "--ray")
    assert said.code == 2 and "pip install 'tunegate[ray]'" in said.err
