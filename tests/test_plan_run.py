"""The plan beside a run: prediction, measurement, calibration, probe, refusal, and the command."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from task import call, write_task
from tiny import tiny_base
from tunegate.config import load_config
from tunegate.errors import InputError, TunegateError
from tunegate.files import read_json, write_text
from tunegate.pipeline import planning
from tunegate.pipeline.probe import how_many
from tunegate.pipeline.reporter import Silent
from tunegate.plan import calibrate
from tunegate.plan.calibrate import Observation, correct, kind_of, load_observations, observe, store_path
from tunegate.plan.devices import Machine
from tunegate.plan.memory import PlanInputs, estimate
from tunegate.plan.shapes import llama_shape

MACHINE = Machine("a processor", 2, "avx2", "2.0")
SHAPE = llama_shape("small", (2, 64, 4, 2, 16, 128, 1000))
INPUTS = PlanInputs(SHAPE, (), 100, 10)


@pytest.fixture
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TUNEGATE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def seen(p: PlanInputs = INPUTS, **more: Any) -> Observation:
    given: dict[str, Any] = {
        "kind": kind_of(p), "tokens": 100, "predicted_bytes": 1000, "measured_bytes": 1200,
        "predicted_seconds": 10.0, "measured_seconds": 15.0, "source": "run", "when": "2026-01-01T00:00:00+00:00",
    }  # fmt: skip
    return Observation(**{**given, **more})


# --- calibration -------------------------------------------------------------------------------------------------


def test_nothing_seen_changes_nothing() -> None:
    found = correct(INPUTS, 5000, 7.0, [])
    assert (found.bytes, found.seconds) == (5000, 7.0)
    assert found.bytes_from == found.seconds_from == calibrate.UNMEASURED


def test_memory_moves_by_the_difference_and_time_by_the_ratio() -> None:
    found = correct(INPUTS, 5000, 20.0, [seen()])
    assert (found.bytes, found.seconds) == (5200, 30.0)
    assert "1 run of this base with these settings" in found.bytes_from


def test_runs_like_it_come_first() -> None:
    other = replace(INPUTS, method="dora")
    base = replace(INPUTS, shape=replace(SHAPE, name="another"))
    history = [seen(other, measured_seconds=100.0), seen(base, measured_seconds=40.0)]
    assert correct(INPUTS, 1000, 10.0, history).seconds == 40.0  # same kind, another base
    assert correct(INPUTS, 1000, 10.0, history[:1]).seconds == 100.0  # only that this machine is slow
    assert correct(INPUTS, 1000, 10.0, [*history, seen()]).seconds == 15.0


def test_the_newest_five_count_and_their_median() -> None:
    history = [seen(measured_seconds=float(s)) for s in (900, 10, 20, 30, 40, 50)]
    assert correct(INPUTS, 1000, 10.0, history).seconds == 30.0


def test_what_was_not_measured_does_not_count() -> None:
    history = [seen(), seen(measured_bytes=None, measured_seconds=None)]
    found = correct(INPUTS, 5000, 20.0, history)
    assert (found.bytes, found.seconds) == (5200, 30.0)


def test_observations_are_kept_for_each_machine(own_home: Path) -> None:
    observe(MACHINE, seen())
    observe(MACHINE, seen(source="probe"))
    observe(replace(MACHINE, level="amx"), seen())
    assert [o.source for o in load_observations(MACHINE)] == ["run", "probe"]
    assert len(list((own_home / "plan").iterdir())) == 2
    for _ in range(calibrate.KEPT + 3):
        observe(MACHINE, seen())
    assert len(load_observations(MACHINE)) == calibrate.KEPT


@pytest.mark.parametrize("text", ["", "{", "[]", '{"schema": "Calibration/9", "observations": []}',
                                  '{"schema": "Calibration/1", "observations": [{"kind": 1}]}'])  # fmt: skip
def test_a_damaged_store_is_an_error(own_home: Path, text: str) -> None:
    write_text(store_path(MACHINE), text)
    with pytest.raises(InputError, match="damaged"):
        load_observations(MACHINE)


# --- beside a run ------------------------------------------------------------------------------------------------


@pytest.fixture
def task(tmp_path: Path, tiny_llama: Path, own_home: Path) -> Path:
    return write_task(tmp_path / "work", tiny_llama)


def run_folder(task: Path) -> Path:
    (folder,) = (task.parent / "runs" / "task").glob("run-*")
    return folder


def test_a_run_keeps_its_prediction_and_teaches_the_next(task: Path) -> None:
    first = json.loads(call("plan", task, "--json").out)["this_machine"]
    assert first["predicted"]["seconds_from"] == calibrate.UNMEASURED
    trained = json.loads(call("train", task, "--json").out)["training"]
    kept = read_json(run_folder(task) / "plan.json")
    assert kept["estimated"]["bytes"] == kept["memory"]["total"] > 0
    assert kept["measured"]["seconds"] == trained["seconds"]
    assert kept["measured"]["steps"] == trained["steps"]
    after = json.loads(call("plan", task, "--json").out)["this_machine"]
    assert "1 run of this base" in after["predicted"]["seconds_from"]
    ratio = trained["steps"] / after_steps(task)
    assert after["predicted"]["seconds"] * ratio == pytest.approx(trained["seconds"], rel=1e-6)


def after_steps(task: Path) -> int:
    return planning.plan_task(load_config(task), Silent()).workload.steps


def test_the_plan_of_a_task_is_that_of_the_prepared_run(task: Path) -> None:
    from tunegate.pipeline.prepare import prepare

    config = load_config(task)
    light, whole = planning.plan_task(config, Silent()), planning.plan_prepared(prepare(config, Silent()))
    assert light.workload == whole.workload
    assert light.inputs.targets == whole.inputs.targets
    assert light.inputs.tokens == whole.inputs.tokens
    assert light.longest == whole.longest
    assert replace(light.inputs.shape, name="") == replace(whole.inputs.shape, name="")


def test_a_second_run_leaves_the_plan_as_it_is(task: Path) -> None:
    call("train", task)
    path = run_folder(task) / "plan.json"
    before = path.read_bytes()
    assert call("train", task).code == 0
    assert path.read_bytes() == before


def test_a_run_that_does_not_fit_is_refused_with_ways_out(task: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(task)
    needed = estimate(planning.plan_task(config, Silent()).inputs).total
    monkeypatch.setattr(planning, "available_memory", lambda: needed - 1)
    said = call("run", task)
    assert said.code == 1
    assert "will not fit in memory" in said.err
    assert "`train.tokens_per_batch: " in said.err
    assert not (run_folder(task) / "plan.json").exists()
    assert not (run_folder(task) / "train").exists()
    monkeypatch.setattr(planning, "available_memory", lambda: needed)
    planning.check_fit(planning.predict(planning.plan_task(config, Silent())))
    with pytest.raises(TunegateError):
        monkeypatch.setattr(planning, "available_memory", lambda: 0)
        planning.check_fit(planning.predict(planning.plan_task(config, Silent())))


def test_a_peak_of_an_earlier_run_is_not_taken_for_this_ones(task: Path) -> None:
    """Runs of one process share one peak: only the first that raises it has measured anything."""
    prediction = planning.predict(planning.plan_task(load_config(task), Silent()))
    call("train", task)
    from tunegate import records
    from tunegate.plan.devices import this_machine

    folder = run_folder(task)
    record = records.load(folder / "train" / "run.json", records.RunRecord)
    planning.finish(prediction, folder, record, peak_before=planning.peak_rss() + 1)
    assert load_observations(this_machine())[-1].measured_bytes is None
    assert read_json(folder / "plan.json")["measured"]["bytes"] is None


def test_the_measured_peak_is_the_next_prediction(task: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One run of this base with these settings: what it took is what the next one is said to take."""
    prediction = planning.predict(planning.plan_task(load_config(task), Silent()))
    call("train", task)
    from tunegate import records
    from tunegate.plan.devices import this_machine

    store_path(this_machine()).unlink()
    folder = run_folder(task)
    record = records.load(folder / "train" / "run.json", records.RunRecord)
    monkeypatch.setattr(planning, "peak_rss", lambda: 1_234_567_890)
    planning.finish(prediction, folder, record, peak_before=1)
    assert read_json(folder / "plan.json")["measured"]["bytes"] == 1_234_567_890
    after = planning.predict(planning.plan_task(load_config(task), Silent()))
    assert after.corrected.bytes == 1_234_567_890 != prediction.corrected.bytes
    other = planning.predict(planning.plan_task(load_config(task, ["train.tokens_per_step=512"]), Silent()))
    assert other.corrected.bytes - other.raw_bytes == 1_234_567_890 - prediction.raw_bytes


