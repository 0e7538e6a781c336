"""A base's identity by content: four BLAKE3 hashes and one over them.

``weights`` covers every tensor as (name, dtype, shape, digest of its bytes), in name order. One file or three
shards, whatever the order inside: the same tensors give the same hash. ``config`` covers config.json without
the keys that do not change the function computed (:data:`VOLATILE_CONFIG`); dtype is among them, because the
tensors carry their own. ``tokenizer`` covers the vocabulary files and the settings that change an encoding,
``template`` the chat template's text.

Files are read piece by piece (``files.digest``), and each tensor is hashed by all cores. Digests are kept per
file below ``TUNEGATE_HOME/fingerprints``, valid while path, size, modification time and inode are unchanged: a
file rewritten in place with its old time restored needs ``use_cache=False`` to be noticed.

It identifies; it does not judge: two configs that mean the same but are spelt differently have two hashes.
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blake3 import blake3

from tunegate import files
from tunegate.errors import InputError, TunegateError
from tunegate.model.weights import TensorEntry, load_object, read_header, tensors_of

VOLATILE_CONFIG = frozenset(
    {"_commit_hash", "_name_or_path", "dtype", "torch_dtype", "transformers_version", "use_cache"}
)
TOKENIZER_FILES = ("tokenizer.model", "vocab.json", "merges.txt", "vocab.txt", "tekken.json", "added_tokens.json")
TOKENIZER_SETTINGS = (
    *("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token"),
    *("additional_special_tokens", "extra_special_tokens", "added_tokens_decoder"),
    *("add_bos_token", "add_eos_token", "add_prefix_space", "do_lower_case", "legacy"),
    *("split_special_tokens", "spaces_between_special_tokens", "clean_up_tokenization_spaces"),
    "tokenizer_class",
)
NO_TEMPLATE = "none"

_SCHEMA = 1
_SETTLED_NS = 2_000_000_000  # a file changed this recently could change again within the clock's resolution


@dataclass(frozen=True)
class BaseFingerprint:
    """Hashes as ``b3:<hex>``; ``template`` is ``"none"`` for a base without a chat template."""

    weights: str
    config: str
    tokenizer: str
    template: str
    total: str


def fingerprint_base(path: Path, *, use_cache: bool = True) -> BaseFingerprint:
    """The fingerprint of a model folder. :class:`InputError` if its files are missing or not sound."""
    parts = {
        "weights": hash_weights(path, use_cache=use_cache),
        "config": hash_config(path),
        "tokenizer": hash_tokenizer(path),
        "template": hash_template(path),
    }
    return BaseFingerprint(**parts, total=files.hash_json(parts))


def hash_weights(folder: Path, *, use_cache: bool = True) -> str:
    """Hash over ``[name, dtype, shape, digest]`` of every tensor in name order."""
    rows: list[list[Any]] = []
    for path, entries in tensors_of(folder).items():
        digests = _file_digests(path, entries, use_cache)
        rows += [[e.name, e.dtype, list(e.shape), digests[e.name]] for e in entries]
    return files.hash_json(sorted(rows))


def _identity(path: Path) -> dict[str, Any]:
    stat = path.stat()
    return {
        "schema": _SCHEMA,
        "path": str(path.absolute()),
        "size": stat.st_size,
        "mtime_ns": stat.st_mtime_ns,
        "inode": stat.st_ino,
    }


def _file_digests(path: Path, entries: list[TensorEntry], use_cache: bool) -> dict[str, str]:
    """Tensor name -> hex digest of its bytes, from the cache or by hashing."""
    identity = _identity(path)
    cached = files.home() / "fingerprints" / (blake3(identity["path"].encode()).hexdigest(16) + ".json")
    if use_cache:
        known = _read_cache(cached, identity, entries)
        if known is not None:
            return known
    digests = digest_tensors(path, entries)
    if _identity(path) != identity or read_header(path) != entries:
        raise TunegateError("the file changed while it was read", where=str(path), fix="run again")
    if use_cache and time.time_ns() - identity["mtime_ns"] > _SETTLED_NS:
        # The cache only saves time: where it cannot be written, the next call hashes again.
        with contextlib.suppress(TunegateError, OSError):
            files.write_json(cached, {**identity, "digests": digests})
    return digests


def _read_cache(cached: Path, identity: dict[str, Any], entries: list[TensorEntry]) -> dict[str, str] | None:
    """The digests kept for exactly this file, or None: a damaged or foreign entry counts as none."""
    try:
        data = load_object(cached)
    except (OSError, InputError):
        return None
    digests = data.pop("digests", None)
    if data != identity or not isinstance(digests, dict) or set(digests) != {e.name for e in entries}:
        return None
    return digests if all(_is_digest(d) for d in digests.values()) else None


def _is_digest(value: Any) -> bool:
    return isinstance(value, str) and len(value) == 64 and set(value) <= set("0123456789abcdef")


def digest_tensors(path: Path, entries: list[TensorEntry]) -> dict[str, str]:
    """Tensor name -> BLAKE3 hex digest of its bytes, in one pass over the file."""
    with path.open("rb") as handle:
        return {
            e.name: files.digest(handle.fileno(), e.start, e.end, path) for e in sorted(entries, key=lambda e: e.start)
        }


def hash_config(folder: Path) -> str:
    """Hash of config.json without :data:`VOLATILE_CONFIG`, at any depth."""
    return files.hash_json(_without_volatile(load_object(_existing(folder / "config.json"))))


def _without_volatile(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_volatile(v) for k, v in value.items() if k not in VOLATILE_CONFIG}
    if isinstance(value, list):
        return [_without_volatile(v) for v in value]
    return value


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise InputError("no such file", where=str(path), expected="a transformers model folder")
    return path


def hash_tokenizer(folder: Path) -> str:
    """Hash of the tokenizer: its files and :data:`TOKENIZER_SETTINGS`.

    ``truncation`` and ``padding`` in tokenizer.json are left out: they are traces of how it was last used.
    """
    parts: dict[str, Any] = {}
    if (folder / "tokenizer.json").is_file():
        document = load_object(folder / "tokenizer.json")
        parts["tokenizer.json"] = {k: v for k, v in document.items() if k not in ("truncation", "padding")}
    # Byte-exact, because a merges or vocabulary file has no other canonical form.
    names = {*TOKENIZER_FILES, *(p.name for p in folder.glob("*.tiktoken"))}
    parts |= {name: files.hash_file(folder / name) for name in names if (folder / name).is_file()}
    if not parts:
        raise InputError("no tokenizer", where=str(folder), expected="tokenizer.json or tokenizer.model")
    if (folder / "tokenizer_config.json").is_file():
        settings = load_object(folder / "tokenizer_config.json")
        parts["settings"] = {k: settings[k] for k in TOKENIZER_SETTINGS if settings.get(k) is not None}
    if (folder / "special_tokens_map.json").is_file():
        parts["special"] = load_object(folder / "special_tokens_map.json")
    return files.hash_json(parts)


def hash_template(folder: Path) -> str:
    """Hash of the chat template's UTF-8 text, or ``"none"``.

    ``chat_template.jinja`` goes before ``tokenizer_config.json``, as in transformers. Several named templates
    are hashed together, because which one is used depends on the conversation.
    """
    templates = _templates(folder)
    if not templates:
        return NO_TEMPLATE
    if list(templates) == ["default"]:
        return files.hash_bytes(templates["default"].encode("utf-8"))
    return files.hash_json(templates)


def _templates(folder: Path) -> dict[str, str]:
    found: dict[str, str] = {}
    where = folder / "tokenizer_config.json"
    if where.is_file():
        value = load_object(where).get("chat_template")
        if isinstance(value, str):
            found["default"] = value
        elif isinstance(value, list):
            try:
                found = {str(item["name"]): str(item["template"]) for item in value}
            except (TypeError, KeyError) as error:
                raise InputError(
                    "chat_template is not a list of {name, template}", where=str(where), got=repr(error)
                ) from error
        elif value is not None:
            raise InputError("chat_template is neither text nor a list", where=str(where), got=repr(value)[:80])
    single = folder / "chat_template.jinja"
    if single.is_file():
        found["default"] = single.read_text(encoding="utf-8")
    for extra in sorted(folder.glob("additional_chat_templates/*.jinja")):
        found[extra.stem] = extra.read_text(encoding="utf-8")
    return found
