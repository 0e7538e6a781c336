"""Bytes under their BLAKE3 hash, on any file system that fsspec knows.

A file is cut into parts of :data:`PART` bytes and each part is one object, ``<root>/<2 hex>/<62 hex>``. So an upload
that was cut off goes on after its last whole part, and equal parts are stored once. An object appears whole or not at
all: by rename on a local disk, by the put itself on S3, Google and Azure. After each put the object is read back and
hashed; one that is there already is read and hashed too, so that adding an adapter again mends a damaged store.

It knows nothing of adapters, and deletes only what it is told to.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from tunegate import files
from tunegate.errors import InputError, TunegateError

PART = 64 << 20  # bytes
_HASH = re.compile(r"b3:[0-9a-f]{64}")
STORES = {"s3": "s3fs", "gs": "gcsfs", "az": "adlfs"}  # extras, and the modules that they bring
_EXTRAS = {"s3": "s3", "gs": "gs", "gcs": "gs", "az": "az", "abfs": "az"}  # by scheme


def is_hash(value: Any) -> bool:
    return isinstance(value, str) and _HASH.fullmatch(value) is not None


class Store:
    """``url``: a local folder or ``s3://BUCKET/PREFIX``, ``gs://``, ``az://``, whatever fsspec opens."""

    def __init__(self, url: str):
        self.url = url
        self.fs, self.root = open_filesystem(url)
        self.local = Path(self.root) if is_local(self.fs) else None

    def put(self, digest: str, data: bytes) -> bool:
        """Store ``data``, whose hash is ``digest``; True if it was not there. Read back and compared either way."""
        path = self._path(digest)
        if self._holds(path, digest, len(data)):
            return False
        with self._explained(path):
            if self.local is not None:
                files.write_bytes(path, data)
            else:
                self.fs.pipe_file(path, data)
        if not self._holds(path, digest, len(data)):
            raise TunegateError(
                "the store does not give back what was written", where=path, fix="check the store, then run again"
            )
        return True

    def get(self, digest: str) -> bytes:
        """The bytes of ``digest``; :class:`TunegateError` if they are missing or changed."""
        path = self._path(digest)
        data = self._read(path)
        if data is None:
            raise TunegateError("the store has lost a part", where=path, fix=_MEND)
        if (found := files.hash_bytes(data)) != digest:
            raise TunegateError("the store's bytes have changed", where=path, expected=digest, got=found, fix=_MEND)
        return data

    def delete(self, digest: str) -> int:
        """Remove an object if it is there; returns its size in bytes."""
        path = self._path(digest)
        with self._explained(path):
            try:
                size = int(self.fs.size(path) or 0)
                self.fs.rm_file(path)
            except FileNotFoundError:
                return 0
        return size

    def hashes(self) -> Iterator[str]:
        """Every object in the store. Files of other names are left out."""
        with self._explained(self.root):
            self.fs.invalidate_cache()
            try:
                found = self.fs.find(self.root)
            except FileNotFoundError:
                return
        for path in found:
            first, _, rest = path.removeprefix(self.root).strip("/").partition("/")
            if is_hash(digest := f"b3:{first}{rest}") and len(first) == 2:
                yield digest

    def remove_temporaries(self, seconds: float) -> None:
        """What writers that were killed more than so many ``seconds`` ago left on a local disk."""
        for left in self.local.glob(f"*/{files.TEMPORARY_PREFIX}*") if self.local is not None else ():
            with contextlib.suppress(FileNotFoundError):
                if left.stat().st_mtime < time.time() - seconds:
                    left.unlink()

    def _path(self, digest: str) -> str:
        if not is_hash(digest):
            raise InputError("not a content hash", got=repr(digest)[:100], expected="b3: and 64 hex digits")
        return f"{self.root}/{digest[3:5]}/{digest[5:]}"

    def _holds(self, path: str, digest: str, size: int) -> bool:
        data = self._read(path)
        return data is not None and len(data) == size and files.hash_bytes(data) == digest

    def _read(self, path: str) -> bytes | None:
        with self._explained(path):
            try:
                return bytes(self.fs.cat_file(path))
            except (FileNotFoundError, IsADirectoryError):
                return None

    def _explained(self, path: str) -> AbstractContextManager[None]:
        return explained(path, local=self.local is not None)


_MEND = "add the adapter again from a whole copy: what is missing or damaged is written anew"


@contextlib.contextmanager
def explained(where: str, *, local: bool) -> Iterator[None]:
    """Turn a file system's own errors into one of ours; those of a local disk keep their advice."""
    with files.explain_os_error(Path(where)) if local else contextlib.nullcontext():
        try:
            yield
        except TunegateError:
            raise
        except Exception as error:
            if local:
                raise
            raise TunegateError(
                "the store cannot be reached or refuses",
                where=where,
                got=f"{type(error).__name__}: {error}",
                fix="check the address and the credentials; the same command goes on from there",
            ) from error


def is_local(fs: Any) -> bool:
    protocols = (fs.protocol,) if isinstance(fs.protocol, str) else fs.protocol
    return "file" in protocols


def open_filesystem(url: str) -> tuple[Any, str]:
    """fsspec's file system for ``url`` and the path on it, without a slash at its end."""
    import fsspec

    scheme = url.partition("://")[0] if "://" in url else "file"
    try:
        fs, root = fsspec.core.url_to_fs(url if "://" in url else str(Path(url).expanduser().absolute()))
    except ImportError as error:
        extra = _EXTRAS.get(scheme)
        fix = f"pip install 'tunegate[{extra}]'" if extra else f"install what fsspec asks for: {error}"
        raise InputError(f"{scheme}:// needs a package that is not installed", where=url, fix=fix) from error
    except ValueError as error:
        fix = "s3://, gs://, az:// or a folder"
        raise InputError("no such kind of store", where=url, got=str(error), fix=fix) from error
    return fs, str(root).rstrip("/")
