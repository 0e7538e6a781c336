"""The training loop: accumulation, packing and interruption are invisible; the best adapter is kept."""

from __future__ import annotations

import errno
import json
import math
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from tiny import tiny_model, toy_rows
from tunegate.adapter.inject import Injection, inject
from tunegate.adapter.spec import AdapterSpec
from tunegate.config import TrainSection
from tunegate.data.pack import make_batch
from tunegate.data.types import Rendered
from tunegate.engine import checkpoint
from tunegate.engine import train as module
from tunegate.engine.checkpoint import FILES, TrainState, find_checkpoint, save_checkpoint
from tunegate.engine.runner import Runner
from tunegate.engine.schedule import StepPlan, lr_factor, make_optimizer
from tunegate.engine.train import Hooks, Interrupted, TrainResult, mean_loss, train
from tunegate.errors import InputError, TunegateError

KEY = "b3:run"


def toy(n: int = 24, seed: int = 0) -> list[Rendered]:
    """Rows with a common header of 6 tokens, a body that tells the answer, and an answer of two tokens."""
    rows = []
    for number, item in enumerate(toy_rows(n, seed)):
        answer = {"red": (50, 2), "green": (60, 2), "blue": (70, 2)}[item["completion"]]
        body = [100 + number % 40, *([200 + answer[0]] * (1 + number % 5)), 9]
        ids = (4, 5, 6, 7, 8, 3, *body, *answer)
        rows.append(Rendered(f"toy.jsonl:{number + 1}", ids, (False,) * (len(ids) - 2) + (True, True)))
    return rows


def section(**changed: Any) -> TrainSection:
    given: dict[str, Any] = {
        "lr": 5e-3,
        "rank": 4,
        "epochs": 2.0,
        "dropout": 0.0,
        "tokens_per_step": 80,
        "tokens_per_batch": 80,
        "checkpoint_every": 3,
        "patience": 100,
    }
    return TrainSection(**(given | changed))


@dataclass
class Job:
    """A tiny base with a fresh adapter. ``scores`` are handed out in turn; the last is repeated."""

    folder: Path
    settings: TrainSection
    rows: list[Rendered] = field(default_factory=toy)
    scores: list[float] | None = None
    key: str = KEY
    family: str = "llama"
    stop_at: int | None = None
    events: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        model = tiny_model(self.family)
        self.runner = Runner(model)
        self.injection: Injection = inject(
            model,
            AdapterSpec(self.settings.rank, 8.0, self.settings.dropout, use_dora=self.settings.method == "dora"),
            seed=self.settings.seed,
        )
        self.evaluated: list[int] = []

    def evaluate(self, step: int) -> tuple[float, dict[str, Any]]:
        """By default a score that the weights decide, so that a wrong resume shows."""
        self.evaluated.append(step)
        if self.scores is not None:
            return self.scores[min(len(self.evaluated), len(self.scores)) - 1], {}
        loss = mean_loss(self.runner, self.rows, 200)
        return -loss, {"valid_loss": loss}

    def run(self) -> TrainResult:
        def stop() -> bool:
            return self.stop_at is not None and self.steps and self.steps[-1]["step"] >= self.stop_at

        hooks = Hooks(self.evaluate, self.events.append, stop)
        return train(self.runner, self.injection, self.rows, self.settings, self.folder, self.key, hooks)

    @property
    def steps(self) -> list[dict[str, Any]]:
        return [event for event in self.events if event["event"] == "step"]

    @property
    def losses(self) -> list[float]:
        return [event["loss"] for event in self.steps]

    @property
    def adapter(self) -> dict[str, torch.Tensor]:
        return {name: p.detach().clone() for name, p in self.injection.parameters().items()}


def files_of(folder: Path) -> dict[str, bytes]:
    """The bytes of the adapters and optimizer states on disk. (``state.json`` holds times.)"""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*.safetensors"))}


def close(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], atol: float) -> None:
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], rtol=0, atol=atol, msg=name)


