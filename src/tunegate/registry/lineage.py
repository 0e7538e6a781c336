"""What a thing was made from, what was made from it, and how two things hang together.

Edges lead from child to parent. Everything above and below is one recursive query each; the way between two things is
the shortest chain of edges, taken in either direction.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from tunegate.registry.entries import Edge, Entity, read_entities
from tunegate.registry.tables import edges, entities

_AT_ONCE = 1000  # ids in one query


@dataclass(frozen=True)
class Lineage:
    """``above`` leads to everything that a thing was made from, ``below`` to everything made from it."""

    above: list[Edge]
    below: list[Edge]
    entities: dict[str, Entity]


def lineage(connection: Connection, id: str) -> Lineage:
    above = _reached(connection, id, edges.c.child, edges.c.parent)
    below = _reached(connection, id, edges.c.parent, edges.c.child)
    return Lineage(above, below, entities_of(connection, id, above + below))


def entities_of(connection: Connection, start: str, found: list[Edge]) -> dict[str, Entity]:
    """``start`` and what the edges in ``found`` lead between, by id."""
    ids = sorted({start, *(e.child for e in found), *(e.parent for e in found)})
    read: dict[str, Entity] = {}
    for first in range(0, len(ids), _AT_ONCE):
        read |= read_entities(connection, entities.c.id.in_(ids[first : first + _AT_ONCE]))
    return read


def way(connection: Connection, start: str, end: str) -> list[Edge] | None:
    """The shortest chain of edges between two things, in order; None if there is none, empty if they are the same."""
    beside: dict[str, list[tuple[str, Edge]]] = {}
    for row in connection.execute(sa.select(edges).order_by(edges.c.child, edges.c.parent, edges.c.role)):
        edge = Edge(row.child, row.parent, row.role)
        beside.setdefault(edge.child, []).append((edge.parent, edge))
        beside.setdefault(edge.parent, []).append((edge.child, edge))
    came: dict[str, tuple[str, Edge]] = {}
    seen, waiting = {start}, deque([start])
    while waiting and end not in seen:
        at = waiting.popleft()
        for other, edge in beside.get(at, ()):
            if other not in seen:
                seen.add(other)
                came[other] = (at, edge)
                waiting.append(other)
    if end not in seen:
        return None
    chain = []
    while end != start:
        end, edge = came[end]
        chain.append(edge)
    return chain[::-1]


def _reached(connection: Connection, id: str, near: sa.Column[str], far: sa.Column[str]) -> list[Edge]:
    """The edges that a walk from ``id`` goes along, from ``near`` to ``far``."""
    reached = sa.select(sa.literal(id).label("id")).cte("reached", recursive=True)
    reached = reached.union(sa.select(far).join(reached, near == reached.c.id))
    query = sa.select(edges).join(reached, near == reached.c.id).order_by(edges.c.child, edges.c.parent, edges.c.role)
    return [Edge(row.child, row.parent, row.role) for row in connection.execute(query)]
