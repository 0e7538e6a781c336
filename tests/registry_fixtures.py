"""Registries for tests: on SQLite, and on PostgreSQL where it is installed."""

from __future__ import annotations

import importlib.util
import itertools
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


@pytest.fixture(params=["sqlite", "postgresql"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    """A place without a registry yet, once for each kind of database."""
    if request.param == "sqlite":
        return Place(str(tmp_path / "registry"), None)
    import psycopg

    server, name = request.getfixturevalue("postgres_server"), f"test_{next(_numbers)}"
    with psycopg.connect(f"{server.replace('+psycopg', '')}/postgres", autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
    return Place(f"{server}/{name}", str(tmp_path / "blobs"))


@pytest.fixture
def registry(place: Place) -> Registry:
    return place.open()
