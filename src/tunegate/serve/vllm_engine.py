"""A real vLLM behind the server's front: an :class:`~tunegate.serve.engine_client.EngineClient` over vLLM's HTTP.

The front stays what it is. It renders prompts with the adapter's own template, checks and refuses, follows aliases and
looks for stop strings; vLLM sees token ids and gives token ids back (``return_token_ids``), so none of its own
templates, defaults or end-of-text rules has a part in an answer. Adapters go in by ``/v1/load_lora_adapter`` under
their content hash, from a converted folder of that name, and each load is proven by a probe: what the probe's next
tokens are must differ from the base's. A vLLM that ends is started again, and adapters are loaded again as jobs name
them.

One thing is vLLM's own: which adapters it keeps in RAM it decides by last use. A pin cannot be passed on; one that was
pushed out is read again from its folder.

It parses no text and keeps no queue: vLLM schedules.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import re
import secrets
import socket
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from tunegate.adapter.files import TENSORS, adapter_hash
from tunegate.engine.constrain import without_anchors
from tunegate.errors import InputError, TunegateError
from tunegate.serve import vllm
from tunegate.serve.child import USUAL, Child, Pace, group_processes
from tunegate.serve.jobs import EngineFacts, EngineFull, EngineGone, Finish, Job, Loaded, TokenLogprob, Tokens
from tunegate.serve.vllm import BASE_NAME, MOST_LOGPROBS, VllmOptions

PROBES, PROBE_TOKENS = 4, 16  # prompts that every load is tried on
_FINISHES: dict[str, Finish] = {"stop": "stop", "length": "length", "abort": "cancelled"}
_GAUGES = {
    "running": "vllm:num_requests_running",
    "waiting": "vllm:num_requests_waiting",
    "usage": "vllm:kv_cache_usage_perc",
    "cached_tokens": "vllm:prompt_tokens_cached_total",
    "prompt_tokens": "vllm:prompt_tokens_total",
    "generated_tokens": "vllm:generation_tokens_total",
    "preempted": "vllm:num_preemptions_total",
    "steps": "vllm:iteration_tokens_total_count",
}


class VllmEngine:
    """All calls on one event loop. ``most_waiting``: jobs beyond the rows of a batch that are taken."""

    def __init__(self, options: VllmOptions, *, most_waiting: int = 1024, pace: Pace = USUAL):
        self.options, self._most, self._pace = options, options.rows + most_waiting, pace
        self._adapters: dict[str, tuple[Path, int]] = {}  # key: folder that vLLM reads, rank
        self._known: dict[str, int] = {}  # key: number of the process that has it
        self._locks: dict[str, asyncio.Lock] = {}
        self._converting = asyncio.Lock()
        self._under_way = 0
        self._child: Child | None = None
        self._client: Any = None
        self._model: Any = None
        self._facts: EngineFacts | None = None

    @property
    def facts(self) -> EngineFacts:
        if self._facts is None:
            raise TunegateError("vLLM is not started")
        return self._facts

    @property
    def alive(self) -> bool:
        return self._child is not None and self._child.up

    @property
    def pid(self) -> int | None:
        return self._child.pid if self._child else None

    async def start(self) -> EngineFacts:
        import httpx2

        from tunegate.model.loading import empty_model

        problems = self.options.problems(dict(os.environ))
        if problems:
            raise InputError(problems)
        version = await asyncio.to_thread(vllm.check_python, self.options.python)
        self._model = await asyncio.to_thread(
            empty_model, self.options.base, trust_remote_code=self.options.trust_remote_code
        )
        if self.options.port == 0:
            self.options = dataclasses.replace(self.options, port=_free_port())
        key = secrets.token_urlsafe(32)
        self._client = httpx2.AsyncClient(
            base_url=f"http://127.0.0.1:{self.options.port}",
            headers={"Authorization": f"Bearer {key}"},
            timeout=httpx2.Timeout(600.0, connect=5.0),
            limits=httpx2.Limits(max_connections=None, max_keepalive_connections=64),
            trust_env=False,
        )
        self._child = Child(
            vllm.command(self.options), vllm.environment(key), self.options.work / "vllm.log", self._healthy, self._pace
        )
        began = time.monotonic()
        try:
            await self._child.start()
            self._facts = await self._ask_facts(version, time.monotonic() - began)
        except BaseException:
            await self.stop()
            raise
        return self._facts

    async def stop(self) -> None:
        if self._child is not None:
            await self._child.stop()
        if self._client is not None:
            await self._client.aclose()
            self._client = None

    async def generate(self, job: Job) -> AsyncIterator[Tokens]:
        """See :class:`EngineClient`. ``waited`` is not known of vLLM."""
        import httpx2

        if not self.alive:
            raise EngineGone("vLLM is being started again", fix="send it again")
        if self._under_way >= self._most:
            raise EngineFull(f"{self._under_way} jobs are under way", fix="send it again later")
        self._under_way += 1
        try:
            body = request_body(job, await self._name(job.adapter))
            async with self._client.stream("POST", "/v1/completions", json=body) as reply:
                if reply.status_code != 200:
                    raise _refusal(reply.status_code, await reply.aread())
                async for tokens in read_stream(reply.aiter_lines(), job.logprobs or 0):
                    yield tokens
        except httpx2.TransportError as error:
            raise EngineGone("vLLM went away", got=f"{type(error).__name__}: {error}", fix="send it again") from error
        finally:
            self._under_way -= 1

    async def identify(self, folder: Path) -> str:
        return await asyncio.to_thread(adapter_hash, folder)

    async def load(self, key: str, folder: Path, *, pinned: bool = False) -> Loaded:
        """See :class:`EngineClient`. ``moved`` is over the log-probabilities of the likeliest next tokens."""
        del pinned  # vLLM has none: see above
        began = time.monotonic()
        if key == self.options.merged:
            return Loaded(key, 0, 0, 0.0, 0.0)
        if not self.options.loras:
            what = "the merged model" if self.options.merged else "the base alone"
            fix = "merge it and serve it by a server of its own, or start the base with room for adapters"
            raise InputError(f"this vLLM serves {what}", where=str(folder), fix=fix)
        async with self._converting:  # it borrows the model on the meta device
            converted, rank = await asyncio.to_thread(
                vllm.convert, folder, key, self.options.work, self._model, self.options.max_rank
            )
        self._adapters[key] = (converted, rank)
        try:
            name = await self._name(key)
            plain, adapted = await self._probe(BASE_NAME), await self._probe(name)
            moved = max(_change(a, b) for a, b in zip(plain, adapted, strict=True))
            if moved == 0.0:
                raise InputError(
                    "vLLM took the adapter and answers as the base does", where=str(folder),
                    got=f"the same log-probabilities for {PROBES} prompts", fix="`tunegate export --for vllm` says why",
                )  # fmt: skip
        except BaseException:
            await asyncio.shield(self.unload(key))
            raise
        size = (converted / TENSORS).stat().st_size
        return Loaded(key, size, rank, time.monotonic() - began, moved)

    async def unload(self, key: str) -> None:
        """Answers under way are finished: vLLM forgets the name, and the weights by last use."""
        self._adapters.pop(key, None)
        if self._known.pop(key, 0) == self._starts and self.alive:
            await self._client.post("/v1/unload_lora_adapter", json={"lora_name": key})

    async def stats(self) -> dict[str, Any]:
        text = await self._metrics()
        found = {name: sum(metric(text, label)) for name, label in _GAUGES.items()}
        pages = self._facts.pages if self._facts else 0
        return {
            **{name: int(value) for name, value in found.items() if name != "usage"},
            "pages": pages,
            "pages_used": round(found["usage"] * pages),
            "adapters": len(self._adapters),
            "adapter_bytes": sum((f / TENSORS).stat().st_size for f, _ in self._adapters.values()),
            "rss": sum(size for _, size in group_processes(self.pid)) if self.pid else 0,
            "restarts": max(0, self._starts - 1),
        }

    # --- inside ------------------------------------------------------------------------------------------------

    @property
    def _starts(self) -> int:
        return self._child.starts if self._child else 0

    async def _healthy(self) -> bool:
        import httpx2

        try:
            return bool((await self._client.get("/health", timeout=5.0)).status_code == 200)
        except httpx2.TransportError:
            return False

    async def _metrics(self) -> str:
        """vLLM's figures; none while it is being started again."""
        import httpx2

        try:
            return str((await self._client.get("/metrics", timeout=5.0)).text) if self.alive else ""
        except httpx2.TransportError:
            return ""

    async def _ask_facts(self, version: str, seconds: float) -> EngineFacts:
        listed = (await self._client.get("/v1/models")).json()["data"]
        context = next(one["max_model_len"] for one in listed if one["id"] == BASE_NAME)
        text = await self._metrics()
        cache = next((line for line in text.splitlines() if line.startswith("vllm:cache_config_info{")), "")
        labels = dict(re.findall(r'(\w+)="([^"]*)"', cache))
        dtype = self.options.dtype if self.options.dtype != "auto" else str(self._model.config.dtype)
        size = sum(path.stat().st_size for path in self.options.base.glob("*.safetensors"))
        return EngineFacts(
            context, self._model.config.vocab_size, dtype.removeprefix("torch."), f"vllm {version}",
            _whole(labels.get("num_gpu_blocks")), _whole(labels.get("block_size")), size, seconds,
        )  # fmt: skip

    async def _name(self, key: str | None) -> str:
        """What vLLM calls an adapter, after it was told of it if need be."""
        if key == self.options.merged:
            return BASE_NAME
        if key is None:
            raise InputError("this server has the merged model only, not the base")
        if key not in self._adapters:
            raise InputError("no such adapter in the engine", got=key)
        async with self._locks.setdefault(key, asyncio.Lock()):
            if self._known.get(key) != self._starts:
                starts = self._starts
                folder, _ = self._adapters[key]
                body = {"lora_name": key, "lora_path": str(folder.absolute())}
                reply = await self._client.post("/v1/load_lora_adapter", json=body)
                if reply.status_code != 200:
                    raise InputError("vLLM refuses the adapter", where=str(folder), got=_message(reply.content))
                self._known[key] = starts
        return key

    async def _probe(self, name: str) -> list[dict[str, float]]:
        """The likeliest next tokens of every probe prompt, with their log-probabilities."""
        vocabulary = self._model.config.vocab_size
        prompts = [[(37 * n + 11 * m + 3) % vocabulary for m in range(PROBE_TOKENS)] for n in range(PROBES)]
        body = {
            "model": name, "prompt": prompts, "max_tokens": 1, "temperature": 0.0, "ignore_eos": True,
            "logprobs": MOST_LOGPROBS, "return_tokens_as_token_ids": True,
        }  # fmt: skip
        reply = await self._client.post("/v1/completions", json=body)
        if reply.status_code != 200:
            raise _refusal(reply.status_code, reply.content)
        return [one["logprobs"]["top_logprobs"][0] for one in reply.json()["choices"]]


