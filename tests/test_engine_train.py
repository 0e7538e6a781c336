"""The training loop: accumulation and packing are invisible, the best adapter is kept, bad rows are refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from tiny import tiny_model
from toy_runs import Job, close, files_of, section, toy
from tunegate.adapter.inject import inject
from tunegate.adapter.spec import AdapterSpec
from tunegate.data.pack import make_batch
from tunegate.data.types import Rendered
from tunegate.engine import train as module
from tunegate.engine.checkpoint import TrainState
from tunegate.engine.runner import Runner
from tunegate.engine.schedule import StepPlan
from tunegate.engine.train import mean_loss
from tunegate.errors import InputError, TunegateError
from tunegate.kernels.adamw import FusedAdamW

# --- what must be invisible -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changed",
    [
        {"tokens_per_batch": 16},  # one row a batch
        {"tokens_per_batch": 40},
        {"share_prefix": False},
        {"gradient_checkpointing": True},
        {"gradient_checkpointing": 1},
        {"gradient_checkpointing": "offload"},
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
    before = {m: vars(m).get("forward") for m in job.runner.model.modules()}
    job.run()
    assert not any(m.training for m in job.runner.model.modules())
    assert all(vars(m).get("forward") is before.get(m) for m in job.runner.model.modules())
    assert job.runner.fused is None or not job.runner.fused.recompute


def unfuse(job: Job) -> None:
    """Back to the model's own layers."""
    if job.runner.fused is not None:
        job.runner.fused.remove()
        job.runner.fused = None


def test_layers_are_recomputed_when_asked(tmp_path: Path) -> None:
    calls = {}
    for flag in (False, True):
        job = Job(tmp_path / str(flag), section(gradient_checkpointing=flag, max_steps=1))
        job.scores = [1.0]
        unfuse(job)
        counted: list[int] = []
        job.runner.model.model.layers[0].mlp.register_forward_pre_hook(lambda *a, counted=counted: counted.append(1))
        job.run()
        calls[flag] = len(counted)
    assert calls == {False: 1, True: 2}


def test_a_model_without_decoder_layers_to_recompute_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = Job(tmp_path / "a", section(gradient_checkpointing=True))
    unfuse(job)
    monkeypatch.setattr("transformers.modeling_layers.GradientCheckpointingLayer", nn.Bilinear)
    with pytest.raises(InputError, match="does not support gradient checkpointing"):
        job.run()


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


def test_an_unreadable_best_adapter_is_named(tmp_path: Path) -> None:
    best = Job(tmp_path, section(epochs=1.0)).run().state.best_step
    path = tmp_path / f"best-{best:08d}" / module.ADAPTER_FILE
    for spoil in (lambda: path.write_bytes(b"no tensors"), path.unlink):
        spoil()
        with pytest.raises(TunegateError, match="best adapter of this run cannot be read") as caught:
            Job(tmp_path, section(epochs=1.0)).run()
        assert path.name in str(caught.value)


# --- the steps ------------------------------------------------------------------------------------------------------


def test_a_run_cut_inside_its_first_epoch_ends_well(tmp_path: Path) -> None:
    result = Job(tmp_path, section(epochs=3.0, max_steps=4)).run()
    assert result.state.step == result.total_steps == 4
    assert 0.0 < result.epochs < 1.0


def test_the_rate_reaches_the_optimizer(tmp_path: Path) -> None:
    job = Job(tmp_path, section(epochs=1.0, warmup=0.0))
    total = job.run().total_steps
    assert [e["lr"] for e in job.steps] == pytest.approx([5e-3 * (1 - n / total) for n in range(total)])


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
    plain = FusedAdamW.step

    def spy(self: FusedAdamW, *args: Any) -> Any:
        grads = [p.grad for group in self.param_groups for p in group["params"]]
        seen.append(math.sqrt(sum(float(g.double().square().sum()) for g in grads)))
        return plain(self, *args)

    monkeypatch.setattr(FusedAdamW, "step", spy)
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
    error = module.not_finite_error("loss", math.inf, TrainState(step=6), tuple(f"f:{n}" for n in range(20)))
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
