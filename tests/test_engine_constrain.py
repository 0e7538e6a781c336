"""Constrained generation: every answer has its form, masks are the library's own, and rows stay independent."""

from __future__ import annotations

import json
import re
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tiny import tiny_model, tiny_tokenizer
from tunegate.engine.constrain import AnswerForm, Choices, build_constraint, form_problem, spelling
from tunegate.engine.generate import Generation, Sampling, generate
from tunegate.engine.runner import Runner
from tunegate.errors import InputError

STOP = (2, 0)
LABELS = ("red", "green", "blue fox", "blue", "yes")
SCHEMA = {
    "type": "object",
    "properties": {"item": {"enum": ["fox", "dog"]}, "quantity": {"type": "integer", "minimum": 0, "maximum": 99},
                   "ok": {"type": "boolean"}},
    "required": ["item", "quantity", "ok"],
    "additionalProperties": False,
}  # fmt: skip
PATTERN = r"[A-C]{1,3}-\d{2}(x|yz)?"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny_tokenizer()


def model(family: str) -> Any:
    if family != "bloom":
        return tiny_model(family)
    from transformers import BloomConfig, BloomForCausalLM

    torch.manual_seed(0)
    return BloomForCausalLM(
        BloomConfig(vocab_size=400, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.3)
    ).eval()


@pytest.fixture(scope="module", params=["llama", "gpt2", "bloom"])
def runner(request: pytest.FixtureRequest) -> Runner:
    """gpt2 has another head, bloom runs on the padded path."""
    return Runner(model(request.param))


def prompts(shared: int, n: int = 6) -> list[list[int]]:
    draw = torch.Generator().manual_seed(1)
    head = torch.randint(3, 400, (shared,), generator=draw).tolist()
    return [head + torch.randint(3, 400, (2 + i % 3,), generator=draw).tolist() for i in range(n)]


SAMPLINGS = [Sampling(40, STOP, rows=4), Sampling(40, STOP, temperature=1.5, top_p=0.9, seed=3)]


@pytest.mark.parametrize("shared", [0, 9])
@pytest.mark.parametrize("sampling", SAMPLINGS, ids=["greedy", "sampled"])
def test_every_answer_is_one_of_the_choices(runner: Runner, tokenizer: Any, sampling: Sampling, shared: int) -> None:
    constraint = build_constraint(AnswerForm("choices", LABELS), tokenizer, STOP)
    found = generate(runner, prompts(shared), sampling, constraint=constraint)
    assert all(row.stopped for row in found)
    assert {tokenizer.decode(row.ids) for row in found} <= set(LABELS)


@pytest.mark.parametrize("shared", [0, 9])
@pytest.mark.parametrize("sampling", SAMPLINGS, ids=["greedy", "sampled"])
def test_every_answer_matches_the_pattern(runner: Runner, tokenizer: Any, sampling: Sampling, shared: int) -> None:
    pytest.importorskip("llguidance")
    constraint = build_constraint(AnswerForm("regex", f"^{PATTERN}$"), tokenizer, STOP)
    found = generate(runner, prompts(shared), sampling, constraint=constraint)
    assert all(row.stopped for row in found)
    assert all(re.fullmatch(PATTERN, tokenizer.decode(row.ids)) for row in found)


@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("sampling", SAMPLINGS, ids=["greedy", "sampled"])
def test_every_answer_satisfies_the_schema(runner: Runner, tokenizer: Any, sampling: Sampling, compact: bool) -> None:
    pytest.importorskip("llguidance")
    constraint = build_constraint(AnswerForm("json_schema", json.dumps(SCHEMA), compact), tokenizer, STOP)
    found = generate(runner, prompts(6), Sampling(**{**vars(sampling), "max_new_tokens": 80}), constraint=constraint)
    for row in found:
        text = tokenizer.decode(row.ids)
        value = json.loads(text)
        jsonschema.validate(value, SCHEMA)
        assert list(value) == ["item", "quantity", "ok"]  # the schema's order, which is not the alphabet's
        assert row.stopped
        assert text == json.dumps(value, separators=(",", ":") if compact else (", ", ": "))


