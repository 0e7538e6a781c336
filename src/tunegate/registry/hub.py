"""Adapters from the Hugging Face Hub: tensors, config and README of one commit, as real files in a folder that goes.

No pickle and no code is fetched, and no file of another name.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tunegate.adapter.card import FILES, MANIFEST
from tunegate.errors import InputError

SCHEME = "hf:"


@contextlib.contextmanager
def fetched(source: str, revision: str | None = None) -> Iterator[tuple[Path, str]]:
    """``source`` as a folder: itself, or for ``hf:OWNER/NAME`` a download that lasts as long as the block; and where
    that came from, with the commit."""
    if not source.startswith(SCHEME):
        if revision is not None:
            raise InputError("a folder has no revision", where="--revision", got=revision)
        yield Path(source), ""
        return
    from huggingface_hub import HfApi, snapshot_download

    repo = source.removeprefix(SCHEME).strip("/")
    with tempfile.TemporaryDirectory(prefix="tunegate-hub-") as scratch:
        folder = Path(scratch) / "adapter"
        try:
            commit = str(HfApi().model_info(repo, revision=revision or "main").sha)
            snapshot_download(repo, revision=commit, local_dir=folder, allow_patterns=[*FILES, MANIFEST])
        except Exception as error:  # the library's own classes, and those of whichever HTTP client it uses
            raise InputError(
                "cannot fetch the adapter from the hub", where=source, got=f"{type(error).__name__}: {error}",
                fix="check the name, the network and, for a private one, HF_TOKEN",
            ) from error  # fmt: skip
        yield folder, f"{SCHEME}{repo}@{commit[:12]}"
