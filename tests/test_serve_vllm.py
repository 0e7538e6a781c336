"""vLLM behind the front: the command line, what an adapter becomes, the supervised process, jobs and refusals. A
stand-in takes vLLM's place (``fake_vllm.py``); the last test runs a real one where TUNEGATE_VLLM_PYTHON names it."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fake_vllm
from tiny import tiny_base
from tunegate.adapter.files import adapter_hash, load_adapter, read_spec, save_adapter
from tunegate.adapter.inject import inject, remove
from tunegate.adapter.spec import AdapterSpec
from tunegate.errors import InputError, TunegateError
from tunegate.model.loading import empty_model, load_model
from tunegate.serve import vllm
from tunegate.serve.child import Child, Pace
from tunegate.serve.jobs import EngineFull, EngineGone, Job, Picking, Tokens
from tunegate.serve.vllm import VllmOptions
from tunegate.serve.vllm_engine import VllmEngine, metric, read_stream, request_body

FAST = Pace(patience=90.0, grace=3.0, first=0.05, longest=0.2)


@pytest.fixture
def options(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> VllmOptions:
    monkeypatch.setenv("PYTHONPATH", str(fake_vllm.install(tmp_path / "site")))
    monkeypatch.chdir(tmp_path)
    return VllmOptions(tiny_llama, sys.executable, tmp_path / "work", port=0)


@pytest.fixture(scope="module")
def adapters(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders: a plain LoRA, one with rsLoRA, patterns and an odd alpha, and a DoRA."""
    folder, model = tmp_path_factory.mktemp("adapters"), load_model(tiny_llama, dtype=torch.float32)
    specs = {
        "plain": AdapterSpec(4, 8.0, target_modules=("q_proj", "up_proj")),
        "odd": AdapterSpec(4, 2.7, use_rslora=True, target_modules=("q_proj", "v_proj"), rank_pattern={"v_proj": 2}),
        "dora": AdapterSpec(4, 8.0, use_dora=True, target_modules=("q_proj",)),
    }
    for name, spec in specs.items():
        injection = inject(model, spec, seed=0)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in injection.parameters().values():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
        save_adapter(folder / name, injection, base_name="tiny")
        remove(model)
    return {name: folder / name for name in specs}


def run(options: VllmOptions, use: Callable[[VllmEngine], Awaitable[None]], **more: Any) -> None:
    """``use`` on a started engine, which is stopped whatever happens."""

    async def main() -> None:
        engine = VllmEngine(options, pace=FAST, **more)
        await engine.start()
        try:
            await asyncio.wait_for(use(engine), 120)
        finally:
            await engine.stop()

    asyncio.run(main())


async def answer(engine: VllmEngine, job: Job) -> tuple[list[int], Tokens]:
    parts = [part async for part in engine.generate(job)]
    return [i for part in parts for i in part.ids], parts[-1]


async def until(what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not what():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.02)


def asked(tmp_path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (tmp_path / "requests.jsonl").read_text().splitlines()]


# --- the command line ---------------------------------------------------------------------------------------------


def test_the_command_says_what_vllm_needs() -> None:
    line = vllm.command(
        VllmOptions(
            Path("/b"), "py", Path("/w"), 81, context=4096, cache_bytes=1 << 30, max_rank=32, loras=8, cpu_loras=99,
            tensor_parallel=4, pipeline_parallel=2, nodes=2, template=Path("/t.jinja"), more=("--enforce-eager",),
        )
    )  # fmt: skip
    text = " ".join(line)
    assert (
        line[:5] == ["py", "-m", "vllm.entrypoints.openai.api_server", "--model", "/b"]
        and line[-1] == "--enforce-eager"
    )
    for part in (
        "--enable-lora --max-lora-rank 32 --max-loras 8 --max-cpu-loras 99", "--tensor-parallel-size 4",
        "--pipeline-parallel-size 2", "--distributed-executor-backend ray", "--chat-template /t.jinja",
        "--host 127.0.0.1 --port 81", "--max-model-len 4096", "--kv-cache-memory-bytes 1073741824",
        "--generation-config vllm",
    ):  # fmt: skip
        assert part in text
    alone = " ".join(vllm.command(VllmOptions(Path("/b"), "py", Path("/w"), 81, loras=0, merged="b3:1")))
    assert "lora" not in alone and "ray" not in alone
    assert "VLLM_API_KEY" in vllm.environment("secret") and "secret" not in text


