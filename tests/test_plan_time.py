"""Operations against torch's own count, prices, the device sheet, advice and refusal."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tiny import tiny_model
from tunegate.adapter.inject import inject
from tunegate.adapter.spec import AdapterSpec
from tunegate.errors import InputError
from tunegate.plan import devices
from tunegate.plan.devices import PACKAGED, Device, load_sheet
from tunegate.plan.memory import Evaluation, PlanInputs, estimate
from tunegate.plan.published import derivation, points
from tunegate.plan.recommend import METHODS, advise, as_method, best_option, fit_problem, method_name, option
from tunegate.plan.shapes import llama_shape, shape_of_model
from tunegate.plan.time import Workload, answer_time, cost, even_rows, operations_per_token, training_time

EIGHT = llama_shape("Llama-3.1-8B", (32, 4096, 32, 8, 128, 14336, 128256))
GPU: dict[str, Any] = {"engine": "eager", "itemsize": 2, "adapter_itemsize": 2, "dropout": False}
A100 = load_sheet(PACKAGED).named(["a100-80gb"])[0]


def eight(tokens: int = 2048, **more: Any) -> PlanInputs:
    return PlanInputs(EIGHT, EIGHT.targets(AdapterSpec(rank=16, alpha=32.0)), tokens, tokens, **{**GPU, **more})


def counted(model: Any, ids: torch.Tensor) -> tuple[float, float]:
    """Operations of forward and of both passes, by torch's counter."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as forward:
        loss = torch.nn.functional.cross_entropy(model(ids).logits[0], ids[0])
    before = forward.get_total_flops()
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    return before, before + backward.get_total_flops()


@pytest.mark.parametrize("rank", [4, 16])
def test_operations_are_those_that_torch_counts(rank: int) -> None:
    """All but attention's scores, which depend on the kernel (a few per cent here)."""
    model = tiny_model("llama", hidden_size=128, intermediate_size=256, tie_word_embeddings=False)
    model.set_attn_implementation("eager")
    length = 8
    shape = shape_of_model(model, "x")
    spec = AdapterSpec(rank=rank, alpha=2.0 * rank)
    inject(model, spec, seed=0)
    forward, whole = counted(model, torch.arange(length)[None])
    p = PlanInputs(shape, shape.targets(spec), length, length)
    found = operations_per_token(p, Workload((length,), 1.0, 1))
    adapters = found["adapters"] / 3
    assert length * (found["forward"] + adapters) == pytest.approx(forward, rel=0.03)
    # autograd gives the first layer's q, k and v no gradient of their input; the planner counts it
    assert length * sum(found.values()) == pytest.approx(whole, rel=0.06)


def test_an_eight_billion_step_by_hand() -> None:
    """Linear 6.98e9, head 0.525e9; 2 forward and 2 backward each; scores 4 x 32 x 4096 x 1024.5, 3.5 times."""
    w = even_rows(100, 2048, 1.0, 2048)
    total = sum(operations_per_token(replace(eight(), targets=()), w).values())
    scores = 4 * 32 * 4096 * 1024.5
    assert total == pytest.approx(4 * (6_979_321_856 + 525_336_576) + 3.5 * scores, rel=1e-6)
    full = sum(operations_per_token(replace(eight(), targets=(), method="full"), w).values())
    assert full == pytest.approx(6 * (6_979_321_856 + 525_336_576) + 3.5 * scores, rel=1e-6)


@given(st.lists(st.integers(1, 4000), min_size=1, max_size=50), st.floats(0.1, 10))
def test_time_grows_with_rows_and_epochs(lengths: list[int], epochs: float) -> None:
    w = Workload(tuple(lengths), epochs, 10)
    longer = Workload((*lengths, 100), epochs, 10)
    assert training_time(eight(), longer, A100).seconds > training_time(eight(), w, A100).seconds
    assert training_time(eight(checkpointing="all"), w, A100).seconds > training_time(eight(), w, A100).seconds
    assert 1 <= w.mean_context <= max(lengths)


def test_price_is_hours_times_price() -> None:
    assert cost(7200, Device("x", "cuda", 1, 1, 1, 1.5, 0.5)) == (3.0, 1.0)
    assert cost(7200, Device("x", "cuda", 1, 1, 1)) == (None, None)


def test_answers_read_all_weights_for_every_token() -> None:
    """8e9 parameters in 16 bits over 2,039 GB/s: 7.9 ms a token at least."""
    seconds = answer_time(eight(), [1], 100, A100)
    assert seconds == pytest.approx(100 * 16.06e9 / 2039e9, rel=0.05)
    assert answer_time(eight(), [], 100, A100) == 0.0


