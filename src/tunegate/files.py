"""Files that are whole or absent.

Every file is written to a temporary neighbour, flushed to disk and renamed over its name; the folder is
flushed too, so that a power cut leaves the old file or the new one. A folder is published the same way: built
under a temporary name, renamed when complete.

It does not lock: one process owns a run folder (see ``pipeline``).
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from blake3 import blake3

from tunegate.errors import TunegateError

TEMPORARY_PREFIX = ".tmp-"


def _flush_folder(folder: Path) -> None:
    if os.name == "nt":  # Windows cannot open a folder for fsync; the rename itself is journalled
        return
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextlib.contextmanager
def explain_os_error(path: Path) -> Iterator[None]:
    """Turn the operating system's refusals (full disk, read-only, no permission) into one clear error."""
    try:
        yield
    except OSError as error:
        hints = {
            errno.ENOSPC: "free some space, or choose another folder with `output:`",
            errno.EDQUOT: "the quota is used up: free some space, or choose another folder with `output:`",
            errno.EROFS: "the file system is read-only: choose another folder with `output:`",
            errno.EACCES: "no permission: choose another folder with `output:`, or change its owner",
            errno.EPERM: "no permission: choose another folder with `output:`, or change its owner",
            errno.ENOTDIR: "a part of the path is a file, not a folder",
        }
        if error.errno not in hints:
            raise
        raise TunegateError(
            f"cannot write: {error.strerror}",
            where=str(path),
            fix=hints[error.errno] + "; what was written before is whole, the same command goes on from there",
        ) from error


@contextlib.contextmanager
def atomic_path(path: Path | str) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on success it becomes ``path``, on any error it is removed."""
    path = Path(path)
    with explain_os_error(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        fd, name = tempfile.mkstemp(prefix=TEMPORARY_PREFIX, suffix=path.suffix, dir=path.parent)
        os.close(fd)
        temporary = Path(name)
        try:
            yield temporary
            with temporary.open("rb") as handle:
                os.fsync(handle.fileno())
            temporary.chmod(0o666 & ~_umask())
            temporary.replace(path)
            _flush_folder(path.parent)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_bytes(path: Path | str, data: bytes) -> None:
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: Path | str, text: str) -> None:
    write_bytes(path, text.encode("utf-8"))


def canonical_json(value: Any) -> str:
    """The one text of a JSON value that hashes are taken over: sorted keys, no spaces, UTF-8, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def write_json(path: Path | str, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, sort_keys=False, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path | str) -> Any:
    return json.loads(Path(path).read_text(encoding="utf-8"))


def write_jsonl(path: Path | str, rows: list[dict[str, Any]]) -> None:
    write_text(path, "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows))


def read_jsonl(path: Path | str) -> list[dict[str, Any]]:
    with Path(path).open(encoding="utf-8") as handle:
        return [json.loads(line) for line in handle if line.strip()]


def hash_bytes(data: bytes) -> str:
    """BLAKE3 as ``b3:<64 hex digits>``, the form of every content hash in tunegate."""
    return "b3:" + blake3(data).hexdigest()


def hash_json(value: Any) -> str:
    return hash_bytes(canonical_json(value).encode("utf-8"))


def hash_file(path: Path | str) -> str:
    hasher = blake3(max_threads=blake3.AUTO)
    hasher.update_mmap(str(path)) if Path(path).stat().st_size else None
    return "b3:" + hasher.hexdigest()


def home() -> Path:
    """``TUNEGATE_HOME``, default ``~/.cache/tunegate``: caches that can be deleted at any time."""
    return Path(os.environ.get("TUNEGATE_HOME", "~/.cache/tunegate")).expanduser()


def remove_temporaries(folder: Path) -> None:
    """Delete what a killed process left half-written below ``folder``."""
    import shutil

    for leftover in sorted(folder.rglob(TEMPORARY_PREFIX + "*"), reverse=True):
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)
