"""A server under people who may not do all they want: limited keys, bodies and answers that do not end, secrets in
prompts. Real sockets on 127.0.0.1, OpenAI's own client where it fits."""

from __future__ import annotations

import asyncio
import json
import socket
import time
import urllib.error
import urllib.request
from collections.abc import AsyncGenerator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from serving import FakeEngine, Serving, serving
from tiny import tiny_tokenizer
from tunegate.serve.jobs import Job, Tokens
from tunegate.serve.keys import Key, add_key, hash_of

openai = pytest.importorskip("openai")
exchange = pytest.importorskip("tunegate.serve.exchange", exc_type=ImportError)
guard = pytest.importorskip("tunegate.serve.guard")

ANSWER = "A short answer, and a good one."
HELLO: list[Any] = [{"role": "user", "content": "Where is my order?"}]
SECRET = "xylophone hunter2"


@pytest.fixture(autouse=True)
def direct(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def get(url: str, key: str) -> tuple[int, str]:
    try:
        request = urllib.request.Request(url, headers={"Authorization": f"Bearer {key}"})
        with urllib.request.urlopen(request, timeout=20) as reply:
            return reply.status, reply.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def until(what: Callable[[], bool]) -> None:
    for _ in range(2000):
        if what():
            return
        time.sleep(0.005)
    raise AssertionError("it never came true")


# --- what a key may ------------------------------------------------------------------------------------------------


@pytest.fixture
def keyed(tmp_path: Path) -> Iterator[Serving]:
    """``all`` may use every model, ``some`` what begins with sup, ``root`` may load, ``poor`` has few tokens."""
    path = tmp_path / "keys"
    for key in (
        Key("all", hash_of(b"k-all")), Key("some", hash_of(b"k-some"), models=("sup*",)),
        Key("root", hash_of(b"k-root"), admin=True), Key("poor", hash_of(b"k-poor"), tokens_per_minute=20),
    ):  # fmt: skip
        add_key(path, key)
    with serving(tiny_tokenizer(), lambda job: ANSWER, front={"keys": guard.Keys(file=path)}) as found:
        found.catalogue._served["supreme"] = found.catalogue._made("supreme", "ship", "/adapters/supreme")
        found.catalogue._served["supper/secret"] = found.catalogue._made("supper/secret", "ship", "/adapters/x")
        found.catalogue._served["billing"] = found.catalogue._made("billing", "ship", "/adapters/billing")
        yield found


def test_a_limited_key_neither_sees_nor_names_other_models(keyed: Serving) -> None:
    some, every = keyed.client().with_options(api_key="k-some"), keyed.client().with_options(api_key="k-all")
    assert {m.id for m in some.models.list()} == {"support", "supreme", "supper/secret"}
    assert {m.id for m in every.models.list()} == {"tiny", "support", "supreme", "supper/secret", "billing"}
    assert some.chat.completions.create(model="support", messages=HELLO).choices[0].message.content == ANSWER
    asks: list[Callable[[Any, str], Any]] = [
        lambda client, name: client.chat.completions.create(model=name, messages=HELLO),
        lambda client, name: client.completions.create(model=name, prompt="x"),
        lambda client, name: client.models.retrieve(name),
        lambda client, name: client.post("/../tokenize", body={"model": name, "prompt": "x"}, cast_to=object),
        lambda client, name: client.post("/../detokenize", body={"model": name, "tokens": [1]}, cast_to=object),
    ]
    for ask in asks:
        for name in ("billing", "billinf", "suppert"):
            with pytest.raises(openai.NotFoundError) as told:
                ask(some, name)
            text = str(told.value)  # the same for a name that is there and one that is not
            assert "no such model" in text and "billing'?" not in text and "tiny" not in text
            assert ("did you mean" in text) == (name == "suppert")
        ask(every, "billing")
    with pytest.raises(openai.NotFoundError):  # without a model it means the base
        some.post("/../tokenize", body={"prompt": "x"}, cast_to=object)


def test_a_wrong_key_and_what_only_some_may(keyed: Serving) -> None:
    for wrong in ("k-al", "k-alll", "none"):
        with pytest.raises(openai.AuthenticationError):
            keyed.client().with_options(api_key=wrong).models.list()
    body = {"lora_name": "new", "lora_path": "there"}
    for key in ("k-all", "k-some"):
        for path in ("load", "unload"):
            with pytest.raises(openai.PermissionDeniedError) as told:
                keyed.client().with_options(api_key=key).post(f"/{path}_lora_adapter", body=body, cast_to=object)
            assert told.value.body["code"] == "not_allowed"
    keyed.client().with_options(api_key="k-root").post("/load_lora_adapter", body=body, cast_to=str)
    assert "new" in keyed.catalogue._served
    assert [get(f"{keyed.url}/metrics", key)[0] for key in ("k-all", "k-some", "k-root", "x")] == [200, 403, 200, 401]
    assert get(f"{keyed.url}/", "x")[0] == get(f"{keyed.url}/health", "x")[0] == 200


@pytest.mark.parametrize("stream", [False, True])
def test_tokens_are_counted_and_owed(keyed: Serving, stream: bool) -> None:
    poor = keyed.client().with_options(api_key="k-poor")
    found = poor.chat.completions.create(model="support", messages=HELLO, stream=stream, n=2)
    if stream:
        list(found)
    prompt, made = len(keyed.engine.jobs[-1].tokens), len(tiny_tokenizer()(ANSWER)["input_ids"])
    used = prompt + 2 * made
    assert used > 20
    with pytest.raises(openai.RateLimitError) as told:
        poor.chat.completions.create(model="support", messages=HELLO)
    wait = (used - 20 + 1) * 60 / 20
    assert wait - 20 <= int(told.value.response.headers["Retry-After"]) <= wait + 1
    assert told.value.body["type"] == "rate_limit_error" and "20 tokens a minute" in told.value.body["message"]
    figures = get(f"{keyed.url}/metrics", "k-all")[1]
    assert f'tunegate_key_tokens_total{{key="poor"}} {float(used)}' in figures
    assert 'tunegate_key_requests_total{key="poor",status="429"} 1.0' in figures
    assert 'tunegate_key_requests_total{key="poor",status="200"} 1.0' in figures and "k-poor" not in figures


# --- time ----------------------------------------------------------------------------------------------------------


def test_a_body_that_trickles_gets_408(tmp_path: Path) -> None:
    """A byte at a time, more than the time it has; another client is answered meanwhile."""
    limits = exchange.Limits(body_seconds=0.4)
    with serving(tiny_tokenizer(), lambda job: ANSWER, front={"limits": limits}) as server:
        host, port = server.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=20) as slow:
            slow.sendall(
                b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                b"Content-Length: 100000\r\n\r\n"
            )
            slow.settimeout(0.02)
            got, answered, ended = b"", False, False
            for _ in range(1000):
                try:
                    slow.sendall(b" ")
                    data = slow.recv(4096)
                    got, ended = got + data, not data
                except TimeoutError:
                    pass
                except OSError:
                    ended = True
                if ended:
                    break
                if not answered:
                    server.client().chat.completions.create(model="support", messages=HELLO)
                    answered = True
        head, _, body = got.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 408") and b"connection: close" in head.lower() and ended and answered
        assert json.loads(body)["error"]["code"] == "body_timeout" and len(server.engine.jobs) == 1


