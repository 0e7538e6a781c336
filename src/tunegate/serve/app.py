"""The routes: OpenAI's and vLLM's forms over an engine and a catalogue of models.

A request is read (``openai_requests``), its model resolved, its prompt rendered on a thread of its own
(``openai_plan``), and its answers written as they come (``openai_streams``, ``openai_answers``). The first piece is
awaited before the status is sent, so an engine that is full or gone is an HTTP error and not the end of a stream. A
client that goes away cancels its jobs, while it waits and while it reads, and so does an answer that takes too long
(``exchange``). A key that is limited to some models sees and names no others.

It starts and stops no engine and listens on no port: the command does.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from importlib.resources import files
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse

from tunegate import __version__
from tunegate.errors import InputError, TunegateError, nearest
from tunegate.serve import openai_documents as documents
from tunegate.serve import openai_errors as errors
from tunegate.serve import openai_requests as requests
from tunegate.serve.catalogue import Catalogue, DuplicateName, Served, UnknownModel
from tunegate.serve.engine_client import EngineClient
from tunegate.serve.exchange import ClientGone, Exchanges, Limits, read_body, unless_gone, until
from tunegate.serve.form_checks import FormChecks
from tunegate.serve.guard import Caller, KeyGuard, Keys, caller_of
from tunegate.serve.jobs import EngineFacts, EngineGone
from tunegate.serve.metrics import Metrics
from tunegate.serve.openai_answers import Shape
from tunegate.serve.openai_bodies import read_request
from tunegate.serve.openai_plan import Known, Plan, chat_plan, completion_plan, tokenized
from tunegate.serve.openai_streams import Answer, Numbered, answers

SMALL_BODY = 32 * 1024  # bytes; larger ones are read off the event loop
Result = TypeVar("Result")
Body = TypeVar("Body", bound=requests.Strict)
Asked = TypeVar("Asked", bound=requests.Sampling)
PAGES = {
    "": ("index.html", "text/html; charset=utf-8"),
    "page/playground.css": ("playground.css", "text/css; charset=utf-8"),
    "page/playground.js": ("playground.js", "text/javascript; charset=utf-8"),
    "page/icon.svg": ("icon.svg", "image/svg+xml"),
}
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


class Front:
    """The handlers of one application."""

    def __init__(self, engine: EngineClient, catalogue: Catalogue, limits: Limits):
        self.engine, self.catalogue, self.limits = engine, catalogue, limits
        self.metrics = Metrics()
        self._known = Known()
        self._check_form = FormChecks()
        # One thread: tokenizers are not made for several at once, and the event loop must not wait for a long prompt.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="tunegate-render")
        folder = files("tunegate.serve") / "page"
        self._pages = {path: ((folder / name).read_bytes(), kind) for path, (name, kind) in PAGES.items()}

    # --- answers ------------------------------------------------------------------------------------------------

    async def chat(self, request: Request) -> Response:
        """A chat's next message."""
        began = time.monotonic()
        asked = await self._read(request, requests.ChatRequest)
        planned = self._planned(request, asked, chat_plan)
        return await self._answer(request, await self._in_time(request, planned, began), asked, began)

    async def complete(self, request: Request) -> Response:
        """What follows a text, or a list of token ids."""
        began = time.monotonic()
        asked = await self._read(request, requests.CompletionRequest)
        planned = self._planned(request, asked, completion_plan)
        return await self._answer(request, await self._in_time(request, planned, began), asked, began)

    async def _planned(
        self, request: Request, asked: Asked, make: Callable[[Asked, Served, EngineFacts, Known], Plan]
    ) -> Plan:
        served = await self._resolve(request, asked.model)
        plan = await self._on_thread(lambda: make(asked, served, self.engine.facts, self._known))
        await self._check_form(plan.jobs[0])
        return plan

    async def _answer(self, request: Request, plan: Plan, asked: requests.Sampling, began: float) -> Response:
        if not self.engine.alive:
            raise EngineGone("the engine is not running; it is started again", fix="send the request again")
        usage = asked.stream_options is not None and bool(asked.stream_options.include_usage)
        shape = Shape(plan, isinstance(asked, requests.ChatRequest), usage)
        headers = {"X-Tunegate-Adapter": plan.served.fingerprint}
        found = [Answer() for _ in plan.jobs]
        limit = self.limits.answer_seconds
        pieces = self._watched(
            plan, until(began + limit, limit, answers(self.engine, plan)), began, caller_of(request.scope)
        )
        if not asked.stream:
            await unless_gone(request, _collect(pieces, found))
            return JSONResponse(shape.whole(found), headers=headers)
        first = await unless_gone(request, _first(pieces))
        stream = shape.events(first, pieces, found)
        headers |= {"Cache-Control": "no-cache"}
        return StreamingResponse(stream, headers=headers, media_type="text/event-stream")

    async def _watched(
        self, plan: Plan, pieces: AsyncGenerator[Numbered, None], began: float, caller: Caller
    ) -> AsyncGenerator[Numbered, None]:
        """``pieces``, counted for ``caller``, and timed from ``began``, when the request came."""
        name, first = plan.served.name, 0.0
        self.metrics.prompt_tokens.labels(name).inc(plan.prompt_tokens)
        made, cached = [0] * len(plan.jobs), [0] * len(plan.jobs)
        waiting = set(range(len(plan.jobs)))
        try:
            async with aclosing(pieces):
                async for number, piece in pieces:
                    if not first:
                        first = time.monotonic()
                        self.metrics.first_token.labels(name).observe(first - began)
                        caller.use(plan.prompt_tokens)
                    caller.use(piece.made - made[number])
                    made[number], cached[number] = piece.made, max(cached[number], piece.cached)
                    if piece.waited is not None and number in waiting:
                        waiting.remove(number)
                        self.metrics.queue.labels(name).observe(piece.waited)
                    if piece.finish is not None:
                        self.metrics.answers.labels(name, piece.finish).inc()
                    yield number, piece
            ended = time.monotonic()
            self.metrics.request_seconds.labels(name).observe(ended - began)
            if max(made) > 1:
                self.metrics.per_token.labels(name).observe((ended - first) / (max(made) - 1))
        finally:
            self.metrics.generated_tokens.labels(name).inc(sum(made))
            self.metrics.cached_tokens.labels(name).inc(sum(cached[:: plan.n]))
            if caller.key.name and first:
                self.metrics.key_tokens.labels(caller.key.name).inc(plan.prompt_tokens + sum(made))

    # --- models -------------------------------------------------------------------------------------------------

    async def models(self, request: Request) -> dict[str, Any]:
        """What is served: the base and its adapters."""
        return {"object": "list", "data": [self._card(served) for served in self._names(request)]}

    async def model(self, request: Request, model_id: str) -> dict[str, Any]:
        """One of the models that are served."""
        found = next((served for served in self._names(request) if served.name == model_id), None)
        if found is None:
            raise self._unknown(request, model_id)
        return self._card(found)

    def _names(self, request: Request) -> list[Served]:
        """What the request's key may use."""
        key = caller_of(request.scope).key
        return [served for served in self.catalogue.names() if key.may_use(served.name)]

    async def _resolve(self, request: Request, name: str) -> Served:
        key = caller_of(request.scope).key
        if key.may_use(name):
            try:
                return await self.catalogue.resolve(name)
            except UnknownModel:
                if key.models is None:
                    raise
        raise self._unknown(request, name)  # which names no others than the key's

    def _unknown(self, request: Request, name: str) -> UnknownModel:
        fix = nearest(name[:200], [served.name for served in self._names(request)]) or "GET /v1/models lists all"
        return UnknownModel("no such model", got=repr(name)[:120], fix=fix)

    def _card(self, served: Served) -> dict[str, Any]:
        return {
            "id": served.name,
            "object": "model",
            "created": served.created,
            "owned_by": "tunegate",
            "root": served.root,
            "parent": served.parent,
            "max_model_len": self.engine.facts.context,
            "standing": served.standing,
            "fingerprint": served.fingerprint,
        }

    async def load(self, request: Request) -> Response:
        """Serve an adapter under a name."""
        _for_administrators(request)
        began = time.monotonic()
        asked = await self._read(request, requests.LoadAdapterRequest)
        name, place = asked.lora_name, asked.load_inplace
        loading = self.catalogue.load(name, asked.lora_path, replace=place, pinned=asked.pinned)
        try:
            await self._in_time(request, loading, began)
        except DuplicateName as error:
            if asked.lora_name == self.catalogue.base:
                raise
            raise InputError(
                f"The lora adapter '{asked.lora_name}' has already been loaded",
                where="lora_name",
                fix="If you want to load the adapter in place, set 'load_inplace' to True.",
            ) from error
        return PlainTextResponse(f"Success: LoRA adapter '{asked.lora_name}' added successfully.")

    async def unload(self, request: Request) -> Response:
        """Serve an adapter no more; answers under way are finished."""
        _for_administrators(request)
        asked = await self._read(request, requests.UnloadAdapterRequest)
        await self.catalogue.unload(asked.lora_name)
        return PlainTextResponse(f"Success: LoRA adapter '{asked.lora_name}' removed successfully.")

    # --- tokens -------------------------------------------------------------------------------------------------

    async def tokenize(self, request: Request) -> Response:
        """The ids that a prompt or a chat gives the model."""
        began = time.monotonic()
        asked = await self._read(request, requests.TokenizeRequest)
        served = await self._in_time(request, self._resolve(request, asked.model or self.catalogue.base), began)
        ids = await self._on_thread(lambda: tokenized(asked, served))
        tokenizer = served.renderer.tokenizer
        names = tokenizer.convert_ids_to_tokens(ids) if asked.return_token_strs else None
        context = self.engine.facts.context
        return JSONResponse({"count": len(ids), "max_model_len": context, "tokens": ids, "token_strs": names})

    async def detokenize(self, request: Request) -> Response:
        """The text of token ids, special ones written out."""
        began = time.monotonic()
        asked = await self._read(request, requests.DetokenizeRequest)
        served = await self._in_time(request, self._resolve(request, asked.model or self.catalogue.base), began)
        wrong = [i for i in asked.tokens if i >= self.engine.facts.vocabulary]
        if wrong:
            expected = f"0 to {self.engine.facts.vocabulary - 1}"
            raise InputError(
                "token ids outside of the vocabulary", where="tokens", expected=expected, got=str(wrong[0])
            )
        decode = served.renderer.tokenizer.decode
        return JSONResponse({"prompt": decode(asked.tokens, clean_up_tokenization_spaces=False)})

    # --- state --------------------------------------------------------------------------------------------------

    async def health(self) -> Response:
        """Whether requests are answered now."""
        if not self.engine.alive:
            raise EngineGone("the engine is not running; it is started again")
        return JSONResponse({"status": "ok"})

    async def figures(self, request: Request) -> Response:
        """Figures for Prometheus."""
        key = caller_of(request.scope).key
        if key.models is not None and not key.admin:
            raise errors.NotAllowed("the figures name all models, and this key is limited to some")
        alive, stats = self.engine.alive, dict[str, Any]()
        if alive:
            try:
                stats = await self.engine.stats()
            except TunegateError:
                alive = False
        return Response(self.metrics.text(alive, stats), media_type=self.metrics.content_type)

    async def page(self, request: Request) -> Response:
        """The playground."""
        data, kind = self._pages[request.url.path.removeprefix("/")]
        return Response(data, media_type=kind, headers=PAGE_HEADERS)

    # --- parts --------------------------------------------------------------------------------------------------

    async def _read(self, request: Request, model: type[Body]) -> Body:
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":  # which no other site's page can send without being allowed to
            raise errors.NotJson("a JSON body is expected", got=kind[:100], fix="Content-Type: application/json")
        data = await read_body(request, self.limits)
        if len(data) <= SMALL_BODY:
            return read_request(data, model)
        return await self._on_thread(lambda: read_request(data, model))

    async def _in_time(self, request: Request, work: Coroutine[Any, Any, Result], began: float) -> Result:
        """``work``, ended when the client goes away or the time of an answer that began at ``began`` is up. What it
        waits for with others goes on for them."""
        limit = self.limits.answer_seconds
        left = began + limit - time.monotonic()
        try:
            return await unless_gone(request, asyncio.wait_for(work, left))
        except asyncio.TimeoutError:
            raise errors.too_long(limit) from None

    async def _on_thread(self, work: Callable[[], Result]) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)


