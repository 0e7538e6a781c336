"""From the registry to a folder: every part verified, the folder whole or absent.

A flagged adapter is refused. The folder also gets ``registry.json``: which version it is, its state, the gate's verdict
and an override, as they were when it was pulled, and where its task lay.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path, PurePosixPath
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from tunegate.errors import InputError, TunegateError
from tunegate.files import TEMPORARY_PREFIX, explain_os_error, flush_path, hash_file, home, write_json
from tunegate.registry.bases import check_base
from tunegate.registry.entries import Version, is_reference, read_entity, refuse_flagged, resolve, shown
from tunegate.registry.intake import EVIDENCE
from tunegate.registry.opening import Registry, in_use, open_registry
from tunegate.registry.tables import files

PROVENANCE = "registry.json"


def pull(registry: Registry, reference: str, out: Path, *, evidence: bool = False) -> Version:
    """Write the adapter's files, with ``evidence`` what its run left too, to ``out``, a folder that must not exist."""
    if out.exists() or out.is_symlink():
        raise _taken(out)
    version, parts, hashes = _plan(registry, reference)
    refuse_flagged(version, "pulled")
    with explain_os_error(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=TEMPORARY_PREFIX, dir=out.parent))
        try:
            for path, digests in parts.items():
                if evidence or not path.startswith(EVIDENCE):
                    _write(registry, partial / path, digests, hashes.get(path))
            noted = {"task_folder": recorded(registry, parts)}
            write_json(partial / PROVENANCE, provenance(registry, version) | noted)
            partial.chmod(0o755)
            _publish(partial, out)
            flush_path(out.parent)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    return version


def _taken(out: Path) -> InputError:
    return InputError("the folder exists", where=str(out), fix="name another, or remove it")


def _publish(partial: Path, out: Path) -> None:
    try:
        partial.rename(out)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        raise _taken(out) from None  # another process was faster


def materialize(registry: Registry, reference: str) -> Path:
    """A local folder with the adapter that ``reference`` means now, kept below ``TUNEGATE_HOME`` by content hash."""
    with registry.database.reading() as connection:
        version = resolve(connection, reference)
        hashes = read_entity(connection, version.adapter).body["files"]
    refuse_flagged(version, "used")
    out = home() / "pulled" / version.adapter.removeprefix("b3:")  # a copy: it can be deleted at any time
    if out.is_dir():
        if all((out / n).is_file() and hash_file(out / n) == h for n, h in hashes.items()):
            return out
        shutil.rmtree(out)
    try:
        pull(registry, version.adapter, out)
    except InputError:
        if not out.is_dir():  # else another process was faster, and its folder is whole
            raise
    return out


def provenance(registry: Registry, version: Version) -> dict[str, Any]:
    """What is said of a version wherever it goes."""
    with registry.database.reading() as connection:
        body = read_entity(connection, version.adapter).body
    card = body.get("card") or {}
    base = card.get("base") or {}
    return {
        **asdict(version),
        "ref": version.ref,
        "standing": version.standing,
        "base": {
            "name": base.get("name") or body.get("claims"),
            "fingerprint": (base.get("fingerprint") or {}).get("total"),
            "recipe": base.get("recipe"),
            "verified": bool(card),
        },
    }


def recorded(registry: Registry, parts: Mapping[str, Sequence[str]]) -> str | None:
    """The folder where the relative paths of the adapter's task start, as its run noted it; ``parts`` are its files."""
    begun = b"".join(registry.store.get(digest) for digest in parts.get(EVIDENCE + "run.json", ()))
    try:
        return str(json.loads(begun)["folder"])
    except (ValueError, KeyError, TypeError):
        return None


def _plan(registry: Registry, reference: str) -> tuple[Version, dict[str, list[str]], dict[str, str]]:
    """The version, its files as hashes of parts, and the hashes of the whole files that make up its id."""
    with registry.database.reading() as connection:
        version = resolve(connection, reference)
        parts = parts_of(connection, version.adapter)
        hashes = read_entity(connection, version.adapter).body["files"]
    for path in parts:
        if not _confined(path):
            raise TunegateError("the registry names a file outside of the adapter", where=version.ref, got=repr(path))
    return version, parts, hashes


def parts_of(connection: Connection, adapter: str) -> dict[str, list[str]]:
    """Path to hashes of its parts, in order."""
    return all_parts(connection, files.c.adapter == adapter).get(adapter, {})


def all_parts(connection: Connection, *conditions: Any) -> dict[str, dict[str, list[str]]]:
    """:func:`parts_of` every adapter."""
    query = sa.select(files).where(*conditions).order_by(files.c.adapter, files.c.path, files.c.part)
    found: dict[str, dict[str, list[str]]] = {}
    for row in connection.execute(query):
        found.setdefault(row.adapter, {}).setdefault(row.path, []).append(row.hash)
    return found


def _confined(path: str) -> bool:
    pure = PurePosixPath(path)
    return not pure.is_absolute() and ".." not in pure.parts and "\\" not in path and str(pure) == path


def _write(registry: Registry, path: Path, digests: list[str], expected: str | None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as handle:
        for digest in digests:
            handle.write(registry.store.get(digest))
        handle.flush()
        os.fsync(handle.fileno())
    if expected is not None and (found := hash_file(path)) != expected:
        raise TunegateError("the parts do not make up the file", where=path.name, expected=expected, got=found)


def adapter_folders(texts: Sequence[str], where: str | None, what: str, line: Callable[[str], None]) -> list[str]:
    """``texts`` with references to versions turned into local folders. A reference needs a registry; and where one is
    in use (named, or in TUNEGATE_REGISTRY), folders of a flagged base are refused like flagged versions."""
    named = [not Path(text).is_dir() and is_reference(text) for text in texts]
    if not any(named) and not in_use(where):
        return list(texts)
    registry = open_registry(where)
    found = [
        str(_announced(registry, text, line)) if reference else text
        for text, reference in zip(texts, named, strict=True)
    ]
    for folder in map(Path, found):
        if (folder / "card.json").exists():
            from tunegate.adapter.card import load_card

            check_base(registry, load_card(folder).base["fingerprint"]["total"], what)
    return found


def _announced(registry: Registry, reference: str, line: Callable[[str], None]) -> Path:
    with registry.database.reading() as connection:
        version = resolve(connection, reference)
    told = version.ref if reference == version.ref else f"{reference} is {version.ref}"
    line(f"{told} {shown(version.adapter)}, {version.standing}")
    return materialize(registry, version.adapter)
