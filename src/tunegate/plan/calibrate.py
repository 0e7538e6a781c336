"""What runs on this machine really took, and the next prediction corrected by it.

One JSON file a machine lies below ``TUNEGATE_HOME/plan``; a machine is its processor, its number of cores, the
kernels' level and torch's version. It holds the newest runs and probes: what they were, what was predicted, what was
measured. A prediction is corrected by the median over the runs most like it: the same base and settings, else the same
base dtype, quantization and method, else all. Memory is corrected by a difference (what the estimate leaves out does
not grow with the model), time by a ratio.

It does not change the formulas, and a file that cannot be read counts as empty only if it is absent.
"""

from __future__ import annotations

import datetime
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError

from tunegate.errors import InputError
from tunegate.files import home, read_json, write_json
from tunegate.plan.devices import Machine
from tunegate.plan.memory import PlanInputs

SCHEMA = "Calibration/1"
KEPT = 100
LIKE_IT = 5  # of the runs most like it, the newest count


@dataclass(frozen=True)
class Kind:
    """What decides how far an estimate is off."""

    base: str
    parameters: int
    engine: str
    itemsize: int
    quantization: str | None
    method: str
    checkpointing: str

    @property
    def family(self) -> tuple[Any, ...]:
        return self.engine, self.itemsize, self.quantization, self.method


def kind_of(p: PlanInputs) -> Kind:
    shape = p.shape
    return Kind(shape.name, shape.parameters, p.engine, p.itemsize, p.quantization, p.method, p.checkpointing)


@dataclass(frozen=True)
class Observation:
    """One run or probe. ``predicted_*`` are the uncorrected estimates; None: not measured (or not comparable)."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    kind: Kind
    tokens: int
    predicted_bytes: int
    measured_bytes: int | None
    predicted_seconds: float
    measured_seconds: float | None
    source: str
    when: str


@dataclass(frozen=True)
class Corrected:
    """A prediction after correction, and from what."""

    bytes: int
    seconds: float
    bytes_from: str
    seconds_from: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


UNMEASURED = "no run on this machine yet"


def store_path(machine: Machine) -> Path:
    return home() / "plan" / f"machine-{machine.key}.json"


def load_observations(machine: Machine) -> list[Observation]:
    """The machine's observations, oldest first."""
    path = store_path(machine)
    if not path.exists():
        return []
    try:
        data = read_json(path)
        if data["schema"] != SCHEMA:
            raise ValueError(f"schema {data['schema']!r}")
        return TypeAdapter(list[Observation]).validate_python(data["observations"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError, ValidationError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        fix = "delete it: it is made again from the next runs"
        raise InputError("the record of this machine's runs is damaged", where=str(path), got=first, fix=fix) from None


def observe(machine: Machine, observation: Observation) -> None:
    """Add an observation; the oldest beyond :data:`KEPT` go."""
    kept = [*load_observations(machine), observation][-KEPT:]
    content = {"schema": SCHEMA, "machine": vars(machine), "observations": [asdict(one) for one in kept]}
    write_json(store_path(machine), content)


def now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def correct(p: PlanInputs, total: int, seconds: float, observations: list[Observation]) -> Corrected:
    """The estimate (``total`` bytes, ``seconds``) as runs like it suggest."""
    bytes_off, bytes_from = _median(p, observations, _bytes_off)
    ratio, seconds_from = _median(p, observations, _seconds_ratio)
    return Corrected(
        bytes=max(0, total + round(bytes_off or 0.0)),
        seconds=seconds * (1.0 if ratio is None else ratio),
        bytes_from=bytes_from,
        seconds_from=seconds_from,
    )


def _bytes_off(o: Observation) -> float | None:
    return None if o.measured_bytes is None else float(o.measured_bytes - o.predicted_bytes)


def _seconds_ratio(o: Observation) -> float | None:
    return None if o.measured_seconds is None or o.predicted_seconds <= 0 else o.measured_seconds / o.predicted_seconds


def _median(
    p: PlanInputs, observations: list[Observation], value: Callable[[Observation], float | None]
) -> tuple[float | None, str]:
    kind = kind_of(p)
    measured = [(o, found) for o in observations if (found := value(o)) is not None]
    circles = (
        ("of this base with these settings", [v for o, v in measured if o.kind == kind]),
        ("of this kind", [v for o, v in measured if o.kind.family == kind.family]),
        ("on this machine", [v for _, v in measured]),
    )
    for what, values in circles:
        if values:
            newest = values[-LIKE_IT:]
            runs = "1 run" if len(newest) == 1 else f"{len(newest)} runs"
            return statistics.median(newest), f"corrected by {runs} {what}"
    return None, UNMEASURED
