"""Batched generation against transformers' own ``generate``, one prompt at a time, and against full logits."""

from __future__ import annotations

import itertools
import weakref
from typing import Any

import pytest
import torch

from tiny import FAMILIES, tiny_model
from tunegate.adapter.inject import disabled, inject, remove
from tunegate.adapter.spec import AdapterSpec
from tunegate.data.pack import Batch, make_batch
from tunegate.data.types import Rendered
from tunegate.engine import generate as module
from tunegate.engine.generate import Generation, Sampling, generate, score_continuations
from tunegate.engine.runner import Runner
from tunegate.engine.sampling import Chooser, Chosen, Picking, choose
from tunegate.engine.scheduler import PAGE_TOKENS, Row, Scheduler
from tunegate.errors import InputError
from tunegate.kernels import Head

# windows shorter than the rows, and soft caps low enough to bend the scores (Gemma 3 has a window of 8 already)
WINDOWS: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": 8},
    "phi3": {"sliding_window": 8},
    "qwen2": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    "gemma2": {"attn_logit_softcapping": 1.0, "final_logit_softcapping": 2.0},
}
NEW = 14


def build(family: str = "llama", **more: Any) -> Any:
    if family == "bloom":
        from transformers import BloomConfig, BloomForCausalLM

        torch.manual_seed(0)
        config = BloomConfig(vocab_size=400, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.3)
        return BloomForCausalLM(config).eval()
    return tiny_model(family, **WINDOWS.get(family, {}), **more)


def prompts(shared: int, lengths: tuple[int, ...] = (3, 11, 1, 7, 18, 11), seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)

    def draw(n: int) -> list[int]:
        return torch.randint(3, 400, (n,), generator=generator).tolist()

    header = draw(shared)
    return [header + draw(n) for n in lengths]


def reference(family: str, given: list[list[int]], new: int = NEW, **more: Any) -> list[Generation]:
    """Greedy by transformers, one prompt after the other on a model of its own, nothing stops it."""
    model = build(family, **more)
    found = []
    for prompt in given:
        ids = torch.tensor([prompt])
        mask = torch.ones_like(ids)
        output = model.generate(
            ids, attention_mask=mask, do_sample=False, max_new_tokens=new, eos_token_id=None, pad_token_id=0
        )
        found.append(Generation(tuple(output[0, len(prompt) :].tolist()), False))
    return found


def stopped_at(rows: list[Generation], stop: tuple[int, ...]) -> list[Generation]:
    """The same rows ended by ``stop``: greedy tokens do not depend on what comes after them."""
    ends = [next((n for n, token in enumerate(row.ids) if token in stop), None) for row in rows]
    return [Generation(row.ids[:end], end is not None) for row, end in zip(rows, ends, strict=True)]


def stops_for(rows: list[Generation]) -> tuple[int, ...]:
    """Stop ids that rows meet at different times, and one row or more never."""
    for spared, shift in itertools.product(range(len(rows)), range(4)):
        others = [row for n, row in enumerate(rows) if n != spared]
        chosen = {row.ids[(n + shift) % len(row.ids)] for n, row in enumerate(others)}
        stop = tuple(chosen - set(rows[spared].ids))
        if len({len(row.ids) for row in stopped_at(rows, stop)}) > 2:
            return stop
    raise AssertionError("these rows stop together: choose another seed")


@pytest.mark.parametrize("shared", [0, 10])
@pytest.mark.parametrize("family", [*FAMILIES, "bloom"])
def test_greedy_equals_transformers(family: str, shared: int) -> None:
    given = prompts(shared)
    free = reference(family, given)
    stop = stops_for(free)
    wanted = stopped_at(free, stop)
    assert {row.stopped for row in wanted} == {True, False}
    runner = Runner(build(family))
    for rows in (64, 2):
        assert generate(runner, given, Sampling(NEW, stop, rows=rows)) == wanted
    assert generate(runner, given, Sampling(4, (), rows=1)) == [Generation(row.ids[:4], False) for row in free]


def test_an_adapter_takes_part() -> None:
    model, given = build(), prompts(8)
    plain = generate(Runner(model), given, Sampling(NEW, ()))
    runner = Runner(model)
    injection = inject(model, AdapterSpec(4, 8.0), seed=0)
    with torch.no_grad():
        for name, parameter in injection.parameters().items():
            if name.endswith("lora_B"):
                parameter.normal_(generator=torch.Generator().manual_seed(1))
    found = generate(runner, given, Sampling(NEW, ()))
    assert found != plain
    with torch.no_grad():
        for layer in injection.modules.values():
            layer.base.weight.copy_(layer.merged_weight())
    remove(model)
    assert generate(runner, given, Sampling(NEW, ())) == found


