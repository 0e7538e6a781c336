"""A finished run's way into the registry that its task names: adapter, records, decision, data hashes, answers.

The registry is opened before the first step, so that a wrong address, a base whose name is taken by another and a base
that was superseded stop the run while stopping is cheap. It never promotes.
"""

from __future__ import annotations

from pathlib import Path

from tunegate.config import Config
from tunegate.errors import InputError
from tunegate.pipeline.prepare import Prepared
from tunegate.pipeline.reporter import Reporter
from tunegate.registry.adding import add
from tunegate.registry.bases import check_base, name_problem
from tunegate.registry.entries import Edge, Entity, Version
from tunegate.registry.intake import read_folder
from tunegate.registry.opening import Registry, open_registry


def open_for(prepared: Prepared) -> Registry | None:
    """The task's registry, None if it names none. :class:`InputError` if it would not take the adapter."""
    where = _place(prepared.config)
    if where is None:
        return None
    registry = open_registry(where, create=True)
    check_fits(registry, prepared)
    return registry


def check_fits(registry: Registry, prepared: Prepared) -> None:
    """:class:`InputError` if another base has the name of the task's base there, or that base is flagged."""
    base = prepared.base.card()
    with registry.database.reading() as connection:
        problem = name_problem(connection, Entity(base["fingerprint"]["total"], "base", base["name"], base))
    if problem is not None:
        raise InputError(problem)
    check_base(registry, base["fingerprint"]["total"], "trained")


def enter(registry: Registry, adapter: Path, reporter: Reporter, imported: Version | None = None) -> str:
    """Add the finished adapter, under the name of the one that was ``imported``; returns what it is called there."""
    intake = read_folder(adapter, name=imported.name if imported else None)
    if imported is not None:
        intake.edges.append(Edge(intake.id, imported.adapter, "evaluated from"))
    added = add(registry, intake, why=f"{imported.ref}, evaluated" if imported else "tunegate run")
    version = added.version
    reporter.line(f"registry: {version.ref} {'added' if added.new else 'is there'}, {version.standing}")
    return version.ref


def _place(config: Config) -> str | None:
    where = config.task.registry
    if where is None:
        return None
    return where if where == "default" or "://" in where else str(config.path(where))
