"""Proof that every byte and every record is what it was (`verify`), what nothing refers to removed (`gc`), and the way
on after a clock that was ahead (`clock`).

``gc`` takes the writer's lock for a batch at a time and deletes inside of it: an upload pins its parts under the same
lock before it looks whether they are there, so a part is never taken from under an adapter. Pins of uploads that were
killed run out after a day.

Order is that of the events' numbers; their dates are told and never changed. A date far ahead would refuse every entry
until it has come, so an entry can say that it was wrong: dates go on from that entry's own.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from blake3 import blake3
from sqlalchemy.engine import Connection

from tunegate import records
from tunegate.adapter.card import CARD
from tunegate.errors import InputError, Problem, TunegateError
from tunegate.files import hash_json
from tunegate.gate import SHIP
from tunegate.records import AdapterCard
from tunegate.registry.adding import PIN_HOURS, pin_horizon
from tunegate.registry.database import clock, record, stamp
from tunegate.registry.entries import APPROVED, PRODUCTION, Version, list_versions
from tunegate.registry.intake import id_of
from tunegate.registry.opening import Registry
from tunegate.registry.pulling import all_parts
from tunegate.registry.store import is_hash
from tunegate.registry.tables import edges, entities, events, files, pins

_BATCH = 100  # objects deleted under one lock, records read at a time
_RESTORE = "somebody wrote to the database: take it from a backup, or add the adapters to a new registry"


@dataclass(frozen=True)
class Verified:
    """Counts of what was hashed, and everything that is wrong."""

    adapters: int
    files: int
    bytes: int
    records: int
    problems: list[Problem]


def verify(registry: Registry) -> Verified:
    """Read and hash every part of every adapter and every record."""
    problems: list[Problem] = []
    records_read = files_read = bytes_read = 0
    with registry.database.reading() as connection:
        found = list_versions(connection)
        listed = all_parts(connection)
        parents: dict[str, set[tuple[str, str]]] = {}
        for edge in connection.execute(sa.select(edges).where(edges.c.role.in_(("judges", "trained on")))):
            parents.setdefault(edge.child, set()).add((edge.role, edge.parent))
        for row in connection.execution_options(yield_per=_BATCH).execute(sa.select(entities)):  # cards can be large
            records_read += 1
            problem = _record_problem(row.id, row.kind, _parsed(row.body), parents.get(row.id, set()))
            problems += [problem] if problem else []
    for version in found:
        parts, before = listed.get(version.adapter, {}), len(problems)
        with registry.database.reading() as connection:
            query = sa.select(entities.c.body).where(entities.c.id == version.adapter)
            body = _parsed(connection.execute(query).scalar_one())
        files_known = body.get("files")
        expected = files_known if isinstance(files_known, dict) else {}
        if missing := sorted(set(expected) - set(parts)):
            what = "the registry does not know the parts of a file"
            problems.append(Problem(what, version.ref, got=", ".join(missing), fix=_RESTORE))
        for path, digests in parts.items():
            files_read += 1
            problem, size = _file_problem(registry, version, path, digests, expected.get(path))
            bytes_read += size
            problems += [problem] if problem else []
        if len(problems) == before:
            card = b"".join(map(registry.store.get, parts.get(CARD, ())))
            problems += _card_problems(version, body.get("card"), card, parents.get(version.adapter, set()))
    return Verified(len(found), files_read, bytes_read, records_read, problems)


def _parsed(text: str) -> dict[str, object]:
    """A record's body; one that is no JSON object any more hashes to nothing that it could be."""
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    return found if isinstance(found, dict) else {"damaged": text}


def _file_problem(
    registry: Registry, version: Version, path: str, digests: list[str], expected: str | None
) -> tuple[Problem | None, int]:
    whole, size = blake3(), 0
    for digest in digests:
        try:
            data = registry.store.get(digest)
        except TunegateError as error:
            problem = error.problems[0]
            where = f"{version.ref} {path}: {problem.where}"
            return Problem(problem.what, where, problem.expected, problem.got, problem.fix), size
        whole.update(data)
        size += len(data)
    found = f"b3:{whole.hexdigest()}"
    if expected is not None and found != expected:
        return Problem("the parts do not make up the file", f"{version.ref} {path}", expected, found), size
    return None, size


