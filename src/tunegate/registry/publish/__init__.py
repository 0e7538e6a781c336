"""Telling other systems: MLflow, the Hugging Face Hub, or a plain folder on any store.

The adapter is taken from the registry, verified; a flagged one is refused. State, decision, override and base go with
it everywhere. What was published is written to the version's history afterwards, so a publisher that was killed has
changed nothing here; pushing again goes on. Nothing is read back from a publisher: the registry stays the truth.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tunegate.errors import InputError, without_secrets
from tunegate.registry.database import record
from tunegate.registry.entries import refuse_flagged, resolve
from tunegate.registry.opening import Registry
from tunegate.registry.publish.published import Published
from tunegate.registry.pulling import provenance, pull


def push(registry: Registry, reference: str, target: str, line: Callable[[str], None]) -> dict[str, Any]:
    """Publish a version to ``mlflow:URI``, ``hf:OWNER/NAME`` or a folder or store; returns where it is now."""
    with registry.database.reading() as connection:
        version = resolve(connection, reference)
    refuse_flagged(version, "published")
    publish, shown = _publisher(target), without_secrets(target)
    line(f"publishing {version.ref} ({version.standing}) to {shown}")
    with tempfile.TemporaryDirectory(prefix="tunegate-push-") as scratch:
        folder = Path(scratch) / "adapter"
        version = pull(registry, version.adapter, folder)
        told = publish(Published(version, folder, provenance(registry, version)), target)
        told["address"] = without_secrets(told["address"])  # it is kept in the history
    with registry.database.writing() as connection:
        record(connection, version.adapter, f"published to {told['address']}", registry.who, "")
    return {"version": version.ref, "standing": version.standing, **told}


def _publisher(target: str) -> Callable[[Published, str], dict[str, Any]]:
    scheme = target.partition(":")[0]
    if scheme == "mlflow":
        from tunegate.registry.publish.mlflow import publish
    elif scheme == "hf":
        from tunegate.registry.publish.hub import publish
    elif "://" in target or "/" in target or target.startswith("."):
        from tunegate.registry.publish.plain import publish
    else:
        raise InputError(
            "not a place to publish to", where=target,
            expected="mlflow:URI, hf:OWNER/NAME, s3://BUCKET/PREFIX or a folder's path",
            fix=f"for a folder of this name: ./{target}",
        )  # fmt: skip
    return publish