@pytest.mark.parametrize("n", [1, 3])
def test_an_answer_that_takes_too_long_is_cancelled(n: int) -> None:
    limits = exchange.Limits(answer_seconds=0.5)
    with serving(tiny_tokenizer(), lambda job: ANSWER * 9, front={"limits": limits}, pause=0.1) as server:
        with pytest.raises(openai.InternalServerError) as told:
            server.client().with_options(max_retries=2).chat.completions.create(model="support", messages=HELLO, n=n)
        assert told.value.status_code == 504 and told.value.body["code"] == "answer_timeout"
        assert "at most 0.5 s" in told.value.body["message"] and len(server.engine.jobs) == n  # it was not asked again
        until(lambda: (server.engine.running, server.engine.cancelled) == (0, n))
        seen: list[Any] = []
        with pytest.raises(openai.APIError, match="took too long"):  # the stream's last event
            for chunk in server.client().chat.completions.create(model="support", messages=HELLO, n=n, stream=True):
                seen.append(chunk)
        assert len(seen) > n
        until(lambda: (server.engine.running, server.engine.cancelled) == (0, 2 * n))


def test_an_answer_that_does_not_begin_in_time() -> None:
    limits = exchange.Limits(answer_seconds=0.3)
    with serving(tiny_tokenizer(), lambda job: ANSWER, front={"limits": limits}, pause=60.0) as server:
        for stream in (False, True):
            with pytest.raises(openai.InternalServerError) as told:
                server.client().chat.completions.create(model="support", messages=HELLO, stream=stream)
            assert told.value.status_code == 504
        until(lambda: (server.engine.running, server.engine.cancelled) == (0, 2))