def _record_problem(id: str, kind: str, body: dict[str, object], parents: set[tuple[str, str]]) -> Problem | None:
    """A record whose hash is not its id. A base and a dataset are named by what lies outside of the registry."""
    if kind in ("run", "eval"):
        found = hash_json(body)
    elif kind == "decision":
        judged = next((parent for role, parent in parents if role == "judges"), None)
        found = hash_json({"adapter": judged, **body})
    elif kind == "adapter":
        known = body.get("files")
        found = id_of(known) if isinstance(known, dict) else hash_json(body)
    else:
        return None if is_hash(id) else Problem("not a content hash", id, "b3: and 64 hex digits", id, _RESTORE)
    return None if found == id else Problem(f"the record of this {kind} has changed", id, id, found, _RESTORE)


def _card_problems(version: Version, told: Any, data: bytes, parents: set[tuple[str, str]]) -> list[Problem]:
    """Where the database says something else than the stored ``card.json``, ``data``: its copy of the card, the verdict
    that states follow from, the base that flags follow from."""
    if not data:
        verdict, base, same = None, [], told is None
    else:
        stored = json.loads(data)
        verdict, base = stored["decision"]["verdict"], [stored["base"]["fingerprint"]["total"]]
        same = told == stored or told == records.to_json(records.from_json(stored, AdapterCard, version.ref))
    bases = sorted(parent for role, parent in parents if role == "trained on")
    found = [] if same else [Problem("the record of this adapter has changed: its card", version.ref, fix=_RESTORE)]
    if version.verdict != verdict:
        found.append(
            Problem("the verdict is not the card's", version.ref, str(verdict), str(version.verdict), _RESTORE)
        )
    if bases != base:
        said = ", ".join(base) or "none", ", ".join(bases) or "none"
        found.append(Problem("the base is not the card's", version.ref, *said, _RESTORE))
    if version.state in (APPROVED, PRODUCTION) and version.verdict != SHIP and not version.override:
        what = f"the version is {version.state} and nobody gave a reason for an override"
        found.append(Problem(what, version.ref, SHIP, str(version.verdict), _RESTORE))
    return found


@dataclass(frozen=True)
class Collected:
    objects: int
    bytes: int
    pinned: int


def collect(registry: Registry) -> Collected:
    """Delete the objects that no adapter and no running upload needs."""
    there = sorted(registry.store.hashes())
    removed = freed = 0
    for start in range(0, len(there), _BATCH):
        batch = there[start : start + _BATCH]
        with registry.database.writing() as connection:
            connection.execute(pins.delete().where(pins.c.at < pin_horizon(stamp(connection))))
            needed = _needed(connection, batch)
            for digest in batch:
                if digest not in needed:
                    freed += registry.store.delete(digest)
                    removed += 1
    registry.store.remove_temporaries(PIN_HOURS * 3600)
    with registry.database.reading() as connection:
        pinned = connection.execute(sa.select(sa.func.count(pins.c.hash.distinct()))).scalar()
    return Collected(removed, freed, int(pinned or 0))


def _needed(connection: Connection, batch: list[str]) -> set[str]:
    used = connection.execute(sa.select(files.c.hash).where(files.c.hash.in_(batch))).scalars()
    pinned = connection.execute(sa.select(pins.c.hash).where(pins.c.hash.in_(batch))).scalars()
    return {*used, *pinned}


def trust_clock(registry: Registry, *, why: str) -> str:
    """Go on from the present time although the last entry is dated later; returns that later date.

    :class:`InputError` if it is not. Pins that were dated later too run out a day from now.
    """
    if not why.strip():
        raise InputError("say why: the reason is kept", where="--why", fix='--why "REASON"')
    with registry.database.writing() as connection:
        now = clock(connection)
        last = connection.execute(sa.select(events).order_by(events.c.seq.desc()).limit(1)).first()
        if last is None or last.at <= now:
            got = "no entry yet" if last is None else f"the last entry is of {last.at}, now is {now}"
            raise InputError("no entry is dated after the present time: there is nothing to go on from", got=got)
        record(connection, last.subject, f"dated {last.at} by a clock that was ahead", registry.who, why, now)
        connection.execute(pins.update().where(pins.c.at > now).values(at=now))
    return str(last.at)
