"""``tunegate deploy``: the files of a deployment, and which kind of deployment fits."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape

from tunegate.cli.arguments import actions_of, whole
from tunegate.cli.console import Console
from tunegate.cli.quantize import size
from tunegate.errors import InputError

if TYPE_CHECKING:
    from tunegate.serve.advise import Measured
    from tunegate.serve.deploy import Deployment

KINDS, TARGETS = ("merged", "multi", "separate"), ("systemd", "docker", "compose", "kubernetes")


def _named(text: str) -> tuple[str, str]:
    name, mark, source = text.partition("=")
    if not mark or not name or not source:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=SOURCE, such as support=support@production")
    return name, source


def _positive(text: str) -> float:
    try:
        found = float(text)
    except ValueError:
        found = 0.0
    if not 0 < found < 1e9:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return found


def _traffic(text: str) -> tuple[str, float]:
    name, mark, rate = text.rpartition("=")
    if not mark or not name:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=REQUESTS, such as support=0.5")
    return name, _positive(rate)


def add_parser(commands: Any, common: argparse.ArgumentParser) -> None:
    parser = commands.add_parser(
        "deploy",
        help="systemd units, a Dockerfile, a compose file or Kubernetes objects for a server; or which kind fits",
        description="merged: one model with its adapter in the weights. multi: many adapters on one base in one "
        "server. separate: a server for each adapter. docs/serve.md",
    )
    kinds = actions_of(parser, "kind", "KIND")
    for kind, text in (
        ("merged", "one model with its adapter in the weights"),
        ("multi", "many adapters on one base in one server"),
        ("separate", "a server for each adapter"),
    ):
        _add_files(kinds.add_parser(kind, parents=[common], help=text))
    _add_advise(kinds.add_parser("advise", parents=[common], help="which of the three fits, from measured figures"))


def _add_files(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--to", required=True, choices=TARGETS)
    parser.add_argument("-o", "--out", required=True, type=Path, metavar="FOLDER", help="where the files go")
    parser.add_argument(
        "--base", action="append", default=[], metavar="BASE",
        help="packaged name, folder or hub id; for `separate` once for all adapters or once for each, in their order",
    )  # fmt: skip
    parser.add_argument(
        "--adapter", dest="adapters", type=_named, action="append", default=[], metavar="NAME=SOURCE",
        help="a folder, or NAME@ALIAS, NAME:NUMBER or a hash in the registry; may be repeated",
    )  # fmt: skip
    parser.add_argument(
        "--merged", action="append", default=[], metavar="NAME", help="an adapter that runs on weights of its own"
    )
    parser.add_argument(
        "--keys", type=Path, metavar="FILE", help="of `tunegate keys`, in a folder of its own; default: one key"
    )
    parser.add_argument("--registry", metavar="WHERE", help="a folder, or a database's URL, which stays a secret")
    parser.add_argument("--name", default="tunegate", help="of units, services and objects; default: tunegate")
    parser.add_argument("--port", type=whole(1), default=8000, help="on the host, of the first server; default: 8000")
    parser.add_argument("--kv-cache", type=size, default="1GiB", metavar="SIZE", help="default: 1GiB")
    parser.add_argument("--adapter-cache", type=size, default="1GiB", metavar="SIZE", help="default: 1GiB")
    parser.add_argument("--max-rows", type=whole(1), default=64, metavar="N", help="of a batch; default: 64")
    parser.add_argument("--max-context", type=whole(1), metavar="TOKENS")
    parser.add_argument("--cpus", type=_positive, default=2.0, metavar="N", help="cores of each server; default: 2")
    parser.add_argument(
        "--quantization", choices=("nf4", "int8", "none"), default="none", help="of the base; default: none"
    )
    parser.add_argument("--image", default="tunegate:local", metavar="TAG", help="default: tunegate:local")
    parser.add_argument("--replicas", type=whole(1), default=1, metavar="N", help="of each server (kubernetes)")
    parser.add_argument("--allow-ungated", action="store_true", help="also adapters that the gate did not ship")


def _add_advise(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--adapter", dest="traffic", type=_traffic, action="append", required=True, metavar="NAME=REQUESTS",
        help="requests a second that an adapter gets at the busiest time; may be repeated",
    )  # fmt: skip
    parser.add_argument("--latency", type=_positive, metavar="SECONDS", help="what an answer may take at that time")
    parser.add_argument("--bases", type=whole(1), default=1, metavar="N", help="different bases; default: 1")
    parser.add_argument("--new-tokens", type=_positive, default=64, metavar="N", help="of an answer; default: 64")
    parser.add_argument("--prompt-tokens", type=whole(1), default=256, metavar="N", help="default: 256")
    parser.add_argument("--memory", type=size, metavar="SIZE", help="of a machine; default: this one's")
    how = parser.add_mutually_exclusive_group(required=True)
    how.add_argument("--measured", type=Path, metavar="FILE", help="figures of an earlier --probe (JSON)")
    how.add_argument("--probe", metavar="BASE", help="measure this base here, about a minute")
    parser.add_argument("--probe-rank", type=whole(1), default=16, metavar="R", help="of its adapters; default: 16")
    parser.add_argument("--save", type=Path, metavar="FILE", help="keep the probe's figures")


def deploy(arguments: argparse.Namespace, console: Console) -> int:
    return _advise(arguments, console) if arguments.kind == "advise" else _files(arguments, console)


def _files(arguments: argparse.Namespace, console: Console) -> int:
    from tunegate.files import write_text
    from tunegate.serve.deploy_files import files_for

    deployment = _planned(arguments, console)
    files = files_for(deployment, arguments.to)
    if taken := [str(arguments.out / name) for name in files if (arguments.out / name).exists()]:
        raise InputError("files stand there already", where="-o", got=", ".join(taken), fix="name another folder")
    for name, text in files.items():
        write_text(arguments.out / name, text)
    if (script := arguments.out / "run.sh").exists():
        script.chmod(0o755)
    for server in deployment.servers:
        rows = [[p.name, f"{p.bytes / 1e9:,.2f} GB", escape(p.how)] for p in server.memory]
        rows.append(["limit", f"{server.limit_mib * 2**20 / 1e9:,.2f} GB", "and a tenth, in units of 64 MiB"])
        console.table(["memory", "", ""], rows, title=f"{server.name}, port {server.port}")
    if deployment.secrets:
        console.text(f"secrets   {', '.join(deployment.secrets)}: named in the files, not held")
    console.text("\n".join(f"wrote     {escape(str(arguments.out / name))}" for name in files))
    console.result(
        {
            "files": [str(arguments.out / name) for name in files],
            "secrets": list(deployment.secrets),
            "servers": [
                {"name": s.name, "port": s.port, "memory": {p.name: p.bytes for p in s.memory},
                 "limit_mib": s.limit_mib}
                for s in deployment.servers
            ],
        }
    )  # fmt: skip
    return 0


def _planned(arguments: argparse.Namespace, console: Console) -> Deployment:
    from tunegate.model.resolve import resolve_config
    from tunegate.plan.shapes import packing, shape_of_folder
    from tunegate.registry.entries import is_reference
    from tunegate.serve.deploy import Deployment, Sizes, plan_deployment
    from tunegate.serve.keys import read_keys

    problems = []
    for name, source in arguments.adapters:
        if not Path(source).expanduser().is_dir():
            if not is_reference(source):
                problems.append(f"{name}={source}")
            elif arguments.registry is None:
                raise InputError("a reference into which registry?", where="--registry", got=f"{name}={source}")
    if arguments.keys is not None:
        read_keys(arguments.keys)
    if problems:
        raise InputError("neither folders nor references of the registry", where="--adapter", got=", ".join(problems))
    folders = [resolve_config(base, report=console.line)[0] for base in arguments.base]
    shapes = [shape_of_folder(folder, base) for folder, base in zip(folders, arguments.base, strict=True)]
    sizes = Sizes(
        arguments.kv_cache, arguments.adapter_cache, arguments.max_rows, arguments.cpus,
        packing(arguments.quantization), arguments.max_context,
    )  # fmt: skip
    each = arguments.base if len(arguments.base) > 1 else ()
    return plan_deployment(
        arguments.kind, arguments.base[0] if arguments.base else None, arguments.adapters, shapes, sizes,
        name=arguments.name, port=arguments.port, bases=each,
        deployment=Deployment(
            arguments.kind, arguments.name, (), arguments.registry, arguments.image, arguments.replicas,
            arguments.allow_ungated, arguments.keys and arguments.keys.absolute(), tuple(arguments.merged),
        ),
    )  # fmt: skip


def _advise(arguments: argparse.Namespace, console: Console) -> int:
    from tunegate.plan.devices import total_memory
    from tunegate.serve.advise import Wanted, advise

    measured = _measured(arguments, console)
    wanted = Wanted(
        tuple(arguments.traffic), arguments.new_tokens, arguments.latency, arguments.bases,
        arguments.memory or total_memory(),
    )  # fmt: skip
    advice = advise(wanted, measured)
    for option in advice.options:
        console.text(f"\n[bold]{option.kind}[/]{'' if option.fits else '  does not fit'}")
        for line in option.shown:
            console.text(f"  {escape(line)}")
        for reason in option.reasons:
            console.text(f"  [red]{escape(reason)}[/]")
    console.text(f"\n[bold]{advice.kind or 'none fits'}[/]  {escape(advice.why)}")
    console.result(advice.to_json())
    return 0 if advice.kind else 1


def _measured(arguments: argparse.Namespace, console: Console) -> Measured:
    import asyncio
    from dataclasses import asdict

    from tunegate.files import write_json
    from tunegate.serve.advise import measured_from

    if arguments.measured:
        try:
            return measured_from(json.loads(arguments.measured.read_text(encoding="utf-8")), str(arguments.measured))
        except (OSError, ValueError) as error:
            raise InputError("not a file of figures", where=str(arguments.measured), got=str(error)) from error
    from tunegate.model.resolve import resolve_base
    from tunegate.serve.engine_process import EngineProcess
    from tunegate.serve.jobs import EngineOptions
    from tunegate.serve.probing import probe

    base = resolve_base(arguments.probe, report=console.line).path
    console.line(f"probing {arguments.probe}: about a minute")
    found: Measured = asyncio.run(
        probe(EngineProcess(EngineOptions(str(base))), base, arguments.prompt_tokens, rank=arguments.probe_rank)
    )
    if arguments.save:
        write_json(arguments.save, asdict(found))
    return found
