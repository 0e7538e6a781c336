"""Bases: known by fingerprint, named by people, superseded by one another.

A name means one base. Adding another base under a name that is taken is an error; saying that it supersedes the old one
moves the name, and from that moment everything made from the old base is flagged, whoever reads it and however long the
chain is. The old base and its adapters stay, with their records.

A base that was merged or quantized says so (``model.origin``), and the edges to what it was made from are entered with
it. What a card says of a base that is known already adds nothing to it: only its own folder does (`base add`).
"""

from __future__ import annotations

import json
from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from tunegate.errors import InputError, Problem
from tunegate.files import canonical_json
from tunegate.model.origin import MERGED
from tunegate.registry.database import record, stamp
from tunegate.registry.entries import (
    CLAIMS,
    RETIRED,
    Edge,
    Entity,
    Version,
    find_entity,
    flags_among,
    flags_of,
    insert,
    is_known,
    is_reference,
    list_versions,
    read_entities,
    shown,
)
from tunegate.registry.opening import Registry
from tunegate.registry.tables import base_names, edges, entities, superseded, versions

LONGEST_NAME = 400
_LISTED = "`tunegate registry base list` shows all"


@dataclass(frozen=True)
class BaseEntry:
    """``names`` are those that mean it now; ``adapters`` counts versions trained on it, ``recipes`` how it was
    quantized for them; ``superseded_by`` is a fingerprint."""

    base: Entity
    names: tuple[str, ...]
    adapters: int
    recipes: tuple[str, ...]
    superseded_by: str | None
    flags: tuple[str, ...]


def name_problem(connection: Connection, base: Entity, flag: str = "--base-name") -> Problem | None:
    """Why ``base`` cannot go by its name: another base has it. A base that is known already keeps its names. ``flag``
    gives it another one."""
    if (problem := _form_problem(base.name)) or is_known(connection, base.id):
        return problem
    taken = _meaning(connection, base.name)
    if taken is None or taken == base.id:
        return None
    return Problem(
        "another base has this name", base.name, taken, base.id,
        f"if it takes the old one's place: tunegate registry base supersede {taken[:15]} NEW --why WHY; "
        f"if it is another base: {flag} NAME",
    )  # fmt: skip


def _form_problem(name: str) -> Problem | None:
    got = repr(name)[:120]
    if len(name) > LONGEST_NAME or not name.isprintable() or not name.strip():
        expected = f"at most {LONGEST_NAME} letters that can be printed"
        return Problem("not a name for a base", got=got, expected=expected, fix="give another name")
    if is_reference(name):  # wherever a base or a version can be named, it would be taken for that base
        expected = "a name that is not NAME:NUMBER, NAME@ALIAS or six hex digits and more"
        return Problem("a base's name must not read like a version or a hash", "", expected, got, "give another name")
    return None


def _meaning(connection: Connection, name: str) -> str | None:
    return connection.execute(sa.select(base_names.c.base).where(base_names.c.name == name)).scalar()


def claim_name(connection: Connection, base: Entity) -> None:
    """Let the name mean ``base``, unless a name of it is known or another base has that name."""
    known = sa.select(base_names.c.name).where(sa.or_(base_names.c.base == base.id, base_names.c.name == base.name))
    if connection.execute(known).first() is None:
        _give_name(connection, base.name, base.id)


def _give_name(connection: Connection, name: str, base: str) -> None:
    connection.execute(base_names.insert().values(name=name, base=base))
    _link_claims(connection, name, base)


def _link_claims(connection: Connection, name: str, base: str) -> None:
    """Edges to ``base`` from the adapters without a card that claim its ``name`` and came before it was known."""
    linked = sa.select(edges.c.child).where(edges.c.role == CLAIMS)
    query = sa.select(entities.c.id, entities.c.body).where(
        entities.c.kind == "adapter", entities.c.id.not_in(linked), entities.c.body.contains('"claims":"')
    )
    for id, body in connection.execute(query).tuples().all():
        if json.loads(body).get("claims") == name:
            connection.execute(edges.insert().values(child=id, parent=base, role=CLAIMS))


def enter_origin(connection: Connection, base: Entity, at: str) -> None:
    """The bases that ``base`` says it was made from, and edges to them and to the adapters in it that are known."""
    child, origin = base.id, base.body.get("origin")
    while origin is not None:
        said = origin["base"]
        body = {"name": said["name"], "fingerprint": {"total": said["fingerprint"]}, "origin": said.get("origin")}
        parent = Entity(said["fingerprint"], "base", said["name"], body)
        if problem := _form_problem(parent.name):
            raise InputError(problem)
        parts = [a["id"] for a in origin["adapters"] if is_known(connection, a["id"])]
        edges_of = [Edge(child, parent.id, origin["how"]), *(Edge(child, part, MERGED) for part in parts)]
        insert(connection, [parent], edges_of, at)
        claim_name(connection, parent)
        child, origin = parent.id, said.get("origin")


def merged_into(connection: Connection, adapter: str) -> list[Edge]:
    """From the known bases that say they were merged from ``adapter``, which may come later than they did."""
    query = sa.select(entities.c.id, entities.c.body).where(
        entities.c.kind == "base", entities.c.body.contains(adapter)
    )
    origins = {row.id: json.loads(row.body).get("origin") or {} for row in connection.execute(query)}
    return [
        Edge(base, adapter, MERGED)
        for base, origin in origins.items()
        if any(part["id"] == adapter for part in origin.get("adapters", ()))
    ]


