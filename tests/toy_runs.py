"""Training runs of a tiny base on a toy task, shared by the tests of the engine."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tiny import tiny_model, toy_rows
from tunegate.adapter.inject import Injection, inject
from tunegate.adapter.spec import AdapterSpec
from tunegate.config import TrainSection
from tunegate.data.types import Rendered
from tunegate.engine.runner import Runner
from tunegate.engine.train import Hooks, TrainResult, mean_loss, train

KEY = "b3:run"


def toy(n: int = 24, seed: int = 0) -> list[Rendered]:
    """Rows with a common header of 6 tokens, a body that tells the answer, and an answer of two tokens."""
    rows = []
    for number, item in enumerate(toy_rows(n, seed)):
        answer = {"red": (50, 2), "green": (60, 2), "blue": (70, 2)}[item["completion"]]
        body = [100 + number % 40, *([200 + answer[0]] * (1 + number % 5)), 9]
        ids = (4, 5, 6, 7, 8, 3, *body, *answer)
        rows.append(Rendered(f"toy.jsonl:{number + 1}", ids, (False,) * (len(ids) - 2) + (True, True)))
    return rows


def section(**changed: Any) -> TrainSection:
    given: dict[str, Any] = {
        "lr": 5e-3,
        "rank": 4,
        "epochs": 2.0,
        "dropout": 0.0,
        "tokens_per_step": 80,
        "tokens_per_batch": 80,
        "checkpoint_every": 3,
        "patience": 100,
    }
    return TrainSection(**(given | changed))


@dataclass
class Job:
    """A tiny base with a fresh adapter. ``scores`` are handed out in turn; the last is repeated."""

    folder: Path
    settings: TrainSection
    rows: list[Rendered] = field(default_factory=toy)
    scores: list[float] | None = None
    key: str = KEY
    family: str = "llama"
    sizes: dict[str, int] = field(default_factory=dict)
    stop_at: int | None = None
    events: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        model = tiny_model(self.family, **self.sizes)
        self.runner = Runner(model)
        self.injection: Injection = inject(
            model,
            AdapterSpec(self.settings.rank, 8.0, self.settings.dropout, use_dora=self.settings.method == "dora"),
            seed=self.settings.seed,
        )
        self.evaluated: list[int] = []

    def evaluate(self, step: int) -> tuple[float, dict[str, Any]]:
        """By default a score that the weights decide, so that a wrong resume shows."""
        self.evaluated.append(step)
        if self.scores is not None:
            return self.scores[min(len(self.evaluated), len(self.scores)) - 1], {}
        loss = mean_loss(self.runner, self.rows, 200)
        return -loss, {"valid_loss": loss}

    def run(self) -> TrainResult:
        def stop() -> bool:
            return self.stop_at is not None and self.steps and self.steps[-1]["step"] >= self.stop_at

        hooks = Hooks(self.evaluate, self.events.append, stop)
        return train(self.runner, self.injection, self.rows, self.settings, self.folder, self.key, hooks)

    @property
    def steps(self) -> list[dict[str, Any]]:
        return [event for event in self.events if event["event"] == "step"]

    @property
    def losses(self) -> list[float]:
        return [event["loss"] for event in self.steps]

    @property
    def adapter(self) -> dict[str, torch.Tensor]:
        return {name: p.detach().clone() for name, p in self.injection.parameters().items()}


def files_of(folder: Path) -> dict[str, bytes]:
    """The bytes of the adapters and optimizer states on disk. (``state.json`` holds times.)"""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*.safetensors"))}


def close(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], atol: float) -> None:
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], rtol=0, atol=atol, msg=name)
