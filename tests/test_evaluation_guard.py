"""The guard against a real server on 127.0.0.1 that misbehaves on purpose."""

from __future__ import annotations

from typing import Any

import pytest

from judge_server import Server, serving
from tunegate.errors import InputError, TunegateError
from tunegate.evaluation.guard import Guard, GuardSettings, Verdict

ASKED = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "how?"}]
KEY = "key-that-must-not-be-seen"


def guard(server: Server, **changed: Any) -> tuple[Guard, list[float]]:
    pauses: list[float] = []
    return Guard(GuardSettings(server.url, "guard-1", **changed), sleep=pauses.append), pauses


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("safe", Verdict(True)),
        (" Safe.\n", Verdict(True)),
        ("unsafe\nS1", Verdict(False, ("S1",))),
        ("unsafe\nS1,S10", Verdict(False, ("S1", "S10"))),
        ("unsafe", Verdict(False)),
    ],
)
def test_llama_guard_s_answers_are_read(said: str, expected: Verdict) -> None:
    with serving(say=lambda body: said) as server:
        assert guard(server)[0].judge(ASKED, "like this") == expected
        (request,) = server.requests
    assert request["path"] == "/v1/chat/completions" and request["temperature"] == 0
    assert request["messages"] == [{"role": "user", "content": "how?"}, {"role": "assistant", "content": "like this"}]


def test_a_busy_server_is_asked_again_after_the_pause_it_names() -> None:
    with serving("status 429 7", "status 503", "truncated", "nojson", say=lambda body: "safe") as server:
        one, pauses = guard(server)
        assert one.judge(ASKED, "a").safe
        assert len(server.requests) == 5
    assert pauses[0] == 7.0
    assert 1.0 <= pauses[1] <= 1.25 and 2.0 <= pauses[2] <= 2.5 and 4.0 <= pauses[3] <= 5.0


def test_it_gives_up_with_what_the_server_said() -> None:
    with serving(*["status 500"] * 5) as server:
        with pytest.raises(TunegateError, match="no verdict") as caught:
            guard(server)[0].judge(ASKED, "a")
        assert len(server.requests) == 5
    assert "500" in caught.value.problems[0].got


@pytest.mark.parametrize("behaviour", ["status 401", "status 404", "moved http://127.0.0.1:9/v1/chat/completions"])
def test_what_another_attempt_cannot_mend_stops_at_once(behaviour: str) -> None:
    with serving(behaviour, say=lambda body: "safe") as server:
        with pytest.raises(TunegateError, match="no verdict"):
            guard(server)[0].judge(ASKED, "a")
        assert len(server.requests) == 1


@pytest.mark.parametrize("said", ["I think it is fine", "", "unsafely put", "yes"])
def test_anything_else_is_an_error_and_no_verdict(said: str) -> None:
    with serving(say=lambda body: said) as server, pytest.raises(TunegateError, match="no verdict"):
        guard(server, attempts=1)[0].judge(ASKED, "a")


def test_the_key_is_sent_and_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GUARD_KEY", KEY)
    with serving("good", "status 403", say=lambda body: "safe") as server:
        one, _ = guard(server, key_env="GUARD_KEY")
        assert one.judge(ASKED, "a").safe
        assert server.headers_seen[0]["Authorization"] == f"Bearer {KEY}"
        with pytest.raises(TunegateError) as caught:
            one.judge(ASKED, "a")  # the server repeats the key
    assert KEY not in str(caught.value) and KEY not in repr(one.settings)


def test_a_missing_key_and_a_wrong_address_are_found_before_anything_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GUARD_KEY", raising=False)
    with pytest.raises(InputError, match="no such key"):
        Guard(GuardSettings("http://127.0.0.1/v1", "m", "GUARD_KEY"))
    for url in ("ftp://host/v1", "host", "http://", "file:///etc/passwd"):
        with pytest.raises(InputError, match="not the address of a guard") as caught:
            Guard(GuardSettings(url, "m"))
        assert caught.value.problems[0].where == "safety.guard.url"
    with pytest.raises(InputError) as caught:
        Guard(GuardSettings(f"http://me:{KEY}@host/v1", "m"))
    assert KEY not in str(caught.value)


def test_many_are_judged_in_order() -> None:
    def say(body: dict[str, Any]) -> str:
        return "unsafe\nS2" if body["messages"][-1]["content"].endswith("3") else "safe"

    counted: list[int] = []
    with serving(say=say) as server:
        found = guard(server)[0].judge_all([(ASKED, f"answer {n}") for n in range(8)], counted.append)
    assert [v.safe for v in found] == [n != 3 for n in range(8)] and sum(counted) == 8


def test_one_failure_stops_the_rest() -> None:
    with serving(*["status 401"] * 4) as server, pytest.raises(TunegateError):
        guard(server, parallel=1)[0].judge_all([(ASKED, "a")] * 4)
