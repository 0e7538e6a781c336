"""What a publisher gets: a version, its files in a folder, and what is said of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunegate.adapter.card import CARD, FILES, MANIFEST
from tunegate.files import read_json
from tunegate.registry.entries import Version


@dataclass(frozen=True)
class Published:
    """``folder`` holds the verified files and ``registry.json``, which says what ``provenance`` does: state, decision,
    override, base."""

    version: Version
    folder: Path
    provenance: dict[str, Any]

    @property
    def card(self) -> dict[str, Any] | None:
        """The adapter's card as JSON data; None for an unverified one."""
        path = self.folder / CARD
        return dict(read_json(path)) if path.exists() else None

    @property
    def paths(self) -> list[Path]:
        """The adapter's own files, the manifest last."""
        return [path for name in (*FILES, MANIFEST) if (path := self.folder / name).exists()]
