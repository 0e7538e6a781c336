"""``tunegate serve``: which base, what is told, keys, and how it ends; with an engine and routes that are stand-ins."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import signal
import socket
import sys
import threading
import time
import types
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from registry_fixtures import Place
from served import FakeEngine, make_adapter, make_peft, served_base
from tiny import tiny_base
from tunegate.adapter.files import adapter_hash
from tunegate.cli import main
from tunegate.errors import InputError, TunegateError
from tunegate.registry.adding import add
from tunegate.registry.intake import read_folder
from tunegate.registry.opening import Registry
from tunegate.registry.states import promote
from tunegate.serve.admission import House
from tunegate.serve.base import ServedBase, open_base
from tunegate.serve.catalogue import Catalogue
from tunegate.serve.guard import KeyGuard, Keys
from tunegate.serve.keys import Key, add_key, hash_of
from tunegate.serve.start import Wanted, bind, fill, find_base, url_of

needs_uvicorn = pytest.mark.skipif(importlib.util.find_spec("uvicorn") is None, reason="uvicorn is not installed")
NF4 = {"format": "nf4", "block": 64, "double": True, "keep": [], "stored": False}


@pytest.fixture(scope="module")
def base(tiny_llama: Path) -> ServedBase:
    return served_base(tiny_llama)


@pytest.fixture
def adapter(tmp_path: Path, base: ServedBase) -> Path:
    return make_adapter(tmp_path / "adapter", base)


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Place(str(tmp_path / "registry"), None).open()


def found(**wanted: Any) -> ServedBase:
    return find_base(Wanted(**wanted), lambda line: None)


# --- the base ----------------------------------------------------------------------------------------------------


def test_the_base_is_what_the_card_names(tmp_path: Path, base: ServedBase, adapter: Path) -> None:
    assert found(adapters=(("a", str(adapter)),)).at_hand == base.at_hand
    plain = make_peft(tmp_path / "plain", base)
    with pytest.raises(InputError, match="which base"):
        found(adapters=(("a", str(plain)),))
    assert found(adapters=(("a", str(plain)),), base=str(base.resolved.path)).at_hand == base.at_hand
    other = served_base(tiny_base(tmp_path / "other", "llama", seed=1))
    foreign = make_adapter(tmp_path / "foreign", other)
    with pytest.raises(InputError, match=r"different bases(.|\n)*a: .*; b: "):
        found(adapters=(("a", str(adapter)), ("b", str(foreign))))


def test_a_registry_names_the_base_too(base: ServedBase, adapter: Path, registry: Registry) -> None:
    ref = add(registry, read_folder(adapter)).version.ref
    assert found(adapters=(("a", ref),), registry=registry).at_hand == base.at_hand
    with pytest.raises(InputError, match="which base"):
        found(everything=True, registry=registry)  # it is no more than a candidate
    promote(registry, ref, why="good", to="production")
    assert found(everything=True, registry=registry).at_hand == base.at_hand


def test_the_base_is_quantized_as_the_adapters_were_trained(tmp_path: Path, base: ServedBase, adapter: Path) -> None:
    blocks = [
        make_adapter(tmp_path / str(block), open_base(base.resolved, {**NF4, "block": block})) for block in (64, 128)
    ]
    one = (("a", str(blocks[1])),)
    assert found(adapters=one).at_hand.recipe == {**NF4, "block": 128}
    assert found(adapters=one, quantization="nf4").at_hand.recipe == {**NF4, "block": 128}
    assert found(adapters=one, quantization="none").at_hand.recipe is None
    both = (*one, ("b", str(adapter)))
    with pytest.raises(InputError, match="different quantizations"):
        found(adapters=both)
    assert found(adapters=both, quantization="nf4").at_hand.recipe == {**NF4, "block": 128}
    assert found(base=str(base.resolved.path), quantization="nf4").at_hand.recipe == NF4
    rows = {**NF4, "format": "int8", "block": 0, "double": False}
    assert found(adapters=both, quantization="int8").at_hand.recipe == rows
    assert found(base=str(base.resolved.path), base_as="house/base").name == "house/base"


# --- the key -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "path", "headers", "passes"),
    [
        ("POST", "/v1/chat/completions", [(b"authorization", b"Bearer secret")], True),
        ("POST", "/v1/chat/completions", [(b"authorization", b"bearer  secret")], True),
        ("POST", "/v1/chat/completions", [], False),
        ("POST", "/v1/chat/completions", [(b"authorization", b"Bearer secre")], False),
        ("POST", "/v1/chat/completions", [(b"authorization", b"Basic secret")], False),
        ("POST", "/v1/chat/completions", [(b"authorization", b"secret")], False),
        ("POST", "/v1/chat/completions", [(b"authorization", b"Bearer secret")] * 2, False),
        ("GET", "/metrics", [], False),
        ("GET", "/health", [], True),
        ("GET", "/", [], True),
        ("GET", "/page/playground.js", [], True),
        ("POST", "/health", [], False),
        ("GET", "/page", [], False),
    ],
)
def test_the_key_opens_what_is_not_open(method: str, path: str, headers: list[Any], passes: bool) -> None:
    sent: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        sent.append("passed")

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        raise AssertionError("a refused body is not read")

    scope = {"type": "http", "method": method, "path": path, "headers": headers}
    asyncio.run(KeyGuard(app, Keys(("VAR", "secret")))(scope, receive, send))
    if passes:
        assert sent == ["passed"]
    else:
        assert sent[0]["status"] == 401 and json.loads(sent[1]["body"])["error"]["code"] == "invalid_api_key"


# --- the address -------------------------------------------------------------------------------------------------


def test_an_address_that_is_taken_is_told() -> None:
    with bind("127.0.0.1", 0) as first:
        first.listen()
        port = first.getsockname()[1]
        assert url_of(first) == f"http://127.0.0.1:{port}"
        with pytest.raises(InputError, match="another --port"):
            bind("127.0.0.1", port)
    with pytest.raises(InputError, match="cannot be had"):
        bind("not a host", 0)


# --- the command -------------------------------------------------------------------------------------------------


class Stage:
    """Stand-ins for the engine and the routes; ``options`` is what the engine was started with."""

    def __init__(self) -> None:
        self.engine = FakeEngine()
        self.options: Any = None
        self.admin: bool | None = None
        self.limits: Any = None
        self.release = threading.Event()

    def process(self, options: Any) -> FakeEngine:
        self.options = options
        return self.engine

    def app(self, engine: Any, catalogue: Any, *, limits: Any, admin: bool, keys: Keys | None) -> Any:
        self.admin, self.limits = admin, limits

        async def app(scope: Any, receive: Any, send: Any) -> None:
            if scope["type"] != "http":
                return
            await send({"type": "http.response.start", "status": 200, "headers": []})
            if scope["path"] == "/slow":
                await send({"type": "http.response.body", "body": b"begun ", "more_body": True})
                while not self.release.is_set():
                    await asyncio.sleep(0.01)
            await send({"type": "http.response.body", "body": b"done"})

        return app if keys is None else KeyGuard(app, keys)


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stage]:
    made = Stage()
    modules = {
        "tunegate.serve.engine_process": {"EngineProcess": made.process},
        "tunegate.serve.app": {"create_app": made.app},
        "fastapi": {"__spec__": types.SimpleNamespace()},
    }
    for name, content in modules.items():
        module = types.ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    yield made
    made.release.set()


def address(told: Callable[[], str]) -> str:
    for _ in range(3000):
        if (text := told()).endswith("}\n"):
            return str(json.loads(text)["address"])
        time.sleep(0.01)
    raise AssertionError("it never came up")


def get(url: str, **headers: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=10) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def serve(capsys: pytest.CaptureFixture[str], client: Callable[[str], None], *arguments: str) -> tuple[int, Any]:
    """Run the command; ``client`` is called with the address on a thread, and a signal ends the server. Its exit code
    and what it told."""
    told, failed = [""], list[BaseException]()

    def read() -> str:
        told[0] += capsys.readouterr().out
        return told[0]

    def run() -> None:
        try:
            client(address(read))
        except BaseException as error:
            failed.append(error)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=run)
    before = signal.signal(signal.SIGTERM, lambda *_: None)  # the thread's may come when the server is gone already
    try:
        thread.start()
        code = main(["serve", *arguments, "--port", "0", "--json"])
        thread.join()
    finally:
        signal.signal(signal.SIGTERM, before)
    if failed:
        raise failed[0]
    return code, json.loads(read())


@needs_uvicorn
def test_it_serves_what_it_says_until_it_is_told_to_stop(
    capsys: pytest.CaptureFixture[str], stage: Stage, base: ServedBase, adapter: Path
) -> None:
    before, seen = (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)), list[Any]()
    code, said = serve(
        capsys, lambda url: seen.append(get(f"{url}/x")), "--adapter", f"a={adapter}", "--pin", "a",
        "--kv-cache", "64MB", "--max-rows", "8", "--max-context", "100",
    )  # fmt: skip
    assert code == 0 and seen == [(200, "done")] and not stage.engine.alive and stage.admin
    key = adapter_hash(adapter)
    assert [(m["name"], m["standing"], m["fingerprint"]) for m in said["models"]] == [
        (base.name, "base", base.at_hand.fingerprint.total), ("a", "ship", key),
    ]  # fmt: skip
    assert stage.engine.holds == {key: (adapter, True)}
    options = stage.options
    assert (options.base, options.recipe, options.cache_bytes) == (str(base.resolved.path), None, 64_000_000)
    assert (options.most_rows, options.context, options.adapter_bytes) == (8, 100, 1 << 30)
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


@needs_uvicorn
@pytest.mark.parametrize(("grace", "whole"), [("20", True), ("1", False)])
def test_answers_under_way_have_a_while_to_end(
    capsys: pytest.CaptureFixture[str], stage: Stage, tiny_llama: Path, grace: str, whole: bool
) -> None:
    got: list[str] = []

    def client(url: str) -> None:
        host, port = url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=10) as connection:
            connection.sendall(b"GET /slow HTTP/1.1\r\nHost: localhost\r\n\r\n")
            while b"begun" not in (data := connection.recv(4096)):
                assert data
            os.kill(os.getpid(), signal.SIGTERM)
            if whole:
                time.sleep(0.3)  # no longer listening, still answering
                with pytest.raises(OSError):
                    socket.create_connection((host, int(port)), timeout=1).close()
                stage.release.set()
            while data := connection.recv(4096):
                got.append(data.decode())

    code, _ = serve(capsys, client, str(tiny_llama), "--grace", grace)
    assert code == 0 and ("done" in "".join(got)) is whole


@needs_uvicorn
def test_a_server_that_is_told_to_stop_while_it_starts(
    stage: Stage, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async def start() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.sleep(3600)

    monkeypatch.setattr(stage.engine, "start", start)
    assert main(["serve", str(tiny_llama), "--port", "0", "--json"]) == 0
    assert not stage.engine.alive and capsys.readouterr().out == ""


@needs_uvicorn
def test_a_key_is_asked_for_and_other_machines_load_nothing(
    capsys: pytest.CaptureFixture[str], stage: Stage, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("THE_KEY", "secret")
    seen: list[Any] = []

    def client(url: str) -> None:
        local = url.replace("0.0.0.0", "127.0.0.1")
        seen.extend([get(f"{local}/v1/models")[0], get(f"{local}/v1/models", Authorization="Bearer secret")[0]])

    code, _ = serve(capsys, client, str(tiny_llama), "--host", "0.0.0.0", "--api-key-env", "THE_KEY")
    assert (code, seen, stage.admin) == (0, [401, 200], False)


@needs_uvicorn
@pytest.mark.parametrize("keyed", [False, True])
def test_a_page_of_another_site_is_not_answered(
    capsys: pytest.CaptureFixture[str], stage: Stage, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, keyed: bool
) -> None:
    """A browser sends the name that the page came from, whatever address it was made to mean."""
    monkeypatch.setenv("THE_KEY", "secret")
    own = ["localhost", "LOCALHOST:1", "127.0.0.1:80", "[::1]:80", "app.localhost:3000", "proxy.example"]
    others = [
        "evil.example",
        "evil.example:8000",
        "127.0.0.1.evil.example",
        "localhost.evil.example",
        "proxy.example.x",
    ]
    seen: list[int] = []

    def client(url: str) -> None:
        for host in (*own, *others):
            seen.append(get(f"{url}/v1/models", Host=host, Authorization="Bearer secret")[0])

    keys = ["--api-key-env", "THE_KEY"] if keyed else ["--allow-host", "Proxy.example"]
    code, _ = serve(capsys, client, str(tiny_llama), *keys)
    assert (code, seen) == (0, [200] * len(own) + [200 if keyed else 403] * len(others))


@needs_uvicorn
def test_a_registry_alone(
    capsys: pytest.CaptureFixture[str], stage: Stage, adapter: Path, registry: Registry, tmp_path: Path
) -> None:
    promote(registry, add(registry, read_folder(adapter)).version.ref, why="good", to="production")
    code, said = serve(
        capsys, lambda url: None, "--registry", str(tmp_path / "registry"), "--preload", "support", "--poll", "0.05"
    )
    assert code == 0 and said["models"][1] | {"fingerprint": ""} == {
        "name": "support", "standing": "ship", "fingerprint": "", "root": "support:1",
    }  # fmt: skip
    assert list(stage.engine.holds) == [adapter_hash(adapter)]


@needs_uvicorn
def test_all_problems_of_all_adapters_before_the_engine_starts(
    capsys: pytest.CaptureFixture[str], stage: Stage, tmp_path: Path, base: ServedBase, adapter: Path
) -> None:
    held = make_adapter(tmp_path / "held", base, seed=1, verdict="hold")
    plain = make_peft(tmp_path / "plain", base)
    wrong = [f"--adapter={name}={folder}" for name, folder in (("h", held), ("p", plain), ("../x", adapter))]
    assert main(["serve", *wrong, "--adapter", f"good={adapter}", "--port", "0", "--json"]) == 2
    told = [p["what"] for p in json.loads(capsys.readouterr().out)["error"]]
    assert len(told) == 3 and "gate says hold" in told[0] and "no card" in told[1] and "not a name" in told[2]
    assert stage.engine.loads == []


@needs_uvicorn
@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "what is to be served?"),
        (["x", "--adapter", "a=b", "--adapter", "a=c"], "a name is given twice"),
        (["x", "--api-key-env", "NO_SUCH_VARIABLE"], "the variable holds no key"),
        (["x", "--adapter-root", "/no/such/folder"], "no such folder"),
        (["x", "--registry", "/no/such/registry"], "there is no registry yet"),
        (["x", "--pin", "a"], "no such base"),
    ],
)
def test_wrong_use(capsys: pytest.CaptureFixture[str], stage: Stage, arguments: list[str], says: str) -> None:
    assert main(["serve", *arguments, "--port", "0"]) == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [["--adapter", "x"], ["--port", "70000"], ["--kv-cache", "much"], ["--grace", "0"], ["--engine", "tgi"]],
)
def test_what_cannot_be_parsed(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["serve", "x", *arguments])
    assert end.value.code == 2


@needs_uvicorn
def test_wrong_names_are_told_together_before_the_engine_starts(
    stage: Stage, tmp_path: Path, base: ServedBase, adapter: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    held = make_adapter(tmp_path / "held", base, seed=1, verdict="hold")
    line = ["serve", "--adapter", f"support={adapter}", "--adapter", f"held={held}", "--port", "0"]
    wrong = ["--pin", "nobody", "--merged", "suport", "--preload", "supporr", "--preload", "held", "--pin", base.name]
    assert main([*line, *wrong]) == 2
    told = capsys.readouterr().err
    for text in ("--pin: no such model", "--merged: no such model", "--preload: no such model", "gate says hold"):
        assert text in told
    assert told.count("did you mean 'support'") == 2 and told.count("no such model") == 4  # the held one is told once
    assert told.count("names that there are: support\n") == 2 and "/v1/models" not in told
    assert "starting the engine" not in told and not stage.engine.started


@pytest.mark.parametrize(
    ("names", "wanted", "says"),
    [
        ([], "x", "no adapter is served"),
        (["a", "b"], "nobody", "names that there are: a, b"),
        ([f"team-{n}/mail" for n in range(30)], "teem-7/mail", "did you mean 'team-7/mail'"),
        ([f"m{n}" for n in range(30)], "question", "and 20 more"),
    ],
)
def test_the_names_that_there_are(
    base: ServedBase, adapter: Path, names: list[str], wanted: str, says: str
) -> None:  # fmt: skip
    async def work() -> None:
        wish = Wanted(adapters=tuple((name, str(adapter)) for name in names), pinned=(wanted,))
        with pytest.raises(InputError) as told:
            await fill(Catalogue(FakeEngine(), House(base)), wish)
        assert says in told.value.problems[0].fix and told.value.problems[0].where == "--pin"

    asyncio.run(work())


@needs_uvicorn
def test_the_engine_is_told_of_when_it_starts(
    stage: Stage, tiny_llama: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def start() -> None:
        raise TunegateError("no memory")

    monkeypatch.setattr(stage.engine, "start", start)
    line = ["serve", str(tiny_llama), "--preload", served_base(tiny_llama).name, "--answer-timeout", "7", "--port", "0"]
    assert main([*line, "--body-timeout", "2.5", "--max-connections", "9"]) == 1
    told = capsys.readouterr().err
    assert told.index("starting the engine") < told.index("no memory")
    assert (stage.limits.answer_seconds, stage.limits.body_seconds) == (7, 2.5)


@needs_uvicorn
def test_a_file_of_keys(
    capsys: pytest.CaptureFixture[str], stage: Stage, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("THE_KEY", "secret")
    path, seen = tmp_path / "keys", list[int]()
    assert main(["serve", str(tiny_llama), "--keys", str(path), "--port", "0"]) == 2
    assert "no file of keys" in capsys.readouterr().err
    add_key(path, Key("a", hash_of(b"of-a")))

    def client(url: str) -> None:
        for key in ("of-a", "secret", "of-b"):
            seen.append(get(f"{url}/v1/models", Authorization=f"Bearer {key}")[0])

    code, _ = serve(capsys, client, str(tiny_llama), "--keys", str(path), "--api-key-env", "THE_KEY")
    assert (code, seen) == (0, [200, 200, 401])


def test_without_the_extra_it_says_what_to_install(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tiny_llama: Path
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "uvicorn" else real(name, *rest)
    )
    assert main(["serve", str(tiny_llama)]) == 2
    assert "pip install 'tunegate[serve]'" in capsys.readouterr().err
