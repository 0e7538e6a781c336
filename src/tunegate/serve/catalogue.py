"""Names that clients ask for, and the adapters that they mean at this moment.

A name stands for an adapter that was admitted (``admission``). :class:`Served` is what a request holds while it is
answered. A name moves to other weights by one assignment, after the new weights lie in the engine: requests that hold
the old :class:`Served` keep its key, the next ones get the new one. Weights are forgotten by the engine when no
:class:`Served` with their key is left, neither here nor in a request; Python's reference counts say when.

A name costs its :class:`Served` and little more. Weights go to the engine when a request first asks for them, once for
all who wait, and the engine pushes out those that were not used for longest, except pinned ones. Files are looked at
(size, time, inode) before each use: what was admitted is what answers, or nothing does. Whoever waits for a disk or a
store may leave at any time; that changes nothing but the next one's wait.

It follows no registry (``following`` does) and holds no weights.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tunegate.data.render import Renderer
from tunegate.errors import InputError, Problem, nearest
from tunegate.files import nearest_folder
from tunegate.registry.entries import Version, is_reference, resolve
from tunegate.registry.pulling import materialize
from tunegate.serve.admission import Admitted, House, Identify, Stamp, admit, identify_here, stamp_of
from tunegate.serve.engine_client import EngineClient
from tunegate.serve.held import Held
from tunegate.serve.jobs import MERGED
from tunegate.serve.once import Locks, Once
from tunegate.serve.threads import KeptThread, in_thread

_PART = r"[A-Za-z0-9][A-Za-z0-9._@:-]*"
_NAME = re.compile(rf"(?=.{{1,200}}\Z){_PART}(/{_PART})*")
BASE = "base"  # the standing of the base alone
_LISTED = "GET /v1/models lists all"
_LIKE_ENOUGH = 200  # names that an unknown one is compared with


class UnknownModel(InputError):
    """No such name."""


class DuplicateName(InputError):
    """The name is taken."""


class AdapterNotFound(InputError):
    """The source of an adapter is not there, or not where load requests may look."""


class ModelRefused(InputError):
    """The name is known and must not answer now: its adapter was flagged or retired, or its files changed."""


@dataclass(frozen=True)
class Served:
    """What a request's ``model`` means at this moment.

    ``name``: as the client wrote it. ``key``: what the engine calls the adapter (:mod:`~tunegate.serve.jobs`), None for
    the base alone. ``fingerprint``: the adapter's content hash, or the base's. ``standing``: ``ship``, ``hold
    (override: why)``, ``hold (ungated)``, ``unverified``, ``base``; in lists also ``refused: why``. ``root``: the
    folder or the registry's version that it came from. ``parent``: the base's name. ``created``: Unix time in seconds.
    """

    name: str
    key: str | None
    renderer: Renderer
    fingerprint: str
    standing: str
    root: str
    parent: str | None
    created: int


@dataclass(frozen=True)
class Entry:
    """A name. ``reference``: what it follows in the registry, None for a folder; ``version``: the id of what that means
    now, known for a folder too where the registry has the same adapter. ``folder`` is None until a version's files are
    needed for the first time."""

    served: Served
    reference: str | None = None
    folder: Path | None = None
    stamp: Stamp | None = None
    version: str | None = None
    pinned: bool = False
    refused: tuple[Problem, ...] = ()


class Catalogue:
    """All calls on one event loop. ``roots``: the folders that :meth:`load` may take adapters from; registry references
    are taken where ``house`` has a registry. ``merged``: names whose adapters run on merged weights, whatever they
    mean."""

    def __init__(
        self, engine: EngineClient, house: House, *, roots: Sequence[Path] = (), merged: Collection[str] = ()
    ):  # fmt: skip
        self.house = house
        self.base = house.base.name
        self._merged = frozenset(merged)
        self._roots = [root.resolve() for root in roots]
        self._engine = engine
        self._held = Held(engine)
        self._entries: dict[str, Entry] = {}
        self._once, self._changing = Once(), Locks()
        self._look = KeptThread()
        base, renderer = house.base, house.base.renderer()
        root, fingerprint = str(base.resolved.path), base.at_hand.fingerprint.total
        self._base = Served(base.name, None, renderer, fingerprint, BASE, root, None, base.created)

    # --- what requests ask -------------------------------------------------------------------------------------

    def names(self) -> list[Served]:
        """The base, then the adapters in the order of their names."""
        return [self._base, *(_listed(entry) for _, entry in sorted(self._entries.items()))]

    async def resolve(self, name: str) -> Served:
        """What ``name`` means, its weights in the engine. :class:`UnknownModel`, :class:`ModelRefused`, or another
        :class:`InputError` with the reasons for which it must not answer."""
        if name == self.base:
            return self._base
        entry = self._entries.get(name)
        if entry is None:
            raise self._unknown(name)
        if entry.refused:
            raise ModelRefused(list(entry.refused))
        if await self._moved(name, entry):
            known = entry
            entry = await self._once(("again", name, known.served.key), lambda: self._look_again(name, known))
        await self._put(entry)
        return entry.served

    async def load(self, name: str, source: str, *, replace: bool = False, pinned: bool = False) -> Served:
        """Let ``name`` mean the adapter in ``source``, a folder below the roots or a registry reference, its weights in
        the engine. ``replace``: in the place of another adapter of that name, whose requests are finished."""
        return await self._add(name, lambda: self._confined(source), source, replace=replace, pinned=pinned, put=True)

    async def register(self, name: str, source: str) -> Served:
        """:meth:`load` for whoever starts the server: a folder may lie anywhere, and the weights wait for the first
        :meth:`resolve`. The engine need not have started."""
        return await self._add(name, lambda: _anywhere(source), source, replace=False, pinned=False, put=False)

    def known(self, name: str) -> None:
        """:class:`UnknownModel` if ``name`` is neither the base nor an adapter."""
        if name != self.base and name not in self._entries:
            raise self._unknown(name)

    def pin(self, name: str) -> None:
        """Once in the engine, the weights of ``name`` are never pushed out. :class:`UnknownModel` if no adapter has
        that name."""
        if name not in self._entries:
            raise self._unknown(name)
        self._entries[name] = replace(self._entries[name], pinned=True)

    async def unload(self, name: str) -> None:
        """Forget ``name``; requests under way are finished. :class:`UnknownModel` if there is none."""
        if name == self.base:
            raise InputError("the base is not unloaded", where=name)
        async with self._changing[name]:
            if self._entries.pop(name, None) is None:
                raise self._unknown(name)

    # --- what the registry tells ---------------------------------------------------------------------------------

    def entries(self) -> dict[str, Entry]:
        """Every name with what is known of it, as it is now."""
        return dict(self._entries)

    def enrol(self, name: str, entry: Entry) -> bool:
        """Add a name whose adapter is known from the registry; False if the name is taken."""
        if name == self.base or name in self._entries:
            return False
        served = replace(entry.served, key=self._key(name, entry.served.fingerprint))
        self._held.count(served)
        self._entries[name] = replace(entry, served=served)
        return True

    async def move(self, name: str, version: Version) -> None:
        """Let ``name`` mean another version in the registry: admitted and, if the old one is in the engine, loaded
        there first. On any error it stays what it was."""
        async with self._changing[name]:
            before = self._entries.get(name)
            if before is None or before.reference is None or before.version == version.adapter:
                return
            put = before.pinned or self._held.has(before.served.key)
            identify = self._by_engine() if put else identify_here
            reference = before.reference

            def found() -> Entry:
                return self._of_version(name, reference, version, identify)

            again = ("move", name, version.adapter, put)
            entry = self._counted(await self._once(again, lambda: in_thread(found)), before.pinned)
            if put:
                await self._put(entry)
            self._entries[name] = entry

    def refuse(self, name: str, version: str | None, problems: Sequence[Problem]) -> bool:
        """Requests for ``name``, as long as it means ``version``, are refused for these reasons; none lifts that. True
        if that is news."""
        entry = self._entries.get(name)
        if entry is None or entry.version != version or entry.refused == tuple(problems):
            return False
        self._entries[name] = replace(entry, refused=tuple(problems))
        return True

    # --- inside ------------------------------------------------------------------------------------------------

    async def _add(
        self, name: str, find: Callable[[], Path | None], source: str, *, replace: bool, pinned: bool, put: bool
    ) -> Served:
        check_name(name)
        async with self._changing[name]:
            if name == self.base or (name in self._entries and not replace):
                raise DuplicateName("the name is taken", where=name, fix="unload it, or say that it is to be replaced")

            identify = self._by_engine() if put else identify_here

            def found() -> Entry:
                folder = find()
                if folder is not None:
                    return self._of_folder(name, folder, identify)
                return self._of_version(name, source, self._version(source), identify)

            entry = self._counted(await self._once(("add", name, source, put), lambda: in_thread(found)), pinned)
            if put:
                await self._put(entry)
            self._entries[name] = entry
            return entry.served

    async def _moved(self, name: str, entry: Entry) -> bool:
        """Whether the files are not, or not at hand as, those that were admitted."""
        folder = entry.folder
        if folder is None:
            return True
        stamp = await self._once(("look", name, folder), lambda: self._look(lambda: stamp_of(folder)))
        return bool(stamp != entry.stamp)

    def _by_engine(self) -> Identify:
        """Have the engine hash what it reads, for weights that it is to hold next; from any thread."""
        loop = asyncio.get_running_loop()
        return lambda folder: asyncio.run_coroutine_threadsafe(self._engine.identify(folder), loop).result

    def _of_folder(self, name: str, folder: Path, identify: Identify = identify_here) -> Entry:
        return self._entry(name, None, admit(folder, self.house, identify=identify), str(folder))

    def _of_version(
        self, name: str, reference: str, version: Version, identify: Identify = identify_here
    ) -> Entry:  # fmt: skip
        assert self.house.registry is not None
        folder = materialize(self.house.registry, version.adapter)
        return self._entry(name, reference, admit(folder, self.house, version, identify), version.ref)

    def _entry(self, name: str, reference: str | None, admitted: Admitted, root: str) -> Entry:
        renderer, key = self.house.base.renderer(admitted.template), self._key(name, admitted.key)
        served = Served(name, key, renderer, admitted.key, admitted.standing, root, self.base, admitted.created)
        return Entry(served, reference, admitted.folder, admitted.stamp, admitted.version)

    def _key(self, name: str, content: str) -> str:
        return content + MERGED if name in self._merged else content

    def _version(self, reference: str) -> Version:
        if self.house.registry is None:
            what, fix = "a reference to a registry, and none is in use", "start the server with --registry"
            raise AdapterNotFound(what, where=reference[:200], fix=fix)
        with self.house.registry.database.reading() as connection:
            return resolve(connection, reference)

    def _counted(self, entry: Entry, pinned: bool) -> Entry:
        """``entry``, its weights wanted as long as its ``served`` lives."""
        self._held.count(entry.served)
        return replace(entry, pinned=pinned)

    async def _put(self, entry: Entry) -> None:
        assert entry.served.key is not None and entry.folder is not None
        await self._held.put(entry.served.key, entry.folder, entry.pinned)

    async def _look_again(self, name: str, entry: Entry) -> Entry:
        """``entry`` with its files admitted: fetched from the registry for the first time, or found to have changed."""
        try:
            found = await in_thread(lambda: self._found_again(name, entry))
        except InputError as error:
            if entry.folder is None:  # only a change in the registry helps
                self.refuse(name, entry.version, error.problems)
            raise
        if found.served.key != entry.served.key:
            raise ModelRefused(
                "the adapter's files changed since they were loaded", where=entry.served.root,
                expected=entry.served.fingerprint, got=found.served.fingerprint,
                fix="load it again, so that the name means the new ones; or put the old ones back",
            )  # fmt: skip
        fresh = replace(entry, folder=found.folder, stamp=found.stamp)
        if self._entries.get(name) is entry:
            self._entries[name] = fresh
        return fresh

    def _found_again(self, name: str, entry: Entry) -> Entry:
        if entry.reference is None:
            assert entry.folder is not None
            return self._of_folder(name, entry.folder)
        assert entry.version is not None
        return self._of_version(name, entry.reference, self._version(entry.version))

    def _confined(self, source: str) -> Path | None:
        """The folder below a root that a load request names; None for a registry reference."""
        for root in self._roots:
            folder = root / source
            if _is_folder(folder) and folder.resolve().is_relative_to(root):
                return folder.resolve()
        if is_reference(source):
            return None
        raise AdapterNotFound(
            "no such adapter", where=source[:200],
            expected=f"a folder below {' or '.join(map(str, self._roots))}" if self._roots else "a registry reference",
            fix="the server's --adapter-root says where load requests may find adapters",
        )  # fmt: skip

    def _unknown(self, name: str) -> UnknownModel:
        like = [known for known in (self.base, *self._entries) if known[:1] == name[:1]]
        fix = nearest(name[:200], like[:_LIKE_ENOUGH]) or _LISTED
        return UnknownModel("no such model", got=repr(name)[:120], fix=fix)


def check_name(name: str) -> str:
    """``name``, if clients can ask for it; :class:`InputError`."""
    if not _NAME.fullmatch(name):
        raise InputError(
            "not a name for a model", got=repr(name)[:120],
            expected="letters, digits and . _ - @ : in parts that begin with a letter or digit, with / between them; "
            "at most 200",
        )  # fmt: skip
    return name


def _is_folder(path: Path) -> bool:
    """False too for what no file can be called."""
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False


def _anywhere(source: str) -> Path | None:
    """The folder that ``source`` names; None for a registry reference."""
    folder = Path(source).expanduser()
    if _is_folder(folder):
        return folder.resolve()
    if is_reference(source):
        return None
    fix = nearest_folder(folder) or "give an adapter's folder, or NAME@ALIAS of a registry"
    raise AdapterNotFound("no such adapter folder", where=source[:200], fix=fix)


def _listed(entry: Entry) -> Served:
    if not entry.refused:
        return entry.served
    return replace(entry.served, standing=f"refused: {'; '.join(p.what for p in entry.refused)}")
