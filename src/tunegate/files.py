"""Files that are whole or absent.

Every file is written to a temporary neighbour, flushed to disk and renamed over its name; the folder is
flushed too, so that a power cut leaves the old file or the new one. A folder is published the same way: built
under a temporary name, renamed when complete. What two processes must not write at once is held by a lock of the
system, which a dead process does not hold.

It does not say what is locked when: one process owns a run folder (see ``pipeline``).
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

from blake3 import blake3

from tunegate.errors import InputError, TunegateError, nearest

TEMPORARY_PREFIX = ".tmp-"
_PIECE = 16 << 20  # bytes read at a time for a hash
_MOST_VIEWS = 1024  # of one call to the system (IOV_MAX)
_THREADS_FROM = 1 << 20  # bytes: below this, handing work to other threads costs more than it saves


def flush_path(path: Path) -> None:
    """Have the bytes of a file, or the names in a folder, on the disk."""
    if os.name == "nt":  # Windows cannot open a folder for fsync; the rename itself is journalled
        return
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextlib.contextmanager
def explain_os_error(path: Path) -> Iterator[None]:
    """Turn the operating system's refusals (full disk, read-only, no permission) into one clear error."""
    try:
        yield
    except TunegateError:
        raise
    except Exception as error:
        number = error.errno if isinstance(error, OSError) else _os_error_of(error)
        if number not in _WAYS_OUT:
            raise
        place = "point TUNEGATE_HOME at another folder" if _below(path, home()) else "choose another folder"
        place += "" if _below(path, home()) else " (`output:` in the task file, or -o)"
        raise TunegateError(
            f"cannot write: {os.strerror(number)}",
            where=str(path),
            fix=f"{_WAYS_OUT[number].format(elsewhere=place)}; the same command goes on from what was finished before",
        ) from error


_WAYS_OUT = {
    errno.ENOSPC: "free some space, or {elsewhere}",
    errno.EDQUOT: "the quota is used up: free some space, or {elsewhere}",
    errno.EFBIG: "files of this size are not allowed here: raise the limit (ulimit -f), or {elsewhere}",
    errno.EROFS: "the file system is read-only: {elsewhere}",
    errno.EACCES: "change the permissions of the folder, or {elsewhere}",
    errno.EPERM: "change the permissions of the folder, or {elsewhere}",
    errno.ENOTDIR: "a part of the path is a file: {elsewhere}",
    errno.EEXIST: "a file stands where a folder is needed: {elsewhere}",
    errno.EISDIR: "a folder stands where a file is needed: {elsewhere}",
    errno.ENAMETOOLONG: "the path is too long: {elsewhere}",
    errno.EIO: "the disk reports an error: check it, or {elsewhere}",
    errno.ENOLCK: "the file system has no locks: {elsewhere}",
}


def _os_error_of(error: Exception) -> int | None:
    """The system's error number inside a safetensors error, which carries it as text only."""
    found = re.search(r"\(os error (\d+)\)", str(error)) if type(error).__name__ == "SafetensorError" else None
    return int(found[1]) if found else None


def _below(path: Path, folder: Path) -> bool:
    return path.absolute().is_relative_to(folder.absolute())


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
            flush_path(path.parent)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@contextlib.contextmanager
def held(path: Path, busy: TunegateError, *, stays: bool = False) -> Iterator[None]:
    """Hold the file ``path`` for this process alone; ``busy`` is raised if another one holds it. It goes afterwards,
    unless it ``stays``."""
    with explain_os_error(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = _locked(path, busy)
    try:
        yield
    finally:
        if not stays:
            with contextlib.suppress(OSError):  # Windows does not remove an open file
                path.unlink()
        handle.close()


def _locked(path: Path, busy: TunegateError) -> IO[bytes]:
    while True:
        handle = path.open("ab")
        try:
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(handle.fileno()), path.stat()):
                    return handle
        except ImportError:  # Windows: no flock; two processes are not told apart there
            return handle
        except BlockingIOError:
            handle.close()
            raise busy from None
        handle.close()  # its holder removed it between our two calls, so another may hold a new one


def partial_of(out: Path) -> Path:
    """The folder in which ``out`` grows until it is whole."""
    return out.with_name(f".{out.name}.partial")


