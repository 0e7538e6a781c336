"""Interrupted runs end in the bytes of uninterrupted ones, whatever happened to their files."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from toy_runs import KEY, Job, files_of, section
from tunegate.config import TrainSection
from tunegate.engine import checkpoint
from tunegate.engine.checkpoint import FILES, TrainState, find_checkpoint, save_checkpoint
from tunegate.engine.optimizers import make_optimizer
from tunegate.engine.train import Interrupted, TrainResult, mean_loss
from tunegate.errors import TunegateError


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainResult, dict[str, bytes], list[float]]:
    """An uninterrupted run with dropout and two evaluations an epoch."""
    job = Job(tmp_path_factory.mktemp("whole") / "train", _resumable())
    return job.run(), files_of(job.folder), job.losses


def _resumable() -> TrainSection:
    return section(dropout=0.1, eval_every=4)


@pytest.mark.parametrize("stops", [(1,), (3,), (4,), (5, 9), (2, 3, 4, 5, 6), tuple(range(1, 10))], ids=str)
def test_a_stopped_run_ends_in_the_same_bytes(stops: tuple[int, ...], whole: Any, tmp_path: Path) -> None:
    result, files, losses = whole
    seen: list[float] = []
    for stop in stops:
        job = Job(tmp_path, _resumable(), stop_at=stop)
        with pytest.raises(Interrupted, match=f"stopped after step {stop} of {result.total_steps}"):
            job.run()
        seen += job.losses
    last = Job(tmp_path, _resumable())
    again = last.run()
    assert seen + last.losses == losses
    assert last.events[0] == {"event": "resume", "step": stops[-1]}
    assert files_of(tmp_path) == files
    assert again.state.evaluations == result.state.evaluations
    assert (again.state.tokens, again.state.target_tokens) == (result.state.tokens, result.state.target_tokens)


def test_a_finished_run_does_nothing_when_run_again(whole: Any, tmp_path: Path) -> None:
    result, files, _ = whole
    Job(tmp_path, _resumable()).run()
    again = Job(tmp_path, _resumable())
    state = again.run().state
    assert not again.steps and not again.evaluated
    assert files_of(tmp_path) == files
    assert state.best_step == result.state.best_step
    assert -mean_loss(again.runner, again.rows, 200) == state.best_score


@pytest.mark.parametrize("damage", ["cut", "flipped", "missing", "manifest gone", "manifest odd", "state odd", "empty"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(damage: str, whole: Any, tmp_path: Path) -> None:
    job = Job(tmp_path, _resumable(), stop_at=8)
    with pytest.raises(Interrupted):
        job.run()
    old, newest = sorted((tmp_path / "checkpoints").iterdir())
    assert (old.name, newest.name) == ("step-00000006", "step-00000008")
    target = newest / FILES[1]
    data = target.read_bytes()
    if damage == "cut":
        target.write_bytes(data[:-7])
    elif damage == "flipped":
        target.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif damage == "missing":
        target.unlink()
    elif damage == "manifest gone":
        (newest / "manifest.json").unlink()
    elif damage == "manifest odd":
        (newest / "manifest.json").write_text("[1, 2]")
    elif damage == "state odd":
        (newest / "state.json").write_text("[]")
    else:
        shutil.rmtree(newest)
        newest.mkdir()
    again = Job(tmp_path, _resumable())
    again.run()
    assert again.events[0] == {"event": "resume", "step": 6}
    assert files_of(tmp_path) == whole[1]


def test_all_checkpoints_damaged_means_from_the_start(whole: Any, tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        Job(tmp_path, _resumable(), stop_at=8).run()
    for path in (tmp_path / "checkpoints").rglob("manifest.json"):
        path.write_text("{}")
    again = Job(tmp_path, _resumable())
    again.run()
    assert again.events[0]["event"] == "step"
    assert files_of(tmp_path) == whole[1]


def test_another_runs_checkpoints_are_ignored_and_do_not_crowd_out_ours(tmp_path: Path) -> None:
    """The other run is further on: pruning by number alone would delete what this run has just saved."""
    other = Job(tmp_path, section(seed=7), key="b3:other", stop_at=9)
    with pytest.raises(Interrupted):
        other.run()
    with pytest.raises(Interrupted):
        Job(tmp_path, section(), stop_at=4).run()
    found = find_checkpoint(tmp_path / "checkpoints", KEY)
    assert found is not None and found.name == "step-00000004"
    again = Job(tmp_path, section())
    again.run()
    clean = Job(tmp_path / "clean", section())
    clean.run()
    shutil.move(tmp_path / "clean", tmp_path.parent / "clean-moved")
    assert files_of(tmp_path) == files_of(tmp_path.parent / "clean-moved")


def test_two_checkpoints_are_kept(tmp_path: Path) -> None:
    job = Job(tmp_path, section(checkpoint_every=1))
    total = job.run().total_steps
    assert [p.name for p in sorted((tmp_path / "checkpoints").iterdir())] == [
        f"step-{total - 1:08d}",
        f"step-{total:08d}",
    ]
    assert not list(tmp_path.rglob(".tmp-*"))


def test_leftovers_of_a_killed_process_are_removed(tmp_path: Path) -> None:
    for leftover in (tmp_path / "checkpoints" / ".tmp-abc", tmp_path / "best-00000003"):
        leftover.mkdir(parents=True)
        (leftover / ".tmp-x.safetensors").write_bytes(b"half")
    Job(tmp_path, section(max_steps=2)).run()
    assert not list(tmp_path.rglob(".tmp-*"))
    assert [p.name for p in tmp_path.glob("best-*")] == ["best-00000002"]


@pytest.mark.parametrize("writes", range(5))
def test_a_full_disk_loses_nothing(writes: int, whole: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk is full after so many files of step 4: best adapter, adapter, optimizer, state, manifest."""
    with pytest.raises(Interrupted):
        Job(tmp_path, _resumable(), stop_at=3).run()
    before = files_of(tmp_path / "checkpoints")
    left = [writes]

    def full(write: Any, path_at: int) -> Any:
        def call(*arguments: Any) -> Any:
            done = write(*arguments)
            if not left[0]:
                path = arguments[path_at]
                os.truncate(path, path.stat().st_size // 2)
                raise OSError(errno.ENOSPC, "No space left on device")
            left[0] -= 1
            return done

        return call

    monkeypatch.setattr(Path, "write_bytes", full(Path.write_bytes, 0))
    monkeypatch.setattr(checkpoint, "save_file", full(checkpoint.save_file, 1))
    with pytest.raises(TunegateError, match="No space left on device"):
        Job(tmp_path, _resumable()).run()
    monkeypatch.undo()
    assert files_of(tmp_path / "checkpoints") == before
    assert not list(tmp_path.rglob(".tmp-*"))
    Job(tmp_path, _resumable()).run()
    assert files_of(tmp_path) == whole[1]


def test_the_optimizer_returns_as_it_was(tmp_path: Path) -> None:
    job = Job(tmp_path, section(), stop_at=3)
    with pytest.raises(Interrupted):
        job.run()
    other = Job(tmp_path, section())
    parameters = other.injection.parameters()
    optimizer = make_optimizer(parameters, other.settings)
    found = find_checkpoint(tmp_path / "checkpoints", KEY)
    assert found is not None
    state = checkpoint.load_checkpoint(found, parameters, optimizer)
    assert state.step == 3
    stored = load_file(found / FILES[1])
    for name, parameter in parameters.items():
        assert torch.equal(parameter, job.injection.parameters()[name])
        assert set(optimizer.state[parameter]) == {"step", "exp_avg", "exp_avg_sq"}
        assert optimizer.state[parameter]["step"] == 3
        assert torch.equal(optimizer.state[parameter]["exp_avg"], stored[f"{name}/exp_avg"])


def test_a_stopped_run_with_8_bit_moments_ends_in_the_same_bytes(tmp_path: Path) -> None:
    def job(folder: str, stop_at: int | None = None) -> Job:
        settings = section(optimizer="adamw_8bit", rank=32, lr=1e-3, dropout=0.1, eval_every=4)
        return Job(tmp_path / folder, settings, sizes={"hidden_size": 128, "intermediate_size": 384}, stop_at=stop_at)

    whole = job("whole")
    whole.run()
    losses: list[float] = []
    for stop in (2, 3, 7):
        stopped = job("cut", stop)
        with pytest.raises(Interrupted):
            stopped.run()
        losses += stopped.losses
    last = job("cut")
    last.run()
    assert losses + last.losses == whole.losses
    assert files_of(last.folder) == files_of(whole.folder)
    found = find_checkpoint(last.folder / "checkpoints", KEY)
    assert found is not None
    kinds = {name.rpartition("/")[2]: tensor.dtype for name, tensor in load_file(found / FILES[1]).items()}
    assert kinds["state1"] is kinds["state2"] is torch.uint8
    assert "exp_avg" in kinds  # the small tensors'


def test_a_checkpoint_of_another_adapter_is_not_forced_in(tmp_path: Path) -> None:
    parameters = {"a.lora_A": nn.Parameter(torch.ones(2))}
    optimizer = torch.optim.AdamW(parameters.values())
    save_checkpoint(tmp_path, KEY, TrainState(step=1), parameters, optimizer)
    with pytest.raises(ValueError, match="different parameters"):
        checkpoint.load_checkpoint(tmp_path / "step-00000001", {"b.lora_A": parameters["a.lora_A"]}, optimizer)
