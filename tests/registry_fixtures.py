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
    """The name of a database with the tables and nothing in them, to be copied."""
    name = _new_database(postgres_server)
    _make_tables(f"{postgres_server}/{name}")
    return name


@pytest.fixture(scope="session")
def made_sqlite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with the tables and nothing in them, to be copied."""
    path = tmp_path_factory.mktemp("made") / "registry.db"
    _make_tables(f"sqlite:///{path}")
    return path


def _make_tables(url: str) -> None:
    from tunegate.registry.database import Database, parse_url

    Database(parse_url(url), url).create()


def _new_database(server: str, template: str = "template1") -> str:
    import psycopg

    name = f"test_{next(_numbers)}"
    with psycopg.connect(f"{server.replace('+psycopg', '')}/postgres", autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name} TEMPLATE {template}")
    return name


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
    server = request.getfixturevalue("postgres_server")
    name = _new_database(server, request.getfixturevalue("made_postgres") if made else "template1")
    return Place(f"{server}/{name}", str(tmp_path / "blobs"))


@pytest.fixture
def registry(place: Place) -> Registry:
    return place.open()