class _Passes:
    """What each pass of the scheduler holds: rows that add a token, tokens of each piece of a prompt, pages held."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.steps: list[int] = []
        self.pieces: list[list[int]] = []
        self.pages: list[int] = []
        self.schedulers: list[Any] = []
        plain = Scheduler._run

        def run(scheduler: Any, steps: Any, pieces: Any) -> Any:
            self.steps.append(len(steps))
            self.pieces.append([count for _, count in pieces])
            self.pages.append(scheduler.pool.used)
            self.schedulers.append(weakref.ref(scheduler.store))
            return plain(scheduler, steps, pieces)

        monkeypatch.setattr(Scheduler, "_run", run)


def test_waiting_prompts_take_the_places_of_finished_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    given = prompts(6, tuple(range(3, 19)))
    free = reference("llama", given)
    stop = stops_for(free)
    passes = _Passes(monkeypatch)
    found = generate(Runner(build()), given, Sampling(NEW, stop, rows=4))
    assert found == stopped_at(free, stop)
    filled = [len(pieces) for pieces in passes.pieces]
    assert all(steps + pieces <= 4 for steps, pieces in zip(passes.steps, filled, strict=True))
    assert sum(filled) == 16 and max(filled) == filled[0] == 4 and len([n for n in filled if n]) > 4
    # every decoded row is one that still grows: the first token of a row comes from its prompt
    assert sum(passes.steps) == sum(len(row.ids) - 1 + row.stopped for row in found)
    assert max(passes.steps) == 4


def test_what_rows_keep_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts of very different lengths through a few places; pages are no more than the bound or one row's need."""
    given = prompts(6, (1, 1, 2, 3, 90, 60, 61, 90))
    passes = _Passes(monkeypatch)
    monkeypatch.setattr(module, "PREFILL_TOKENS", 100)
    assert generate(Runner(build()), given, Sampling(NEW, (), rows=3)) == reference("llama", given)
    assert 0 < max(passes.pages) * PAGE_TOKENS <= 100 + 3 * NEW
    passes.pages.clear()
    monkeypatch.setattr(module, "PREFILL_TOKENS", 10)
    assert generate(Runner(build()), given, Sampling(NEW, (), rows=3)) == reference("llama", given)
    assert max(passes.pages) == -(-(90 + NEW - 1) // PAGE_TOKENS)
    assert all(store() is None for store in passes.schedulers)  # nothing of a call is left after it


def test_a_single_short_call_takes_few_pages() -> None:
    row = Row([5] * 10, 7, Chooser(Picking(temperature=0.0)), frozenset())
    assert module._pages([row], Sampling(7, ())) == 1
    assert module._pages([row] * 3, Sampling(7, (), rows=2)) == 2  # 16 tokens each are kept, the last one is not


def test_prompts_beyond_one_prefill_go_in_several_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    given = prompts(9, (5, 2, 9, 4))
    wanted = generate(Runner(build()), given, Sampling(NEW, ()))
    monkeypatch.setattr(module, "PREFILL_TOKENS", 6)
    monkeypatch.setattr(module, "_pages", lambda *_: 20)
    passes = _Passes(monkeypatch)
    assert generate(Runner(build()), given, Sampling(NEW, (), rows=4)) == wanted
    # a pass has room for six tokens; rows that go on take theirs first, as does the last token of a prompt by itself
    assert passes.pieces[:5] == [[5, 1], [4], [4], [3], []] and passes.steps[:5] == [0, 2, 2, 3, 4]
    assert max(s + sum(p) for s, p in zip(passes.steps, passes.pieces, strict=True)) <= 6


def test_the_shared_prefix_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = Runner(build())
    read: list[int] = []
    plain = Runner.run
    monkeypatch.setattr(Runner, "run", lambda self, ids, *rest: (read.append(len(ids)), plain(self, ids, *rest))[1])
    generate(runner, prompts(20, (2, 3, 4)), Sampling(1, ()))
    assert read in ([20, 2 + 3 + 4], [20, 16])  # the kernels' passes are filled up to whole vectors


@pytest.mark.parametrize("dora", [False, True])
def test_recorded_passes_follow_the_adapter_from_call_to_call(dora: bool) -> None:
    """Long answers, so that passes are replayed: what they read of an adapter is there as long as they need it, and
    not a pass longer."""
    model, given = build(), prompts(8)
    runner = Runner(model)
    injection = inject(model, AdapterSpec(4, 8.0, use_dora=dora), seed=0)
    found = []
    for scale in (0.3, 0.6):
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, parameter in injection.parameters().items():
                if name.endswith("lora_B"):
                    parameter.normal_(0.0, scale, generator=generator)
                elif name.endswith("lora_magnitude_vector"):
                    parameter.mul_(1.0 + scale * torch.rand(len(parameter), generator=generator))
        found.append(generate(runner, given, Sampling(40, ())))
        wanted = []
        for prompt in given:
            tokens = list(prompt)
            for _ in range(40):
                tokens.append(int(runner.head.logits(runner.hidden(_batch(tokens))[-1:]).argmax()))
            wanted.append(Generation(tuple(tokens[len(prompt) :]), False))
        assert found[-1] == wanted
    assert found[0] != found[1]
    with disabled(injection):
        off = generate(runner, given, Sampling(40, ()))
    remove(model)
    assert off == generate(runner, given, Sampling(40, ())) == reference("llama", given, 40)


def _batch(tokens: list[int]) -> Batch:
    return make_batch([Rendered("row", tuple(tokens), (False,) * (len(tokens) - 1) + (True,))])


def test_equal_prompts() -> None:
    given = prompts(9, (1,)) * 3
    assert generate(Runner(build()), given, Sampling(5, ())) == reference("llama", given, 5)


def test_one_token_and_one_prompt() -> None:
    runner, given = Runner(build()), prompts(0, (1,))
    assert generate(runner, given, Sampling(1, ())) == reference("llama", given, 1)
    assert generate(runner, [], Sampling(1, ())) == []


@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_progress_counts_every_row_once(family: str) -> None:
    told: list[int] = []
    generate(Runner(build(family)), prompts(5), Sampling(3, (), rows=2), told.append)
    assert sum(told) == 6


@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_bad_requests(family: str) -> None:
    runner = Runner(build(family))
    with pytest.raises(ValueError, match="no tokens"):
        generate(runner, [[5], []], Sampling(3, ()))
    with pytest.raises(ValueError, match="max_new_tokens"):
        generate(runner, [[5]], Sampling(0, ()))
    with pytest.raises(ValueError, match="no tokens"):
        score_continuations(runner, [], [[5]])


def test_generation_leaves_the_modes_as_they_were() -> None:
    model = build()
    runner = Runner(model)
    model.train()
    model.model.layers[0].eval()
    before = [m.training for m in model.modules()]
    generate(runner, [[5, 6]], Sampling(2, ()))
    assert [m.training for m in model.modules()] == before


# --- a table of positions -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [0, 6])
def test_rows_end_where_the_table_of_positions_ends(shared: int) -> None:
    runner = Runner(build("gpt2", n_positions=24))
    given = prompts(shared, (1, 2, 3, 4, 9, 24 - shared))  # the full row waits in its group for a while
    for prompt, row in zip(given, generate(runner, given, Sampling(30, ())), strict=True):
        assert len(prompt) + len(row.ids) == 25  # the last new token needs no position
        assert [row] == reference("gpt2", [prompt], 25 - len(prompt), n_positions=24)
    with pytest.raises(InputError, match="longer than the base can read"):
        generate(runner, [[5] * 25], Sampling(1, ()))


def test_the_padded_path_ends_there_too() -> None:
    from transformers import GPTJConfig, GPTJForCausalLM

    torch.manual_seed(0)
    model = GPTJForCausalLM(GPTJConfig(vocab_size=400, n_embd=32, n_layer=2, n_head=4, rotary_dim=4, n_positions=16))
    runner = Runner(model.eval())
    assert runner.path == "padded"
    assert [len(r.ids) for r in generate(runner, prompts(0, (4, 16)), Sampling(30, ()))] == [13, 1]


# --- sampling -------------------------------------------------------------------------------------------------------


def test_sampled_rows_do_not_depend_on_their_neighbours() -> None:
    runner = Runner(build())
    given = prompts(8)
    sampled = Sampling(NEW, (7, 9), temperature=1.0, top_p=0.9, seed=3)
    whole = generate(runner, given, sampled)
    assert whole == generate(runner, given, sampled)
    for rows in (1, 2, 4):
        again = Sampling(NEW, (7, 9), temperature=1.0, top_p=0.9, seed=3, rows=rows)
        assert generate(runner, given, again) == whole
    others = [*given[:2], *prompts(8, (4, 6, 2, 9), seed=5)]  # rows 0 and 1 among strangers
    assert generate(runner, others, sampled)[:2] == whole[:2]
    assert generate(runner, given, Sampling(NEW, (7, 9), temperature=1.0, top_p=0.9, seed=4)) != whole


def test_the_same_prompt_is_sampled_differently_in_each_place() -> None:
    found = generate(Runner(build()), [[5, 6, 7]] * 4, Sampling(NEW, (), temperature=1.5))
    assert len(set(found)) == 4


def test_a_low_temperature_is_greedy() -> None:
    runner, given = Runner(build()), prompts(5)
    assert generate(runner, given, Sampling(NEW, (), temperature=1e-4)) == generate(runner, given, Sampling(NEW, ()))


def draws(temperature: float, top_p: float, probabilities: list[float], times: int) -> list[int]:
    """One row's sampling, without a model."""
    chooser = Chooser(Picking(temperature, top_p, seed=0))
    head = Head(torch.nn.Linear(4, 4, bias=False))
    head.module.weight.data = torch.eye(4)
    found = [choose(head, torch.tensor([probabilities]).log(), [chooser])[0] for _ in range(times)]
    return [chosen.token for chosen in found if isinstance(chosen, Chosen)]


@pytest.mark.parametrize(
    "top_p, kept",
    # 0.5, 0.3, 0.15, 0.05: the smallest set with the wanted mass; 0.5 exactly is reached by the first alone
    [(0.1, {1}), (0.49, {1}), (0.5, {1}), (0.51, {1, 3}), (0.79, {1, 3}), (0.9, {0, 1, 3}), (1.0, {0, 1, 2, 3})],
)
def test_top_p_keeps_the_smallest_sufficient_set(top_p: float, kept: set[int]) -> None:
    assert set(draws(1.0, top_p, [0.15, 0.5, 0.05, 0.3], 300)) == kept


def test_the_kept_tokens_keep_their_proportions() -> None:
    drawn = draws(1.0, 0.79, [0.15, 0.5, 0.05, 0.3], 4000)
    assert drawn.count(1) / 4000 == pytest.approx(0.5 / 0.8, abs=0.03)  # four standard errors


def test_the_temperature_divides_the_logits() -> None:
    drawn = draws(0.5, 1.0, [0.25, 0.75, 1e-30, 1e-30], 4000)
    assert drawn.count(1) / 4000 == pytest.approx(0.75**2 / (0.75**2 + 0.25**2), abs=0.02)


@pytest.mark.parametrize("sampling", [Sampling(NEW, (7,)), Sampling(NEW, (), temperature=1.0, top_p=0.9)])
def test_the_bases_generation_defaults_do_not_leak_in(sampling: Sampling) -> None:
    """A penalty or top_k in generation_config.json would make the padded path answer unlike the packed one."""
    model, given = build("bloom"), prompts(0, (5, 5))
    runner = Runner(model)
    wanted = generate(runner, given, sampling)
    model.generation_config.repetition_penalty = 5.0
    model.generation_config.top_k = 1
    model.generation_config.no_repeat_ngram_size = 1
    own = model.generation_config
    assert generate(runner, given, sampling) == wanted
    assert model.generation_config is own
    assert any(len(set(row.ids)) < len(row.ids) for row in wanted)  # a penalty would have shown


# --- likelihood of fixed answers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [*FAMILIES, "bloom"])
@pytest.mark.parametrize("tokens", [4096, 20])
def test_scores_equal_full_logits(family: str, tokens: int) -> None:
    model = build(family)
    prompt, tails = prompts(0, (12,))[0], prompts(0, (1, 4, 2, 9), seed=2)
    wanted = []
    with torch.no_grad():
        for tail in tails:
            scores = model(input_ids=torch.tensor([prompt + tail])).logits[0].float().log_softmax(-1)
            wanted.append(sum(float(scores[len(prompt) + n - 1, token]) for n, token in enumerate(tail)))
    assert score_continuations(Runner(model), prompt, tails, tokens=tokens) == pytest.approx(wanted, rel=1e-4)


def test_an_empty_continuation_is_certain() -> None:
    runner = Runner(build())
    found = score_continuations(runner, [5, 6, 7, 8, 9, 10], [[], [11]])
    assert found[0] == 0.0 and found[1] < 0.0
    assert score_continuations(runner, [5], []) == []