def test_whoever_does_not_ask_for_the_next_piece_does_not_hold_the_engine() -> None:
    """The deadline closes what nobody waits for; then it is told, once."""
    closed: list[str] = []

    async def pieces() -> AsyncGenerator[int, None]:
        try:
            for number in range(100):
                yield number
        finally:
            await asyncio.sleep(0)
            closed.append("closed")

    async def work() -> None:
        found = exchange.until(time.monotonic() + 0.05, 0.05, pieces())
        assert await anext(found) == 0 and closed == []
        await asyncio.sleep(0.2)
        assert closed == ["closed"]
        with pytest.raises(Exception, match="took too long"):
            await anext(found)
        with pytest.raises(StopAsyncIteration):
            await anext(found)
        in_time = exchange.until(time.monotonic() + 20, 20, pieces())
        assert [number async for number in in_time] == [*range(100)]
        assert closed == ["closed"] * 2
        cancelled = asyncio.ensure_future(anext(exchange.until(time.monotonic() + 20, 20, forever())))
        await asyncio.sleep(0)
        cancelled.cancel()  # by somebody else: it stays a cancellation
        with pytest.raises(asyncio.CancelledError):
            await cancelled

    async def forever() -> AsyncGenerator[int, None]:
        await asyncio.sleep(3600)
        yield 1

    asyncio.run(work())


# --- prompts and the log ---------------------------------------------------------------------------------------------


class Broken(FakeEngine):
    """Fails as nobody foresaw, with the prompt in its message: at once, or in the middle."""

    async def generate(self, job: Job) -> AsyncGenerator[Tokens, None]:
        text = self.tokenizer.decode(job.tokens)
        if job.max_new_tokens != 1:
            yield Tokens((5,))
            yield Tokens((6,))
        try:
            raise KeyError(SECRET)
        except KeyError as error:
            raise RuntimeError(f"{SECRET}: {text}") from error


