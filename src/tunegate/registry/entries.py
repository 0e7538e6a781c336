"""What is in a registry, read: versions by reference, entities, and what is flagged.

A reference is ``NAME@ALIAS``, ``NAME:NUMBER`` or the beginning of a content hash. ``NAME@production`` is the version in
that state and ``NAME@latest`` the newest that is not retired; other aliases are set by hand. All of an answer is read
in one snapshot, so a reference never gives half of a change.

A base that was superseded flags everything made from it, at any distance: one recursive query over the edges, asked
whenever a version is read. Nothing is stored that could be out of date. A base that took another's place is not flagged
by where it came from.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from tunegate.errors import InputError, nearest
from tunegate.files import canonical_json
from tunegate.registry.tables import aliases, base_names, edges, entities, events, superseded, versions

UNVERIFIED, CANDIDATE, APPROVED, PRODUCTION, RETIRED = "unverified", "candidate", "approved", "production", "retired"
STATES = (UNVERIFIED, CANDIDATE, APPROVED, PRODUCTION, RETIRED)
LATEST = "latest"
CLAIMS = "claims"  # the edge from an adapter without a card to the base whose name it gives
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_NUMBER = re.compile("[0-9]{1,9}")
_SHOWN = "`tunegate registry list` and `tunegate registry base list` show all"
_SHORTEST = 6  # hex digits of a hash that may be left at


@dataclass(frozen=True)
class Entity:
    """A fact: what ``id``, a content hash, stands for. ``body`` is JSON data."""

    id: str
    kind: str
    name: str
    body: dict[str, Any]


@dataclass(frozen=True)
class Edge:
    """``child`` was made from ``parent``."""

    child: str
    parent: str
    role: str


@dataclass(frozen=True)
class Event:
    what: str
    who: str
    at: str
    why: str


@dataclass(frozen=True)
class Version:
    """An adapter under its name. ``flags``: the superseded bases that it was made from, in words; none if it may be
    used. ``override``: why it was approved against the gate's ``verdict``."""

    adapter: str
    name: str
    number: int
    state: str
    verdict: str | None
    override: str | None
    aliases: tuple[str, ...]
    flags: tuple[str, ...]
    added: str

    @property
    def ref(self) -> str:
        return f"{self.name}:{self.number}"

    @property
    def standing(self) -> str:
        """State, decision, override and flags in one line: what every output shows."""
        judged = self.verdict or "not judged"
        parts = [self.state, judged] if self.state != UNVERIFIED else [self.state]
        parts += [f"OVERRIDE: {self.override}"] if self.override else []
        parts += [f"INCOMPATIBLE: {flag}" for flag in self.flags]
        return ", ".join(parts)


def refuse_flagged(version: Version, what: str) -> None:
    """:class:`InputError` if a base that ``version`` was made from has been superseded."""
    if version.flags:
        raise InputError(
            f"the adapter is incompatible: {'; '.join(version.flags)}",
            where=version.ref,
            fix=f"train it on the new base; a flagged adapter is not {what}",
        )


# --- versions ----------------------------------------------------------------------------------------------------


def list_versions(connection: Connection, *conditions: Any) -> list[Version]:
    """Versions by name and number, newest number last, with their flags."""
    query = (
        sa.select(versions, entities.c.at)
        .join(entities, entities.c.id == versions.c.adapter)
        .where(*conditions)
        .order_by(versions.c.name, versions.c.number)
    )
    rows = connection.execute(query).all()
    if not rows:
        return []
    named: dict[str, list[str]] = {}
    for row in connection.execute(sa.select(aliases).order_by(aliases.c.alias)):
        named.setdefault(row.adapter, []).append(row.alias)
    flags = flags_among(connection, [row.adapter for row in rows])
    return [
        Version(
            row.adapter, row.name, row.number, row.state, row.verdict, row.override,
            (*([PRODUCTION] if row.state == PRODUCTION else []), *named.get(row.adapter, ())),
            tuple(flags.get(row.adapter, ())), row.at,
        )
        for row in rows
    ]  # fmt: skip


