"""Which deployment fits: merged, multi or separate, from adapters x traffic x latency and measured figures.

The figures are rates, new tokens a second at so many requests at a time, of the base and of a mixture of adapters.
With lambda requests a second of N new tokens each, a server settles where it makes what is asked: at the smallest
number c of requests under way with rate(c) >= lambda N. By Little's law an answer then takes c / lambda seconds in the
mean; below rate(1) a request is alone and takes N / rate(1). Between measured points rates are interpolated linearly.

Separate servers on one machine, each with its base and its adapter, share the cores and no batch: of c requests under
way, adapter i has c p_i, and a round of steps takes the sum of their times, so their common rate is
1 / sum(p_i / rate(max(1, c p_i))).

A mean is no tail: room is left by asking for at most 70 % of what is possible at the most. It measures nothing
(``probing`` does) and looks at one machine.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tunegate.errors import InputError, Problem, nearest
from tunegate.serve.deploy import FREE, KINDS, Kind

LOAD = 0.70  # of the highest rate, at most: arrivals come in bursts
Rates = tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Measured:
    """``base_rates``, ``adapter_rates``: (requests at a time, new tokens a second), the latter with several adapters in
    each batch. ``server_bytes``: a server without adapters, its caches full; ``adapter_bytes``: one adapter in RAM."""

    base_rates: Rates
    adapter_rates: Rates
    server_bytes: int
    adapter_bytes: int


@dataclass(frozen=True)
class Wanted:
    """``traffic``: (adapter, requests a second); ``latency``: seconds that an answer of ``new_tokens`` may take in the
    mean, None for any; ``bases``: how many different ones; ``memory``: bytes of the machine."""

    traffic: tuple[tuple[str, float], ...]
    new_tokens: float
    latency: float | None
    bases: int
    memory: int

    @property
    def requests(self) -> float:
        return sum(rate for _, rate in self.traffic)


@dataclass(frozen=True)
class Option:
    """One kind: ``bytes`` taken, ``capacity`` and ``load`` (the share of it that is asked for), ``seconds`` of an
    answer (infinite above the capacity), the lines that show how they come about, and why it does not fit."""

    kind: Kind
    bytes: int
    capacity: float
    load: float
    seconds: float
    shown: tuple[str, ...]
    reasons: tuple[str, ...]

    @property
    def fits(self) -> bool:
        return not self.reasons


@dataclass(frozen=True)
class Advice:
    kind: Kind | None
    why: str
    options: tuple[Option, ...]

    def to_json(self) -> dict[str, Any]:
        options = [
            {**asdict(o), "fits": o.fits, "seconds": o.seconds if math.isfinite(o.seconds) else None}
            for o in self.options
        ]
        return {"kind": self.kind, "why": self.why, "options": options}


def rate_at(rates: Rates, at_once: float) -> float:
    """New tokens a second at so many requests at a time: linear between measured points, flat beyond them."""
    points = sorted(rates)
    if at_once <= points[0][0]:
        return points[0][1]
    for (low, before), (high, after) in itertools.pairwise(points):
        if at_once <= high:
            return before + (after - before) * (at_once - low) / (high - low)
    return points[-1][1]


def separate_rate(rates: Rates, shares: Sequence[float], at_once: float) -> float:
    """The common rate of servers that share the cores, with these shares of ``at_once`` requests."""
    return 1.0 / sum(share / rate_at(rates, max(1.0, at_once * share)) for share in shares)


def under_way(rate: Callable[[float], float], demand: float, most: float) -> float:
    """The smallest number of requests at a time, from 1 to ``most``, whose rate is ``demand``; infinite if none is."""
    if rate(1.0) >= demand:
        return 1.0
    if rate(most) < demand:
        return math.inf
    low, high = 1.0, most
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if rate(middle) >= demand else (middle, high)
    return high


def advise(wanted: Wanted, measured: Measured) -> Advice:
    """What fits, how it was counted, and which one to take."""
    _check(wanted, measured)
    options = tuple(_option(kind, wanted, measured) for kind in KINDS)
    by_kind = {option.kind: option for option in options}
    one = len(wanted.traffic) == 1
    order: tuple[Kind, ...] = ("merged", "multi", "separate") if one else ("multi", "separate")
    chosen = next((kind for kind in order if by_kind[kind].fits), None)
    return Advice(chosen, _why(chosen, wanted, by_kind), options)


def _check(wanted: Wanted, measured: Measured) -> None:
    problems = []
    names = [name for name, _ in wanted.traffic]
    if twice := sorted({n for n in names if names.count(n) > 1}):
        problems.append(Problem("a name is given twice", "--adapter", got=", ".join(twice)))
    if wanted.bases > len(names):
        problems.append(Problem("more bases than adapters", "--bases", f"<= {len(names)}", str(wanted.bases)))
    for name in ("base_rates", "adapter_rates"):
        rates = getattr(measured, name)
        if not rates or min(n for n, _ in rates) != 1 or any(not r > 0 for _, r in rates):
            problems.append(Problem("rates from one request at a time on, all above 0", name, got=str(rates)))
    if problems:
        raise InputError(problems)


def _option(kind: Kind, wanted: Wanted, measured: Measured) -> Option:
    count, asked, new = len(wanted.traffic), wanted.requests, wanted.new_tokens
    rates = measured.base_rates if kind == "merged" else measured.adapter_rates
    most = float(max(n for n, _ in rates))
    shares = [r / asked for _, r in wanted.traffic]

    def rate(at_once: float) -> float:
        return separate_rate(rates, shares, at_once) if kind == "separate" else rate_at(rates, at_once)

    bytes_ = {
        "merged": measured.server_bytes,
        "multi": measured.server_bytes + count * measured.adapter_bytes,
        "separate": count * measured.server_bytes,
    }[kind]
    highest = rate(most)
    capacity, demand = highest / new, asked * new
    at_once = under_way(rate, demand, most)
    seconds = new / rate(1.0) if at_once == 1.0 else at_once / asked
    shown = (
        _memory_line(kind, count, measured, bytes_, wanted.memory),
        f"capacity: {highest:,.0f} new tokens/s at {most:.0f} at a time / {new:g} = {capacity:,.2f} requests/s; "
        f"{asked:g} asked, {asked / capacity:.0%}",
        _answer_line(at_once, asked, demand, rate(1.0), new, seconds),
    )
    reasons = _reasons(kind, wanted, bytes_, asked / capacity, seconds)
    return Option(kind, bytes_, capacity, asked / capacity, seconds, shown, tuple(reasons))


def _memory_line(kind: Kind, count: int, m: Measured, total: int, machine: int) -> str:
    server = f"{m.server_bytes / 1e9:.2f} GB"
    how = {
        "merged": server,
        "multi": f"{server} + {count} x {m.adapter_bytes / 1e6:.1f} MB = {total / 1e9:.2f} GB",
        "separate": f"{count} x {server} = {total / 1e9:.2f} GB",
    }[kind]
    return f"memory: {how} of {machine / 1e9:.1f} GB"


def _answer_line(at_once: float, asked: float, demand: float, alone: float, new: float, seconds: float) -> str:
    if math.isinf(at_once):
        return f"answer: {demand:,.0f} new tokens/s are never reached"
    if at_once == 1.0:
        return f"answer: alone, {new:g} tokens / {alone:,.0f} a second = {seconds:.2f} s"
    return f"answer: {demand:,.0f} new tokens/s at {at_once:.1f} at a time, / {asked:g} requests/s = {seconds:.2f} s"


def _reasons(kind: Kind, wanted: Wanted, taken: int, load: float, seconds: float) -> list[str]:
    found = []
    if kind == "merged" and len(wanted.traffic) > 1:
        found.append(f"{len(wanted.traffic)} adapters, and a merged model holds one")
    if kind == "multi" and wanted.bases > 1:
        found.append(f"{wanted.bases} bases, and adapters share a batch on one")
    if taken > wanted.memory * (1 - FREE):
        found.append(f"memory: {taken / 1e9:.2f} GB, and {1 - FREE:.0%} of {wanted.memory / 1e9:.1f} GB may be taken")
    if load > LOAD:
        found.append(f"load: {load:.0%} of the capacity, at most {LOAD:.0%}; {math.ceil(load / LOAD)} such machines")
    if wanted.latency is not None and wanted.latency < seconds < math.inf:  # beyond the capacity, load says it
        found.append(f"latency: {seconds:.2f} s, at most {wanted.latency:g} s")
    return found


def _why(chosen: Kind | None, wanted: Wanted, options: Mapping[Kind, Option]) -> str:
    multi, merged = options["multi"], options["merged"]
    if chosen is None:
        return "a larger machine, several of them, a smaller or quantized base, or shorter answers"
    if chosen == "merged":
        cost = 1 - multi.capacity / merged.capacity
        return f"one adapter: nothing is added to a step. `multi` would cost {cost:.0%} and could change it in flight"
    if chosen == "separate":
        return "; ".join(multi.reasons)
    hottest, rate = max(wanted.traffic, key=lambda one: one[1])
    text = "one base in memory, one batch for all, adapters come and go without a restart"
    if len(wanted.traffic) > 1 and rate / wanted.requests >= 0.9:
        text += f"; {hottest} has {rate / wanted.requests:.0%} of the traffic: merged beside the rest it saves more"
    return text


def measured_from(data: Any, where: str) -> Measured:
    """What a file of figures says. :class:`InputError` with everything that is wrong in it."""
    names = list(Measured.__dataclass_fields__)
    if not isinstance(data, dict):
        raise InputError("not a file of figures", where=where, expected=", ".join(names))
    problems = [Problem("unknown figure", f"{where}: {n}", fix=nearest(n, names)) for n in data if n not in names]
    problems += [Problem("a figure is missing", f"{where}: {n}") for n in names if n not in data]
    for name in names:
        value = data.get(name)
        if value is None:
            continue
        if name.endswith("_bytes"):
            good = type(value) is int and value >= 0
        else:
            good = isinstance(value, list) and all(_is_point(point) for point in value)
        if not good:
            expected = "a whole number of bytes" if name.endswith("_bytes") else "pairs: requests at a time, tokens/s"
            problems.append(Problem("not such a figure", f"{where}: {name}", expected, repr(value)[:120]))
    if problems:
        raise InputError(problems)
    rates = {n: tuple((int(a), float(b)) for a, b in data[n]) for n in ("base_rates", "adapter_rates")}
    return Measured(rates["base_rates"], rates["adapter_rates"], data["server_bytes"], data["adapter_bytes"])


def _is_point(point: Any) -> bool:
    if not isinstance(point, (list, tuple)) or len(point) != 2:
        return False
    at_once, rate = point
    number = isinstance(rate, (int, float)) and not isinstance(rate, bool)
    return type(at_once) is int and at_once >= 1 and number and math.isfinite(rate) and rate > 0
