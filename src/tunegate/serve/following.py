"""What the registry says of the adapters that are served, asked every few seconds.

One number tells whether anything was written since the last look. If so, all versions are read in one snapshot, and
each name is settled: where its alias moved, the new version is admitted, loaded and swapped in; where the version that
answers was flagged or retired, new requests are refused with the reason. With ``everything`` each name that gets a
version in production on this base becomes a name here.

A new version that is not admitted changes nothing but the log: the last good one goes on. So it does while the registry
cannot be reached. It writes nothing to the registry.
"""

from __future__ import annotations

import asyncio
import datetime
import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from tunegate import records
from tunegate.adapter.card import card_problems, template_of
from tunegate.errors import InputError, Problem, TunegateError
from tunegate.records import AdapterCard
from tunegate.registry.entries import (
    PRODUCTION,
    Version,
    aliased,
    flags_of,
    last_event,
    list_versions,
    read_entity,
    shown,
)
from tunegate.registry.opening import Registry
from tunegate.registry.tables import edges
from tunegate.serve.admission import House, standing_of, version_problems
from tunegate.serve.catalogue import Catalogue, Entry, Served, check_name
from tunegate.serve.once import Once
from tunegate.serve.threads import in_thread, in_time

log = logging.getLogger("tunegate.serve")


@dataclass
class _State:
    """The registry at one moment. ``of_base``: ids of adapters trained on the served base, ``flags``: its own."""

    by_id: dict[str, Version]
    by_name: dict[str, list[Version]] = field(default_factory=dict)
    of_base: frozenset[str] = frozenset()
    flags: tuple[str, ...] = ()


