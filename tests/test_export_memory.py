"""What a merge takes: memory by the largest tensor and not by the model, and room on the disk before it begins."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from task import call
from test_export_merge import ONE, peft_adapter, sharded
from tiny import tiny_base
from tunegate.adapter.files import CONFIG, TENSORS, tensor_name
from tunegate.errors import InputError
from tunegate.export import plan as planning
from tunegate.export.merge import write_merged
from tunegate.export.plan import plan_merge
from tunegate.files import partial_of

WIDE = 393_216  # times 256 in bf16: 201 MB
MERGE = """
import json, sys
from pathlib import Path
from tunegate.export.deltas import Mix
from tunegate.export.merge import finish, write_merged
from tunegate.export.plan import plan_merge

base, adapter, out, recipe = Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), json.loads(sys.argv[4])
plan = plan_merge(base, [adapter], out, Mix("linear", (1.0,)), recipe=recipe)
write_merged(plan)
finish(plan, {})
(peak,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
print(int(peak.split()[1]) * 1024)
"""


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base of two matrices of 201 MB and little else, and an adapter on both."""
    folder = tmp_path_factory.mktemp("wide")
    base = tiny_base(folder / "base", "gpt_neox", hidden_size=256, num_hidden_layers=1)
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    config["intermediate_size"] = WIDE
    (base / "config.json").write_text(json.dumps(config), encoding="utf-8")
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(base / "model.safetensors").items()}
    path, state = "gpt_neox.layers.0.mlp.", {}
    noise = torch.randn(1 << 16).bfloat16()
    for name, rows, columns in (("dense_h_to_4h", WIDE, 256), ("dense_4h_to_h", 256, WIDE)):
        tensors[f"{path}{name}.weight"] = noise.repeat(rows * columns // len(noise)).view(rows, columns)
        state[tensor_name(path + name, "lora_A")] = torch.randn(2, columns)
        state[tensor_name(path + name, "lora_B")] = torch.randn(rows, 2)
    tensors[f"{path}dense_h_to_4h.bias"] = torch.zeros(WIDE, dtype=torch.bfloat16)
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    adapter = folder / "adapter"
    adapter.mkdir()
    save_file(state, adapter / TENSORS, metadata={"format": "pt"})
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["dense_h_to_4h", "dense_4h_to_h"]}
    (adapter / CONFIG).write_text(json.dumps(settings), encoding="utf-8")
    return base, adapter


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peak memory is read from /proc")
@pytest.mark.parametrize("quantized", [False, True])
def test_memory_is_twice_the_largest_tensor_and_300_mb(
    quantized: bool, wide: tuple[Path, Path], tmp_path: Path
) -> None:
    """Of the whole process, Python and torch included."""
    recipe = {"format": "nf4", "block": 64, "double": True, "keep": []} if quantized else None
    out = tmp_path / "out"
    command = [sys.executable, "-W", "ignore", "-c", MERGE, *map(str, wide), str(out), json.dumps(recipe)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    largest = 2 * 256 * WIDE
    assert largest < int(done.stdout) < 2 * largest + 300e6, f"{int(done.stdout) / 1e6:.0f} MB"
    assert (out / "model.safetensors").stat().st_size == (wide[0] / "model.safetensors").stat().st_size


def disk(free: int) -> SimpleNamespace:
    return SimpleNamespace(disk_usage=lambda _: SimpleNamespace(free=free))


def test_room_on_the_disk_is_asked_for_before_a_byte_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny_base(tmp_path / "base", "llama")
    adapter, out = peft_adapter(base, tmp_path / "adapter"), tmp_path / "deep" / "out"
    needed = (base / "model.safetensors").stat().st_size
    monkeypatch.setattr(planning, "shutil", disk(needed))
    with pytest.raises(InputError, match=rf"not enough room(?s:.)*{needed * 1.02 / 1e6:.1f} MB"):
        plan_merge(base, [adapter], out, ONE)
    assert not out.parent.exists()
    monkeypatch.setattr(planning, "shutil", disk(int(needed * 1.02) + 2))
    assert plan_merge(base, [adapter], out, ONE)


def test_a_gguf_model_asks_for_its_own_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny_base(tmp_path / "base", "llama")  # fp32, so f16 takes half of it
    adapter, needed = peft_adapter(base, tmp_path / "adapter"), (base / "model.safetensors").stat().st_size
    for share, code in ((0.4, 2), (0.7, 0)):
        monkeypatch.setattr(planning, "shutil", disk(int(share * needed)))
        said = call("export", adapter, "--base", base, "--to", "gguf", "--reader", "gguf", "-o", tmp_path / "out")
        assert said.code == code and ("not enough room" in said.err) == bool(code)
        assert (tmp_path / "out").exists() == (not code) and "reading the adapter" not in said.err[: 400 * code]


def test_a_gguf_model_that_does_not_fit_says_why(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    base = tiny_base(tmp_path / "base", "llama")
    adapter = peft_adapter(base, tmp_path / "adapter")
    command = ("export", adapter, "--base", base, "--to", "gguf", "--reader", "gguf", "-o")
    assert call(*command, tmp_path / "whole").code == 0
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    size = (tmp_path / "whole" / "model.gguf").stat().st_size
    resource.setrlimit(resource.RLIMIT_FSIZE, (size - 5000, hard))
    try:
        said = call(*command, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert said.code == 1 and "cannot write: File too large" in said.err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "base", "whole"]


def test_what_an_earlier_attempt_wrote_counts_as_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, adapter = sharded(tmp_path)
    write_merged(plan_merge(base, [adapter], tmp_path / "out", ONE))  # not published
    written = sum(p.stat().st_size for p in partial_of(tmp_path / "out").glob("*.safetensors"))
    monkeypatch.setattr(planning, "shutil", disk(written // 10))
    assert plan_merge(base, [adapter], tmp_path / "out", ONE)
    with pytest.raises(InputError, match="not enough room"):
        plan_merge(base, [adapter], tmp_path / "another", ONE)