def request_body(job: Job, name: str) -> dict[str, Any]:
    """A job as vLLM's ``/v1/completions`` takes it. :class:`InputError` for what it cannot do."""
    if job.logprobs is not None and job.logprobs > MOST_LOGPROBS:
        raise InputError("too many log-probabilities", expected=f"at most {MOST_LOGPROBS}", got=str(job.logprobs))
    if job.prompt_logprobs is not None:
        what, fix = "vLLM's streams hold no log-probabilities of a prompt", "ask a server with --engine native"
        raise InputError(what, where="echo with logprobs", fix=fix)
    p = job.picking
    body: dict[str, Any] = {
        "model": name, "prompt": list(job.tokens), "max_tokens": job.max_new_tokens,
        "temperature": p.temperature, "top_p": p.top_p, "top_k": p.top_k, "min_p": p.min_p,
        "presence_penalty": p.presence, "frequency_penalty": p.frequency, "repetition_penalty": p.repetition,
        "seed": p.seed, "stop_token_ids": list(job.stop_ids), "ignore_eos": True,
        "add_special_tokens": False, "return_token_ids": True, "stream": True,
        "stream_options": {"include_usage": True},
    }  # fmt: skip
    if p.logit_bias:
        body["logit_bias"] = {str(token): bias for token, bias in p.logit_bias}
    if job.logprobs is not None:
        body |= {"logprobs": job.logprobs, "return_tokens_as_token_ids": True}
    if job.form is not None:
        body["structured_outputs"] = _form(*job.form)
    return body


