"""Other trainers under the same rows, steps and gate: TRL gives the native loop's losses and adapter."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from task import call, write_task
from tiny import tiny_base, tiny_model
from toy_runs import Job, close, section, toy
from tunegate.adapter.inject import inject
from tunegate.adapter.spec import AdapterSpec
from tunegate.engine.backends import check_backend, find_backend, trl, unsloth
from tunegate.engine.runner import Runner
from tunegate.engine.schedule import StepPlan
from tunegate.engine.train import Hooks, Interrupted, TrainResult, mean_loss, train
from tunegate.errors import InputError, TunegateError

needs_trl = pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="needs trl: pip install 'tunegate[trl]'")


@dataclass
class TrlJob(Job):
    """The job of ``toy_runs``, its steps taken by TRL."""

    def run(self) -> TrainResult:
        def stop() -> bool:
            return self.stop_at is not None and bool(self.steps) and self.steps[-1]["step"] >= self.stop_at

        hooks = Hooks(self.evaluate, self.events.append, stop)
        backend = find_backend("trl")
        return backend(self.runner, self.injection, self.rows, self.settings, self.folder, self.key, hooks)


# --- the same run ---------------------------------------------------------------------------------------------------


@needs_trl
@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"method": "dora"},
        {"tokens_per_batch": 30},  # several padded batches a step
        {"gradient_checkpointing": True},
        {"schedule": "cosine", "lr_plus_ratio": 4.0, "weight_decay": 0.1, "clip": None},
        {"clip": 0.01},
    ],
    ids=lambda changed: "-".join(changed) or "plain",
)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_same_losses_and_adapter_as_the_native_loop(family: str, changed: dict[str, Any], tmp_path: Path) -> None:
    settings = section(**changed)
    ours, theirs = Job(tmp_path / "a", settings, family=family), TrlJob(tmp_path / "b", settings, family=family)
    one, two = ours.run(), theirs.run()
    assert len(theirs.losses) == one.total_steps == two.total_steps > 6
    assert theirs.losses[0] == pytest.approx(ours.losses[0], abs=1e-5)
    assert theirs.losses == pytest.approx(ours.losses, abs=1e-3)
    assert [e["lr"] for e in theirs.steps] == pytest.approx([e["lr"] for e in ours.steps])
    assert [e["grad_norm"] for e in theirs.steps] == pytest.approx([e["grad_norm"] for e in ours.steps], rel=1e-2)
    # Adam's first steps have size lr whatever the gradient's size, so rounding grows; 1e-3 is a fifth of one step
    close(ours.adapter, theirs.adapter, atol=1e-3)
    assert theirs.evaluated == ours.evaluated
    assert (two.state.tokens, two.state.target_tokens) == (one.state.tokens, one.state.target_tokens)
    assert two.epochs == one.epochs


@needs_trl
def test_the_runner_scores_as_before(tmp_path: Path) -> None:
    """The base's tensors are shared with PEFT's model, and its modules are not touched."""
    job = TrlJob(tmp_path, section(epochs=1.0))
    names = [name for name, _ in job.runner.model.named_modules()]
    weights = {name: p.clone() for name, p in job.runner.model.named_parameters() if "lora" not in name}
    result = job.run()
    assert [name for name, _ in job.runner.model.named_modules()] == names
    assert not any(m.training for m in job.runner.model.modules())
    for name, weight in job.runner.model.named_parameters():
        if "lora" not in name:
            assert torch.equal(weight, weights[name])
    assert -mean_loss(job.runner, job.rows, 200) == result.state.best_score


@needs_trl
def test_the_best_adapter_is_kept_and_patience_ends_the_run(tmp_path: Path) -> None:
    job = TrlJob(tmp_path, section(eval_every=2, patience=2, epochs=4.0), scores=[1.0, 3.0, 2.0, 2.5, 9.0])
    kept: dict[int, dict[str, torch.Tensor]] = {}
    scored = job.evaluate

    def evaluate(step: int) -> tuple[float, dict[str, Any]]:
        kept[step] = job.adapter
        return scored(step)

    job.evaluate = evaluate  # type: ignore[method-assign]
    result = job.run()
    assert (result.state.best_step, result.state.step, result.state.stopped_early) == (4, 8, True)
    close(job.adapter, kept[4], atol=0)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["best-00000004"]


@needs_trl
def test_dropout_is_on_in_the_adapter_alone(tmp_path: Path) -> None:
    """gpt2 has dropout of its own, which the native loop leaves off."""
    from transformers import GPT2LMHeadModel

    for dropout, same in ((0.0, True), (0.5, False)):
        job = TrlJob(tmp_path / str(dropout), section(dropout=dropout, lr=1e-9, max_steps=1), family="gpt2")
        assert isinstance(job.runner.model, GPT2LMHeadModel)
        job.runner.model.transformer.h[0].mlp.dropout.p = 0.5
        with torch.no_grad():
            for name, parameter in job.injection.parameters().items():
                if name.endswith("lora_B"):
                    parameter.normal_(generator=torch.Generator().manual_seed(0))
        job.run()
        plain = mean_loss(job.runner, StepPlan(job.rows, job.settings).rows(0), 200)
        assert (abs(job.losses[0] - plain) < 1e-4) == same


@needs_trl
def test_a_stopped_run_says_that_it_starts_again(tmp_path: Path) -> None:
    job = TrlJob(tmp_path, section(), stop_at=2)
    with pytest.raises(Interrupted, match="starts again from the first step"):
        job.run()
    again = TrlJob(tmp_path, section())
    again.run()
    assert again.steps[0]["step"] == 1
    assert "starts again" in next(e["text"] for e in again.events if e["event"] == "notice")


@needs_trl
def test_a_loss_that_is_not_finite_names_its_rows(tmp_path: Path) -> None:
    job = TrlJob(tmp_path, section(epochs=1.0))
    with torch.no_grad():
        next(p for n, p in job.injection.parameters().items() if n.endswith("lora_B")).fill_(float("inf"))
    with pytest.raises(TunegateError, match="step 1"):
        job.run()


@needs_trl
def test_a_whole_task(tmp_path: Path) -> None:
    path = write_task(tmp_path / "task", tiny_base(tmp_path / "base"))
    said = call("run", path, "--set", "train.backend=trl", "--set", "train.epochs=1")
    assert said.code in (0, 1), said.err
    assert "steps are computed by trl" in said.out + said.err
    assert "decision" in said.out


# --- what is refused ------------------------------------------------------------------------------------------------


def test_a_missing_package_is_named_with_the_way_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'tunegate\[trl\]'"):
        check_backend(section(backend="trl"), "cpu")
    check_backend(section(), "cpu")
    for version, says in (((3, 10, 13), "with Python 3.11 or newer, pip"), ((3, 11, 0), "fix: pip")):
        monkeypatch.setattr(sys, "version_info", version)
        with pytest.raises(InputError) as told:
            check_backend(section(backend="trl"), "cpu")
        assert says in str(told.value), str(told.value)


def test_unsloth_needs_cuda_and_does_no_dora() -> None:
    with pytest.raises(InputError) as caught:
        check_backend(section(backend="unsloth", method="dora"), "cpu")
    text = str(caught.value)
    assert "CUDA" in text and "DoRA" in text and "backend: native" in text


def test_a_task_with_an_unusable_backend_fails_before_anything_runs(tmp_path: Path) -> None:
    path = write_task(tmp_path / "task", tiny_base(tmp_path / "base"))
    said = call("run", path, "--set", "train.backend=unsloth", "--set", "train.device=cpu")
    assert said.code == 2
    assert "unsloth" in said.err and "native" in said.err
    assert not (tmp_path / "task" / "runs").exists()


def test_layers_that_peft_does_not_know_are_refused() -> None:
    class Packed(torch.nn.Linear):
        pass

    model = tiny_model()
    model.model.layers[0].mlp.up_proj = Packed(32, 64, bias=False)
    injection = inject(model, AdapterSpec(4, 8.0), seed=0)
    with pytest.raises(InputError, match="Packed"):
        trl._check_bases(injection)


@needs_trl
def test_an_adapter_on_the_head_is_refused(tmp_path: Path) -> None:
    model = tiny_model(tie_word_embeddings=False)
    runner = Runner(model)
    injection = inject(model, AdapterSpec(4, 8.0, target_modules=("lm_head",)), seed=0)
    with pytest.raises(InputError, match="output head"):
        trl.train(runner, injection, toy(), section(backend="trl"), tmp_path, "key", Hooks(lambda step: (0.0, {})))


def test_unsloth_needs_a_base_in_a_folder() -> None:
    with pytest.raises(InputError, match="where that is"):
        unsloth._folder_of(Runner(tiny_model()))


def test_native_is_the_training_loop() -> None:
    assert find_backend("native") is train


# --- rows -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [1, 16, 40, 10_000])
def test_padded_batches_hold_every_row_once(tokens: int) -> None:
    rows = toy(9)
    batches = trl.padded_batches(rows, tokens)
    seen = []
    for batch in batches:
        assert len(batch["input_ids"]) == 1 or batch["input_ids"].numel() <= tokens
        for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
            length = int(mask.sum())
            assert mask[:length].all()
            assert (labels[length:] == -100).all()
            seen.append((tuple(ids[:length].tolist()), tuple((labels[:length] != -100).tolist())))
            assert (labels[:length][labels[:length] != -100] == ids[:length][labels[:length] != -100]).all()
    assert sorted(seen) == sorted((row.ids, row.target) for row in rows)
