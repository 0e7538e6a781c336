"""``tunegate quantize``: a base's checkpoint into one of 4 or 8 bits that tunegate, transformers and vLLM load."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape

from tunegate.cli.console import Console
from tunegate.errors import InputError
from tunegate.files import write_json

if TYPE_CHECKING:
    from tunegate.model.quantize import Done, Error

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 2**10, "MI": 2**20, "GI": 2**30}


def quantize(arguments: argparse.Namespace, console: Console) -> int:
    from tunegate.kernels.formats import FORMATS, Recipe
    from tunegate.model.quantize import plan_quantization, write_quantized
    from tunegate.model.resolve import resolve_base

    try:
        recipe = Recipe.of(arguments.format, arguments.block, False if arguments.no_double_quant else None)
    except ValueError as error:
        raise InputError(str(error), where="--block") from None
    report = Path(arguments.report) if arguments.report else None
    base = resolve_base(arguments.base, arguments.revision, report=console.line)
    skip = [name for text in arguments.skip for name in text.split(",") if name]
    plan = plan_quantization(
        base.path, Path(arguments.out), recipe, skip=skip, shard_bytes=arguments.max_shard_size
    )  # fmt: skip
    compare = FORMATS if arguments.compare else (recipe.format,) if report else ()
    with console.progress("quantizing, bytes", plan.bytes_read()) as advance:
        done = write_quantized(plan, name=base.name, compare=compare, progress=advance)
    result = _result(done, str(recipe), list(plan.kept))
    if report is not None:
        write_json(report, {**result, "tensors": _tensors(done)})
    _print(done, str(recipe), len(plan.kept), console)
    if report is not None:
        console.text(f"report    {escape(str(report))}")
    console.result(result)
    return 0


def _result(done: Done, recipe: str, kept: list[str]) -> dict[str, Any]:
    from tunegate.model.quantize import mean_errors

    return {
        "written": str(done.folder),
        "recipe": recipe,
        "quantized": done.quantized,
        "copied": done.copied,
        "kept_linears": kept,
        "bytes_before": done.bytes_before,
        "bytes_after": done.bytes_after,
        "errors": {form: asdict(error) for form, error in mean_errors(done.errors).items()},
    }


def _tensors(done: Done) -> dict[str, Any]:
    return {name: {form: asdict(e) for form, e in errors.items()} for name, errors in done.errors.items()}


def _print(done: Done, recipe: str, kept: int, console: Console) -> None:
    from tunegate.model.quantize import mean_errors

    if done.errors:
        kinds: dict[str, dict[str, Mapping[str, Error]]] = {}
        for name, row in done.errors.items():
            kinds.setdefault(name.removesuffix(".weight").rpartition(".")[2], {})[name] = row
        everything = mean_errors(done.errors)
        groups = [(f"{kind} ({len(rows)})", mean_errors(rows)) for kind, rows in sorted(kinds.items())]
        rows = [[escape(kind), *(f"{e.relative:.4f}" for e in means.values())] for kind, means in groups]
        console.table(["weights", *everything], rows, title="relative error against the original weights")
        measures = [[f, f"{e.rmse:.3g}", f"{e.relative:.4f}", f"{e.cosine:.5f}"] for f, e in everything.items()]
        console.table([f"mean of {len(done.errors)}", "RMSE", "relative", "cosine"], measures)
    console.text(
        f"wrote     {escape(str(done.folder))}: {done.quantized} weights in {recipe}, {done.copied} tensors copied, "
        f"{kept} linear layers kept\n"
        f"size      {done.bytes_before / 1e6:,.1f} MB to {done.bytes_after / 1e6:,.1f} MB"
    )


def size(text: str) -> int:
    """Bytes of ``5GB``, ``500 MiB`` or a plain number, for the parser."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]I?)?B?", text.strip(), re.ASCII | re.IGNORECASE)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 5GB or 500MB")
    return int(float(found[1]) * _UNITS[(found[2] or "").upper()])