@pytest.mark.parametrize(
    ("settings", "choice", "kept"),
    [
        ([], "none", 2), (["train.gradient_checkpointing=true"], "all", 0),
        (["train.gradient_checkpointing=1"], "some", 1), (["train.gradient_checkpointing=9"], "all", 0),
        (["train.gradient_checkpointing=offload"], "offload", 0), (["train.memory=9GB"], "none", 2),
        (["train.memory=1MB"], "offload", 0),
    ],
)  # fmt: skip
def test_settings_of_memory_reach_the_plan(task: Path, settings: list[str], choice: str, kept: int) -> None:
    p = planning.plan_task(load_config(task, settings), Silent()).inputs
    assert p.checkpointing == choice
    assert p.shape.layers - p.recomputed == kept


def test_a_budget_recomputes_no_more_layers_than_it_needs() -> None:
    p = replace(INPUTS, tokens=50_000, shape=llama_shape("deep", (8, 256, 4, 2, 64, 768, 1000)))
    sizes = [estimate(replace(p, checkpointing="some", kept_layers=n)).total for n in range(9)]
    assert sizes[:8] == sorted(sizes[:8])  # one layer recomputed needs room for itself: it saves nothing
    found = planning.within(p, sizes[5])
    assert (found.checkpointing, found.kept_layers) == ("some", 5)
    assert planning.within(p, sizes[8]).checkpointing == "none"


