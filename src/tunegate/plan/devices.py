"""The table of devices with their prices, and this machine as one of them.

The table is a YAML file with a date. A file given by name is used alone; else ``TUNEGATE_HOME/devices.yaml`` if it
exists; else the one in the package. A CPU's peak is cores x clock x operations a cycle of the kernels' level: two
fused multiply-adds of the vector width, twice that for bf16 dot products, 1024 multiply-adds for AMX tiles.

It asks no price server, and believes no figure of a device beyond what the file says.
"""

from __future__ import annotations

import hashlib
import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from tunegate.config import Section
from tunegate.errors import InputError, Problem, nearest
from tunegate.files import canonical_json, home
from tunegate.yaml_file import parse, read_text

PACKAGED = Path(__file__).with_name("devices.yaml")
FILE = "devices.yaml"
CPU_BANDWIDTH = 12.0  # GB/s that one process streams on two cores; more cores have more, servers up to 10 x
_CLOCK_GHZ = 2.5  # where the system does not say
# fp32 and bf16 operations a cycle and core: (width in floats) x 2 units x 2 operations; bf16 dot products twice that;
# an AMX tile product is 16 x 16 x 32 multiply-adds in 16 cycles. ``twins``: what torch's own AVX2 code reaches.
_PER_CYCLE = {
    "plain": (8, 8), "avx2": (32, 32), "avx512": (64, 64), "avx512bf16": (64, 128), "amx": (64, 1024),
    "emulated512": (8, 8), "emulatedamx": (8, 8), "twins": (32, 32),
}  # fmt: skip


