"""From what was asked for to a server that runs, and back to nothing.

::

    base      the one named, or the one that the adapters' cards name; quantized as they were trained
    names     every adapter is admitted, and all problems of all of them are told, before any weight is read
    engine    started; pinned and preloaded adapters are put into it
    serving   until SIGTERM or SIGINT; then no new connection, and a while for the answers under way

It writes no messages: whoever calls it is told when the engine starts, and when it is ready.
"""

from __future__ import annotations

import asyncio
import contextlib
import difflib
import signal
import socket
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tunegate import records
from tunegate.adapter.card import CARD, load_card, recipe_text
from tunegate.errors import InputError, Problem, TunegateError, collecting, nearest
from tunegate.kernels.formats import Recipe
from tunegate.model.fingerprint import fingerprint_base
from tunegate.model.resolve import Report, resolve_base
from tunegate.records import AdapterCard
from tunegate.registry.entries import PRODUCTION, is_reference, list_versions, read_entity, resolve
from tunegate.registry.opening import Registry
from tunegate.registry.tables import versions
from tunegate.serve.admission import House
from tunegate.serve.base import ServedBase, open_base
from tunegate.serve.catalogue import Catalogue
from tunegate.serve.connections import Bounds, Connections
from tunegate.serve.engine_client import EngineClient
from tunegate.serve.following import Follower
from tunegate.serve.telling import log, tell

SHOWN = 10  # names, where one is wrong
LOOPBACK = ("127.0.0.1", "::1", "localhost")


@dataclass(frozen=True)
class Wanted:
    """What is to be served. ``base``: None where the adapters say it. ``adapters``: (name, source) pairs.
    ``everything``: also all that ``registry`` has in production on this base. ``quantization``: nf4, int8, none, or
    None for that of the training. ``roots``: where load requests may find adapters. ``pinned``, ``merged`` and
    ``preload`` are names."""

    base: str | None = None
    revision: str | None = None
    base_as: str = ""
    adapters: tuple[tuple[str, str], ...] = ()
    registry: Registry | None = None
    everything: bool = False
    allow_ungated: bool = False
    quantization: str | None = None
    roots: tuple[Path, ...] = ()
    pinned: tuple[str, ...] = ()
    merged: tuple[str, ...] = ()
    preload: tuple[str, ...] = ()
    poll: float = 2.0
    trust_remote_code: bool = False


# --- the base ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Trained:
    """What an adapter says of its base. ``revision``: of a hub id only."""

    who: str
    name: str
    revision: str | None
    fingerprint: str
    recipe: Mapping[str, Any] | None


def _told(wanted: Wanted) -> Iterator[_Trained]:
    """What the cards of the adapters say, where they have one; what is wrong with them is told when they are
    admitted."""
    for name, source in wanted.adapters:
        folder = Path(source).expanduser()
        if (folder / CARD).is_file():
            with contextlib.suppress(InputError):
                yield _of_card(name, load_card(folder))
    if wanted.registry is None:
        return
    with wanted.registry.database.reading() as connection:
        ids: dict[str, str] = {}
        for name, source in wanted.adapters:
            if is_reference(source) and not Path(source).is_dir():
                with contextlib.suppress(InputError):
                    ids[resolve(connection, source).adapter] = name
        for version in list_versions(connection, versions.c.state == PRODUCTION) if wanted.everything else ():
            ids.setdefault(version.adapter, version.ref)
        for id, who in ids.items():
            with contextlib.suppress(InputError):
                yield _of_card(who, records.from_json(read_entity(connection, id).body.get("card"), AdapterCard, who))


def _of_card(who: str, card: AdapterCard) -> _Trained:
    base = card.base
    revision = base.get("revision") if base.get("source") == "hub" else None
    return _Trained(who, base["name"], revision, base["fingerprint"]["total"], base.get("recipe"))


