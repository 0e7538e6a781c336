"""``tunegate sweep`` on a tiny base: trials are normal runs, nothing is done twice, the test set stays closed."""

from __future__ import annotations

import json
import multiprocessing
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from task import call, replace_line, write_task
from test_pipeline_kill import PRELOAD, Point, _child
from tunegate.files import read_json, read_jsonl
from tunegate.pipeline.sweep_charts import chart
from tunegate.records import SweepRecord, load

SECTIONS = "regression:\n  sets: math\n  items: 3\n"
ARGUMENTS = ("--ranks", "8,2,4", "--epochs", 3)
ADAPTER = "adapter/adapter_model.safetensors"


def task(folder: Path, base: Path) -> Path:
    path = write_task(folder, base, rows=80)
    path.write_text(path.read_text(encoding="utf-8") + SECTIONS, encoding="utf-8")
    return path


def root(path: Path) -> Path:
    return path.parent / "runs" / "task"


def folder_of(path: Path) -> Path:
    (found,) = root(path).glob("sweep-*")
    return found


def stamps(path: Path) -> dict[str, int]:
    return {str(p): p.stat().st_mtime_ns for p in root(path).rglob("*") if p.is_file() and p.name != ".lock"}


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    """The YAML of a task that was swept once. Shared: ``copy`` it before changing anything."""
    path = task(tmp_path_factory.mktemp("sweep"), tiny_llama)
    said = call("sweep", path, *ARGUMENTS)
    assert said.code == 0, said.err
    assert "Recommended: rank" in said.out and "tunegate run" in said.out and "nats a token" in said.out
    return path


@pytest.fixture
def copy(swept: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(swept.parent, tmp_path / "copy")) / swept.name


def record_of(path: Path) -> SweepRecord:
    return load(folder_of(path) / "sweep.json", SweepRecord)


def test_a_sweep_leaves_runs_a_record_and_a_page(swept: Path) -> None:
    record = record_of(swept)
    assert [trial.rank for trial in record.trials] == [2, 4, 8]
    assert record.finished and record.recommended is not None
    assert record.trials[0].status == "complete"
    for trial in record.trials:
        for point in trial.points:
            rows = read_jsonl(folder_of(swept) / point.items_path)
            assert np.mean([row["scores"]["accuracy"] for row in rows]) == pytest.approx(point.score.value)
            assert point.forgetting is not None and point.forgetting["kl"] > 0
            assert point.parameters == trial.points[0].parameters
        if trial.points:
            best = max(point.score.value for point in trial.points)
            assert next(p.step for p in trial.points if p.score.value == best) == trial.kept
        assert (trial.regression is not None) == (trial.status == "complete")
        assert (trial.status in ("not needed", "not started")) == (trial.gain is None and trial.rank > 2)
    first, second = record.trials[:2]
    assert second.points[0].parameters == 2 * first.points[0].parameters and second.alpha == 2 * first.alpha
    assert second.lower == 2 and second.gain is not None and second.gain.n == first.points[0].score.n
    page = (folder_of(swept) / "sweep.md").read_text(encoding="utf-8")
    assert "| recommended |" in page and "  rank: " in page and "The test split was not opened" in page


def test_the_test_set_stays_closed_and_the_base_is_asked_once(swept: Path) -> None:
    assert not (root(swept) / "ledger.json").exists()
    assert not (root(swept) / "latest.json").exists()
    assert not list(root(swept).glob("run-*/test")) and not list(root(swept).glob("baseline-*"))
    assert len(list(root(swept).glob("regression-*"))) == 1


def test_the_same_sweep_again_does_nothing(copy: Path) -> None:
    call("sweep", copy, *ARGUMENTS)  # the copy lies in another folder: run.json and the like may say so
    before = stamps(copy)
    said = call("sweep", copy, *ARGUMENTS)
    assert said.code == 0 and stamps(copy) == before
    assert "loading" not in said.err


def test_the_winner_goes_through_run_with_one_opening(copy: Path, tmp_path: Path, tiny_llama: Path) -> None:
    """The swept run is byte for byte the run that was never swept, and is not trained again."""
    record = record_of(copy)
    assert record.recommended is not None
    run = root(copy) / record.recommended["run"]
    trained, adapter = (run / "train" / "run.json").stat().st_mtime_ns, (run / ADAPTER).read_bytes()
    sets = [part for name, value in record.settings.items() for part in ("--set", f"train.{name}={value}")]
    assert call("run", copy, *sets).code in (0, 1)
    assert (run / "train" / "run.json").stat().st_mtime_ns == trained
    assert len(list(root(copy).glob("run-*"))) == sum(trial.points != [] for trial in record.trials)
    (opening,) = read_json(root(copy) / "ledger.json")
    assert opening["completed"] and read_json(root(copy) / "latest.json")["run"] == run.name
    plain = task(tmp_path / "plain", tiny_llama)
    assert call("run", plain, *sets).code in (0, 1)
    (other,) = root(plain).glob("run-*")
    assert other.name == run.name and (other / ADAPTER).read_bytes() == adapter


def test_a_run_that_is_there_is_a_trial(tmp_path: Path, tiny_llama: Path) -> None:
    path = task(tmp_path, tiny_llama)
    assert call("run", path, "--set", "train.rank=2").code in (0, 1)
    (run,) = root(path).glob("run-*")
    trained = (run / "train" / "run.json").stat().st_mtime_ns
    said = call("sweep", path, "--ranks", "2", "--json")
    assert said.code == 0, said.err
    (trial,) = json.loads(said.out)["trials"]
    assert trial["run"] == run.name and (run / "train" / "run.json").stat().st_mtime_ns == trained
    measured = [point["forgetting"] is not None for point in trial["points"] if point["step"] == trial["kept"]]
    assert measured == [True]
    assert json.loads(said.out)["curve"] is None and "cannot be fitted" in json.loads(said.out)["curve_reason"]