# --- published figures -------------------------------------------------------------------------------------------


def test_the_rules_are_met_within_ten_per_cent() -> None:
    for point in points():
        if point.group == "rule":
            assert abs(point.error) <= 0.10, point


def test_measured_peaks_of_others_are_met_within_ten_per_cent() -> None:
    """torchtune's, PEFT's and the 16-bit ones of LitGPT and LLaMA-Factory's wiki, whose inputs are known."""
    known = [p for p in points() if p.source.startswith(("torchtune", "PEFT")) and p.group == "memory"]
    known += [p for p in points() if p.what in ("Llama-3-8B LoRA, A10G", "Llama-2-7B LoRA, batch of 4")]
    assert len(known) == 10
    for point in known:
        assert abs(point.error) <= 0.10, point


def test_the_parts_of_the_70b_rule_are_those_of_one_run() -> None:
    """131,072,000 = 80 layers x rank 64 x (q: 8192 + 8192, v: 8192 + 1024); fp32 gradients and two fp32 moments."""
    p = derivation()
    assert p.trainable == 80 * 64 * (8192 + 8192 + 8192 + 1024) == 131_072_000
    memory = estimate(p)
    assert (memory.of("gradients"), memory.of("optimizer")) == (4 * p.trainable, 8 * p.trainable)
    parts = {point.what: point.predicted for point in points() if point.what.startswith("70B QLoRA: ")}
    assert parts["70B QLoRA: gradients"] == memory.of("gradients") / 1e9
    assert (
        parts["70B QLoRA: all of these, adapters and context"]
        == memory.total / 1e9
        > sum(parts[f"70B QLoRA: {name}"] for name in ("base", "gradients", "Adam", "activations"))
    )


def test_a_range_has_no_error_inside() -> None:
    from tunegate.plan.published import Point

    assert Point("g", "w", 2, 3, "h", 2.5, "", "").error == 0
    assert Point("g", "w", 2, 3, "h", 3.3, "", "").error == pytest.approx(0.1)
    assert Point("g", "w", 2, 3, "h", 1.0, "", "").error == pytest.approx(-0.5)


# --- the sheet ---------------------------------------------------------------------------------------------------


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


ONE = "{name: mine, memory_gib: 16, tflops: 50, bandwidth: 400, on_demand: 1}"


def test_the_packaged_sheet_names_the_devices_that_people_have() -> None:
    sheet = load_sheet(PACKAGED)
    names = {device.name for device in sheet.devices}
    assert {"rtx-3060", "rtx-5090", "l4", "a10", "l40s", "a100-40gb", "a100-80gb", "h100-sxm", "h200", "b200"} <= names
    assert any(device.kind == "apple" for device in sheet.devices)
    assert all(d.spot is None or d.on_demand is None or d.spot <= d.on_demand for d in sheet.devices)