def _form(kind: str, value: str | tuple[str, ...], compact: bool) -> dict[str, Any]:
    """An answer's form for llguidance in vLLM, with the spaces that ``engine.constrain`` writes."""
    if kind == "choices":
        return {"choice": list(value)}
    assert isinstance(value, str)
    if kind == "regex":
        return {"regex": without_anchors(value)}
    schema = json.loads(value)
    comma, colon = (",", ":") if compact else (", ", ": ")
    style = {"whitespace_flexible": False, "item_separator": comma, "key_separator": colon}
    return {"json": {**({} if schema is True else schema), "x-guidance": style}}


async def read_stream(lines: AsyncIterator[str], top: int = 0) -> AsyncIterator[Tokens]:
    """The events of a streamed completion as :class:`Tokens`. The last one waits for the usage that comes behind it,
    and the token that stopped the answer is left out. :class:`EngineGone` if the stream breaks off."""
    last: Tokens | None = None
    async for line in lines:
        if not line.startswith("data:"):
            continue
        data = line[5:].strip()
        if data == "[DONE]":
            break
        event = json.loads(data)
        if "error" in event:
            raise TunegateError("vLLM failed at this job", got=str(event["error"].get("message", event["error"])))
        if event.get("usage"):
            details = event["usage"].get("prompt_tokens_details") or {}
            if last is not None:
                last = dataclasses.replace(last, cached=int(details.get("cached_tokens") or 0))
        for choice in event["choices"]:
            tokens = _tokens(choice, top)
            if tokens.finish is None:
                yield tokens
            else:
                last = tokens
    if last is None:
        raise EngineGone("vLLM broke off its answer", fix="send it again")
    yield last


