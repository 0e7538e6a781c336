"""``tunegate registry``: adapters by what they are. ``registry_views`` shows, ``registry_bases`` is about bases."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape

from tunegate.cli import registry_bases, registry_views
from tunegate.cli.arguments import actions_of, task_of
from tunegate.cli.console import Console
from tunegate.cli.registry_views import opened, standing, told
from tunegate.errors import TunegateError

if TYPE_CHECKING:
    from tunegate.registry.entries import Version


def registry(arguments: argparse.Namespace, console: Console) -> int:
    """Run ``tunegate registry ACTION``."""
    return _ACTIONS[arguments.action](arguments, console)


def _init(arguments: argparse.Namespace, console: Console) -> int:
    made = opened(arguments, create=True, upgrade=True, store=arguments.store)
    console.text(f"registry  {escape(made.database.shown)}\nbytes     {escape(made.store.url)}")
    console.result({"registry": made.database.shown, "store": made.store.url})
    return 0


def _add(arguments: argparse.Namespace, console: Console) -> int:
    from tunegate.registry.adding import add
    from tunegate.registry.hub import fetched
    from tunegate.registry.intake import read_folder

    with fetched(arguments.folder, arguments.revision) as (folder, source):
        intake = read_folder(folder, name=arguments.name, base=arguments.base_name, source=source)
        found = add(opened(arguments, create=True), intake, why=arguments.why or "")
    if found.left_out:
        console.line(f"warning: left out: {', '.join(found.left_out)}")
    if found.unchecked:
        console.line(f"warning: modules and shapes were not compared with its base: {found.unchecked}")
    console.text(f"{'added' if found.new else 'there'}     {escape(found.version.ref)}  {found.version.adapter}")
    console.text(f"state     {standing(found.version)}")
    console.result(
        {
            **told(found.version), "new": found.new, "uploaded": found.uploaded, "left_out": found.left_out,
            "unchecked": found.unchecked,
        }
    )  # fmt: skip
    return 0


def _changed(version: Version, console: Console) -> int:
    console.text("  ".join([escape(version.ref), *(f"@{a}" for a in version.aliases), standing(version)]))
    console.result(told(version))
    return 0


def _promote(arguments: argparse.Namespace, console: Console) -> int:
    from tunegate.registry.states import promote

    found = promote(opened(arguments), arguments.ref, why=arguments.why, to=arguments.to, override=arguments.override)
    return _changed(found, console)


def _retire(arguments: argparse.Namespace, console: Console) -> int:
    from tunegate.registry.states import retire

    return _changed(retire(opened(arguments), arguments.ref, why=arguments.why), console)


def _alias(arguments: argparse.Namespace, console: Console) -> int:
    from tunegate.registry.states import set_alias

    return _changed(set_alias(opened(arguments), arguments.alias, arguments.ref, why=arguments.why or ""), console)


def _verify(arguments: argparse.Namespace, console: Console) -> int:
    from tunegate.registry.upkeep import verify

    found = verify(opened(arguments))
    said = f"{found.adapters} adapters, {found.files} files, {found.bytes:,} bytes and {found.records} records hashed"
    console.result({**asdict(found), "ok": not found.problems})
    if found.problems and not console.json_only:
        raise TunegateError(found.problems)
    console.text(f"{said}: [green]all as they were added[/]")
    return 1 if found.problems else 0


def _gc(arguments: argparse.Namespace, console: Console) -> int:
    from tunegate.registry.upkeep import collect

    found = collect(opened(arguments))
    console.text(f"removed   {found.objects} objects, {found.bytes:,} bytes; {found.pinned} kept for running uploads")
    console.result(asdict(found))
    return 0


def _clock(arguments: argparse.Namespace, console: Console) -> int:
    from tunegate.registry.upkeep import trust_clock

    ahead = trust_clock(opened(arguments), why=arguments.why)
    console.text(f"entries dated up to {ahead[:19]} stay as they are; from now on the clock is believed again")
    console.result({"ahead": ahead})
    return 0


def _pull(arguments: argparse.Namespace, console: Console) -> int:
    from tunegate.registry.pulling import pull

    version = pull(opened(arguments), arguments.ref, Path(arguments.out), evidence=arguments.evidence)
    console.text(f"pulled    {escape(version.ref)} to {escape(arguments.out)}\nstate     {standing(version)}")
    console.result({**told(version), "folder": arguments.out})
    return 0


def _push(arguments: argparse.Namespace, console: Console) -> int:
    from tunegate.registry.publish import push

    found = push(opened(arguments), arguments.ref, arguments.target, console.line)
    for key, value in found.items():
        console.text(f"{key:<10}{escape(str(value))}")
    console.result(found)
    return 0


def _evaluate(arguments: argparse.Namespace, console: Console) -> int:
    from tunegate.gate import SHIP
    from tunegate.pipeline.importing import evaluate_import

    config = task_of(arguments)
    outcome = evaluate_import(opened(arguments), arguments.ref, config, console, reopen=arguments.reopen_test)
    for rule in outcome.decision.rules:
        console.text(f"rule      {rule.verdict:<12} {escape(rule.rule)}: {escape(rule.got)}")
    console.text(f"decision  {outcome.decision.verdict}\nversion   {escape(str(outcome.version))}")
    console.result({"version": outcome.version, "run": str(outcome.folder), "decision": asdict(outcome.decision)})
    return 0 if outcome.decision.verdict == SHIP else 1


def _reproduce(arguments: argparse.Namespace, console: Console) -> int:
    from tunegate.pipeline.reproduce import reproduce

    found = reproduce(
        opened(arguments), arguments.ref, Path(arguments.out), console,
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


_ACTIONS = {
    **registry_views.ACTIONS, "init": _init, "add": _add, "promote": _promote, "retire": _retire, "alias": _alias,
    "verify": _verify, "gc": _gc, "clock": _clock, "pull": _pull, "push": _push, "evaluate": _evaluate,
    "reproduce": _reproduce, "base": registry_bases.base,
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
    actions = actions_of(parser, "action", "ACTION")

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
    add.add_argument(
        "--base-name", metavar="NAME", help="what its base is called here; default: the name that it gives"
    )
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
    registry_bases.add_parser(actions, shared)
