"""A file of keys: who may ask a server, how often, and for which models.

One JSON object a line. It holds the SHA-256 of each key and never the key: a key is 256 random bits, so nobody finds it
by trying, and a slow, salted hash as passwords need would only cost each request its time. A model is named by itself
or by a pattern (``support-*``). Lines are added and taken out; the others stay as they were written.

It keeps no count of requests (``guard`` does) and knows no users beside names.
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from tunegate.data.rows import JsonError, parse_json
from tunegate.errors import InputError, Problem, TunegateError, collecting, nearest
from tunegate.files import held, write_text

MAX_BYTES = 4 << 20
MOST = 10**9  # requests or tokens a minute
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,99}")
_HASH = re.compile(r"sha256:[0-9a-f]{64}")


@dataclass(frozen=True)
class Key:
    """``hash``: ``sha256:`` and 64 hex digits. Limits: None for none. ``models``: names and patterns, None for all.
    ``admin``: may load and unload adapters."""

    name: str
    hash: str
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    models: tuple[str, ...] | None = None
    admin: bool = False

    def may_use(self, model: str) -> bool:
        return self.models is None or any(fnmatchcase(model, pattern) for pattern in self.models)

    def limits(self) -> dict[str, Any]:
        """What it may do, without what is left at its default."""
        found: dict[str, Any] = {n: getattr(self, n) for n in _FIELDS[2:4] if getattr(self, n) is not None}
        found |= {} if self.models is None else {"models": list(self.models)}
        return found | ({"admin": True} if self.admin else {})

    def line(self) -> str:
        return json.dumps({"name": self.name, "hash": self.hash, **self.limits()}) + "\n"


_FIELDS = tuple(Key.__dataclass_fields__)


def make_key() -> str:
    """A new key of 256 random bits."""
    return "tg-" + secrets.token_urlsafe(32)


def hash_of(key: bytes) -> str:
    return "sha256:" + hashlib.sha256(key).hexdigest()


def read_keys(path: Path) -> list[Key]:
    """The keys in ``path``; :class:`InputError` with everything that is wrong, by line."""
    problems: list[Problem] = []
    found: list[tuple[str, Key]] = []
    for number, line in enumerate(_text(path).split("\n"), 1):
        if line.strip():
            where = f"{path}:{number}"
            with collecting(problems):
                found.append((where, _key(line, where)))
    for field, what in (("name", "the name stands twice"), ("hash", "two names have one key")):
        first: dict[str, str] = {}
        for where, key in found:
            value = getattr(key, field)
            if first.setdefault(value, where) != where:
                problems.append(Problem(what, where, got=value, fix=f"the first is {first[value]}"))
    if problems:
        raise InputError(problems)
    return [key for _, key in found]


def add_key(path: Path, key: Key) -> None:
    """Write ``key`` behind the others; the file is made if there is none. :class:`InputError` if the name is taken."""
    with _changing(path):
        line = key.line()
        _key(line, "the new key")
        text = _text(path) if path.exists() else ""
        if text and any(one.name == key.name for one in read_keys(path)):
            fix = f"`tunegate keys remove {key.name}` first, or another name"
            raise InputError("the name has a key", where=str(path), got=key.name, fix=fix)
        write_text(path, text + ("\n" if text and not text.endswith("\n") else "") + line)


def remove_key(path: Path, name: str) -> None:
    """Take out the line of ``name``; :class:`InputError` if there is none."""
    with _changing(path):
        keys = read_keys(path)
        if name not in (names := [key.name for key in keys]):
            raise InputError("no key of this name", where=str(path), got=name[:200], fix=nearest(name[:200], names))
        lines = _text(path).split("\n")
        write_text(path, "\n".join(line for line in lines if not line.strip() or parse_json(line)["name"] != name))


@contextmanager
def _changing(path: Path) -> Iterator[None]:
    busy = TunegateError("another process is writing this file", where=str(path), fix="try again")
    with held(path.with_name(f".{path.name}.lock"), busy):
        yield


def _text(path: Path) -> str:
    fix = "`tunegate keys add NAME --file FILE` makes one"
    try:
        with path.open("rb") as handle:
            data = handle.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise InputError("too large to be a file of keys", where=str(path), expected=f"at most {MAX_BYTES:,} bytes")
        return data.decode("utf-8")
    except OSError as error:
        raise InputError("no file of keys", where=str(path), got=error.strerror or str(error), fix=fix) from None
    except UnicodeDecodeError as error:
        raise InputError("not UTF-8 text", where=str(path), got=f"byte {data[error.start]:#04x}", fix=fix) from None


def _key(line: str, where: str) -> Key:
    """One line; :class:`InputError` with everything that is wrong. A value is not shown: it may be a key."""
    fix = "`tunegate keys add` writes such lines"
    try:
        value = parse_json(line)
    except JsonError as error:
        raise InputError("not a line of JSON", where=where, got=error.what, fix=fix) from None
    if not isinstance(value, dict):
        raise InputError("not a JSON object", where=where, fix=fix)
    problems = [
        Problem("unknown field", f"{where}: {n[:60]}", fix=nearest(n, _FIELDS)) for n in value if n not in _FIELDS
    ]
    problems += [Problem("the field is missing", f"{where}: {n}", fix=fix) for n in _FIELDS[:2] if n not in value]
    for name, (good, expected) in _CHECKS.items():
        if value.get(name) is not None and not good(value[name]):
            problems.append(Problem("not such a value", f"{where}: {name}", expected))
    if problems:
        raise InputError(problems)
    models = value.get("models")
    value |= {"models": None if models is None else tuple(models), "admin": bool(value.get("admin"))}
    return Key(**value)


def _is_limit(value: Any) -> bool:
    return type(value) is int and 1 <= value <= MOST


def _is_models(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, str) and 0 < len(one) <= 200 for one in value)


_CHECKS: dict[str, tuple[Any, str]] = {
    "name": (
        lambda v: isinstance(v, str) and _NAME.fullmatch(v),
        "letters, digits and . _ - @, a letter or digit first; at most 100",
    ),
    "hash": (lambda v: isinstance(v, str) and _HASH.fullmatch(v), "sha256: and 64 hex digits"),
    "requests_per_minute": (_is_limit, f"a whole number from 1 to {MOST:,}"),
    "tokens_per_minute": (_is_limit, f"a whole number from 1 to {MOST:,}"),
    "models": (_is_models, "a list of names and patterns"),
    "admin": (lambda v: isinstance(v, bool), "true or false"),
}
