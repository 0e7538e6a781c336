"""Packed loss and every adapter gradient equal transformers and PEFT on one row at a time, for each architecture."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn
from torch.nn import functional as F

from tiny import FAMILIES, tiny_model
from tunegate.adapter.files import load_state
from tunegate.adapter.inject import Injection, inject
from tunegate.adapter.spec import AdapterSpec
from tunegate.config import TrainSection
from tunegate.data.pack import Batch, make_batch
from tunegate.data.types import Rendered
from tunegate.engine.runner import ATTENTION, Runner
from tunegate.engine.train import _training_mode
from tunegate.errors import InputError, TunegateError
from tunegate.kernels import Layout
from tunegate.kernels.formats import Recipe
from tunegate.kernels.nf4 import quantize_linears

# windows shorter than the rows and soft caps low enough to bend the scores
OVERRIDES: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": 8},
    "phi3": {"sliding_window": 8},
    "qwen2": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    "gemma2": {"attn_logit_softcapping": 1.0, "final_logit_softcapping": 2.0},
}
SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4, "n_positions": 64}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "bloom": ("BloomConfig", {"hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "gptj": ("GPTJConfig", GPT | {"resid_pdrop": 0.1, "embd_pdrop": 0.1}),
    "opt": ("OPTConfig", SHAPE | {"ffn_dim": 64, "word_embed_proj_dim": 32, "dropout": 0.1}),
    "cohere": ("CohereConfig", SHAPE | {"intermediate_size": 64, "num_key_value_heads": 2, "logit_scale": 0.5}),
    "granite": ("GraniteConfig", SHAPE | {"intermediate_size": 64, "num_key_value_heads": 2, "logits_scaling": 4.0}),
    "qwen2_moe": (
        "Qwen2MoeConfig",
        SHAPE
        | MOE
        | {"num_key_value_heads": 2, "use_sliding_window": True, "sliding_window": 20, "max_window_layers": 2},
    ),
}


def build(family: str) -> Any:
    if family not in OTHERS:
        return tiny_model(family, **OVERRIDES.get(family, {}))
    import transformers
    from transformers import AutoModelForCausalLM

    kind, options = OTHERS[family]
    config = getattr(transformers, kind)(vocab_size=400, bos_token_id=0, pad_token_id=0, eos_token_id=2, **options)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(0.15 * noise) if parameter.ndim > 1 else parameter.add_(0.1 * noise)
    return model.eval()


def sample_rows() -> list[Rendered]:
    """Five rows that begin alike, from 9 to 32 tokens, with one or two runs of targets each."""
    generator = torch.Generator().manual_seed(5)
    header = torch.randint(3, 400, (7,), generator=generator).tolist()
    rows = []
    for number, length in enumerate((11, 2, 25, 3, 12)):
        ids = header + torch.randint(3, 400, (length,), generator=generator).tolist()
        targets = [i >= len(ids) - 2 or (length > 10 and 9 <= i < 13) for i in range(len(ids))]
        rows.append(Rendered(f"row:{number}", tuple(ids), tuple(targets)))
    return rows


def peft_tensors(model: nn.Module) -> dict[str, nn.Parameter]:
    found = {}
    for path, layer in model.named_modules():
        if isinstance(layer, LoraLayer):
            found[f"{path}.lora_A.weight"] = layer.lora_A["default"].weight
            found[f"{path}.lora_B.weight"] = layer.lora_B["default"].weight
            if "default" in layer.lora_magnitude_vector:
                found[f"{path}.lora_magnitude_vector"] = layer.lora_magnitude_vector["default"].weight
    return found


@dataclass
class Pair:
    """The same adapter on the same base: PEFT's model, and ours with its runner."""

    theirs: nn.Module
    runner: Runner
    injection: Injection

    def reference(self, rows: list[Rendered]) -> tuple[float, dict[str, Tensor]]:
        """Mean loss over all targets and its gradients, one unpadded row at a time."""
        targets = sum(row.n_targets for row in rows)
        total = 0.0
        self.theirs.zero_grad()
        for row in rows:
            logits = self.theirs(input_ids=torch.tensor([row.ids])).logits[0, :-1].float()
            labels = torch.tensor([i if t else -100 for i, t in zip(row.ids, row.target, strict=True)][1:])
            loss = F.cross_entropy(logits, labels, reduction="sum") / targets
            loss.backward()
            total += float(loss.detach())
        return total, {name: p.grad.clone() for name, p in peft_tensors(self.theirs).items()}

    def ours(self, batch: Batch) -> tuple[float, dict[str, Tensor]]:
        parameters = self.injection.parameters()
        for parameter in parameters.values():
            parameter.grad = None
        loss = self.runner.loss_sum(batch) / batch.n_targets
        loss.backward()
        return float(loss.detach()), {
            f"base_model.model.{name}" + ("" if name.endswith("vector") else ".weight"): p.grad.clone()
            for name, p in parameters.items()
        }


