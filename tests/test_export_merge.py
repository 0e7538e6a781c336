"""Merging: the numbers of PEFT, the layout of the base, resumed without a trace, nothing left where parity fails."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import merge_utils
from safetensors.torch import load_file, save_file

from task import call, write_task
from tiny import tiny_base
from tunegate.errors import InputError, TunegateError
from tunegate.export import deltas
from tunegate.export.deltas import Mix, Update
from tunegate.export.merge import PROGRESS, discard, finish, write_merged
from tunegate.export.plan import plan_merge
from tunegate.files import hash_file, read_json
from tunegate.kernels.nf4 import dequantize, quantize
from tunegate.model.loading import load_model

ONE = Mix("linear", (1.0,))
KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "patterns": {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"layers.1.mlp.up_proj": 3}},
}


def peft_adapter(base: Path, out: Path, seed: int = 0, noise: float = 0.3, **settings: Any) -> Path:
    """A PEFT folder with random factors on ``base``."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM", **settings)
        model = get_peft_model(load_model(base, dtype=torch.float32), config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                drawn = noise * torch.randn(parameter.shape, generator=generator)
                parameter.copy_(drawn if parameter.ndim == 2 else parameter * (1 + drawn))
        model.save_pretrained(out)
    return out


def merged(base: Path, adapters: list[Path], out: Path, mix: Mix = ONE, **settings: Any) -> Path:
    plan = plan_merge(base, adapters, out, mix, **settings)
    write_merged(plan)
    return finish(plan, {})


def shards(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for path in sorted(folder.glob("*.safetensors")) for name, t in load_file(path).items()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["llama", "gemma3", "phi3", "gpt2"])
def test_weights_are_pefts(family: str, kind: str, tmp_path: Path) -> None:
    base = tiny_base(tmp_path / "base", family)
    settings = KINDS[kind] if family != "gpt2" or kind != "patterns" else {"rank_pattern": {"c_fc": 2}}
    if family == "phi3" and kind == "patterns":
        settings = {"rank_pattern": {"qkv_proj": 2}}
    adapter = peft_adapter(base, tmp_path / "adapter", **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft = PeftModel.from_pretrained(load_model(base, dtype=torch.float32), adapter).merge_and_unload()
    theirs, ours = peft.state_dict(), shards(merged(base, [adapter], tmp_path / "out"))
    before = shards(base)
    assert set(ours) == set(before)
    changed = {name for name in ours if not torch.equal(ours[name], before[name])}
    assert changed and all(name.endswith(".weight") for name in changed)
    for name in ours:
        key = name if name in theirs else f"transformer.{name}"
        torch.testing.assert_close(ours[name], theirs[key], rtol=2e-5, atol=2e-6, msg=name)
    assert load_model(tmp_path / "out", dtype=torch.float32) is not None


def test_shards_keep_their_layout_and_dtype(tmp_path: Path) -> None:
    base = tiny_base(tmp_path / "base", "qwen3")
    model = load_model(base, dtype=torch.bfloat16)
    (base / "model.safetensors").unlink()
    model.save_pretrained(base, max_shard_size="20KB")
    adapter = peft_adapter(base, tmp_path / "adapter")
    out = merged(base, [adapter], tmp_path / "out")
    names = sorted(p.name for p in base.glob("*.safetensors"))
    assert len(names) > 2 and names == sorted(p.name for p in out.glob("*.safetensors"))
    for name in names:
        ours, theirs = load_file(out / name), load_file(base / name)
        assert {k: (v.shape, v.dtype) for k, v in ours.items()} == {k: (v.shape, v.dtype) for k, v in theirs.items()}
    assert read_json(out / "model.safetensors.index.json")["weight_map"] == dict(
        sorted(read_json(base / "model.safetensors.index.json")["weight_map"].items())
    )


# --- several adapters -------------------------------------------------------------------------------------------


def whole(weight: torch.Tensor, updates: list[Update], mix: Mix) -> torch.Tensor:
    return torch.cat([values for _, values in deltas.merged_rows(deltas.Dense(weight), updates, mix, "w")])


def three_updates(seed: int) -> tuple[torch.Tensor, list[Update]]:
    """A weight (60, 40) and three adapters of rank 3 on it."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(60, 40, generator=generator)
    pairs = [(torch.randn(3, 40, generator=generator), torch.randn(60, 3, generator=generator)) for _ in range(3)]
    return weight, [Update(a, b, 0.5 + n) for n, (a, b) in enumerate(pairs)]


WEIGHTS = (0.1, 1.0, -0.25)  # unlike, so that a sign elected by weighted values would be another one


@pytest.mark.parametrize("method", ["linear", "ties"])
def test_mixtures_are_pefts_formulas_on_whole_deltas(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (weight, updates), weights = three_updates(1), WEIGHTS
    monkeypatch.setattr(deltas, "ELEMENTS_AT_ONCE", 120)  # three rows at a time
    ours = whole(weight, updates, Mix(method, weights, density=0.4)) - weight
    tasks = [u.scale * u.b @ u.a for u in updates]
    if method == "linear":
        theirs = merge_utils.task_arithmetic(tasks, torch.tensor(weights))
    else:
        theirs = merge_utils.ties(tasks, torch.tensor(weights), density=0.4)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
def test_dare_is_pefts_formula_for_the_same_draw(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT draws what to keep by ``torch.bernoulli``, for one adapter after the other: it is given our draws."""
    (weight, updates), mix = three_updates(2), Mix(method, WEIGHTS, 0.4, seed=5)
    monkeypatch.setattr(deltas, "ELEMENTS_AT_ONCE", 120)  # three rows at a time, each piece with its own draw
    ours = whole(weight, updates, mix) - weight
    draws = [
        torch.cat([deltas._dropped(torch.ones(3, 40), mix, f"w:{start}:{number}") for start in range(0, 60, 3)])
        for number in range(3)
    ]
    kept = [(d > 0).float() for d in draws]
    assert all(0.35 < float(k.mean()) < 0.45 for k in kept) and not torch.equal(kept[0], kept[1])
    waiting = iter(kept)
    monkeypatch.setattr(merge_utils.torch, "bernoulli", lambda _: next(waiting))
    formula = getattr(merge_utils, method)
    theirs = formula([u.scale * u.b @ u.a for u in updates], torch.tensor(mix.weights), density=mix.density)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert next(waiting, None) is None


def test_dare_keeps_the_expectation_and_is_seeded() -> None:
    weight = torch.zeros(40, 50)
    update = Update(torch.ones(1, 50), torch.ones(40, 1), 1.0)
    made = [whole(weight, [update], Mix("dare_linear", (1.0,), 0.3, seed)) for seed in (0, 0, 1)]
    assert torch.equal(made[0], made[1]) and not torch.equal(made[0], made[2])
    assert made[0].unique().tolist() == pytest.approx([0.0, 1 / 0.3])
    kept = (made[0] != 0).float().mean()
    assert abs(float(kept) - 0.3) < 0.05  # 2,000 draws: a standard deviation of 0.01


def test_an_adapter_without_a_module_adds_nothing_there(tmp_path: Path) -> None:
    base = tiny_base(tmp_path / "base", "llama")
    wide = peft_adapter(base, tmp_path / "wide")
    narrow = tmp_path / "narrow"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = LoraConfig(r=2, lora_alpha=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
        model = get_peft_model(load_model(base, dtype=torch.float32), config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.normal_()
    model.save_pretrained(narrow)
    alone = shards(merged(base, [wide], tmp_path / "one"))
    both = shards(merged(base, [wide, narrow], tmp_path / "two", Mix("linear", (1.0, 1.0))))
    differ = {n for n in alone if not torch.equal(alone[n], both[n])}
    assert differ == {f"model.layers.{i}.self_attn.q_proj.weight" for i in range(2)}


# --- quantized bases --------------------------------------------------------------------------------------------


def test_onto_the_weights_that_a_qlora_adapter_saw(tmp_path: Path) -> None:
    base = tiny_base(tmp_path / "base", "llama")
    adapter = peft_adapter(base, tmp_path / "adapter")
    recipe = {"format": "nf4", "block": 64, "double": True, "keep": ["down_proj"]}
    ours = shards(merged(base, [adapter], tmp_path / "out", recipe=recipe))
    plain, original = shards(merged(base, [adapter], tmp_path / "plain")), shards(base)
    name = "model.layers.0.mlp.up_proj.weight"
    added = plain[name] - original[name]
    seen = dequantize(quantize(original[name]))
    torch.testing.assert_close(ours[name], seen + added, rtol=1e-5, atol=1e-6)
    kept = "model.layers.0.mlp.down_proj.weight"
    assert torch.equal(ours[kept], plain[kept])
    assert torch.equal(ours["model.norm.weight"], original["model.norm.weight"])


# --- stopped, damaged, refused ------------------------------------------------------------------------------------


class Stop(Exception):
    pass


def sharded(tmp_path: Path) -> tuple[Path, Path]:
    base = tiny_base(tmp_path / "base", "llama")
    model = load_model(base, dtype=torch.float32)
    (base / "model.safetensors").unlink()
    model.save_pretrained(base, max_shard_size="30KB")
    return base, peft_adapter(base, tmp_path / "adapter")


def test_a_merge_that_was_cut_off_goes_on_and_gives_the_same_bytes(tmp_path: Path) -> None:
    base, adapter = sharded(tmp_path)
    whole = merged(base, [adapter], tmp_path / "whole")
    plan = plan_merge(base, [adapter], tmp_path / "out", ONE)
    files = list(plan.files)
    size = sum(e.end - e.start for e in plan.files[files[0]])
    seen: list[int] = []

    def stop(count: int) -> None:
        seen.append(count)
        if sum(seen) > size:
            raise Stop

    with pytest.raises(Stop):
        write_merged(plan, stop)
    assert not plan.out.exists() and list(read_json(plan.partial / PROGRESS)["shards"]) == [files[0].name]
    first = plan.partial / files[0].name
    stamp = first.stat().st_mtime_ns
    again = plan_merge(base, [adapter], tmp_path / "out", ONE)
    write_merged(again)
    assert first.stat().st_mtime_ns == stamp  # not written again
    out = finish(again, {})
    for path in whole.glob("*"):
        if path.name != "merge.json":
            assert hash_file(path) == hash_file(out / path.name), path.name
    assert not (out / PROGRESS).exists() and not plan.partial.exists()


def test_a_damaged_or_foreign_shard_is_not_kept(tmp_path: Path) -> None:
    base, adapter = sharded(tmp_path)
    plan = plan_merge(base, [adapter], tmp_path / "out", ONE)
    write_merged(plan)
    victim = plan.partial / list(plan.files)[-1].name  # a shard with adapted weights
    data = bytearray(victim.read_bytes())
    data[-1] ^= 1
    victim.write_bytes(data)
    whole = merged(base, [adapter], tmp_path / "whole")
    out = finish(plan, {}) if write_merged(plan) else None
    assert out is not None and hash_file(out / victim.name) == hash_file(whole / victim.name)
    other = plan_merge(base, [adapter], tmp_path / "third", Mix("linear", (0.5,)))
    shutil.copytree(whole, other.partial)
    write_merged(other)
    assert hash_file(other.partial / victim.name) != hash_file(whole / victim.name)
    discard(other)
    assert not other.partial.exists()


def test_a_change_that_the_dtype_cannot_hold_is_refused(tmp_path: Path) -> None:
    base = tiny_base(tmp_path / "base", "llama")
    path = base / "model.safetensors"
    save_file({k: v.bfloat16() for k, v in load_file(path).items()}, path, metadata={"format": "pt"})
    adapter = peft_adapter(base, tmp_path / "adapter")
    tensors = load_file(adapter / "adapter_model.safetensors")
    for name in tensors:
        if "lora_B" in name and "layers.0.mlp.up_proj" in name:
            tensors[name] *= 1e-9
    save_file(tensors, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    plan = plan_merge(base, [adapter], tmp_path / "out", ONE)
    with pytest.raises(TunegateError, match="1 adapted tensors came out as they were"):
        write_merged(plan)
    assert not plan.out.exists() and not plan.partial.exists()


def test_wrong_requests_are_told_together(tmp_path: Path, tiny_llama: Path) -> None:
    adapter = peft_adapter(tiny_llama, tmp_path / "adapter")
    with pytest.raises(InputError) as caught:
        plan_merge(tiny_llama, [adapter], tmp_path, Mix("tie", (1.0, float("nan")), 0.0))
    says = ("ties", "one weight for each adapter", "numbers, not all 0", "not a share", "the output exists")
    assert all(part in str(caught.value) for part in says)
    with pytest.raises(InputError, match="linear keeps every value"):
        plan_merge(tiny_llama, [adapter], tmp_path / "out", Mix("linear", (1.0,), 0.5))
    with pytest.raises(InputError, match="wrong shape"):
        plan_merge(tiny_base(tmp_path / "other", "mistral", hidden_size=64), [adapter], tmp_path / "out", ONE)


def test_a_weight_that_is_not_finite_leaves_nothing(tmp_path: Path) -> None:
    base, adapter = sharded(tmp_path)
    tensors = load_file(adapter / "adapter_model.safetensors")
    name = next(n for n in sorted(tensors, reverse=True) if "lora_B" in n)
    save_file({**tensors, name: tensors[name].sign() * 3e38}, adapter / "adapter_model.safetensors")
    plan = plan_merge(base, [adapter], tmp_path / "out", ONE)
    with pytest.raises(TunegateError, match=r"not finite in float32(?s:.)*check the adapter"):
        write_merged(plan)
    assert not plan.partial.exists()


@pytest.mark.parametrize("shard", [0, 1])
def test_an_interrupted_merge_says_what_it_kept(shard: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tunegate.export import merge

    base, adapter = sharded(tmp_path)
    work, sources = merge.merged_tensors, sorted(base.glob("*.safetensors"))

    def interrupted(plan: Any, source: Path) -> Any:
        if source == sources[shard]:
            raise KeyboardInterrupt
        yield from work(plan, source)

    command = ("merge", adapter, "-o", tmp_path / "out", "--base", base)
    with monkeypatch.context() as patch:
        patch.setattr(merge, "merged_tensors", interrupted)
        said = call(*command)
    kept = f"1 of {len(sources)} shards are kept, the same command goes on from there"
    assert said.code == 130 and f"interrupted; {kept if shard else 'nothing was written'}" in said.err
    left = {p.name for p in (tmp_path / ".out.partial").glob("*")}
    assert left == ({sources[0].name, PROGRESS} if shard else set())
    assert {p.name for p in tmp_path.iterdir()} == {"base", "adapter"} | ({".out.partial"} if shard else set())
    assert call(*command).code == 0 and not (tmp_path / ".out.partial").exists()


# --- the command ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["none", "nf4"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    task = write_task(tmp_path_factory.mktemp("merge"), tiny_llama)
    said = call("run", task, "--set", f"base.quantization={request.param}")
    assert said.code == 0, said.err
    (found,) = (task.parent / "runs" / "task").glob("run-*/adapter")
    return found


def test_the_command_merges_with_proof(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "model"
    said = call("merge", run, "-o", out)
    assert said.code == 0, said.err
    report = read_json(out / "merge.json")
    assert report["changed"] == report["modules"] == 14 and report["verified"]
    parity = report["parity"]
    assert parity["mean_kl"] < 1e-6 and parity["agreement"] == parity["same_answers"] == 1.0
    assert parity["moved"] > 100 * parity["mean_kl"]
    (items,) = report["items"]
    assert items["prompts"] > 5 and items["mean_kl"] < 1e-6 and items["comparison"]["difference"] == 0
    assert call("merge", run, "-o", out).code == 2  # exists


@pytest.mark.parametrize("source, asked", [("hub", "abc123"), ("packaged", None)])
def test_only_a_hub_base_is_asked_for_by_its_revision(
    source: str, asked: str | None, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tunegate.files import hash_file, write_json
    from tunegate.pipeline import adapted as command

    adapter = Path(shutil.copytree(run, tmp_path / "adapter"))
    card = read_json(adapter / "card.json")
    card["base"] |= {"source": source, "revision": "abc123"}
    write_json(adapter / "card.json", card)
    manifest = read_json(adapter / "manifest.json")
    write_json(adapter / "manifest.json", {**manifest, "card.json": hash_file(adapter / "card.json")})
    seen: list[str | None] = []
    resolve = command.resolve_base

    def spy(name: str, revision: str | None = None) -> Any:
        seen.append(revision)
        return resolve(name)

    monkeypatch.setattr(command, "resolve_base", spy)
    assert call("merge", adapter, "-o", tmp_path / "out").code == 0
    assert seen == [asked]


def test_a_merge_without_parity_leaves_nothing(run: Path, tmp_path: Path) -> None:
    from tunegate.cli.console import Console
    from tunegate.export.parity import Limits
    from tunegate.pipeline.merge import MergeRequest, merge

    request = MergeRequest((run,), tmp_path / "out", limits=Limits(mean_kl=-1.0))
    with pytest.raises(TunegateError, match="not the adapter on its base"):
        merge(request, Console(json_only=True))
    assert not list(tmp_path.iterdir())


def test_another_base_is_refused(run: Path, tmp_path: Path) -> None:
    other = tiny_base(tmp_path / "other", "llama", seed=5)
    said = call("merge", run, "-o", tmp_path / "out", "--base", other)
    assert said.code == 2 and "another base" in said.err and not (tmp_path / "out").exists()
    said = call("merge", run, "-o", tmp_path / "out", "--base", other, "--allow-base-mismatch")
    assert said.code == 0 and read_json(tmp_path / "out" / "merge.json")["base_mismatch_allowed"]


def test_a_mixture_is_compared_with_the_same_one_in_memory(tmp_path: Path) -> None:
    base = tiny_base(tmp_path / "base", "llama")
    one, two = (peft_adapter(base, tmp_path / f"a{seed}", seed) for seed in (1, 2))
    for method, more in (("linear", []), ("ties", ["--density", 0.5]), ("dare_ties", ["--density", 0.7])):
        out = tmp_path / method
        said = call("merge", one, two, "-o", out, "--base", base, "--method", method, "--weights", 0.5, 0.5, *more)
        assert said.code == 0, said.err
        parity = read_json(out / "merge.json")["parity"]
        assert parity["mean_kl"] < 1e-6 and parity["same_answers"] == 1.0 and parity["moved"] > 1e-3


def test_half_an_adapter_is_compared_with_half_an_adapter(tmp_path: Path) -> None:
    base = tiny_base(tmp_path / "base", "llama")
    adapter = peft_adapter(base, tmp_path / "adapter")
    said = call("merge", adapter, "-o", tmp_path / "out", "--base", base, "--weights", 0.5)
    assert said.code == 0, said.err


def test_answers_end_where_serving_ends_them(run: Path) -> None:
    """The packaged and tiny bases' eos is the end of a turn; a template may end turns with another token."""
    from tunegate.cli.console import Console
    from tunegate.pipeline.adapted import find_source

    source = find_source((run,), None, False, Console(json_only=True))
    assert (
        source.exam.golden.stop_ids == source.renderer.stop_ids
        and source.renderer.end_of_turn_id in source.exam.golden.stop_ids
    )


def test_workers_hand_tensors_out_in_order_within_the_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tunegate.export import stream

    base, adapter = sharded(tmp_path)
    plan = plan_merge(base, [adapter], tmp_path / "out", ONE)
    source = max(plan.files, key=lambda p: len(plan.files[p]))
    whole = [(e.name, data.clone(), changed) for e, data, changed in stream.merged_tensors(plan, source)]
    assert [name for name, _, _ in whole] == [e.name for e in sorted(plan.files[source], key=lambda e: e.start)]
    begun: list[str] = []
    work = stream._merged

    def spy(plan_: Any, path: Path, descriptor: int, entry: Any, dtype: Any) -> Any:
        begun.append(entry.name)
        return work(plan_, path, descriptor, entry, dtype)

    monkeypatch.setattr(stream, "_merged", spy)
    monkeypatch.setattr(stream, "_ROOM", 0)
    monkeypatch.setattr(stream, "_BUDGET", 0.0)  # nothing beside the tensor that is needed next
    for number, (entry, data, changed) in enumerate(stream.merged_tensors(plan, source)):
        assert begun == [name for name, _, _ in whole[: number + 1]]
        assert (entry.name, changed) == (whole[number][0], whole[number][2]) and torch.equal(data, whole[number][1])