def test_rows_do_not_depend_on_their_neighbours(tokenizer: Any) -> None:
    runner = Runner(model("llama"))
    constraint = build_constraint(AnswerForm("choices", LABELS), tokenizer, STOP)
    sampling = Sampling(40, STOP, temperature=1.5, seed=3)
    whole = generate(runner, prompts(9), sampling, constraint=constraint)
    one = Sampling(40, STOP, temperature=1.5, seed=3, rows=1)
    assert generate(runner, prompts(9), one, constraint=constraint) == whole
    assert len({row.ids for row in whole}) > 1


def test_a_constraint_that_allows_the_free_answer_changes_nothing(tokenizer: Any) -> None:
    runner = Runner(model("llama"))
    free = generate(runner, prompts(0), Sampling(5, ()))
    trie = Choices([row.ids for row in free], STOP)
    for prompt, row in zip(prompts(0), free, strict=True):
        (held,) = generate(runner, [prompt], Sampling(5, STOP), constraint=Choices([row.ids], STOP))
        assert held == Generation(row.ids, False)  # full before it could stop
    assert all(r.ids in {f.ids for f in free} for r in generate(runner, prompts(0), Sampling(5, STOP), constraint=trie))


def test_an_answer_cut_off_by_the_length_says_so(tokenizer: Any) -> None:
    pytest.importorskip("llguidance")
    constraint = build_constraint(AnswerForm("regex", "a{50}"), tokenizer, STOP)
    (row,) = generate(Runner(model("llama")), prompts(0, 1), Sampling(3, STOP), constraint=constraint)
    assert not row.stopped and len(row.ids) == 3


# --- the masks ------------------------------------------------------------------------------------------------------


@given(st.lists(st.lists(st.integers(3, 12), min_size=1, max_size=4).map(tuple), min_size=1, max_size=6, unique=True))
def test_the_trie_accepts_the_choices_and_nothing_else(choices: list[tuple[int, ...]]) -> None:
    def walk(state: Any, given: tuple[int, ...]) -> set[tuple[int, ...]]:
        allowed = np.flatnonzero(state.allowed()).tolist()
        ended = {given} if 2 in allowed else set()
        assert (0 in allowed) == (2 in allowed)
        for token in set(allowed) - {0, 2}:
            fresh = trie.start()
            for before in given:
                fresh.advance(before)
            fresh.advance(token)
            ended |= walk(fresh, (*given, token))
        return ended

    trie = Choices(choices, STOP)
    assert walk(trie.start(), ()) == set(choices)


@pytest.mark.parametrize(
    "form",
    [AnswerForm("regex", PATTERN), AnswerForm("json_schema", json.dumps(SCHEMA)), AnswerForm("json_schema", "true")],
    ids=["regex", "schema", "any"],
)
def test_masks_are_the_librarys_acceptance(tokenizer: Any, form: AnswerForm) -> None:
    """A token is allowed exactly where the library itself consumes it; stops exactly where it accepts. Where the form
    dictates the text, the library's next token for it is the only one."""
    pytest.importorskip("llguidance")
    constraint: Any = build_constraint(form, tokenizer, STOP)
    random = np.random.default_rng(0)
    for _ in range(2):
        state = constraint.start()
        for _ in range(9):
            mask = state.allowed()
            matcher = state._matcher
            allowed = set(np.flatnonzero(mask).tolist())
            consumed = {t for t in range(3, 400) if matcher.deep_copy().consume_token(t)}
            wanted = consumed | (set(STOP) if matcher.is_accepting() else set())
            forced = matcher.compute_ff_tokens()
            assert allowed == wanted or (allowed == set(forced[:1]) and allowed <= wanted)
            going = [t for t in np.flatnonzero(mask).tolist() if t not in STOP]
            if not going:
                break
            state.advance(int(random.choice(going)))


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "form",
    [
        AnswerForm("regex", "(?=a)b"),
        AnswerForm("regex", "(a"),
        AnswerForm("json_schema", json.dumps({"type": "object", "propertyNames": {"pattern": "(?=a)b"}})),
    ],
)
def test_a_form_that_cannot_be_followed_is_refused(tokenizer: Any, form: AnswerForm) -> None:
    pytest.importorskip("llguidance")
    with pytest.raises(InputError, match="cannot be enforced"):
        build_constraint(form, tokenizer, STOP)