def find_base(wanted: Wanted, report: Report) -> ServedBase:
    """The base that ``wanted`` names or its adapters were trained on, with their quantization unless another is
    wanted; :class:`InputError` if they differ."""
    told = list(_told(wanted))
    name, revision = (wanted.base, wanted.revision) if wanted.base else _the_base(told)
    if revision is None:
        revision = next((t.revision for t in told if t.name == name), None)
    resolved = resolve_base(name, revision, trust_remote_code=wanted.trust_remote_code, report=report)
    fingerprint = fingerprint_base(resolved.path).total
    recipe = _recipe(wanted.quantization, [t for t in told if t.fingerprint == fingerprint])
    return open_base(resolved, recipe, name=wanted.base_as, trust_remote_code=wanted.trust_remote_code)


def _the_base(told: Sequence[_Trained]) -> tuple[str, str | None]:
    bases = {(t.fingerprint, t.name): t for t in told}
    if len({t.fingerprint for t in told}) == 1:
        first = next(iter(bases.values()))
        return first.name, first.revision
    what = "the adapters belong to different bases" if told else "which base? No adapter's card says it"
    got = "; ".join(f"{t.who}: {t.name} {t.fingerprint[:15]}" for t in bases.values())
    raise InputError(what, where="BASE", got=got, fix="name it: tunegate serve BASE")


def _recipe(quantization: str | None, told: Sequence[_Trained]) -> dict[str, Any] | None:
    """How the base is to be quantized. A format is the adapters' own recipe of it where they agree on one."""
    if quantization == "none":
        return None
    found = {recipe_text(t.recipe): t for t in told}
    if quantization is not None:
        own = [t.recipe for t in found.values() if t.recipe and t.recipe.get("format") == quantization]
        plain = {**Recipe.of(quantization).to_json(), "keep": [], "stored": False}
        return dict(own[0]) if len(own) == 1 and own[0] else plain
    if len(found) > 1:
        raise InputError(
            "the adapters were trained on different quantizations of the base", where="--quantization",
            got="; ".join(f"{t.who}: {text}" for text, t in found.items()),
            fix="serve them apart; --quantization nf4, int8 or none serves those that were trained so",
        )  # fmt: skip
    recipe = next(iter(found.values())).recipe if found else None
    return dict(recipe) if recipe else None


# --- names -------------------------------------------------------------------------------------------------------


def house_of(wanted: Wanted, base: ServedBase) -> House:
    return House(base, wanted.registry, wanted.allow_ungated)


async def fill(catalogue: Catalogue, wanted: Wanted) -> Follower | None:
    """Give ``catalogue`` its names, and what follows the registry; :class:`InputError` with all problems of all
    adapters. No weight is read."""
    problems: list[Problem] = []
    for name, source in wanted.adapters:
        with collecting(problems):
            await catalogue.register(name, source)
    follower = None
    if wanted.registry is not None:
        follower = Follower(catalogue, wanted.registry, everything=wanted.everything, every=wanted.poll)
        await follower.look()
    given = {name for name, _ in wanted.adapters}
    for flag, names in (("--pin", wanted.pinned), ("--merged", wanted.merged), ("--preload", wanted.preload)):
        for name in names:
            try:
                catalogue.pin(name) if flag != "--preload" else catalogue.known(name)
            except InputError as error:
                if name not in given:  # else its adapter was refused, which is told
                    ways = _names_like(name, catalogue, flag != "--preload")
                    problems += [replace(problem, where=flag, fix=ways) for problem in error.problems]
    if problems:
        raise InputError(problems)
    return follower


def _names_like(name: str, catalogue: Catalogue, adapters_only: bool) -> str:
    """The names that there are, or the nearest of many."""
    names = [served.name for served in catalogue.names()][1 if adapters_only else 0 :]
    if near := nearest(name[:200], names):
        return near
    if not names:
        return "no adapter is served"
    listed = names if len(names) <= SHOWN else difflib.get_close_matches(name[:200], names, SHOWN, 0.0)
    return f"names that there are: {', '.join(listed)}" + (f", and {len(names) - SHOWN} more" * (len(names) > SHOWN))


# --- serving -----------------------------------------------------------------------------------------------------


