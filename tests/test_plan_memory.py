"""Memory: the replayed allocations against the engine's own, golden values by hand, and laws."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tiny import tiny_model
from toy_runs import section
from tunegate.adapter.inject import inject
from tunegate.adapter.spec import AdapterSpec
from tunegate.data.pack import make_batch
from tunegate.data.types import Rendered
from tunegate.engine import generate, workspace
from tunegate.engine.arena import Arena
from tunegate.engine.optimizers import make_optimizer, step_bytes
from tunegate.engine.runner import Runner
from tunegate.engine.scheduler import Scheduler
from tunegate.kernels import native
from tunegate.kernels.adamw8 import LEAST
from tunegate.plan.memory import (
    Evaluation,
    PlanInputs,
    cheapest_checkpointing,
    estimate,
    largest_tokens,
    layer_bytes,
    nf4_constants,
    weight_bytes,
    with_tokens,
)
from tunegate.plan.memory import workspaces as planned_workspaces
from tunegate.plan.recommend import changes
from tunegate.plan.shapes import Target, llama_shape, shape_of_model

GPU: dict[str, Any] = {"engine": "eager", "itemsize": 2, "adapter_itemsize": 2, "dropout": False}
SMALL = llama_shape("small", (4, 64, 4, 2, 16, 128, 1000))


def inputs(tokens: int = 100, **more: Any) -> PlanInputs:
    targets = SMALL.targets(AdapterSpec(rank=4, alpha=8.0))
    return PlanInputs(SMALL, targets, tokens, tokens, **more)


# --- the CPU engine ----------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(0, 3000), st.sampled_from([2, 4]), st.booleans()), max_size=40))
def test_the_arena_places_like_the_workspace(sizes: list[tuple[int, int, bool]]) -> None:
    before = workspace.BLOCK_BYTES
    workspace.BLOCK_BYTES = 4096
    try:
        real, arena = workspace.Workspace(), Arena()
        for count, itemsize, inside in sizes:
            dtype = torch.float32 if itemsize == 4 else torch.bfloat16
            if inside:
                with real.scope(), arena.scope():
                    real.take(count, dtype=dtype)
                    arena.take(count, itemsize)
            else:
                real.take(count, dtype=dtype)
                arena.take(count, itemsize)
        assert arena.reserved == real.reserved()
        assert (arena._block, arena._offset) == real.mark()
        assert arena.touched <= arena.reserved
    finally:
        workspace.BLOCK_BYTES = before


@pytest.mark.skipif(native.library() is None, reason="the fused layers need the C++ kernels")
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "mistral"])
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("recompute", [0, 1, 2])
def test_the_replay_reserves_what_the_engine_reserves(
    family: str, dora: bool, dropout: float, recompute: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Small blocks, so that a tensor too many or too few is seen."""
    monkeypatch.setattr(workspace, "BLOCK_BYTES", 2 << 20)
    sizes = {"hidden_size": 128, "intermediate_size": 384}
    model = tiny_model(family, **sizes)
    runner = Runner(model.requires_grad_(False))
    assert runner.fused is not None
    runner.fused._pool.clear()
    runner.fused._scratch, runner.fused.temporary = workspace.Workspace(), workspace.Workspace()
    spec = AdapterSpec(rank=8, alpha=16.0, dropout=dropout, use_dora=dora)
    injection = inject(model, spec, seed=0)
    for layer in injection.modules.values():
        layer.training = True
    runner.fused.save_less(recompute)
    rows = [Rendered(str(n), tuple(range(3, 303)), (False,) * 290 + (True,) * 10) for n in range(5)]
    batch = make_batch(rows, share_prefix=False)
    runner.loss_sum(batch).backward()
    shape = shape_of_model(tiny_model(family, **sizes), family)
    p = PlanInputs(
        shape, shape.targets(spec), batch.layout.tokens, batch.n_targets, method="dora" if dora else "lora",
        dropout=dropout > 0, checkpointing=("none", "some", "all")[recompute],  # type: ignore[arg-type]
        kept_layers=2 - recompute,
    )  # fmt: skip
    assert planned_workspaces(p).reserved == runner.fused.reserved()


# --- by hand -----------------------------------------------------------------------------------------------------


def test_the_constants_of_double_quantization() -> None:
    """4096 x 4096: 262,144 blocks of 64 with a byte each, 1,024 blocks of those with an fp32: 0.127 bits a weight."""
    assert nf4_constants(4096**2) == 262_144 + 4 * 1024
    assert 8 * nf4_constants(4096**2) / 4096**2 == pytest.approx(8 / 64 + 32 / (64 * 256))
    assert nf4_constants(4096**2, double=False) == 4 * 262_144
    assert nf4_constants(65) == 2 + 4


