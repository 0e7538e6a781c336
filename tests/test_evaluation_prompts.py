"""Prompt baselines: what the model is asked with, and which examples it is shown."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tiny import tiny_tokenizer
from tunegate.config import PromptSection
from tunegate.data.render import Renderer
from tunegate.data.types import Example
from tunegate.errors import InputError
from tunegate.evaluation.prompts import AS_IS, MOST_LABELS, Prompt, candidates, pick_shots

NO_SYSTEM = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def system(text: str) -> dict[str, str]:
    return {"role": "system", "content": text}


def example(question: str, answer: str, said: str | None = None, line: int = 1) -> Example:
    head = (system(said),) if said is not None else ()
    return Example("rows.jsonl", line, messages=(*head, user(question), assistant(answer)))


SHOT = example("two?", "2", "Be exact.")


@pytest.mark.parametrize(
    ("prompt", "said", "expected"),
    [
        (Prompt("p"), None, [user("one?")]),
        (Prompt("p"), "Be brief.", [system("Be brief."), user("one?")]),
        (Prompt("p", system="Count."), None, [system("Count."), user("one?")]),
        (Prompt("p", system="Count."), "Be brief.", [system("Count."), user("one?")]),
        (Prompt("p", suffix="1 or 2"), None, [system("1 or 2"), user("one?")]),
        (Prompt("p", suffix="1 or 2"), "Be brief.", [system("Be brief.\n\n1 or 2"), user("one?")]),
        (Prompt("p", "Count.", "1 or 2"), "Be brief.", [system("Count.\n\n1 or 2"), user("one?")]),
        (
            Prompt("p", suffix="1 or 2", shots=(SHOT,)),
            "Be brief.",
            [system("Be brief.\n\n1 or 2"), user("two?"), assistant("2"), user("one?")],
        ),
        (Prompt("p", suffix="1 or 2", in_user=True), None, [user("1 or 2\n\none?")]),
        (
            Prompt("p", suffix="1 or 2", shots=(SHOT,), in_user=True),
            None,
            [user("1 or 2\n\ntwo?"), assistant("2"), user("one?")],
        ),
        (Prompt("p", in_user=True), None, [user("one?")]),
    ],
)
def test_the_messages_of_a_prompt(prompt: Prompt, said: str | None, expected: list[dict[str, str]]) -> None:
    asked = example("one?", "1", said)
    before = [dict(m) for m in asked.messages]
    assert list(prompt.messages(asked)) == expected
    assert [dict(m) for m in asked.messages] == before


def test_the_answer_is_never_in_the_prompt() -> None:
    asked = Example("r", 1, messages=(user("a"), assistant("b"), user("c"), assistant("the secret")))
    assert list(Prompt(AS_IS).messages(asked)) == [user("a"), assistant("b"), user("c")]


def test_the_hash_follows_what_is_asked_and_not_the_name() -> None:
    prompts = [
        Prompt("a"), Prompt("a", system="s"), Prompt("a", suffix="s"), Prompt("a", shots=(SHOT,)),
        Prompt("a", suffix="s", in_user=True),
    ]  # fmt: skip
    assert len({p.hash for p in prompts}) == len(prompts)
    assert Prompt("a", suffix="s").hash == Prompt("b", suffix="s").hash


# --- shots -------------------------------------------------------------------------------------------------------


def rows(n: int, answers: str = "abc") -> list[Example]:
    return [example(f"question {i:03d}", answers[i % len(answers)], line=i + 1) for i in range(n)]


@given(st.permutations(list(range(12))), st.integers(0, 14))
def test_shots_do_not_depend_on_the_order_of_the_rows(order: list[int], n: int) -> None:
    train = rows(12)
    picked = pick_shots([train[i] for i in order], n)
    assert [e.row_id for e in picked] == [e.row_id for e in pick_shots(train, n)]
    assert len(picked) == min(n, 12) == len({e.row_id for e in picked})


def test_shots_take_turns_over_the_answers() -> None:
    train = [*rows(30, "a"), *(example(f"question {i}xx", "bc"[i % 2], line=100 + i) for i in range(20))]
    counts = Counter(e.answer for e in pick_shots(train, 9))
    assert counts == {"a": 3, "b": 3, "c": 3}
    assert [e.answer for e in pick_shots(train, 1)] == ["a"]  # the most frequent one


def test_shots_are_short_chats() -> None:
    train = [*rows(10), example("long " * 50, "a", line=90), Example("r", 91, text="plain")]
    train.append(Example("r", 92, messages=(user("a"), assistant("b")) * 3))
    picked = pick_shots(train, 50)
    assert picked
    assert not {"rows.jsonl:90", "r:91", "r:92"} & {e.row_id for e in picked}
    assert pick_shots([], 3) == ()


def test_shots_are_training_rows_only() -> None:
    """``candidates`` is given the training split and nothing else, so no other row can appear."""
    train = rows(20)
    shown = {e.row_id for p in candidates(train, list("abc"), None) for e in p.shots}
    assert shown
    assert shown <= {e.row_id for e in train}


# --- candidates --------------------------------------------------------------------------------------------------


def test_the_built_in_candidates() -> None:
    found = candidates(rows(20), ["a", "b"], None)
    assert [p.name for p in found] == [AS_IS, "labels", "few_shot_8", "labels_few_shot_8"]
    assert found[1].suffix == "Answer with exactly one of: a, b"
    assert [p.name for p in candidates(rows(20), None, None)] == [AS_IS, "few_shot_8"]
    many = [str(i) for i in range(MOST_LABELS + 1)]
    assert [p.name for p in candidates(rows(20), many, None)] == [AS_IS, "few_shot_8"]
    assert [p.name for p in candidates([], None, None)] == [AS_IS]


def test_the_users_own_prompts() -> None:
    wanted = [PromptSection(name="brief", system="One word."), PromptSection(name="shown", shots=2)]
    found = candidates(rows(20), ["a", "b"], wanted)
    assert [(p.name, p.system, len(p.shots)) for p in found] == [
        (AS_IS, None, 0),
        ("brief", "One word.", 0),
        ("shown", None, 2),
    ]
    assert candidates(rows(20), ["a", "b"], []) == [Prompt(AS_IS)]


@pytest.mark.parametrize("name", ["../x", "a/b", "", ".hidden", "a b", "x" * 101])
def test_a_prompt_name_is_a_file_name(name: str) -> None:
    with pytest.raises(InputError, match="not a name for a prompt"):
        candidates([], None, [PromptSection(name=name)])


@pytest.mark.parametrize("names", [["a", "a"], ["A", "a"], [AS_IS]])
def test_prompt_names_differ(names: list[str]) -> None:
    with pytest.raises(InputError, match="two prompts have one name"):
        candidates([], None, [PromptSection(name=name) for name in names])


def test_a_template_without_a_system_role_can_render_every_candidate(tmp_path: Path) -> None:
    renderer = Renderer(tiny_tokenizer(NO_SYSTEM))
    asked = rows(1)[0]
    with pytest.raises(InputError):
        renderer.prompt_ids(candidates(rows(20), ["a", "b"], None)[1].messages(asked))
    for prompt in candidates(rows(20), ["a", "b"], None, takes_system=False):
        text = renderer.decode(renderer.prompt_ids(prompt.messages(asked)))
        assert text.count("exactly one of: a, b") == ("labels" in prompt.name)
