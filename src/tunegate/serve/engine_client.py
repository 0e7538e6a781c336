"""The engine as the front sees it: a protocol, so that another kind of server (vLLM, a test's) can stand behind it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Protocol

from tunegate.serve.jobs import EngineFacts, Job, Loaded, Tokens


class EngineClient(Protocol):
    """All calls on one event loop."""

    @property
    def facts(self) -> EngineFacts: ...

    @property
    def alive(self) -> bool:
        """Whether jobs are taken now; False between an engine's end and its next start."""

    async def start(self) -> EngineFacts:
        """Start the engine and wait until it has its base; :class:`TunegateError` with the engine's own words if it
        does not come up."""

    async def stop(self) -> None:
        """End the engine; jobs under way end as ``cancelled``."""

    def generate(self, job: Job) -> AsyncIterator[Tokens]:
        """The job's answer. Leaving the iterator early (``aclose``) cancels the job. Raises :class:`EngineGone`,
        :class:`EngineFull`, or :class:`InputError` for a job that the engine cannot take (unknown adapter key, too
        long for the context, a form that cannot be followed)."""

    async def identify(self, folder: Path) -> str:
        """The content hash of an adapter folder, from what the engine itself read. What it read may serve the
        :meth:`load` that follows. :class:`InputError` with every problem if the files cannot be served on this base."""

    async def load(self, key: str, folder: Path, *, pinned: bool = False) -> Loaded:
        """Read an adapter folder and keep it under ``key``, its content hash: other files are refused. Pinned ones are
        never pushed out; others are, least recently used first, when ``adapter_bytes`` are full, and are read again
        from ``folder`` when a job names them. :class:`InputError` with every problem if the files cannot be served on
        this base."""

    async def unload(self, key: str) -> None:
        """Forget an adapter; answers under way with it are finished first."""

    async def stats(self) -> dict[str, Any]:
        """Counters and sizes: running, waiting, pages, pages_used, cached_tokens, prompt_tokens, generated_tokens,
        steps, preempted, adapters, adapter_bytes, rss."""
