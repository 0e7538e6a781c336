"""Bad input from the command line: one screen with the place and the way out, the right exit code, no traceback."""

from __future__ import annotations

import gzip
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from task import Said, call, replace_line, write_task
from tiny import tiny_base
from tunegate.kernels import native

ROW = '{"prompt": "question 7: the red fox", "completion": "red"}\n'
Spoil = Callable[[Path], None]  # changes the folder of task.yaml, rows.jsonl and base/


@pytest.fixture
def task(tmp_path: Path, tiny_llama: Path) -> Path:
    base = shutil.copytree(tiny_llama, tmp_path / "base")
    path = write_task(tmp_path, base, rows=60)
    replace_line(path, json.dumps(str(base)), "base")
    return path


def said_well(said: Said, code: int, *texts: str) -> None:
    """What every error has to be."""
    for text in texts:
        assert text in said.err, said.err
    assert said.code == code, said.err
    assert said.out == ""
    errors = said.err[re.search("^error ", said.err, re.MULTILINE).start() :]  # type: ignore[union-attr]
    assert len(said.err.splitlines()) < 40
    assert "Traceback" not in errors
    assert "unexpected" not in errors
    assert not re.search(r"\S  +\S", errors), errors


def line(old: str, new: str) -> Spoil:
    return lambda folder: replace_line(folder / "task.yaml", old, new)


def write(name: str, data: bytes | str) -> Spoil:
    content = data if isinstance(data, bytes) else data.encode()
    return lambda folder: (folder / name).write_bytes(content) and None


def remove(name: str) -> Spoil:
    return lambda folder: (folder / name).unlink()


def add_row(text: str) -> Spoil:
    def spoil(folder: Path) -> None:
        with (folder / "rows.jsonl").open("a", encoding="utf-8") as handle:
            handle.write(text + "\n")

    return spoil


def truncate(name: str, size: int) -> Spoil:
    def spoil(folder: Path) -> None:
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[:size])

    return spoil


def both(*spoils: Spoil) -> Spoil:
    def spoil(folder: Path) -> None:
        for one in spoils:
            one(folder)

    return spoil


def data_file(name: str, data: bytes) -> Spoil:
    return both(write(name, data), line("rows.jsonl", name))


def pickled(folder: Path) -> None:
    (folder / "base" / "model.safetensors").rename(folder / "base" / "pytorch_model.bin")


