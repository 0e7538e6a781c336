"""Loading and quantizing tensor by tensor: the same model as quantizing a loaded one, in bounded memory."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tiny import FAMILIES, tiny_base
from tunegate.adapter.inject import inject
from tunegate.adapter.spec import AdapterSpec
from tunegate.data.pack import split_batches
from tunegate.data.types import Rendered
from tunegate.engine.runner import Runner
from tunegate.errors import InputError
from tunegate.kernels.formats import Recipe
from tunegate.kernels.nf4 import QuantizedLinear, quantize_linears
from tunegate.kernels.stored import StoredEmbedding, StoredLinear
from tunegate.model.loading import load_model
from tunegate.model.quantize import plan_quantization, write_quantized

RECIPE = {"format": "nf4", "block": 64, "double": True, "keep": []}
WITHOUT_LINEARS = {"gpt2"}  # Conv1D
IDS = torch.arange(12).reshape(1, 12)


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def recast(folder: Path, dtype: torch.dtype) -> None:
    """The folder's weights in another dtype."""
    path = folder / "model.safetensors"
    save_file({k: v.to(dtype) for k, v in load_file(path).items()}, path, metadata={"format": "pt"})


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in WITHOUT_LINEARS])
def test_streaming_equals_quantizing_the_loaded_model(family, tmp_path):
    folder = tiny_base(tmp_path / family, family)
    streamed = load_model(folder, dtype=torch.float32, recipe=RECIPE)
    loaded = load_model(folder, dtype=torch.float32)
    names = quantize_linears(loaded)
    assert names and names == [n for n, m in streamed.named_modules() if isinstance(m, QuantizedLinear)]
    assert torch.equal(logits(streamed), logits(loaded))
    assert not streamed.training and not any(p.requires_grad for p in streamed.parameters())


@pytest.mark.parametrize("form", ["nf4-64-double", "nf4-128", "fp4-64", "int4-32", "int8"])
def test_other_recipes_and_stored_checkpoints_load_the_same(form, tiny_llama, tmp_path):
    recipe = Recipe.parse(form)
    streamed = load_model(tiny_llama, dtype=torch.float32, recipe={**recipe.to_json(), "keep": []})
    loaded = load_model(tiny_llama, dtype=torch.float32)
    quantize_linears(loaded, recipe=recipe)
    assert torch.equal(logits(streamed), logits(loaded))
    if recipe.format != "int4":  # has no file format
        write_quantized(plan_quantization(tiny_llama, tmp_path / "out", recipe), name="tiny")
        stored = load_model(tmp_path / "out", dtype=torch.float32)
        assert torch.equal(logits(stored), logits(streamed))
        assert Runner(stored).path_reason == Runner(streamed).path_reason


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3", "phi3"])
def test_a_16_bit_checkpoint_keeps_16_bits_and_computes_in_32(family, tmp_path):
    folder = tiny_base(tmp_path / family, family)
    recast(folder, torch.bfloat16)
    streamed = load_model(folder, dtype=torch.float32, recipe=RECIPE)
    loaded = load_model(folder, dtype=torch.float32)
    quantize_linears(loaded)
    torch.testing.assert_close(logits(streamed), logits(loaded), atol=2e-5, rtol=2e-5)
    head, embedding = streamed.get_output_embeddings(), streamed.get_input_embeddings()
    if type(loaded.get_input_embeddings()) is nn.Embedding:  # Gemma scales its embeddings in their own dtype
        assert isinstance(head, StoredLinear) and isinstance(embedding, StoredEmbedding)
        assert head.weight.dtype == embedding.weight.dtype == torch.bfloat16
        tied = streamed.config.tie_word_embeddings
        assert (head.weight is embedding.weight) == tied
    norms = [p for n, p in streamed.named_parameters() if "norm" in n]
    assert norms and {p.dtype for p in norms} == {torch.float32}
    runner = Runner(streamed)
    assert runner.path == "packed" and runner.dtype == torch.float32