def test_no_choices() -> None:
    for choices, stops in (([], STOP), ([[]], STOP), ([[3]], ())):
        with pytest.raises(InputError, match="no answer to choose from"):
            Choices(choices, stops)


def test_the_missing_library_is_named(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert form_problem(AnswerForm("choices", LABELS)) == ""
    assert "tunegate[constrain]" in form_problem(AnswerForm("regex", "a"))
    with pytest.raises(InputError, match="cannot be enforced here"):
        build_constraint(AnswerForm("regex", "a"), tokenizer, STOP)


@settings(max_examples=20)
@given(
    st.lists(
        st.text("ab c", min_size=1, max_size=5).filter(lambda t: t == t.strip()), min_size=1, max_size=4, unique=True
    )
)
def test_choices_of_text_decode_to_themselves(texts: list[str]) -> None:
    tokenizer = tiny_tokenizer()
    constraint = build_constraint(AnswerForm("choices", tuple(texts)), tokenizer, STOP)
    random = np.random.default_rng(len(texts))
    state, ids = constraint.start(), []
    while True:
        token = int(random.choice(np.flatnonzero(state.allowed())))
        if token in STOP:
            break
        state.advance(token)
        ids.append(token)
    assert tokenizer.decode(ids) in texts


@pytest.mark.parametrize(
    "form",
    [
        AnswerForm("json_schema", '{"type": "integer", "maximum": 1' + "0" * 200 + "}"),
        AnswerForm("json_schema", "false"),
        AnswerForm("json_schema", '{"$ref": "http://127.0.0.1:9/x"}'),
        AnswerForm("json_schema", '{"type": 7, "properties": [1]}'),
        AnswerForm("json_schema", '{"x-guidance": {"whitespace_flexible": "no"}}'),
        AnswerForm("regex", "(" * 5000 + "a" + ")" * 5000),
        AnswerForm("regex", "((("),
    ],
)
def test_a_form_that_is_none_is_wrong_input(tokenizer: Any, form: AnswerForm) -> None:
    pytest.importorskip("llguidance")
    with pytest.raises(InputError, match=r"cannot be enforced|no answer has") as told:
        build_constraint(form, tokenizer, STOP)
    assert len(str(told.value)) < 1000


def test_one_spelling_serves_any_stop_ids(tokenizer: Any) -> None:
    """Ids that are text, ids behind the vocabulary, and the one that stands for the end inside."""
    pytest.importorskip("llguidance")
    spelled = spelling(tokenizer)
    form = AnswerForm("regex", "(red|blue)( fox)?")
    letter = tokenizer("r", add_special_tokens=False)["input_ids"][-1]
    for stops in ((0,), (1,), (2, 0), (letter, 2), (1000,)):
        state = build_constraint(form, tokenizer, stops, spelled).start()
        for token in tokenizer("red", add_special_tokens=False)["input_ids"]:
            allowed = state.allowed()
            assert allowed[token] and not any(allowed[i] for i in stops)
            state.advance(token)
        allowed = state.allowed()  # " fox" may follow, and the answer may end
        assert all(allowed[i] for i in stops) and allowed[tokenizer(" fox", add_special_tokens=False)["input_ids"][0]]
        assert not any(allowed[i] for i in (0, 1, 2) if i not in stops)
