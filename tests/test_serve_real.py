"""``tunegate serve`` as a user has it: the command, its two processes, a registry, and OpenAI's client."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from served import make_adapter, served_base
from tunegate.adapter.files import adapter_hash, load_adapter
from tunegate.engine.generate import Sampling, generate
from tunegate.engine.runner import Runner
from tunegate.model.loading import load_model
from tunegate.registry.adding import add
from tunegate.registry.intake import read_folder
from tunegate.registry.opening import open_registry
from tunegate.registry.states import promote
from tunegate.serve.base import ServedBase

if any(importlib.util.find_spec(name) is None for name in ("uvicorn", "fastapi", "openai")):
    pytest.skip("the serve extra is not installed", allow_module_level=True)

QUESTION = [{"role": "user", "content": "Where is my order?"}]
NEW = 12


@pytest.fixture(scope="module")
def base(tiny_llama: Path) -> ServedBase:
    return served_base(tiny_llama)


@pytest.fixture(scope="module")
def adapters(base: ServedBase, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    out = tmp_path_factory.mktemp("adapters")
    return [make_adapter(out / str(seed), base, seed=seed) for seed in range(3)]


@contextlib.contextmanager
def server(*arguments: str, home: Path) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """The command on a free port; (address, process)."""
    environment = {**os.environ, "TUNEGATE_HOME": str(home), "OMP_NUM_THREADS": "1", "TUNEGATE_USER": "test"}
    process = subprocess.Popen(
        [sys.executable, "-m", "tunegate.cli", "serve", *arguments, "--port", "0", "--threads", "1", "--json",
         "--kv-cache", "4MB", "--grace", "5"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip
    timer = threading.Timer(200, process.kill)
    timer.start()
    try:
        assert process.stdout is not None and process.stderr is not None
        first = process.stdout.readline()
        assert first, process.stderr.read()
        threading.Thread(target=process.stderr.read, daemon=True).start()
        yield json.loads(first)["address"], process
    finally:
        timer.cancel()
        process.terminate()
        try:
            process.wait(20)
        finally:
            process.kill()


def client(address: str) -> Any:
    from openai import OpenAI

    return OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=60)


def expected(base: ServedBase, adapter: Path | None) -> str:
    """What the library answers with the adapter in place."""
    model = load_model(base.resolved.path, dtype=torch.float32)
    runner = Runner(model)
    if adapter is not None:
        load_adapter(model, adapter)
    renderer = base.renderer()
    ids = generate(runner, [renderer.prompt_ids(QUESTION)], Sampling(NEW, tuple(renderer.stop_ids)))[0].ids
    return renderer.decode(ids)


def test_what_is_served_is_what_was_trained(base: ServedBase, adapters: list[Path], tmp_path: Path) -> None:
    arguments = [str(base.resolved.path), "--base-name", "base"]
    for n, folder in enumerate(adapters[:2]):
        arguments += ["--adapter", f"a{n}={folder}"]
    root = adapters[0].parent
    with server(*arguments, "--adapter-root", str(root), home=tmp_path) as (address, process):
        openai = client(address)
        assert [m.id for m in openai.models.list()] == ["base", "a0", "a1"]
        for name, folder in (("base", None), ("a0", adapters[0]), ("a1", adapters[1])):
            answer = openai.chat.completions.create(model=name, messages=QUESTION, temperature=0, max_tokens=NEW)
            assert answer.choices[0].message.content == expected(base, folder)
            if folder is not None:
                assert answer.system_fingerprint == adapter_hash(folder)
            parts = openai.chat.completions.create(
                model=name, messages=QUESTION, temperature=0, max_tokens=NEW, stream=True
            )
            assert "".join(p.choices[0].delta.content or "" for p in parts) == answer.choices[0].message.content
        body = json.dumps({"lora_name": "later", "lora_path": str(adapters[2])}).encode()
        request = urllib.request.Request(
            f"{address}/v1/load_lora_adapter", body, {"Content-Type": "application/json"}
        )  # fmt: skip
        assert b"Success" in urllib.request.urlopen(request, timeout=60).read()
        later = openai.chat.completions.create(model="later", messages=QUESTION, temperature=0, max_tokens=NEW)
        assert later.choices[0].message.content == expected(base, adapters[2])
        form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": ["yes", "no"]}}}
        held = openai.chat.completions.create(
            model="a1", messages=QUESTION, temperature=0, max_tokens=NEW, response_format=form
        )
        assert json.loads(held.choices[0].message.content) in ("yes", "no")
        long = [{"role": "user", "content": "Where is my order? " * 20}]
        asked = {"model": "a0", "messages": long, "temperature": 0, "max_tokens": 4}
        alone, many = (openai.chat.completions.create(**asked, n=n) for n in (1, 128))
        assert [c.message.content for c in many.choices] == [alone.choices[0].message.content] * 128
        assert many.usage.prompt_tokens == alone.usage.prompt_tokens > 100
        metrics = urllib.request.urlopen(f"{address}/metrics", timeout=60).read().decode()
        assert "tunegate" in metrics
        _kill_the_engine(process, address)
        for _ in range(300):  # 503 until the next one has its base
            with contextlib.suppress(Exception):
                again = openai.chat.completions.create(model="a0", messages=QUESTION, temperature=0, max_tokens=NEW)
                break
            time.sleep(0.1)
        assert again.choices[0].message.content == expected(base, adapters[0])
        process.terminate()
        assert process.wait(20) == 0


def _kill_the_engine(process: subprocess.Popen[str], address: str) -> None:
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    if not children.is_file():
        pytest.skip("this system does not list a process's children")
    for pid in children.read_text(encoding="ascii").split():
        if b"engine_worker" in Path(f"/proc/{pid}/cmdline").read_bytes():
            os.kill(int(pid), signal.SIGKILL)
    for _ in range(100):
        try:
            urllib.request.urlopen(f"{address}/health", timeout=10)
        except urllib.error.HTTPError as error:
            assert error.code == 503
            return
        time.sleep(0.02)
    raise AssertionError("the server never noticed that its engine was gone")


def test_a_promotion_swaps_under_load(base: ServedBase, adapters: list[Path], tmp_path: Path) -> None:
    place = tmp_path / "registry"
    registry = open_registry(str(place), create=True, who="test")
    refs = []
    for folder in adapters[:2]:
        refs.append(add(registry, read_folder(folder, name="support")).version.ref)
    promote(registry, refs[0], why="first", to="production")
    right = {adapter_hash(folder): expected(base, folder) for folder in adapters[:2]}
    assert len(set(right.values())) == 2
    where = (str(base.resolved.path), "--registry", str(place), "--poll", "0.1")
    with server(*where, home=tmp_path) as (address, _):
        openai, seen, stop, errors = client(address), [], threading.Event(), []

        def ask() -> None:
            while not stop.is_set():
                try:
                    answer = openai.chat.completions.create(
                        model="support", messages=QUESTION, temperature=0, max_tokens=NEW
                    )
                except Exception as error:  # every one counts
                    errors.append(error)
                    return
                seen.append((answer.system_fingerprint, answer.choices[0].message.content))

        threads = [threading.Thread(target=ask) for _ in range(3)]
        for thread in threads:
            thread.start()
        _until(lambda: len(seen) > 5 or errors)
        promote(registry, refs[1], why="better", to="production")
        _until(lambda: errors or (seen and seen[-1][0] == adapter_hash(adapters[1])))
        stop.set()
        for thread in threads:
            thread.join(60)
    assert not errors
    assert {key for key, _ in seen} == set(right)
    assert all(text == right[key] for key, text in seen)


def _until(done: Any, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.05)


def test_a_wrong_adapter_is_told_before_the_engine_starts(
    base: ServedBase, adapters: list[Path], tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in adapters[0].iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    data = bytearray((broken / "adapter_model.safetensors").read_bytes())
    data[-1] ^= 1
    (broken / "adapter_model.safetensors").write_bytes(bytes(data))
    found = subprocess.run(
        [sys.executable, "-m", "tunegate.cli", "serve", str(base.resolved.path), "--adapter", f"a={broken}"],
        capture_output=True, text=True, timeout=120, env={**os.environ, "TUNEGATE_HOME": str(tmp_path / "home")},
    )  # fmt: skip
    assert found.returncode == 2
    assert "adapter_model.safetensors" in found.stderr + found.stdout
