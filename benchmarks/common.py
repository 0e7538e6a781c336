"""What the benchmarks share: the machine, worker processes with their memory, statistics, and the written results.

Every measurement runs in a fresh process of its own (``worker.py``), so no contestant inherits another's memory,
threads or patches. A watchdog ends a worker that takes more than 80 % of the machine's memory.
"""

from __future__ import annotations

import ctypes.util
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
RESULTS = HERE.parent / "docs" / "benchmarks"
MARK = "RESULT "
MEMORY_SHARE = 0.8
PACKAGES = ("torch", "transformers", "peft", "trl", "bitsandbytes", "accelerate", "tokenizers", "tunegate")
FLAGS = ("avx2", "fma", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "amx_tile")


class Skipped(Exception):
    """A measurement that cannot be taken here, with the reason."""


def interleaved(runs: dict[str, Callable[[], object]], repetitions: int, *, warm_up: int = 1) -> dict[str, list[float]]:
    """Seconds of each of ``runs``, one after the other in every repetition; the first ``warm_up`` fill buffers and do
    not count."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for repetition in range(warm_up + repetitions):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if repetition >= warm_up:
                seconds[name].append(time.perf_counter() - start)
    return seconds


# --- the machine ----------------------------------------------------------------------------------------------------


def machine() -> dict[str, Any]:
    """CPU model, cores, instruction sets, memory, load and the version of everything that computes."""
    info = {}
    for line in _read("/proc/cpuinfo").splitlines():
        name, _, value = line.partition(":")
        info.setdefault(name.strip(), value.strip())
    flags = set(info.get("flags", "").split())
    return {
        "cpu": info.get("model name") or platform.processor() or platform.machine(),
        "flags": [flag for flag in FLAGS if flag in flags],
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gb": round(memory_bytes() / 2**30, 1),
        "load_at_start": round(os.getloadavg()[0], 2),
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": versions(),
        "kernels": kernel_level(),
        "tcmalloc": Path(name).name if (name := tcmalloc()) else None,
        "began": time.strftime("%Y-%m-%d %H:%M:%S%z"),
    }


def versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def kernel_level() -> str:
    """tunegate's instruction-set level and why; asked in a process of its own, so that this one stays light."""
    code = "from tunegate.kernels import native; print(': '.join(native.describe()))"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False)
    return done.stdout.strip() or f"unknown ({done.stderr.strip().splitlines()[-1:] or ''})"


def memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def has_bf16() -> bool:
    """Whether this CPU has bf16 matrix or dot-product instructions."""
    return bool({"avx512_bf16", "amx_bf16"} & set(_read("/proc/cpuinfo").split()))


def tcmalloc() -> str | None:
    """The path of a tcmalloc to preload, or None. ``TUNEGATE_BENCH_TCMALLOC`` names one."""
    named = os.environ.get("TUNEGATE_BENCH_TCMALLOC")
    if named:
        return named if Path(named).is_file() else None
    for stem in ("libtcmalloc_minimal.so*", "libtcmalloc.so*"):
        for folder in ("usr/lib/*", "usr/lib", "usr/local/lib", "usr/lib64"):
            if found := sorted(Path("/").glob(f"{folder}/{stem}")):
                return str(found[0])
    return ctypes.util.find_library("tcmalloc_minimal")


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:  # not Linux
        return ""


# --- workers --------------------------------------------------------------------------------------------------------