def make_pair(family: str, dora: bool = False, targets: Any = "all-linear", recipe: str = "") -> Pair:
    """``recipe`` quantizes our base; PEFT's then holds the same values as plain fp32."""
    theirs, ours = build(family), build(family)
    if recipe:
        with torch.no_grad():
            for name in quantize_linears(ours, recipe=Recipe.parse(recipe)):
                theirs.get_submodule(name).weight.copy_(ours.get_submodule(name).dequantize())
    runner = Runner(ours)
    listed = targets if isinstance(targets, str) else tuple(targets)
    injection = inject(ours, AdapterSpec(4, 8.0, use_dora=dora, target_modules=listed), seed=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns about Conv1D and about tied heads, then does what we do
        config = LoraConfig(r=4, lora_alpha=8, use_dora=dora, target_modules=targets, task_type="CAUSAL_LM")
        theirs = get_peft_model(theirs, config).eval()
    tensors = peft_tensors(theirs)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for _, parameter in sorted(tensors.items()):
            noise = 0.2 * torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise if parameter.ndim == 2 else parameter * (1 + noise))
    load_state(injection, tensors)
    return Pair(theirs, runner, injection)


def same(ours: tuple[float, dict[str, Tensor]], theirs: tuple[float, dict[str, Tensor]]) -> None:
    assert ours[0] == pytest.approx(theirs[0], rel=2e-6)
    assert set(ours[1]) == set(theirs[1])
    for name, gradient in theirs[1].items():
        assert gradient.abs().max() > 0, name
        scale = float(gradient.abs().max())
        torch.testing.assert_close(ours[1][name] / scale, gradient / scale, rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_every_gradient_equal_pefts(family: str, dora: bool) -> None:
    pair, rows = make_pair(family, dora), sample_rows()
    assert pair.runner.path == "packed"
    wanted = pair.reference(rows)
    shared, flat = make_batch(rows), make_batch(rows, share_prefix=False)
    assert shared.layout == Layout((6, 12, 3, 26, 4, 13), 6) and flat.layout == Layout((18, 9, 32, 10, 19))
    same(pair.ours(shared), wanted)
    same(pair.ours(flat), wanted)
    settings = TrainSection(gradient_checkpointing=True)
    with _training_mode(pair.runner, pair.injection, settings):
        same(pair.ours(shared), wanted)


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize(
    ("family", "recipe"),
    [(f, "nf4-64-double") for f in FAMILIES if f != "gpt2"] + [(f, "int8") for f in ("llama", "qwen3", "gpt_neox")],
)
def test_a_quantized_base_equals_peft_on_its_dequantized_weights(family: str, recipe: str, dora: bool) -> None:
    pair, rows = make_pair(family, dora, recipe=recipe), sample_rows()
    assert pair.runner.path == "packed"
    plain = Runner(build(family))
    assert pair.runner.path_reason == plain.path_reason  # fused where the plain base is
    same(pair.ours(make_batch(rows)), pair.reference(rows))


@pytest.mark.parametrize(
    "family, path",
    [
        ("bloom", "padded"),
        ("gptj", "padded"),
        ("qwen2_moe", "padded"),
        ("opt", "packed"),
        ("cohere", "packed"),
        ("granite", "packed"),
    ],
)
def test_other_architectures_equal_peft_on_the_path_they_take(family: str, path: str) -> None:
    targets = ["q_proj", "o_proj", "down_proj"] if family == "qwen2_moe" else "all-linear"  # its gates are 1 wide
    pair, rows = make_pair(family, targets=targets), sample_rows()
    assert pair.runner.path == path
    assert pair.runner.shares_prefix == (path == "packed")
    wanted = pair.reference(rows)
    batch = make_batch(rows, share_prefix=pair.runner.shares_prefix)
    same(pair.ours(batch), wanted)
    settings = TrainSection(gradient_checkpointing=True)
    with _training_mode(pair.runner, pair.injection, settings):  # OPT's dropout of 0.1 must stay off
        same(pair.ours(batch), wanted)


def test_an_adapter_on_the_head_equals_pefts() -> None:
    pair, rows = make_pair("gpt_neox", targets=["lm_head", "query_key_value"]), sample_rows()
    assert not pair.runner.head.frozen
    same(pair.ours(make_batch(rows)), pair.reference(rows))


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("family", [*FAMILIES, "bloom"])
def test_a_row_does_not_touch_its_neighbours(family: str, share: bool) -> None:
    runner, rows = Runner(build(family)), sample_rows()
    share = share and runner.shares_prefix
    changed = list(rows)
    ids = rows[2].ids[:10] + tuple((i * 7 + 11) % 397 + 3 for i in rows[2].ids[10:])
    changed[2] = Rendered(rows[2].row_id, ids, rows[2].target)
    before, after = make_batch(rows, share_prefix=share), make_batch(changed, share_prefix=share)
    one, other = runner.log_probs(before), runner.log_probs(after)
    neighbours = before.target_rows != 2
    torch.testing.assert_close(one[neighbours], other[neighbours], rtol=0, atol=1e-6)
    assert not torch.allclose(one[~neighbours], other[~neighbours], atol=1e-2)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom"])
def test_a_row_alone_scores_as_in_a_batch(family: str) -> None:
    runner, rows = Runner(build(family)), sample_rows()
    together = make_batch(rows, share_prefix=runner.shares_prefix)
    found = runner.log_probs(together)
    for number, row in enumerate(rows):
        alone = runner.log_probs(make_batch([row]))
        torch.testing.assert_close(found[together.target_rows == number], alone, rtol=1e-5, atol=1e-5)


# --- which path -----------------------------------------------------------------------------------------------------


def test_a_window_that_only_the_mask_knows_takes_the_padded_path() -> None:
    """Qwen2-MoE does not tell its attention call; the probe's rows are too short to show it."""
    runner = Runner(build("qwen2_moe"))
    assert "window" in runner.path_reason
    ids = [(n * 37) % 397 + 3 for n in range(40)]  # twice the window
    batch = make_batch([Rendered("long", tuple(ids), (True,) * 40)])
    expected = build("qwen2_moe")(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    torch.testing.assert_close(
        runner.log_probs(batch), expected[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0], rtol=1e-4, atol=1e-5
    )


def test_the_padded_path_pads_only_rows_of_similar_length() -> None:
    runner = Runner(build("bloom"))
    seen: list[tuple[int, ...]] = []
    runner.backbone.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    rows = [Rendered(str(n), (5,) * n, (False,) * (n - 1) + (True,)) for n in (40, 3, 30, 4, 3)]
    runner.log_probs(make_batch(rows, share_prefix=False))
    assert seen == [(2, 40), (3, 4)]
    with pytest.raises(ValueError, match="shared prefix"):
        runner.hidden(make_batch(sample_rows()))


@contextmanager
def altered(model: Any, call: Callable[..., Any]) -> Iterator[Any]:
    """``model`` whose own forward goes through ``call(forward, ...)``."""
    plain = model.forward
    model.forward = lambda *args, **kwargs: call(plain, *args, **kwargs)
    yield model
    del model.forward


def test_a_model_that_scales_its_logits_unannounced_is_refused() -> None:
    def doubled(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        output.logits = output.logits * 2
        return output

    with altered(tiny_model(), doubled) as model, pytest.raises(InputError) as caught:
        Runner(model)
    assert "not understood" in str(caught.value) and "LlamaForCausalLM" in str(caught.value)


def test_a_model_without_a_backbone_is_refused_not_crashed_on() -> None:
    model = tiny_model()
    type(model).base_model_prefix, before = "", type(model).base_model_prefix
    try:
        with pytest.raises(InputError, match="not understood"):
            Runner(model)
    finally:
        type(model).base_model_prefix = before


def test_a_difference_that_is_not_a_number_is_no_match(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Runner, "_probe_difference", lambda self, reference, shared: float("nan"))
    with pytest.raises(InputError, match="not understood"):
        Runner(tiny_model())


def test_a_base_of_nans_is_named_so() -> None:
    model = tiny_model()
    with torch.no_grad():
        model.get_input_embeddings().weight.fill_(float("nan"))
    with pytest.raises(TunegateError, match="NaN or infinite") as caught:
        Runner(model)
    assert not isinstance(caught.value, InputError)


def test_a_refused_attention_leaves_the_model_as_it_was() -> None:
    model = build("qwen2_moe")
    Runner(model)
    assert model.config._attn_implementation != ATTENTION
    model(input_ids=torch.tensor([[3, 4, 5]]))


def test_a_second_runner_probes_the_model_anew() -> None:
    model = tiny_model("gemma2")
    assert Runner(model).path == Runner(model).path == "packed"


@pytest.mark.parametrize("vocabulary", [3, 5])
def test_the_probe_works_with_few_ids(vocabulary: int) -> None:
    assert Runner(tiny_model("llama", vocab_size=vocabulary)).path == "packed"


@pytest.mark.parametrize("positions", [2, 8, 12])
def test_the_probe_works_with_few_positions(positions: int) -> None:
    assert Runner(tiny_model("gpt2", n_positions=positions)).path == "packed"


def test_a_row_beyond_the_table_of_positions_is_an_input_error() -> None:
    runner = Runner(tiny_model("gpt2", n_positions=16))
    rows = [Rendered(name, (5,) * n, (False,) * (n - 1) + (True,)) for name, n in (("short:1", 16), ("long:2", 17))]
    assert runner.log_probs(make_batch(rows[:1])).isfinite().all()
    for share in (True, False):
        with pytest.raises(InputError) as caught:
            runner.log_probs(make_batch(rows, share_prefix=share))
        assert "long:2" in str(caught.value) and "short:1" not in str(caught.value)
        assert "at most 16 tokens" in str(caught.value) and "17" in str(caught.value)
    assert Runner(tiny_model("llama", max_position_embeddings=16)).context is None  # rotary positions are computed