def add_base(registry: Registry, base: Entity) -> bool:
    """Enter ``base`` under its name, a further name for one that is known, and what its folder says it was made from;
    False if its name was known."""
    with registry.database.writing() as connection:
        problem, taken = name_problem(connection, base, "--name"), _meaning(connection, base.name)
        if problem is None and taken not in (None, base.id):
            problem = Problem("another base has this name", base.name, str(taken), base.id, "give another --name")
        if problem:
            raise InputError(problem)
        at = stamp(connection)
        insert(connection, [base], [], at)
        enter_origin(connection, base, at)
        if taken == base.id:
            _link_claims(connection, base.name, base.id)
        else:
            _give_name(connection, base.name, base.id)
        what = "added again" if taken == base.id else f"named {base.name}"  # either may have brought edges, so flags
        record(connection, base.id, what, registry.who, "", at)
    return taken is None


def supersede(registry: Registry, old: str, new: Entity, *, why: str) -> list[Version]:
    """``new`` takes the place and the names of the base ``old``; returns the versions in use that this flags."""
    if not why.strip():
        what = "say why: the reason is shown with every adapter that this flags"
        raise InputError(what, where="--why", fix='--why "WHAT CHANGED"')
    with registry.database.writing() as connection:
        before = find_entity(connection, old)
        _refuse(connection, before, new)
        flagged = {v.adapter for v in list_versions(connection) if v.flags}
        at = stamp(connection)
        free = _meaning(connection, new.name) is None
        insert(connection, [new], [], at)
        enter_origin(connection, new, at)
        if free:
            _give_name(connection, new.name, new.id)
        connection.execute(base_names.update().where(base_names.c.base == before.id).values(base=new.id))
        connection.execute(superseded.insert().values(old=before.id, new=new.id, who=registry.who, at=at, why=why))
        record(connection, before.id, f"superseded by {new.id}", registry.who, why, at)
        record(connection, new.id, f"supersedes {before.id}", registry.who, why, at)
        in_use = list_versions(connection, versions.c.state != RETIRED)
        return [v for v in in_use if v.flags and v.adapter not in flagged]


def _refuse(connection: Connection, old: Entity, new: Entity) -> None:
    if old.kind != "base":
        raise InputError("not a base", where=old.id, got=old.kind, fix=_LISTED)
    if old.id == new.id:
        raise InputError(
            "a base does not supersede itself", where=new.name, got=new.id, fix="name another as the new one"
        )
    known = dict(connection.execute(sa.select(superseded.c.old, superseded.c.new)).tuples().all())
    if old.id in known:
        fix = "supersede that one, if it has a successor too"
        raise InputError("the base was superseded before", where=old.name, got=f"by {known[old.id]}", fix=fix)
    after: str | None = new.id
    while after is not None:
        after = known.get(after)
        if after == old.id:
            what = "the new base was itself superseded by the old one"
            raise InputError(what, where=new.name, got=new.id, fix=f"name a base that is neither; {_LISTED}")
    if problem := _form_problem(new.name):
        raise InputError(problem)
    taken = _meaning(connection, new.name)
    if taken not in (None, old.id, new.id):
        raise InputError("a third base has this name", where=new.name, got=str(taken), fix="give another --name")


def list_bases(connection: Connection) -> list[BaseEntry]:
    """Every base, by name, with what it became."""
    names: dict[str, list[str]] = {}
    for row in connection.execute(sa.select(base_names).order_by(base_names.c.name)):
        names.setdefault(row.base, []).append(row.name)
    taken = dict(connection.execute(sa.select(superseded.c.old, superseded.c.new)).tuples().all())
    trained = sa.select(edges.c.parent, sa.func.count()).where(edges.c.role == "trained on").group_by(edges.c.parent)
    adapters: dict[str, int] = dict(connection.execute(trained).tuples().all())
    recipes = _recipes(connection)
    found = read_entities(connection, entities.c.kind == "base")
    flags = flags_among(connection, list(found))
    return [
        BaseEntry(
            base, tuple(names.get(id, ())), adapters.get(id, 0), tuple(sorted(recipes.get(id, ()))), taken.get(id),
            tuple(flags.get(id, ())),
        )
        for id, base in found.items()
    ]  # fmt: skip


def _recipes(connection: Connection) -> dict[str, set[str]]:
    """How each base was quantized in the runs on it."""
    query = sa.select(edges.c.parent, entities.c.body).join(entities, entities.c.id == edges.c.child)
    found: dict[str, set[str]] = {}
    for base, body in connection.execute(query.where(edges.c.role == "ran on")).tuples():
        recipe = json.loads(body).get("recipe")
        found.setdefault(base, set()).add("none" if recipe is None else canonical_json(recipe))
    return found


def check_base(registry: Registry, fingerprint: str, what: str = "used") -> None:
    """:class:`InputError` if the base with this fingerprint is in the registry and flagged; an unknown one is not."""
    with registry.database.reading() as connection:
        flags = flags_of(connection, fingerprint)
    if flags:
        raise InputError(
            f"the base is flagged in the registry: {'; '.join(flags)}",
            where=f"{shown(fingerprint)} in {registry.database.shown}",
            fix=f"train on the new base; an adapter of a flagged base is not {what}",
        )
