"""``tunegate quantize``: equal to quantizing in memory, loadable by transformers, and nothing left after an error."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from task import call
from tiny import tiny_base
from tunegate.cli import main
from tunegate.errors import InputError
from tunegate.kernels.formats import Recipe
from tunegate.kernels.nf4 import QuantizedLinear, dequantize, quantize
from tunegate.model.bnb_files import pack, quantized_names, unpack
from tunegate.model.fingerprint import fingerprint_base
from tunegate.model.loading import load_model
from tunegate.model.quantize import RECORD, error_of, plan_quantization, write_quantized
from tunegate.model.weights import INDEX_FILE, tensors_of

IDS = torch.arange(12).reshape(1, 12)
FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "gpt_neox"]
QUANTIZED = {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"}
QUANTIZED |= {"mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"}


def recast(folder: Path, dtype: torch.dtype) -> Path:
    path = folder / "model.safetensors"
    save_file({k: v.to(dtype) for k, v in load_file(path).items()}, path, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["dtype"] = str(dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def make(base: Path, out: Path, recipe: Recipe = Recipe(), **options) -> Path:  # noqa: B008 (frozen)
    return write_quantized(plan_quantization(base, out, recipe, **options), name="tiny").folder


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for path in tensors_of(folder) for k, v in load_file(path).items()}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("recipe", [Recipe(), Recipe("fp4", 32, False), Recipe.of("int8")], ids=str)
def test_the_file_holds_what_quantizing_in_memory_gives(family, recipe, tmp_path) -> None:
    base = recast(tiny_base(tmp_path / "base", family), torch.bfloat16)
    before, after = stored(base), stored(make(base, tmp_path / "out", recipe))
    weights = quantized_names(after)
    assert weights
    for name, weight in weights.items():
        for part, tensor in pack(name, quantize(before[name], recipe)).items():
            if part == weight.parts[-1] and weight.format != "int8":
                assert json.loads(after[part].numpy().tobytes()) == json.loads(tensor.numpy().tobytes())
            else:
                assert torch.equal(after[part], tensor)
    parts = {part for weight in weights.values() for part in weight.tensor_names}
    assert set(after) - parts == set(before) - set(weights)
    assert all(torch.equal(after[name], before[name]) for name in set(before) - set(weights))
    if family == "llama":
        assert {n.split(".", 3)[3].removesuffix(".weight") for n in weights} == QUANTIZED


def test_shards_index_record_and_the_other_files(tmp_path) -> None:
    base = recast(tiny_base(tmp_path / "base", "llama", hidden_size=512, intermediate_size=1024), torch.bfloat16)
    (base / "LICENSE").write_text("terms")
    out = make(base, tmp_path / "out", shard_bytes=1_000_000)
    shards = sorted(out.glob("*.safetensors"))
    assert len(shards) > 2 and shards[0].name == f"model-00001-of-{len(shards):05}.safetensors"
    assert all(path.stat().st_size < 1_100_000 for path in shards)
    index = json.loads((out / INDEX_FILE).read_text())
    assert set(index["weight_map"]) == set(stored(out))
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in stored(out).values())
    for path in shards:
        with safe_open(path, "pt") as file:  # the reference reader finds every tensor aligned
            assert {file.get_tensor(name).numel() for name in file.keys()}  # noqa: SIM118
    record = json.loads((out / RECORD).read_text())
    assert record["recipe"] == Recipe().to_json() and record["kept"] == ["lm_head"] and record["base"] == "tiny"
    assert record["fingerprint"]["total"] == fingerprint_base(base).total
    config = json.loads((out / "config.json").read_text())
    assert config["quantization_config"]["bnb_4bit_compute_dtype"] == "bfloat16"
    assert config["quantization_config"]["llm_int8_skip_modules"] == ["lm_head"]
    assert (out / "LICENSE").read_text() == "terms"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (out / name).read_bytes() == (base / name).read_bytes()
    assert not list(tmp_path.glob(".out*"))
    one = make(base, tmp_path / "one")
    assert not (one / INDEX_FILE).exists() and (one / "model.safetensors").stat().st_size > 1_000_000


def test_layers_that_are_named_are_kept(tiny_llama, tmp_path) -> None:
    out = make(tiny_llama, tmp_path / "out", skip=["down_proj", "model.layers.0.self_attn.q_proj"])
    kept = json.loads((out / "config.json").read_text())["quantization_config"]["llm_int8_skip_modules"]
    named = ["model.layers.0.mlp.down_proj", "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"]
    assert kept == ["lm_head", *named]
    assert not {f"{name}.weight" for name in kept} & set(quantized_names(stored(out)))
    with pytest.raises(InputError, match="did you mean 'q_proj'"):
        plan_quantization(tiny_llama, tmp_path / "no", Recipe(), skip=["q_prj"])


def test_rows_that_no_block_divides_and_wide_dtypes(tmp_path) -> None:
    for number, dtype in enumerate((torch.float16, torch.float32, torch.float64)):
        base = recast(
            tiny_base(tmp_path / f"base{number}", "llama", hidden_size=36, head_dim=10, intermediate_size=70), dtype
        )
        after = stored(make(base, tmp_path / f"out{number}"))
        kept = {torch.float64: torch.float32}.get(dtype, dtype)
        for name, weight in quantized_names(after).items():
            made = unpack(weight, after.__getitem__)
            assert made.dtype == kept and torch.equal(dequantize(made), dequantize(quantize(stored(base)[name])))


# --- other readers -----------------------------------------------------------------------------------------------


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def transformers_model(folder: Path, **options) -> nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, device_map="cpu", **options).eval()


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "phi3"])
@pytest.mark.parametrize("recipe", [Recipe(), Recipe("fp4", 128, False)], ids=str)
def test_transformers_loads_ours_with_the_logits_of_its_own(family, recipe, tmp_path) -> None:
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("accelerate")
    base = tiny_base(tmp_path / "base", family)
    out = make(base, tmp_path / "out", recipe)
    ours = transformers_model(out)
    kinds = {name: type(module).__name__ for name, module in ours.named_modules()}
    assert "Linear4bit" in kinds.values()
    dense = transformers_model(base)
    with torch.no_grad():
        for name, kind in kinds.items():
            if kind == "Linear4bit":
                weight = dense.get_submodule(name).weight
                weight.copy_(dequantize(quantize(weight.detach(), recipe)))
    assert torch.equal(logits(ours), logits(dense))


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_transformers_loads_our_int8_files(family, tmp_path) -> None:
    """Codes and scales arrive as they are. In training mode bitsandbytes computes on CPUs from the dequantized weights;
    otherwise it rounds the activations to 8 bits too."""
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("accelerate")
    base = tiny_base(tmp_path / "base", family, hidden_size=36, head_dim=10, intermediate_size=70)  # odd sizes
    ours = transformers_model(make(base, tmp_path / "out", Recipe.of("int8"), skip=["o_proj"]), dtype=torch.float32)
    dense = transformers_model(base)
    with torch.no_grad():
        for name, module in ours.named_modules():
            if type(module).__name__ == "Linear8bitLt":
                weight = dense.get_submodule(name).weight
                made = quantize(weight, Recipe.of("int8"))
                assert torch.equal(module.weight.data.view(-1), made.codes)
                assert torch.equal(module.weight.SCB, made.absmax) and not name.endswith("o_proj")
                weight.copy_(dequantize(made))
    assert not torch.equal(logits(dense), logits(transformers_model(base)))
    torch.testing.assert_close(logits(ours.train()), logits(dense), rtol=1e-4, atol=1e-4)


def test_an_int8_checkpoint_that_transformers_wrote_is_read(tmp_path) -> None:
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("accelerate")
    from transformers import BitsAndBytesConfig

    base = recast(tiny_base(tmp_path / "base", "llama"), torch.float16)
    theirs = transformers_model(base, quantization_config=BitsAndBytesConfig(load_in_8bit=True))
    theirs.save_pretrained(tmp_path / "theirs")
    loaded = load_model(tmp_path / "theirs", dtype=torch.float32)
    mine = load_model(base, dtype=torch.float32, recipe={**Recipe.of("int8").to_json(), "keep": []})
    assert torch.equal(logits(loaded), logits(mine))


@pytest.mark.parametrize("form", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [False, True])
def test_a_checkpoint_that_transformers_wrote_is_read(form, double, tmp_path) -> None:
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("accelerate")
    from transformers import BitsAndBytesConfig

    base = tiny_base(tmp_path / "base", "llama")
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=form, bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=torch.float32,
    )  # fmt: skip
    theirs = transformers_model(base, quantization_config=config)
    theirs.save_pretrained(tmp_path / "theirs")
    after = stored(tmp_path / "theirs")
    weights = quantized_names(after)
    mine = load_model(base, dtype=torch.float32)
    for name, weight in weights.items():
        parent, _, child = name.removesuffix(".weight").rpartition(".")
        made = unpack(weight, after.__getitem__)
        assert made.recipe == Recipe(form, 64, double)
        setattr(mine.get_submodule(parent), child, QuantizedLinear(made))
    assert len(weights) == 14
    torch.testing.assert_close(logits(mine), logits(theirs), rtol=1e-5, atol=1e-5)


# --- bad input ---------------------------------------------------------------------------------------------------


def refused(base: Path, out: Path, *says: str) -> None:
    with pytest.raises(InputError) as error:
        make(base, out)
    assert all(s in str(error.value) for s in says), str(error.value)
    assert not out.exists() and not list(out.parent.glob(f".{out.name}*"))


def change(folder: Path, **changes: torch.Tensor | None) -> Path:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    for name, tensor in changes.items():
        tensors.pop(name) if tensor is None else tensors.update({name: tensor})
    save_file(tensors, path, metadata={"format": "pt"})
    return folder


def test_numbers_that_are_not_finite_are_named_together(tmp_path) -> None:
    base = tiny_base(tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    up, norm = "model.layers.1.mlp.up_proj.weight", "model.norm.weight"
    tensors[up][3, 4], tensors[norm][0] = float("nan"), float("-inf")
    change(base, **tensors)
    refused(base, tmp_path / "out", up, norm, "NaN", "values from -inf")


def test_fp64_beyond_fp32_is_named(tmp_path) -> None:
    base = recast(tiny_base(tmp_path / "base"), torch.float64)
    up = "model.layers.0.mlp.up_proj.weight"
    change(base, **{up: torch.full((64, 32), 1e300, dtype=torch.float64)})
    refused(base, tmp_path / "out", up, "1e+300")


def test_what_cannot_be_quantized_is_refused(tmp_path) -> None:
    base, out = tiny_base(tmp_path / "base"), tmp_path / "out"
    up = "model.layers.0.mlp.up_proj.weight"
    original = load_file(base / "model.safetensors")
    change(base, **{up: original[up].to(torch.float8_e4m3fn)})
    refused(base, out, "as FP8", up)
    change(base, **{up: torch.zeros(64, 32, dtype=torch.int8)})
    refused(base, out, "as integers", up, "I8")
    change(base, **{up: torch.zeros(32, 64)})
    refused(base, out, "another shape", up, "(64, 32)", "(32, 64)")
    change(base, **{up: None})
    refused(base, out, "not in the weights", up)
    change(base, **original)
    make(base, out)
    refused(out, tmp_path / "again", "quantized already")
    with pytest.raises(InputError, match="the output exists"):
        make(base, out)
    with pytest.raises(InputError, match="int4 has no file format"):
        make(base, tmp_path / "int4", Recipe("int4"))
    refused(tiny_base(tmp_path / "gpt2", "gpt2"), tmp_path / "out2", "no linear layer", "Conv1D")


def test_shards_that_lie_are_refused(tmp_path) -> None:
    base = tiny_base(tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    names = sorted(tensors)
    save_file({n: tensors[n] for n in names[:5]}, base / "a.safetensors")
    save_file({n: tensors[n] for n in names[5:-1]}, base / "b.safetensors")
    lying = {n: "a.safetensors" if n in names[:5] else "b.safetensors" for n in names}
    (base / INDEX_FILE).write_text(json.dumps({"weight_map": lying}))
    refused(base, tmp_path / "out", "tensors are missing", names[-1])
    (base / "b.safetensors").unlink()
    refused(base, tmp_path / "out", "shard is missing", "b.safetensors")


def test_a_failure_while_writing_leaves_nothing(tiny_llama, tmp_path, monkeypatch) -> None:
    from tunegate.model import quantize as module

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    (tmp_path / ".out.partial").mkdir()  # of a run that was killed
    monkeypatch.setattr(module, "_write_beside", fail)
    with pytest.raises(KeyboardInterrupt):
        make(tiny_llama, tmp_path / "out")
    assert not list(tmp_path.iterdir())
    said = call("quantize", tiny_llama, tmp_path / "out")
    assert said.code == 130 and "interrupted; nothing was written" in said.err
    assert not list(tmp_path.iterdir())


# --- errors and the command --------------------------------------------------------------------------------------


def test_errors_by_hand_and_by_format() -> None:
    weight = torch.tensor([[7.0, 6.6, 0, 0] + [0.0] * 60])
    error = error_of(weight, quantize(weight, Recipe("int4", 64, False)))  # 6.6 becomes 7
    assert error.rmse == pytest.approx(0.4 / 8, rel=1e-5)
    assert error.relative == pytest.approx(0.4 / (49 + 6.6**2) ** 0.5, rel=1e-5)
    assert error.cosine == pytest.approx((49 + 7 * 6.6) / ((49 + 6.6**2) * 98) ** 0.5, rel=1e-6)
    normal = torch.randn(300, 5000, generator=torch.Generator().manual_seed(0))  # several pieces
    found = {form: error_of(normal, quantize(normal, Recipe(form))) for form in ("nf4", "int4", "fp4")}
    assert found["nf4"].rmse < found["int4"].rmse < found["fp4"].rmse
    exact = (normal - dequantize(quantize(normal))).double()
    assert found["nf4"].rmse == pytest.approx(exact.square().mean().sqrt().item(), rel=1e-6)
    assert error_of(torch.zeros(2, 64), quantize(torch.zeros(2, 64))).relative == 0


def test_the_command(tiny_llama, tmp_path, capsys) -> None:
    out, report = tmp_path / "out", tmp_path / "report.json"
    arguments = ["quantize", str(tiny_llama), str(out), "--compare", "--report", str(report)]
    assert main([*arguments, "--block", "32", "--skip", "q_proj,k_proj"]) == 0
    text = capsys.readouterr().out
    assert "10 weights in nf4-32-double" in text and "up_proj (2)" in text and "mean of 10" in text
    found = json.loads(report.read_text())
    assert set(found["tensors"]) == set(quantized_names(stored(out)))
    assert set(found["errors"]) == {"nf4", "fp4", "int4", "int8"}
    assert found["errors"]["int8"]["relative"] < found["errors"]["nf4"]["relative"] / 5
    assert main(arguments) == 2
    assert "the output exists" in capsys.readouterr().err
    assert main(["quantize", str(tiny_llama), str(tmp_path / "no"), "--block", "48", "--json"]) == 2
    assert "block size 48" in capsys.readouterr().out
    rows = ["quantize", str(tiny_llama), str(tmp_path / "rows"), "--format", "int8"]
    assert main([*rows, "--block", "64", "--json"]) == 2
    assert "one fp32 scale for each row" in capsys.readouterr().out
    assert main(rows) == 0 and "14 weights in int8" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["quantize", str(tiny_llama), str(out), "--max-shard-size", "big"])
