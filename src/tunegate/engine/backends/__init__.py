"""Who computes the optimizer steps: tunegate's own loop, or another trainer under the same rows, steps and eval gate.

A backend is one function with the signature of :func:`tunegate.engine.train.train`. It gets the rendered rows with
their target masks, takes the optimizer steps of :class:`~tunegate.engine.schedule.StepPlan`, calls the same hooks at
the same steps, and leaves the best adapter in the given injection. So everything after training, from the test to
the card, does not know which one ran. Packages of other trainers are imported only when one is asked for.

It does not choose a backend by itself: another trainer gives another adapter, so the task file says which.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from tunegate.adapter.inject import Injection
from tunegate.config import TrainSection
from tunegate.data.types import Rendered
from tunegate.engine.runner import Runner
from tunegate.engine.train import Hooks, TrainResult
from tunegate.errors import InputError, Problem

NEEDS = {"native": (), "trl": ("trl", "peft", "datasets"), "unsloth": ("unsloth", "trl", "peft")}
OLDEST = (3, 11)  # Python for TRL


class Backend(Protocol):
    """Train ``injection`` on ``rows`` and leave the best adapter in it, as :func:`tunegate.engine.train.train` does."""

    def __call__(
        self,
        runner: Runner,
        injection: Injection,
        rows: Sequence[Rendered],
        settings: TrainSection,
        folder: Path,
        key: str,
        hooks: Hooks,
    ) -> TrainResult: ...


def check_backend(settings: TrainSection, device: str) -> None:
    """:class:`InputError` if ``settings.backend`` cannot run here. Looks for packages without importing them."""
    name = settings.backend
    problems = []
    missing = [package for package in NEEDS[name] if importlib.util.find_spec(package) is None]
    if missing:
        newer = "" if sys.version_info >= OLDEST else f"with Python {'.'.join(map(str, OLDEST))} or newer, "
        problems.append(
            Problem(
                f"the {name} backend needs a package that is not installed",
                "train.backend",
                got=f"no {', '.join(missing)}",
                fix=f"{newer}pip install 'tunegate[{name}]', or set `backend: native`",
            )
        )
    if name == "unsloth" and not device.startswith("cuda"):
        problems.append(
            Problem(
                "unsloth trains on CUDA GPUs only",
                "train.backend",
                "a CUDA device",
                device,
                "set `backend: native` (or trl), or run on a machine with an NVIDIA GPU",
            )
        )
    if name == "unsloth" and settings.method == "dora":
        problems.append(
            Problem(
                "unsloth's fast path does not do DoRA",
                "train.method",
                "lora or rslora",
                "dora",
                "set `backend: native` or `trl` for DoRA",
            )
        )
    if name != "native" and settings.memory is not None:
        problems.append(
            Problem(
                f"the {name} backend has no memory budget", "train.memory", fix="remove it, or set `backend: native`"
            )
        )
    if problems:
        raise InputError(problems)


def find_backend(name: str) -> Backend:
    """The training function of a backend that :func:`check_backend` has accepted."""
    module = "tunegate.engine.train" if name == "native" else f"tunegate.engine.backends.{name}"
    backend: Backend = importlib.import_module(module).train
    return backend
