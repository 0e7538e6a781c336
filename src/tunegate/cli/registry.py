"""``tunegate registry``: adapters by what they are."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
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


def registry(arguments: argparse.Namespace, console: Console) -> int:
    """Run ``tunegate registry ACTION``."""
    return _ACTIONS[arguments.action](arguments, console)


def _open(arguments: argparse.Namespace, **how: Any) -> Registry:
    from tunegate.registry.opening import open_registry

    return open_registry(arguments.registry, who=arguments.by, **how)


# --- what is there -----------------------------------------------------------------------------------------------


def _init(arguments: argparse.Namespace, console: Console) -> int:
    opened = _open(arguments, create=True, upgrade=True, store=arguments.store)
    console.text(f"registry  {escape(opened.database.shown)}\nbytes     {escape(opened.store.url)}")
    console.result({"registry": opened.database.shown, "store": opened.store.url})
    return 0


def _list(arguments: argparse.Namespace, console: Console) -> int:
    from tunegate.registry.entries import RETIRED, list_versions

    with _open(arguments).database.reading() as connection:
        everything = list_versions(connection)
    named = [v for v in everything if arguments.name in (None, v.name)]
    if not named and arguments.name is not None:
        fix = nearest(arguments.name, sorted({v.name for v in everything}))
        raise InputError("no adapter has this name", where=arguments.name, fix=fix)
    found = [v for v in named if arguments.all or v.state != RETIRED]
    rows = [
        [escape(v.ref), " ".join(f"@{a}" for a in v.aliases), _standing(v), v.adapter[:15], v.added[:10]] for v in found
    ]
    if rows:
        console.table(["adapter", "alias", "state", "content", "added"], rows)
    else:
        console.text("every version is retired: --all" if named else "no adapter yet: tunegate registry add FOLDER")
    console.result({"versions": [_version(v) for v in found]})
    return 0


def _version(version: Version) -> dict[str, Any]:
    return {**asdict(version), "ref": version.ref, "standing": version.standing}


def _standing(version: Version) -> str:
    colour = "red" if version.flags else COLOURS.get(version.state, "")
    text = escape(version.standing)
    return f"[{colour}]{text}[/]" if colour else text


def _show(arguments: argparse.Namespace, console: Console) -> int:
    from tunegate.registry.entries import find_entity, flags_of, history, list_versions
    from tunegate.registry.tables import versions

    with _open(arguments).database.reading() as connection:
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
    told = {"kind": entity.kind, "id": entity.id, "name": entity.name, "body": entity.body, "flags": list(flags)}
    console.result({**told, "version": _version(found[0]) if found else None, "events": [asdict(e) for e in events]})
    return 0


def _show_version(version: Version, entity: Entity, console: Console) -> None:
    card = entity.body.get("card")
    console.text(f"[bold]{escape(version.ref)}[/]  {version.adapter}")
    console.text(f"state     {_standing(version)}")
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
    from tunegate.registry.entries import find_entity, list_versions, read_entity
    from tunegate.registry.lineage import lineage, way

    with _open(arguments).database.reading() as connection:
        start = find_entity(connection, arguments.what)
        if arguments.to is not None:
            end = find_entity(connection, arguments.to)
            chain = way(connection, start.id, end.id)
            if chain is None:
                raise TunegateError("nothing connects the two", where=f"{start.name} and {end.name}")
            groups = [("way", chain)]
            entities = {i: read_entity(connection, i) for e in chain for i in (e.child, e.parent)}
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
    told = {id: {"kind": entity.kind, "name": names[id]} for id, entity in entities.items()}
    console.result(
        {"of": start.id, "entities": told, **{t.replace(" ", "_"): [asdict(e) for e in g] for t, g in groups}}
    )
    return 0


def _diff(arguments: argparse.Namespace, console: Console) -> int:
    from tunegate.registry.differing import diff

    found = diff(_open(arguments), arguments.one, arguments.two)
    unknown = f"not known of {' and '.join(map(escape, found.cardless))}, which came without a card"
    for title, pairs in (("settings", found.settings), ("data", found.data), ("scores on test", found.scores)):
        rows = [[escape(key), *(escape(_value(v)) for v in pair)] for key, pair in pairs.items()]
        if rows:
            console.table([title, escape(found.one.ref), escape(found.two.ref)], rows)
        else:
            console.text(f"{title}: {unknown if found.cardless and title != 'settings' else 'the same'}")
    _print_items(found, console)
    console.result({**asdict(found), "one": _version(found.one), "two": _version(found.two)})
    return 0


def _value(value: Any) -> str:
    text = f"{value:.5g}" if isinstance(value, float) else value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _print_items(found: Difference, console: Console) -> None:
    if found.items is None:
        console.text(f"items: not compared, {escape(found.why_not)}")
        return
    answered = [item for item in found.items if item["predictions"][0] != item["predictions"][1]]
    told = f"items: {len(answered)} of {found.compared} test items answered differently"
    if alike := len(found.items) - len(answered):
        told += f", {alike} alike but scored differently"
    console.text(told)
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


# --- what changes ------------------------------------------------------------------------------------------------


def _add(arguments: argparse.Namespace, console: Console) -> int:
    from tunegate.registry.adding import add
    from tunegate.registry.hub import fetched
    from tunegate.registry.intake import read_folder

    with fetched(arguments.folder, arguments.revision) as folder:
        intake = read_folder(folder, name=arguments.name, base=arguments.base_name)
        found = add(_open(arguments, create=True), intake, why=arguments.why or "")
    if found.left_out:
        console.line(f"warning: left out: {', '.join(found.left_out)}")
    console.text(f"{'added' if found.new else 'there'}     {escape(found.version.ref)}  {found.version.adapter}")
    console.text(f"state     {_standing(found.version)}")
    console.result(
        {**_version(found.version), "new": found.new, "uploaded": found.uploaded, "left_out": found.left_out}
    )
    return 0


def _changed(version: Version, console: Console) -> int:
    console.text("  ".join([escape(version.ref), *(f"@{a}" for a in version.aliases), _standing(version)]))
    console.result(_version(version))
    return 0


def _promote(arguments: argparse.Namespace, console: Console) -> int:
    from tunegate.registry.states import promote

    found = promote(_open(arguments), arguments.ref, why=arguments.why, to=arguments.to, override=arguments.override)
    return _changed(found, console)


def _retire(arguments: argparse.Namespace, console: Console) -> int:
    from tunegate.registry.states import retire

    return _changed(retire(_open(arguments), arguments.ref, why=arguments.why), console)


def _alias(arguments: argparse.Namespace, console: Console) -> int:
    from tunegate.registry.states import set_alias

    return _changed(set_alias(_open(arguments), arguments.alias, arguments.ref, why=arguments.why or ""), console)


def _verify(arguments: argparse.Namespace, console: Console) -> int:
    from tunegate.registry.upkeep import verify

    found = verify(_open(arguments))
    told = f"{found.adapters} adapters, {found.files} files, {found.bytes:,} bytes and {found.records} records hashed"
    console.result({**asdict(found), "ok": not found.problems})
    if found.problems and not console.json_only:
        raise TunegateError(found.problems)
    console.text(f"{told}: [green]all as they were added[/]")
    return 1 if found.problems else 0


def _gc(arguments: argparse.Namespace, console: Console) -> int:
    from tunegate.registry.upkeep import collect

    found = collect(_open(arguments))
    console.text(f"removed   {found.objects} objects, {found.bytes:,} bytes; {found.pinned} kept for running uploads")
    console.result(asdict(found))
    return 0


def _clock(arguments: argparse.Namespace, console: Console) -> int:
    from tunegate.registry.upkeep import trust_clock

    ahead = trust_clock(_open(arguments), why=arguments.why)
    console.text(f"entries dated up to {ahead[:19]} stay as they are; from now on the clock is believed again")
    console.result({"ahead": ahead})
    return 0


def _pull(arguments: argparse.Namespace, console: Console) -> int:
    from tunegate.registry.pulling import pull

    version = pull(_open(arguments), arguments.ref, Path(arguments.out), evidence=arguments.evidence)
    console.text(f"pulled    {escape(version.ref)} to {escape(arguments.out)}\nstate     {_standing(version)}")
    console.result({**_version(version), "folder": arguments.out})
    return 0


def _push(arguments: argparse.Namespace, console: Console) -> int:
    from tunegate.registry.publish import push

    found = push(_open(arguments), arguments.ref, arguments.target, console.line)
    for key, value in found.items():
        console.text(f"{key:<10}{escape(str(value))}")
    console.result(found)
    return 0


def _evaluate(arguments: argparse.Namespace, console: Console) -> int:
    from tunegate.config import load_config
    from tunegate.gate import SHIP
    from tunegate.pipeline.importing import evaluate_import

    config = load_config(arguments.task, arguments.overrides)
    outcome = evaluate_import(_open(arguments), arguments.ref, config, console, reopen=arguments.reopen_test)
    for rule in outcome.decision.rules:
        console.text(f"rule      {rule.verdict:<12} {escape(rule.rule)}: {escape(rule.got)}")
    console.text(f"decision  {outcome.decision.verdict}\nversion   {escape(str(outcome.version))}")
    console.result({"version": outcome.version, "run": str(outcome.folder), "decision": asdict(outcome.decision)})
    return 0 if outcome.decision.verdict == SHIP else 1


def _reproduce(arguments: argparse.Namespace, console: Console) -> int:
    from tunegate.pipeline.reproduce import reproduce

    found = reproduce(
        _open(arguments), arguments.ref, Path(arguments.out), console,
        folder=Path(arguments.folder) if arguments.folder else None, stop=console.stop,
    )  # fmt: skip
    colour = "green" if found.same else "red"
    console.text(f"tensors   [{colour}]{'the same bytes' if found.same else f'differ by up to {found.largest:.3g}'}[/]")
    for name, (then, now) in found.scores.items():
        console.text(f"score     {escape(name)} {then:.4f} then, {now:.4f} now")
    for name, (then, now) in found.versions.items():
        console.text(f"differs   {escape(name)}: {escape(str(then))} then, {escape(str(now))} now")
    console.result(asdict(found))
    return 0 if found.same else 1


# --- bases -------------------------------------------------------------------------------------------------------


def _base_list(arguments: argparse.Namespace, console: Console) -> int:
    from tunegate.registry.bases import list_bases

    with _open(arguments).database.reading() as connection:
        found = list_bases(connection)
    rows = []
    for b in found:
        state = f"superseded by {b.superseded_by[:15]}" if b.superseded_by else "flagged" if b.flags else ""
        names = escape(", ".join(b.names) or b.base.name)
        rows.append([names, b.base.id[:15], f"{b.adapters}", escape("; ".join(b.recipes)), f"[red]{state}[/]"])
    console.table(["base", "fingerprint", "adapters", "quantization", ""], rows)
    console.result({"bases": [asdict(b) for b in found]})
    return 0


def _base_add(arguments: argparse.Namespace, console: Console) -> int:
    from tunegate.registry.bases import add_base

    base = _base_of(arguments.base, arguments.name, arguments.revision, console)
    new = add_base(_open(arguments, create=True), base)
    console.text(f"{'added' if new else 'there'}     {escape(base.name)}  {base.id}")
    console.result({"fingerprint": base.id, "name": base.name, "new": new})
    return 0


def _base_supersede(arguments: argparse.Namespace, console: Console) -> int:
    from tunegate.registry.bases import supersede

    opened = _open(arguments)
    new = _known_base(opened, arguments.new) or _base_of(arguments.new, arguments.name, arguments.revision, console)
    old = arguments.old
    if Path(old).is_dir() and _known_base(opened, old) is None:
        old = _base_of(old, None, None, console).id
    flagged = supersede(opened, old, new, why=arguments.why)
    console.text(f"{len(flagged)} versions in use are incompatible now")
    for version in flagged:
        console.text(f"  [red]{escape(version.ref)}[/]  {escape(version.state)}")
    console.result({"new": new.id, "flagged": [_version(v) for v in flagged]})
    return 0


def _known_base(opened: Registry, text: str) -> Entity | None:
    from tunegate.registry.entries import find_entity

    try:
        with opened.database.reading() as connection:
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
        "name": resolved.name,
        "source": resolved.source,
        "revision": resolved.revision,
        "fingerprint": asdict(found),
        "origin": origin_of(resolved.path, found.weights),
    }
    return Entity(found.total, "base", name or resolved.name, body)


_BASES = {"list": _base_list, "add": _base_add, "supersede": _base_supersede}


def _base(arguments: argparse.Namespace, console: Console) -> int:
    return _BASES[arguments.base_action](arguments, console)


_ACTIONS = {
    "init": _init, "add": _add, "list": _list, "show": _show, "lineage": _lineage, "diff": _diff, "promote": _promote,
    "retire": _retire, "alias": _alias, "verify": _verify, "gc": _gc, "clock": _clock, "pull": _pull, "push": _push,
    "evaluate": _evaluate, "reproduce": _reproduce, "base": _base,
}  # fmt: skip


# --- what can be typed -------------------------------------------------------------------------------------------


def add_parser(commands: Any, common: argparse.ArgumentParser) -> None:
    """The command's flags."""
    parser = commands.add_parser(
        "registry",
        help="adapters by content hash: states, aliases, lineage, bases, proof",
        description="A reference is NAME:NUMBER, NAME@ALIAS (@production and @latest are always there) or the "
        "beginning of a content hash. docs/registry.md",
    )
    shared = argparse.ArgumentParser(add_help=False, parents=[common])
    shared.add_argument(
        "--registry", metavar="WHERE", help="folder or database URL; default: TUNEGATE_REGISTRY, else TUNEGATE_HOME"
    )
    shared.add_argument("--by", metavar="WHO", help="default: TUNEGATE_USER, else user@host")
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")

    def action(name: str, text: str, *words: str) -> argparse.ArgumentParser:
        made: argparse.ArgumentParser = actions.add_parser(name, parents=[shared], help=text, description=text)
        for word in words:
            made.add_argument(word, metavar=word.upper())
        return made

    init = action("init", "make a registry, or bring an older one up to date")
    init.add_argument("--store", metavar="URL", help="where bytes go: folder, s3://, gs://, az://; default: beside it")
    add = action(
        "add", "add an adapter: a folder with a card, or as `unverified` a PEFT folder or hub repo (hf:OWNER/NAME)"
    )
    add.add_argument("folder", metavar="FOLDER|hf:OWNER/NAME")
    add.add_argument("--name", help="default: the card's")
    add.add_argument("--base-name", metavar="NAME", help="what its base is called here; default: the card's name")
    add.add_argument("--revision", help="of a hub repo")
    add.add_argument("--why", metavar="WHY")
    listing = action("list", "every version with state, decision, override and flags")
    listing.add_argument("name", nargs="?", metavar="NAME", help="only this one's")
    listing.add_argument("--all", action="store_true", help="retired ones too")
    action("show", "one adapter, base, dataset, run, evaluation or decision, and its history", "what")
    lineage = action("lineage", "what a thing was made from and went into, or the way between two things", "what")
    lineage.add_argument("to", nargs="?", metavar="TO")
    action("diff", "settings, data, scores and test items that differ", "one", "two")
    promote = action("promote", "one state further: candidate, approved, production", "ref")
    promote.add_argument("--to", choices=("approved", "production"), help="default: the next state")
    promote.add_argument("--why", required=True, metavar="WHY")
    promote.add_argument("--override", metavar="WHY", help="approve what the gate did not ship; shown everywhere")
    action("retire", "out of use for good", "ref").add_argument("--why", required=True, metavar="WHY")
    action("alias", "let NAME@ALIAS mean a version", "alias", "ref").add_argument("--why", metavar="WHY")
    action("verify", "hash every file and record again")
    action("gc", "remove stored bytes that nothing refers to")
    right = action("clock", "go on from the present time after entries by a clock that was ahead")
    right.add_argument("--why", required=True, metavar="WHY")
    pull = action("pull", "write an adapter to a folder, verified; a flagged one is refused", "ref")
    pull.add_argument("-o", "--out", required=True, metavar="FOLDER")
    pull.add_argument("--evidence", action="store_true", help="records and answers of its run too")
    action("push", "publish: mlflow:URI, hf:OWNER/NAME, or a folder, s3://, gs://, az://", "ref", "target")
    evaluate = action(
        "evaluate", "judge an unverified adapter on a task; makes a new version with a card", "ref", "task"
    )
    evaluate.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    evaluate.add_argument("--reopen-test", metavar="WHY", help="the reason, if this test set was opened before")
    again = action("reproduce", "train it again from its card and compare the bytes", "ref")
    again.add_argument("-o", "--out", required=True, metavar="FOLDER", help="where the run goes")
    again.add_argument("--folder", metavar="FOLDER", help="that the card's data paths start from; default: as recorded")
    _add_base(actions, shared)


def _add_base(actions: Any, shared: argparse.ArgumentParser) -> None:
    base = actions.add_parser("base", help="bases by fingerprint; a superseded one flags all that was made from it")
    acts = base.add_subparsers(dest="base_action", required=True, metavar="ACTION")
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