class Follower:
    """Keeps ``catalogue`` as the registry says. ``every``: seconds between looks, give or take a fifth, so that many
    servers do not ask at once. ``patience``: seconds for the registry's answer, and for each name's new version."""

    def __init__(
        self, catalogue: Catalogue, registry: Registry, *, everything: bool = False, every: float = 2.0,
        patience: float = 300.0,
    ):  # fmt: skip
        self._patience, self._once = patience, Once()
        self._catalogue = catalogue
        self._registry = registry
        self._everything = everything
        self._every = every
        self._seen: set[str] = set()  # production names that were added once: one that was unloaded stays away
        self._event = -1
        self._said: dict[str, str] = {}  # what was logged last of a name ("": of the registry), to say it once

    async def run(self) -> None:
        """Look for ever."""
        while True:
            await asyncio.sleep(self._every * random.uniform(0.8, 1.2))
            try:
                await self.look()
            except TunegateError as error:
                self._say("", f"the registry cannot be followed, what is served goes on: {error}")
            except Exception as error:  # a defect; what is served goes on all the same
                self._say("", f"following the registry failed: {type(error).__name__}: {error}", error)
            else:
                self._said.pop("", None)

    def _say(self, name: str, text: str, error: Exception | None = None) -> None:
        if self._said.get(name) != text:
            log.error("%s", text, exc_info=error)
        self._said[name] = text

    async def look(self) -> None:
        """Settle every name, if anything was written since the last look. :class:`TunegateError` if the registry cannot
        be read, or a version not be fetched; the next look tries again."""
        reading = self._once("read", lambda: in_thread(self._read))
        try:
            event, state = await in_time(reading, self._patience)
        except asyncio.TimeoutError:
            raise TunegateError("the registry does not answer", expected=f"within {self._patience:g} s") from None
        if state is None:
            return
        entries = self._catalogue.entries().items()
        settled = await asyncio.gather(*(self._in_time(name, entry, state) for name, entry in entries))
        if self._everything:
            await self._add_production(state)
        if failed := [problem for error in settled if error for problem in error.problems]:
            raise TunegateError(failed)
        self._event = event

    def _read(self) -> tuple[int, _State | None]:
        """The last event, and all of the registry if that is a new one; in a thread."""
        with self._registry.database.reading() as connection:
            event = last_event(connection)
            if event == self._event:
                return event, None
            base = self._catalogue.house.base.at_hand.fingerprint.total
            on_base = sa.select(edges.c.child).where(edges.c.parent == base, edges.c.role == "trained on")
            state = _State(
                {version.adapter: version for version in list_versions(connection)},
                of_base=frozenset(connection.execute(on_base).scalars()), flags=flags_of(connection, base),
            )  # fmt: skip
        for version in state.by_id.values():
            state.by_name.setdefault(version.name, []).append(version)
        return event, state

    async def _in_time(self, name: str, entry: Entry, state: _State) -> TunegateError | None:
        """A version that does not come keeps no other name waiting for ever."""
        try:
            return await in_time(self._settle(name, entry, state), self._patience)
        except asyncio.TimeoutError:
            what = "what the registry says of this name could not be followed"
            return TunegateError(what, where=name, expected=f"within {self._patience:g} s")

    async def _settle(self, name: str, entry: Entry, state: _State) -> TunegateError | None:
        """Bring one name up to date. What failed and may work at the next look is returned."""
        alias = entry.reference.partition("@") if entry.reference and "@" in entry.reference else None
        target = alias and aliased(state.by_name.get(alias[0], []), alias[2])
        current, id = state.by_id.get(entry.version or ""), entry.version
        if target and target.adapter != entry.version:
            try:
                await self._catalogue.move(name, target)
            except InputError as error:
                self._say(name, f"{name} stays on {entry.served.root}, {target.ref} is not served: {error}")
            except TunegateError as error:
                return error
            else:
                log.info("%s moved from %s to %s %s", name, entry.served.root, target.ref, shown(target.adapter))
                current, id = target, target.adapter
        problems = version_problems(current) if current else [Problem(_flag(flag), name) for flag in state.flags]
        if alias and target is None:
            problems.append(Problem(f"the registry has no {entry.reference} any more", name))
        if self._catalogue.refuse(name, id, problems):
            if problems:
                log.error("%s is refused from now on: %s", name, "; ".join(p.what for p in problems))
            else:
                log.info("%s answers again", name)
        return None

    async def _add_production(self, state: _State) -> None:
        """Names that have a version in production on this base, and are not here yet."""
        found = [
            version for version in state.by_id.values()
            if version.state == PRODUCTION and version.adapter in state.of_base and version.name not in self._seen
        ]  # fmt: skip
        if not found:
            return
        for version, outcome in zip(found, await in_thread(lambda: self._enrolments(found)), strict=True):
            if isinstance(outcome, InputError):
                self._say(version.name, f"{version.ref} is not served: {outcome}")
                continue
            self._seen.add(version.name)
            if self._catalogue.enrol(version.name, outcome):
                log.info("%s is served: %s %s", version.name, version.ref, shown(version.adapter))

    def _enrolments(self, found: Sequence[Version]) -> list[Entry | InputError]:
        """What the registry knows of each version, no byte fetched; in a thread."""
        outcomes: list[Entry | InputError] = []
        with self._registry.database.reading() as connection:
            for version in found:
                try:
                    outcomes.append(expected(connection, version, self._catalogue.house))
                except InputError as error:
                    outcomes.append(error)
        return outcomes


def expected(connection: Connection, version: Version, house: House) -> Entry:
    """``NAME@production`` as a name, from what the registry holds of its card; :class:`InputError` if that is not
    admitted. Its files are fetched and admitted when a request first asks for it."""
    check_name(version.name)
    body = read_entity(connection, version.adapter).body
    card = records.from_json(body.get("card"), AdapterCard, version.ref)
    problems = card_problems(card, version.ref)
    if problems:
        raise InputError(problems)
    standing, problems = standing_of(card, version, version.override, house, version.ref)
    if problems:
        raise InputError(problems)
    renderer, key = house.base.renderer(template_of(card)), body["hash"]
    created = int(datetime.datetime.fromisoformat(version.added).timestamp())
    served = Served(version.name, key, renderer, key, standing, version.ref, house.base.name, created)
    return Entry(served, f"{version.name}@{PRODUCTION}", version=version.adapter)


def _flag(flag: str) -> str:
    return f"the base is flagged in the registry: {flag}"
