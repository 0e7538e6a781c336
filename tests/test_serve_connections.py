"""Connections that bring no request, or one without an end, on real sockets; and what HTTP allows that clients seldom
do. Others are answered meanwhile."""

from __future__ import annotations

import json
import re
import resource
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from serving import Serving, serving
from tiny import tiny_tokenizer
from tunegate.errors import InputError

openai = pytest.importorskip("openai")
connections = pytest.importorskip("tunegate.serve.connections")

ANSWER = "A short answer."
BODY = b'{"model": "support", "messages": [{"role": "user", "content": "x"}]}'
HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
POST = HEAD + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY
PROTOCOLS = ["httptools", "h11"]


@pytest.fixture(autouse=True)
def direct(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture(params=PROTOCOLS)
def protocol(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Which of uvicorn's two parsers is used."""
    if request.param == "httptools":
        pytest.importorskip("httptools")
    from uvicorn.protocols.http import auto, h11_impl

    if request.param == "h11":
        monkeypatch.setattr(auto, "AutoHTTPProtocol", h11_impl.H11Protocol)
    return str(request.param)


def connected(server: Serving) -> socket.socket:
    host, port = server.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=20)


def rest(connection: socket.socket) -> bytes:
    """All that comes until the server closes."""
    data = b""
    while True:
        try:
            part = connection.recv(65_536)
        except ConnectionError:
            return data
        if not part:
            return data
        data += part


def asked(server: Serving) -> str:
    made = server.client().chat.completions.create(model="support", messages=[{"role": "user", "content": "x"}])
    return str(made.choices[0].message.content)


def answered(connection: socket.socket) -> None:
    """Ask on a connection that stays open."""
    connection.sendall(POST)
    got = b""
    while ANSWER.encode() not in got:
        got += connection.recv(4096) or b"the end"
        assert b"the end" not in got
    assert got.startswith(b"HTTP/1.1 200")


def trickle(connection: socket.socket, data: bytes) -> bytes:
    """``data`` over and over, a little at a time, until the server closes; what it said."""
    got = b""
    connection.settimeout(0.01)
    for _ in range(2000):
        try:
            connection.sendall(data)
            part = connection.recv(4096)
            if not part:
                return got
            got += part
        except TimeoutError:
            pass
        except OSError:
            return got
    raise AssertionError("it was never closed")


@pytest.mark.parametrize(
    ("begin", "more", "says"),
    [
        (b"", b"", b""),  # nothing at all
        (b"GET /health HTTP/1.1\r\nHost: x\r\n", b"a: b\r\n", b"408"),  # a head that does not end
        (b"", b"\r\n", b""),  # empty lines, which a parser skips
        (POST, b"\r\n", b"200"),  # a request, and then empty lines
        (b"POST /nowhere HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999\r\n\r\n", b" ", b"404"),  # nobody reads it
    ],
)
def test_a_connection_without_a_request_is_closed(protocol: str, begin: bytes, more: bytes, says: bytes) -> None:
    with serving(tiny_tokenizer(), lambda job: ANSWER, bounds={"idle": 0.4}) as server, connected(server) as slow:
        slow.sendall(begin)
        assert asked(server) == ANSWER
        began = time.monotonic()
        got = trickle(slow, more)
        assert time.monotonic() - began < 15
        if says == b"408" and protocol == "h11":  # it does not tell what it keeps
            says = b""
        assert (says in got.partition(b"\r\n")[0]) if says else not got.startswith(b"HTTP/1.1 2")
        if says == b"408":
            head, _, body = got.partition(b"\r\n\r\n")
            assert b"connection: close" in head.lower() and json.loads(body)["error"]["code"] == "head_timeout"
        assert asked(server) == ANSWER


def test_a_connection_that_asks_now_and_then_stays(protocol: str) -> None:
    made = serving(tiny_tokenizer(), lambda job: ANSWER, bounds={"idle": 0.6}, pause=0.08)
    with made as server, connected(server) as kept:
        for _ in range(3):  # each answer takes longer than a connection may be idle
            answered(kept)
            time.sleep(0.2)


@pytest.mark.parametrize("busy", [False, True])
def test_a_head_that_is_too_large_is_refused(protocol: str, busy: bool) -> None:
    """Also one behind a request that is being answered."""
    with serving(tiny_tokenizer(), lambda job: ANSWER, bounds={"head": 20_000}, pause=0.2 * busy) as server:
        with connected(server) as large:
            sent = 0
            if busy:
                large.sendall(POST)
            try:
                large.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n")
                for number in range(10_000):
                    large.sendall(b"x-%d: %s\r\n" % (number, b"y" * 1000))
                    sent += 1000
            except OSError:
                pass
            got = rest(large)
            assert sent < 6_000_000  # what the two ends of a socket hold, and no more
        if not busy and protocol == "httptools" and got:
            assert got.startswith(b"HTTP/1.1 431") and b"head_too_large" in got
        assert asked(server) == ANSWER
        with connected(server) as fitting:
            fitting.sendall(b"GET /health HTTP/1.1\r\nConnection: close\r\nHost: x\r\nx: %s\r\n\r\n" % (b"y" * 15_000))
            assert rest(fitting).startswith(b"HTTP/1.1 200")


def test_there_are_so_many_connections_and_no_more(protocol: str) -> None:
    with serving(tiny_tokenizer(), lambda job: ANSWER, bounds={"most": 8}) as server, ExitStack() as held:
        kept = [held.enter_context(connected(server)) for _ in range(8)]
        answered(kept[0])
        for _ in range(20):  # none of the refused ones takes a place
            with pytest.raises(openai.InternalServerError) as told:
                asked(server)
            assert told.value.status_code == 503 and told.value.body["code"] == "too_many_connections"
            assert told.value.response.headers["Retry-After"] == "1"
        answered(kept[0])  # those that have one go on
        for one in kept[1:]:
            one.close()
        for _ in range(200):
            try:
                assert asked(server) == ANSWER
                break
            except openai.InternalServerError:
                time.sleep(0.01)
        else:
            raise AssertionError("the places of those that left stay taken")


def test_a_client_that_does_not_read_is_left(protocol: str) -> None:
    """Its answer is longer than what the sockets hold."""
    bounds = {"busy": 1.0, "idle": 1.0}
    made = serving(tiny_tokenizer(), lambda job: [5] * 400_000, bounds=bounds, context=500_000, batch=500)
    with made as server, socket.socket() as deaf:
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        host, port = server.url.removeprefix("http://").split(":")
        deaf.connect((host, int(port)))
        body = b'{"model": "support", "prompt": "x", "stream": true, "max_tokens": 400000, "logprobs": 5}'
        head = HEAD.replace(b"/v1/chat/completions", b"/v1/completions")
        deaf.sendall(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        for _ in range(1000):
            if server.engine.cancelled:
                break
            time.sleep(0.02)
        assert (server.engine.running, server.engine.cancelled) == (0, 1)


# --- what HTTP allows ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server() -> Iterator[Serving]:
    with serving(tiny_tokenizer(), lambda job: ANSWER) as found:
        yield found


CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\nConnection: close\r\n\r\n"
CLOSE = POST.replace(b"Host: x", b"Host: x\r\nConnection: close")


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (CHUNKED + b"%x\r\n" % len(BODY) + BODY + b"\r\n0\r\n\r\n", 200),
        (CHUNKED + b"".join(b"1\r\n%c\r\n" % c for c in BODY) + b"0\r\n\r\n", 200),
        (CHUNKED + b"zz\r\n" + BODY + b"\r\n0\r\n\r\n", 400),
        (CHUNKED + b"fffffffffffffffff\r\n" + BODY, 400),
        (HEAD + b"Transfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\n0\r\n\r\n", 400),  # a smuggler's
        (HEAD + b"Content-Length: 3\r\nContent-Length: 4\r\n\r\nabcd", 400),
        (HEAD + b"Content-Length: -1\r\n\r\n", 400),
        (CLOSE.replace(b"POST", b"HEAD"), 405),
        (CLOSE.replace(b"POST", b"OPTIONS"), 405),
        (CLOSE.replace(b"POST", b"NONSENSE"), 400),
        (CLOSE.replace(b"Host: x", b"Host: x\r\nOrigin: http://evil"), 200),
        (b"GET /v1/models/%0d%0aX-Evil:%201 HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", 404),
        (b"GET /v1/models/%ff%fe%00 HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", 404),
        (b"GET /v1/models/\xc3\xa4 HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", 400),
        (b"GET /v1/models/../../health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", 404),
        (b"GET /page/%2e%2e/app.py HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", 404),
        (b"GET http://elsewhere/health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", 200),
        (b"CONNECT x:80 HTTP/1.1\r\nHost: x\r\n\r\n", 400),
        (b"OPTIONS * HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", 404),
        (b"GET /health HTTP/1.0\r\n\r\n", 200),
        (b"GET / HTTP/9.9\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),  # TLS
        (b"GET /health HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade, close\r\n\r\n", 200),
        (CLOSE.replace(b"Connection: close", b"Connection: Upgrade, HTTP2-Settings, close\r\nUpgrade: h2c"), 200),
        (HEAD + b"Expect: 100-continue\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(BODY) + BODY, 100),
    ],
)
def test_unusual_requests(server: Serving, data: bytes, status: int) -> None:
    with connected(server) as raw:
        raw.sendall(data)
        got = rest(raw)
    first = got.partition(b"\r\n")[0]
    assert first.startswith(b"HTTP/1.1 %d" % status), got[:300]
    assert b"X-Evil: 1" not in got.partition(b"\r\n\r\n")[0]
    assert asked(server) == ANSWER


def test_pipelined_requests_are_answered_in_order(server: Serving) -> None:
    before = len(server.engine.jobs)
    unknown = POST.replace(b"support", b"suppurt")
    with connected(server) as raw:
        raw.sendall(POST + unknown + POST + CLOSE)
        got = rest(raw)
    assert re.findall(rb"HTTP/1\.1 (\d+)", got) == [b"200", b"404", b"200", b"200"]
    assert len(server.engine.jobs) == before + 3


# --- files -----------------------------------------------------------------------------------------------------------


def test_a_process_that_may_not_open_so_many_files_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    monkeypatch.setattr(resource, "getrlimit", lambda which: (1024, 4096))
    monkeypatch.setattr(resource, "setrlimit", lambda which, limits: made.append(limits))
    connections.open_files(700)  # it may already
    assert made == []
    connections.open_files(2048)
    assert made == [(2304, 4096)]
    with pytest.raises(InputError, match="at most 3840"):
        connections.open_files(3841)