# --- what must be invisible -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changed",
    [
        {"tokens_per_batch": 16},  # one row a batch
        {"tokens_per_batch": 40},
        {"share_prefix": False},
        {"gradient_checkpointing": True},
    ],
    ids=lambda changed: "-".join(changed),
)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_how_a_step_is_computed_changes_nothing(family: str, changed: dict[str, Any], tmp_path: Path) -> None:
    """The curve and the adapter are the same for any cut into micro-batches, packed, shared or recomputed."""
    first = Job(tmp_path / "a", section(), family=family)
    other = Job(tmp_path / "b", section(**changed), family=family)
    one, two = first.run(), other.run()
    assert len(first.losses) == one.total_steps > 6
    assert other.losses == pytest.approx(first.losses, abs=1e-5)
    # Adam's first steps have size lr whatever the gradient's size, so rounding grows; 1e-3 is a fifth of one step
    close(first.adapter, other.adapter, atol=1e-3)
    assert (one.state.tokens, one.state.target_tokens) == (two.state.tokens, two.state.target_tokens)
    assert one.state.computed_tokens < one.state.tokens


def test_the_padded_path_trains_the_same_rows(tmp_path: Path) -> None:
    job = Job(tmp_path / "a", section(), family="llama")
    other = Job(tmp_path / "b", section(), family="llama")
    other.runner = Runner(_without_attention_backend(tiny_model("llama")))
    other.injection = inject(other.runner.model, AdapterSpec(4, 8.0), seed=0)
    assert other.runner.path == "padded"
    job.run(), other.run()
    assert other.losses == pytest.approx(job.losses, abs=1e-5)


def _without_attention_backend(model: Any) -> Any:
    model._supports_attention_backend = False
    return model


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_the_same_seed_gives_the_same_bytes(method: str, tmp_path: Path) -> None:
    found = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        job = Job(tmp_path / name, section(dropout=0.2, seed=seed, method=method, epochs=1.0))
        job.run()
        found.append((files_of(job.folder), job.losses))
    assert found[0] == found[1]
    assert found[0] != found[2]


def test_dropout_is_on_in_steps_and_off_in_evaluations(tmp_path: Path) -> None:
    job = Job(tmp_path / "a", section(dropout=0.5, lr=1e-9, epochs=1.0, tokens_per_step=2000))
    with torch.no_grad():
        for name, parameter in job.injection.parameters().items():
            if name.endswith("lora_B"):
                parameter.normal_(generator=torch.Generator().manual_seed(0))
    result = job.run()
    plain = mean_loss(job.runner, job.rows, 2000)
    assert result.state.evaluations[0]["valid_loss"] == pytest.approx(plain, abs=1e-5)
    assert abs(job.losses[0] - plain) > 1e-3


def test_training_leaves_the_model_in_eval_mode(tmp_path: Path) -> None:
    job = Job(tmp_path / "a", section(gradient_checkpointing=True, epochs=0.2))
    job.run()
    assert not any(m.training for m in job.runner.model.modules())
    assert not any("forward" in vars(m) for m in job.runner.model.modules())


def test_layers_are_recomputed_when_asked(tmp_path: Path) -> None:
    calls = {}
    for flag in (False, True):
        job = Job(tmp_path / str(flag), section(gradient_checkpointing=flag, max_steps=1))
        job.scores = [1.0]
        counted: list[int] = []
        job.runner.model.model.layers[0].mlp.register_forward_pre_hook(lambda *a, counted=counted: counted.append(1))
        job.run()
        calls[flag] = len(counted)
    assert calls == {False: 1, True: 2}


def test_a_model_without_decoder_layers_to_recompute_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = Job(tmp_path / "a", section(gradient_checkpointing=True))
    monkeypatch.setattr("transformers.modeling_layers.GradientCheckpointingLayer", nn.Bilinear)
    with pytest.raises(InputError, match="does not support gradient checkpointing"):
        job.run()


