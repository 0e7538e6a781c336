"""What a step holds, which layers are recomputed for a budget, and activations in a file."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tiny import tiny_model
from tunegate.adapter.inject import inject
from tunegate.adapter.spec import AdapterSpec
from tunegate.config import TrainSection, parse_size
from tunegate.data.pack import make_batch
from tunegate.data.types import Rendered
from tunegate.engine.activations import LayerPass, LayerSizes, replay
from tunegate.engine.memory import Need, Saving, choose, resident_bytes
from tunegate.engine.runner import Runner
from tunegate.engine.train import plan_saving
from tunegate.engine.workspace import Workspace
from tunegate.errors import InputError
from tunegate.kernels import native

needs_kernels = pytest.mark.skipif(native.library() is None, reason="fused layers need the kernels")


def built(family: str, **spec: Any) -> tuple[Runner, Any]:
    model = tiny_model(family)
    runner = Runner(model)
    injection = inject(model, AdapterSpec(4, 8.0, **spec), seed=0)
    with torch.no_grad():
        for name, parameter in injection.parameters().items():
            if name.endswith("lora_B"):
                parameter.normal_(generator=torch.Generator().manual_seed(1))
    return runner, injection


def batch(lengths: tuple[int, ...] = (37, 5, 20)) -> Any:
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(3, 400, (n,), generator=generator).tolist() for n in lengths]
    rows = [Rendered(f"row {n}", tuple(row), (False, *[True] * (len(row) - 1))) for n, row in enumerate(ids)]
    return make_batch(rows, share_prefix=False)


@needs_kernels
@pytest.mark.parametrize("spec", [{}, {"use_dora": True}, {"dropout": 0.3}, {"target_modules": ("o_proj",)}], ids=str)
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gemma3", "phi3"])
def test_saved_bytes_are_what_the_forward_pass_takes(family: str, spec: dict[str, Any]) -> None:
    runner, injection = built(family, **spec)
    for layer in injection.modules.values():
        layer.training = True
    assert runner.fused is not None
    run = batch()
    found = replay([layer.on(run.layout.tokens, 4) for layer in runner.fused.layers()])
    loss = runner.loss_sum(run)
    (lease,) = {id(f.owner): f for f in _leases(loss.grad_fn)}.values()
    assert lease.workspace.mark() == (0, found.kept.used)


class _Found:
    def __init__(self, node: Any):
        self.owner, self.workspace = node.lease, node.lease.workspace


def _leases(node: Any) -> list[_Found]:
    found, stack, seen = [], [node], set()
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "lease"):
            found.append(_Found(node))
        stack += [n for n, _ in node.next_functions]
    return found


@needs_kernels
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_every_way_to_save_gives_the_same_bytes(family: str, tmp_path: Path) -> None:
    runner, injection = built(family, dropout=0.2)
    for layer in injection.modules.values():
        layer.training = True
    assert runner.fused is not None

    def gradients() -> dict[str, torch.Tensor]:
        torch.manual_seed(5)
        for p in injection.parameters().values():
            p.grad = None
        runner.loss_sum(batch()).backward()
        return {n: p.grad.clone() for n, p in injection.parameters().items()}

    wanted = gradients()
    for recompute, folder in ((1, None), (2, None), (2, tmp_path), (0, None)):
        runner.fused.save_less(recompute, folder)
        found = gradients()
        assert all(torch.equal(found[n], wanted[n]) for n in wanted), (recompute, folder)
    assert not list(tmp_path.iterdir())  # the file has no name


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc")
def test_a_file_block_is_given_up_and_comes_back(tmp_path: Path) -> None:
    space = Workspace(tmp_path)
    first, second = space.take(8 << 20), space.take(4 << 20)
    first.copy_(torch.arange(8 << 20))
    second.fill_(7.0)
    before = resident_bytes()
    space.put_away(first)
    assert before - resident_bytes() > 30 << 20
    assert torch.equal(first, torch.arange(8 << 20, dtype=torch.float32)) and bool((second == 7).all())
    space.put_away(torch.ones(3))  # not of this workspace: nothing happens


_FREED = """
import torch
from tunegate.engine.memory import give_back_freed, resident_bytes
give_back_freed()
held, freed = [], []
for _ in range(3000):  # 64 kB each, every other one kept: no hole is large
    freed.append(torch.ones(16384)); held.append(torch.ones(16384))
