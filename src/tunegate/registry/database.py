"""A registry's database: SQLite or PostgreSQL, one writer at a time, readers on a snapshot.

A write transaction begins with the writer's lock (``BEGIN IMMEDIATE``; an advisory lock on PostgreSQL), so what it
reads stays true until it commits. Writes are short: bytes are uploaded outside of them. A reader sees what was
committed when it began, whole, and waits for nobody. A connection to PostgreSQL is kept for the next transaction; a
forked process makes its own.

The schema's version is asked at every opening. A newer one is refused; an older one is brought up to date by
`tunegate registry init` alone, because that shuts out older tunegates. Asking changes nothing in the file. SQLite needs
a file system with working locks: machines that share a registry share a PostgreSQL.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import URL, Connection, Engine, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, SQLAlchemyError

from tunegate.errors import InputError, TunegateError, without_secrets
from tunegate.registry.tables import VERSION_TABLE, events

REVISIONS = ("0001",)  # of migrations/versions, oldest first
MIGRATIONS = Path(__file__).parent / "migrations"
WAIT_SECONDS = 60  # for the writer's lock
_WRITERS_LOCK = 0x74756E65  # "tune": the advisory lock's key
CLOCK_TOLERANCE = 60  # seconds that two machines' clocks may differ


class Database:
    """``shown`` is the URL without its password."""

    def __init__(self, url: URL, shown: str):
        self.shown = shown
        self.engine = _engine(url)
        self._process = os.getpid()

    @contextlib.contextmanager
    def reading(self) -> Iterator[Connection]:
        """One snapshot for everything read inside."""
        with self._connected() as connection:
            if self._is_postgres:
                connection = connection.execution_options(isolation_level="REPEATABLE READ")
            with connection.begin():
                yield connection

    @contextlib.contextmanager
    def writing(self) -> Iterator[Connection]:
        """A transaction that no other writer runs beside; undone on any error."""
        with self._connected() as connection:
            connection = connection.execution_options(write=True)
            if self._is_postgres:  # a snapshot from before the lock was had, as a server may have for default, is stale
                connection = connection.execution_options(isolation_level="READ COMMITTED")
            with connection.begin():
                if self._is_postgres:
                    connection.execute(sa.text(f"SET LOCAL lock_timeout = '{WAIT_SECONDS}s'"))
                    connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_WRITERS_LOCK)))
                yield connection

    @contextlib.contextmanager
    def _connected(self) -> Iterator[Connection]:
        if self._process != os.getpid():  # two processes on one connection would read one another's answers
            self.engine.dispose(close=False)
            self._process = os.getpid()
        with self._explained(), self.engine.connect() as connection:
            yield connection

    @property
    def _is_postgres(self) -> bool:
        return self.engine.dialect.name == "postgresql"

    def create(self, *, upgrade: bool = False) -> None:
        """Make the tables where there are none; ``upgrade`` brings an older schema up to date. Processes that start
        together wait for one another."""
        from alembic import command
        from alembic.config import Config

        if self.check(may_be_older=upgrade):
            return
        self._journal_apart()
        with self.writing() as connection:
            if self._check(connection, may_be_older=upgrade):
                return
            config = Config()
            config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
            config.attributes["connection"] = connection
            command.upgrade(config, REVISIONS[-1])

    def check(self, *, may_be_older: bool = False) -> bool:
        """Whether there is a registry of this schema; :class:`InputError` if its schema is newer, or older and may not
        be."""
        with self.reading() as connection:
            return self._check(connection, may_be_older=may_be_older) is not None

    def has_tables(self) -> bool:
        """Whether there is a registry, of any schema."""
        with self.reading() as connection:
            return sa.inspect(connection).has_table(VERSION_TABLE)

    def _journal_apart(self) -> None:
        """SQLite's write-ahead log, with which readers and the writer do not wait for one another. The file remembers
        it, so it is set before there are tables and never again."""
        if self._is_postgres:
            return
        with self._explained(), contextlib.closing(self.engine.raw_connection()) as connection:
            connection.cursor().execute("PRAGMA journal_mode=WAL")

    def _check(self, connection: Connection, *, may_be_older: bool) -> str | None:
        """The schema's version; None where there is none, or an older one that may be."""
        if not sa.inspect(connection).has_table(VERSION_TABLE):
            return None
        found = connection.execute(sa.text(f"SELECT version_num FROM {VERSION_TABLE}")).scalar()
        if found not in REVISIONS:
            raise InputError(
                "the registry was written by a newer tunegate",
                where=self.shown,
                expected=f"schema {REVISIONS[-1]} or older",
                got=f"schema {found}",
                fix="update tunegate (pip install -U tunegate)",
            )
        if found == REVISIONS[-1]:
            return str(found)
        if may_be_older:
            return None
        raise InputError(
            "the registry has an older schema",
            where=self.shown,
            expected=f"schema {REVISIONS[-1]}",
            got=f"schema {found}",
            fix="`tunegate registry init` brings it up to date; older tunegates cannot read it then",
        )

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except (DBAPIError, sqlite3.Error) as error:
            text = without_secrets(" ".join(str(getattr(error, "orig", error)).split()))
            busy = "locked" in text or "lock timeout" in text
            fix = (
                "another process holds the registry: try again"
                if busy
                else "check the URL, the server and the disk; nothing of this command was written"
            )
            raise TunegateError("the registry's database refuses", where=self.shown, got=text, fix=fix) from error