# --- resume ---------------------------------------------------------------------------------------------------------


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
    plain, left = Path.write_bytes, [writes]

    def full(path: Path, data: bytes) -> int:
        if not left[0]:
            plain(path, data[: len(data) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")
        left[0] -= 1
        return plain(path, data)

    monkeypatch.setattr(Path, "write_bytes", full)
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


def test_a_checkpoint_of_another_adapter_is_not_forced_in(tmp_path: Path) -> None:
    parameters = {"a.lora_A": nn.Parameter(torch.ones(2))}
    optimizer = torch.optim.AdamW(parameters.values())
    save_checkpoint(tmp_path, KEY, TrainState(step=1), parameters, optimizer)
    with pytest.raises(ValueError, match="different parameters"):
        checkpoint.load_checkpoint(tmp_path / "step-00000001", {"b.lora_A": parameters["a.lora_A"]}, optimizer)


# --- evaluation, best and patience ----------------------------------------------------------------------------------


def test_the_best_adapter_is_left_in_place_and_scores_identically(tmp_path: Path) -> None:
    job = Job(tmp_path, section(eval_every=2))
    job.evaluate = lambda step: (mean_loss(job.runner, job.rows, 200), {})  # a score that falls: the first is best
    result = job.run()
    assert result.state.best_step == 2
    assert mean_loss(job.runner, job.rows, 200) == result.state.best_score
    assert result.state.evaluations[-1]["score"] < result.state.best_score - 0.1
    fresh = Job(tmp_path / "fresh", section())
    module.load_parameters(
        fresh.injection.parameters(), load_file(tmp_path / f"best-{result.state.best_step:08d}" / module.ADAPTER_FILE)
    )
    assert mean_loss(fresh.runner, fresh.rows, 200) == result.state.best_score


@pytest.mark.parametrize(
    "scores, patience, best, evaluations",
    [
        ([1.0, 2.0, 3.0], 2, 3, 3),
        ([1.0, 3.0, 2.0, 3.0, 9.0], 2, 2, 4),  # a tie goes to the earlier, and counts as no gain
        ([3.0, 1.0, 1.0, 9.0], 2, 1, 3),
        ([3.0, 1.0, 9.0, 1.0], 1, 1, 2),
        ([-1.0, -2.0, -0.5, -3.0], 2, 3, 4),
        ([0.0, 0.0, 0.0], 5, 1, 3),
    ],
)
def test_patience_and_ties(scores: list[float], patience: int, best: int, evaluations: int, tmp_path: Path) -> None:
    each = StepPlan(toy(), section(epochs=1.0)).total
    job = Job(tmp_path, section(epochs=float(len(scores)), patience=patience), scores=scores)
    state = job.run().state
    assert state.best_step == best * each
    assert state.best_score == scores[best - 1]
    assert len(job.evaluated) == evaluations
    assert state.stopped_early == (state.without_gain >= patience)
    assert state.step == evaluations * each
    marks = [event["best"] for event in job.events if event["event"] == "evaluation"]
    assert marks == [all(score > s for s in scores[:n]) for n, score in enumerate(scores[:evaluations])]
    assert [p.name for p in tmp_path.glob("best-*")] == [f"best-{state.best_step:08d}"]


@pytest.mark.parametrize(
    "every, epochs, max_steps, expected",
    [
        ("epoch", 2.0, None, [10, 20]),
        ("epoch", 1.5, None, [10, 15]),
        ("epoch", 0.3, None, [3]),
        ("epoch", 0.01, None, [1]),
        (4, 1.0, None, [4, 8, 10]),
        (7, 2.0, None, [7, 14, 20]),
        (5, 1.0, None, [5, 10]),
        (100, 1.0, None, [10]),
        ("epoch", 3.0, 4, [4]),
        ("epoch", 3.0, 13, [10, 13]),
        (3, 3.0, 4, [3, 4]),
    ],
)
def test_when_the_gate_opens(every: Any, epochs: float, max_steps: int | None, expected: list[int]) -> None:
    plan = StepPlan(_ten_steps(), section(eval_every=every, epochs=epochs, max_steps=max_steps, tokens_per_step=16))
    assert [step for step in range(plan.total + 5) if step <= plan.total and plan.is_evaluation(step)] == expected
    assert plan.total == expected[-1]


def test_an_unreadable_best_adapter_is_named(tmp_path: Path) -> None:
    best = Job(tmp_path, section(epochs=1.0)).run().state.best_step
    path = tmp_path / f"best-{best:08d}" / module.ADAPTER_FILE
    for spoil in (lambda: path.write_bytes(b"no tensors"), path.unlink):
        spoil()
        with pytest.raises(TunegateError, match="best adapter of this run cannot be read") as caught:
            Job(tmp_path, section(epochs=1.0)).run()
        assert path.name in str(caught.value)


# --- the steps ------------------------------------------------------------------------------------------------------


def _ten_steps() -> list[Rendered]:
    """Ten rows of which each fills a step of 16 tokens."""
    return [Rendered(f"r:{n}", (n + 3,) * 15, (False,) * 14 + (True,)) for n in range(10)]


@pytest.mark.parametrize(
    "epochs, max_steps, done",
    [
        (1.0, None, {0: 0.0, 5: 0.5, 10: 1.0}),
        (2.5, None, {5: 0.5, 10: 1.0, 19: 1.9, 25: 2.5}),
        (0.5, None, {1: 0.1, 5: 0.5}),
        (3.0, 5, {0: 0.0, 3: 0.3, 5: 0.5}),  # once a division by zero
        (2.0, 10, {10: 1.0}),
        (3.0, 12, {12: 1.2}),
        (1.0, 50, {10: 1.0}),
    ],
)
def test_epochs_done(epochs: float, max_steps: int | None, done: dict[int, float]) -> None:
    plan = StepPlan(_ten_steps(), section(epochs=epochs, max_steps=max_steps, tokens_per_step=16))
    assert plan.total == max(done)
    assert {step: pytest.approx(plan.epochs_done(step)) for step in done} == done


def test_a_plan_gives_every_row_once_an_epoch_in_a_new_order_from_any_step() -> None:
    plan = StepPlan(_ten_steps(), section(epochs=2.5, tokens_per_step=16))
    order = [plan.rows(step)[0].row_id for step in range(plan.total)]
    assert len(order) == 25
    assert set(order[:10]) == set(order[10:20]) == {f"r:{n}" for n in range(10)}
    assert order[:10] != order[10:20]
    jumping = StepPlan(_ten_steps(), section(epochs=2.5, tokens_per_step=16))
    assert [jumping.rows(step)[0].row_id for step in (24, 3, 17, 0)] == [order[n] for n in (24, 3, 17, 0)]


def test_a_run_cut_inside_its_first_epoch_ends_well(tmp_path: Path) -> None:
    result = Job(tmp_path, section(epochs=3.0, max_steps=4)).run()
    assert result.state.step == result.total_steps == 4
    assert 0.0 < result.epochs < 1.0


@pytest.mark.parametrize(
    "kind, warmup, total, expected",
    [
        ("constant", 0.0, 3, [1, 1, 1]),
        ("constant", 0.5, 4, [0.5, 1, 1, 1]),
        ("linear", 0.0, 4, [1, 0.75, 0.5, 0.25]),
        ("linear", 0.4, 5, [0.5, 1, 1, 2 / 3, 1 / 3]),
        ("cosine", 0.0, 4, [1, 0.5 + math.sqrt(0.125), 0.5, 0.5 - math.sqrt(0.125)]),
        ("cosine", 0.2, 5, [1, 1, 0.5 + math.sqrt(0.125), 0.5, 0.5 - math.sqrt(0.125)]),
        ("linear", 0.05, 1, [1]),
        ("linear", 0.99, 2, [0.5, 1]),
    ],
)
def test_learning_rate_by_hand(kind: str, warmup: float, total: int, expected: list[float]) -> None:
    assert [lr_factor(step, total, warmup, kind) for step in range(total)] == pytest.approx(expected)


def test_the_warm_up_has_as_many_steps_as_asked() -> None:
    # 0.07 * 100 is a little more than 7 in floating point, and would make it 8
    assert [lr_factor(step, 100, 0.07, "constant") for step in range(8)] == pytest.approx(
        [n / 7 for n in range(1, 8)] + [1]
    )


def test_the_rate_reaches_the_optimizer(tmp_path: Path) -> None:
    job = Job(tmp_path, section(epochs=1.0, warmup=0.0))
    total = job.run().total_steps
    assert [e["lr"] for e in job.steps] == pytest.approx([5e-3 * (1 - n / total) for n in range(total)])


def test_lora_plus_gives_b_its_own_rate() -> None:
    shapes = {"x.lora_A": (2, 3), "x.lora_B": (3, 2), "x.lora_magnitude_vector": (3,)}
    parameters = {name: nn.Parameter(torch.ones(shape)) for name, shape in shapes.items()}
    optimizer = make_optimizer(parameters, section(lr=1e-3, lr_plus_ratio=16.0, weight_decay=0.1, beta1=0.8))
    slow, fast = optimizer.param_groups
    assert [id(p) for p in fast["params"]] == [id(parameters["x.lora_B"])]
    assert {id(p) for p in slow["params"]} == {id(parameters["x.lora_A"]), id(parameters["x.lora_magnitude_vector"])}
    assert (slow["peak"], fast["peak"]) == (1e-3, 16e-3)
    assert slow["weight_decay"] == fast["weight_decay"] == 0.1
    assert slow["betas"] == (0.8, 0.999)


def test_lora_plus_in_a_run(tmp_path: Path) -> None:
    """Adam's first step moves every weight by its rate, so B must move sixteen times as far with ratio 16."""
    moved = []
    for name, ratio in (("plain", 1.0), ("plus", 16.0)):
        job = Job(tmp_path / name, section(max_steps=1, lr=1e-3, warmup=0.0, lr_plus_ratio=ratio, clip=None))
        job.run()
        moved.append(max(float(p.abs().max()) for n, p in job.adapter.items() if n.endswith("lora_B")))
    assert moved == pytest.approx([1e-3, 16e-3], rel=1e-3)


def _adamw(parameter: torch.Tensor, gradients: list[torch.Tensor], lr: float) -> torch.Tensor:
    """AdamW by the paper (arXiv 1711.05101), betas 0.9 and 0.999, no decay."""
    m = v = torch.zeros_like(parameter)
    for t, g in enumerate(gradients, 1):
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        parameter = parameter - lr * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
    return parameter


def test_a_step_by_hand(tmp_path: Path) -> None:
    """One clipped step: the gradient of the mean loss, scaled to the wanted norm, goes into AdamW."""
    clip = 0.05
    settings = section(max_steps=1, warmup=0.0, clip=clip, tokens_per_batch=30)
    job = Job(tmp_path, settings)
    before = job.adapter
    rows = StepPlan(job.rows, settings).rows(0)
    assert len(rows) > 3
    other = Job(tmp_path / "other", settings)
    batch = make_batch(rows, share_prefix=False)
    (other.runner.loss_sum(batch) / batch.n_targets).backward()
    gradients = {name: p.grad for name, p in other.injection.parameters().items()}
    norm = math.sqrt(sum(float(g.double().square().sum()) for g in gradients.values()))
    assert norm > 2 * clip
    job.run()
    assert job.steps[0]["grad_norm"] == pytest.approx(norm, rel=1e-5)  # before clipping
    for name, gradient in gradients.items():
        wanted = _adamw(before[name], [gradient * clip / norm], 5e-3)
        torch.testing.assert_close(job.adapter[name], wanted, rtol=0, atol=2e-5, msg=name)


def test_clipping_bounds_what_the_optimizer_sees(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[float] = []
    plain = torch.optim.AdamW.step

    def spy(self: torch.optim.AdamW, *args: Any) -> Any:
        grads = [p.grad for group in self.param_groups for p in group["params"]]
        seen.append(math.sqrt(sum(float(g.double().square().sum()) for g in grads)))
        return plain(self, *args)

    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    clipped = Job(tmp_path / "a", section(epochs=0.4, clip=0.01))
    clipped.run()
    assert seen == pytest.approx([0.01] * len(seen), rel=1e-3)
    seen.clear()
    free = Job(tmp_path / "b", section(epochs=0.4, clip=None))
    free.run()
    assert seen == pytest.approx([e["grad_norm"] for e in free.steps], rel=1e-5)


def test_eight_rows_can_be_learned_by_heart(tmp_path: Path) -> None:
    settings = section(lr=0.02, rank=8, epochs=60.0, tokens_per_step=200, eval_every=60)
    job = Job(tmp_path, settings, rows=toy(8))
    with torch.no_grad():  # small random embeddings tie the logits down: give the head some reach
        job.runner.model.model.norm.weight.mul_(4.0)
    job.run()
    assert job.losses[0] > 3.0
    assert mean_loss(job.runner, job.rows, 200) < 0.01


def test_counts_and_events(tmp_path: Path) -> None:
    job = Job(tmp_path, section(epochs=2.0))
    state = job.run().state
    assert state.tokens == 2 * sum(len(row) for row in job.rows)
    assert state.target_tokens == 2 * sum(row.n_targets for row in job.rows)
    assert [e["step"] for e in job.steps] == list(range(1, state.step + 1))
    assert job.steps[-1]["of"] == state.step and job.steps[-1]["epoch"] == 2.0
    assert state.seconds > 0
    json.dumps(job.events, allow_nan=False)


def test_mean_loss_is_over_targets_not_rows() -> None:
    rows = [
        Rendered("a", (5, 6, 7, 8, 9), (False, True, True, True, True)),
        Rendered("b", (5, 6, 7), (False, False, True)),
    ]
    model = tiny_model()
    total = 0.0
    with torch.no_grad():
        for row in rows:
            scores = model(input_ids=torch.tensor([row.ids])).logits[0].log_softmax(-1)
            total -= sum(float(scores[i - 1, row.ids[i]]) for i in range(1, len(row)) if row.target[i])
    assert mean_loss(Runner(model), rows, 100) == pytest.approx(total / 5, rel=1e-5)
    assert mean_loss(Runner(tiny_model()), [], 100) == 0.0


# --- what cannot be trained -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_nan_stops_with_step_and_rows_and_keeps_the_checkpoint(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = section(checkpoint_every=2, tokens_per_batch=30)
    bad = StepPlan(toy(), settings).rows(3)  # the fourth step
    poisoned = bad[1].row_id
    plain = Runner.loss_sum

    def loss_sum(self: Runner, batch: Any) -> torch.Tensor:
        loss = plain(self, batch)
        if poisoned not in batch.row_ids:
            return loss
        return loss * float("nan") if what == "loss" else _NanGradient.apply(loss)

    monkeypatch.setattr(Runner, "loss_sum", loss_sum)
    job = Job(tmp_path, settings, scores=[1.0])
    with pytest.raises(TunegateError, match=f"the {what} is nan at step 4") as caught:
        job.run()
    assert not isinstance(caught.value, InputError)
    assert poisoned in str(caught.value)
    if what == "loss":  # only the rows of the micro-batch at fault
        assert bad[-1].row_id not in str(caught.value)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000002"]
    monkeypatch.undo()
    again = Job(tmp_path, settings, scores=[1.0])
    again.run()
    assert again.events[0] == {"event": "resume", "step": 2}


class _NanGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grad: torch.Tensor) -> torch.Tensor:
        return grad[0] * float("nan")


def test_many_row_ids_are_cut_short() -> None:
    error = module._not_finite("loss", math.inf, TrainState(step=6), tuple(f"f:{n}" for n in range(20)))
    assert "the loss is inf at step 7" in str(error)
    assert "f:11 and 8 more" in str(error) and "f:12" not in str(error)


@pytest.mark.parametrize(
    "rows, match",
    [
        ([], "no rows to train on"),
        ([*toy(3), Rendered("mute:4", (1, 2, 3), (False,) * 3)], "mute:4: the row has no target"),
        ([*toy(3), Rendered("first:4", (1, 2, 3), (True, False, False))], "first:4: the row has no target"),
    ],
)
def test_rows_without_anything_to_learn_are_refused_before_the_first_step(
    rows: list[Rendered], match: str, tmp_path: Path
) -> None:
    job = Job(tmp_path / "train", section(), rows=rows)
    with pytest.raises(InputError, match=match):
        job.run()
    assert not job.events and not (tmp_path / "train").exists()


def test_rows_beyond_the_table_of_positions_are_refused_before_the_first_step(tmp_path: Path) -> None:
    long = Rendered("long:9", (5,) * 513, (False,) * 512 + (True,))
    job = Job(tmp_path, section(), rows=[*toy(3), long], family="gpt2")
    with pytest.raises(InputError, match="long:9: the row is longer"):
        job.run()
    assert not job.events
