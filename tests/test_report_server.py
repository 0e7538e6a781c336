"""The review's page as others see it: who gets in, what is sent, what survives, and that it is blind."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from reviews import HOSTILE, Client, begin, click, item, serving
from tunegate.errors import InputError
from tunegate.report.review import LOG, Review
from tunegate.report.server import LARGEST_BODY, PAGES, ReviewServer

VERDICT = {"reviewer": "anna", "item": 0, **click("good", "bad")}


# --- who gets in ---------------------------------------------------------------------------------------------------


def test_nothing_without_the_token(tmp_path: Path) -> None:
    with serving(begin(tmp_path / "run")) as (server, client):
        wrong = ["", "x", client.token[:-1], client.token + "x", client.token.swapcase(), "%2e%2e"]
        for token in wrong:
            for path in ("", "review.js", "state?reviewer=anna"):
                status, _, data = client.ask("GET", f"/{token}/{path}")
                assert status == 404, (token, path)
                assert b"question" not in data and client.token.encode() not in data
            assert client.ask("POST", f"/{token}/verdict", VERDICT)[0] == 404
        assert client.ask("GET", f"/{client.token}")[0] == 404  # no slash: the page's own links would lead astray
        assert client.ask("GET", "")[0] == 200
        assert len(client.token) >= 32
        assert not (server.review.folder / LOG).exists()


def test_tokens_differ(tmp_path: Path) -> None:
    review = begin(tmp_path / "run")
    with ReviewServer(review) as one, ReviewServer(review) as two:
        assert one.token != two.token and one.server_port != two.server_port


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1", "evil.example:PORT", "127.0.0.1.nip.io:PORT", "[::1]:PORT", ""]
)
def test_other_hosts_are_refused(tmp_path: Path, host: str) -> None:
    with serving(begin(tmp_path / "run")) as (server, client):
        given = {"Host": host.replace("PORT", str(server.server_port))}
        assert client.ask("GET", "", headers=given)[0] == 403
        assert client.ask("POST", "verdict", VERDICT, headers=given)[0] == 403
        assert client.ask("GET", "", headers={"Host": f"localhost:{server.server_port}"})[0] == 200


def raw(port: int, request: bytes) -> bytes:
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        connection.sendall(request)
        connection.shutdown(socket.SHUT_WR)
        found = b""
        while data := connection.recv(65536):
            found += data
    return found


def test_two_hosts_or_none_are_refused(tmp_path: Path) -> None:
    with serving(begin(tmp_path / "run")) as (server, client):
        own = f"Host: 127.0.0.1:{server.server_port}\r\n"
        for hosts in ("", own + own, own + "Host: evil.example\r\n"):
            request = f"GET /{client.token}/ HTTP/1.1\r\n{hosts}\r\n"
            assert b" 403 " in raw(server.server_port, request.encode()).split(b"\r\n")[0]


@pytest.mark.parametrize(
    "request_",
    [b"\r\n\r\n", b"GET\r\n\r\n", b"GET //[ HTTP/1.1\r\n\r\n",
        b"GET /\xc3\xa9/ HTTP/1.1\r\nHost: 127.0.0.1:PORT\r\n\r\n", b"\xff\xfe\x00\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n",
     b"DELETE / HTTP/1.1\r\n\r\n", b"GET " + b"/a" * 40000 + b" HTTP/1.1\r\n\r\n"],
)  # fmt: skip
def test_nonsense_does_not_stop_it(tmp_path: Path, request_: bytes) -> None:
    with serving(begin(tmp_path / "run")) as (server, client):
        said = raw(server.server_port, request_.replace(b"PORT", str(server.server_port).encode()))
        assert b"question" not in said
        assert client.ask("GET", "")[0] == 200


def test_changes_come_from_the_page_itself(tmp_path: Path) -> None:
    with serving(begin(tmp_path / "run")) as (server, client):
        for origin in ("http://evil.example", "null", f"https://127.0.0.1:{server.server_port}", "http://127.0.0.1"):
            assert client.ask("POST", "verdict", VERDICT, {"Origin": origin})[0] == 403
        for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data"):
            assert client.ask("POST", "verdict", VERDICT, {"Content-Type": kind})[0] == 415
        own = {"Origin": f"http://127.0.0.1:{server.server_port}"}
        assert client.ask("POST", "verdict", VERDICT, own)[0] == 200


def test_every_answer_is_closed_to_other_pages(tmp_path: Path) -> None:
    with serving(begin(tmp_path / "run")) as (_, client):
        for method, path, body in (("GET", "", None), ("GET", "review.js", None), ("GET", "state?reviewer=a", None),
                                   ("GET", "nothing", None), ("GET", "/x/", None), ("POST", "verdict", VERDICT),
                                   ("POST", "verdict", {}), ("PUT", "", None)):  # fmt: skip
            _, headers, _ = client.ask(method, path, body)
            policy = headers["Content-Security-Policy"]
            assert policy.startswith("default-src 'none'") and "unsafe" not in policy and "*" not in policy
            assert "frame-ancestors 'none'" in policy
            assert headers["X-Content-Type-Options"] == "nosniff" and headers["Cache-Control"] == "no-store"
            assert headers["Referrer-Policy"] == "no-referrer"
            assert not [name for name in headers if name.lower().startswith("access-control")]


def test_the_page_names_nothing_from_elsewhere(tmp_path: Path) -> None:
    with serving(begin(tmp_path / "run")) as (_, client):
        for path in PAGES:
            status, headers, data = client.ask("GET", path)
            text = data.decode().replace('xmlns="http://www.w3.org/2000/svg"', "")
            assert status == 200 and headers["Content-Type"].startswith(PAGES[path][1].split(";")[0])
            assert not re.search(
                r"https?:|//[a-z]+\.|@import|url\(|innerHTML|outerHTML|insertAdjacent|document\.write|eval\(", text
            ), path
        assert not re.search(r"<script(?! src)|\son[a-z]+=|style=", client.ask("GET", "")[2].decode())


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"[]", b"null", b'{"reviewer": "anna"}', b"[" * 100000, b"\xff", b" " * (LARGEST_BODY + 1),
        *({**VERDICT, **wrong} for wrong in (
            {"item": 4}, {"item": -1}, {"item": True}, {"item": "0"}, {"item": 1.0}, {"left": "fine"}, {"left": []},
            {"right": 1}, {"preferred": "adapter"}, {"note": None}, {"note": "x" * 4001}, {"note": "\ud800"},
            {"reviewer": ""}, {"reviewer": 1}, {"reviewer": "x" * 61}, {"more": 1},
        )),
    ],
)  # fmt: skip
def test_clicks_that_no_page_sends_are_refused(tmp_path: Path, body: Any) -> None:
    review = begin(tmp_path / "run")
    with serving(review) as (_, client):
        status, _, data = client.ask("POST", "verdict", body)
        assert status == 400 and json.loads(data)["error"]
    assert not (review.folder / LOG).exists()


def test_a_port_in_use_is_said(tmp_path: Path) -> None:
    review = begin(tmp_path / "run")
    with ReviewServer(review) as server, pytest.raises(InputError, match="cannot listen"):
        ReviewServer(review, server.server_port)


# --- what is sent --------------------------------------------------------------------------------------------------


def test_texts_arrive_as_they_are(tmp_path: Path) -> None:
    prompt = [
        {"role": "user", "content": HOSTILE[0]},
        {"role": "assistant", "content": "", "tool_calls": [{"a": HOSTILE[1]}]},
    ]
    review = begin(
        tmp_path / "run", [item("0", *HOSTILE[1:3], reference=HOSTILE[3], prompt=prompt, tools=[{"name": "f"}])]
    )
    with serving(review) as (_, client):
        (found,) = client.state("anna")["items"]
    assert {found["left"], found["right"]} == set(HOSTILE[1:3])
    assert found["reference"] == HOSTILE[3]
    assert found["prompt"][0] == {"role": "user", "text": HOSTILE[0]}
    assert json.loads(found["prompt"][1]["text"]) == [{"a": HOSTILE[1]}]
    assert json.loads(found["tools"]) == [{"name": "f"}]


def play(review: Review) -> bytes:
    """Every byte that a reviewer gets, from the first page to just before finishing, refused clicks included."""
    with serving(review) as (server, client):
        server.token = client.token = "T" * 32  # the one thing that differs between any two servers
        for path in (*PAGES, "state?reviewer=anna", "state?reviewer=ben", "state?reviewer=", "none"):
            client.ask("GET", path)
        for place in range(len(review.items)):
            verdicts = [
                click("good", None),
                click("good", "bad"),
                click("bad", "bad", "left", "note"),
                click("bad", "good", "left"),
            ]
            for verdict in verdicts:
                client.click("anna", place, verdict)
            client.state("anna")
            client.finish("ben")
        return re.sub(rb'"saved": "[^"]*"', b"", client.sent)


def test_nothing_that_is_sent_tells_the_adapter_from_the_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A law: let adapter and base change names everywhere, with every text staying on its side of the screen. If all
    bytes are the same, then no byte depends on which of the two is the adapter's."""
    items = [item("0"), item("1", adapter_score=0.0, base_score=1.0, kind="red"), item("2", "same", "same"), item("3")]
    review = begin(tmp_path / "one", items)
    one = play(review)

    def swapped(i: Any) -> Any:
        return dataclasses.replace(
            i, base=i.adapter, adapter=i.base, base_score=i.adapter_score, adapter_score=i.base_score
        )

    other = dataclasses.replace(begin(tmp_path / "two", list(map(swapped, items))), key=review.key)
    other.save()
    sides = Review.sides
    monkeypatch.setattr(Review, "sides", lambda self, reviewer: [pair[::-1] for pair in sides(self, reviewer)])
    assert play(other) == one
    assert review.key.encode() not in one