# --- the probe ---------------------------------------------------------------------------------------------------


def test_a_probe_measures_and_is_remembered(task: Path) -> None:
    said = call("plan", task, "--probe", "--json")
    assert said.code == 0, said.err
    found = json.loads(said.out)
    assert len(found["probe"]["step_seconds"]) == min(24, found["workload"]["steps"])  # a tiny model's are over at once
    assert found["probe"]["seconds"] > 0 and found["probe"]["bytes"] > 0
    assert "1 run of this base" in found["this_machine"]["predicted"]["seconds_from"]
    assert found["this_machine"]["predicted"]["seconds"] == pytest.approx(found["probe"]["seconds"])
    assert not (task.parent / "runs").exists()


def test_short_steps_are_taken_more_often() -> None:
    assert how_many(1000, 100_000.0) == 3  # 100 s each
    assert how_many(1000, 2_000.0) == 10  # 2 s each: 20 s of them
    assert how_many(1000, 10.0) == 24
    assert how_many(7, 7.0) == 7


def test_a_probe_leaves_nothing_and_opens_no_test_set(task: Path) -> None:
    call("plan", task, "--probe")
    assert sorted(p.name for p in task.parent.iterdir()) == ["rows.jsonl", "task.yaml"]


def test_a_run_shorter_than_a_probe_is_told(task: Path) -> None:
    said = call("plan", task, "--probe", "--set", "train.max_steps=2")
    assert said.code == 2 and "shorter than a probe" in said.err


# --- the command -------------------------------------------------------------------------------------------------


