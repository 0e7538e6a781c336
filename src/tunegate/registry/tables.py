"""The registry's tables. Facts are added and never changed; only a version's state and an alias move.

::

    entities    one row a base, dataset, run, evaluation, decision or adapter; the id is the hash of what it is
    edges       child was made from parent, and how: lineage in both directions
    versions    an adapter under a name and a number, with its state
    files       which parts, by hash, an adapter's files are made of
    aliases     NAME@ALIAS; NAME@production is no row, it is the version in that state (a unique index allows one)
    base_names  the base that a name means now
    superseded  a base that another took the place of; everything made from it is flagged by a query, so at once
    events      who did what, when and why; ``seq`` is the order
    pins        parts that a running upload counts on; `gc` leaves them

The migrations in ``migrations/`` build exactly these tables; a test compares the two.
"""

from __future__ import annotations

from sqlalchemy import Column, ForeignKey, Index, Integer, MetaData, String, Table, Text, UniqueConstraint
from sqlalchemy.types import BigInteger

VERSION_TABLE = "tg_schema"

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_name)s",
        "uq": "uq_%(table_name)s_%(column_0_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s",
        "pk": "pk_%(table_name)s",
    }
)


def _id(name: str, *, key: bool = False, null: bool = False) -> Column[str]:
    """A reference to an entity."""
    return Column(name, String(80), ForeignKey("tg_entities.id"), primary_key=key, nullable=null)


entities = Table(
    "tg_entities",
    metadata,
    Column("id", String(80), primary_key=True),
    Column("kind", String(16), nullable=False, index=True),
    Column("name", Text, nullable=False),
    Column("body", Text, nullable=False),  # canonical JSON
    Column("at", String(32), nullable=False),
)

edges = Table(
    "tg_edges",
    metadata,
    _id("child", key=True),
    _id("parent", key=True),
    Column("role", String(24), primary_key=True),
    Index("ix_tg_edges_parent", "parent"),
)

versions = Table(
    "tg_versions",
    metadata,
    _id("adapter", key=True),
    Column("name", String(100), nullable=False),
    Column("number", Integer, nullable=False),
    Column("state", String(16), nullable=False),
    Column("verdict", String(16)),  # of the gate; NULL: never judged
    Column("override", Text),  # why it was approved against the gate
    UniqueConstraint("name", "number", name="uq_tg_versions_number"),
)
_in_production = versions.c.state == "production"
Index(
    "uq_tg_versions_production",
    versions.c.name,
    unique=True,
    sqlite_where=_in_production,
    postgresql_where=_in_production,
)

files = Table(
    "tg_files",
    metadata,
    _id("adapter", key=True),
    Column("path", String(400), primary_key=True),
    Column("part", Integer, primary_key=True),
    Column("hash", String(80), nullable=False, index=True),
    Column("size", BigInteger, nullable=False),  # bytes
)

aliases = Table(
    "tg_aliases",
    metadata,
    Column("name", String(100), primary_key=True),
    Column("alias", String(100), primary_key=True),
    _id("adapter"),
)

base_names = Table("tg_base_names", metadata, Column("name", String(400), primary_key=True), _id("base"))

superseded = Table(
    "tg_superseded",
    metadata,
    _id("old", key=True),
    _id("new"),
    Column("who", Text, nullable=False),
    Column("at", String(32), nullable=False),
    Column("why", Text, nullable=False),
)

events = Table(
    "tg_events",
    metadata,
    Column("seq", Integer, primary_key=True, autoincrement=True),
    _id("subject"),
    Column("what", Text, nullable=False),
    Column("who", Text, nullable=False),
    Column("at", String(32), nullable=False),
    Column("why", Text, nullable=False),
    Index("ix_tg_events_subject", "subject"),
)

pins = Table(
    "tg_pins",
    metadata,
    Column("hash", String(80), primary_key=True),
    Column("upload", String(40), primary_key=True),
    Column("at", String(32), nullable=False),
)

settings = Table(
    "tg_settings", metadata, Column("key", String(40), primary_key=True), Column("value", Text, nullable=False)
)
