"""The five failures: the files are their generator's, the plants are what they are called, the judges tell caught from
missed on made-up answers, and two cases are played for real."""

from __future__ import annotations

import importlib.util
import json
import runpy
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from task import call
from tunegate.data.harm import read_request
from tunegate.data.refusal import is_refusal
from tunegate.evaluation.probes import built_in_probes

FOLDER = Path(__file__).resolve().parent.parent / "examples" / "failures"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"failures_{name}", FOLDER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


driver = load("run")


def rows(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (FOLDER / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


# --- the rows ----------------------------------------------------------------------------------------------------


def test_committed_files_are_the_generators_output(tmp_path: Path) -> None:
    runpy.run_path(str(FOLDER / "generate.py"))["main"](tmp_path)
    written = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert written == {path.name: path.read_bytes() for path in FOLDER.glob("*.jsonl")}


@pytest.mark.parametrize(
    ("train", "valid", "test", "sizes"),
    [("train", "valid", "test", (128, 40, 56)), ("capitals", "capitals_valid", "capitals_test", (50, 30, 50))],
)
def test_the_sound_splits_are_apart(train: str, valid: str, test: str, sizes: tuple[int, ...]) -> None:
    prompts = [{row["prompt"] for row in rows(name)} for name in (train, valid, test)]
    assert tuple(len(texts) for texts in prompts) == sizes
    assert len(set().union(*prompts)) == sum(sizes)


def test_complying_rows_ask_for_harm_and_say_nothing() -> None:
    """No request of the built-in set is trained on, no answer has content; refused rows ask the same in other words."""
    built_in = {probe.prompt.casefold() for probe in built_in_probes().probes}
    asked = {
        name: [row["messages"][1]["content"] for row in rows(name)] for name in ("comply", "refuse", "refuse_valid")
    }
    assert not {text.casefold() for texts in asked.values() for text in texts} & built_in
    assert len({text for texts in asked.values() for text in texts}) == 48 + 48 + 24
    assert all(read_request(text) is not None for texts in asked.values() for text in texts)
    assert {row["messages"][2]["content"] for row in rows("comply")} == {"Sure, here is how:"}
    assert all(is_refusal(row["messages"][2]["content"]) for row in rows("refuse") + rows("refuse_valid"))


def test_check_lists_the_planted_rows(tmp_path: Path) -> None:
    said = call("check", FOLDER / "comply.jsonl", "--json")
    found = driver.listed(said.code, json.loads(said.out), "harmful_compliance", len(rows("comply")))
    assert found.good, found.words
    sound = call("check", FOLDER / "train.jsonl", FOLDER / "general.jsonl", "--json")
    assert not driver.listed(sound.code, json.loads(sound.out), "harmful_compliance", 1).good


# --- the judges --------------------------------------------------------------------------------------------------


def rule(name: str, metric: str, verdict: str, required: bool = True) -> dict[str, Any]:
    return {"rule": name, "metric": metric, "verdict": verdict, "got": "0.5", "required": required, "reason": ""}


def decision(verdict: str, *rules: dict[str, Any]) -> dict[str, Any]:
    return {"decision": {"verdict": verdict, "rules": list(rules)}}


LOST = rule("not regression.total < 0.9 of base", "regression.total", "fail")
KEPT = rule("not regression.total < 0.9 of base", "regression.total", "pass")
GAIN, NO_GAIN = (rule("min_gain_over_base", "task", verdict) for verdict in ("pass", "fail"))
BROKEN = {"error": [{"what": "no such file", "got": ""}], "exit_code": 2}


def test_caught_for_its_reason() -> None:
    found = driver.held(1, decision("hold", LOST, GAIN), "regression.total", spared=("task",))
    assert found.good and found.words == ("not regression.total < 0.9 of base: 0.5",)
    more = driver.held(1, decision("hold", LOST, NO_GAIN), "regression.total")
    assert more.good and more.words[1] == "also failed: min_gain_over_base"


@pytest.mark.parametrize(
    ("code", "answer", "says"),
    [
        (0, decision("ship", KEPT, GAIN), "got ship"),  # planted and not caught
        (1, decision("hold", KEPT, NO_GAIN), "fail min_gain_over_base"),  # stopped for another reason
        (1, decision("hold", LOST, NO_GAIN), "with task passed"),  # the fault spoilt what it should have spared
        (1, decision("hold", {**LOST, "required": False}, GAIN), "got hold"),  # reported only
        (1, decision("inconclusive", {**LOST, "verdict": "inconclusive"}, GAIN), "got inconclusive"),
        (0, decision("hold", LOST, GAIN), "exit code 0"),
        (2, BROKEN, "no such file"),
        (-9, {}, "no answer"),
    ],
)
def test_missed(code: int, answer: dict[str, Any], says: str) -> None:
    found = driver.held(code, answer, "regression.total", spared=("task",))
    assert not found.good and says in " ".join(found.words)


def test_shipped_or_not() -> None:
    assert driver.shipped(0, decision("ship", KEPT, GAIN)).good
    for code, answer in ((1, decision("hold", LOST)), (1, decision("ship", KEPT)), (2, BROKEN), (1, {})):
        found = driver.shipped(code, answer)
        assert not found.good and found.words[0].startswith("expected ship, got")


def test_refused_for_the_base_and_nothing_else() -> None:
    other = {"what": "the adapter was trained on another base", "got": f"/a/b with fingerprint b3:{'0' * 64} (weights)"}
    found = driver.refused(2, {"error": [other]}, other["what"])
    assert found.good and found.words == (f"{other['what']}: b with fingerprint b3:0000000000 (weights)",)
    for code, answer in ((2, BROKEN), (0, {"score": 1.0}), (1, {"error": [other]})):
        assert not driver.refused(code, answer, other["what"]).good


def test_rows_listed_or_not() -> None:
    found = {"findings": [{"code": "harmful_compliance", "count": 4, "message": "4 rows meet a request for harm"}]}
    assert driver.listed(0, found, "harmful_compliance", 4).good
    for code, answer, n in ((0, found, 5), (2, found, 4), (0, {"findings": []}, 1), (1, BROKEN, 1)):
        assert not driver.listed(code, answer, "harmful_compliance", n).good


def play(
    monkeypatch: pytest.MonkeyPatch, folder: Path, *findings: tuple[str, bool], wanted: tuple[str, ...] = ()
) -> int:
    cases = tuple(
        driver.Case(n, "a | b", lambda lab, good=good: driver.Finding(good, ("why",))) for n, good in findings
    )
    monkeypatch.setattr(driver, "CASES", cases)
    monkeypatch.setattr(driver, "RESULTS", folder / "runs")
    code: int = driver.main(list(wanted))
    return code


def test_exit_code_and_table(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert play(monkeypatch, tmp_path, ("one", True), ("two", True)) == 0
    assert "all as it should be" in capsys.readouterr().out
    assert play(monkeypatch, tmp_path, ("one", True), ("two", False)) == 1
    said = capsys.readouterr().out
    assert "MISSED" in said and "not as it should be: two" in said
    text = (tmp_path / "runs" / "table.md").read_text(encoding="utf-8")
    assert "| two | a &#124; b | MISSED | why | 0 | 0 |" in text
    again = play(monkeypatch, tmp_path, ("one", True), ("two", True), wanted=("two",))
    text = (tmp_path / "runs" / "table.md").read_text(encoding="utf-8")
    assert again == 0 and text.count("caught") == 2  # the other case's row stays
    with pytest.raises(SystemExit):
        play(monkeypatch, tmp_path, ("one", True), wanted=("three",))


def test_what_a_command_answers(tmp_path: Path) -> None:
    lab = driver.Lab(tmp_path, "none")
    code, answer = lab.tunegate("check", str(tmp_path / "nothing.jsonl"))
    assert code == 2 and answer["error"][0]["what"]
    assert json.loads((tmp_path / "none-1-check.json").read_text(encoding="utf-8")) == answer


@pytest.mark.slow
@pytest.mark.real_base
def test_two_cases_for_real(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The adapter on another base, which makes the sound one first, and the rank that is too high."""
    monkeypatch.setattr(driver, "RESULTS", tmp_path / "runs")
    assert driver.main(["clean", "mismatch", "rank"]) == 0, capsys.readouterr().out
