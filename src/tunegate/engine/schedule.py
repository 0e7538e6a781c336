"""Learning rate by step, and which rows make up which step.

All of it is a function of settings, seed and step, so a resumed run needs no state for it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from tunegate.config import TrainSection
from tunegate.data.pack import epoch_steps
from tunegate.data.types import Rendered


def lr_factor(step: int, total: int, warmup: float, kind: str) -> float:
    """Share of the peak rate at ``step`` (from 0) of ``total``: linear warm-up, then linear, cosine or constant."""
    rising = math.ceil(round(warmup * total, 6))  # 0.07 * 100 is 7.000000000000001
    if step < rising:
        return (step + 1) / rising
    if kind == "constant":
        return 1.0
    done = (step - rising) / max(1, total - rising)
    return 1.0 - done if kind == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))


class StepPlan:
    """The rows of every optimizer step of a run, epoch after epoch, cut at ``epochs`` or ``max_steps``."""

    def __init__(self, rows: Sequence[Rendered], settings: TrainSection):
        self._rows, self._settings = rows, settings
        whole, part = divmod(settings.epochs, 1.0)
        self._cached: tuple[int, list[list[Rendered]]] = (-1, [])
        self._sizes = [len(self._epoch(epoch)) for epoch in range(math.ceil(settings.epochs))]  # steps of whole epochs
        sizes = list(self._sizes)
        if part:
            sizes[int(whole)] = max(1, round(part * sizes[int(whole)]))
        self.ends: list[int] = []  # step count at the end of each epoch
        for size in sizes:
            last = self.ends[-1] if self.ends else 0
            self.ends.append(min(last + size, settings.max_steps or last + size))
        self.total = self.ends[-1]

    def _epoch(self, epoch: int) -> list[list[Rendered]]:
        if self._cached[0] != epoch:
            steps = epoch_steps(self._rows, self._settings.tokens_per_step, seed=self._settings.seed, epoch=epoch)
            self._cached = (epoch, steps)
        return self._cached[1]

    def rows(self, step: int) -> list[Rendered]:
        epoch = next(n for n, end in enumerate(self.ends) if step < end)
        return self._epoch(epoch)[step - (self.ends[epoch - 1] if epoch else 0)]

    def epochs_done(self, step: int) -> float:
        """How many passes over the rows ``step`` steps are."""
        done, last = 0.0, 0
        for end, size in zip(self.ends, self._sizes, strict=True):
            done += min(max(step - last, 0), end - last) / size
            last = end
        return done

    def is_evaluation(self, step: int) -> bool:
        """Whether the eval gate opens after ``step`` steps."""
        every = self._settings.eval_every
        due = step in self.ends if every == "epoch" else step % every == 0
        return step > 0 and (due or step == self.total)