def _for_administrators(request: Request) -> None:
    if not caller_of(request.scope).key.admin:
        raise errors.NotAllowed("this key may not load or unload adapters", fix="a key made with --admin")


async def _collect(pieces: AsyncGenerator[Numbered, None], found: list[Answer]) -> None:
    async with aclosing(pieces):
        async for number, piece in pieces:
            found[number].add(piece)


async def _first(pieces: AsyncGenerator[Numbered, None]) -> Numbered:
    return await anext(pieces)


def create_app(
    engine: EngineClient, catalogue: Catalogue, *, limits: Limits | None = None, admin: bool = True,
    keys: Keys | None = None,
) -> FastAPI:  # fmt: skip
    """The application. ``engine`` is started and stopped by the caller. ``admin``: whether adapters may be loaded and
    unloaded by request. ``keys``: who may ask; None for everybody."""
    front = Front(engine, catalogue, limits or Limits())
    app = FastAPI(title="tunegate", version=__version__, docs_url=None, redoc_url=None)
    app.state.metrics = front.metrics
    if keys is not None:
        app.add_middleware(KeyGuard, keys=keys)
    app.add_middleware(Exchanges, metrics=front.metrics)  # around the other, which it counts too
    _add_routes(app, front, admin)
    for path in PAGES:
        app.add_api_route(f"/{path}", front.page, include_in_schema=False, response_model=None)
    # ClientDisconnect: gone while its body was read
    handlers: dict[type[Exception], Callable[[Request, Any], Awaitable[Response]]] = {
        TunegateError: _refused,
        HTTPException: _no_route,
        RequestValidationError: _refused,
        ClientGone: _nobody,
        ClientDisconnect: _nobody,
    }
    for kind, handler in handlers.items():
        app.add_exception_handler(kind, handler)

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            made = get_openapi(title=app.title, version=app.version, routes=app.routes)
            app.openapi_schema = dict(documents.completed(made))
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]
    return app


