"""What an adapter changes, by a short probe: what the whole model says, and not nothing where there is something."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from test_engine_scheduler import adapter_folder, loaded
from tiny import tiny_base
from tunegate.adapter.files import load_adapter
from tunegate.adapter.segmented import Identified, Served
from tunegate.engine.effect import Effect
from tunegate.kernels.segments import Factors
from tunegate.model.loading import empty_model, load_model

WHOLE = 1e9  # a magnitude for which all layers are computed


def effect_on(base: Path) -> tuple[Effect, Served]:
    model, runner = loaded(base)
    served = Served(model, empty_model(base))
    return Effect(runner, served), served


def zeroed(found: Identified, served: Served, layer: int) -> dict[int, Factors]:
    """The factors with A of one layer zero."""
    columns = {part.column for path, part in served.layers.items() if f".{layer}." in path}
    for column in columns:
        found.factors[column].a.zero_()
    return found.factors


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
@pytest.mark.parametrize("dora", [False, True])
def test_it_is_what_the_whole_model_says(tmp_path: Path, family: str, dora: bool) -> None:
    base = tiny_base(tmp_path / "base", family)
    folder = adapter_folder(base, tmp_path / "a", 1, use_dora=dora)
    effect, served = effect_on(base)
    found = served.identify(folder)
    model = load_model(base, dtype=torch.float32)
    with torch.no_grad():
        plain = model(input_ids=effect._ids[None]).logits[0, -1]
        load_adapter(model, folder)
        wanted = float((model(input_ids=effect._ids[None]).logits[0, -1] - plain).abs().max())
    assert effect.of(found.factors, WHOLE) == pytest.approx(wanted, rel=1e-3)
    assert effect.of(found.factors, found.largest) > 0


def test_from_the_last_layer_that_is_touched_it_is_the_same(tmp_path: Path) -> None:
    base = tiny_base(tmp_path / "base")
    for number, spec in enumerate(
        [
            {"layers_to_transform": (1,)},
            {"layers_to_transform": (0,)},
            {"target_modules": "model.layers.1.mlp.down_proj"},
        ]
    ):
        effect, served = effect_on(base)
        more: dict[str, Any] = {"target_modules": ("q_proj", "v_proj", "up_proj"), **spec}
        found = served.identify(adapter_folder(base, tmp_path / str(number), number, **more))
        assert effect.of(found.factors, found.largest) == effect.of(found.factors, WHOLE) > 0


@pytest.mark.parametrize("name", ["q_proj", "k_proj"])
def test_queries_and_keys_alone_are_seen(tmp_path: Path, name: str) -> None:
    base = tiny_base(tmp_path / "base")
    effect, served = effect_on(base)
    found = served.identify(adapter_folder(base, tmp_path / "a", 0, target_modules=(name,)))
    assert effect.of(found.factors, found.largest) > 0


def test_a_last_layer_without_effect_does_not_hide_the_others(tmp_path: Path) -> None:
    base = tiny_base(tmp_path / "base")
    effect, served = effect_on(base)
    found = served.identify(adapter_folder(base, tmp_path / "a", 0))
    assert effect.of(zeroed(found, served, 1), found.largest) > 0
    assert effect.of(zeroed(found, served, 0), found.largest) == 0.0


def test_what_overflows_is_not_finite(tmp_path: Path) -> None:
    base = tiny_base(tmp_path / "base")
    effect, served = effect_on(base)
    found = served.identify(adapter_folder(base, tmp_path / "a", 0))
    for column in (part.column for path, part in served.layers.items() if ".0." in path):
        found.factors[column].a.mul_(1e30)
        found.factors[column].b.mul_(1e30)
    assert not math.isfinite(effect.of(found.factors, 1e30))