def not_finite(folder: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    path = folder / "base" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"][0] = torch.nan
    save_file(tensors, path, metadata={"format": "pt"})


LONG = json.dumps({"prompt": "fox " * 100_000, "completion": "red"})
CASES: dict[str, tuple[Spoil, tuple[str, ...]]] = {
    # the task file
    "unknown key": (line("  rank: 8", "  rnk: 8"), ("task.yaml:15", "'train.rnk'", "'rank'")),
    "unknown section": (line("train:\n  rank", "trian:\n  rank"), ("task.yaml:14", "'trian'", "'train'")),
    "wrong type": (line("rank: 8", "rank: eight"), ("task.yaml:15", "train.rank", "a whole number", "'eight'")),
    "several at once": (
        line("rank: 8\n  lr: 0.02", "rank: 0\n  lr: fast"),
        ("task.yaml:15", "task.yaml:16", "train.rank", "train.lr"),
    ),
    "duplicate key": (line("rank: 8", "rank: 8\n  rank: 4"), ("task.yaml:16", "'train.rank'", "line 15")),
    "no base": (line("base: base\n", ""), ("'base'", "tunegate init")),
    "not YAML": (line("data:", "data: ["), ("task.yaml", "not valid YAML")),
    "empty task": (write("task.yaml", ""), ("task.yaml", "empty", "tunegate init")),
    "no task": (remove("task.yaml"), ("task.yaml", "no such file", "tunegate init")),
    "UTF-16 task": (write("task.yaml", "base: x".encode("utf-16")), ("task.yaml", "UTF-16", "UTF-8")),
    "binary task": (write("task.yaml", bytes(range(256))), ("task.yaml", "UTF-8")),
    "deep task": (write("task.yaml", "[" * 20_000), ("task.yaml",)),
    "data as task": (write("task.yaml", ROW * 30_000), ("task.yaml", "too large", "is this the data?")),
    # the data
    "no data": (remove("rows.jsonl"), ("rows.jsonl", "no such file")),
    "data misspelt": (line("rows.jsonl", "rowz.jsonl"), ("rowz.jsonl", "'rows.jsonl'")),
    "empty data": (write("rows.jsonl", ""), ("rows.jsonl", "empty")),
    "UTF-16 data": (write("rows.jsonl", ROW.encode("utf-16")), ("rows.jsonl", "UTF-16", "iconv")),
    "binary data": (write("rows.jsonl", b"\x7fELF\x00\x01" * 99), ("rows.jsonl", "binary")),
    "Latin-1 data": (write("rows.jsonl", ROW.replace("fox", "f\xf6x").encode("latin-1")), ("rows.jsonl", "byte 0xf6")),
    "cut gzip": (data_file("rows.jsonl.gz", gzip.compress(ROW.encode() * 99)[:40]), ("rows.jsonl.gz", "cut off")),
    "not Parquet": (data_file("rows.parquet", b"PAR1" + bytes(50)), ("rows.parquet",)),
    "bad JSON": (add_row('{"prompt": "a"'), ("rows.jsonl:61", "not valid JSON", "on_bad_row: skip")),
    "deep JSON": (add_row("[" * 20_000 + "]" * 20_000), ("rows.jsonl:61", "nested deeper than 100")),
    "duplicate keys": (add_row('{"prompt": "a", "prompt": "b", "completion": "c"}'), ("rows.jsonl:61", "'prompt'")),
    "missing answer": (add_row('{"prompt": "a"}'), ("rows.jsonl:61", "completion")),
    "100k tokens": (add_row(LONG), ("rows.jsonl:61", "2,048 tokens", "on_long_row")),
    "longer than the base": (
        add_row(json.dumps({"prompt": "fox " * 900, "completion": "red"})),
        ("the base takes 512", "data.max_tokens: 512"),
    ),
    "many bad rows": (
        both(*[add_row('{"question": 1}') for _ in range(50)]),
        ("50 of 110 rows cannot be used", "rows.jsonl:61", "more of 101"),
    ),
    "no such column": (line("train: rows.jsonl", "train: rows.jsonl\n  group_by: custmer"), ("'custmer'", "group_by")),
    "no validation": (line("valid_fraction: 0.15", "valid_fraction: 0"), ("data.valid_fraction", "no validation rows")),
    "no test": (line("test_fraction: 0.15", "test_fraction: 0"), ("data.test_fraction", "no test rows")),
    # metrics and prompts
    "unknown metric": (line("metric: accuracy", "metric: acuracy"), ("task.metric", "'acuracy'", "'accuracy'")),
    "labels without answers": (
        line("metric: accuracy", "metric: accuracy\n  labels: [red, green]"),
        ("rows.jsonl:", "reference"),
    ),
    "no labels file": (line("metric: accuracy", "metric: accuracy\n  labels: l.json"), ("l.json", "No such file")),
    "no schema": (line("report: likelihood", "report: json_schema"), ("task.json_schema",)),
    "prompt name": (line("name: brief", "name: ../brief"), ("task.prompts", "'../brief'")),
    "everything at once": (
        both(
            line("metric: accuracy", "metric: acuracy"), line("rows.jsonl", "a.jsonl"), line("base: base", "base: ./no")
        ),
        ("task.metric", "a.jsonl", "./no"),
    ),
    "the task file and what it names": (
        both(
            line("metric: accuracy", "metric: acuracy\n  raport: chrf"),
            line("rows.jsonl", "rowz.jsonl"),
            line("rank: 8", "rnk: 8"),
            line("min_test_items: 5", "min_test_items: 5\n  rules: [task.blue > 1]"),
        ),
        ("'task.raport'", "'train.rnk'", "task.metric", "'rows.jsonl'", "task.blue", "'task.bleu'"),
    ),
    "a wrong section and a missing file": (
        line("train: rows.jsonl", "trian: x\n  train: rowz.jsonl\n  test: none.jsonl"),
        ("'data.trian'", "rowz.jsonl: no such file", "none.jsonl: no such file"),
    ),
    "no task and no judge": (
        both(line("base: base\n", ""), line("min_test_items: 5", "rules: [judge.mean > 4]"), line("rows.j", "r.j")),
        ("'base' is missing", "no judge is named", "r.jsonl: no such file"),
    ),
    # the base
    "no such base": (line("base: base", "base: ./bas"), ("'./bas'", "no such base")),
    "truncated base": (
        truncate("base/model.safetensors", 5000),
        ("model.safetensors", "5,000 bytes", "cut off"),
    ),
    "cut header": (truncate("base/model.safetensors", 100), ("model.safetensors",)),
    "pickled base": (pickled, ("safetensors",)),
    "no tokenizer": (remove("base/tokenizer.json"), ("tokenizer.json",)),
    "broken config": (write("base/config.json", "{"), ("config.json",)),
    "eos that is no id": (write("base/generation_config.json", '{"eos_token_id": "x"}'), ("eos_token_id", "'x'")),
    # the adapter
    "rank over dimension": (line("rank: 8", "rank: 33"), ("rank 33", "rank <= ", "lower the rank")),
    "no such module": (
        line("rank: 8", "rank: 8\n  target_modules: [q_prj]"),
        ("train.target_modules", "'q_prj'", "q_proj"),
    ),
    "no such layer": (line("rank: 8", "rank: 8\n  layers: [7]"), ("train.layers",)),
    "no such device": (line("rank: 8", "rank: 8\n  device: tpu:x"), ("train.device", "tpu:x")),
}


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_one_clear_screen(task: Path, name: str) -> None:
    spoil, texts = CASES[name]
    spoil(task.parent)
    said = call("run", task)
    said_well(said, 2, *texts)
    assert not (task.parent / "runs" / "task" / "ledger.json").exists()


@pytest.mark.parametrize(
    ("overrides", "texts"),
    [
        (["train.rnk=8"], ("--set train.rnk", "'rank'")),
        (["train.rank"], ("KEY=VALUE",)),
        (["train.rank=0"], ("--set train.rank", "greater than or equal to 1")),
        (["train.rank=[1"], ("--set train.rank=[1",)),
    ],
)
def test_bad_overrides(task: Path, overrides: list[str], texts: tuple[str, ...]) -> None:
    said_well(call("run", task, *(a for o in overrides for a in ("--set", o))), 2, *texts)


@pytest.mark.parametrize(
    "arguments", [[], ["rune"], ["run"], ["eval", "t.yaml", "--split", "train"], ["check", "a", "--show", "x"]]
)
def test_wrong_use(arguments: list[str]) -> None:
    said = call(*arguments)
    assert (said.code, said.out) == (2, "")
    assert "usage: tunegate" in said.err


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ([], "init, check, plan"),
        (["registry"], "init, add, list"),
        (["registry", "base"], "list, add, supersede"),
        (["deploy"], "merged, multi, separate, advise"),
        (["keys"], "add, list, remove"),
    ],
)
def test_a_missing_action_is_answered_with_all_actions(words: list[str], named: str) -> None:
    said = call(*words)
    assert (said.code, said.out) == (2, "")
    assert f"One of: {named}" in said.err