def test_a_sheet_of_the_users_own_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNEGATE_HOME", str(tmp_path))
    assert load_sheet().path == PACKAGED
    own = write(tmp_path / "devices.yaml", f'date: "2026-01-01"\ndevices: [{ONE}]\n')
    assert load_sheet().path == own
    assert [d.name for d in load_sheet().devices] == ["mine"]
    other = write(tmp_path / "x.yaml", f'date: "2026-01-02"\ndevices: [{ONE}]\n')
    assert load_sheet(other).date == "2026-01-02"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("date: yesterday\ndevices: []\n", "date"),
        ('date: "2026-01-01"\ndevices: []\n', "no devices"),
        (f'date: "2026-01-01"\ndevices: [{ONE}, {ONE}]\n', "stands twice"),
        ('date: "2026-01-01"\ndevices: [{name: x, memory_gib: 16, tflops: 50}]\n', "bandwidth is missing"),
        ('date: "2026-01-01"\ndevices: [{name: x, memory_gib: -1, tflops: 5, bandwidth: 1}]\n', "memory_gib"),
        (
            'date: "2026-01-01"\ndevices: [{name: x, memory: 1, tflops: 5, bandwidth: 1, memory_gib: 1}]\n',
            "unknown key",
        ),
        ("- 1\n", "wrong value"),
    ],
)
def test_a_wrong_sheet_says_what_is_wrong(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(InputError, match=says):
        load_sheet(write(tmp_path / "x.yaml", text))


def test_an_unknown_device_has_a_nearest_name() -> None:
    with pytest.raises(InputError, match="h100-sxm"):
        load_sheet(PACKAGED).named(["h100"])


def test_the_machine_has_memory_and_a_key() -> None:
    machine = devices.this_machine()
    assert machine.cores >= 1 and len(machine.key) == 16
    assert replace(machine, level="other").key != machine.key
    assert 0 < devices.available_memory() <= devices.total_memory() * 1.01
    one, two = (devices.cpu_device(replace(machine, cores=4), 4, threads) for threads in (1, 2))
    assert two.tflops == pytest.approx(2 * one.tflops)


# --- advice ------------------------------------------------------------------------------------------------------


def test_every_method_has_its_name() -> None:
    assert [method_name(as_method(eight(), name)) for name in METHODS] == list(METHODS)
    with pytest.raises(ValueError, match="unknown method"):
        as_method(eight(), "galore")


def test_quantization_is_advised_only_where_it_is_needed() -> None:
    w = even_rows(1000, 512, 1.0, 2048)
    sheet = load_sheet(PACKAGED)
    small, large = sheet.named(["rtx-3060", "h200"])
    p = eight(evaluation=Evaluation())
    assert best_option(p, w, small, ("lora", "qlora")).method == "qlora"
    assert best_option(p, w, large, ("lora", "qlora")).method == "lora"
    nothing = option(replace(p, shape=replace(EIGHT, other=10**11)), w, small, "qlora")
    assert nothing.inputs is None and nothing.time is None and nothing.most_tokens == 0
    assert nothing.money == (None, None)


def test_advice_follows_the_rows() -> None:
    def rank(rows: int) -> str:
        return {a.what: a.value for a in advise(even_rows(rows, 100, 1, 1000), [], None)}["rank"]

    assert [rank(n) for n in (100, 1000, 10_000, 100_000)] == ["8", "16", "16", "32"]


@given(st.integers(50, 20_000), st.integers(10, 3000))
def test_steps_hold_several_rows(rows: int, tokens: int) -> None:
    advice = {a.what: a for a in advise(even_rows(rows, tokens, 1, 4096), [], None)}
    value = int(advice["tokens_per_step"].value)
    assert value >= min(4 * tokens, 256)
    assert value & (value - 1) == 0


# --- refusal -----------------------------------------------------------------------------------------------------


def native(tokens: int, **more: Any) -> PlanInputs:
    shape = llama_shape("1B", (16, 2048, 32, 8, 64, 8192, 32000))
    return PlanInputs(shape, shape.targets(AdapterSpec(rank=16, alpha=32.0)), tokens, tokens // 4, **more)


def test_what_fits_is_not_refused() -> None:
    p = native(2048)
    assert fit_problem(p, estimate(p).total, 500) is None


def test_three_changes_are_named_the_cheapest_first() -> None:
    p = native(8192)
    problem = fit_problem(p, estimate(p).total - 1, 500, quantizes=True, eight_bit=True)
    assert problem is not None
    assert problem.fix.count("`") == 6
    assert problem.fix.startswith("`train.tokens_per_batch: 4096`")
    assert "weights" in problem.got


def test_every_change_that_is_named_does_fit() -> None:
    from tunegate.plan.recommend import changes

    p = native(8192)
    for share in (0.9, 0.6, 0.4):
        available = round(estimate(p).total * share)
        problem = fit_problem(p, available, 500, quantizes=True)
        assert problem is not None
        by_name = {
            change.setting: change.inputs for change in changes(p, 500, quantizes=True, eight_bit=False, offloads=False)
        }
        named = [part for part in problem.fix.split("`")[1::2] if part in by_name]
        assert named
        assert all(estimate(by_name[name]).total <= available for name in named)


def test_settings_that_do_not_exist_here_are_not_named() -> None:
    p = native(8192)
    problem = fit_problem(p, round(estimate(p).total * 0.1), 500)
    assert problem is not None
    assert "nf4" not in problem.fix and "8bit" not in problem.fix
    assert "no setting brings it below" in problem.fix


def test_a_calibrated_machine_is_believed() -> None:
    p = native(2048)
    total = estimate(p).total
    assert fit_problem(p, total, 500, correct=lambda _, size: size + 1) is not None
    assert fit_problem(p, total // 2, 500, correct=lambda _, size: size // 2) is None


def test_the_documented_figures_are_the_computed_ones() -> None:
    text = (Path(__file__).resolve().parent.parent / "docs" / "plan.md").read_text(encoding="utf-8")
    for p in points():
        assert f"| {p.what} | {p.published} {p.unit} | {p.predicted:,.2f} | {p.error:+.0%} |" in text, p.what