def ask_everything(server: Serving) -> set[int]:
    """The marker through every route, in right and wrong requests; the statuses."""
    says = [{"role": "user", "content": SECRET}]
    chat, complete = "/v1/chat/completions", "/v1/completions"
    bodies: list[tuple[str, Any]] = [
        (chat, {"model": "support", "messages": says}),
        (chat, {"model": "support", "messages": says, "stream": True}),
        (chat, {"model": "support", "messages": says, "max_tokens": 1}),
        (chat, {"model": "support", "messages": says, "n": 2, "stream": True}),
        (chat, {"model": "support", "messages": says, "max_tokens": SECRET}),
        (chat, {"model": SECRET, "messages": says}),
        (chat, {"model": "support", "messages": says, SECRET: SECRET}),
        (chat, {"model": "support", "messages": [{"role": SECRET, "content": SECRET}]}),
        (chat, {"model": "support", "messages": says, "stop": [SECRET] * 99}),
        (chat, {"model": "support", "messages": says * 5000}),
        (chat, {"model": "support", "messages": says, "response_format": {"type": "json_schema", "json_schema": {
            "name": "x", "schema": {"type": SECRET, "pattern": SECRET}}}}),
        (chat, {"model": "support", "messages": says, "tools": [{"type": "function", "function": {"name": SECRET}}]}),
        (complete, {"model": "support", "prompt": SECRET}),
        (complete, {"model": "support", "prompt": [SECRET] * 3, "echo": True, "logprobs": 2, "max_tokens": 1}),
        (complete, {"model": "support", "prompt": SECRET * 5000}),
        (complete, {"model": "support", "prompt": {"text": SECRET}}),
        ("/tokenize", {"model": "support", "prompt": SECRET}),
        ("/tokenize", {"model": "support", "messages": says}),
        ("/detokenize", {"model": "support", "tokens": [SECRET]}),
        ("/v1/load_lora_adapter", {"lora_name": SECRET, "lora_path": SECRET}),
        ("/v1/unload_lora_adapter", {"lora_name": SECRET}),
        (f"/{SECRET.replace(' ', '%20')}", {"model": SECRET}),
        (chat, f'{{"model": "support", "messages": "{SECRET}'),
        (chat, f'["{SECRET}"]'),
        (chat, SECRET.encode() + b"\xff"),
    ]  # fmt: skip
    statuses = set()
    for path, body in bodies:
        data = (
            body if isinstance(body, bytes) else body.encode() if isinstance(body, str) else json.dumps(body).encode()
        )
        request = urllib.request.Request(f"{server.url}{path}", data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=20) as reply:
                statuses.add(reply.status)
                reply.read()
        except urllib.error.HTTPError as error:
            statuses.add(error.code)
    for path in (f"/v1/models/{SECRET}", f"/health?{SECRET}", f"/v1/models?x={SECRET}"):
        statuses.add(get(server.url + path.replace(" ", "%20"), SECRET.replace(" ", ""))[0])
    with socket.create_connection(tuple(server.url.removeprefix("http://").split(":")), timeout=20) as raw:  # type: ignore[arg-type]
        raw.sendall(f"{SECRET} HTTP/9 \r\n\r\n".encode())
        raw.recv(4096)
    return statuses


def logged(caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]) -> str:
    """All that a log or a terminal would show."""
    import logging

    form = logging.Formatter("%(levelname)s %(name)s %(message)s")
    out, err = capfd.readouterr()
    return "\n".join([*map(form.format, caplog.records), out, err])


def spoil(server: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step of the front fails with the marker in its message; the places stay."""

    def fail(*_: Any, **__: Any) -> Any:
        raise ValueError(f"unforeseen: {SECRET}")

    for name in ("chat_plan", "completion_plan", "tokenized"):
        monkeypatch.setattr(f"tunegate.serve.app.{name}", fail)
    monkeypatch.setattr(server.catalogue, "load", fail)


def test_no_prompt_is_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level("INFO")
    with serving(tiny_tokenizer(), lambda job: SECRET) as server:
        assert {200, 400, 404} <= ask_everything(server) <= {200, 400, 404}
        server.engine.__class__ = Broken
        assert {200, 400, 404, 500} <= ask_everything(server) <= {200, 400, 404, 500}
        with monkeypatch.context() as patched:
            spoil(server, patched)
            assert {400, 404, 500} <= ask_everything(server) <= {200, 400, 404, 500}
    text = logged(caplog, capfd)
    assert "xylophone" not in text and "hunter2" not in text
    assert "a request failed: ValueError at" in text and "in fail" in text  # and still it says where
    assert "RuntimeError at" in text and "from KeyError at" in text
    assert text.count("Traceback") == 0


def test_at_debug_the_message_is_there(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    caplog.set_level("DEBUG", "tunegate.serve")
    with serving(tiny_tokenizer(), lambda job: SECRET) as server:
        spoil(server, monkeypatch)
        with pytest.raises(openai.InternalServerError) as told:
            server.client().chat.completions.create(model="support", messages=HELLO)
    assert SECRET not in str(told.value) and f"unforeseen: {SECRET}" in caplog.text