def test_everything_that_contradicts_itself_is_said_together() -> None:
    wrong = VllmOptions(
        Path("/b"), "py", Path("/w"), 0, max_rank=24, loras=8, cpu_loras=4, tensor_parallel=3, nodes=2, merged="b3:1"
    )
    says = [f"{p.where} {p.what}" for p in wrong.problems({})]
    assert [s.split()[0] for s in says] == ["max_rank", "cpu_loras", "loras", "nodes", "RAY_ADDRESS"]
    fine = VllmOptions(Path("/b"), "py", Path("/w"), 0, tensor_parallel=4, nodes=2)
    assert fine.problems({"RAY_ADDRESS": "10.0.0.1:6379"}) == []


def test_an_interpreter_without_vllm_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="not installed"):
        vllm.check_python(sys.executable)
    with pytest.raises(InputError, match="not a Python"):
        vllm.check_python(str(tmp_path / "none"))
    monkeypatch.setenv("PYTHONPATH", str(fake_vllm.install(tmp_path / "old", "0.6.3")))
    with pytest.raises(InputError, match="too old"):
        vllm.check_python(sys.executable)


# --- what an adapter becomes --------------------------------------------------------------------------------------


def test_a_converted_adapter_is_plain_and_the_same(tiny_llama: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    folder, rank = vllm.convert(adapters["odd"], "b3:abc", tmp_path, empty_model(tiny_llama), 8)
    spec = read_spec(folder)
    assert folder == tmp_path / "adapters" / "abc" and rank == 4
    assert not spec.use_rslora and not spec.rank_pattern and float(spec.alpha).is_integer()
    ids = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
    logits = []
    for path in (adapters["odd"], folder):
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32), path)
        logits.append(model(input_ids=ids).logits)
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-5, atol=1e-5)


