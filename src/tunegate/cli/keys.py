"""``tunegate keys``: the file of keys of a server."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rich.markup import escape

from tunegate.cli.arguments import actions_of, whole
from tunegate.cli.console import Console


def add_parser(commands: Any, common: argparse.ArgumentParser) -> None:
    parser = commands.add_parser(
        "keys",
        help="the keys of a server: who may ask, how often, and for which models",
        description="Writes the file that `tunegate serve --keys FILE` reads, again whenever it changes. It holds a "
        "hash of each key; the key itself is shown once, when it is made. docs/serve.md",
    )
    does = actions_of(parser, "does", "WHAT")
    file = argparse.ArgumentParser(add_help=False)
    file.add_argument("--file", required=True, type=Path, metavar="FILE")
    add = does.add_parser("add", parents=[common, file], help="make a key, and show it this once")
    add.add_argument("name", metavar="NAME", help="whose key it is")
    for what in ("requests", "tokens"):
        add.add_argument(f"--{what}-per-minute", type=whole(1, 10**9), metavar="N", help="default: any number")
    add.add_argument(
        "--model", dest="models", action="append", metavar="NAME",
        help="it may use, or a pattern such as 'support-*'; may be repeated; default: all",
    )  # fmt: skip
    add.add_argument("--admin", action="store_true", help="it may load and unload adapters")
    does.add_parser("list", parents=[common, file], help="names and what they may do")
    remove = does.add_parser("remove", parents=[common, file], help="take a key away")
    remove.add_argument("name", metavar="NAME")


def keys(arguments: argparse.Namespace, console: Console) -> int:
    {"add": _add, "list": _list, "remove": _remove}[arguments.does](arguments, console)
    return 0


def _add(arguments: argparse.Namespace, console: Console) -> None:
    from tunegate.serve.keys import Key, add_key, hash_of, make_key

    secret = make_key()
    models = None if arguments.models is None else tuple(arguments.models)
    limits = (arguments.requests_per_minute, arguments.tokens_per_minute, models, arguments.admin)
    add_key(arguments.file, Key(arguments.name, hash_of(secret.encode()), *limits))
    console.line(f"the key of {arguments.name}; it is shown this once:")
    console.text(secret)
    console.result({"name": arguments.name, "key": secret})


def _list(arguments: argparse.Namespace, console: Console) -> None:
    from tunegate.serve.keys import read_keys

    found = read_keys(arguments.file)
    rows = [
        [
            escape(key.name),
            *(str(n or "any") for n in (key.requests_per_minute, key.tokens_per_minute)),
            "all" if key.models is None else escape(", ".join(key.models)) or "none",
            "yes" if key.admin else "",
        ]
        for key in found
    ]
    console.table(["name", "requests a minute", "tokens a minute", "models", "admin"], rows)
    console.result({"keys": [{"name": key.name, **key.limits()} for key in found]})


def _remove(arguments: argparse.Namespace, console: Console) -> None:
    from tunegate.serve.keys import remove_key

    remove_key(arguments.file, arguments.name)
    console.text(f"{escape(arguments.name)} has no key any more")
    console.result({"removed": arguments.name})