def test_flags_alone_make_a_plan(own_home: Path) -> None:
    said = call("plan", "--params", "8B", "--rows", "1k", "--tokens", "512", "--device", "a100-80gb", "--json")
    found = json.loads(said.out)
    assert said.code == 0
    assert found["inputs"]["shape"]["parameters"] == pytest.approx(8e9, rel=0.02)
    (device,) = found["devices"]
    assert device["fits"] and device["method"] == "lora"
    assert device["cost_on_demand"] == pytest.approx(1.5 * device["seconds"] / 3600)
    assert {r["what"] for r in found["recommendation"]} >= {"method", "rank", "tokens_per_step"}


def test_a_person_sees_tables_and_reasons(own_home: Path, tiny_llama: Path) -> None:
    said = call("plan", "--base", tiny_llama, "--rows", "500", "--tokens", "100")
    assert said.code == 0, said.err
    for text in ("weights", "optimizer", "qlora", "peak", "h100-sxm", "recommended", "tokens_per_step", "rows:"):
        assert text in said.out


def test_only_the_config_of_a_base_is_needed(own_home: Path, tmp_path: Path) -> None:
    folder = tiny_base(tmp_path / "base", "qwen3")
    for path in folder.iterdir():
        if path.name != "config.json":
            path.unlink()
    assert call("plan", "--base", folder, "--rows", "10", "--tokens", "10").code == 0


def test_published_figures_are_printed() -> None:
    found = json.loads(call("plan", "--published", "--json").out)["points"]
    assert {p["group"] for p in found} == {"rule", "memory", "speed"}
    assert "torchtune" in call("plan", "--published").out or len(found) > 30


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--params", "8B"], "the data's size is not given"),
        (["--rows", "10", "--tokens", "10"], "the model's size is not given"),
        (["--base", "no-such-base", "--rows", "10", "--tokens", "10"], "no such base"),
        (["--base", "x", "--params", "8B", "--rows", "10", "--tokens", "10"], "both given"),
        (["--params", "8B", "--rows", "10", "--tokens", "10", "--device", "h10"], "unknown device"),
        (["--params", "8B", "--rows", "10", "--tokens", "10", "--prices", "no-such-file"], "no-such-file"),
        (["--params", "8Q", "--rows", "10", "--tokens", "10"], "is not a number such as"),
        (["--params", "8B", "--rows", "10", "--tokens", "10", "--probe"], "real task"),
        (["--params", "8B", "--rows", "-5", "--tokens", "10"], "is not a number such as"),
        (["--params", "8B", "--rows", "10", "--tokens", "10", "--epochs", "0"], "not a number of epochs"),
        (["--params", "8B", "--rows", "10", "--tokens", "10", "--set", "train.rank=2"], "no task to override"),
        (["--params", "1e999", "--rows", "10", "--tokens", "10"], "is not a number such as"),
    ],
)
def test_wrong_use_is_told(own_home: Path, arguments: list[str], says: str) -> None:
    said = call("plan", *arguments)
    assert said.code == 2
    assert says in " ".join(said.err.split())


def test_the_parser_names_the_methods_and_loads_no_torch() -> None:
    from tunegate.cli.parser import METHODS, SIZES
    from tunegate.plan import recommend

    assert recommend.METHODS == METHODS and "params" in SIZES
    code = "import sys, tunegate.cli.parser as p; p.make_parser(); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_commands_without_a_model_load_no_torch_and_no_transformers(tmp_path: Path) -> None:
    code = (
        "import sys; from tunegate.cli import main; code = main(sys.argv[1:]); "
        "sys.exit(code or 'torch' in sys.modules or 'transformers' in sys.modules)"
    )
    task = str(tmp_path / "task.yaml")
    for words in (["init", task], ["show", task], ["keys", "add", "anna", "--file", str(tmp_path / "keys.yaml")]):
        subprocess.run([sys.executable, "-c", code, *words], check=True, capture_output=True)


def test_any_number_of_rows_is_planned_for(own_home: Path) -> None:
    assert call("plan", "--params", "8B", "--rows", "10B", "--tokens", "512", "--json").code == 0


def test_a_task_and_flags_exclude_each_other(task: Path) -> None:
    said = call("plan", task, "--rows", "10")
    assert said.code == 2 and "task file says this already" in said.err