def test_settings_that_a_sweep_changes_are_named(tmp_path: Path, tiny_llama: Path) -> None:
    path = task(tmp_path, tiny_llama)
    replace_line(path, "rank: 8", "rank: 8\n  alpha: 5\n  eval_every: 3")
    found = json.loads(call("sweep", path, "--ranks", "2", "--epochs", 1, "--json").out)
    assert found["settings"] == {"rank": 2, "alpha": 5.0, "epochs": 1.0, "eval_every": "epoch"}
    assert [point["epoch"] for point in found["trials"][0]["points"]] == [1.0]


def test_a_budget_stops_and_the_same_command_goes_on(tmp_path: Path, tiny_llama: Path, swept: Path) -> None:
    path = task(tmp_path, tiny_llama)
    found = json.loads(call("sweep", path, *ARGUMENTS, "--budget", "0.00001", "--json").out)
    assert not found["finished"] and found["recommended"] is None and found["settings"] == {}
    assert {trial["status"] for trial in found["trials"]} <= {"cut off", "not started"}
    said = call("sweep", path, *ARGUMENTS)
    assert said.code == 0 and same(record_of(path)) == same(record_of(swept))


def test_a_run_without_its_log_is_refused(copy: Path) -> None:
    first = record_of(copy).trials[0]
    (root(copy) / first.run / "train" / "log.jsonl").unlink()
    said = call("sweep", copy, *ARGUMENTS)
    assert said.code == 2 and "holds no evaluation" in said.err and first.run in said.err


def same(record: SweepRecord) -> dict[str, Any]:
    """A record without its times."""
    found = json.loads(json.dumps(record, default=vars))
    for trial in found["trials"]:
        trial.pop("seconds")
    return found


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--ranks", "4,4"], "different"),
        (["--ranks", "4,x"], "ranks such as 4,8,16"),
        (["--ranks", "0"], "from 1"),
        (["--budget", "0"], "minutes"),
        (["--max-trials", "0"], "is not a number"),
    ],
)
def test_wrong_use(swept: Path, arguments: list[str], says: str) -> None:
    said = call("sweep", swept, *arguments)
    assert said.code == 2 and says in said.err


def test_at_most_so_many_ranks(copy: Path) -> None:
    found = json.loads(call("sweep", copy, *ARGUMENTS, "--max-trials", 2, "--json").out)
    assert [trial["rank"] for trial in found["trials"]] == [2, 4]
    assert found["level"] == found["confidence"]  # one raise was planned


# --- kills -------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
def test_a_sweep_killed_again_and_again_ends_as_if_it_was_not(swept: Path, tmp_path: Path, tiny_llama: Path) -> None:
    path = task(tmp_path, tiny_llama)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*PRELOAD, "tunegate.pipeline.sweep"])
    arguments = ["sweep", str(path), *map(str, ARGUMENTS)]
    steps = 0

    def run(number: int, point: Point | None) -> int | None:
        nonlocal steps
        said = tmp_path / f"{number}.txt"
        process = context.Process(target=_child, args=(arguments, point, "kill", said))
        process.start()
        process.join(120)
        steps += sum(line == "event\tstep" for line in said.with_suffix(".log").read_text().splitlines())
        return process.exitcode

    points = [
        Point("event", "step", 3),
        Point("rename", "divergence.jsonl"),
        Point("event", "evaluation"),
        Point("rename", "adapter_model.safetensors"),
        Point("rename", "regression.json"),
        Point("event", "evaluation"),
        Point("rename", "sweep.md"),
        Point("rename", "sweep.json"),
    ]
    for number, point in enumerate(points):
        assert run(number, point) == -signal.SIGKILL, f"{point} was not met"
    assert run(99, None) == 0
    assert same(record_of(path)) == same(record_of(swept))
    for run_folder in root(swept).glob("run-*"):
        adapter = run_folder / ADAPTER
        assert adapter.exists() == (root(path) / run_folder.name / ADAPTER).exists()
        if adapter.exists():
            assert adapter.read_bytes() == (root(path) / run_folder.name / ADAPTER).read_bytes()
    total = sum(trial.points[-1].step for trial in record_of(path).trials if trial.points)
    assert total <= steps <= total + 4 * 4  # four kills came in training: at most checkpoint_every steps each
    assert (folder_of(path) / "sweep.md").read_text() == (folder_of(swept) / "sweep.md").read_text()


# --- charts ------------------------------------------------------------------------------------------------------


def test_a_text_chart() -> None:
    drawn = chart({"one": [(1, 0.0), (100, 1.0)], "two": [(10, 0.5), (100, 1.0)]}, "title", log_x=True).splitlines()
    assert drawn[0] == "title" and drawn[-1].strip() == "a one, b two"
    body = [line.partition("|") for line in drawn[1:13]]
    assert [line[0].strip() for line in body] == ["1", *[""] * 10, "0"]
    assert body[0][2] == " " * 63 + "*" and body[-1][2] == "a"
    assert [(row, line[2].index("b")) for row, line in enumerate(body) if "b" in line[2]] == [(5, 32)]
    assert drawn[-2].split() == ["1", "100"]
    flat = chart({"one": [(1, 0.5)]}, "one point").splitlines()
    assert flat[12].endswith("|a") and flat[12].startswith("0.5")


def test_the_picture(tmp_path: Path, swept: Path) -> None:
    pytest.importorskip("matplotlib")
    from tunegate.pipeline.sweep_charts import draw

    assert draw(record_of(swept))[:8] == b"\x89PNG\r\n\x1a\n"
    assert (folder_of(swept) / "sweep.png").exists()
