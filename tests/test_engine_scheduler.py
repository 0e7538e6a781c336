"""Answers made side by side on pages: the same as each alone, whatever shares a pass and however few pages exist."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tiny import FAMILIES, tiny_base
from tunegate.adapter.files import adapter_hash, load_adapter, save_adapter
from tunegate.adapter.inject import inject, remove
from tunegate.adapter.segmented import Served
from tunegate.adapter.spec import AdapterSpec
from tunegate.engine.constrain import Choices
from tunegate.engine.generate import Sampling, generate
from tunegate.engine.paging import PagePool, page_keys
from tunegate.engine.runner import Runner
from tunegate.engine.sampling import Chooser, Picking
from tunegate.engine.scheduler import Row, Scheduler
from tunegate.errors import InputError, TunegateError
from tunegate.kernels import native
from tunegate.kernels.formats import Recipe
from tunegate.model.loading import empty_model, load_model

NEW = 12
GREEDY = Picking(temperature=0.0)
compiled = pytest.mark.skipif(native.library() is None, reason="no compiled kernels")


def prompts(count: int = 7, seed: int = 0, shared: int = 0) -> list[list[int]]:
    g = torch.Generator().manual_seed(seed)
    draw = lambda n: torch.randint(3, 400, (n,), generator=g).tolist()  # noqa: E731
    header = draw(shared)
    return [header + draw(1 + 7 * n % 23) for n in range(count)]


def loaded(folder: Path, recipe: str = "none") -> tuple[Any, Runner]:
    packed = None if recipe == "none" else {**Recipe.parse(recipe).to_json(), "keep": []}
    model = load_model(folder, dtype=torch.float32, recipe=packed)
    return model, Runner(model)


def answers(scheduler: Scheduler, rows: list[Row], most_steps: int = 3000) -> list[tuple[int, ...]]:
    for row in rows:
        scheduler.add(row)
    for _ in range(most_steps):
        if not scheduler.busy:
            break
        scheduler.step()
    assert not scheduler.busy
    assert scheduler.pool.used == 0  # no page is left behind
    return [tuple(row.answer) for row in rows]


def row(prompt: list[int], slot: int | None = None, new: int = NEW, salt: bytes = b"", **more: Any) -> Row:
    return Row(list(prompt), new, Chooser(GREEDY, prompt), frozenset(), slot, salt, **more)


def alone(runner: Runner, given_prompts: list[list[int]], new: int = NEW) -> list[tuple[int, ...]]:
    """Each prompt by itself, in a call that the tests of generation hold against transformers."""
    return [generate(runner, [p], Sampling(new, ()))[0].ids for p in given_prompts]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_answers_as_alone(tmp_path: Path, family: str) -> None:
    extra = {"gemma2": {"attn_logit_softcapping": 1.0}, "mistral": {"sliding_window": 8}}.get(family, {})
    _, runner = loaded(tiny_base(tmp_path, family, **extra))
    asked = prompts()
    wanted = alone(runner, asked)
    for short in (128, 6, 0):  # tokens that attend each for itself: all, the first ones, none but steps
        scheduler = Scheduler(runner, 200, page_tokens=4, most_rows=5, step_tokens=11, short=short)
        assert answers(scheduler, [row(p) for p in asked]) == wanted
        assert answers(scheduler, [row(p) for p in asked]) == wanted  # recorded and cached by now
        assert scheduler.counters.cached_tokens > 0


@settings(max_examples=15, deadline=None)
@given(
    pages=st.integers(12, 60),
    size=st.sampled_from([4, 8, 16]),
    most=st.integers(1, 9),
    step=st.integers(1, 70),
    shared=st.integers(0, 20),
    short=st.integers(0, 40),
)
def test_any_room_gives_the_same_answers(tiny_runner, pages, size, most, step, shared, short) -> None:
    asked = prompts(9, seed=shared, shared=shared)
    room = {"page_tokens": size, "most_rows": most, "step_tokens": step, "short": short}
    scheduler = Scheduler(tiny_runner, max(pages, 60 // size + 1), **room)
    assert answers(scheduler, [row(p) for p in asked]) == alone(tiny_runner, asked)


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def tiny_runner(tiny_folder: Path) -> Runner:
    return loaded(tiny_folder)[1]


def test_rows_give_pages_back_and_are_computed_anew(tiny_runner: Runner) -> None:
    asked = prompts(8)
    scheduler = Scheduler(tiny_runner, 14, page_tokens=4, most_rows=8)
    assert answers(scheduler, [row(p) for p in asked]) == alone(tiny_runner, asked)
    assert scheduler.counters.preempted > 0


def test_a_known_beginning_is_not_computed_again_and_never_anothers(tiny_runner: Runner) -> None:
    scheduler = Scheduler(tiny_runner, 100, page_tokens=4)
    prompt = prompts(1, shared=20)[0]
    first = row(prompt)
    answers(scheduler, [first])
    same, other = row(prompt), row(prompt, salt=b"another adapter")
    answers(scheduler, [same, other])
    assert first.cached == other.cached == 0
    assert same.cached == (len(prompt) - 1) // 4 * 4
    assert same.answer == first.answer == other.answer


@compiled
def test_of_a_page_that_parts_within_the_beginning_is_copied(tiny_runner: Runner) -> None:
    scheduler = Scheduler(tiny_runner, 100, page_tokens=8)
    shared, first, second = prompts(3, shared=19)[0][:19], list(range(50, 60)), list(range(80, 90))
    answers(scheduler, [row(shared + first)])
    rows = [row(shared + second), row(shared[:9] + second), row(shared + second, salt=b"another adapter")]
    assert answers(scheduler, rows) == alone(tiny_runner, [list(r.tokens[: r.prompt]) for r in rows])
    assert [r.cached for r in rows] == [19, 9, 0]
    again = row(shared + first)
    assert answers(scheduler, [again]) == alone(tiny_runner, [shared + first])  # what was copied from is as it was
    assert again.cached == 28  # all but the last token


def test_a_cancelled_row_is_gone(tiny_runner: Runner) -> None:
    scheduler = Scheduler(tiny_runner, 100, page_tokens=4, most_rows=1)
    rows = [row(p, new=30) for p in prompts(3)]
    for r in rows:
        scheduler.add(r)
    scheduler.step()
    scheduler.cancel(rows[0])
    scheduler.cancel(rows[2])
    while scheduler.busy:
        scheduler.step()
    assert len(rows[1].answer) == 30 and len(rows[2].answer) == 0 and scheduler.pool.used == 0


def test_stop_ids_end_a_row_and_are_not_its_answer(tiny_runner: Runner) -> None:
    prompt = prompts(3)[2]
    whole = alone(tiny_runner, [prompt])[0]
    stop = whole[5]
    scheduler = Scheduler(tiny_runner, 100, page_tokens=4)
    asked = Row(list(prompt), NEW, Chooser(GREEDY, prompt), frozenset({stop}))
    scheduler.add(asked)
    events = []
    while scheduler.busy:
        events += scheduler.step()
    assert events[-1].finish == "stop" and events[-1].chosen.token == stop
    assert tuple(asked.answer) == whole[: whole.index(stop)]


# --- adapters ---------------------------------------------------------------------------------------------------------


def adapter_folder(base: Path, out: Path, seed: int, **spec: Any) -> Path:
    model = load_model(base, dtype=torch.float32)
    g = torch.Generator().manual_seed(seed)
    injection = inject(model, AdapterSpec(**{"rank": 4, "alpha": 8.0, "dropout": 0.0, **spec}), seed=seed)
    with torch.no_grad():
        for name, parameter in injection.parameters().items():
            if name.endswith("lora_B"):
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=g))
            elif name.endswith("magnitude_vector"):
                parameter.mul_(0.8 + 0.4 * torch.rand(parameter.shape, generator=g))
    save_adapter(out, injection, base_name="tiny")
    return out


SPECS = (
    {},
    {"rank": 3, "use_dora": True},
    {"rank": 8, "use_rslora": True, "target_modules": ("q_proj", "down_proj")},
    {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"up_proj": 3.0}},
)


def adapter_folders(base: Path, out: Path) -> list[Path]:
    """LoRA, DoRA, rsLoRA on some modules, and ranks of their own."""
    return [adapter_folder(base, out / f"a{n}", n, **spec) for n, spec in enumerate(SPECS)]


@pytest.mark.parametrize(
    "family, recipe",
    [*((f, "none") for f in ("llama", "qwen2", "gemma2", "gpt2")), ("llama", "nf4-64-double"), ("qwen2", "int8")],
)
def test_rows_with_different_adapters_share_a_pass(tmp_path: Path, family: str, recipe: str) -> None:
    base = tiny_base(tmp_path / "base", family)
    specs = [s for s in SPECS if family != "gpt2" or not any("_proj" in str(v) for v in s.values())]
    folders = [adapter_folder(base, tmp_path / f"a{n}", n, **spec) for n, spec in enumerate(specs)]
    asked = prompts(5)
    wanted = {None: alone(loaded(base, recipe)[1], asked)}
    for slot, folder in enumerate(folders):
        model, runner = loaded(base, recipe)
        load_adapter(model, folder)
        wanted[slot] = alone(runner, asked)
        remove(model)
    model, runner = loaded(base, recipe)
    served = Served(model, empty_model(base))
    slots = {served.table.add(served.read(folder, adapter_hash(folder))): n for n, folder in enumerate(folders)}
    scheduler = Scheduler(runner, 300, served=served, page_tokens=4, step_tokens=40)
    for _ in range(2):  # computed, and then recorded and cached
        pairs = [(slot, n) for n in range(len(asked)) for slot in (None, *slots)]
        rows = [row(asked[n], slot, salt=str(slot).encode()) for slot, n in pairs]
        found = answers(scheduler, rows)
        assert found == [wanted[None if slot is None else slots[slot]][n] for slot, n in pairs]
    assert len({answer for part in wanted.values() for answer in part}) > len(asked) * 2  # they do differ


def test_adapters_come_and_go_between_passes(tmp_path: Path, tiny_folder: Path) -> None:
    model, runner = loaded(tiny_folder)
    served = Served(model, empty_model(tiny_folder))
    scheduler = Scheduler(runner, 100, served=served, page_tokens=4)
    asked = prompts(2)
    plain = alone(loaded(tiny_folder)[1], asked)
    for n in range(12):
        folder = adapter_folder(tiny_folder, tmp_path / str(n), n, rank=1 + n % 5, use_dora=n % 3 == 0)
        slot = served.table.add(served.read(folder, adapter_hash(folder)))
        fresh, fresh_runner = loaded(tiny_folder)
        load_adapter(fresh, folder)
        rows = [row(p, s, salt=f"{n}{s}".encode()) for p in asked for s in (slot, None)]
        found = answers(scheduler, rows)
        assert found[::2] == alone(fresh_runner, asked) and found[1::2] == plain
        if n % 4 == 1:
            served.table.remove(slot)


def test_an_adapter_that_does_not_fit_is_refused(tmp_path: Path, tiny_folder: Path) -> None:
    other = tiny_base(tmp_path / "other", hidden_size=64)
    folder = adapter_folder(other, tmp_path / "adapter", 0)
    model, _ = loaded(tiny_folder)
    with pytest.raises(InputError, match="wrong shape"):
        Served(model, empty_model(tiny_folder)).read(folder, adapter_hash(folder))


def test_a_base_that_only_runs_padded_is_refused() -> None:
    from transformers import BloomConfig, BloomForCausalLM

    torch.manual_seed(0)
    runner = Runner(BloomForCausalLM(BloomConfig(vocab_size=400, hidden_size=32, n_layer=2, n_head=4)).eval())
    with pytest.raises(InputError, match="cannot be served"):
        Scheduler(runner, 10)


# --- choosing ---------------------------------------------------------------------------------------------------------


@compiled
def test_a_rows_tokens_are_the_same_bytes_alone_and_in_company(tiny_runner: Runner) -> None:
    asked = prompts(20, seed=5)
    chooser = lambda p: Chooser(GREEDY, p, logprobs=2)  # noqa: E731

    def run(scheduler: Scheduler, given_prompts: list[list[int]]) -> dict[int, list[Any]]:
        rows = [Row(list(p), NEW, chooser(p), frozenset()) for p in given_prompts]
        found: dict[int, list[Any]] = {n: [] for n in range(len(rows))}
        for r in rows:
            scheduler.add(r)
        while scheduler.busy:
            for event in scheduler.step():
                found[rows.index(event.row)].append(event.chosen)
        return found

    together = run(Scheduler(tiny_runner, 400, page_tokens=4), asked)
    for n in (0, 7, 19):
        assert run(Scheduler(tiny_runner, 400, page_tokens=4), [asked[n]])[0] == together[n]  # log-probabilities too


def test_logprobs_are_the_models_own(tiny_folder: Path) -> None:
    _model, runner = loaded(tiny_folder)
    prompt = prompts(3)[1]
    asked = Row(list(prompt), 3, Chooser(Picking(temperature=0.7, seed=3), prompt, logprobs=5), frozenset())
    scheduler = Scheduler(runner, 40, page_tokens=4)
    scheduler.add(asked)
    chosen = []
    while scheduler.busy:
        chosen += [event.chosen for event in scheduler.step()]
    plain = load_model(tiny_folder, dtype=torch.float32)
    logits = plain(torch.tensor([asked.tokens])).logits[0].double().log_softmax(-1)
    for n, c in enumerate(chosen):
        own = logits[len(prompt) - 1 + n]
        assert c.logprob == pytest.approx(float(own[c.token]), abs=1e-5)
        assert [t for t, _ in c.top] == own.topk(5).indices.tolist()


def test_a_seed_gives_the_same_text_whatever_else_runs(tiny_runner: Runner) -> None:
    prompt = prompts(2)[1]
    picking = Picking(temperature=1.0, seed=11)
    sampled = lambda: Row(list(prompt), NEW, Chooser(picking, prompt), frozenset())  # noqa: E731
    one = answers(Scheduler(tiny_runner, 100), [sampled()])
    crowd = answers(Scheduler(tiny_runner, 100), [row(p) for p in prompts(6)] + [sampled()])
    assert crowd[-1] == one[0]


def test_a_form_holds_and_its_neighbours_stay_free(tiny_runner: Runner) -> None:
    asked = prompts(3)
    form = Choices([[5, 6, 7], [5, 9]], [2])
    rows = [row(p) for p in asked]
    rows.append(Row(list(asked[0]), NEW, Chooser(GREEDY, asked[0], form.start()), frozenset({2})))
    found = answers(Scheduler(tiny_runner, 100), rows)
    assert found[-1] in ((5, 6, 7), (5, 9)) and found[:3] == alone(tiny_runner, asked)


def test_a_form_that_cannot_be_followed_ends_its_row_alone(tiny_runner: Runner) -> None:
    class Nothing:
        def allowed(self):
            import numpy as np

            return np.zeros(400, dtype=bool)

        def advance(self, token: int) -> None:
            raise AssertionError

    asked = prompts(2)
    broken = Row(list(asked[0]), NEW, Chooser(GREEDY, asked[0], Nothing()), frozenset())
    scheduler = Scheduler(tiny_runner, 100)
    rows = [row(asked[1]), broken]
    for r in rows:
        scheduler.add(r)
    errors = []
    while scheduler.busy:
        errors += [e for e in scheduler.step() if isinstance(e.chosen, TunegateError)]
    assert [e.row for e in errors] == [broken]
    assert tuple(rows[0].answer) == alone(tiny_runner, asked[1:])[0]


# --- pages ------------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.lists(st.integers(0, 2), max_size=12)), max_size=25))
def test_pages_are_never_lost_or_shared_by_mistake(work: list[tuple[int, list[int]]]) -> None:
    pool = PagePool(9, 2)
    holds: list[tuple[list[int], list[int]]] = []
    contents: dict[int, tuple[int, ...]] = {}
    for what, tokens in work:
        if what == 0 and holds:
            pool.release(holds.pop(0)[0])
            continue
        keys = page_keys(tokens, 2, b"salt")
        pages = pool.find(keys)
        for n, page in enumerate(pages):
            assert contents[page] == tuple(tokens[: 2 * (n + 1)])
        while len(pages) < len(keys) and (page := pool.take()) is not None:
            assert all(page not in held for held, _ in holds) and page not in pages
            contents[page] = tuple(tokens[: 2 * (len(pages) + 1)])
            ahead = keys[len(pages) - 1] if pages else b"salt"
            own = tokens[2 * len(pages) : 2 * len(pages) + 2]
            pages.append(page)
            pool.remember(page, keys[len(pages) - 1], ahead, own)
        near = pool.nearest(keys[0] if pages else b"salt", looked := tokens[2 * bool(pages) :])
        if near is not None:
            page, count = near
            start = 2 * bool(pages)
            assert contents[page][:start] == tuple(tokens[:start]) and count > 0
            assert contents[page][start : start + count] == tuple(looked[:count])
            pool.release([page])
        holds.append((pages, tokens))
        held = {page for pages, _ in holds for page in pages}
        assert pool.used == len(held) and pool.available == 9 - len(held)


def test_salt_and_position_are_part_of_a_page() -> None:
    assert page_keys([1, 2, 3, 4], 2, b"a")[0] != page_keys([1, 2, 3, 4], 2, b"b")[0]
    assert page_keys([1, 2, 1, 2], 2, b"")[0] != page_keys([1, 2, 1, 2], 2, b"")[1]
    whole = page_keys(list(range(10)), 3, b"x")
    assert page_keys(list(range(10)), 3, b"x", after=whole[:1]) == whole and len(whole) == 3
