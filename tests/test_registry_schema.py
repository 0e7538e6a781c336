"""The registry's schema: built by the migrations, upgraded from a golden one, refused where it is newer or older."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from registry_fixtures import Place
from registry_folders import adapter_folder
from tunegate.errors import InputError
from tunegate.registry import database, tables
from tunegate.registry.adding import add
from tunegate.registry.entries import list_versions
from tunegate.registry.intake import read_folder
from tunegate.registry.opening import Registry, _place, open_registry
from tunegate.registry.upkeep import verify

GOLDEN = Path(__file__).parent / "golden_registry_0001.sql"
NEXT = """
import sqlalchemy as sa
from alembic import op
revision, down_revision = "0002", "0001"
def upgrade():
    op.add_column("tg_versions", sa.Column("extra", sa.Text()))
"""


def engine_of(place: Place) -> sa.Engine:
    url, folder = _place(place.where)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    return sa.create_engine(url, poolclass=sa.pool.NullPool)


def run(place: Place, *statements: str) -> None:
    with engine_of(place).begin() as connection:
        for statement in statements:
            connection.exec_driver_sql(statement)


def golden(place: Place) -> None:
    """A registry of revision 0001 at ``place``, by hand-written SQL."""
    text = "\n".join(line for line in GOLDEN.read_text().splitlines() if not line.startswith("--"))
    if place.store is None:
        text = text.replace("SERIAL", "INTEGER")
    run(place, *filter(str.strip, text.split(";")))


def dump(place: Place) -> dict[str, Any]:
    """Every table with its columns, keys, indices and rows."""
    engine = engine_of(place)
    look, found = sa.inspect(engine), {}
    with engine.connect() as connection:
        for table in sorted(look.get_table_names()):
            columns = [(c["name"], str(c["type"]), c["nullable"]) for c in look.get_columns(table)]
            keys = look.get_pk_constraint(table)
            foreign = sorted(
                (f["name"], f["constrained_columns"], f["referred_table"]) for f in look.get_foreign_keys(table)
            )
            unique = sorted((u["name"], u["column_names"]) for u in look.get_unique_constraints(table))
            indexes = sorted((i["name"], i["column_names"], bool(i["unique"])) for i in look.get_indexes(table))
            rows = sorted(map(repr, connection.exec_driver_sql(f"SELECT * FROM {table}")))
            found[table] = (columns, keys["constrained_columns"], keys["name"], foreign, unique, indexes, rows)
    return found


def test_migrations_build_the_tables_that_the_code_knows(registry: Registry) -> None:
    from alembic.autogenerate import compare_metadata
    from alembic.config import Config
    from alembic.migration import MigrationContext
    from alembic.script import ScriptDirectory

    with registry.database.reading() as connection:
        context = MigrationContext.configure(connection, opts={"version_table": tables.VERSION_TABLE})
        assert compare_metadata(context, tables.metadata) == []
    config = Config()
    config.set_main_option("script_location", str(database.MIGRATIONS))
    found = [script.revision for script in ScriptDirectory.from_config(config).walk_revisions()]
    assert tuple(reversed(found)) == database.REVISIONS


def test_the_first_schema_becomes_the_present_one(place: Place, tmp_path: Path) -> None:
    """A golden database, upgraded, has the tables of a new one, and works."""
    golden(place)
    registry = open_registry(place.where, create=True, upgrade=True, store=place.store)
    from alembic.autogenerate import compare_metadata
    from alembic.migration import MigrationContext

    with registry.database.reading() as connection:
        context = MigrationContext.configure(connection, opts={"version_table": tables.VERSION_TABLE})
        assert compare_metadata(context, tables.metadata) == []
    old = {table: parts[:-1] for table, parts in dump(place).items()}
    if place.store is None:
        other = Place(str(tmp_path / "new"), None)
        other.open()
        assert old == {table: parts[:-1] for table, parts in dump(other).items()}
    add(registry, read_folder(adapter_folder(tmp_path / "a", 1)))
    assert verify(registry).problems == []


def later(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """From here on the code knows a second revision."""
    shutil.copytree(database.MIGRATIONS, folder, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "versions" / "m0002_next.py").write_text(NEXT)
    monkeypatch.setattr(database, "MIGRATIONS", folder)
    monkeypatch.setattr(database, "REVISIONS", ("0001", "0002"))


def test_an_older_schema_is_upgraded_by_init_alone(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(place.open(), read_folder(adapter_folder(tmp_path / "a", 1)))
    before = dump(place)
    later(monkeypatch, tmp_path / "migrations")
    for create in (False, True):  # `registry add` and a run create one too
        with pytest.raises(InputError, match="older schema"):
            open_registry(place.where, create=create, store=place.store)
    assert dump(place) == before
    registry = open_registry(place.where, create=True, upgrade=True)  # on PostgreSQL too without being told the store
    assert [c[0] for c in dump(place)["tg_versions"][0]][-1] == "extra"
    with registry.database.reading() as connection:
        assert [v.ref for v in list_versions(connection)] == ["support:1"]
    assert verify(registry).problems == []


@pytest.mark.parametrize("how", [{}, {"create": True}, {"create": True, "upgrade": True}])
def test_a_newer_schema_is_refused_and_unchanged(place: Place, how: dict[str, bool]) -> None:
    golden(place)
    run(place, "UPDATE tg_schema SET version_num = '9999'", "ALTER TABLE tg_files ADD COLUMN extra TEXT")
    before = dump(place)
    file = Path(str(_place(place.where)[0].database)) if place.store is None else None
    data = file.read_bytes() if file else b""
    with pytest.raises(InputError, match="newer tunegate") as error:
        open_registry(place.where, store=place.store, **how)
    assert "schema 9999" in str(error.value) and "pip install -U tunegate" in str(error.value)
    assert dump(place) == before
    if file:
        assert file.read_bytes() == data and [p.name for p in file.parent.iterdir()] == [file.name]


def test_a_server_whose_transactions_see_an_old_snapshot(place: Place, tmp_path: Path) -> None:
    """Where PostgreSQL's default is SERIALIZABLE, a writer that waited for the lock must still see what the other
    wrote."""
    import threading

    if place.store is None:
        pytest.skip("SQLite has no such setting")
    place.open()
    where = f"{place.where}?options=-c%20default_transaction_isolation%3Dserializable"
    intakes = [read_folder(adapter_folder(tmp_path / f"{n}", n)) for n in range(6)]
    errors: list[BaseException] = []

    def work(n: int) -> None:
        try:
            add(open_registry(where), intakes[n])
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
