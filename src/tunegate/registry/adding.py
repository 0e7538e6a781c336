"""Adding an adapter: pin its parts, upload what is missing, then write every fact in one transaction.

::

    check      the folder alone, then against the registry: nothing is written before all is known to fit
    pin        one short write: these parts are spoken for, `gc` leaves them
    upload     parts the store has not got; each is verified by hash. No lock is held
    commit     entities, edges, files, version, event; pins go. Either all of it is there or none

A process killed anywhere leaves a registry without the adapter, some parts, and pins that run out: adding again goes
on from there. The same folder added twice, or by many at once, is one version.
"""

from __future__ import annotations

import datetime
import secrets
from dataclasses import dataclass
from pathlib import Path

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from tunegate.errors import InputError, TunegateError
from tunegate.files import hash_bytes
from tunegate.registry import store as stores
from tunegate.registry.bases import claim_name, enter_origin, merged_into, name_problem
from tunegate.registry.database import record, stamp
from tunegate.registry.entries import (
    CANDIDATE,
    CLAIMS,
    UNVERIFIED,
    Edge,
    Version,
    check_kinds,
    flags_of,
    insert,
    is_known,
    list_versions,
    read_entity,
)
from tunegate.registry.fitting import check_fits
from tunegate.registry.intake import Intake
from tunegate.registry.opening import Registry
from tunegate.registry.tables import base_names, files, pins, versions

PIN_HOURS = 24  # how long an upload may take


@dataclass(frozen=True)
class Added:
    """``new``: it was not there before. ``uploaded``: bytes that the store had not got. ``unchecked``: why a new one
    without a card was not compared with its base; empty if it was."""

    version: Version
    new: bool
    uploaded: int
    left_out: list[str]
    unchecked: str


@dataclass(frozen=True)
class _Part:
    path: str
    number: int
    hash: str
    size: int
    file: Path


def add(registry: Registry, intake: Intake, *, why: str = "") -> Added:
    """The version that ``intake`` is, as ``candidate``, or ``unverified`` without a card."""
    with registry.database.reading() as connection:
        there = _there(connection, intake)
        if there is None:
            _check(connection, intake)
    unchecked = ""
    if there is None and intake.base is None:
        unchecked = check_fits(registry, intake.folder, intake.claims) if intake.claims else "its config names no base"
    parts = [part for path, (file, digest) in sorted(intake.files.items()) for part in _parts(path, file, digest)]
    upload = secrets.token_hex(16)
    with registry.database.writing() as connection:
        at = stamp(connection)
        rows = [{"hash": digest, "upload": upload, "at": at} for digest in sorted({part.hash for part in parts})]
        connection.execute(pins.insert(), rows)
    uploaded = sum(_upload(registry.store, part) for part in parts)
    with registry.database.writing() as connection:
        kept = connection.execute(sa.select(sa.func.count()).where(pins.c.upload == upload)).scalar()
        if kept != len(rows):
            raise TunegateError(
                f"the upload took longer than {PIN_HOURS} hours, and `gc` ran meanwhile", fix="add it again"
            )
        connection.execute(pins.delete().where(pins.c.upload == upload))
        there = _there(connection, intake)
        if there is None:
            _check(connection, intake)
            _write(connection, registry.who, intake, parts, why)
        (version,) = list_versions(connection, versions.c.adapter == intake.id)
    return Added(version, there is None, uploaded, intake.left_out, unchecked)


def _there(connection: Connection, intake: Intake) -> Version | None:
    found = list_versions(connection, versions.c.adapter == intake.id)
    if found and found[0].name != intake.name:
        raise InputError(
            "the adapter is in the registry under another name", where=str(intake.folder), expected=found[0].ref,
            got=intake.name, fix=f"set an alias: tunegate registry alias {found[0].name}@ALIAS {found[0].ref}",
        )  # fmt: skip
    if found and intake.claims is not None:
        known = read_entity(connection, intake.id).body
        if intake.claims not in (known["claims"], known["config"].get("base_model_name_or_path")):
            raise InputError(
                "the adapter is in the registry as one of another base", where=found[0].ref,
                expected=str(known["claims"]), got=intake.claims, fix="leave --base-name out",
            )  # fmt: skip
    return found[0] if found else None


def _check(connection: Connection, intake: Intake) -> None:
    if intake.base is not None and (problem := name_problem(connection, intake.base)):
        raise InputError(problem)
    check_kinds(connection, intake.entities)


def _write(connection: Connection, who: str, intake: Intake, parts: list[_Part], why: str) -> None:
    at, edges = stamp(connection), list(intake.edges)
    if intake.claims is not None:
        base = connection.execute(sa.select(base_names.c.base).where(base_names.c.name == intake.claims)).scalar()
        edges += [Edge(intake.id, base, CLAIMS)] if base else []
    new_base = intake.base is not None and not is_known(connection, intake.base.id)
    insert(connection, intake.entities, [*edges, *merged_into(connection, intake.id)], at)
    if intake.base is not None:
        claim_name(connection, intake.base)
        if new_base:
            enter_origin(connection, intake.base, at)
    newest = sa.select(sa.func.max(versions.c.number)).where(versions.c.name == intake.name)
    number = (connection.execute(newest).scalar() or 0) + 1
    state = UNVERIFIED if intake.base is None else CANDIDATE
    connection.execute(
        versions.insert().values(
            adapter=intake.id, name=intake.name, number=number, state=state, verdict=intake.verdict
        )
    )
    rows = [{"adapter": intake.id, "path": p.path, "part": p.number, "hash": p.hash, "size": p.size} for p in parts]
    connection.execute(files.insert(), rows)
    source = f" from {intake.source}" if intake.source else ""
    record(connection, intake.id, f"added as {state}{source}", who, why, at)
    for flag in flags_of(connection, intake.id):
        record(connection, intake.id, f"incompatible from the start: {flag}", who, "", at)


def _parts(path: str, file: Path, digest: str) -> list[_Part]:
    """``file`` cut into the store's parts; :class:`TunegateError` if it is not the file that was checked."""
    from blake3 import blake3

    whole = blake3()
    parts: list[_Part] = []
    with file.open("rb") as handle:
        while data := handle.read(stores.PART):
            whole.update(data)
            parts.append(_Part(path, len(parts), hash_bytes(data), len(data), file))
    if f"b3:{whole.hexdigest()}" != digest:
        raise TunegateError("the file changed while it was read", where=str(file), fix="run again")
    return parts or [_Part(path, 0, hash_bytes(b""), 0, file)]


def _upload(store: stores.Store, part: _Part) -> int:
    with part.file.open("rb") as handle:
        handle.seek(part.number * stores.PART)
        data = handle.read(part.size)
    if hash_bytes(data) != part.hash:
        raise TunegateError("the file changed while it was read", where=str(part.file), fix="run again")
    return part.size if store.put(part.hash, data) else 0


def pin_horizon(at: str) -> str:
    """Pins from before this time have run out, at time ``at``."""
    return (datetime.datetime.fromisoformat(at) - datetime.timedelta(hours=PIN_HOURS)).isoformat(
        timespec="microseconds"
    )
