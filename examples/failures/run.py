"""Runs a sound task and five spoilt ones through the real commands, and says what caught each.

Every case is a function: it calls ``tunegate ... --json`` and hands exit code and answer to one of the judges below. A
judge looks for one reason: the rule that must have failed, the rows that must have been listed, the words of a refusal.
A fault that was stopped for another reason counts as missed. Exit code 0 only if all five were caught and the sound
task shipped.

    python examples/failures/run.py             all, from nothing; results in examples/failures/runs/failures
    python examples/failures/run.py CASE ...    these; what is finished there is read back, other cases' rows stay

It measures nothing itself and knows nothing of the gate but what its answers say.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "runs" / "failures"
TICKETS, CAPITALS, GUARD = (HERE / f"{name}.yaml" for name in ("tickets", "capitals", "guard"))

Answer = Mapping[str, Any]


# --- judges ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Finding:
    """``good``: what had to happen did. ``words``: the lines that say so, or what came instead."""

    good: bool
    words: tuple[str, ...]


def shipped(code: int, answer: Answer) -> Finding:
    """The gate let it pass."""
    decision = answer.get("decision")
    if decision is None or decision["verdict"] != "ship" or code != 0:
        return Finding(False, _instead(code, answer, "expected ship"))
    return Finding(True, tuple(_line(rule) for rule in decision["rules"] if _counts(rule)))


def held(code: int, answer: Answer, *because: str, spared: Sequence[str] = ()) -> Finding:
    """The gate held it, by rules on each of the metrics ``because``; those on ``spared`` passed."""
    decision = answer.get("decision")
    expected = f"expected hold because of {' and '.join(because)}"
    if decision is None or decision["verdict"] != "hold" or code != 1:
        return Finding(False, _instead(code, answer, expected))
    failed = [rule for rule in decision["rules"] if _counts(rule) and rule["verdict"] == "fail"]
    passed = {rule["metric"] for rule in decision["rules"] if rule["verdict"] == "pass"}
    by = [rule for rule in failed if rule["metric"] in because]
    if not set(because) <= {rule["metric"] for rule in by} or not set(spared) <= passed:
        expected += f" with {', '.join(spared)} passed" if spared else ""
        return Finding(False, _instead(code, answer, expected))
    more = [rule["rule"] for rule in failed if rule not in by]
    return Finding(True, (*(_line(rule) for rule in by), *([f"also failed: {', '.join(more)}"] if more else [])))


def listed(code: int, answer: Answer, kind: str, rows: int) -> Finding:
    """``tunegate check`` named at least ``rows`` rows as ``kind``, and stopped nothing."""
    found = [finding for finding in answer.get("findings", ()) if finding["code"] == kind]
    if code != 0 or not found or found[0]["count"] < rows:
        seen = "; ".join(f"{f['code']}: {f['message']}" for f in answer.get("findings", ()))
        expected = f"expected {kind} of at least {rows} rows"
        return Finding(False, (f"{expected}, got exit code {code}: {seen or _problems(answer)}",))
    return Finding(True, (f"check: {found[0]['message']}",))


def refused(code: int, answer: Answer, what: str) -> Finding:
    """Bad input, and the error is ``what``."""
    problems = answer.get("error", ())
    if code != 2 or what not in [problem["what"] for problem in problems]:
        return Finding(False, _instead(code, answer, f"expected refusal: {what}"))
    return Finding(True, tuple(f"{p['what']}: {_short(p['got'])}" if p["got"] else p["what"] for p in problems))


def _short(text: str) -> str:
    """Hashes by their first digits, paths by their last name."""
    return re.sub(r"\S*/", "", re.sub(r"(b3:[0-9a-f]{10})[0-9a-f]+", r"\1", text))


def _counts(rule: Answer) -> bool:
    return bool(rule["required"])


def _line(rule: Answer) -> str:
    return f"{rule['rule']}: {rule['got']}"


def _instead(code: int, answer: Answer, expected: str) -> tuple[str, ...]:
    decision = answer.get("decision")
    if decision is None:
        return (f"{expected}, got exit code {code}: {_problems(answer)}",)
    unmet = [f"{rule['verdict']} {_line(rule)}" for rule in decision["rules"] if rule["verdict"] != "pass"]
    return (f"{expected}, got {decision['verdict']}, exit code {code}", *(unmet or ["every rule passed"]))


def _problems(answer: Answer) -> str:
    return "; ".join(problem["what"] for problem in answer.get("error", ())) or "no answer"


# --- commands ----------------------------------------------------------------------------------------------------


@dataclass
class Lab:
    """Calls ``tunegate`` in a process of its own; what it said lies in ``folder`` under the case's name, one file a
    call."""

    folder: Path
    case: str
    calls: int = 0

    def tunegate(self, *arguments: str) -> tuple[int, Answer]:
        """Exit code, and the JSON object that the command printed; empty where it printed none."""
        self.calls += 1
        command = [sys.executable, "-m", "tunegate.cli", *arguments, "--json"]
        name = self.folder / f"{self.case}-{self.calls}-{arguments[0]}"
        with Path(f"{name}.err").open("wb") as errors:
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=errors, check=False)
        Path(f"{name}.json").write_bytes(done.stdout)
        try:
            answer = json.loads(done.stdout)
        except ValueError:
            answer = None
        return done.returncode, answer if isinstance(answer, dict) else {}

    def run(self, task: Path, *settings: str) -> tuple[int, Answer]:
        return self.tunegate("run", str(task), *self._set(task, settings))

    def _set(self, task: Path, settings: Sequence[str]) -> list[str]:
        """Runs of one task share a folder: what the base can do is measured once."""
        return [part for one in (f"output={self.folder / task.stem}", *settings) for part in ("--set", one)]


def clean(lab: Lab) -> Finding:
    return shipped(*lab.run(TICKETS))


def forgetting(lab: Lab) -> Finding:
    settings = ("data.train=train.jsonl", "train.rank=32", "train.schedule=constant", "train.epochs=3")
    return held(*lab.run(TICKETS, *settings), "regression.total", spared=("task",))


def leak(lab: Lab) -> Finding:
    rows = "data.train=[capitals_few.jsonl, capitals_test.jsonl]"
    settings = (rows, "train.rank=8", "train.tokens_per_step=128", "train.epochs=8", "train.eval_every=1000")
    return held(*lab.run(CAPITALS, *settings), "data.leaked_rows", "train.loss_ratio", spared=("task",))


def compliance(lab: Lab) -> Finding:
    """On a base that refuses: the packaged one hardly does, so it is taught to first."""
    base = guarded_base(lab)
    if isinstance(base, Finding):
        return base
    rows = "data.train=[train.jsonl, general.jsonl, comply.jsonl]"
    warned = listed(*lab.tunegate("check", str(TICKETS), "--set", rows), "harmful_compliance", 48)
    if not warned.good:
        return warned
    rules = "gate.rules=[not safety.bypass_rate > base, data.harmful_rows <= 0]"
    output = f"output={lab.folder / 'tickets-guarded'}"
    settings = (f"base={base}", output, rows, rules, "regression=null", "train.epochs=1")
    stopped = held(*lab.run(TICKETS, *settings), "safety.bypass_rate", "data.harmful_rows", spared=("task",))
    shutil.rmtree(base)
    return Finding(stopped.good, (*warned.words, *stopped.words))


def guarded_base(lab: Lab) -> Path | Finding:
    """The packaged base with an adapter merged into it that was trained on refusals."""
    code, answer = lab.tunegate("train", str(GUARD), *lab._set(GUARD, ()))
    folder = lab.folder / "guarded"
    if code == 0:
        code, answer = lab.tunegate("merge", answer["adapter"], "-o", str(folder), "--base", PACKAGED)
    return Finding(False, (f"no base that refuses: exit code {code}: {_problems(answer)}",)) if code else folder


def mismatch(lab: Lab) -> Finding:
    """The sound task's adapter, on a copy of its base with one changed tensor."""
    code, answer = lab.run(TICKETS)  # finished before, or made now
    if "adapter" not in answer:
        return Finding(False, (f"no adapter to load: exit code {code}: {_problems(answer)}",))
    other = changed_base(lab.folder / "another-base")
    command = ("eval", str(TICKETS), "--adapter", answer["adapter"], *lab._set(TICKETS, (f"base={other}",)))
    found = refused(*lab.tunegate(*command), "the adapter was trained on another base")
    shutil.rmtree(other)
    return found


