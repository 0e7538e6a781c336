"""The reference model's client against a real server on 127.0.0.1 that misbehaves."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from service import Server, completion
from tunegate.errors import InputError, TunegateError
from tunegate.evaluation.endpoint import Endpoint, Reply

ASKED = [{"role": "user", "content": "hi"}]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    for name in ("OPENAI_API_KEY", "TUNEGATE_REFERENCE_KEY", "http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    one = Server()
    yield one
    one.close()


def client(server: Server, **more: Any) -> tuple[Endpoint, list[float]]:
    waited: list[float] = []
    return Endpoint(server.url, "m", **{"timeout": 0.5, "sleep": waited.append, **more}), waited


def test_what_is_asked_and_what_comes_back(server: Server) -> None:
    server.script = [(200, {}, completion(" hello\n", "length", usage={"prompt_tokens": 7, "completion_tokens": 2}))]
    endpoint, waited = client(server)
    assert endpoint.ask(ASKED, max_tokens=5, temperature=0.5, top_p=0.9) == Reply("hello", False, 7, 2)
    (request,) = server.seen
    assert request["path"] == "/v1/chat/completions" and "Authorization" not in request["headers"]
    assert request["body"] == {"model": "m", "messages": ASKED, "max_tokens": 5, "temperature": 0.5, "top_p": 0.9}
    assert waited == []


GOOD = (200, {}, completion())


@pytest.mark.parametrize(
    ("trouble", "waits"),
    [
        ((429, {"Retry-After": "3"}, {"error": "slow down"}), [3.0]),
        ((429, {"Retry-After": "999999"}, b""), [60.0]),
        ((503, {"Retry-After": "Wed, 21 Oct 2026 07:28:00 GMT"}, b""), [1.0]),
        ((500, {}, b"oops"), [1.0]),
        ("hang up", [1.0]),
        ("slow", [1.0]),
        ((200, {}, b"{not json"), [1.0]),
        ((200, {}, b"[" * 100_000), [1.0]),
        ((200, {}, {"choices": []}), [1.0]),
        ((200, {}, []), [1.0]),
        ((200, {}, completion(["a", "list"])), [1.0]),
        ((200, {"X-Cut": "1"}, completion()), [1.0]),
    ],
)
def test_passing_trouble_is_tried_again(server: Server, trouble: Any, waits: list[float]) -> None:
    server.script = [trouble, GOOD]
    endpoint, waited = client(server)
    assert endpoint.ask(ASKED, max_tokens=5).text == "hello"
    assert waited == waits and len(server.seen) == 2


def test_waits_double_and_end(server: Server) -> None:
    server.script = [(500, {}, b"down")] * 4
    endpoint, waited = client(server, tries=4)
    with pytest.raises(TunegateError, match="no answer in 4 tries") as caught:
        endpoint.ask(ASKED, max_tokens=5)
    assert waited == [1.0, 2.0, 4.0] and "HTTP 500: down" in str(caught.value)


@pytest.mark.parametrize("status", [400, 401, 403, 404, 422])
def test_what_cannot_work_is_said_at_once(server: Server, status: int) -> None:
    server.script = [(status, {}, b"no such model")]
    endpoint, waited = client(server)
    with pytest.raises(InputError, match=f"HTTP {status}: no such model"):
        endpoint.ask(ASKED, max_tokens=5)
    assert waited == []


def test_redirects_are_not_followed(server: Server) -> None:
    server.script = [(302, {"Location": "http://127.0.0.1:9/"}, b"")]
    with pytest.raises(InputError, match="HTTP 302"):
        client(server)[0].ask(ASKED, max_tokens=5)
    assert len(server.seen) == 1


def test_each_host_gets_its_own_key(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "for-openai")
    server.script = [GOOD, GOOD]
    client(server)[0].ask(ASKED, max_tokens=5)
    monkeypatch.setenv("TUNEGATE_REFERENCE_KEY", "for-others")
    client(server)[0].ask(ASKED, max_tokens=5)
    assert [r["headers"].get("Authorization") for r in server.seen] == [None, "Bearer for-others"]
    assert Endpoint("https://api.openai.com/v1", "m").key() == "for-openai"


def test_a_key_is_never_shown(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNEGATE_REFERENCE_KEY", "sk-secret")
    server.script = [(401, {}, b"denied")]
    endpoint, _ = client(server)
    with pytest.raises(InputError) as caught:
        endpoint.ask(ASKED, max_tokens=5)
    assert "sk-secret" not in str(caught.value) + repr(endpoint) and "TUNEGATE_REFERENCE_KEY" in str(caught.value)


def test_a_missing_usage_is_not_made_up(server: Server) -> None:
    server.script = [(200, {}, completion(None)), (200, {}, completion("a", usage={"prompt_tokens": "7"}))]
    endpoint, _ = client(server)
    assert endpoint.ask(ASKED, max_tokens=5) == Reply("", True, None, None)
    assert endpoint.ask(ASKED, max_tokens=5) == Reply("a", True, None, None)


@pytest.mark.parametrize(
    "url", ["ftp://x/v1", "file:///etc/passwd", "127.0.0.1:8000", "http://key@x/v1", "http://x/v1?key=1"]
)
def test_not_a_service(url: str) -> None:
    with pytest.raises(InputError, match="not the URL of a service"):
        Endpoint(url, "m")
