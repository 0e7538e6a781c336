"""An adapter without a card is compared with the base that it names, where that is on this machine."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

from registry_folders import peft_folder
from test_registry_cli import told, typed
from test_registry_origin import adapter_on
from tunegate.errors import InputError
from tunegate.registry.adding import add
from tunegate.registry.entries import list_versions
from tunegate.registry.intake import read_folder
from tunegate.registry.opening import open_registry


def test_what_fits_and_what_does_not(tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All tensors that do not fit are told, under the base's path and under a name that the registry knows it by."""
    monkeypatch.chdir(tiny_llama.parent)
    told(tmp_path, "base", "add", tiny_llama.name, "--name", "llama")  # a path that means nothing elsewhere
    monkeypatch.chdir(tmp_path)
    fits = adapter_on(tiny_llama, tmp_path / "fits")
    path = fits / "adapter_model.safetensors"
    assert told(tmp_path, "add", fits, "--name", "found")["unchecked"] == ""
    again = typed(tmp_path, "add", fits, "--name", "found", "--base-name", "other")
    assert again.code == 2 and "one of another base" in again.err and str(tiny_llama) in again.err
    assert told(tmp_path, "add", fits, "--name", "found")["new"] is False
    odd = peft_folder(tmp_path / "odd", 1, base="llama")
    for text in ("llama", str(tiny_llama)):
        said = typed(tmp_path, "add", odd, "--name", "odd", "--base-name", text)
        assert said.code == 2 and "does not fit the base" in said.err and "--base-name" in said.err
        for part in (f"tensors of the modules of {text}", "layers.0.mlp.up_proj.lora_A", "layers.1", "wrong shape"):
            assert part in said.err, part
    tensors = load_file(path)
    name = sorted(tensors)[0]
    tensors[name.replace("layers.0", "layers.7")] = tensors[name]
    tensors[name.replace("layers.0", "layers.7").replace("lora_A", "lora_B")] = tensors[name.replace("_A", "_B")]
    save_file(tensors, path)
    said = typed(tmp_path, "add", fits, "--name", "deep")
    assert said.code == 2 and said.err.count("no adapted module takes this tensor") == 2
    assert [v["ref"] for v in told(tmp_path, "list")["versions"]] == ["found:1"]


@pytest.mark.parametrize(
    ("base", "why"), [("org/unknown", "cache"), ("nothing-here", "no such base"), ("", "names no base")]
)
def test_a_base_that_is_not_here(tmp_path: Path, base: str, why: str) -> None:
    folder = peft_folder(tmp_path / "a", 1, base=base)
    said = typed(tmp_path, "add", folder, "--name", "x")
    assert said.code == 0 and "were not compared with its base" in said.err and why in said.err
    assert "unverified" in said.out
    assert typed(tmp_path, "add", folder, "--name", "x").err == ""  # it is there


def test_a_folder_that_is_no_base(tmp_path: Path) -> None:
    registry = open_registry(str(tmp_path / "r"), create=True)
    (tmp_path / "base").mkdir()
    for n, text in enumerate(('{"model_type": "nonsense"}', "{", "[]", '{"model_type": "llama", "hidden_size": -1}')):
        (tmp_path / "base" / "config.json").write_text(text)
        found = add(registry, read_folder(peft_folder(tmp_path / f"{n}", n, str(tmp_path / "base")), name="x"))
        assert "transformers cannot" in found.unchecked
    assert len(_versions(tmp_path)) == 4


def test_nothing_is_written_for_what_does_not_fit(tmp_path: Path, tiny_llama: Path) -> None:
    registry = open_registry(str(tmp_path / "r"), create=True)
    intake = read_folder(peft_folder(tmp_path / "a", 1, str(tiny_llama)), name="x")
    with pytest.raises(InputError, match="does not fit the base"):
        add(registry, intake)
    assert _versions(tmp_path) == [] and not (tmp_path / "r" / "blobs").exists()


def _versions(folder: Path) -> list[str]:
    with open_registry(str(folder / "r")).database.reading() as connection:
        return [v.ref for v in list_versions(connection)]