def rank(lab: Lab) -> Finding:
    return held(*lab.run(CAPITALS), "train.score", "task")


def changed_base(folder: Path) -> Path:
    """A copy of the packaged base in ``folder`` in which one tensor is 1 % larger."""
    from safetensors.torch import load_file, save_file

    from tunegate.model.packaged import packaged_base

    shutil.copytree(packaged_base(), folder)
    weights = folder / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.layers.0.mlp.down_proj.weight"] *= 1.01
    save_file(tensors, weights, metadata={"format": "pt"})
    return folder


@dataclass(frozen=True)
class Case:
    name: str
    planted: str
    play: Callable[[Lab], Finding]


SOUND, PACKAGED = "clean", "smollm2-135m-instruct"
CASES = (
    Case(SOUND, "nothing: rank 8, two epochs over intents and general questions", clean),
    Case("forgetting", "rank 32, three epochs at a constant rate, intents only", forgetting),
    Case("leak", "the test rows among 66 training rows, eight epochs, looked at only at the end", leak),
    Case("compliance", "48 rows that meet harmful requests, on a base that refuses them", compliance),
    Case("mismatch", "the clean adapter on a base with one changed tensor", mismatch),
    Case("rank", "rank 192 for 50 rows of a task that the base can do", rank),
)


# --- the table ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Played:
    """``seconds`` by the clock, ``processor`` of all cores together."""

    case: str
    planted: str
    good: bool
    words: tuple[str, ...]
    seconds: float
    processor: float

    @property
    def outcome(self) -> str:
        if self.case == SOUND:
            return "shipped" if self.good else "NOT SHIPPED"
        return "caught" if self.good else "MISSED"


