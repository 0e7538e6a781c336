"""Registries for tests: on SQLite, and on PostgreSQL where it is installed."""

from __future__ import annotations

import importlib.util
import itertools
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest

from services import postgres, postgres_programs

if TYPE_CHECKING:  # imported for every test: nothing that takes time
    from tunegate.registry.opening import Registry

_numbers = itertools.count()


class Place(NamedTuple):
    """Where a registry is or will be."""

    where: str
    store: str | None

    def open(self, who: str = "tester") -> Registry:
        from tunegate.registry.opening import open_registry

        return open_registry(self.where, create=True, store=self.store, who=who)


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[str]:
    programs = postgres_programs()
    if programs is None or importlib.util.find_spec("psycopg") is None:
        pytest.skip("PostgreSQL or psycopg is not installed")
    with postgres(programs) as url:
        yield url


@pytest.fixture(scope="session")
def made_postgres(postgres_server: str) -> str:
    """A database with the tables, to be emptied before each test: making one takes many times as long."""
    url = _new_database(postgres_server)
    _make_tables(url)
    return url


@pytest.fixture(scope="session")
def made_sqlite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with the tables and nothing in them, to be copied."""
    path = tmp_path_factory.mktemp("made") / "registry.db"
    _make_tables(f"sqlite:///{path}")
    return path


def _make_tables(url: str) -> None:
    from tunegate.registry.database import Database, parse_url

    Database(parse_url(url), url).create()


def _new_database(server: str) -> str:
    url = f"{server}/test_{next(_numbers)}"
    _on_postgres(f"{server}/postgres", f"CREATE DATABASE {url.rpartition('/')[2]}")
    return url


def _on_postgres(url: str, statement: str) -> None:
    import psycopg

    with psycopg.connect(url.replace("+psycopg", ""), autocommit=True) as connection:
        connection.execute(statement)


def _emptied(url: str) -> str:
    from tunegate.registry.tables import metadata

    _on_postgres(url, "; ".join(f"DELETE FROM {table.name}" for table in reversed(metadata.sorted_tables)))
    return url


@pytest.fixture(params=["sqlite", "postgresql"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    """A place without a registry yet, once for each kind of database; for a test of ``registry`` its tables are there,
    because building them by migrations takes longer than most tests."""
    made = "registry" in request.fixturenames
    if request.param == "sqlite":
        folder = tmp_path / "registry"
        if made:
            folder.mkdir()
            shutil.copyfile(request.getfixturevalue("made_sqlite"), folder / "registry.db")
        return Place(str(folder), None)
    if made:
        return Place(_emptied(request.getfixturevalue("made_postgres")), str(tmp_path / "blobs"))
    return Place(_new_database(request.getfixturevalue("postgres_server")), str(tmp_path / "blobs"))


@pytest.fixture
def registry(place: Place) -> Registry:
    return place.open()
