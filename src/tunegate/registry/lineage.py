"""What a thing was made from, what was made from it, and how two things hang together.

Edges lead from child to parent. Everything above and below is one recursive query each; the way between two things is
the shortest chain of edges, taken in either direction.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from tunegate.registry.entries import Edge, Entity, read_entity
from tunegate.registry.tables import edges


@dataclass(frozen=True)
class Lineage:
    """``above`` leads to everything that a thing was made from, ``below`` to everything made from it."""

    above: list[Edge]
    below: list[Edge]
    entities: dict[str, Entity]


def lineage(connection: Connection, id: str) -> Lineage:
    above = _reached(connection, id, edges.c.child, edges.c.parent)
    below = _reached(connection, id, edges.c.parent, edges.c.child)
    ids = {id, *(e.child for e in above + below), *(e.parent for e in above + below)}
    return Lineage(above, below, {i: read_entity(connection, i) for i in sorted(ids)})


def way(connection: Connection, start: str, end: str) -> list[Edge] | None:
    """The shortest chain of edges between two things, in order; None if there is none, empty if they are the same."""
    came: dict[str, tuple[str, Edge]] = {}
    seen, waiting = {start}, deque([start])
    while waiting and end not in seen:
        at = waiting.popleft()
        query = sa.select(edges).where(sa.or_(edges.c.child == at, edges.c.parent == at))
        for row in connection.execute(query.order_by(edges.c.child, edges.c.parent, edges.c.role)):
            other = row.parent if row.child == at else row.child
            if other not in seen:
                seen.add(other)
                came[other] = (at, Edge(row.child, row.parent, row.role))
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