def run_worker(spec: dict[str, Any], *, preload: str | None = None, timeout: float = 3600) -> dict[str, Any]:
    """Run ``worker.py`` on ``spec`` and return its result; :class:`Skipped` with the reason if it gave none."""
    with tempfile.TemporaryDirectory(prefix="tunegate-bench-") as folder:
        path = Path(folder) / "spec.json"
        path.write_text(json.dumps({**spec, "folder": folder}), encoding="utf-8")
        environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", **spec.get("env", {})}
        if spec.get("threads"):
            environment["OMP_NUM_THREADS"] = str(spec["threads"])
        if preload:
            environment["LD_PRELOAD"] = preload
        out, err = Path(folder) / "out", Path(folder) / "err"
        with out.open("w") as stdout, err.open("w") as stderr:
            command = [sys.executable, "-W", "ignore", str(HERE / "worker.py"), str(path)]
            process = subprocess.Popen(command, env=environment, stdout=stdout, stderr=stderr)
            reason = _watch(process, timeout)
        if reason:
            raise Skipped(reason)
        for line in reversed(out.read_text(encoding="utf-8").splitlines()):
            if line.startswith(MARK):
                return json.loads(line.removeprefix(MARK))
        last = [line for line in err.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
        raise Skipped(" | ".join(last[-2:])[-400:] or f"no result (exit {process.returncode})")


def _watch(process: subprocess.Popen[Any], timeout: float) -> str:
    """Wait for ``process``; end it when it takes too much memory or time. Returns why, or nothing."""
    limit, began = MEMORY_SHARE * memory_bytes(), time.monotonic()
    try:
        while process.poll() is None:
            if resident(process.pid) > limit:
                return f"needs more than {MEMORY_SHARE:.0%} of the memory ({limit / 2**30:.1f} GB)"
            if time.monotonic() - began > timeout:
                return f"took longer than {timeout:.0f} s"
            time.sleep(0.1)
        return ""
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def resident(pid: int | str = "self", what: str = "VmRSS") -> int:
    """Bytes of a process: ``VmRSS`` now, ``VmHWM`` at its highest. 0 where the system does not say."""
    for line in _read(f"/proc/{pid}/status").splitlines():
        if line.startswith(what + ":"):
            return int(line.split()[1]) * 1024
    return 0


# --- numbers --------------------------------------------------------------------------------------------------------


def summary(values: list[float]) -> dict[str, Any]:
    """Median with the whole range, which is the spread of so few repetitions."""
    ordered = sorted(values)
    return {"median": statistics.median(ordered), "low": ordered[0], "high": ordered[-1], "n": len(ordered)}


def ratio(ours: float | None, theirs: float | None) -> float | None:
    return round(ours / theirs, 3) if ours and theirs else None


def spread(value: dict[str, Any], digits: int = 0) -> str:
    return f"{value['median']:,.{digits}f} [{value['low']:,.{digits}f}-{value['high']:,.{digits}f}]"


# --- what is written ------------------------------------------------------------------------------------------------


def table(header: list[str], rows: list[list[Any]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    lines += ["| " + " | ".join("" if cell is None else str(cell) for cell in row) + " |" for row in rows]
    return "\n".join(lines)


def describe(found: dict[str, Any]) -> str:
    """The machine in a few lines of Markdown."""
    named = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    return (
        f"{found['cpu']}, {found['cores']} cores, {found['memory_gb']} GB, {' '.join(found['flags'])}. "
        f"Kernels: {found['kernels']}. {named}. tcmalloc: {found['tcmalloc'] or 'none found'}. "
        f"{found['began']}, load {found['load_at_start']} at start."
    )


def write(name: str, result: dict[str, Any], markdown: str, folder: Path = RESULTS) -> None:
    """``name.json`` and ``name.md`` in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (folder / f"{name}.md").write_text(markdown.rstrip() + "\n", encoding="utf-8")


def plot_bars(
    name: str, title: str, bars: dict[str, dict[str, Any]], unit: str, folder: Path = RESULTS, accent: str = "tunegate"
) -> None:
    """Horizontal bars with their range as ``name.svg``; nothing without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        print("no plot: matplotlib is not installed (pip install 'tunegate[bench]')")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(bars)[::-1]
    values = [bars[n]["median"] for n in names]
    below = [bars[n]["median"] - bars[n]["low"] for n in names]
    above = [bars[n]["high"] - bars[n]["median"] for n in names]
    figure, axes = pyplot.subplots(figsize=(8, 0.8 + 0.4 * len(names)))
    colours = ["#2166ac" if n.startswith(accent) else "#bbbbbb" for n in names]
    axes.barh(names, values, xerr=[below, above], color=colours, error_kw={"lw": 1})
    for place, value in enumerate(values):
        axes.text(value, place, f" {value:,.0f}" if value >= 10 else f" {value:.2f}", va="center", fontsize=8)
    axes.set(title=title, xlabel=unit)
    axes.spines[["top", "right"]].set_visible(False)
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / f"{name}.svg", bbox_inches="tight")
    pyplot.close(figure)
