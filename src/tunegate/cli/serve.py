"""``tunegate serve``: many adapters on one base, behind OpenAI's API."""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape

from tunegate.cli.arguments import whole
from tunegate.cli.console import Console
from tunegate.cli.quantize import size
from tunegate.cli.vllm import add_vllm_options
from tunegate.errors import InputError

if TYPE_CHECKING:
    from tunegate.serve.base import ServedBase
    from tunegate.serve.catalogue import Catalogue, Served
    from tunegate.serve.engine_client import EngineClient
    from tunegate.serve.guard import Keys
    from tunegate.serve.start import Wanted

SHOWN = 20  # adapters in the table at the start
_SLACK = 60.0  # seconds that a client has to read the end of an answer that took as long as one may
_COLOURS = {"ship": "green", "base": "dim"}


def _named(text: str) -> tuple[str, str]:
    name, mark, source = text.partition("=")
    if not mark or not name or not source:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=SOURCE, such as support=runs/support/adapter")
    return name, source


def _seconds(text: str) -> float:
    try:
        found = float(text)
    except ValueError:
        found = -1.0
    if not 0 < found < 1e6:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds above 0")
    return found


def add_parser(commands: Any, common: argparse.ArgumentParser) -> None:
    parser = commands.add_parser(
        "serve",
        parents=[common],
        help="many adapters on one base, behind OpenAI's API",
        description="Serves a base and adapters of it. An adapter that was not made for this base, that the gate did "
        "not ship or that changed since is refused. SIGTERM finishes what is under way. `tunegate serve advise` says "
        "whether one server, merged models or several servers fit. docs/serve.md",
    )
    parser.add_argument(
        "base", nargs="?", metavar="BASE", help="packaged name, folder or hub id; default: what the cards name"
    )
    parser.add_argument("--revision", help="of a hub id: branch, tag or commit")
    parser.add_argument("--base-name", default="", metavar="NAME", help="what clients call the base alone")
    parser.add_argument(
        "--adapter", dest="adapters", type=_named, action="append", default=[], metavar="NAME=SOURCE",
        help="an adapter folder, or NAME@ALIAS, NAME:NUMBER or a hash in the registry; may be repeated",
    )  # fmt: skip
    parser.add_argument(
        "--registry", nargs="?", const="", metavar="WHERE",
        help="follow this registry's aliases and flags; without --adapter serve all it has in production on this base",
    )  # fmt: skip
    parser.add_argument("--poll", type=_seconds, default=2.0, metavar="SECONDS", help="between looks; default 2")
    parser.add_argument(
        "--allow-ungated", action="store_true", help="also adapters without a card, or held by the gate; always shown"
    )
    parser.add_argument("--pin", action="append", default=[], metavar="NAME", help="load now, never push out")
    parser.add_argument(
        "--merged", action="append", default=[], metavar="NAME",
        help="run on weights of its own, as fast as the base and in as much memory again; loaded now",
    )  # fmt: skip
    parser.add_argument("--preload", action="append", default=[], metavar="NAME", help="load now")
    _add_network(parser)
    _add_engine(parser)
    add_vllm_options(parser)