def _add_routes(app: FastAPI, front: Front, admin: bool) -> None:
    def failing(*statuses: int) -> dict[int | str, dict[str, Any]]:
        return {status: {"model": documents.Error} for status in statuses}

    def post(path: str, handler: Any, body: Any, answer: dict[str, Any], *statuses: int) -> None:
        responses = {200: answer, **failing(400, 401, 403, 404, 408, 413, 415, 429, 500, *statuses)}
        extra = documents.taken(body)
        app.add_api_route(
            path, handler, methods=["POST"], responses=responses, openapi_extra=extra, response_model=None
        )

    events = {"text/event-stream": {"schema": {"type": "string"}}}
    text = {"content": {"text/plain": {"schema": {"type": "string"}}}}
    chat = {"model": documents.ChatCompletion, "content": events}
    complete = {"model": documents.Completion, "content": events}
    post("/v1/chat/completions", front.chat, requests.ChatRequest, chat, 503, 504)
    post("/v1/completions", front.complete, requests.CompletionRequest, complete, 503, 504)
    post("/tokenize", front.tokenize, requests.TokenizeRequest, {"model": documents.Tokenized}, 503, 504)
    post("/detokenize", front.detokenize, requests.DetokenizeRequest, {"model": documents.Detokenized}, 503, 504)
    if admin:
        kinds = (requests.LoadAdapterRequest, requests.UnloadAdapterRequest)
        post("/v1/load_lora_adapter", front.load, kinds[0], text, 503, 504)
        post("/v1/unload_lora_adapter", front.unload, kinds[1], text, 503)
    app.add_api_route("/v1/models", front.models, response_model=documents.ModelList)
    app.add_api_route(
        "/v1/models/{model_id:path}", front.model, response_model=documents.ModelCard, responses=failing(404)
    )
    health: dict[int | str, dict[str, Any]] = {200: {"model": documents.Health}, **failing(503)}
    app.add_api_route("/health", front.health, response_model=None, responses=health)
    app.add_api_route(
        "/metrics", front.figures, response_model=None, responses={200: text}, response_class=PlainTextResponse
    )


async def _refused(_request: Request, error: Exception) -> Response:
    if isinstance(error, RequestValidationError):
        error = InputError("the request cannot be read", got=str(error)[:200])
    return errors.response(error)


async def _no_route(request: Request, error: HTTPException) -> Response:
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "refused")
    message = f"{request.method} {request.url.path}: {error.detail}"
    found = errors.body(message, "invalid_request_error", code=code)
    return JSONResponse(found, error.status_code, dict(error.headers or {}))


async def _nobody(_request: Request, _error: Exception) -> Response:
    return Response(status_code=499)
