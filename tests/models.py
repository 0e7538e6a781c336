"""A tiny base with an adapter in place, for the tests that compare the two."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tunegate.adapter.inject import Injection, inject
from tunegate.adapter.spec import AdapterSpec
from tunegate.data.render import Renderer
from tunegate.engine.runner import Runner
from tunegate.evaluation.answering import Model
from tunegate.model.loading import load_model, load_tokenizer


def tiny_subject(folder: Path) -> Model:
    """The tiny base in ``folder`` on the engine."""
    return Model(Runner(load_model(folder, dtype=torch.float32)), Renderer(load_tokenizer(folder)), tokens=256, rows=8)


def adapt(model: Model, size: float = 0.3, seed: int = 0) -> Injection:
    """Put a random adapter in place; ``size`` scales what it adds."""
    return adapt_plain(model.runner.model, size, seed)


def adapt_plain(model: Any, size: float = 0.3, seed: int = 0) -> Injection:
    """The same for a model that is not on the engine."""
    injection = inject(model, AdapterSpec(rank=4, alpha=8.0, dropout=0.0), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "B" in name.rsplit(".", 2)[-2:][0] + name.rsplit(".", 1)[-1]:
                parameter.copy_(size * torch.randn(parameter.shape, generator=generator))
    return injection


@torch.no_grad()
def all_log_probs(model: Any, ids: list[int]) -> torch.Tensor:
    """(T-1, V) fp64 log-probabilities after each prefix, by the model's own full logits."""
    return model(torch.tensor([ids])).logits[0].double().log_softmax(-1)[:-1]