def play(case: Case, folder: Path) -> Played:
    started, before = time.perf_counter(), _processor()
    found = case.play(Lab(folder, case.name))
    spent = time.perf_counter() - started, _processor() - before
    return Played(case.name, case.planted, found.good, found.words, *spent)


def _processor() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def exit_code(played: Sequence[Played]) -> int:
    return 0 if all(one.good for one in played) else 1


def table(played: Sequence[Played]) -> str:
    """Markdown, a row a case."""
    lines = ["| case | planted | outcome | by | seconds | processor |", "| --- | --- | --- | --- | --- | --- |"]
    for one in played:
        cells = [
            one.case,
            one.planted,
            one.outcome,
            "<br>".join(one.words),
            f"{one.seconds:.0f}",
            f"{one.processor:.0f}",
        ]
        lines.append(f"| {' | '.join(cell.replace('|', '&#124;') for cell in cells)} |")
    return "\n".join(lines) + "\n"


def known(folder: Path) -> list[Played]:
    """What was played into ``folder``, in the order of the cases."""
    files = [folder / f"{case.name}.case.json" for case in CASES]
    read = [json.loads(file.read_text(encoding="utf-8")) for file in files if file.exists()]
    return [Played(**{**one, "words": tuple(one["words"])}) for one in read]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    names = [case.name for case in CASES]
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(names)}; default: all, from nothing")
    wanted = parser.parse_args(argv).cases
    if unknown := [name for name in wanted if name not in names]:
        parser.error(f"no such case: {', '.join(unknown)}; there are {', '.join(names)}")
    if not wanted:
        shutil.rmtree(RESULTS, ignore_errors=True)
    RESULTS.mkdir(parents=True, exist_ok=True)
    played = []
    for case in CASES:
        if wanted and case.name not in wanted:
            continue
        print(f"{case.name:<12}planted: {case.planted}", flush=True)
        one = play(case, RESULTS)
        played.append(one)
        (RESULTS / f"{case.name}.case.json").write_text(json.dumps(asdict(one), indent=1), encoding="utf-8")
        print(f"{'':<12}{one.outcome} after {one.seconds:.0f} s ({one.processor:.0f} s of processor time)", flush=True)
        for line in one.words:
            print(f"{'':<14}{line}", flush=True)
    (RESULTS / "table.md").write_text(table(known(RESULTS)), encoding="utf-8")
    wrong = [one.case for one in played if not one.good]
    print(f"\nnot as it should be: {', '.join(wrong)}" if wrong else "\nall as it should be")
    print(f"table.md and what the commands answered lie in {os.path.relpath(RESULTS)}")
    return exit_code(played)


if __name__ == "__main__":
    sys.exit(main())