@pytest.mark.parametrize("family", FAMILIES)
def test_a_narrow_model_is_the_wide_one_in_half_the_memory(family, tmp_path):
    folder = tiny_base(tmp_path / family, family)
    recast(folder, torch.bfloat16)
    narrow, wide = (load_model(folder, dtype=torch.float32, narrow=on) for on in (True, False))
    for (name, ours), theirs in zip(narrow.named_modules(), wide.modules(), strict=True):
        if type(theirs) is nn.Linear and theirs is not wide.get_output_embeddings():
            assert isinstance(ours, StoredLinear) and ours.weight.dtype == torch.bfloat16, name
    torch.testing.assert_close(logits(narrow), logits(wide), atol=2e-5, rtol=2e-5)
    ours, theirs = Runner(narrow), Runner(wide)
    assert (ours.path, ours.dtype, ours.path_reason) == (theirs.path, theirs.dtype, theirs.path_reason)


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_an_adapter_on_a_narrow_model_gets_the_gradients_of_the_wide_one(method, tmp_path):
    folder = tiny_base(tmp_path / "llama", "llama")
    recast(folder, torch.bfloat16)
    spec = AdapterSpec(rank=4, alpha=8.0, use_dora=method == "dora")
    rows = [Rendered(str(n), tuple(range(1, 9 + n)), (False,) * 3 + (True,) * (5 + n)) for n in range(3)]
    batch = next(iter(split_batches(rows, 64)))
    gradients = []
    for on in (True, False):
        runner = Runner(load_model(folder, dtype=torch.float32, narrow=on))
        injection = inject(runner.model, spec, seed=3)
        generator = torch.Generator().manual_seed(5)
        for name, parameter in injection.parameters().items():
            if name.endswith("lora_B"):
                nn.init.normal_(parameter, std=0.05, generator=generator)
        runner.loss_sum(batch).backward()
        gradients.append({name: parameter.grad for name, parameter in injection.parameters().items()})
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) >= 2
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], atol=2e-5, rtol=2e-4)


def test_layers_that_are_named_stay_as_they_are(tiny_llama):
    model = load_model(
        tiny_llama, dtype=torch.float32, recipe={**RECIPE, "keep": ["down_proj", "layers.0.self_attn.q_proj"]}
    )
    plain = {n for n, m in model.named_modules() if type(m) is nn.Linear}
    assert {n for n in plain if n.startswith("model.")} == {
        "model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj", "model.layers.0.self_attn.q_proj",
    }  # fmt: skip


def test_conv1d_is_refused(tmp_path):
    with pytest.raises(InputError, match="no linear layer to quantize"):
        load_model(tiny_base(tmp_path / "gpt2", "gpt2"), dtype=torch.float32, recipe=RECIPE)


def changed(tmp_path: Path, change) -> Path:
    folder = tiny_base(tmp_path / "llama", "llama")
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


UP = "model.layers.0.mlp.up_proj.weight"
BAD = {
    "another shape": (lambda t: t.update({UP: t[UP][:5].clone()}), r"\(64, 32\)"),
    "not in the weights": (lambda t: t.pop(UP), UP),
    "NaN or infinity": (lambda t: t[UP].fill_(float("nan")), UP),
    "cannot be quantized": (lambda t: t.update({UP: t[UP].to(torch.float8_e4m3fn)}), "F8_E4M3"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_weights_are_refused_by_name(what, tmp_path):
    change, shown = BAD[what]
    with pytest.raises(InputError, match=what) as caught:
        load_model(changed(tmp_path, change), dtype=torch.float32, recipe=RECIPE)
    assert re.search(shown, str(caught.value)) and caught.value.exit_code == 2


def test_experts_are_refused(tmp_path):
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=2,
    )  # fmt: skip
    MixtralForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="rearranges tensors"):
        load_model(tmp_path, dtype=torch.float32, recipe=RECIPE)


_MEASURE = """
import json, resource, sys, threading, time
from pathlib import Path
import torch
from transformers import AutoConfig
from tunegate.kernels.formats import Recipe
from tunegate.model.streaming import load_streamed
small, folder = map(Path, sys.argv[1:3])  # the small one first: what is imported on the way counts as before
recipe = None if sys.argv[3] == "none" else Recipe.parse(sys.argv[3])
load_streamed(small, AutoConfig.from_pretrained(small), dtype=torch.float32, recipe=recipe)
config = AutoConfig.from_pretrained(folder)
def rss(): return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
before, peak, done = rss(), 0, False
def watch():
    global peak
    while not done:
        peak = max(peak, rss()); time.sleep(0.0005)
thread = threading.Thread(target=watch); thread.start()
found = load_streamed(folder, config, dtype=torch.float32, recipe=recipe)
done = True; thread.join()
print(json.dumps({"peak": peak - before, "bytes": found.weight_bytes}))
"""


@pytest.fixture(scope="module")
def large_base(tmp_path_factory) -> Path:
    """Four shards of bf16, 352 MB; the largest tensor is the embedding."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=8192, hidden_size=1024, intermediate_size=4096, num_hidden_layers=10, num_attention_heads=8,
        num_key_value_heads=8, tie_word_embeddings=True,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("large")
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder, max_shard_size="100MB")
    return folder


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("form, share", [("nf4-64-double", 0.33), ("int8", 0.55), ("none", 1.01)])
def test_memory_while_loading_is_bounded(form, share, tiny_llama, large_base):
    """Peak <= the finished model + twice the largest tensor + a little; weights that are not quantized keep 16 bits."""
    size = sum(p.stat().st_size for p in large_base.glob("*.safetensors"))
    largest = 8192 * 1024 * 2
    command = [sys.executable, "-c", _MEASURE, str(tiny_llama), str(large_base), form]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True, env={**os.environ})
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["bytes"] < size * share
    assert found["peak"] <= found["bytes"] + 2 * largest + 64 * 2**20, (found, size)