def _add_network(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--host", default="127.0.0.1", help="default: 127.0.0.1, this machine only")
    parser.add_argument("--port", type=whole(0, 65535), default=8000, help="default: 8000; 0: any that is free")
    parser.add_argument(
        "--allow-host", dest="hosts", action="append", default=[], metavar="NAME",
        help="without keys, on this machine only: also requests that were sent to this name, as by a proxy",
    )  # fmt: skip
    parser.add_argument("--api-key-env", metavar="VAR", help="requests need the key that this variable holds")
    parser.add_argument(
        "--keys", type=Path, metavar="FILE", help="or one of this file (`tunegate keys add`), followed as it changes"
    )
    parser.add_argument(
        "--load-requests", action="store_true",
        help="take load and unload requests where other machines reach this one; else only from here",
    )  # fmt: skip
    parser.add_argument(
        "--adapter-root", dest="roots", type=Path, action="append", default=[], metavar="FOLDER",
        help="load requests may name folders below it; default: registry references only",
    )  # fmt: skip
    parser.add_argument(
        "--max-connections", type=whole(1, 10**6), default=2048, metavar="N", help="further ones get 503; default: 2048"
    )
    parser.add_argument(
        "--idle-timeout", type=_seconds, default=30.0, metavar="SECONDS",
        help="for a connection without a request, and for a request's head; default 30",
    )  # fmt: skip
    parser.add_argument(
        "--body-timeout", type=_seconds, default=30.0, metavar="SECONDS", help="for reading a request; default 30"
    )
    parser.add_argument(
        "--answer-timeout", type=_seconds, default=1800.0, metavar="SECONDS",
        help="from a request to the end of its answer; default 1800",
    )  # fmt: skip
    parser.add_argument(
        "--grace", type=_seconds, default=30.0, metavar="SECONDS", help="for answers under way at the end; default 30"
    )


def _add_engine(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--engine", choices=("native", "vllm"), default="native", help="default: native")
    parser.add_argument(
        "--vllm-python", default=sys.executable, metavar="PATH", help="of the environment that has vLLM; default: this"
    )
    parser.add_argument(
        "--quantization", choices=("nf4", "int8", "none"), help="of the base; default: as the adapters were trained"
    )
    parser.add_argument("--compute-dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    parser.add_argument(
        "--adapter-dtype", choices=("auto", "float32", "bfloat16"), default="auto",
        help="what adapters are kept in; default: what the base computes in",
    )  # fmt: skip
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--threads", type=whole(0, 1024), default=0, metavar="N", help="default: all")
    parser.add_argument("--kv-cache", type=size, default="1GiB", metavar="SIZE", help="default: 1GiB")
    parser.add_argument("--adapter-cache", type=size, default="1GiB", metavar="SIZE", help="default: 1GiB")
    parser.add_argument("--max-rows", type=whole(1, 4096), default=64, metavar="N", help="of a batch; default: 64")
    parser.add_argument(
        "--max-waiting", type=whole(0, 10**6), default=1024, metavar="N", help="further ones get 429; default: 1024"
    )
    parser.add_argument(
        "--max-context", type=whole(16, 10**7), metavar="TOKENS", help="prompt with answer; default: the base's own"
    )
    parser.add_argument("--trust-remote-code", action="store_true", help="run Python code that the base brings")


def serve(arguments: argparse.Namespace, console: Console) -> int:
    from tunegate.serve.connections import open_files
    from tunegate.serve.start import LOOPBACK, bind
    from tunegate.serve.telling import begin as begin_log

    _check_installed()
    open_files(arguments.max_connections)
    keys = _keys(arguments)
    wanted = _wanted(arguments)
    local = arguments.host in LOOPBACK
    if not local and keys is None:
        console.line("warning: other machines reach this server, and it asks for no key (--api-key-env, --keys)")
    with bind(arguments.host, arguments.port) as bound:
        begin_log(debug=arguments.debug)
        asyncio.run(_run(arguments, wanted, keys, bound, local or arguments.load_requests, console))
    console.line("stopped")
    return 0


async def _run(
    arguments: argparse.Namespace, wanted: Wanted, keys: Keys | None, bound: Any, admin: bool, console: Console
) -> None:
    import torch

    from tunegate.serve.app import create_app
    from tunegate.serve.catalogue import Catalogue
    from tunegate.serve.connections import Bounds
    from tunegate.serve.exchange import Limits
    from tunegate.serve.guard import HostGuard
    from tunegate.serve.start import LOOPBACK, find_base, house_of, serve, url_of

    torch.set_num_threads(1)  # the cores are the engine's; this process hashes and checks
    base = find_base(wanted, console.line)
    engine = _engine(arguments, base, wanted, console)
    catalogue = Catalogue(engine, house_of(wanted, base), roots=wanted.roots, merged=wanted.merged)
    limits = Limits(body_seconds=arguments.body_timeout, answer_seconds=arguments.answer_timeout)
    app: Any = create_app(engine, catalogue, limits=limits, admin=admin, keys=keys)
    if keys is None and arguments.host in LOOPBACK:
        app = HostGuard(app, arguments.hosts)
    busy = arguments.body_timeout + arguments.answer_timeout + _SLACK
    await serve(
        engine, catalogue, wanted, app, bound,
        Bounds(arguments.max_connections, idle=arguments.idle_timeout, busy=busy, grace=arguments.grace),
        lambda: console.line(f"{base.name}: starting the engine"),
        lambda c: _tell(c, engine, url_of(bound), console),
    )  # fmt: skip


def _check_installed() -> None:
    missing = [name for name in ("fastapi", "uvicorn", "prometheus_client") if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(
            f"the server's packages are not installed: {', '.join(missing)}", fix="pip install 'tunegate[serve]'"
        )


def _keys(arguments: argparse.Namespace) -> Keys | None:
    """Who may ask: whoever has the variable's key or one of the file; None for everybody."""
    from tunegate.serve.guard import Keys

    variable, own = arguments.api_key_env, None
    if variable is not None:
        own = variable, os.environ.get(variable, "").strip()
        if not own[1]:
            fix = f"export {variable}=..."
            raise InputError("the variable holds no key", where=f"--api-key-env {variable}", fix=fix)
    return None if own is None and arguments.keys is None else Keys(own, arguments.keys)


def _wanted(arguments: argparse.Namespace) -> Wanted:
    """What the command line asks for; the registry is opened where one is named or an adapter comes from one."""
    from tunegate.registry.entries import is_reference
    from tunegate.registry.opening import in_use, open_registry
    from tunegate.serve.start import Wanted

    names = [name for name, _ in arguments.adapters]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise InputError("a name is given twice", where="--adapter", got=", ".join(twice))
    if missing := [str(root) for root in arguments.roots if not root.is_dir()]:
        raise InputError("no such folder", where="--adapter-root", got=", ".join(missing))
    if not (arguments.base or arguments.adapters or arguments.registry is not None):
        raise InputError(
            "what is to be served?", fix="tunegate serve BASE, or --adapter NAME=SOURCE, or --registry, or all of them"
        )
    references = any(is_reference(source) and not Path(source).is_dir() for _, source in arguments.adapters)
    followed = arguments.registry is not None
    registry = open_registry(arguments.registry or None) if followed or references or in_use(None) else None
    return Wanted(
        base=arguments.base, revision=arguments.revision, base_as=arguments.base_name,
        adapters=tuple(arguments.adapters), registry=registry, everything=followed and not arguments.adapters,
        allow_ungated=arguments.allow_ungated, quantization=arguments.quantization, roots=tuple(arguments.roots),
        pinned=tuple(arguments.pin), merged=tuple(arguments.merged), preload=tuple(arguments.preload),
        poll=arguments.poll, trust_remote_code=arguments.trust_remote_code,
    )  # fmt: skip


def _engine(arguments: argparse.Namespace, base: ServedBase, wanted: Wanted, console: Console) -> EngineClient:
    recipe = base.at_hand.recipe
    if arguments.engine == "vllm":
        return _vllm(arguments, base, wanted, console)
    from tunegate.serve.engine_process import EngineProcess
    from tunegate.serve.jobs import EngineOptions

    options = EngineOptions(
        base=str(base.resolved.path),
        recipe=None if recipe is None else dict(recipe),
        compute_dtype=arguments.compute_dtype,
        adapter_dtype=arguments.adapter_dtype,
        device=arguments.device,
        threads=arguments.threads,
        cache_bytes=arguments.kv_cache,
        adapter_bytes=arguments.adapter_cache,
        most_rows=arguments.max_rows,
        most_waiting=arguments.max_waiting,
        context=arguments.max_context,
        trust_remote_code=arguments.trust_remote_code,
    )
    return EngineProcess(options)


def _vllm(arguments: argparse.Namespace, base: ServedBase, wanted: Wanted, console: Console) -> EngineClient:
    from tunegate.cli.vllm import vllm_options
    from tunegate.serve.vllm_engine import VllmEngine

    at_hand = base.at_hand
    if arguments.merged:
        raise InputError(
            "vLLM runs no adapter on weights of its own beside the base", where="--merged",
            fix="serve it with --engine native; or `tunegate merge` it and serve the merged folder as a base",
        )  # fmt: skip
    if at_hand.recipe is not None:
        raise InputError(
            "vLLM does not quantize a base as the training did", where="--engine vllm",
            fix="serve it with --engine native; or merge the adapter and serve the merged model",
        )  # fmt: skip
    folders = {name: Path(source) for name, source in wanted.adapters if Path(source).is_dir()}
    options = vllm_options(
        arguments, base.resolved.path, at_hand.name, at_hand.fingerprint.total, folders, console
    )  # fmt: skip
    return VllmEngine(options, most_waiting=arguments.max_waiting)


def _tell(catalogue: Catalogue, engine: EngineClient, url: str, console: Console) -> None:
    """What is served, when it is."""
    from tunegate.adapter.card import recipe_text

    base, *adapters = catalogue.names()
    rows = [_row(served) for served in (base, *adapters[:SHOWN])]
    console.table(["model", "standing", "content", "from"], rows)
    if len(adapters) > SHOWN:
        console.text(f"and {len(adapters) - SHOWN} more adapters: GET /v1/models")
    recipe = catalogue.house.base.at_hand.recipe
    console.text(
        f"base      {escape(catalogue.house.base.at_hand.name)}, {base.fingerprint}, {escape(recipe_text(recipe))}\n"
        f"engine    {engine.facts.path}, {engine.facts.dtype}, context {engine.facts.context:,} tokens\n"
        f"address   {url}\nCtrl-C ends it"
    )
    models = [
        {"name": s.name, "standing": s.standing, "fingerprint": s.fingerprint, "root": s.root}
        for s in (base, *adapters)
    ]  # fmt: skip
    console.result({"address": url, "base": base.fingerprint, "models": models, "engine": asdict(engine.facts)})


def _row(served: Served) -> list[str]:
    colour = _COLOURS.get(served.standing, "yellow")
    standing = f"[{colour}]{escape(served.standing)}[/]"
    return [escape(served.name), standing, served.fingerprint[:15], escape(served.root)]
