"""The worker of ``generate.py``: greedy answers to the same prompts by one of three ways to generate.

``tunegate`` sorts prompts by length, computes what all of them share once, and lets finished rows leave the batch.
``single`` is transformers' ``generate`` on one prompt after the other, ``batched`` the same on left-padded batches of
``rows`` prompts. The adapter is a fresh one with random B, so that it costs what a trained one costs.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch


def run(spec: dict[str, Any]) -> dict[str, Any]:
    """Seconds a repetition, and the answers as token ids."""
    prompts = json.loads(Path(spec["prompts"]).read_text(encoding="utf-8"))
    answer = {"tunegate": _tunegate, "single": _transformers, "batched": _transformers}[spec["way"]](spec)
    answer(prompts[: min(4, len(prompts))])  # warm-up
    seconds, answers = [], []
    for _ in range(spec.get("repeats", 1)):
        began = time.perf_counter()
        answers = answer(prompts)
        seconds.append(time.perf_counter() - began)
    return {"seconds": seconds, "answers": answers, "generated": sum(len(a) for a in answers)}


def _tunegate(spec: dict[str, Any]) -> Any:
    from tunegate.adapter.inject import inject
    from tunegate.adapter.spec import AdapterSpec
    from tunegate.engine.generate import Sampling, generate
    from tunegate.engine.runner import Runner
    from tunegate.model.loading import load_model

    runner = Runner(load_model(Path(spec["base"]), dtype=getattr(torch, spec["dtype"])))
    injection = inject(runner.model, AdapterSpec(spec["rank"], 2.0 * spec["rank"]), seed=0)
    parameters = injection.parameters()
    with torch.no_grad():
        for name, values in random_factors({n: p.shape for n, p in parameters.items()}).items():
            parameters[name].copy_(values)
    sampling = Sampling(spec["new_tokens"], tuple(spec["stop_ids"]), rows=spec["rows_at_once"])
    return lambda prompts: [list(g.ids) for g in generate(runner, prompts, sampling)]


def _transformers(spec: dict[str, Any]) -> Any:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, GenerationConfig

    from tunegate.engine.backends.trl import peft_parameters

    model: Any = AutoModelForCausalLM.from_pretrained(spec["base"], dtype=getattr(torch, spec["dtype"]))
    rank = spec["rank"]
    model = get_peft_model(
        model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    ).eval()
    parameters = peft_parameters(model)
    with torch.no_grad():
        for name, values in random_factors({n: p.shape for n, p in parameters.items()}).items():
            parameters[name].copy_(values)
    stop = list(spec["stop_ids"])
    model.generation_config = GenerationConfig(eos_token_id=stop, pad_token_id=stop[0])
    size = 1 if spec["way"] == "single" else spec["rows_at_once"]

    @torch.inference_mode()
    def answer(prompts: list[list[int]]) -> list[list[int]]:
        found: dict[int, list[int]] = {}
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        for start in range(0, len(order), size):
            part = order[start : start + size]
            ids, mask = left_padded([prompts[i] for i in part], stop[0])
            output = model.generate(
                input_ids=ids, attention_mask=mask, max_new_tokens=spec["new_tokens"], do_sample=False
            )
            for index, row in zip(part, output[:, ids.shape[1] :].tolist(), strict=True):
                end = next((n for n, token in enumerate(row) if token in stop), None)
                found[index] = row[:end]
        return [found[i] for i in range(len(prompts))]

    return answer


def random_factors(shapes: dict[str, torch.Size]) -> dict[str, torch.Tensor]:
    """The same small A and B for every way to generate."""
    generator = torch.Generator().manual_seed(0)
    return {name: 0.01 * torch.randn(shape, generator=generator) for name, shape in sorted(shapes.items())}


def left_padded(prompts: list[list[int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(len(p) for p in prompts)
    ids = torch.full((len(prompts), width), pad)
    mask = torch.zeros_like(ids)
    for place, prompt in enumerate(prompts):
        ids[place, width - len(prompt) :] = torch.tensor(prompt)
        mask[place, width - len(prompt) :] = 1
    return ids, mask
