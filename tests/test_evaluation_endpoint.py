"""The reference model's client against a real server on 127.0.0.1 that misbehaves."""

from __future__ import annotations

import json
from typing import Any

import pytest

from judge_server import Server, serving
from tunegate.errors import InputError, TunegateError
from tunegate.evaluation.endpoint import Reference
from tunegate.evaluation.judge.http import Reply

ASKED = [{"role": "user", "content": "hi"}]


@pytest.fixture(autouse=True)
def no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    for name in ("OPENAI_API_KEY", "TUNEGATE_REFERENCE_KEY"):
        monkeypatch.delenv(name, raising=False)


def hello(body: dict[str, Any]) -> str:
    return "hello"


def client(server: Server, **more: Any) -> tuple[Reference, list[float]]:
    waited: list[float] = []
    return Reference(server.url, "m", **{"timeout": 0.5, "sleep": waited.append, **more}), waited


def raw(text: Any, reason: str = "stop", **more: Any) -> str:
    return f"raw {json.dumps({'choices': [{'message': {'content': text}, 'finish_reason': reason}], **more})}"


def test_what_is_asked_and_what_comes_back() -> None:
    with serving(raw("hello", "length", usage={"prompt_tokens": 7, "completion_tokens": 2})) as server:
        reference, waited = client(server)
        found = reference.ask(ASKED, max_tokens=5, temperature=0.5, top_p=0.9)
    assert found == Reply("hello", 7, 2, whole=False, counted=True)
    (request,) = server.requests
    assert request.pop("path") == "/v1/chat/completions" and "Authorization" not in server.headers_seen[0]
    assert request == {"model": "m", "messages": ASKED, "max_tokens": 5, "temperature": 0.5, "top_p": 0.9}
    assert waited == []


@pytest.mark.parametrize(
    ("trouble", "wait"),
    [
        ("status 429 3", 3.0),
        ("status 429 999999", 60.0),
        ("status 503", 1.0),
        ("hangup", 1.0),
        ("slow 1", 1.0),
        ("truncated", 1.0),
        ("nojson", 1.0),
        ("shape", 1.0),
        (raw(["a", "list"]), 1.0),
    ],
)
def test_passing_trouble_is_tried_again(trouble: str, wait: float) -> None:
    with serving(trouble, say=hello) as server:
        reference, waited = client(server)
        assert reference.ask(ASKED, max_tokens=5).text == "hello"
    assert waited == [wait] and len(server.requests) == 2


def test_waits_double_and_end() -> None:
    with serving(*["status 500"] * 4) as server:
        reference, waited = client(server, tries=4)
        with pytest.raises(TunegateError, match="no answer in 4 tries") as caught:
            reference.ask(ASKED, max_tokens=5)
    assert waited == [1.0, 2.0, 4.0] and "status 500" in str(caught.value)


@pytest.mark.parametrize("status", [302, 400, 401, 403, 404, 422])
def test_what_cannot_work_is_said_at_once(status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under the names of the flags, and without the key, though the server quotes it."""
    monkeypatch.setenv("TUNEGATE_REFERENCE_KEY", "sk-secret")
    with serving(f"status {status}") as server:
        reference, waited = client(server)
        with pytest.raises(InputError, match=f"status {status}") as caught:
            reference.ask(ASKED, max_tokens=5)
    said = str(caught.value) + repr(reference)
    assert waited == [] and len(server.requests) == 1
    assert "--reference" in said and "judge" not in said and "sk-secret" not in said
    assert ("TUNEGATE_REFERENCE_KEY" in said) == (status in (401, 403))


def test_each_host_gets_its_own_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "for-openai")
    with serving(say=hello) as server:
        client(server)[0].ask(ASKED, max_tokens=5)
        monkeypatch.setenv("TUNEGATE_REFERENCE_KEY", "for-others")
        client(server)[0].ask(ASKED, max_tokens=5)
    assert [headers.get("Authorization") for headers in server.headers_seen] == [None, "Bearer for-others"]
    assert Reference("https://api.openai.com/v1", "m").endpoint().key == "for-openai"


def test_a_missing_count_is_not_made_up() -> None:
    with serving(raw(None), raw("a", usage={"prompt_tokens": "7"})) as server:
        reference, _ = client(server)
        assert reference.ask(ASKED, max_tokens=5) == Reply("", 0, 0, counted=False)
        assert reference.ask(ASKED, max_tokens=5).counted is False


@pytest.mark.parametrize(
    "url", ["ftp://x/v1", "file:///etc/passwd", "127.0.0.1:8000", "http://key@x/v1", "http://x/v1?key=1"]
)
def test_not_a_server(url: str) -> None:
    with pytest.raises(InputError, match="not the address of a server") as caught:
        Reference(url, "m").endpoint()
    assert "--reference" in str(caught.value) and "key" not in str(caught.value).replace("a key", "")