@pytest.mark.parametrize(
    ("words", "by", "told"),
    [
        (["advise", "t.yaml", "--curve-minuts", "3"], "tunegate advise: error", "'--curve-minutes'"),
        (["eval", "t.yaml", "--plain-bass=1"], "tunegate eval: error", "'--plain-base'"),
        (["registry", "base", "list", "--registri", "x"], "registry base list: error", "'--registry'"),
        (["--json", "show", "t.yaml"], "tunegate show: error", "--json stands after the command"),
        (["show", "a", "b"], "tunegate show: error", "unrecognized arguments: b\n"),
    ],
)
def test_a_misspelt_option_is_answered_by_its_command(words: list[str], by: str, told: str) -> None:
    said = call(*words)
    assert (said.code, said.out) == (2, "")
    assert by in said.err and told in said.err


def test_a_base_with_nan_weights(task: Path) -> None:
    not_finite(task.parent)
    said_well(call("run", task), 1, "NaN or infinite logits")


# --- bases that cannot be read --------------------------------------------------------------------------------------

UP = "model.layers.0.mlp.up_proj.weight"


def tensors(change: Callable[[dict[str, Any]], object], index: dict[str, str] | None = None) -> Spoil:
    """The base's tensors changed; with an ``index`` in two shards, which it describes."""

    def spoil(base: Path) -> None:
        from safetensors.torch import load_file, save_file

        path = base / "model.safetensors"
        found = load_file(path)
        change(found)
        save_file(found, path, metadata={"format": "pt"})
        if index is not None:
            path.rename(base / "a.safetensors")
            whole = dict.fromkeys(found, "a.safetensors")
            (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {**whole, **index}}))

    return spoil


