"""What a model folder says it was made from: ``merge.json`` of a merge, ``quantization.json`` of a quantization.

The file is a claim. It is taken for the weights that it was written for and for no others: a merge records the hash of
its weights (``fingerprint.hash_weights``), so that a file left beside other weights is an error. Where the base was
made from something itself, its own origin stands inside.

It looks nothing up: whether the base and the adapters are known anywhere is the registry's business.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tunegate.errors import InputError
from tunegate.model.weights import load_object

MERGE, QUANTIZATION = "merge.json", "quantization.json"
MERGED, QUANTIZED = "merged from", "quantized from"
DEEPEST = 20  # origins inside one another
_HASH = re.compile(r"b3:[0-9a-f]{64}")


def origin_of(folder: Path, weights: str) -> dict[str, Any] | None:
    """``{"how", "base": {"name", "fingerprint", "origin"}, "adapters": [{"id", "hash", "weight"}], ...}``; None if the
    folder says nothing. ``weights``: the hash of the weights in it. ``id`` is the registry's for that adapter."""
    if (path := folder / MERGE).is_file():
        said = load_object(path)
        if said.get("weights") != weights:
            raise InputError(
                f"{MERGE} was written for other weights", where=str(path), expected=weights,
                got=str(said.get("weights")), fix="merge again; or remove the file, if the weights were changed since",
            )  # fmt: skip
        found = {"how": MERGED, **{k: said.get(k) for k in ("base", "adapters", "method", "density", "seed", "onto")}}
    elif (path := folder / QUANTIZATION).is_file():
        said = load_object(path)
        made = said.get("fingerprint")
        base = {
            "name": said.get("base"), "fingerprint": made.get("total") if isinstance(made, dict) else None,
            "origin": said.get("origin"),
        }  # fmt: skip
        found = {"how": QUANTIZED, "base": base, "adapters": []}
    else:
        return None
    check_origin(found, str(path))
    return found


def check_origin(origin: Any, where: str, depth: int = 0) -> None:
    """:class:`InputError` unless ``origin`` has the form that :func:`origin_of` gives."""
    base = origin.get("base") if isinstance(origin, dict) else None
    adapters = origin.get("adapters") if isinstance(origin, dict) else None
    good = (
        depth < DEEPEST
        and isinstance(base, dict)
        and isinstance(base.get("name"), str)
        and _is_hash(base.get("fingerprint"))
        and isinstance(adapters, list)
        and all(isinstance(a, Mapping) and _is_hash(a.get("id")) for a in adapters)
        and origin.get("how") in (MERGED, QUANTIZED)
    )
    if not good:
        raise InputError("it does not say what the model was made from", where=where, expected="as tunegate writes it")
    if base is not None and base.get("origin") is not None:
        check_origin(base["origin"], where, depth + 1)


def _is_hash(value: object) -> bool:
    return isinstance(value, str) and _HASH.fullmatch(value) is not None
