"""What four and eight bits cost: the error of each weight, and the perplexity of a base on prose and code of this
repository.

Every format quantizes the same layers (all linear ones but the head) of the same base, which then computes in fp32.
Perplexity is exp of the mean negative log likelihood over windows of 512 tokens, the first of each unpredicted. The
difference to the unquantized base is paired by window; its standard error is over windows.

    python benchmarks/quantization_error.py [--base smollm2-135m-instruct] [--tokens 6144] [--quick]

Results go to docs/benchmarks/quantization-error.json and .md, and into docs/quantization.md between its markers. The
last line is one JSON object. It measures no training: what adapters make of a quantized base is another question.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import common
import torch
from torch import nn

from tunegate.files import hash_bytes
from tunegate.kernels.formats import FORMATS, Recipe
from tunegate.kernels.nf4 import quantize_linears
from tunegate.model.loading import load_model, load_tokenizer
from tunegate.model.quantize import errors_of, mean_errors
from tunegate.model.resolve import resolve_base

ROOT = common.HERE.parent
PAGE = ROOT / "docs" / "quantization.md"
MARKERS = "<!-- results of benchmarks/quantization_error.py -->", "<!-- end of results -->"
TEXTS = {
    "prose": ("README.md", "CONTRIBUTING.md", "docs/architecture.md", "benchmarks/README.md"),
    "code": ("src/tunegate/gate_rules.py", "src/tunegate/files.py", "src/tunegate/adapter/layers.py"),
}
RECIPES = (
    Recipe("nf4"),
    Recipe("nf4", double=False),
    Recipe("fp4"),
    Recipe("int4"),
    Recipe("nf4", block=128),
    Recipe("int4", block=128),
    Recipe.of("int8"),
)
WINDOW = 512


def windows(base: Path, tokens: int) -> tuple[dict[str, list[list[int]]], str]:
    """Text -> windows of token ids, and the hash of the texts."""
    tokenizer = load_tokenizer(base)
    found, read = {}, b""
    for name, paths in TEXTS.items():
        text = "\n\n".join((ROOT / path).read_text(encoding="utf-8") for path in paths)
        read += text.encode("utf-8")
        ids = tokenizer(text)["input_ids"][:tokens]
        found[name] = [ids[i : i + WINDOW] for i in range(0, len(ids) - WINDOW + 1, WINDOW)]
    return found, hash_bytes(read)


@torch.no_grad()
def losses(model: nn.Module, rows: Sequence[Sequence[int]]) -> list[float]:
    """Mean negative log likelihood of each window, in nats."""
    found = []
    for row in rows:
        ids = torch.tensor([row])
        logits = model(ids, use_cache=False).logits[0, :-1].float()
        found.append(nn.functional.cross_entropy(logits, ids[0, 1:]).item())
    return found


def measure(base: Path, tokens: int, recipes: Sequence[Recipe]) -> dict[str, Any]:
    rows, digest = windows(base, tokens)
    plain: dict[str, list[float]] = {}
    results = []
    for recipe in (None, *recipes):
        model = load_model(base, dtype=torch.float32)
        if recipe is not None:
            quantize_linears(model, recipe=recipe)
        result: dict[str, Any] = {"recipe": "none" if recipe is None else str(recipe)}
        result["bits"] = 16 if recipe is None else round(recipe.bits_per_parameter, 3)
        for name, part in rows.items():
            found = losses(model, part)
            plain.setdefault(name, found)
            more = [a - b for a, b in zip(found, plain[name], strict=True)]
            error = statistics.stdev(more) / math.sqrt(len(more)) if len(more) > 1 else 0.0
            result[name] = {
                "perplexity": math.exp(statistics.mean(found)),
                "more_nats": statistics.mean(more),
                "standard_error": error,
                "losses": found,
            }
        results.append(result)
        print(result["recipe"], *(f"{name} {result[name]['perplexity']:.3f}" for name in rows), flush=True)
    return {"windows": {name: len(part) for name, part in rows.items()}, "texts": digest, "models": results}


def weight_errors(base: Path) -> dict[str, Any]:
    """Format -> errors over all quantized weights, and how often NF4 is nearer than each other 4-bit format."""
    model = load_model(base, dtype=torch.float32)
    head = model.get_output_embeddings()
    forms = [Recipe.of(form) for form in FORMATS]
    found = {
        name: errors_of(layer.weight.detach(), forms)
        for name, layer in model.named_modules()
        if type(layer) is nn.Linear and layer is not head
    }
    nearer = {form: sum(row["nf4"].rmse < row[form].rmse for row in found.values()) for form in ("fp4", "int4")}
    means = {form: asdict(error) for form, error in mean_errors(found).items()}
    tensors = {name: {form: asdict(error) for form, error in row.items()} for name, row in found.items()}
    return {"weights": len(found), "mean": means, "nf4_nearer": nearer, "tensors": tensors}


def markdown(result: dict[str, Any]) -> str:
    errors, models = result["errors"], result["perplexity"]
    rows = [
        [form, f"{e['rmse']:.4f}", f"{e['relative']:.4f}", f"{e['cosine']:.5f}"] for form, e in errors["mean"].items()
    ]
    nearer = ", ".join(f"{n} of {errors['weights']} against {form}" for form, n in errors["nf4_nearer"].items())
    lines = [
        f"Base: {result['base']}. {common.describe(result['machine'])}",
        f"Error of {errors['weights']} weights, means; 4 bits in blocks of 64 with double quantization. "
        f"NF4 is nearer in {nearer}.",
        common.table(["format", "RMSE", "relative", "cosine"], rows),
        "Perplexity, and nats a token above the unquantized base with their standard error over "
        + " and ".join(f"{n} windows of {name}" for name, n in models["windows"].items())
        + f" (texts {models['texts'][:15]}).",
    ]
    names = list(models["windows"])
    header = ["recipe", "bits", *(h for name in names for h in (name, "nats more"))]
    body = [
        [m["recipe"], m["bits"], *(c for name in names for c in _cells(m[name], m["recipe"]))] for m in models["models"]
    ]
    return "\n\n".join([*lines, common.table(header, body)])


def _cells(found: dict[str, Any], recipe: str) -> tuple[str, str]:
    more = "" if recipe == "none" else f"{found['more_nats']:+.4f} ± {found['standard_error']:.4f}"
    return f"{found['perplexity']:.3f}", more


def put_on_page(text: str, page: Path) -> None:
    """Replace what stands between the markers of ``page``."""
    start, end = MARKERS
    before, found, rest = page.read_text(encoding="utf-8").partition(start)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise SystemExit(f"{page} has no place for results: expected {start} and {end}")
    page.write_text(f"{before}{start}\n\n{text}\n\n{end}{after}", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="smollm2-135m-instruct")
    parser.add_argument("--tokens", type=int, default=6144, help="of each text")
    parser.add_argument(
        "--quick", action="store_true", help="two windows of each text, the default of each format, no files"
    )
    arguments = parser.parse_args()
    base = resolve_base(arguments.base)
    recipes = [r for r in RECIPES if r == Recipe.of(r.format)] if arguments.quick else list(RECIPES)
    result = {
        "base": base.name,
        "machine": common.machine(),
        "errors": weight_errors(base.path),
        "perplexity": measure(base.path, 2 * WINDOW if arguments.quick else arguments.tokens, recipes),
    }
    text = markdown(result)
    print(text)
    if not arguments.quick:
        common.write("quantization-error", result, f"# Quantization error\n\n{text}")
        put_on_page(text, PAGE)
    models = {
        m["recipe"]: {name: round(m[name]["perplexity"], 4) for name in TEXTS} for m in result["perplexity"]["models"]
    }
    print(json.dumps({"errors": result["errors"]["mean"], "nf4_nearer": result["errors"]["nf4_nearer"], **models}))


if __name__ == "__main__":
    main()
