"""``tunegate registry base``: bases by fingerprint, their names and successors."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape

from tunegate.cli.arguments import actions_of
from tunegate.cli.console import Console
from tunegate.cli.registry_views import opened, told
from tunegate.errors import InputError

if TYPE_CHECKING:
    from tunegate.registry.entries import Entity
    from tunegate.registry.opening import Registry


def _list(arguments: argparse.Namespace, console: Console) -> int:
    from tunegate.registry.bases import list_bases

    with opened(arguments).database.reading() as connection:
        found = list_bases(connection)
    rows = []
    for b in found:
        state = f"superseded by {b.superseded_by[:15]}" if b.superseded_by else "flagged" if b.flags else ""
        names = escape(", ".join(b.names) or b.base.name)
        rows.append([names, b.base.id[:15], f"{b.adapters}", escape("; ".join(b.recipes)), f"[red]{state}[/]"])
    console.table(["base", "fingerprint", "adapters", "quantization", ""], rows)
    console.result({"bases": [asdict(b) for b in found]})
    return 0


def _add(arguments: argparse.Namespace, console: Console) -> int:
    from tunegate.registry.bases import add_base

    entity = _base_of(arguments.base, arguments.name, arguments.revision, console)
    new = add_base(opened(arguments, create=True), entity)
    console.text(f"{'added' if new else 'there'}     {escape(entity.name)}  {entity.id}")
    console.result({"fingerprint": entity.id, "name": entity.name, "new": new})
    return 0


def _supersede(arguments: argparse.Namespace, console: Console) -> int:
    from tunegate.registry.bases import supersede

    registry = opened(arguments)
    new = _known_base(registry, arguments.new) or _base_of(arguments.new, arguments.name, arguments.revision, console)
    old = arguments.old
    if Path(old).is_dir() and _known_base(registry, old) is None:
        old = _base_of(old, None, None, console).id
    flagged = supersede(registry, old, new, why=arguments.why)
    console.text(f"{len(flagged)} versions in use are incompatible now")
    for version in flagged:
        console.text(f"  [red]{escape(version.ref)}[/]  {escape(version.state)}")
    console.result({"new": new.id, "flagged": [told(v) for v in flagged]})
    return 0


def _known_base(registry: Registry, text: str) -> Entity | None:
    from tunegate.registry.entries import find_entity

    try:
        with registry.database.reading() as connection:
            found = find_entity(connection, text)
    except InputError:
        return None
    return found if found.kind == "base" else None


def _base_of(text: str, name: str | None, revision: str | None, console: Console) -> Entity:
    """A base on this machine, hashed."""
    from tunegate.model.fingerprint import fingerprint_base
    from tunegate.model.origin import origin_of
    from tunegate.model.resolve import resolve_base
    from tunegate.registry.entries import Entity

    resolved = resolve_base(text, revision, report=console.line)
    found = fingerprint_base(resolved.path)
    body = {
        "name": str(resolved.path) if resolved.source == "folder" else resolved.name,  # where it is found again
        "source": resolved.source,
        "revision": resolved.revision,
        "fingerprint": asdict(found),
        "origin": origin_of(resolved.path, found.weights),
    }
    return Entity(found.total, "base", name or resolved.name, body)


ACTIONS = {"list": _list, "add": _add, "supersede": _supersede}


def base(arguments: argparse.Namespace, console: Console) -> int:
    """Run ``tunegate registry base ACTION``."""
    return ACTIONS[arguments.base_action](arguments, console)


def add_parser(actions: Any, shared: argparse.ArgumentParser) -> None:
    """The command's flags."""
    base = actions.add_parser("base", help="bases by fingerprint; a superseded one flags all that was made from it")
    acts = actions_of(base, "base_action", "ACTION")
    acts.add_parser("list", parents=[shared], help="bases, their names, adapters and successors")
    add = acts.add_parser("add", parents=[shared], help="enter a base, or another name for one")
    add.add_argument("base", metavar="BASE", help="packaged name, local folder or hub id")
    supersede = acts.add_parser("supersede", parents=[shared], help="a new base takes the place of an old one")
    supersede.add_argument("old", metavar="OLD", help="name, fingerprint or folder")
    supersede.add_argument("new", metavar="NEW", help="name or fingerprint, or a base on this machine")
    supersede.add_argument("--why", required=True, metavar="WHY")
    for parser in (add, supersede):
        parser.add_argument("--name", help="what it is called here; default: its own name")
        parser.add_argument("--revision", help="of a hub id")