def test_the_bytes_of_quantized_weights_are_those_of_the_kernel() -> None:
    from tunegate.kernels.formats import Recipe
    from tunegate.kernels.nf4 import quantize

    made = quantize(torch.randn(96, 160))
    p = inputs(quantization="nf4")
    held, constants = weight_bytes(replace(p, shape=replace(SMALL, linears=SMALL.linears[:1])))
    one = SMALL.linears[0]
    assert constants == nf4_constants(one.elements)
    assert held == one.elements // 2 + 2 * (SMALL.embedding + SMALL.head) + 4 * SMALL.other
    rows = quantize(torch.randn(96, 160), Recipe.of("int8"))
    held, constants = weight_bytes(replace(p, quantization="int8", shape=replace(SMALL, linears=SMALL.linears[:1])))
    assert (constants, held) == (
        4 * one.outputs, one.elements + 2 * (SMALL.embedding + SMALL.head) + 4 * SMALL.other
    )  # fmt: skip
    assert rows.nbytes == 96 * 160 + 4 * 96
    stored = [made.codes, made.absmax_codes, made.nested_absmax]
    assert sum(t.numel() * t.element_size() for t in stored if t is not None) == 96 * 160 // 2 + nf4_constants(96 * 160)


def test_a_layer_by_hand() -> None:
    """hidden 64, heads 4 and 2 of 16, MLP 128, bf16: two norms (fp32 copy and output), q, k, v, attention's output and
    log-sum-exp, four MLP activations, seven adapters of rank 4."""
    p = inputs(**GPU)
    norms, attention, mlp, low = 2 * (4 + 2) * 64, 2 * (64 + 64 + 64) + 4 * 4, 4 * 2 * 128, 2 * 7 * 4
    assert layer_bytes(p) == norms + attention + 2 * 0 + mlp + low
    compiled = 2 * 2 * 64 + 2 * 64 + attention + 2 * 2 * 128 + low
    assert layer_bytes(replace(p, engine="compiled")) == compiled


def test_trained_parts_by_hand() -> None:
    """One layer of 4096 x 4096 at rank 16: 131,072 parameters, 0.78 % of it."""
    p = replace(inputs(**GPU), targets=(Target(4096, 4096, 16),))
    assert p.trainable == 131_072
    assert p.trainable / 4096**2 == pytest.approx(0.0078, rel=0.01)
    memory = estimate(p)
    assert memory.of("adapters") == memory.of("gradients") == 262_144
    assert memory.of("optimizer") == 524_288
    eight = estimate(replace(p, optimizer="adamw_8bit"))
    assert eight.of("optimizer") == 2 * 131_072 + 8 * 512
    assert estimate(replace(p, method="dora")).of("gradients") == 262_144 + 2 * 4096


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit"])
@pytest.mark.parametrize("dora", [False, True])
def test_the_optimizers_bytes_are_those_it_holds(optimizer: Any, dora: bool) -> None:
    """Small tensors among them, whose moments stay fp32."""
    model = tiny_model("llama", hidden_size=128, intermediate_size=384)
    spec = AdapterSpec(rank=32, alpha=16.0, use_dora=dora)
    shape = shape_of_model(model, "llama")
    parameters = inject(model, spec, seed=0).parameters()
    assert {p.numel() >= LEAST for p in parameters.values()} == {True, False}
    settings = section(optimizer=optimizer)
    made = make_optimizer(parameters, settings)
    for parameter in parameters.values():
        parameter.grad = torch.ones_like(parameter)
    made.step()
    held = [t for state in made.state.values() for name, t in state.items() if name != "step"]
    method: Any = "dora" if dora else "lora"
    p = PlanInputs(shape, shape.targets(spec), 100, 100, method=method, optimizer=optimizer)
    assert estimate(p).of("optimizer") == sum(t.nbytes for t in held)
    gradients = sum(4 * parameter.numel() for parameter in parameters.values())
    assert step_bytes(parameters, settings) == gradients + sum(t.nbytes for t in held)


def test_a_run_that_does_not_fit_is_offered_8_bit_moments() -> None:
    p = replace(inputs(**GPU), targets=(Target(4096, 4096, 64),))
    offered = {
        change.setting: change.inputs for change in changes(p, 8, quantizes=True, eight_bit=True, offloads=False)
    }
    after = offered["train.optimizer: adamw_8bit"]
    assert after.optimizer == section(optimizer="adamw_8bit").optimizer
    assert estimate(after).total < estimate(p).total