def test_what_vllm_would_reject_or_drop_is_refused(tiny_llama: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    model = empty_model(tiny_llama)
    with pytest.raises(InputError, match="rejects this: use_dora") as error:
        vllm.convert(adapters["dora"], "b3:1", tmp_path, model, 8)
    assert "merged" in str(error.value)
    with pytest.raises(InputError, match="above the server's"):
        vllm.convert(adapters["plain"], "b3:2", tmp_path, model, 1)
    other = empty_model(tiny_base(tmp_path / "short", "llama", num_hidden_layers=1))
    with pytest.raises(InputError, match="drops this"):  # a base that lacks the second layer
        vllm.convert(adapters["plain"], "b3:3", tmp_path, other, 8)
    assert not (tmp_path / "adapters").exists()


def started_with(tiny_llama: Path, adapters: dict[str, Path], *line: str) -> VllmOptions:
    from tunegate.cli.console import Console
    from tunegate.cli.vllm import add_vllm_options, vllm_options

    parser = argparse.ArgumentParser()
    add_vllm_options(parser)
    arguments = parser.parse_args(line)
    vars(arguments).update(
        vllm_python="py", compute_dtype="float32", max_context=None, max_rows=8, trust_remote_code=False
    )
    return vllm_options(arguments, tiny_llama, str(tiny_llama), "b3:0123", adapters, Console(json_only=True))


def test_what_vllm_may_meet_follows_from_the_adapters(tiny_llama: Path, adapters: dict[str, Path]) -> None:
    two = {name: adapters[name] for name in ("plain", "odd")}
    found = started_with(tiny_llama, two)
    assert (found.max_rank, found.loras, found.cpu_loras, found.merged) == (16, 2, 64, None)
    assert (started_with(tiny_llama, {}).max_rank, started_with(tiny_llama, {}).loras) == (64, 4)
    given = started_with(
        tiny_llama, two, "--max-lora-rank", "128", "--max-loras", "3", "--tensor-parallel", "2",
        "--vllm-option=--enforce-eager",
    )  # fmt: skip
    assert (given.max_rank, given.loras, given.tensor_parallel, given.more) == (128, 3, 2, ("--enforce-eager",))
    assert given.problems({}) == []


def test_a_dora_adapter_is_merged_first(
    tiny_llama: Path, adapters: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TUNEGATE_HOME", str(tmp_path))
    found = started_with(tiny_llama, {"d": adapters["dora"]})
    assert found.merged == adapter_hash(adapters["dora"]) and found.loras == 0 and found.problems({}) == []
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    model = load_model(tiny_llama, dtype=torch.float32)
    load_adapter(model, adapters["dora"])
    merged = load_model(found.base, dtype=torch.float32)
    torch.testing.assert_close(merged(input_ids=ids).logits, model(input_ids=ids).logits, rtol=1e-4, atol=1e-4)
    assert started_with(tiny_llama, {"d": adapters["dora"]}) == found  # not merged again
    with pytest.raises(InputError, match="no DoRA") as error:
        started_with(tiny_llama, adapters)
    assert "--engine native" in str(error.value)


# --- jobs ---------------------------------------------------------------------------------------------------------


def test_a_job_is_said_in_full() -> None:
    picking = Picking(0.5, 0.9, 40, 0.05, 0.1, 0.2, 1.1, ((5, -2.0),), 7)
    body = request_body(Job((1, 2), 9, (3,), None, picking, ("json_schema", '{"type": "object"}', False), 2), "base")
    assert body["prompt"] == [1, 2] and body["stop_token_ids"] == [3] and body["ignore_eos"] is True
    names = ("temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty")
    assert [body[name] for name in names] == [0.5, 0.9, 40, 0.05, 0.1, 0.2, 1.1]
    assert body["seed"] == 7 and body["logit_bias"] == {"5": -2.0} and body["logprobs"] == 2
    style = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
    assert body["structured_outputs"] == {"json": {"type": "object", "x-guidance": style}}
    forms = {("choices", ("a", "b"), False): {"choice": ["a", "b"]}, ("regex", "^a+$", False): {"regex": "a+"}}
    for form, asked in forms.items():
        assert request_body(Job((1,), 1, form=form), "x")["structured_outputs"] == asked
    assert "logprobs" not in request_body(Job((1,), 1), "base")
    with pytest.raises(InputError, match="too many"):
        request_body(Job((1,), 1, logprobs=21), "base")


@given(st.lists(st.lists(st.integers(0, 99), max_size=3), min_size=1, max_size=8), st.booleans(), st.integers(0, 9))
def test_a_stream_keeps_every_token(parts: list[list[int]], stops: bool, cached: int) -> None:
    """Whatever the events hold: ids in order, the stop token alone left out, the usage on the last one."""
    stop = 100
    events = [
        {"choices": [{"token_ids": ids, "finish_reason": None, "stop_reason": None}]} for ids in parts[:-1]
    ]  # fmt: skip
    last = [*parts[-1], stop] if stops else parts[-1]
    events.append(
        {"choices": [{"token_ids": last, "finish_reason": "stop" if stops else "length",
                      "stop_reason": stop if stops else None}]}
    )  # fmt: skip
    events.append({"choices": [], "usage": {"prompt_tokens_details": {"cached_tokens": cached}}})

    async def lines() -> AsyncIterator[str]:
        for event in events:
            yield f"data: {json.dumps(event)}"
            yield ""
        yield "data: [DONE]"

    async def collect() -> list[Tokens]:
        return [part async for part in read_stream(lines())]

    found = asyncio.run(collect())
    assert [i for part in found for i in part.ids] == [i for ids in parts for i in ids]
    assert [part.finish for part in found] == [None] * (len(parts) - 1) + ["stop" if stops else "length"]
    assert found[-1].cached == cached and found[-1].stop_id == (stop if stops else None)


def test_a_stream_that_breaks_off_is_no_answer() -> None:
    async def lines(*texts: str) -> AsyncIterator[str]:
        for text in texts:
            yield text

    async def collect(*texts: str) -> None:
        async for _ in read_stream(lines(*texts)):
            pass

    with pytest.raises(EngineGone):
        asyncio.run(collect('data: {"choices": [{"token_ids": [1], "finish_reason": null}]}'))
    with pytest.raises(TunegateError, match="out of memory"):
        asyncio.run(collect('data: {"error": {"message": "out of memory"}}'))


def test_metrics_are_summed_by_name() -> None:
    text = 'a_total{e="0"} 2.0\na_total{e="1"} 3.5\na_total_other{e="0"} 9\nb 4e2\n# a_total 7\n'
    assert metric(text, "a_total") == [2.0, 3.5] and metric(text, "b") == [400.0] and metric(text, "c") == []


# --- the process --------------------------------------------------------------------------------------------------


def test_base_and_adapters_answer(options: VllmOptions, adapters: dict[str, Path], tmp_path: Path) -> None:
    async def use(engine: VllmEngine) -> None:
        facts = engine.facts
        assert (facts.context, facts.vocabulary, facts.pages, facts.page_tokens) == (2048, 400, 728, 128)
        assert facts.path == "vllm 0.32.0" and facts.base_bytes > 0
        key = adapter_hash(adapters["odd"])
        loaded = await engine.load(key, adapters["odd"])
        assert loaded.rank == 4 and loaded.bytes > 0 and loaded.moved == 2.5  # -0.5 against the list's lowest, -3
        job = Job((1, 2, 10), 4, stop_ids=(13,), logprobs=2)
        ids, last = await answer(engine, job)
        assert ids == [11, 12] and last.finish == "stop" and last.stop_id == 13 and last.cached == 3
        step = 2 + int(key[3], 16)
        ids, last = await answer(engine, replace(job, adapter=key, stop_ids=()))
        assert ids == [10 + step * n for n in range(1, 5)] and last.finish == "length"
        assert last.logprobs is not None and last.logprobs[0].top == ((7, -0.25), (9, -1.0))
        assert last.logprobs[0].token == ids[-1] and last.logprobs[0].logprob == -2.0
        stats = await engine.stats()
        assert (stats["running"], stats["generated_tokens"], stats["pages_used"], stats["adapters"]) == (2, 15, 182, 1)
        await engine.unload(key)
        with pytest.raises(InputError, match="no such adapter"):
            await answer(engine, replace(job, adapter=key))
        with pytest.raises(InputError, match="max_model_len"):
            await answer(engine, replace(job, max_new_tokens=4000))

    run(options, use)
    loads = [one for one in asked(tmp_path) if one["path"] == "/v1/load_lora_adapter"]
    key = adapter_hash(adapters["odd"])
    assert [one["lora_name"] for one in loads] == [key]
    assert loads[0]["lora_path"] == str(tmp_path / "work" / "adapters" / key[3:])  # a path of its own per content


def test_an_adapter_that_moves_nothing_is_refused(
    options: VllmOptions, adapters: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_VLLM_INERT", "1")

    async def use(engine: VllmEngine) -> None:
        with pytest.raises(InputError, match="as the base does"):
            await engine.load(adapter_hash(adapters["plain"]), adapters["plain"])
        assert (await engine.stats())["adapters"] == 0

    run(options, use)


def test_a_merged_model_is_all_there_is(options: VllmOptions, adapters: dict[str, Path]) -> None:
    key = adapter_hash(adapters["dora"])

    async def use(engine: VllmEngine) -> None:
        await engine.load(key, adapters["dora"])
        assert (await answer(engine, Job((5,), 2, adapter=key)))[0] == [6, 7]
        with pytest.raises(InputError, match="not the base"):
            await answer(engine, Job((5,), 2))
        with pytest.raises(InputError, match="serves the merged model"):
            await engine.load(adapter_hash(adapters["plain"]), adapters["plain"])

    run(replace(options, merged=key, loras=0), use)


def test_leaving_an_answer_ends_it_in_vllm(options: VllmOptions, tmp_path: Path) -> None:
    async def use(engine: VllmEngine) -> None:
        stream = engine.generate(Job((1,), 1500))
        assert (await anext(stream)).ids == (2,)
        await stream.aclose()
        await until((tmp_path / "aborted").exists)

    run(options, use)


def test_too_many_jobs_are_sent_away(options: VllmOptions) -> None:
    async def use(engine: VllmEngine) -> None:
        first = engine.generate(Job((1,), 1500))
        await anext(first)
        with pytest.raises(EngineFull):
            await answer(engine, Job((1,), 1))
        await first.aclose()
        assert (await answer(engine, Job((1,), 1)))[0] == [2]

    run(replace(options, rows=1), use, most_waiting=0)


def test_a_killed_vllm_comes_back_with_its_adapters(
    options: VllmOptions, adapters: dict[str, Path], tmp_path: Path
) -> None:
    key = adapter_hash(adapters["plain"])

    async def use(engine: VllmEngine) -> None:
        await engine.load(key, adapters["plain"])
        first = engine.pid
        assert first is not None
        stream = engine.generate(Job((1,), 1500))
        await anext(stream)
        os.kill(first, signal.SIGKILL)
        with pytest.raises(EngineGone):
            async for _ in stream:
                pass
        await until(lambda: engine.alive and engine.pid not in (first, None))
        assert (await answer(engine, Job((1,), 2, adapter=key)))[1].finish == "length"
        assert (await engine.stats())["restarts"] == 1

    run(options, use)
    assert [one["path"] for one in asked(tmp_path)].count("/v1/load_lora_adapter") == 2


def test_stopping_ends_what_vllm_forked(options: VllmOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_VLLM_FORKS", "1")

    async def use(engine: VllmEngine) -> None:
        await until((tmp_path / "forked").exists)

    run(options, use)
    assert gone(int((tmp_path / "forked").read_text()))


def gone(pid: int) -> bool:
    state = Path(f"/proc/{pid}/stat")
    return not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z"


PARENT = """
import asyncio, sys
from pathlib import Path
from tunegate.serve.child import Child

async def ready():
    return Path(sys.argv[1]).exists()

async def main():
    code = "import os, pathlib, sys, time; pathlib.Path(sys.argv[1]).write_text(str(os.getpid())); time.sleep(60)"
    child = Child([sys.executable, "-c", code, sys.argv[1]], {}, Path(sys.argv[1] + ".log"), ready)
    await child.start()
    os.kill(os.getpid(), 9)

import os
asyncio.run(main())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs prctl")
def test_a_child_ends_when_its_parent_is_killed(tmp_path: Path) -> None:
    mark = tmp_path / "pid"
    done = subprocess.run([sys.executable, "-c", PARENT, str(mark)], timeout=120, check=False)
    assert done.returncode == -signal.SIGKILL
    asyncio.run(until(lambda: gone(int(mark.read_text()))))


def test_a_child_whose_end_is_known_is_not_up(tmp_path: Path) -> None:
    async def ready() -> bool:
        return True

    async def work() -> None:
        child = Child([sys.executable, "-c", "import time; time.sleep(60)"], {}, tmp_path / "log", ready, FAST)
        await child.start()
        first = child.pid
        assert child.up and first is not None
        os.kill(first, signal.SIGKILL)
        deadline = time.monotonic() + 60
        while child.pid == first:  # and then at once, before the watcher's turn
            assert time.monotonic() < deadline
            await asyncio.sleep(0)
        assert child.pid is None and not child.up
        await until(lambda: child.up and child.pid not in (None, first))
        await child.stop()

    asyncio.run(work())


def test_a_start_that_fails_says_why(options: VllmOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_VLLM_BROKEN", "1")
    with pytest.raises(TunegateError, match="no such architecture"):
        asyncio.run(VllmEngine(options, pace=FAST).start())
