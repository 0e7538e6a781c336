"""The servers of ``serve.py``: how each is started, waited for and ended, and adapters with random weights for them.

A server is a process group of its own; nothing else runs beside it. The adapters are rank 16 on every linear layer with
random A and B, so that they cost what trained ones cost and every answer differs from the base's.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import load
from common import Skipped

START = 900.0  # seconds to wait until a server answers
RANK = 16


@dataclass(frozen=True)
class Server:
    """``models``: by what a scenario calls them, the names that the server knows."""

    name: str
    command: tuple[str, ...]
    models: dict[str, str]
    environment: dict[str, str] = field(default_factory=dict)


def ours(base: Path, adapters: dict[str, Path], port: int, *, nf4: bool = False, more: tuple[str, ...] = ()) -> Server:
    """``tunegate serve`` on ``base``. The adapters have no card, so nothing was decided about them."""
    command = [sys.executable, "-m", "tunegate.cli", "serve", str(base), "--host", load.HOST, "--port", str(port)]
    for name, folder in adapters.items():
        command += ["--adapter", f"{name}={folder}"]
    command += ["--allow-ungated"] if adapters else []
    command += ["--quantization", "nf4"] if nf4 else []
    models = {"base": str(base), **{name: name for name in adapters}}
    return Server("tunegate nf4" if nf4 else "tunegate", (*command, *more), models)


def vllm(python: str, base: Path, adapters: dict[str, Path], port: int, cores: int) -> Server:
    """vLLM as its documentation starts it on a CPU: all cores bound, room for four adapters in a batch."""
    command = [
        python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(base), "--served-model-name", "base",
        "--host", load.HOST, "--port", str(port), "--max-model-len", "4352", "--generation-config", "vllm",
        "--disable-uvicorn-access-log", "--max-num-seqs", "64",
    ]  # fmt: skip
    if adapters:
        command += ["--enable-lora", "--max-loras", "4", "--max-lora-rank", str(RANK), "--lora-modules"]
        command += [f"{name}={folder}" for name, folder in adapters.items()]
    environment = {
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{cores - 1}", "VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    models = {"base": "base", **{name: name for name in adapters}}
    return Server("vllm" if adapters else "vllm base only", tuple(command), models, environment)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((load.HOST, 0))
        return int(probe.getsockname()[1])


@contextlib.asynccontextmanager
async def running(server: Server, port: int, log: Path) -> AsyncIterator[subprocess.Popen[bytes]]:
    """The server, up; ended with everything it began. :class:`Skipped` with its last words if it does not come up."""
    with log.open("wb") as out:
        process = subprocess.Popen(
            server.command, env={**os.environ, **server.environment}, stdin=subprocess.DEVNULL, stdout=out, stderr=out,
            start_new_session=True,
        )  # fmt: skip
    try:
        began = time.monotonic()
        while not await load.healthy(port):
            if process.poll() is not None or time.monotonic() - began > START:
                words = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
                raise Skipped(f"{server.name} did not come up: " + " | ".join(words[-3:])[-400:])
            await asyncio.sleep(0.25)
        yield process
    finally:
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(30)
        await asyncio.sleep(1)


def group_rss(group: int) -> int:
    """Resident bytes of all processes of a group; pages that several share count in each."""
    total = 0
    for fields in _stats():
        if int(fields[2]) == group:
            total += int(fields[21]) * os.sysconf("SC_PAGE_SIZE")
    return total


def _stats() -> Iterator[list[str]]:
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            yield stat.read_text().rpartition(")")[2].split()


def make_adapters(base: Path, folder: Path, count: int, *, rank: int = RANK) -> dict[str, Path]:
    """``count`` adapters on every linear layer, named a0, a1, ..."""
    import torch
    from safetensors.torch import save_file

    from tunegate.adapter.files import CONFIG, TENSORS, tensor_name
    from tunegate.adapter.inject import inject, remove
    from tunegate.adapter.peft_config import config_from
    from tunegate.adapter.spec import AdapterSpec
    from tunegate.files import write_json
    from tunegate.model.loading import empty_model

    model = empty_model(base)
    injection = inject(model, AdapterSpec(rank, 2.0 * rank), seed=0)
    config = config_from(injection, base.name, None)
    shapes = {
        tensor_name(path, name): tuple(parameter.shape)
        for path, layer in injection.modules.items()
        for name, parameter in layer.adapter_parameters().items()
    }
    remove(model)
    made = {}
    for number in range(count):
        generator = torch.Generator().manual_seed(number)
        state: dict[str, Any] = {}
        for name, shape in shapes.items():
            scale = 0.02 if "lora_B" in name else shape[1] ** -0.5
            state[name] = torch.randn(shape, generator=generator) * scale
        place = folder / f"a{number}"
        place.mkdir(parents=True)
        save_file(state, place / TENSORS, metadata={"format": "pt"})
        write_json(place / CONFIG, config)
        made[f"a{number}"] = place
    return made
