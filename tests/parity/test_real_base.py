"""The packaged 135M base through tunegate and through transformers and PEFT: same losses, same answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from tunegate.adapter.files import load_adapter, save_adapter
from tunegate.adapter.inject import inject, remove
from tunegate.adapter.spec import AdapterSpec
from tunegate.data.pack import make_batch
from tunegate.data.render import Renderer
from tunegate.data.types import Example, Rendered
from tunegate.engine.generate import Sampling, generate
from tunegate.engine.runner import Runner
from tunegate.errors import TunegateError
from tunegate.model.loading import load_model, load_tokenizer
from tunegate.model.resolve import resolve_base

pytestmark = pytest.mark.real_base

QUESTIONS = {
    "What is the capital of France?": "Paris",
    "Name the opposite of cold.": "hot",
    "How many legs does a spider have?": "eight",
    "Translate 'good morning' into Spanish.": "buenos días",
}


@pytest.fixture(scope="module")
def base() -> Any:
    try:
        return resolve_base("smollm2-135m-instruct")
    except TunegateError as error:
        pytest.skip(f"the packaged base cannot be had here: {error}")


@pytest.fixture(scope="module")
def model(base: Any) -> Any:
    return load_model(base, dtype=torch.float32)


@pytest.fixture(scope="module")
def renderer(base: Any) -> Renderer:
    return Renderer(load_tokenizer(base.path))


def examples() -> list[Example]:
    system = {"role": "system", "content": "Answer in one word."}
    return [
        Example("q", n, (system, {"role": "user", "content": q}, {"role": "assistant", "content": a}))
        for n, (q, a) in enumerate(QUESTIONS.items(), 1)
    ]


def test_packed_loss_with_a_shared_prefix_is_the_models_own(base: Any, model: Any, renderer: Renderer) -> None:
    rows = [r for r in renderer.render_many(examples()) if isinstance(r, Rendered)]
    reference = load_model(base, dtype=torch.float32)
    expected = 0.0
    with torch.no_grad():
        for row in rows:
            logits = reference(input_ids=torch.tensor([row.ids])).logits[0, :-1]
            labels = torch.tensor([i if t else -100 for i, t in zip(row.ids, row.target, strict=True)][1:])
            expected += float(F.cross_entropy(logits, labels, reduction="sum"))
        batch = make_batch(rows)
        assert batch.layout.prefix > 10
        got = float(Runner(model).loss_sum(batch))
    assert got == pytest.approx(expected, rel=1e-5)


def test_greedy_answers_equal_transformers_generate(base: Any, model: Any, renderer: Renderer) -> None:
    prompts = [renderer.prompt_ids(e.prompt) for e in examples()]
    reference = load_model(base, dtype=torch.float32)
    answers = generate(Runner(model), prompts, Sampling(12, renderer.stop_ids))
    for prompt, answer in zip(prompts, answers, strict=True):
        own = reference.generate(
            torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=list(renderer.stop_ids)
        )[0, len(prompt) :].tolist()
        assert list(answer.ids) == [t for t in own if t not in renderer.stop_ids]
    assert "Paris" in renderer.decode(answers[0].ids)


@pytest.mark.parametrize("dora", [False, True])
def test_a_saved_adapter_gives_the_same_logits_in_peft(base: Any, model: Any, tmp_path: Path, dora: bool) -> None:
    from peft import PeftModel

    injection = inject(model, AdapterSpec(rank=4, alpha=8.0, use_dora=dora), seed=1)
    for layer in injection.modules.values():
        torch.nn.init.normal_(layer.lora_B, std=0.01, generator=torch.Generator().manual_seed(2))
    save_adapter(tmp_path, injection, base_name="smollm2-135m-instruct")
    ids = torch.arange(100, 120)[None]
    try:
        with torch.no_grad():
            model.eval()
            trained = _logits(model, ids)
    finally:
        remove(model)
    again = load_adapter(model, tmp_path)
    try:
        with torch.no_grad():
            assert torch.equal(_logits(model, ids), trained)
        assert len(again.modules) == 210
    finally:
        remove(model)
    reference = PeftModel.from_pretrained(load_model(base, dtype=torch.float32), str(tmp_path)).eval()
    with torch.no_grad():
        expected = reference(input_ids=ids).logits[0]
    assert torch.allclose(trained, expected, atol=2e-3, rtol=1e-4)


def _logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    runner = Runner(model)
    row = Rendered("r", tuple(ids[0].tolist()), (True,) * ids.shape[1])
    return runner.head.logits(runner.hidden(make_batch([row])))


def test_two_trainings_on_every_core_end_in_the_same_bytes(base: Any, renderer: Renderer) -> None:
    """Parallel sums with no fixed order show only with more than one thread and real sizes."""
    rows = [r for r in renderer.render_many(examples() * 12) if isinstance(r, Rendered)]
    batch = make_batch(rows)
    found = []
    for _ in range(2):
        model = load_model(base, dtype=torch.float32)
        runner = Runner(model)
        injection = inject(model, AdapterSpec(rank=4, alpha=8.0, dropout=0.1), seed=1)
        for layer in injection.modules.values():
            torch.nn.init.normal_(layer.lora_B, std=0.01, generator=torch.Generator().manual_seed(2))
            layer.train()
        torch.manual_seed(0)
        runner.loss_sum(batch).backward()
        found.append({name: p.grad for name, p in injection.parameters().items()})
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
