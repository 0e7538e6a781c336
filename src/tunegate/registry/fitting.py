"""Whether an adapter without a card fits the base that it names, as far as that base can be found on this machine.

It is looked for where the registry says that it was, then under the name itself; nothing is fetched. ``config.json`` is
enough: the model that it describes has its modules' shapes without weights, and every tensor has to be one of theirs.

What fits is not proven to be of this base: the adapter is unverified all the same.
"""

from __future__ import annotations

from pathlib import Path

import sqlalchemy as sa

from tunegate.errors import InputError, Problem, TunegateError
from tunegate.registry.entries import Entity, read_entities
from tunegate.registry.opening import Registry
from tunegate.registry.tables import base_names, entities


def check_fits(registry: Registry, folder: Path, base: str) -> str:
    """The empty text if the adapter in ``folder`` fits the ``base`` that it names, why that could not be checked if it
    could not; :class:`InputError` with every tensor that does not fit."""
    from tunegate.adapter.files import checked_header
    from tunegate.model.loading import empty_model
    from tunegate.model.resolve import resolve_config

    reasons: list[str] = []
    for name, revision in _places(registry, base).items():
        try:
            model = empty_model(resolve_config(name, revision, offline=True)[0])
        except TunegateError as error:
            reasons += [f"{name}: {problem.what}" for problem in error.problems]
            continue
        try:
            checked_header(model, folder)
        except InputError as error:
            told = Problem(
                "the adapter does not fit the base that it names", str(folder), f"tensors of the modules of {base}",
                f"{len(error.problems)} that are others, told below", "--base-name NAME, if it is of another base",
            )  # fmt: skip
            raise InputError([told, *error.problems]) from None
        return ""
    return "; ".join(reasons)


def _places(registry: Registry, base: str) -> dict[str, str | None]:
    """Names under which ``base`` may be found here, each with its revision."""
    meant = sa.select(base_names.c.base).where(base_names.c.name == base)
    with registry.database.reading() as connection:
        known = read_entities(connection, entities.c.id.in_(meant)).values()
    places = dict(map(_place, known))
    places.setdefault(base, None)
    return places


def _place(base: Entity) -> tuple[str, str | None]:
    said = base.body
    return str(said.get("name")), said.get("revision") if said.get("source") == "hub" else None