def quantized_as(method: str) -> Spoil:
    def spoil(base: Path) -> None:
        config = json.loads((base / "config.json").read_text())
        (base / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": method}}))

    return spoil


def fp8(found: dict[str, Any]) -> None:
    import torch

    found[UP] = found[UP].to(torch.float8_e4m3fn)
    found[f"{UP}_scale_inv"] = torch.ones(1, 1)


def integers(found: dict[str, Any]) -> None:
    found[UP] = found[UP].to(dtype=__import__("torch").int8)


# name: what is done to the base's folder, what `quantize` and `run` with NF4 have to say
BASES: dict[str, tuple[Spoil, tuple[str, ...]]] = {
    "a shard is missing": (tensors(lambda t: None, {"lm_head.bias": "b.safetensors"}), ("shard is missing",)),
    "the index lies": (tensors(lambda t: t.pop(UP), {UP: "a.safetensors"}), ("tensors are missing", UP)),
    "cut off": (truncate("model.safetensors", 5000), ("not a sound safetensors file",)),
    "NaN": (tensors(lambda t: t[UP][1].fill_(float("nan"))), (UP,)),
    "infinity": (tensors(lambda t: t[UP][1].fill_(float("-inf"))), (UP,)),
    "another shape": (tensors(lambda t: t.update({UP: t[UP][:5].clone()})), ("another shape", UP)),
    "a weight is missing": (tensors(lambda t: t.pop(UP)), ("not in the weights", UP)),
    "fp8": (tensors(fp8), ("FP8", UP, "16-bit checkpoint")),
    "integers": (tensors(integers), ("integers", UP)),
    "GPTQ": (quantized_as("gptq"), ("GPTQ", "16-bit checkpoint")),
    "AWQ": (quantized_as("awq"), ("AWQ", "16-bit checkpoint")),
    "GPTQ by its tensors": (tensors(lambda t: t.update({f"{UP[:-6]}qweight": t.pop(UP)})), ("GPTQ or AWQ",)),
}


@pytest.mark.parametrize("name", BASES)
def test_a_base_that_cannot_be_read_is_told_and_nothing_is_left(task: Path, name: str) -> None:
    spoil, texts = BASES[name]
    base, out = task.parent / "base", task.parent / "out"
    spoil(base)
    said_well(call("quantize", base, out), 2, *texts)
    said_well(call("run", task, "--set", "base.quantization=nf4"), 2, *texts)
    assert {path.name for path in task.parent.iterdir()} <= {"base", "rows.jsonl", "task.yaml", "runs"}
    assert not [*task.parent.glob("runs/**/*.safetensors"), *task.parent.glob("runs/**/.tmp-*")]


@pytest.mark.parametrize("name", ["a shard is missing", "another shape", "fp8", "integers", "GPTQ", "NaN"])
def test_so_it_is_without_quantization(task: Path, name: str) -> None:
    BASES[name][0](task.parent / "base")
    said = call("run", task)
    said_well(said, 1 if name == "NaN" else 2)
    assert not [*task.parent.glob("runs/**/*.safetensors"), *task.parent.glob("runs/**/.tmp-*")]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_every_float_dtype_is_a_source(task: Path, dtype: str) -> None:
    """Tied embeddings too, and rows that no block divides (the tiny base has widths of 32 and 64)."""
    import torch

    tensors(lambda t: t.update({k: v.to(getattr(torch, dtype)) for k, v in t.items()}))(task.parent / "base")
    assert call("quantize", task.parent / "base", task.parent / "out", "--block", "4096").code == 0
    assert call("train", task, "--set", "base.quantization=nf4", "--set", "train.max_steps=2").code == 0


@pytest.mark.parametrize("memory", ["100kB", "30MB"])
def test_a_budget_that_nothing_meets_is_told_and_nothing_is_trained(task: Path, memory: str) -> None:
    """Less than the weights: before anything is loaded. Less than the process holds: before the first step."""
    says = "alone are above the budget" if memory == "100kB" else "no way to keep activations fits the budget"
    if native.library() is None and memory != "100kB":
        says = "needs fused layers"
    said_well(call("train", task, "--set", f"train.memory={memory}"), 2, says, "train.memory", "GB")
    assert not list(task.parent.glob("runs/**/*.safetensors"))
    said = call("plan", task, "--set", f"train.memory={memory}")
    assert said.code == 0 and "is not met" in said.out


def test_a_loss_that_is_not_finite_stops_the_run_with_its_rows(task: Path) -> None:
    """The step, the rows of the batch, the way out; what was saved before stays, and the test set unopened."""
    said = call("run", task, "--set", "train.lr=1e30", "--set", "train.clip=1e30", "--set", "train.checkpoint_every=1")
    said_well(said, 1, "at step ", "rows rows.jsonl:", "train.lr")
    assert re.search(r"the (loss|gradient|validation loss) is (nan|inf) at step \d+", said.err)
    root = task.parent / "runs" / "task"
    assert not (root / "ledger.json").exists()
    assert list(root.glob("run-*/train/checkpoints/step-*/manifest.json"))
    assert not list(root.glob("run-*/adapter/*"))


def test_a_validation_loss_that_is_not_finite_stops_too(task: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tunegate.pipeline import steps

    monkeypatch.setattr(steps, "mean_loss", lambda *_: float("nan"))
    said_well(call("run", task), 1, "the validation loss is nan at step", "train.lr")


@pytest.mark.parametrize("output", ["rows.jsonl", "rows.jsonl/below"])
def test_an_output_that_is_a_file(task: Path, output: str) -> None:
    said_well(call("run", task, "--set", f"output={output}"), 1, "cannot write", "rows.jsonl", "`output:`")


def test_an_adapter_folder_that_is_none(task: Path) -> None:
    said_well(call("eval", task, "--adapter", task.parent / "nowhere"), 2, "no such adapter folder", "nowhere")
    said_well(call("eval", task, "--adapter", task.parent), 2, "no manifest")
    said_well(call("eval", task), 2, "no finished adapter of this task", "tunegate run")


def test_a_pickled_adapter_is_not_read(task: Path) -> None:
    folder = task.parent / "adapter"
    folder.mkdir()
    (folder / "adapter_model.bin").write_bytes(b"\x80\x04N.")
    (folder / "adapter_config.json").write_text("{}")
    said_well(call("eval", task, "--adapter", folder), 2, "no manifest")


@pytest.mark.parametrize("name", ["unknown key", "bad JSON", "truncated base", "unknown metric"])
def test_check_finds_it_too(task: Path, name: str) -> None:
    CASES[name][0](task.parent)
    said = call("check", task)
    assert said.code == 2
    assert "Traceback" not in said.err


def test_text_of_the_users_is_not_markup(tmp_path: Path) -> None:
    """Brackets are rich's markup and :colons: its emoji; in rows and names they are text."""
    path = tmp_path / "[bold]:x:.jsonl"
    row = json.dumps({"prompt": "[red]what[/red] :smile:", "completion": "a"})
    path.write_text("".join(row + "\n" for _ in range(3)) + "{broken [/]\n")
    said = call("check", path)
    assert said.code == 2
    assert f"{path}:4" in said.out
    said = call("check", tmp_path / "[/none].jsonl")
    assert "[/none].jsonl" in said.err


def test_prompts_that_do_not_fit_in_the_base_are_left_out_and_named(task: Path, tmp_path: Path) -> None:
    tiny_base(tmp_path / "short", max_position_embeddings=64)
    replace_line(task, "base: base", "base: short")
    replace_line(task, "    - name: brief\n      system: Answer with one word.", "    - {name: shown, shots: 8}")
    said = call("run", task, "--set", "train.max_steps=1")
    assert "prompt shown is left out: it does not fit in the base's 64 tokens" in said.err
    assert said.code in (0, 1)


def test_a_template_without_a_system_role_is_no_error(task: Path, tmp_path: Path) -> None:
    from test_evaluation_prompts import NO_SYSTEM

    tiny_base(tmp_path / "gemma", template=NO_SYSTEM)
    replace_line(task, "base: base", "base: gemma")
    said = call("run", task, "--set", "train.max_steps=1")
    assert said.code in (0, 1), said.err
    assert "prompt brief on valid" in said.err
