"""Ids into text: pieces together are the whole decode, stops cut where they must, tokens are the bytes of the text."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from chat import tokenizer_of
from tiny import tiny_tokenizer
from tunegate.data.render import Renderer
from tunegate.serve.text import BROKEN, Detokenizer, StopScanner, Words, held_back

FAMILIES = ("smollm2", "qwen3", "llama3", "gemma", "llama2")
RENDERERS = {family: Renderer(tokenizer_of(family)) for family in FAMILIES}
WORDS = {family: Words(renderer) for family, renderer in RENDERERS.items()}
TEXT = "Zwölf 你好 🙂🙂 e\u0301 the fox\n\n  two <b>&amp;</b> \u202e"


def pieces(family: str, ids: list[int]) -> list[str]:
    detokenizer = Detokenizer(WORDS[family])
    return [*map(detokenizer.push, ids), detokenizer.finish()]


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=150)
@given(data=st.data())
def test_pieces_are_the_whole_decode(family: str, data: st.DataObject) -> None:
    """For any ids: half characters, wrong bytes, special tokens in the middle, ids that are no tokens."""
    size = len(tokenizer_of(family))
    odd = sorted({*WORDS[family].special, *list(WORDS[family].byte_ids)[-80:], size + 5})
    ids = data.draw(st.lists(st.one_of(st.integers(0, size - 1), st.sampled_from(odd)), max_size=40))
    assert "".join(pieces(family, ids)) == RENDERERS[family].decode(ids)


@pytest.mark.parametrize("family", FAMILIES)
def test_no_broken_character_is_ever_given_out(family: str) -> None:
    ids = tokenizer_of(family)(TEXT, add_special_tokens=False)["input_ids"]
    whole = RENDERERS[family].decode(ids)
    found = pieces(family, ids)
    assert "".join(found) == whole and (BROKEN not in whole or family == "llama2")
    assert family == "llama2" or not any(BROKEN in piece for piece in found)
    assert len([piece for piece in found if piece]) > 8  # it does stream


def test_a_wrong_byte_changes_its_group_and_so_the_group_waits() -> None:
    """Byte tokens of "é" and then a byte that fits nothing: the decoder writes three replacement characters."""
    ids = {byte: i for i, byte in WORDS["gemma"].byte_ids.items()}
    group = [ids[0xC3], ids[0xA9], ids[0xFF]]
    assert RENDERERS["gemma"].decode(group) == BROKEN * 3
    assert pieces("gemma", group) == ["", "", "", BROKEN * 3]


def test_special_tokens_are_written_where_they_are_asked_for() -> None:
    words = WORDS["qwen3"]
    ids = tokenizer_of("qwen3")("a<|im_start|>b", add_special_tokens=False)["input_ids"]
    shown = Detokenizer(words, {i: text for i, text in words.special.items() if text == "<|im_start|>"})
    assert "".join([*map(shown.push, ids), shown.finish()]) == "a<|im_start|>b"
    assert "".join(pieces("qwen3", ids)) == "ab"


@given(st.text(max_size=60))
def test_the_bytes_of_tokens_are_the_bytes_of_their_text(text: str) -> None:
    tokenizer = tiny_tokenizer()
    words = WORDS["smollm2"]
    ids = tokenizer_of("smollm2")(text, add_special_tokens=False)["input_ids"]
    assert b"".join(words.write(i)[1] for i in ids) == text.encode()
    assert words.write(tokenizer.eos_token_id) == ("<|im_end|>", b"<|im_end|>")


def test_tokens_of_sentencepiece_keep_their_space() -> None:
    for family in ("gemma", "llama2"):
        ids = tokenizer_of(family)("quick brown fox", add_special_tokens=False)["input_ids"]
        text = b"".join(WORDS[family].write(i)[1] for i in ids).decode()
        assert text.strip() == "quick brown fox" and text.endswith(" fox")
    byte = {b: i for i, b in WORDS["gemma"].byte_ids.items()}[0xE4]
    assert WORDS["gemma"].write(byte) == (BROKEN, b"\xe4")


# --- stop strings -------------------------------------------------------------------------------------------------


def cut(text: str, stops: list[str]) -> tuple[str, bool]:
    """Character by character: the first stop string that is complete."""
    for end in range(1, len(text) + 1):
        found = [len(stop) for stop in stops if text[:end].endswith(stop)]
        if found:
            return text[: end - max(found)], True
    return text, False


@settings(max_examples=400)
@given(
    st.lists(st.text("ab\n", max_size=6), max_size=10), st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3)
)
@example(["abc", "d"], ["bc", "abcd"])
@example(["xa", "b", "a"], ["aba", "ba"])
def test_stops_cut_where_a_reader_would(parts: list[str], stops: list[str]) -> None:
    scanner = StopScanner(stops)
    said: list[str] = []
    for part in parts:
        said.append(scanner.push(part))
        read, given_out = "".join(parts[: len(said)]), "".join(said)
        whole, hit = cut(read, stops)
        assert scanner.hit == hit and whole.startswith(given_out)
        kept = whole[len(given_out) :]
        assert hit is False or not kept
        assert not kept or any(stop.startswith(kept) for stop in stops)  # nothing waits without a reason
    said.append(scanner.finish())
    assert ("".join(said), scanner.hit) == cut("".join(parts), stops)


def test_held_back_is_the_longest_beginning() -> None:
    assert held_back("xab", ["abc"]) == 2
    assert held_back("xaa", ["aab", "ab"]) == 2
    assert held_back("abc", ["abc"]) == 0  # whole ones are no beginnings
