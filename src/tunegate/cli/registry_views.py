"""``tunegate registry list|show|lineage|diff``: what is there, and how versions are shown everywhere."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.markup import escape

from tunegate.cli.console import Console
from tunegate.errors import InputError, TunegateError, nearest

if TYPE_CHECKING:
    from tunegate.registry.differing import Difference
    from tunegate.registry.entries import Entity, Version
    from tunegate.registry.opening import Registry

SHOWN_ITEMS = 10
COLOURS = {"approved": "cyan", "production": "green", "retired": "dim", "unverified": "yellow"}


def opened(arguments: argparse.Namespace, **how: Any) -> Registry:
    """The registry that is meant, on behalf of who is named."""
    from tunegate.registry.opening import open_registry

    return open_registry(arguments.registry, who=arguments.by, **how)


def told(version: Version) -> dict[str, Any]:
    """A version as JSON data."""
    return {**asdict(version), "ref": version.ref, "standing": version.standing}


def standing(version: Version) -> str:
    """Where a version stands, as markup."""
    colour = "red" if version.flags else COLOURS.get(version.state, "")
    text = escape(version.standing)
    return f"[{colour}]{text}[/]" if colour else text


def _list(arguments: argparse.Namespace, console: Console) -> int:
    from tunegate.registry.entries import RETIRED, list_versions

    with opened(arguments).database.reading() as connection:
        everything = list_versions(connection)
    named = [v for v in everything if arguments.name in (None, v.name)]
    if not named and arguments.name is not None:
        fix = nearest(arguments.name, sorted({v.name for v in everything})) or "`tunegate registry list` shows all"
        raise InputError("no adapter has this name", where=arguments.name, fix=fix)
    found = [v for v in named if arguments.all or v.state != RETIRED]
    rows = [
        [escape(v.ref), " ".join(f"@{a}" for a in v.aliases), standing(v), v.adapter[:15], v.added[:10]] for v in found
    ]
    if rows:
        console.table(["adapter", "alias", "state", "content", "added"], rows)
    else:
        console.text("every version is retired: --all" if named else "no adapter yet: tunegate registry add FOLDER")
    console.result({"versions": [told(v) for v in found]})
    return 0


def _show(arguments: argparse.Namespace, console: Console) -> int:
    from tunegate.registry.entries import find_entity, flags_of, history, list_versions
    from tunegate.registry.tables import versions

    with opened(arguments).database.reading() as connection:
        entity = find_entity(connection, arguments.what)
        found = list_versions(connection, versions.c.adapter == entity.id)
        events, flags = history(connection, entity.id), flags_of(connection, entity.id)
    if found:
        _show_version(found[0], entity, console)
    else:
        console.text(f"[bold]{entity.kind}[/]   {escape(entity.name)}  {entity.id}")
        for flag in flags:
            console.text(f"[red]flagged[/]   {escape(flag)}")
        console.text(escape(json.dumps(entity.body, indent=2, ensure_ascii=False)))
    for event in events:
        why = f" ({event.why})" if event.why else ""
        console.text(f"[dim]{event.at[:19]}[/]  {escape(f'{event.what}, {event.who}{why}')}")
    said = {"kind": entity.kind, "id": entity.id, "name": entity.name, "body": entity.body, "flags": list(flags)}
    console.result({**said, "version": told(found[0]) if found else None, "events": [asdict(e) for e in events]})
    return 0


def _show_version(version: Version, entity: Entity, console: Console) -> None:
    card = entity.body.get("card")
    console.text(f"[bold]{escape(version.ref)}[/]  {version.adapter}")
    console.text(f"state     {standing(version)}")
    console.text(f"aliases   {' '.join(f'@{a}' for a in version.aliases) or 'none'}")
    if card is None:
        console.text(f"base      {escape(str(entity.body.get('claims')))} is claimed; nothing proves it")
        return
    console.text(f"base      {escape(card['base']['name'])}, {card['base']['fingerprint']['total']}")
    for e in card["evaluations"]:
        score = e["scores"][e["primary"]]
        console.text(
            f"score     {escape(e['subject'])} on {escape(e['split'])}: {escape(e['primary'])} {score['value']:.4f} "
            f"({score['low']:.3f} to {score['high']:.3f}, {score['n']} items)"
        )
    for rule in card["decision"]["rules"]:
        console.text(f"rule      {rule['verdict']:<12} {escape(rule['rule'])}: {escape(rule['got'])}")
    for path, digest in card["data"]["files"].items():
        console.text(f"data      {escape(path)} {digest}")


def _lineage(arguments: argparse.Namespace, console: Console) -> int:
    from tunegate.registry.entries import find_entity, list_versions
    from tunegate.registry.lineage import entities_of, lineage, way

    with opened(arguments).database.reading() as connection:
        start = find_entity(connection, arguments.what)
        if arguments.to is not None:
            end = find_entity(connection, arguments.to)
            chain = way(connection, start.id, end.id)
            if chain is None:
                raise TunegateError(
                    "nothing connects the two", where=f"{arguments.what} and {arguments.to}",
                    expected="a base, data, a run or an adapter that both were made from or went into",
                    fix="`tunegate registry lineage` of one of them shows what it hangs together with",
                )  # fmt: skip
            groups = [("way", chain)]
            entities = entities_of(connection, start.id, chain)
        else:
            found = lineage(connection, start.id)
            groups, entities = [("made from", found.above), ("gone into", found.below)], found.entities
        refs = {v.adapter: v.ref for v in list_versions(connection)}
    names = {id: refs.get(id, entity.name) for id, entity in entities.items()}

    def thing(id: str) -> str:
        return f"{entities[id].kind} {escape(names[id])} [dim]{id[:15]}[/]"

    for title, edges in groups:
        rows = [[thing(e.child), escape(e.role), thing(e.parent)] for e in edges]
        console.table([title, "", ""], rows)
    said = {id: {"kind": entity.kind, "name": names[id]} for id, entity in entities.items()}
    console.result(
        {"of": start.id, "entities": said, **{t.replace(" ", "_"): [asdict(e) for e in g] for t, g in groups}}
    )
    return 0


def _diff(arguments: argparse.Namespace, console: Console) -> int:
    from tunegate.registry.differing import diff

    found = diff(opened(arguments), arguments.one, arguments.two)
    unknown = f"not known of {' and '.join(map(escape, found.cardless))}, which came without a card"
    for title, pairs in (("settings", found.settings), ("data", found.data), ("scores on test", found.scores)):
        rows = [[escape(key), *(escape(_value(v)) for v in pair)] for key, pair in pairs.items()]
        if rows:
            console.table([title, escape(found.one.ref), escape(found.two.ref)], rows)
        else:
            console.text(f"{title}: {unknown if found.cardless and title != 'settings' else 'the same'}")
    _print_items(found, console)
    console.result({**asdict(found), "one": told(found.one), "two": told(found.two)})
    return 0


def _value(value: Any) -> str:
    text = f"{value:.5g}" if isinstance(value, float) else value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _print_items(found: Difference, console: Console) -> None:
    if found.items is None:
        console.text(f"items: not compared, {escape(found.why_not)}")
        return
    answered = [item for item in found.items if item["predictions"][0] != item["predictions"][1]]
    said = f"items: {len(answered)} of {found.compared} test items answered differently"
    if alike := len(found.items) - len(answered):
        said += f", {alike} alike but scored differently"
    console.text(said)
    rows = [
        [
            *(escape(_value(said)) for said in (item["row_id"], *item["predictions"], item["reference"])),
            " and ".join(_value(scores.get(found.metric)) for scores in item["scores"]),
        ]
        for item in found.items[:SHOWN_ITEMS]
    ]  # fmt: skip
    if rows:
        head = ["item", escape(found.one.ref), escape(found.two.ref), "right", escape(str(found.metric))]
        console.table(head, rows)
    if (more := len(found.items) - SHOWN_ITEMS) > 0:
        console.text(f"and {more} more, which --json lists")


ACTIONS = {"list": _list, "show": _show, "lineage": _lineage, "diff": _diff}
