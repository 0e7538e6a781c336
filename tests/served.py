"""What a server serves in tests: a tiny base, adapters that fit it, and an engine that only remembers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from registry_folders import card, write_card
from tunegate.adapter.files import adapter_hash, tensor_name
from tunegate.adapter.inject import find_targets
from tunegate.adapter.layers import features
from tunegate.adapter.spec import AdapterSpec
from tunegate.errors import InputError
from tunegate.model.resolve import resolve_base
from tunegate.serve.base import ServedBase, open_base
from tunegate.serve.jobs import EngineFacts, Job, Loaded, Tokens

TARGETS = ("q_proj", "up_proj")
GOLDEN = ([{"role": "user", "content": "where is the red fox"}], [{"role": "user", "content": "question 2"}])


def served_base(folder: Path, **said: Any) -> ServedBase:
    return open_base(resolve_base(str(folder)), **said)


def make_peft(folder: Path, base: ServedBase, seed: int = 0, targets: tuple[str, ...] = TARGETS, **config: Any) -> Path:
    """Random factors on ``base``'s modules, with a config; ``config`` goes over it."""
    import json

    spec, random = AdapterSpec(2, 4.0, target_modules=targets), np.random.default_rng(seed)
    found, _ = find_targets(base.skeleton, spec, strict=False)
    tensors = {}
    for path, layer in found.items():
        wide, high = features(layer) or (0, 0)
        tensors[tensor_name(path, "lora_A")] = random.normal(size=(2, wide)).astype(np.float32)
        tensors[tensor_name(path, "lora_B")] = random.normal(size=(high, 2)).astype(np.float32)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    said = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 4, "bias": "none",
        "target_modules": list(targets), "base_model_name_or_path": base.name, **config,
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(said, indent=2, sort_keys=True))
    return folder


def make_adapter(
    folder: Path, base: ServedBase, seed: int = 0, *, template: str | None = None, **said: Any
) -> Path:  # fmt: skip
    """A complete adapter folder that ``base`` takes. ``template``: of its training; ``said`` goes to ``card``."""
    make_peft(folder, base, seed)
    said = {"base_name": str(base.resolved.path), "recipe": base.at_hand.recipe, "run": "aaaaaaaaaa", **said}
    made, renderer = card(adapter_hash(folder), **said), base.renderer(template)
    golden = [{"messages": m, "tools": [], "ids": renderer.prompt_ids(m)} for m in GOLDEN]
    return write_card(
        folder,
        replace(
            made,
            base={**made.base, "fingerprint": vars(base.at_hand.fingerprint)},
            template={"hash": renderer.template_hash, "golden": golden},
            config={**made.config, "base": {"name": base.name, "template": template}},
        ),
    )


class FakeEngine:
    """An :class:`~tunegate.serve.engine_client.EngineClient` without a model: it notes what it is told.

    ``loads`` has every load in order, ``holds`` what it has now (key: folder, pinned). ``gate``, while set, keeps loads
    waiting; ``broken`` is raised by them.
    """

    alive = True
    started = False
    facts = EngineFacts(128, 100, "float32", "fused", 10, 16, 0, 0.0)

    def __init__(self) -> None:
        self.loads: list[str] = []
        self.holds: dict[str, tuple[Path, bool]] = {}
        self.gate: asyncio.Event | None = None
        self.broken: Exception | None = None

    async def start(self) -> EngineFacts:
        self.started = True
        return self.facts

    async def stop(self) -> None:
        self.alive = False

    async def generate(self, job: Job) -> AsyncIterator[Tokens]:
        if job.adapter is not None and job.adapter not in self.holds:
            raise InputError("the engine has no such adapter", got=job.adapter)
        yield Tokens((1,), "stop")

    async def identify(self, folder: Path) -> str:
        return adapter_hash(folder)

    async def load(self, key: str, folder: Path, *, pinned: bool = False) -> Loaded:
        self.loads.append(key)
        if self.gate is not None:
            await self.gate.wait()
        if self.broken is not None:
            raise self.broken
        self.holds[key] = (folder, pinned)
        return Loaded(key, 1, 2, 0.0, 1.0)

    async def unload(self, key: str) -> None:
        if self.alive:  # names may die after the engine's end, which `holds` outlives
            del self.holds[key]

    async def stats(self) -> dict[str, Any]:
        return {"adapters": len(self.holds)}


async def until(what: Callable[[], bool]) -> None:
    """Wait until ``what`` holds; AssertionError after many looks, which a machine that stands still does not use up."""
    for _ in range(15_000):  # an engine that starts again imports torch first
        if what():
            return
        await asyncio.sleep(0.002)
    raise AssertionError("it never came true")
