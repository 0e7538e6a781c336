"""candidate → approved → production → retired: who may go where, and that everybody sees it.

An adapter that the gate held can be approved only with a reason, and the reason is part of its standing from then on.
One that was never judged is ``unverified``: evaluating it makes a new version, a candidate. A flagged one cannot be
promoted. One version of a name is in production: promoting another puts it back to ``approved`` in the same
transaction, so that promoting it again is the way back. Retired is the end.
"""

from __future__ import annotations

from sqlalchemy.engine import Connection

from tunegate.errors import InputError
from tunegate.gate import SHIP
from tunegate.registry.database import record, stamp
from tunegate.registry.entries import (
    APPROVED,
    CANDIDATE,
    LATEST,
    NAME,
    PRODUCTION,
    RETIRED,
    STATES,
    UNVERIFIED,
    Version,
    list_versions,
    refuse_flagged,
    resolve,
)
from tunegate.registry.opening import Registry
from tunegate.registry.tables import aliases, versions

_NEXT = {CANDIDATE: APPROVED, APPROVED: PRODUCTION}
_NO_OVERRIDE = "leave --override out"


def promote(
    registry: Registry, reference: str, *, why: str, to: str | None = None, override: str | None = None
) -> Version:
    """Take the version one state further, or ``to`` approved or production. ``override``: why it is approved although
    the gate did not say ship."""
    with registry.database.writing() as connection:
        version = resolve(connection, reference)
        target = to or _NEXT.get(version.state, PRODUCTION)
        _refuse_promotion(version, target, why)
        at = stamp(connection)
        if version.state == CANDIDATE:
            _approve(connection, registry.who, version, why, override, at)
        elif override:
            raise InputError(
                "there is nothing to override",
                where=version.ref,
                expected=CANDIDATE,
                got=version.state,
                fix=_NO_OVERRIDE,
            )
        if target == PRODUCTION:
            for held in list_versions(connection, versions.c.name == version.name, versions.c.state == PRODUCTION):
                _set(connection, held, APPROVED)
                record(
                    connection, held.adapter, f"back to approved: {version.ref} took its place", registry.who, why, at
                )
            _set(connection, version, PRODUCTION)
            record(connection, version.adapter, PRODUCTION, registry.who, why, at)
        return resolve(connection, version.ref)


def _refuse_promotion(version: Version, target: str, why: str) -> None:
    if not why.strip():
        raise InputError("say why: the reason is kept", where="--why", fix='--why "REASON"')
    if version.state == UNVERIFIED:
        raise InputError(
            "the adapter is unverified: it has no card, so nothing says what it was made from or how it scored",
            where=version.ref,
            fix=f"tunegate registry evaluate {version.ref} TASK; an override does not help",
        )
    if version.state == RETIRED:
        raise InputError("the version is retired", where=version.ref, fix="add or train another")
    if version.state == PRODUCTION:
        raise InputError("it is in production already", where=version.ref, expected=f"{CANDIDATE} or {APPROVED}")
    if version.state == target:
        raise InputError(f"it is {target} already", where=version.ref)
    refuse_flagged(version, "promoted")


def _approve(connection: Connection, who: str, version: Version, why: str, override: str | None, at: str) -> None:
    ships = version.verdict == SHIP
    if ships and override:
        raise InputError("the gate says ship: there is nothing to override", where=version.ref, fix=_NO_OVERRIDE)
    if not ships and not (override or "").strip():
        raise InputError(
            f"the gate says {version.verdict}", where=version.ref, expected=SHIP,
            fix='--override "WHY" approves it all the same; the reason is shown wherever the adapter is',
        )  # fmt: skip
    connection.execute(
        versions.update().where(versions.c.adapter == version.adapter).values(state=APPROVED, override=override)
    )
    what = APPROVED if ships else f"approved although the gate says {version.verdict}, OVERRIDE: {override}"
    record(connection, version.adapter, what, who, why, at)


def retire(registry: Registry, reference: str, *, why: str) -> Version:
    """Take the version out of use for good; its aliases go."""
    if not why.strip():
        raise InputError("say why: the reason is kept", where="--why", fix='--why "REASON"')
    with registry.database.writing() as connection:
        version = resolve(connection, reference)
        if version.state == RETIRED:
            raise InputError("the version is retired already", where=version.ref)
        connection.execute(aliases.delete().where(aliases.c.adapter == version.adapter))
        _set(connection, version, RETIRED)
        dropped = "".join(f", no longer @{alias}" for alias in version.aliases)
        record(connection, version.adapter, f"retired from {version.state}{dropped}", registry.who, why)
        return resolve(connection, version.ref)


def set_alias(registry: Registry, alias: str, reference: str, *, why: str = "") -> Version:
    """Let ``NAME@ALIAS`` mean the version ``reference`` of the same name."""
    name, at, short = alias.partition("@")
    if not at or not NAME.fullmatch(name) or not NAME.fullmatch(short):
        raise InputError("not an alias", where=alias, expected="NAME@ALIAS, of letters, digits, . _ -")
    if short in (*STATES, LATEST):
        what = f"@{short} is a state, or follows from the versions' states"
        raise InputError(what, where=alias, fix="tunegate registry promote")
    with registry.database.writing() as connection:
        version = resolve(connection, reference)
        if version.name != name:
            raise InputError(
                "an alias is of the same name", where=alias, expected=f"a version of {name}", got=version.ref
            )
        if version.state == RETIRED:
            raise InputError("the version is retired", where=version.ref, fix="name one that is not")
        connection.execute(aliases.delete().where(aliases.c.name == name, aliases.c.alias == short))
        connection.execute(aliases.insert().values(name=name, alias=short, adapter=version.adapter))
        record(connection, version.adapter, f"named @{short}", registry.who, why)
        return resolve(connection, version.ref)


def _set(connection: Connection, version: Version, state: str) -> None:
    connection.execute(versions.update().where(versions.c.adapter == version.adapter).values(state=state))