def resolve(connection: Connection, reference: str) -> Version:
    """The one version that ``reference`` means; :class:`InputError` if none or several do."""
    found = list_versions(connection, _condition(reference))
    if len(found) == 1:
        return found[0]
    if found:
        raise InputError(
            "the reference means several versions", where=reference, got=", ".join(v.ref for v in found),
            fix="write NAME:NUMBER, NAME@ALIAS or more of the hash",
        )  # fmt: skip
    name = re.split("[@:]", reference)[0]
    known = sorted(set(connection.execute(sa.select(versions.c.name)).scalars()))
    if name in known:
        there = list_versions(connection, versions.c.name == name)
        got = ", ".join(f"{v.ref} ({v.state})" for v in there[-8:])
        what = "which version of it?" if name == reference else "no such version"
        raise InputError(
            what, where=reference, expected=f"{name}:NUMBER, {name}@production, @latest or another alias", got=got
        )
    raise InputError(
        "no such adapter in the registry", where=reference, expected="NAME:NUMBER, NAME@ALIAS or a content hash",
        fix=nearest(name, known) or "`tunegate registry list` shows all",
    )  # fmt: skip


def aliased(found: Iterable[Version], alias: str) -> Version | None:
    """What ``NAME@alias`` means, as :func:`resolve` reads it, among all versions of that name."""
    if alias == LATEST:
        return max((v for v in found if v.state != RETIRED), key=lambda v: v.number, default=None)
    return next((v for v in found if alias in v.aliases), None)


def last_event(connection: Connection) -> int:
    """The number of the last change; as long as it stays, nothing in the registry has another meaning."""
    return connection.execute(sa.select(sa.func.max(events.c.seq))).scalar() or 0


def is_reference(text: str) -> bool:
    """Whether ``text`` has the form of a reference to a version."""
    name, at, alias = text.partition("@")
    if at:
        return bool(NAME.fullmatch(name) and NAME.fullmatch(alias))
    name, colon, number = text.partition(":")
    if colon and _NUMBER.fullmatch(number):
        return bool(NAME.fullmatch(name))
    return _hash_prefix(text) is not None


def _condition(reference: str) -> Any:
    name, at, alias = reference.partition("@")
    if at:
        if alias == PRODUCTION:
            return (versions.c.name == name) & (versions.c.state == PRODUCTION)
        if alias == LATEST:
            newest = sa.select(sa.func.max(versions.c.number)).where(
                versions.c.name == name, versions.c.state != RETIRED
            )
            return (versions.c.name == name) & (versions.c.number == newest.scalar_subquery())
        one = sa.select(aliases.c.adapter).where(aliases.c.name == name, aliases.c.alias == alias)
        return versions.c.adapter == one.scalar_subquery()
    name, colon, number = reference.partition(":")
    if colon and _NUMBER.fullmatch(number):
        return (versions.c.name == name) & (versions.c.number == int(number))
    prefix = _hash_prefix(reference)
    return versions.c.adapter.startswith(prefix) if prefix else sa.false()


def _hash_prefix(text: str) -> str | None:
    digits = text.removeprefix("b3:")
    return f"b3:{digits}" if re.fullmatch(f"[0-9a-f]{{{_SHORTEST},64}}", digits) else None


# --- entities ----------------------------------------------------------------------------------------------------


def insert(connection: Connection, found: Iterable[Entity], links: Iterable[Edge], at: str) -> None:
    """Add the facts that are not there yet. :class:`InputError` if an id is known as another kind of thing."""
    found, links = list(found), set(links)
    there = check_kinds(connection, found)
    new = {
        e.id: {"id": e.id, "kind": e.kind, "name": e.name, "body": canonical_json(e.body), "at": at}
        for e in reversed(found)  # of two with one id the first is kept
        if e.id not in there
    }
    if new:
        connection.execute(entities.insert(), list(new.values()))
    known = sa.select(edges).where(edges.c.child.in_({link.child for link in links}))
    links -= {Edge(row.child, row.parent, row.role) for row in connection.execute(known)}
    if links:
        connection.execute(edges.insert(), [vars(link) for link in links])


def check_kinds(connection: Connection, found: Iterable[Entity]) -> set[str]:
    """The ids that are there already; :class:`InputError` if one is of another kind there, or of two kinds here."""
    found = list(found)
    query = sa.select(entities.c.id, entities.c.kind).where(entities.c.id.in_({entity.id for entity in found}))
    kinds = dict(connection.execute(query).tuples().all())
    there = set(kinds)
    for entity in found:
        if (known := kinds.setdefault(entity.id, entity.kind)) != entity.kind:
            raise InputError(
                "one hash for two things", where=entity.id, expected=f"a {known}, as which it is known",
                got=f"a {entity.kind}, {entity.name}", fix="the card is wrong: judge the adapter again (tunegate gate)",
            )  # fmt: skip
    return there


