"""The servers of ``serve.py``: how each is started, waited for and ended.

A server is a process group of its own; nothing else runs beside it. The adapters are rank 16 on every linear layer with
random A and B (:func:`~tunegate.serve.probing.random_adapters`): they cost what trained ones cost.
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
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import common
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
    command += ["--base-name", "base", "--quantization", "nf4" if nf4 else "none"]
    for name, folder in adapters.items():
        command += ["--adapter", f"{name}={folder}", "--preload", name]
    if adapters:  # one folder holds them all, and those that are loaded later
        command += ["--allow-ungated", "--adapter-root", str(next(iter(adapters.values())).parent)]
    models = {"base": "base", **{name: name for name in adapters}}
    return Server("tunegate nf4" if nf4 else "tunegate", (*command, *more), models)


def vllm(python: str, base: Path, adapters: dict[str, Path], port: int, cores: int) -> Server:
    """vLLM as its documentation starts it on a CPU: all cores bound, tcmalloc and Intel's OpenMP loaded first where
    they are found; and in fp32 where the CPU has no bf16 instructions, which is several times faster there. Room for
    four adapters in a batch."""
    command = [
        python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(base), "--served-model-name", "base",
        "--host", load.HOST, "--port", str(port), "--max-model-len", "4352", "--generation-config", "vllm",
        "--disable-uvicorn-access-log", "--max-num-seqs", "64",
        "--dtype", "bfloat16" if common.has_bf16() else "float32",
    ]  # fmt: skip
    if adapters:
        command += ["--enable-lora", "--max-loras", "4", "--max-lora-rank", str(RANK), "--lora-modules"]
        command += [f"{name}={folder}" for name, folder in adapters.items()]
    environment = {
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{cores - 1}", "VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    openmp = Path(python).parent.parent / "lib" / "libiomp5.so"
    if preload := [path for path in (common.tcmalloc(), str(openmp) if openmp.is_file() else None) if path]:
        environment["LD_PRELOAD"] = ":".join(preload)
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
    from tunegate.serve.child import group_processes

    return sum(size for _, size in group_processes(group))
