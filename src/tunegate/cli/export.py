"""``tunegate export``: an adapter for PEFT, llama.cpp, Ollama, mlx-lm or vLLM, with proof that it is the same model."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rich.markup import escape

from tunegate.cli.arguments import whole
from tunegate.cli.console import Console
from tunegate.errors import InputError

FORMATS = ("peft", "gguf", "gguf-lora", "ollama", "mlx", "vllm")
_COLOURS = {"rejected": "red", "dropped": "red", "converted": "yellow", "note": "dim"}


def share(text: str) -> float:
    """A number of 0 or more, for the parser."""
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 <= number < 1e6:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of 0 or more")
    return number


def add_limits(parser: argparse.ArgumentParser) -> None:
    """The two bounds of a parity report."""
    parser.add_argument("--max-kl", type=share, metavar="NATS", help="mean KL a position at most; default 0.01")
    parser.add_argument(
        "--min-agreement", type=share, metavar="SHARE", help="positions with the same top token at least; default 0.95"
    )


def add_items(parser: argparse.ArgumentParser) -> None:
    """What is compared beside the golden prompts."""
    parser.add_argument(
        "--items",
        type=whole(0, 100_000),
        metavar="N",
        help="validation items to compare on, of each adapter; default 32, 0: none",
    )
    parser.add_argument(
        "--data", metavar="FOLDER|FILE",
        help="the task's folder, where the items lie (default: what the run noted), or other labelled examples",
    )  # fmt: skip


def items_of(arguments: argparse.Namespace) -> Any:
    from tunegate.pipeline.proof import ITEMS, Wanted

    data, count = arguments.data, arguments.items
    return Wanted(None if data is None else Path(data), ITEMS if count is None else count)


def limits_of(arguments: argparse.Namespace) -> Any:
    from tunegate.export.parity import Limits

    usual = Limits()
    kl, agreement = arguments.max_kl, arguments.min_agreement
    return Limits(usual.mean_kl if kl is None else kl, usual.agreement if agreement is None else agreement)


def add_parser(commands: Any, common: argparse.ArgumentParser) -> None:
    parser = commands.add_parser(
        "export",
        parents=[common],
        help="an adapter in another tool's format, with proof that it is the same model",
        description="Writes a folder, reads it back with the tool it is for where that is installed, and compares it "
        "with the adapter on its base. Fails and leaves nothing where they differ. docs/export.md",
    )
    parser.add_argument("adapter", metavar="ADAPTER", help="adapter folder, or a version in the registry: NAME@ALIAS")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--to", choices=FORMATS, help="the format")
    what.add_argument("--for", dest="check", choices=("vllm",), help="only say what this server makes of the adapter")
    parser.add_argument("-o", "--out", metavar="FOLDER", help="where the export goes; must not exist")
    parser.add_argument(
        "--outtype", choices=("f16", "bf16", "q8_0"), default="f16", help="numbers of a GGUF model; default f16"
    )
    parser.add_argument("--base", help="default: the base that the adapter's card names")
    parser.add_argument(
        "--onto", choices=("trained", "original"), default="trained",
        help="GGUF models, after training on a quantized base: the weights that the adapter saw, or the original ones",
    )  # fmt: skip
    parser.add_argument("--reader", metavar="NAME", help="what reads the export back; default: the first one installed")
    add_limits(parser)
    add_items(parser)
    parser.add_argument("--allow-base-mismatch", action="store_true", help="export on another base; recorded")
    parser.add_argument("--registry", metavar="WHERE", help="refuse adapters of bases that are flagged there")


def export(arguments: argparse.Namespace, console: Console) -> int:
    from tunegate.pipeline.export import check_for_vllm
    from tunegate.pipeline.export import export as run_export
    from tunegate.pipeline.formats import ExportRequest
    from tunegate.registry.pulling import adapter_folders

    if arguments.check and arguments.out is not None:
        raise InputError("--for only says what the server makes of it", where="--out", fix=f"--to {arguments.check}")
    adapter = Path(adapter_folders([arguments.adapter], arguments.registry, "exported", console.line)[0])
    if arguments.check:
        return _tell(check_for_vllm(adapter, arguments.base, console), console)
    if arguments.out is None:
        raise InputError("where should it go?", where="--out", expected="a folder that does not exist")
    request = ExportRequest(
        adapter, arguments.to, Path(arguments.out), arguments.outtype, arguments.base, arguments.onto,
        arguments.reader, limits_of(arguments), arguments.allow_base_mismatch,
        items_of(arguments),
    )  # fmt: skip
    report = run_export(request, console)
    console.text(f"exported  {report['changed']} of {report['modules']} adapted modules, format {report['format']}")
    console.text(f"parity    {parity_line(report['parity'])}, read by {report['reader']}")
    tell_items(report, console)
    for note in report["notes"]:
        console.text(f"note      {escape(note)}")
    console.text(f"folder    {escape(str(request.out))}")
    console.result(report)
    return 0


def _tell(findings: list[dict[str, str]], console: Console) -> int:
    """Each finding on a line; 1 if the adapter would be rejected or would not act."""
    from tunegate.export.vllm import AGAINST

    for finding in findings:
        fix = f" ({finding['fix']})" if finding["fix"] else ""
        colour = _COLOURS[finding["level"]]
        console.text(f"[{colour}]{finding['level']:<10}[/] {escape(finding['what'])}{escape(fix)}")
    console.result({"findings": findings})
    return int(any(f["level"] in AGAINST for f in findings))


def tell_items(report: dict[str, Any], console: Console) -> None:
    """A line for each adapter's items: the two models on them, and the task's metric of both."""
    for items in report["items"]:
        (one, other), by = items["scores"], items["comparison"]
        console.text(f"items     {parity_line(items)}: {escape(items['data'])}")
        console.text(
            f"task      {escape(items['metric'])} {other:.4f}, the adapter's {one:.4f}: {by['difference']:+.4f} "
            f"({by['low']:+.3f} to {by['high']:+.3f})"
        )
    for reason in report["items_absent"]:
        console.text(f"items     none: {escape(reason)}")


def parity_line(parity: dict[str, Any]) -> str:
    moved = "" if parity["moved"] is None else f" (from the base it is {parity['moved']:.2g})"
    gap = parity["parted"]
    parted = "" if gap is None else f", parting where the adapter's token is at most {gap:.2g} nats ahead"
    return (
        f"mean KL {parity['mean_kl']:.2g} nats{moved}, the same top token at "
        f"{parity['agreement']:.1%} of {parity['positions']} positions, {parity['same_answers']:.0%} of "
        f"{parity['prompts']} answers equal{parted}"
    )