before = resident_bytes()
freed.clear()
give_back_freed()
print(before - resident_bytes())
"""


@pytest.mark.skipif(sys.platform != "linux" or platform.libc_ver()[0] != "glibc", reason="glibc's malloc_trim")
def test_scattered_memory_is_given_back() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    done = subprocess.run([sys.executable, "-c", _FREED], capture_output=True, text=True, check=True, env=environment)
    assert int(done.stdout) > 0.8 * 3000 * 65536


# --- the choice -------------------------------------------------------------------------------------------------

GB = 10**9
LAYER = LayerPass(LayerSizes(256, 4, 2, 64, 768), 20_000, 4, (8,) * 7, dropout=True)
NEED = Need(GB // 10, (LAYER,) * 6)
OPTIONS = [Saving(n) for n in range(7)] + [Saving(6, offload=True)]


@pytest.mark.parametrize("wanted", [OPTIONS[n] for n in (0, 2, 3, 6, 7)], ids=str)
def test_as_few_layers_as_the_budget_needs(wanted: Saving) -> None:
    """One layer recomputed needs room for itself and saves nothing; from the second on each saves."""
    budget = GB + NEED.total(wanted)
    found = choose(budget, GB, NEED)
    assert (found.recompute, found.offload) == (wanted.recompute, wanted.offload)
    assert f"{budget / 1e9:.2f} GB" in found.reason
    assert all(NEED.total(option) > NEED.total(wanted) for option in OPTIONS[: OPTIONS.index(wanted)])


def test_a_budget_that_nothing_meets_says_what_would() -> None:
    least = GB + NEED.total(OPTIONS[-1])
    with pytest.raises(InputError, match="no way to keep activations") as caught:
        choose(least - 1, GB, NEED)
    assert f"{least / 1e9:.2f} GB or more" in str(caught.value)
    assert caught.value.exit_code == 2


@given(st.integers(1, 12), st.integers(1, 4000), st.booleans(), st.integers(0, 2 * 10**9))
def test_the_choice_fits_and_one_layer_fewer_does_not(count: int, tokens: int, dora: bool, room: int) -> None:
    need = Need(1000, (replace(LAYER, tokens=tokens, dora=dora),) * count)
    try:
        found = choose(room, 0, need)
    except InputError:
        assert all(need.total(Saving(n)) > room for n in range(count + 1))
        return
    assert need.total(found) <= room
    if found.recompute and not found.offload:
        assert need.total(Saving(found.recompute - 1)) > room


@needs_kernels
def test_layers_with_adapters_of_their_own_are_counted_one_by_one() -> None:
    """Only the second layer is adapted: the first keeps no low-rank activations."""
    runner, _ = built("llama", layers_to_transform=(1,))
    assert runner.fused is not None
    first, second = (layer.on(64, 4) for layer in runner.fused.layers())
    assert (set(first.ranks), set(second.ranks)) == ({0}, {4})


@needs_kernels
def test_settings_and_budget_together() -> None:
    runner, injection = built("llama")
    assert plan_saving(runner, injection, TrainSection(), 512) == Saving(0)
    assert plan_saving(runner, injection, TrainSection(gradient_checkpointing=True), 512) == Saving(2)
    assert plan_saving(runner, injection, TrainSection(gradient_checkpointing=9), 512) == Saving(2)
    assert plan_saving(runner, injection, TrainSection(gradient_checkpointing="offload"), 512) == Saving(2, True)
    found = plan_saving(runner, injection, TrainSection(gradient_checkpointing=1, memory="900GB"), 512)
    assert found.recompute == 1 and "900.00 GB" in found.reason
    with pytest.raises(InputError, match=r"train\.memory"):
        plan_saving(runner, injection, TrainSection(memory="1MB"), 512)


def test_a_budget_without_fused_layers_is_refused() -> None:
    runner, injection = built("gpt2")
    with pytest.raises(InputError, match="needs fused layers"):
        plan_saving(runner, injection, TrainSection(memory="6GB"), 512)


@pytest.mark.parametrize(
    "text, wanted",
    [("6GB", 6 * 10**9), ("6GiB", 6 * 2**30), (" 1.5 gb ", 15 * 10**8), ("800MB", 8 * 10**8), ("64kib", 65536)],
)
def test_sizes(text: str, wanted: int) -> None:
    assert parse_size(text) == wanted


@pytest.mark.parametrize("text", ["", "6", "GB", "-1GB", "6 TBs", "0GB", "6G B", "1e3GB", "nan GB"])
def test_no_sizes(text: str) -> None:
    with pytest.raises(ValueError, match="is not a size"):
        parse_size(text)