@contextlib.contextmanager
def growing(out: Path) -> Iterator[Path]:
    """The folder in which ``out`` grows, for this process alone.

    :class:`TunegateError` if another process writes the same output, :class:`InputError` if one has written it.
    """
    what, fix = "another process is writing this output", "wait for it, or name another folder"
    with held(out.with_name(f".{out.name}.lock"), TunegateError(what, where=str(out), fix=fix)):
        if out.exists() or out.is_symlink():
            raise InputError("the output exists", where=str(out), fix="name another folder, or remove it")
        yield partial_of(out)


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


def update_json(path: Path | str, value: Any) -> bool:
    """Write ``value`` unless the file already holds it, so that a step done again leaves no trace. True if written."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        if canonical_json(read_json(path)) == canonical_json(value):
            return False
    write_json(path, value)
    return True


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
    with Path(path).open("rb") as handle:
        return "b3:" + digest(handle.fileno(), 0, os.fstat(handle.fileno()).st_size, path)


def digest(descriptor: int, start: int, end: int, path: Path | str) -> str:
    """BLAKE3 hex digest of a file's bytes from ``start`` to ``end``.

    All cores hash one piece while the next is read, by plain reads into two buffers: pages of a mapped file would count
    as the process's own memory. Errors as :func:`read_into`.
    """
    spans = [(at, min(_PIECE, end - at)) for at in range(start, end, _PIECE)]
    buffers = [memoryview(bytearray(min(_PIECE, end - start))) for _ in spans[:2]]
    hasher = blake3(max_threads=blake3.AUTO if end - start >= _THREADS_FROM else 1)

    def read(number: int) -> memoryview:
        at, size = spans[number]
        piece = buffers[number % 2][:size]
        read_into(descriptor, piece, at, path)
        return piece

    if len(spans) < 2:
        return hasher.update(read(0)).hexdigest() if spans else hasher.hexdigest()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(read, 0)
        for number in range(len(spans)):
            piece = waiting.result()
            if number + 1 < len(spans):
                waiting = pool.submit(read, number + 1)
            hasher.update(piece)
    return hasher.hexdigest()


def read_into(descriptor: int, view: memoryview, start: int, path: Path | str) -> None:
    """Fill ``view`` with the file's bytes from ``start``; :class:`InputError` naming ``path`` if it ends before."""
    done = 0
    while done < len(view):
        got = os.preadv(descriptor, [view[done:]], start + done)
        if got == 0:
            raise _shorter(path)
        done += got


def read_scattered(descriptor: int, views: Sequence[memoryview], start: int, path: Path | str) -> None:
    """:func:`read_into` of several views, one behind the other in the file, by as few calls as the system allows."""
    waiting = [view for view in views if len(view)]
    while waiting:
        got = os.preadv(descriptor, waiting[:_MOST_VIEWS], start)
        if got == 0:
            raise _shorter(path)
        start += got
        done = 0
        while done < len(waiting) and got >= len(waiting[done]):
            got -= len(waiting[done])
            done += 1
        waiting = waiting[done:]
        if got:
            waiting[0] = waiting[0][got:]


def _shorter(path: Path | str) -> InputError:
    return InputError("the file became shorter while it was read", where=str(path), fix="fetch it again")


def links_out(folder: Path) -> list[Path]:
    """Links in ``folder`` that lead out of it. A hub cache, where a snapshot's files are links to its blobs, is one
    place: ``models--x/snapshots/commit`` may point anywhere below ``models--x``."""
    real = folder.resolve()
    inside = real.parents[1] if real.parent.name == "snapshots" and (real.parents[1] / "blobs").is_dir() else real
    return sorted(p for p in folder.rglob("*") if p.is_symlink() and not p.resolve().is_relative_to(inside))


def nearest_folder(missing: Path) -> str:
    """The folders beside one that is not there whose names are near; empty if none is."""
    try:
        beside = sorted(p.name for p in missing.parent.iterdir() if p.is_dir())
    except (OSError, ValueError):  # also what no file can be called
        return ""
    return nearest(missing.name, beside, folder=missing.parent)


def home() -> Path:
    """``TUNEGATE_HOME``, default ``~/.cache/tunegate``: caches that can be deleted at any time, and below ``registry``
    the default registry, which is no cache."""
    return Path(os.environ.get("TUNEGATE_HOME") or "~/.cache/tunegate").expanduser()


def remove_temporaries(folder: Path) -> None:
    """Delete what a killed process left half-written below ``folder``."""
    import shutil

    for leftover in sorted(folder.rglob(TEMPORARY_PREFIX + "*"), reverse=True):
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)