def test_the_state_has_no_more_than_the_page_shows(tmp_path: Path) -> None:
    with serving(begin(tmp_path / "run", 1)) as (_, client):
        state = client.state("anna")
    assert set(state) == {"task", "reviewer", "of", "items", "verdicts", "finished", "revealed", "summary"}
    assert set(state["items"][0]) == {"prompt", "tools", "reference", "left", "right"}
    assert state["verdicts"] == [click(None, None)] and state["revealed"] is state["summary"] is None


def test_the_law_itself_can_fail(tmp_path: Path) -> None:
    """Without the exchanged sides the bytes differ: the comparison above does see the texts."""
    items = [item("0"), item("1")]
    one = begin(tmp_path / "one", items)
    other = dataclasses.replace(
        begin(tmp_path / "two", [dataclasses.replace(i, base=i.adapter, adapter=i.base) for i in items]), key=one.key
    )
    assert play(one) != play(other)


def test_finishing_reveals_to_the_one_who_finished_only(tmp_path: Path) -> None:
    review = begin(tmp_path / "run", 2)
    told: list[str] = []
    with serving(review) as (server, client):
        server.on_finish = told.append
        for place in range(2):
            assert client.click("anna", place, click("good", "bad")) == 200
        assert client.finish("ben")[0] == 422
        status, state = client.finish("anna")
        assert status == 200 and state["finished"] and told == ["anna"]
        assert state["revealed"] == [left for left, _ in review.sides("anna")]
        assert state["summary"]["items"] == 2
        assert client.click("anna", 0, click("bad", "bad", "tie")) == 409
        other = client.state("ben")
        assert other["revealed"] is None and other["summary"] is None and not other["finished"]


