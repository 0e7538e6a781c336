"""What ``serve.py`` makes of its figures: medians with their range, ratios, Markdown, and the plot of two curves."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import common

Figures = dict[str, list[float]]
OURS, OURS_NF4, THEIRS, THEIRS_BASE = "tunegate", "tunegate nf4", "vllm", "vllm base only"
_UNITS = {" ms": 1, " s": 1, " seconds": 3, " first token": 3, " GB": 2, " req/s": 2, " tok/s": 0}


def summarise(figures: dict[str, Figures]) -> dict[str, Any]:
    """Every figure's median and range, by contestant, and the headline's ratios; None where one side is missing."""
    found = {
        name: {what: common.summary(values) for what, values in mine.items() if not what.startswith("warm-up")}
        for name, mine in figures.items()
    }

    def median(name: str, what: str) -> float | None:
        one = found.get(name, {}).get(what)
        return one["median"] if one else None

    def best(what: str, choose: Any) -> float | None:
        """vLLM's better figure on the base."""
        known = [value for name in (THEIRS, THEIRS_BASE) if (value := median(name, what)) is not None]
        return choose(known) if known else None

    def cost(what: str) -> float | None:
        """What share of the base's throughput a mixture costs."""
        kept = common.ratio(median(OURS, what), median(OURS, "base req/s"))
        return None if kept is None else round(1 - kept, 3)

    def ours(what: str) -> float | None:
        value = median(OURS, what)
        return None if value is None else round(value, 1)

    headline = {
        "base_throughput": common.ratio(median(OURS, "base req/s"), best("base req/s", max)),
        "one_adapter_throughput": common.ratio(median(OURS, "1 adapter req/s"), median(THEIRS, "1 adapter req/s")),
        "four_adapters_throughput": common.ratio(median(OURS, "4 adapters req/s"), median(THEIRS, "4 adapters req/s")),
        "base_latency": common.ratio(median(OURS, "base seconds"), best("base seconds", min)),
        "adapter_latency": common.ratio(median(OURS, "adapter seconds"), median(THEIRS, "adapter seconds")),
        "base_first_token": common.ratio(median(OURS, "base first token"), best("base first token", min)),
        "adapter_first_token": common.ratio(median(OURS, "adapter first token"), median(THEIRS, "adapter first token")),
        "nf4_throughput_vs_16_bit": common.ratio(median(OURS_NF4, "base req/s"), median(OURS, "base req/s")),
        "nf4_latency_vs_16_bit": common.ratio(median(OURS_NF4, "base seconds"), median(OURS, "base seconds")),
        "one_adapter_costs": cost("1 adapter req/s"),
        "four_adapters_cost": cost("4 adapters req/s"),
        "64_adapters_cost": cost("64 adapters req/s"),
        "64_adapters_cost_first_requests": cost("64 adapters, first req/s"),
        "load_ms": ours("load ms"),
        "calm_pause_ms": ours("calm pause ms"),
        "pause_while_loading_ms": ours("pause while loading ms"),
    }  # fmt: skip
    return {"figures": found, "headline": headline}


def markdown(found: dict[str, Any]) -> str:
    names = list(found["figures"])
    every = list(dict.fromkeys(what for mine in found["figures"].values() for what in mine))
    lines = [[what, *(_cell(what, found["figures"][name].get(what)) for name in names)] for what in every]
    machine = found["machine"]
    vllm = f" vLLM's environment: {machine['vllm']}." if machine.get("vllm") else ""
    parts = [
        "# Serving",
        common.describe(machine) + vllm,
        f"Prompts: {found['data']}. {found['at_once']} requests at a time where nothing else is said, "
        f"{found['new_tokens']} new tokens each. Adapters: rank 16 on every linear layer, random. Median [range] over "
        "rounds; each server alone on the machine.",
        common.table(["", *names], lines),
    ]
    parts += [f"Not measured: {name}: {reason}" for name, reason in found["skipped"].items()]
    return "\n\n".join([*parts, f"```json\n{json.dumps(found['headline'])}\n```"])


def _cell(what: str, value: dict[str, Any] | None) -> str:
    digits = next((d for unit, d in _UNITS.items() if what.endswith(unit)), 2)
    return common.spread(value, digits) if value else ""


def plot(figures: dict[str, Figures], folder: Path) -> None:
    """Throughput over concurrency and over context as ``serve.svg``; nothing without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        print("no plot: matplotlib is not installed (pip install 'tunegate[bench]')")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4))
    shapes = (
        (axes[0], r"at once (\d+) req/s", "requests at a time", "requests/s"),
        (axes[1], r".*context (\d+) tok/s", "prompt tokens", "prompt and new tokens/s"),
    )
    for place, pattern, x_name, y_name in shapes:
        for name, mine in figures.items():
            points = sorted(
                (int(m[1]), common.summary(v)) for what, v in mine.items() if (m := re.fullmatch(pattern, what))
            )
            if points:
                x, y = [p for p, _ in points], [s["median"] for _, s in points]
                low = [s["median"] - s["low"] for _, s in points]
                high = [s["high"] - s["median"] for _, s in points]
                place.errorbar(x, y, yerr=[low, high], label=name, marker="o", capsize=2)
        place.set(xlabel=x_name, ylabel=y_name, xscale="log", ylim=(0, None))
        place.set_xscale("log", base=2)
        place.spines[["top", "right"]].set_visible(False)
        place.legend()
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / "serve.svg", bbox_inches="tight")
    pyplot.close(figure)
