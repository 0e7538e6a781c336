"""A short measurement of this machine for ``advise``: an engine with a base and random adapters, under small loads.

Prompts are random ids of one length, every one new; answers have one length, so that rates compare. The base alone and
a mixture of adapters answer 1, 4 and 16 requests at a time, each load at least twice that many requests. Adapters with
random weights cost what trained ones of their rank cost.

It measures means under an even load, on an otherwise quiet machine; no tails.
"""

from __future__ import annotations

import asyncio
import random
import tempfile
import time
from pathlib import Path
from typing import Any

from tunegate.adapter.files import CONFIG, TENSORS, tensor_name
from tunegate.errors import TunegateError
from tunegate.files import write_json
from tunegate.plan.memory import RUNTIME
from tunegate.serve.advise import Measured, Rates
from tunegate.serve.engine_client import EngineClient
from tunegate.serve.jobs import Job, Picking

AT_ONCE = (1, 4, 16)
ADAPTERS, NEW_TOKENS = 4, 32


async def probe(engine: EngineClient, base: Path, prompt_tokens: int, *, rank: int = 16) -> Measured:
    """Start ``engine``, measure, stop it. :class:`TunegateError` if an answer fails."""
    facts = await engine.start()
    try:
        if prompt_tokens + NEW_TOKENS > facts.context:
            raise TunegateError(
                "the prompts do not fit", expected=f"at most {facts.context - NEW_TOKENS}", got=str(prompt_tokens)
            )
        with tempfile.TemporaryDirectory(prefix="tunegate-probe-") as folder:
            made = await asyncio.to_thread(random_adapters, base, Path(folder), ADAPTERS, rank)
            loaded = [await engine.load(await engine.identify(place), place) for place in made.values()]
            prompts = _Prompts(prompt_tokens, facts.vocabulary)
            keys: list[str | None] = [one.key for one in loaded]
            await _rate(engine, prompts, [None, *keys], 2)  # warm
            rates: dict[bool, list[tuple[int, float]]] = {False: [], True: []}
            for at_once in AT_ONCE:  # in turn, so that a disturbance does not meet one of them alone
                for adapted in (False, True):
                    rate = await _rate(engine, prompts, keys if adapted else [None], at_once)
                    rates[adapted].append((at_once, rate))
            held = await engine.stats()
    finally:
        await engine.stop()
    bare = int(held["rss"]) - int(held["adapter_bytes"]) + round(RUNTIME)  # the front is a process of its own
    base_rates, adapter_rates = (_tuple(rates[adapted]) for adapted in (False, True))
    return Measured(base_rates, adapter_rates, bare, max(one.bytes for one in loaded))


def _tuple(points: list[tuple[int, float]]) -> Rates:
    return tuple((at_once, round(rate, 2)) for at_once, rate in points)


class _Prompts:
    def __init__(self, length: int, vocabulary: int):
        self.length, self.vocabulary, self.random = length, vocabulary, random.Random(0)

    def next(self) -> tuple[int, ...]:
        return tuple(self.random.randrange(self.vocabulary) for _ in range(self.length))


async def _rate(engine: EngineClient, prompts: _Prompts, keys: list[str | None], at_once: int) -> float:
    """New tokens a second, ``at_once`` jobs at a time, the keys in turn."""
    jobs = iter(
        [
            Job(prompts.next(), NEW_TOKENS, adapter=keys[n % len(keys)], picking=Picking(temperature=0.0))
            for n in range(max(4, 2 * at_once))
        ]
    )
    made = 0

    async def work() -> None:
        nonlocal made
        for job in jobs:
            async for tokens in engine.generate(job):
                made += len(tokens.ids)

    began = time.perf_counter()
    await asyncio.gather(*(work() for _ in range(at_once)))
    return made / (time.perf_counter() - began)


def random_adapters(base: Path, folder: Path, count: int, rank: int) -> dict[str, Path]:
    """``count`` LoRA adapters on every linear layer of ``base`` below ``folder``, named a0, a1, ..., A and B random."""
    import torch
    from safetensors.torch import save_file

    from tunegate.adapter.inject import inject
    from tunegate.adapter.peft_config import config_from
    from tunegate.adapter.spec import AdapterSpec
    from tunegate.model.loading import empty_model

    injection = inject(empty_model(base), AdapterSpec(rank, 2.0 * rank), seed=0)
    config = config_from(injection, base.name, None)
    shapes = {
        tensor_name(path, name): tuple(parameter.shape)
        for path, layer in injection.modules.items()
        for name, parameter in layer.adapter_parameters().items()
    }
    made = {}
    for number in range(count):
        generator = torch.Generator().manual_seed(number)
        state: dict[str, Any] = {}
        for name, shape in sorted(shapes.items()):
            scale = 0.02 if "lora_B" in name else shape[1] ** -0.5
            state[name] = torch.randn(shape, generator=generator) * scale
        place = folder / f"a{number}"
        place.mkdir(parents=True)
        save_file(state, place / TENSORS, metadata={"format": "pt"})
        write_json(place / CONFIG, config)
        made[f"a{number}"] = place
    return made
