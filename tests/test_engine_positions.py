"""Rotary scalings on rows that cross the original context: each row as transformers computes it by itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tiny import tiny_model
from tunegate.adapter.inject import inject
from tunegate.adapter.spec import AdapterSpec
from tunegate.data.pack import make_batch
from tunegate.data.types import Rendered
from tunegate.engine.generate import Sampling, generate
from tunegate.engine.positions import long_above, position_table
from tunegate.engine.runner import Runner
from tunegate.errors import InputError

ORIGINAL, NEW = 32, 12


def scaled(kind: str, family: str = "llama", **more: Any) -> tuple[str, dict[str, Any]]:
    rope = {"rope_type": kind, "rope_theta": 10000.0, "original_max_position_embeddings": ORIGINAL, **more}
    return family, {"max_position_embeddings": 128, "rope_parameters": rope}


LONG = {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.5, 2.0, 4.0, 8.0]}
LONGROPE = scaled("longrope", "phi3", **LONG)
LONGROPE[1]["original_max_position_embeddings"] = ORIGINAL
SCALINGS = {
    "longrope": LONGROPE,
    "yarn": scaled("yarn", factor=4.0),
    "yarn with its own attention factor": scaled(
        "yarn", factor=4.0, attention_factor=1.3, beta_fast=16.0, beta_slow=2.0
    ),
    "llama3": scaled("llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0),
    "linear": scaled("linear", factor=4.0),
}


def build(name: str) -> Any:
    family, options = SCALINGS[name]
    return tiny_model(family, **options)


def rows(lengths: tuple[int, ...] = (4, 50, 10, 30, 24, 25), header: int = 8) -> list[list[int]]:
    """With a header of 8: 12 to 58 tokens, exactly the original context and one more among them."""
    generator = torch.Generator().manual_seed(0)
    head = torch.randint(3, 400, (header,), generator=generator).tolist()
    return [head + torch.randint(3, 400, (n,), generator=generator).tolist() for n in lengths]


def alone(name: str, ids: list[int]) -> torch.Tensor:
    """Log-probabilities of tokens 10 and later, by transformers on a model of its own."""
    with torch.no_grad():
        scores = build(name)(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    return scores[9:-1].gather(1, torch.tensor(ids[10:])[:, None])[:, 0]


def rendered(given: list[list[int]]) -> list[Rendered]:
    return [Rendered(str(n), tuple(ids), (False,) * 10 + (True,) * (len(ids) - 10)) for n, ids in enumerate(given)]


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("name", SCALINGS)
def test_each_row_is_what_it_is_alone(name: str, share: bool, fused: bool) -> None:
    runner, given = Runner(build(name)), rows()
    assert runner.path == "packed"
    if runner.fused is not None and not fused:
        runner.fused.remove()
    batch = make_batch(rendered(given), share_prefix=share)
    assert bool(batch.layout.prefix) == share
    found = runner.log_probs(batch)
    for number, ids in enumerate(given):
        torch.testing.assert_close(found[batch.target_rows == number], alone(name, ids), rtol=1e-4, atol=2e-5)


def test_the_padded_path_keeps_short_and_long_rows_apart() -> None:
    runner, given = Runner(build("longrope")), rows((22, 23, 25, 26))  # 30, 31, 33, 34: alike enough for one group
    runner.model.set_attn_implementation("sdpa")
    runner.path = "padded"
    if runner.fused is not None:
        runner.fused.remove()
    batch = make_batch(rendered(given), share_prefix=False)
    found = runner.log_probs(batch)
    for number, ids in enumerate(given):
        wanted = alone("longrope", ids)
        torch.testing.assert_close(found[batch.target_rows == number], wanted, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("share", [True, False])
def test_gradients_of_a_mixed_batch_are_the_sum_of_its_rows(share: bool) -> None:
    runner = Runner(build("longrope"))
    injection = inject(runner.model, AdapterSpec(4, 8.0), seed=0)
    parameters = injection.parameters()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in parameters.items():
            if name.endswith("lora_B"):
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    given = rendered(rows())
    for row in given:
        runner.loss_sum(make_batch([row])).backward()
    wanted = {name: parameter.grad for name, parameter in parameters.items()}
    for parameter in parameters.values():
        parameter.grad = None
    runner.loss_sum(make_batch(given, share_prefix=share)).backward()
    for name, parameter in parameters.items():
        scale = float(wanted[name].abs().max())
        assert scale > 0, name
        torch.testing.assert_close(parameter.grad / scale, wanted[name] / scale, rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize("name", SCALINGS)
def test_generation_across_the_original_context(name: str) -> None:
    """Rows that begin below and end above it, among rows on either side."""
    given = rows((4, 50, 10, 17, 24, 25, 20))
    wanted = []
    for ids in given:
        prompt = torch.tensor([ids])
        output = build(name).generate(
            prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=NEW, eos_token_id=None,
            pad_token_id=0,
        )  # fmt: skip
        wanted.append(tuple(output[0, len(ids) :].tolist()))
    runner = Runner(build(name))
    for size in (64, 2):
        assert [row.ids for row in generate(runner, given, Sampling(NEW, (), rows=size))] == wanted


def test_dynamic_ntk_ends_at_the_original_context_and_says_so() -> None:
    """Beyond it every length has frequencies of its own: such rows are refused, not computed with another's."""
    family, options = scaled("dynamic", factor=4.0)
    options["max_position_embeddings"] = ORIGINAL
    runner = Runner(tiny_model(family, **options))
    assert runner.context == ORIGINAL
    given = rows((4, 10, 24))
    found = runner.log_probs(batch := make_batch(rendered(given)))
    for number, ids in enumerate(given):
        with torch.no_grad():
            scores = tiny_model(family, **options)(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        wanted = scores[9:-1].gather(1, torch.tensor(ids[10:])[:, None])[:, 0]
        torch.testing.assert_close(found[batch.target_rows == number], wanted, rtol=1e-4, atol=2e-5)
    with pytest.raises(InputError, match="longer than the base can read"):
        runner.log_probs(make_batch(rendered(rows((25,)))))
    answers = generate(runner, given, Sampling(NEW, ()))
    assert [len(row.ids) for row in answers] == [NEW, NEW, 1] and not any(row.stopped for row in answers)


class _Config:
    max_position_embeddings = 4096

    def __init__(self, rope: dict[str, Any] | None) -> None:
        self.rope_parameters = rope


@pytest.mark.parametrize(
    ("rope", "table", "above"),
    [
        (None, 4096, None),
        ({"rope_type": "default"}, None, None),
        ({"rope_type": "yarn", "factor": 4.0}, None, None),
        ({"rope_type": "dynamic", "factor": 2.0}, 4096, None),
        ({"rope_type": "longrope", "original_max_position_embeddings": 100}, None, 100),
        ({"full_attention": {"rope_type": "dynamic"}, "sliding_attention": {"rope_type": "default"}}, 4096, None),
        (
            {
                "full_attention": {"rope_type": "longrope", "original_max_position_embeddings": 50},
                "sliding_attention": {"rope_type": "default"},
            },
            None,
            50,
        ),
    ],
)
def test_what_a_config_says(rope: dict[str, Any] | None, table: int | None, above: int | None) -> None:
    assert position_table(_Config(rope)) == table
    assert long_above(_Config(rope)) == above


def test_layers_that_change_at_different_lengths_are_refused() -> None:
    kinds = {
        name: {"rope_type": "longrope", "original_max_position_embeddings": n} for name, n in (("a", 50), ("b", 60))
    }
    with pytest.raises(InputError, match="different lengths"):
        long_above(_Config(kinds))