def _tokens(choice: dict[str, Any], most: int) -> Tokens:
    ids = list(choice.get("token_ids") or ())
    finish = _FINISHES.get(choice.get("finish_reason") or "")
    if choice.get("finish_reason") and finish is None:
        raise TunegateError("vLLM ended the answer", got=str(choice["finish_reason"]))
    reason = choice.get("stop_reason")
    stop_id = reason if finish == "stop" and isinstance(reason, int) else None
    if stop_id is not None and ids and ids[-1] == stop_id:
        ids.pop()
    logprobs = None
    if choice.get("logprobs"):
        one = choice["logprobs"]
        rows = zip(one["tokens"], one["token_logprobs"], one["top_logprobs"], strict=True)
        logprobs = tuple(TokenLogprob(_id(t), value, _likeliest(top or {}, most)) for t, value, top in rows)[: len(ids)]
    return Tokens(tuple(ids), finish, logprobs, stop_id=stop_id)


def _likeliest(top: dict[str, float], most: int) -> tuple[tuple[int, float], ...]:
    """vLLM puts the chosen token first, whatever its rank, and may give one more than asked for."""
    return tuple(sorted(((_id(t), v) for t, v in top.items()), key=lambda one: -one[1])[:most])


def _id(text: str) -> int:
    return int(text.removeprefix("token_id:"))


def _change(a: dict[str, float], b: dict[str, float]) -> float:
    """The largest difference over all tokens of either; one that is missing counts as its list's lowest."""
    low_a, low_b = min(a.values()), min(b.values())
    return max(abs(a.get(token, low_a) - b.get(token, low_b)) for token in a.keys() | b.keys())


def metric(text: str, name: str) -> list[float]:
    """The values of one metric in Prometheus' text form, one for each set of labels."""
    return [float(v) for v in re.findall(rf"^{re.escape(name)}(?:\{{[^\n]*\}})? (\S+)$", text, re.MULTILINE)]


def _refusal(status: int, content: bytes) -> TunegateError:
    kinds: dict[int, type[TunegateError]] = {429: EngineFull, 503: EngineGone}
    usual = InputError if status < 500 else TunegateError
    return kinds.get(status, usual)("vLLM refuses the job", got=_message(content))


def _message(content: bytes) -> str:
    try:
        found = json.loads(content)
        return str(found["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return content.decode("utf-8", errors="replace")[:300]


def _whole(text: str | None) -> int:
    return int(text) if text and text.isdigit() else 0


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