def is_known(connection: Connection, id: str) -> bool:
    return connection.execute(sa.select(entities.c.id).where(entities.c.id == id)).first() is not None


def read_entity(connection: Connection, id: str) -> Entity:
    return read_entities(connection, entities.c.id == id)[id]


def read_entities(connection: Connection, condition: Any) -> dict[str, Entity]:
    """The entities of which ``condition`` holds, by id, in the order of their names."""
    rows = connection.execute(sa.select(entities).where(condition).order_by(entities.c.name, entities.c.id))
    return {row.id: Entity(row.id, row.kind, row.name, json.loads(row.body)) for row in rows}


def find_entity(connection: Connection, text: str) -> Entity:
    """What ``text`` names: a version's reference, a base's name, or the beginning of any entity's hash."""
    base = connection.execute(sa.select(base_names.c.base).where(base_names.c.name == text)).scalar()
    if base is not None:
        return read_entity(connection, base)
    if prefix := _hash_prefix(text):
        ids = connection.execute(sa.select(entities.c.id).where(entities.c.id.startswith(prefix)).limit(3)).scalars()
        found = list(ids)
        if len(found) == 1:
            return read_entity(connection, found[0])
        what = "the beginning of several hashes" if found else "nothing in the registry has this hash"
        raise InputError(what, where=text, got=", ".join(found), fix="write more of it" if found else _SHOWN)
    named = connection.execute(sa.select(versions.c.name).where(versions.c.name == text)).first()
    if named is None and not is_reference(text):
        bases = sorted(connection.execute(sa.select(base_names.c.name)).scalars())
        raise InputError(
            "no such base or adapter in the registry", where=text,
            expected="a base's name, NAME:NUMBER, NAME@ALIAS or a content hash",
            fix=nearest(text, bases) or _SHOWN,
        )  # fmt: skip
    return read_entity(connection, resolve(connection, text).adapter)


def history(connection: Connection, id: str) -> list[Event]:
    """What happened to ``id``, oldest first."""
    rows = connection.execute(sa.select(events).where(events.c.subject == id).order_by(events.c.seq))
    return [Event(row.what, row.who, row.at, row.why) for row in rows]


# --- flags -------------------------------------------------------------------------------------------------------


def flags_of(connection: Connection, id: str) -> tuple[str, ...]:
    """Why ``id`` (an adapter, a base, anything) is flagged, a line for each superseded base; empty if it is not."""
    return tuple(flags_among(connection, [id]).get(id, ()))


def flags_among(connection: Connection, ids: Sequence[str]) -> dict[str, list[str]]:
    """Flagged ids among ``ids`` with their reasons: the superseded bases from which a chain of edges leads there."""
    old = superseded.c.old
    fresh = sa.select(superseded.c.new).where(superseded.c.new.not_in(sa.select(old)))
    reached = sa.select(old.label("id"), old.label("base")).cte("flagged", recursive=True)
    reached = reached.union(
        sa.select(edges.c.child, reached.c.base)
        .join(reached, edges.c.parent == reached.c.id)
        .where(edges.c.child.not_in(fresh))
    )
    name_old, name_new = entities.alias(), entities.alias()
    query = (
        sa.select(reached.c.id, name_old.c.name, name_new.c.name.label("by"), superseded)
        .join(superseded, superseded.c.old == reached.c.base)
        .join(name_old, name_old.c.id == superseded.c.old)
        .join(name_new, name_new.c.id == superseded.c.new)
        .order_by(superseded.c.at)
    )
    wanted, found = set(ids), dict[str, list[str]]()
    for row in connection.execute(query):
        if row.id in wanted:
            text = (
                f"base {row.name} {shown(row.old)} was superseded by {row.by} {shown(row.new)} on {row.at[:10]} "
                f"by {row.who}: {row.why}"
            )
            found.setdefault(row.id, []).append(text)
    return found


def shown(id: str) -> str:
    """A hash as people read it."""
    return id[:15]