class DeviceRow(Section):
    """One line of the file."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,40}$")
    kind: Literal["cuda", "apple", "cpu"] = "cuda"
    memory_gib: float = Field(gt=0)
    tflops: float = Field(gt=0)
    bandwidth: float = Field(gt=0)
    on_demand: float | None = Field(None, ge=0)
    spot: float | None = Field(None, ge=0)
    source: str = ""


class PriceSheet(Section):
    """The file."""

    date: str = Field(pattern=r"^\d{4}-\d{2}-\d{2}$")
    currency: str = "USD"
    devices: tuple[DeviceRow, ...]


@dataclass(frozen=True)
class Device:
    """``memory`` in bytes, ``tflops`` of 16-bit (on CPUs: of the dtype at hand) products, ``bandwidth`` in GB/s."""

    name: str
    kind: str
    memory: int
    tflops: float
    bandwidth: float
    on_demand: float | None = None
    spot: float | None = None


@dataclass(frozen=True)
class Sheet:
    devices: tuple[Device, ...]
    date: str
    currency: str
    path: Path

    def named(self, names: Sequence[str]) -> tuple[Device, ...]:
        """The devices with these names, in this order; all of them for no names."""
        if not names:
            return self.devices
        known = {device.name: device for device in self.devices}
        problems = [
            Problem("unknown device", f"--device {name}", fix=nearest(name, list(known)) or ", ".join(known))
            for name in names
            if name not in known
        ]
        if problems:
            raise InputError(problems)
        return tuple(known[name] for name in names)


def load_sheet(path: Path | None = None) -> Sheet:
    """The price sheet. :class:`InputError` with every problem of the file."""
    if path is None:
        own = home() / FILE
        path = own if own.is_file() else PACKAGED
    parsed = parse(read_text(path), str(path), path.name)
    problems = list(parsed.problems)
    try:
        sheet = PriceSheet.model_validate(_frozen(parsed.value))
    except ValidationError as error:
        problems += [_problem(dict(item), path) for item in error.errors(include_url=False)]
        raise InputError(problems) from None
    names = [row.name for row in sheet.devices]
    problems += [Problem("the device stands twice", str(path), got=name) for name in {*names} if names.count(name) > 1]
    if not names:
        problems.append(Problem("no devices", str(path), fix=f"begin with a copy of {PACKAGED}"))
    if problems:
        raise InputError(problems)
    devices = tuple(
        Device(r.name, r.kind, round(r.memory_gib * 2**30), r.tflops, r.bandwidth, r.on_demand, r.spot)
        for r in sheet.devices
    )
    return Sheet(devices, sheet.date, sheet.currency, path)


def _frozen(value: Any) -> Any:
    """Lists as tuples and whole numbers where a fraction may stand, as strict models want them."""
    if isinstance(value, dict):
        numbers = ("memory_gib", "tflops", "bandwidth", "on_demand", "spot")
        return {k: float(v) if k in numbers and type(v) is int else _frozen(v) for k, v in value.items()}
    return tuple(_frozen(v) for v in value) if isinstance(value, list) else value


def _problem(item: dict[str, Any], path: Path) -> Problem:
    key = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        known = [*DeviceRow.model_fields, *PriceSheet.model_fields]
        return Problem(f"unknown key {key!r}", str(path), fix=nearest(key.rpartition(".")[2], known))
    if item["type"] == "missing":
        return Problem(f"{key} is missing", str(path))
    return Problem(
        f"{key}: wrong value", str(path), item["msg"].removeprefix("Input should be "), repr(item["input"])[:80]
    )


# --- this machine ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Machine:
    """What runs of this machine have in common. ``key`` names its calibration."""

    cpu: str
    cores: int
    level: str
    torch: str
    gpu: str | None = None

    @property
    def key(self) -> str:
        return hashlib.sha256(canonical_json(vars(self)).encode()).hexdigest()[:16]


def this_machine() -> Machine:
    """The processor, the kernels' level and torch's version."""
    import torch

    from tunegate.kernels import native

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return Machine(_cpu_info("model name") or platform.processor() or platform.machine(), _cores(),
                   native.describe()[0], torch.__version__, gpu)  # fmt: skip


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cpu_info(name: str) -> str:
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            if line.startswith(name):
                return line.partition(":")[2].strip()
    return ""


def cpu_device(machine: Machine, itemsize: int, threads: int | None = None) -> Device:
    """This machine's CPU as a device for weights of ``itemsize`` bytes."""
    per_cycle = _PER_CYCLE.get(machine.level, _PER_CYCLE["avx2"])[1 if itemsize == 2 else 0]
    try:
        clock = float(_cpu_info("cpu MHz")) / 1000
    except ValueError:
        clock = _CLOCK_GHZ
    cores = min(machine.cores, threads or machine.cores)
    return Device("this machine", "cpu", total_memory(), cores * clock * per_cycle / 1000, CPU_BANDWIDTH)


def total_memory() -> int:
    """Bytes of memory that this process may use: the machine's, or its control group's limit."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = _group("memory.max", "memory/memory.limit_in_bytes")
    return min(machine, limit) if limit else machine


def available_memory() -> int:
    """Bytes that this process can still take, what it holds already included: free memory and file pages that the
    system would give up, within the control group's limit."""
    resident = _kilobytes(Path("/proc/self/status"), "VmRSS")
    free = _kilobytes(Path("/proc/meminfo"), "MemAvailable")
    available = free + resident if free else total_memory()
    limit = _group("memory.max", "memory/memory.limit_in_bytes")
    if limit:
        used = _group("memory.current", "memory/memory.usage_in_bytes") or 0
        available = min(available, limit - used + resident)
    return max(0, available)


def _kilobytes(path: Path, name: str) -> int:
    try:
        for line in path.read_text().splitlines():
            if line.startswith(name + ":"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    return 0


def _group(*names: str) -> int | None:
    """A number of the control group (version 2, then 1); None without a limit."""
    for name in names:
        try:
            value = int((Path("/sys/fs/cgroup") / name).read_text())
        except (OSError, ValueError):  # no such file, or "max"
            continue
        if value < 1 << 60:
            return value
    return None
