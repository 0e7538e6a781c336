"""A plain layout on any store, for readers that know nothing of registries.

::

    TARGET/NAME/NUMBER/          the adapter's files
    TARGET/NAME/NUMBER/registry.json    which version it is, state, decision, base; written last: then it is whole
    TARGET/NAME/ALIAS.json       {"number", "adapter"} of the aliases that the version has now

Files that lie there already are compared and left; every file is read back. An alias that the version had when it was
published before and has no more is taken away there too.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tunegate import files
from tunegate.errors import InputError, TunegateError
from tunegate.files import hash_bytes
from tunegate.registry.entries import Version
from tunegate.registry.publish.published import Published
from tunegate.registry.pulling import PROVENANCE
from tunegate.registry.store import explained, is_local, open_filesystem


def publish(item: Published, target: str) -> dict[str, Any]:
    fs, root = open_filesystem(target)
    version = item.version
    address = f"{root}/{version.name}/{version.number}"
    _refuse_another(fs, f"{address}/{PROVENANCE}", version.adapter)
    written = sum(_write(fs, f"{address}/{path.name}", path.read_bytes()) for path in item.paths)
    _write(fs, f"{address}/{PROVENANCE}", _json(item.provenance))
    for alias in version.aliases:
        told = {"number": version.number, "adapter": version.adapter}
        _write(fs, f"{root}/{version.name}/{alias}.json", _json(told))
    _withdraw(fs, f"{root}/{version.name}", version)
    return {
        "address": address if is_local(fs) else f"{target.rstrip('/')}/{version.name}/{version.number}",
        "files": len(item.paths),
        "written": written,
    }


def _json(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode("utf-8")


def _read(fs: Any, path: str) -> bytes | None:
    with explained(path, local=is_local(fs)):
        try:
            return bytes(fs.cat_file(path))
        except (FileNotFoundError, IsADirectoryError):
            return None


def _adapter_in(data: bytes | None) -> str | None:
    """The adapter that a file there is about; None if there is no file."""
    try:
        return None if data is None else str(json.loads(data).get("adapter"))
    except (ValueError, AttributeError):
        return "something that is no record"


def _withdraw(fs: Any, folder: str, version: Version) -> None:
    """Remove the pointers to ``version`` of aliases that it does not have."""
    with explained(folder, local=is_local(fs)):
        fs.invalidate_cache()
        there = [str(path) for path in fs.ls(folder, detail=False)]
    for path in there:
        alias = path.rpartition("/")[2].removesuffix(".json")
        if path.endswith(".json") and alias not in version.aliases and _adapter_in(_read(fs, path)) == version.adapter:
            with explained(path, local=is_local(fs)):
                fs.rm_file(path)


def _refuse_another(fs: Any, path: str, adapter: str) -> None:
    found = _adapter_in(_read(fs, path))
    if found not in (None, adapter):
        raise InputError(
            "another adapter was published there", where=path, expected=adapter, got=str(found),
            fix="publish to another place: two registries gave the same number",
        )  # fmt: skip


def _write(fs: Any, path: str, data: bytes) -> int:
    """Bytes written: none where the file is there already."""
    if _read(fs, path) == data:
        return 0
    with explained(path, local=is_local(fs)):
        if is_local(fs):
            files.write_bytes(Path(path), data)
        else:
            fs.pipe_file(path, data)
    if (found := _read(fs, path)) != data:
        raise TunegateError(
            "the store does not give back what was written", where=path, expected=hash_bytes(data),
            got="nothing" if found is None else hash_bytes(found), fix="check the store, then run again",
        )  # fmt: skip
    return len(data)
