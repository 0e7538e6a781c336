"""What a request's ``model`` means: the names that are served, as the routes see them.

It loads nothing itself: an implementation does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from tunegate.data.render import Renderer
from tunegate.errors import InputError


class UnknownModel(InputError):
    """No model of this name is served."""


class DuplicateName(InputError):
    """The name is taken."""


class AdapterNotFound(InputError):
    """There is no adapter at this place."""


class ModelRefused(InputError):
    """The name is known and must not answer now."""


@dataclass(frozen=True)
class Served:
    """What a request's ``model`` means at this moment. ``key``: the adapter's content hash, None for the base alone.
    ``fingerprint``: the adapter's hash, or the base's. ``standing``: what the gate said of it."""

    name: str
    key: str | None
    renderer: Renderer
    fingerprint: str
    standing: str
    root: str
    parent: str | None
    created: int


class Catalogue(Protocol):
    base: str

    def names(self) -> list[Served]: ...

    async def resolve(self, name: str) -> Served:
        """:class:`UnknownModel` for a name that is not served."""

    async def load(self, name: str, source: str, *, replace: bool = False, pinned: bool = False) -> Served:
        """:class:`InputError` for every refusal."""

    async def unload(self, name: str) -> None: ...