def parse_url(text: str) -> URL:
    """``sqlite:///FILE`` or ``postgresql+psycopg://...``; :class:`InputError` for anything else."""
    url: URL | None = None
    with contextlib.suppress(ArgumentError, ValueError):
        url = make_url(text)
    if url is None or url.get_backend_name() not in ("sqlite", "postgresql"):
        raise InputError(
            "not a registry",
            where=without_secrets(text),
            expected="default, a folder, sqlite:///FILE or postgresql+psycopg://USER@HOST/DATABASE",
        )
    if url.get_backend_name() == "postgresql" and url.drivername != "postgresql+psycopg":
        url = url.set(drivername="postgresql+psycopg")
    return url


def _engine(url: URL) -> Engine:
    how: dict[str, Any] = {"pool_size": 1, "max_overflow": -1, "pool_pre_ping": True}  # kept, more, asked before use
    if url.get_backend_name() == "sqlite":  # opening a file costs little, and a file may be replaced
        how = {"poolclass": sa.pool.NullPool, "connect_args": {"timeout": WAIT_SECONDS}}
    try:
        engine = sa.create_engine(url, **how)
    except ModuleNotFoundError as error:
        raise InputError(
            "the driver for PostgreSQL is not installed", fix="pip install 'tunegate[registry-postgres]'"
        ) from error
    except SQLAlchemyError as error:
        raise InputError("not a registry's URL", got=str(error)) from error
    if url.get_backend_name() == "sqlite":
        sa.event.listen(engine, "connect", _prepare_sqlite)
        sa.event.listen(engine, "begin", _begin_sqlite)
    return engine


def _prepare_sqlite(connection: Any, record: Any) -> None:
    del record
    connection.isolation_level = None  # transactions are begun below, not by the driver
    for line in ("synchronous=FULL", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {line}")


def _begin_sqlite(connection: Connection) -> None:
    writes = connection.get_execution_options().get("write")
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def stamp(connection: Connection) -> str:
    """The time of a write, as :func:`clock` has it: never before the last one.

    :class:`TunegateError` if the clock is further behind than machines may differ.
    """
    now = clock(connection)
    last = connection.execute(sa.select(events.c.at).order_by(events.c.seq.desc()).limit(1)).scalar()
    if last is None or last <= now:
        return now
    ahead = datetime.datetime.fromisoformat(last) - datetime.datetime.fromisoformat(now)
    if ahead.total_seconds() > CLOCK_TOLERANCE:
        raise TunegateError(
            "the clock is behind the registry's last entry",
            where="the server's clock" if connection.dialect.name == "postgresql" else "this machine's clock",
            expected=f"a time after {last}",
            got=now,
            fix="nothing was written. Set the clock; or, if it is right and was ahead when that entry was made: "
            "tunegate registry clock --why WHY",
        )
    return str(last)


def clock(connection: Connection) -> str:
    """The time, UTC, ISO 8601 with microseconds: of the PostgreSQL server, which has one clock for all machines, or of
    this machine."""
    now = datetime.datetime.now(datetime.timezone.utc)
    if connection.dialect.name == "postgresql":
        now = connection.execute(sa.select(sa.func.clock_timestamp())).scalar_one().astimezone(datetime.timezone.utc)
    return now.isoformat(timespec="microseconds")


def record(connection: Connection, subject: str, what: str, who: str, why: str, at: str | None = None) -> str:
    """Add an event; returns its time."""
    at = at or stamp(connection)
    connection.execute(events.insert().values(subject=subject, what=what, who=who, at=at, why=why))
    return at