def test_the_peak_is_the_largest_moment_and_not_their_sum() -> None:
    p = inputs(**GPU, loss="whole", evaluation=Evaluation(rows=4, prompt=16, new=8))
    memory = estimate(p)
    always = sum(part.bytes for part in memory.parts if part.phase in ("always", "kept", "steps"))
    training = sum(part.bytes for part in memory.parts if part.phase == "training")
    loss, backward, answers, test = (memory._held(m) for m in ("loss", "backward", "evaluation", "test"))
    assert memory.total == max(loss, backward, answers, test)
    assert loss == always + training + memory.of("logits")
    assert sum(part.bytes for part in memory.at_peak()) == memory.total


def test_the_optimizer_is_not_held_while_the_test_set_is_answered() -> None:
    """A large rank and many test items: the peak is the larger of the two, not both."""
    e = Evaluation(rows=64, valid_rows=4, prompt=64, new=8)
    p = inputs(evaluation=e)
    memory = estimate(p)
    trained = memory.of("gradients", "optimizer")
    rows = {phase: sum(part.bytes for part in memory.parts if part.phase == phase) for phase in ("evaluation", "test")}
    assert 0 < rows["evaluation"] * 10 < rows["test"]
    assert memory._held("test") - memory._held("evaluation") == rows["test"] - rows["evaluation"] - trained


@pytest.mark.parametrize("rows, prompt, new, prefix", [(6, 20, 7, 10), (64, 300, 12, 0), (2, 5000, 3, 4), (1, 9, 3, 0)])
def test_the_cache_is_what_generation_asks_for(
    rows: int, prompt: int, new: int, prefix: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pages and the shared prefix of one call, byte for byte; they are made and not used."""

    class Made(Exception):
        pass

    def held(store: Any) -> Any:
        parts = [part for kept in (store.layers, store.prefix) for both in kept.values() for part in both]
        raise Made(sum(part.nbytes for part in parts))

    monkeypatch.setattr(Scheduler, "add", lambda self, row: held(self.store))
    model = tiny_model("llama")
    prompts = [[2] * prefix + [5 + n] * prompt for n in range(rows)]
    with pytest.raises(Made) as made:
        generate.generate(Runner(model), prompts, generate.Sampling(new, (), rows=rows))
    shape = shape_of_model(model, "llama")
    p = PlanInputs(shape, (), 100, 100, evaluation=Evaluation(rows, rows, prompt, new, prefix))
    assert estimate(p).of("KV cache") == 2 * made.value.args[0]  # in evaluation and in test


# --- laws -------------------------------------------------------------------------------------------------------------


@given(
    tokens=st.integers(1, 5000), engine=st.sampled_from(["native", "eager", "compiled"]),
    method=st.sampled_from(["lora", "dora"]), dropout=st.booleans(),
)  # fmt: skip
def test_more_of_anything_takes_no_less(tokens: int, engine: Any, method: Any, dropout: bool) -> None:
    p = inputs(tokens, engine=engine, method=method, dropout=dropout, itemsize=4 if engine == "native" else 2)
    total = estimate(p).total
    assert estimate(with_tokens(p, tokens + 64)).total >= total
    assert estimate(replace(p, checkpointing="all")).of("activations") <= estimate(p).of("activations") + (8 << 20)
    assert estimate(replace(p, quantization="nf4")).of("weights") < estimate(p).of("weights")
    assert estimate(replace(p, optimizer="adamw_8bit")).of("optimizer") <= estimate(p).of("optimizer")
    assert all(part.bytes >= 0 for part in estimate(p).parts)


@given(st.integers(10_000_000, 2_000_000_000))
def test_the_largest_batch_fits_and_the_next_does_not(budget: int) -> None:
    p = inputs(64, **GPU)
    most = largest_tokens(p, budget)
    if most:
        assert estimate(with_tokens(p, most)).total <= budget
    if most < 1 << 20:
        assert estimate(with_tokens(p, most + 64)).total > budget


def test_recomputation_is_chosen_only_where_it_is_needed() -> None:
    p = inputs(20_000, **GPU)
    plenty, tight = estimate(p).total, estimate(replace(p, checkpointing="all")).total
    kept = cheapest_checkpointing(p, plenty)
    again = cheapest_checkpointing(p, (plenty + tight) // 2)
    assert kept is not None and kept.checkpointing == "none"
    assert again is not None and again.checkpointing == "all"
    assert cheapest_checkpointing(p, tight - 1) is None