def bind(host: str, port: int) -> socket.socket:
    """A socket that has its address and does not listen yet; :class:`InputError` if that cannot be had."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        bound = socket.socket(family, socket.SOCK_STREAM)
        try:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind((host, port))
        except BaseException:
            bound.close()
            raise
    except OSError as error:
        raise InputError(
            "the address cannot be had", where=f"{host}:{port}", got=error.strerror or str(error),
            fix="another --port, or --port 0 for any that is free",
        ) from error  # fmt: skip
    return bound


def url_of(bound: socket.socket) -> str:
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


@contextlib.asynccontextmanager
async def stopping() -> AsyncIterator[asyncio.Event]:
    """An event that SIGTERM and SIGINT set, instead of what else they do."""
    asked, loop = asyncio.Event(), asyncio.get_running_loop()
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in before:
        loop.add_signal_handler(number, asked.set)
    try:
        yield asked
    finally:
        for number, handler in before.items():
            loop.remove_signal_handler(number)
            signal.signal(number, handler)


async def unless(asked: asyncio.Event, work: Coroutine[Any, Any, Any]) -> bool:
    """Do ``work``; False if ``asked`` was set before it was done, which ends it."""
    working, waiting = asyncio.ensure_future(work), asyncio.ensure_future(asked.wait())
    try:
        await asyncio.wait([working, waiting], return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            working.result()
            return True
        return False
    finally:
        for task in (working, waiting):
            task.cancel()
        await asyncio.gather(working, waiting, return_exceptions=True)


async def listen(
    app: Any, bound: socket.socket, bounds: Bounds, asked: asyncio.Event, ready: Callable[[], None]
) -> None:  # fmt: skip
    """Serve ``app`` on ``bound`` until ``asked`` is set, then finish what is under way."""
    import uvicorn

    connections = Connections(bounds)
    config = uvicorn.Config(
        app, log_config=None, access_log=False, server_header=False, ws="none",
        http=connections,  # type: ignore[arg-type]  # it is called for each connection, as a class would be
        timeout_keep_alive=bounds.idle,  # type: ignore[arg-type]
        timeout_graceful_shutdown=max(1, round(bounds.grace)),
    )  # fmt: skip
    server = uvicorn.Server(config)
    asyncio.get_running_loop().set_exception_handler(_without_message)

    async def watch() -> None:
        await asked.wait()
        server.should_exit = True

    watching = asyncio.gather(watch(), connections.watch())
    bound.listen(config.backlog)
    ready()
    try:
        # uvicorn puts its own handlers of both signals in front of ours, and raises them again for ours at its end.
        await server.serve(sockets=[bound])
    finally:
        watching.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await watching
    if not server.started:
        raise TunegateError("the server did not start", fix="its log, above, says why")


def _without_message(_loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """What asyncio cannot raise anywhere. Its own handler logs messages, and these may quote a prompt."""
    if (error := context.get("exception")) is not None:
        tell(context["message"], error)
    else:
        log.error("%s", context["message"])


async def serve(
    engine: EngineClient, catalogue: Catalogue, wanted: Wanted, app: Any, bound: socket.socket, bounds: Bounds,
    starting: Callable[[], None], ready: Callable[[Catalogue], None],
) -> None:  # fmt: skip
    """Run until SIGTERM or SIGINT. ``catalogue`` is filled, the engine started and stopped here; ``starting`` is called
    when nothing is refused any more, ``ready`` when requests are taken."""

    async def start() -> None:
        follower = await fill(catalogue, wanted)
        starting()
        await engine.start()
        for name in dict.fromkeys((*wanted.pinned, *wanted.merged, *wanted.preload)):
            await catalogue.resolve(name)
        if follower is not None:
            following.append(asyncio.ensure_future(follower.run()))

    following: list[asyncio.Task[None]] = []
    async with stopping() as asked:
        try:
            if await unless(asked, start()):
                await listen(app, bound, bounds, asked, lambda: ready(catalogue))
        finally:
            for task in following:
                task.cancel()
            await asyncio.gather(*following, return_exceptions=True)
            await engine.stop()
