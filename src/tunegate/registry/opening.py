"""Which registry is meant, and opening it.

``default`` is a folder below ``TUNEGATE_HOME``; a folder holds ``registry.db`` (SQLite) and ``blobs/``. A PostgreSQL
registry is told once, at `tunegate registry init`, where its bytes go; the database remembers.
"""

from __future__ import annotations

import getpass
import os
import socket
from dataclasses import dataclass
from pathlib import Path

import sqlalchemy as sa

from tunegate import files
from tunegate.errors import InputError, without_secrets
from tunegate.registry.database import Database, parse_url
from tunegate.registry.store import Store
from tunegate.registry.tables import settings

VARIABLE = "TUNEGATE_REGISTRY"
_BLOBS, _DATABASE = "blobs", "registry.db"


@dataclass(frozen=True)
class Registry:
    """An open registry. ``who`` stands on everything that is written."""

    database: Database
    store: Store
    who: str


def chosen(where: str | None) -> str:
    """The registry that is meant: ``where``, else what TUNEGATE_REGISTRY says, else the default one."""
    return where or os.environ.get(VARIABLE) or "default"


def in_use(where: str | None) -> bool:
    """Whether a registry was named, by a flag or by TUNEGATE_REGISTRY."""
    return bool(where or os.environ.get(VARIABLE))


def open_registry(
    where: str | None = None, *, create: bool = False, upgrade: bool = False, store: str | None = None,
    who: str | None = None,
) -> Registry:  # fmt: skip
    """The registry at ``where`` (``default``, a folder, a database's URL). ``create`` makes one that is not there, with
    its bytes in ``store``; ``upgrade`` also brings an older schema up to date. :class:`InputError` if there is none, or
    its schema is another."""
    if store is not None and without_secrets(store) != store:
        raise InputError(
            "the registry remembers where its bytes are, and would keep the password", where=without_secrets(store),
            fix="an address without one; the store's own tools read credentials from the environment",
        )  # fmt: skip
    url, folder = _place(chosen(where))
    if folder is not None and not folder.joinpath(url.database or "").is_file():
        if not create:
            raise InputError("there is no registry yet", where=str(url.database), fix=_MAKE)
        with files.explain_os_error(folder):
            folder.mkdir(parents=True, exist_ok=True)
    database = Database(url, without_secrets(url.render_as_string(hide_password=True)))
    if create:
        if folder is None and store is None and not database.has_tables():
            raise _no_store(database)
        database.create(upgrade=upgrade)
    elif not database.check():
        raise InputError("there is no registry yet", where=database.shown, fix=_MAKE if folder else _MAKE_WITH_STORE)
    return Registry(database, Store(_settled_store(database, folder, store)), who or whoami())


_MAKE = "`tunegate registry init` or `tunegate registry add` makes one"
_MAKE_WITH_STORE = "tunegate registry init --registry URL --store s3://BUCKET/PREFIX (or a shared folder)"


def _no_store(database: Database) -> InputError:
    return InputError(
        "a registry on PostgreSQL needs a place for its bytes",
        where=database.shown,
        fix=_MAKE_WITH_STORE,
    )


def whoami() -> str:
    """``user@host``, or what TUNEGATE_USER says."""
    if name := os.environ.get("TUNEGATE_USER"):
        return name
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a user id without a name
        user = str(os.getuid())
    return f"{user}@{socket.gethostname()}"


def _place(where: str) -> tuple[sa.URL, Path | None]:
    """The database's URL and, for SQLite, the folder it lies in."""
    if "://" not in where:
        folder = files.home() / "registry" if where == "default" else Path(where).expanduser()
        folder = folder.absolute()
        return sa.URL.create("sqlite", database=str(folder / _DATABASE)), folder
    url = parse_url(where)
    if url.get_backend_name() != "sqlite":
        return url, None
    if not url.database or url.database == ":memory:":
        raise InputError("a registry is a file", where=where, expected="sqlite:///FILE")
    path = Path(url.database).absolute()
    return url.set(database=str(path)), path.parent


def _settled_store(database: Database, folder: Path | None, wanted: str | None) -> str:
    """The store that the database names; it is settled at the first opening. A relative one starts at ``folder``."""
    query = sa.select(settings.c.value).where(settings.c.key == "store")
    if wanted is not None and "://" not in wanted:
        wanted = str(Path(wanted).expanduser().absolute())
    with database.reading() as connection:
        known = connection.execute(query).scalar()
    if known is None:
        if folder is None and wanted is None:
            raise _no_store(database)
        with database.writing() as connection:
            known = connection.execute(query).scalar()
            if known is None:
                known = wanted or _BLOBS
                connection.execute(settings.insert().values(key="store", value=known))
    place = known if folder is None or "://" in known else str(folder / known)
    if wanted is not None and wanted.rstrip("/") not in (known.rstrip("/"), place):
        raise InputError("the registry keeps its bytes elsewhere", where=database.shown, expected=place, got=wanted)
    return place
