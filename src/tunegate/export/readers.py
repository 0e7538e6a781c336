"""Exported files read back, as subjects of the parity report: by the tool they are for where it is installed.

Each function takes what was written and gives a model that can be asked. PEFT, transformers' GGUF loader and mlx-lm run
their own model definitions; llama.cpp is in ``llama_cpp``. Where none of these is installed the file is still read
back, by the format's rules and the ``gguf`` or ``safetensors`` library, onto the engine's model: that shows that the
right numbers are in the right places, not what the other tool makes of them.

It judges nothing.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tunegate.adapter.files import load_state, tensor_name
from tunegate.adapter.inject import inject, remove
from tunegate.adapter.spec import AdapterSpec
from tunegate.engine.runner import Runner
from tunegate.errors import InputError, TunegateError
from tunegate.export.gguf_families import family_of, from_gguf, gguf_name
from tunegate.export.parity import POSITIONS, InRunner, Subject

Feed = Callable[[Sequence[int]], Tensor]  # ids behind those that it was fed before -> logits (ids or fewer, vocabulary)


def installed(*modules: str) -> bool:
    return all(importlib.util.find_spec(module) is not None for module in modules)


class InTransformers:
    """A causal model of transformers, or PEFT's wrapper of one."""

    def __init__(self, model: Any):
        self._model = model.eval()

    def answers(self, prompts: Sequence[Sequence[int]], stop_ids: Sequence[int], new_tokens: int) -> list[list[int]]:
        return [greedy(self._feed(), prompt, stop_ids, new_tokens) for prompt in prompts]

    def log_probs(self, row: Sequence[int], last: int = POSITIONS) -> Tensor:
        return torch.log_softmax(self._feed()(row)[-last:].float(), -1)

    def _feed(self) -> Feed:
        cache: Any = None

        @torch.no_grad()
        def feed(ids: Sequence[int]) -> Tensor:
            nonlocal cache
            found = self._model(input_ids=torch.tensor([list(ids)]), past_key_values=cache, use_cache=True)
            cache = found.past_key_values
            logits: Tensor = found.logits[0]
            return logits

        return feed


def greedy(feed: Feed, prompt: Sequence[int], stop_ids: Sequence[int], new_tokens: int) -> list[int]:
    """The continuation of ``prompt`` by the most likely token, without the stop id."""
    found: list[int] = []
    ids: Sequence[int] = prompt
    while len(found) < new_tokens and (token := int(feed(ids)[-1].argmax())) not in stop_ids:
        found.append(token)
        ids = [token]
    return found


def adapter_on(model: Any, spec: AdapterSpec, state: dict[str, Tensor]) -> Subject:
    """``model``, whatever adapter it carried, with this one."""
    remove(model)
    load_state(inject(model, spec, seed=0, strict=False), state)
    return InRunner(Runner(model))


def in_peft(model: Any, folder: Path) -> Subject:
    """A plain model of transformers under PEFT's own reading of ``folder``; a tensor that PEFT misses is an error."""
    from peft import PeftModel

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        wrapped = PeftModel.from_pretrained(model, folder)
    missed = [str(w.message) for w in said if "missing" in str(w.message).lower()]
    if missed:
        raise TunegateError("PEFT does not find every tensor", where=str(folder), got=missed[0][:300])
    return InTransformers(wrapped)


def in_transformers_gguf(path: Path, config: Any) -> Subject:
    """transformers' GGUF loader: its names and its undoing of llama.cpp's layout, the base's config."""
    from transformers import AutoModelForCausalLM

    loader: Any = AutoModelForCausalLM
    with contextlib.redirect_stderr(io.StringIO()):  # a bar that no setting turns off
        model = loader.from_pretrained(path.parent, gguf_file=path.name, config=config, dtype=torch.float32)
    return InTransformers(model)


@torch.no_grad()
def load_gguf(path: Path, model: Any) -> Subject:
    """``model`` with every parameter taken from the file by the ``gguf`` library; a missing one is an error."""
    from gguf import GGUFReader
    from gguf.quants import dequantize

    config = model.config
    family, blocks = family_of(config), config.num_hidden_layers
    stored = {tensor.name: tensor for tensor in GGUFReader(path).tensors}
    for name, parameter in model.named_parameters():
        found = stored.get(gguf_name(family, blocks, name))
        if found is None:
            raise TunegateError("a parameter is not in the file", where=str(path), expected=name)
        values = torch.from_numpy(np.array(dequantize(found.data, found.tensor_type), dtype=np.float32))
        parameter.copy_(from_gguf(config, family, name, values.view(parameter.shape)))
    return InRunner(Runner(model))


def read_gguf_adapter(path: Path, config: Any, paths: Sequence[str]) -> tuple[AdapterSpec, dict[str, Tensor]]:
    """The adapter in a GGUF file for the modules ``paths``, by llama.cpp's rules: ``alpha / rank`` is every scale."""
    from gguf import GGUFReader

    reader = GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    if fields.get("general.type") != "adapter" or fields.get("adapter.type") != "lora":
        raise InputError("not a GGUF adapter", where=str(path))
    family, blocks = family_of(config), config.num_hidden_layers
    stored = {t.name: torch.from_numpy(np.array(t.data, dtype=np.float32)) for t in reader.tensors}
    state: dict[str, Tensor] = {}
    for module in paths:
        name = gguf_name(family, blocks, f"{module}.weight")
        state[tensor_name(module, "lora_A")] = stored.pop(f"{name}.lora_a")
        b = from_gguf(config, family, f"{module}.weight", stored.pop(f"{name}.lora_b"))
        state[tensor_name(module, "lora_B")] = b.contiguous()
    if stored:
        raise TunegateError("the file holds other tensors too", where=str(path), got=", ".join(sorted(stored)[:5]))
    rank = state[tensor_name(paths[0], "lora_A")].shape[0]
    return AdapterSpec(rank, float(fields["adapter.lora.alpha"]), target_modules=tuple(paths)), state


class InMlx:
    """A base folder in mlx-lm with an mlx adapter."""

    def __init__(self, base: Path, adapter: Path):
        import mlx.core as mx
        from mlx_lm.tuner.utils import load_adapters
        from mlx_lm.utils import load_model

        self._mx = mx
        model = load_model(base)[0]
        model.set_dtype(mx.float32)
        self._model = load_adapters(model, str(adapter))
        self._model.eval()

    def answers(self, prompts: Sequence[Sequence[int]], stop_ids: Sequence[int], new_tokens: int) -> list[list[int]]:
        return [greedy(self._feed(), prompt, stop_ids, new_tokens) for prompt in prompts]

    def log_probs(self, row: Sequence[int], last: int = POSITIONS) -> Tensor:
        return torch.log_softmax(self._feed()(row)[-last:], -1)

    def _feed(self) -> Feed:
        from mlx_lm.models.cache import make_prompt_cache

        cache: Any = make_prompt_cache(self._model)

        def feed(ids: Sequence[int]) -> Tensor:
            found = self._model(self._mx.array([list(ids)]), cache=cache)[0].astype(self._mx.float32)
            return torch.from_numpy(np.array(found))

        return feed
