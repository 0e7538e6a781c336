"""Safety: rates by hand, laws on a tiny random model, the guard's part, and what the gate reads."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from judge_server import serving
from models import adapt, tiny_subject
from tunegate.errors import InputError
from tunegate.evaluation.answering import Model, takes_system, with_system
from tunegate.evaluation.guard import Guard, GuardSettings
from tunegate.evaluation.intervals import mcnemar
from tunegate.evaluation.measures import load_measures, save_measures
from tunegate.evaluation.probes import built_in_probes
from tunegate.evaluation.safety import (
    Asked,
    Attempt,
    SafetySettings,
    ask,
    check_settings,
    compare_safety,
    helps,
    read_attempts,
    safety_measures,
)
from tunegate.files import write_jsonl
from tunegate.records import SafetyRecord, load, save

PROBES = [built_in_probes().first(8)]
SHORT = SafetySettings(seeds=(0, 1), systems=(("plain", None), ("kind", "Be kind.")), max_new_tokens=8)


@pytest.fixture
def model(tiny_llama: Path) -> Model:
    return tiny_subject(tiny_llama)


def test_an_adapter_of_zeros_changes_nothing(model: Model, tmp_path: Path) -> None:
    counted: list[int] = []
    base = ask(model, PROBES, SHORT, subject="base", items_path=tmp_path / "base.jsonl", progress=counted.append)
    adapt(model, size=0.0)
    adapter = ask(model, PROBES, SHORT, subject="adapter")
    assert sum(counted) == len(base.attempts) == 8 * 4
    assert base.attempts == adapter.attempts == read_attempts(tmp_path / "base.jsonl")
    for one in compare_safety(base, adapter).measures:
        assert one.reference == one.candidate and one.comparison.difference == 0.0
        assert (one.gained, one.lost, one.p_value) == (0, 0, 1.0)


def test_seeds_sample_and_repeat(model: Model) -> None:
    settings = SafetySettings(seeds=(0, 1, 2), systems=(("plain", None),), max_new_tokens=8)
    one, two = (ask(model, PROBES, settings, subject="base") for _ in range(2))
    assert one.attempts == two.attempts
    answers = {seed: [a.answer for a in one.attempts if a.seed == seed] for seed in settings.seeds}
    assert answers[0] != answers[1] != answers[2]
    greedy = ask(model, PROBES, dataclasses.replace(settings, seeds=(0,)), subject="base")
    assert [a.answer for a in greedy.attempts] == answers[0]


def test_system_messages_stand_first_or_in_the_request(model: Model) -> None:
    asked = ({"role": "system", "content": "old"}, {"role": "user", "content": "u"})
    assert with_system(asked, "new") == ({"role": "system", "content": "new"}, asked[1])
    assert with_system(asked, None) == asked
    assert with_system(asked, "new", in_user=True) == ({"role": "user", "content": "new\n\nu"},)
    assert takes_system(model.renderer)


# --- rates by hand -----------------------------------------------------------------------------------------------


def attempts(outcomes: dict[str, str], category: str = "theft") -> tuple[Attempt, ...]:
    """One probe a key (``h...`` expects a refusal), one attempt a letter: r, p, c or i."""
    names = {"r": "refusal", "p": "partial", "c": "compliance", "i": "incoherent"}
    return tuple(
        Attempt(
            probe=f"own/{probe}", category=category, expected="refuse" if probe[0] == "h" else "comply", system="plain",
            seed=seed, prompt=probe, answer=f"an {letter}", outcome=names[letter], evidence="", coherent=letter != "i",
            repetition=0.0,
        )
        for probe, letters in outcomes.items()
        for seed, letter in enumerate(letters)
    )  # fmt: skip


def asked(subject: str, outcomes: dict[str, str]) -> Asked:
    return Asked(subject, {"own": "b3:1"}, attempts(outcomes), len(next(iter(outcomes.values()))), "rules", {})


BASE = {"h1": "rr", "h2": "rc", "h3": "rr", "b1": "cc", "b2": "cr"}
ADAPTER = {"h1": "cc", "h2": "pr", "h3": "ii", "b1": "cc", "b2": "cc"}


def test_rates_by_hand() -> None:
    record = compare_safety(asked("base", BASE), asked("adapter", ADAPTER))
    bypass, over = record.measure("bypass_rate"), record.measure("over_refusal")
    coherence = record.measure("coherence")
    assert bypass is not None and over is not None and coherence is not None
    assert (bypass.reference.value, bypass.candidate.value) == (pytest.approx(0.5 / 3), pytest.approx(1.5 / 3))
    assert (bypass.gained, bypass.lost) == (1, 0)  # h2 was hit once before and after
    assert bypass.p_value == mcnemar(1, 0) == 1.0
    assert (over.reference.value, over.candidate.value) == (0.25, 0.0) and (over.gained, over.lost) == (0, 1)
    assert (coherence.reference.value, coherence.candidate.value) == (1.0, 0.8)
    assert asked("adapter", ADAPTER).rates() == {"bypass_rate": 0.5, "over_refusal": 0.0, "coherence": 0.8}
    assert record.measure("bypass_rate", "theft") is not None and record.measure("bypass_rate", "drugs") is None
    assert [w["probe"] for w in record.worst] == ["own/h1", "own/h1", "own/h2"]


def test_an_incoherent_answer_is_neither_refusal_nor_help() -> None:
    speechless = asked("adapter", dict.fromkeys(BASE, "ii"))
    record = compare_safety(asked("base", BASE), speechless)
    bypass, coherence = record.measure("bypass_rate"), record.measure("coherence")
    assert bypass is not None and bypass.candidate.value == 0.0
    assert coherence is not None and coherence.candidate.value == 0.0 and coherence.lost == 5


def test_a_record_is_read_back(tmp_path: Path) -> None:
    record = compare_safety(asked("base", BASE), asked("adapter", ADAPTER))
    save(tmp_path / "r.json", record)
    assert load(tmp_path / "r.json", SafetyRecord) == record


def test_other_attempts_are_refused() -> None:
    base, adapter = asked("base", BASE), asked("adapter", ADAPTER)
    for other in (
        asked("adapter", {k: v[:1] for k, v in ADAPTER.items()}),
        dataclasses.replace(adapter, sets={"own": "b3:2"}),
        dataclasses.replace(adapter, judged_by="guard"),
    ):
        with pytest.raises(InputError, match="not asked the same"):
            compare_safety(base, other)


def test_the_gate_reads_rates_per_request(tmp_path: Path) -> None:
    base, adapter = asked("base", BASE), asked("adapter", ADAPTER)
    folder = tmp_path / "run" / "safety"
    folder.mkdir(parents=True)
    (tmp_path / "base").mkdir()
    write_jsonl(tmp_path / "base" / "base.items.jsonl", [a.row() for a in base.attempts])
    write_jsonl(folder / "adapter.items.jsonl", [a.row() for a in adapter.attempts])
    save_measures(folder, safety_measures(adapter, ("../base/base.items.jsonl", "safety/adapter.items.jsonl")))
    found = load_measures(tmp_path / "run")
    names = ("bypass_rate", "over_refusal", "coherence", "refusal_rate")
    assert set(found) == {f"safety.{n}{end}" for n in names for end in ("", ".theft")}
    bypass = found["safety.bypass_rate"]
    assert bypass.kind == "mean" and bypass.n == 3  # requests, not attempts
    assert bypass.values is not None and bypass.values.tolist() == [1.0, 0.5, 0.0]
    assert bypass.references["base"].tolist() == [0.0, 0.5, 0.0]
    assert found["safety.over_refusal"].estimate == 0.0 and found["safety.coherence"].n == 5
    assert found["safety.refusal_rate"].estimate == pytest.approx(0.5 / 3)


# --- the guard ---------------------------------------------------------------------------------------------------


def test_the_guard_has_the_last_word_on_answers_that_help(model: Model) -> None:
    settings = SafetySettings(systems=(("plain", None),), seeds=(0,), max_new_tokens=8)
    alone = ask(model, PROBES, settings, subject="base")
    helped = [a for a in alone.attempts if a.expected == "refuse" and helps(a.outcome, a.answer)]
    with serving(say=lambda body: "safe") as server:
        guard = Guard(GuardSettings(server.url, "guard-1"))
        judged = ask(model, PROBES, settings, subject="base", guard=guard)
        assert len(server.requests) == len(helped)
    assert judged.judged_by == "guard-1"
    assert not any(a.bypassed for a in judged.attempts)
    assert sum(a.bypassed for a in alone.attempts) == len(helped)


def test_one_word_is_neither_help_nor_a_refusal() -> None:
    """A classifier that labels a harmful request has not met it."""
    (met, *_) = attempts({"h1": "c"})
    label = dataclasses.replace(met, answer="order_status")
    assert met.bypassed and not label.bypassed
    assert not label.row()["refused"]
    assert helps("partial", "like this") and not helps("refusal", "I can't help") and not helps("compliance", "")


def test_unsafe_by_the_guard_counts_and_its_categories_are_kept() -> None:
    (met, *_) = attempts({"h1": "c"})
    assert met.bypassed
    assert not dataclasses.replace(met, unsafe=False).bypassed
    assert dataclasses.replace(met, unsafe=True, categories=("S1",)).bypassed


def test_settings_that_cannot_be_used_are_named_together() -> None:
    wrong = SafetySettings(systems=(), seeds=(1, 1), temperature=0.0)
    with pytest.raises(InputError) as caught:
        check_settings(wrong, [])
    text = str(caught.value)
    assert all(part in text for part in ("no requests", "systems must be different", "seeds must be", "temperature"))


def test_a_part_of_a_set_has_every_category_and_both_expectations() -> None:
    whole = built_in_probes()
    part = whole.first(40)
    assert len(part.probes) == 40 and len({(p.category, p.expected) for p in part.probes}) == 20
    few = whole.first(4).probes
    assert [p.expected for p in few].count("refuse") == 2 and len({p.category for p in few}) == 2
    assert len(whole.probes) == 160 and whole.first(None) is whole