# --- what survives -------------------------------------------------------------------------------------------------


def test_two_reviewers_at_once_lose_no_click(tmp_path: Path) -> None:
    review = begin(tmp_path / "run", 12)
    failed: list[Any] = []

    def work(client: Client, name: str, verdict: dict[str, Any]) -> None:
        try:
            for place in range(12):
                for said in (click(verdict["left"], None), verdict):
                    assert client.click(name, place, said) == 200
            assert client.finish(name)[0] == 200
        except BaseException as error:
            failed.append(error)

    with serving(review) as (_, one), serving(Review.load(review.run)) as (_, two):  # as two processes would
        jobs = [
            threading.Thread(target=work, args=(client, name, said))
            for client, name, said in (
                (one, "anna", click("good", "bad", "left")),
                (two, "ben", click("bad", "good", "right")),
                (one, "carl", click("partly", "partly", "tie")),
            )
        ]
        for job in jobs:
            job.start()
        for job in jobs:
            job.join(60)
    assert not failed
    lines = (review.folder / LOG).read_text(encoding="utf-8").splitlines()
    assert len(lines) == 3 * (12 * 2 + 1) and all(json.loads(line) for line in lines)
    log = review.log()
    assert sorted(log.finished) == ["anna", "ben", "carl"] and len(log.complete()) == 36
    assert all(seen["left"] == "good" for seen in review.seen("anna", log))
    assert len(review.labels(log)) == 36


SERVE = """
import sys
from pathlib import Path
from tunegate.report.review import Review
from tunegate.report.server import ReviewServer
with ReviewServer(Review.load(Path(sys.argv[1]))) as server:
    print(server.server_port, server.token, flush=True)
    server.serve_forever()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
def test_a_kill_loses_no_acknowledged_click(tmp_path: Path) -> None:
    review = begin(tmp_path / "run", 8)
    said: dict[int, dict[str, Any]] = {}
    for start in (0, 3, 6):  # three lives of the server, each killed in the middle of a stream of clicks
        process = subprocess.Popen([sys.executable, "-c", SERVE, str(review.run)], stdout=subprocess.PIPE, text=True)
        try:
            assert process.stdout is not None
            port, token = process.stdout.readline().split()
            client = Client(int(port), token)
            state = client.state("anna")
            assert {i: v for i, v in enumerate(state["verdicts"]) if v["left"]} == said
            for place in range(start, min(start + 3, 8)):
                verdict = click("good", ("partly", "bad")[place % 2], "left", f"note {place}\nä")
                assert client.click("anna", place, verdict) == 200
                said[place] = verdict
        finally:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
    assert {i: v for i, v in enumerate(review.seen("anna", review.log())) if v["left"]} == said and len(said) == 8
    assert not list(review.run.rglob(".tmp-*"))
