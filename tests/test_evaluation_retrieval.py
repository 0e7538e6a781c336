"""Ranking against values worked out by hand, passages against their document, finders against what they may show."""

from __future__ import annotations

import math
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tiny import tiny_tokenizer
from tunegate.data.types import Example
from tunegate.errors import InputError
from tunegate.evaluation.prompts import Prompt
from tunegate.evaluation.retrieval import (
    BM25,
    Both,
    Embeddings,
    Fused,
    Lookup,
    Passage,
    SimilarShots,
    best,
    build_index,
    cut,
    read_passages,
    words,
)


def row(question: str, answer: str, line: int = 1) -> Example:
    return Example(
        "r", line, messages=({"role": "user", "content": question}, {"role": "assistant", "content": answer})
    )


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("The QUICK fox's 2nd", ["the", "quick", "fox", "s", "2nd"]),
        ("Straße", ["strasse"]),
        ("你好 world", ["你", "好", "world"]),
        ("naïve_x", ["naïve_x"]),
        ("?!", []),
    ],
)
def test_words(text: str, wanted: list[str]) -> None:
    assert words(text) == wanted


def test_bm25_by_hand() -> None:
    """Lengths 2, 3, 1, mean 2. "red" is in 2 of 3: idf = ln(1 + 1.5 / 2.5) = ln 1.6; "blue" in 1: ln(1 + 2.5 / 1.5).

    Text 0: tf 1, K = 1.5 * (0.25 + 0.75 * 1) = 1.5, 2.5 / 2.5 = 1. Text 1: tf 2, K = 1.5 * (0.25 + 0.75 * 1.5) =
    2.0625, 5 / 4.0625. Text 2: tf 1, K = 1.5 * (0.25 + 0.75 * 0.5) = 0.9375, 2.5 / 1.9375.
    """
    index = BM25(["red fox", "red red dog", "blue"])
    assert index.scores("RED") == pytest.approx([math.log(1.6), math.log(1.6) * 5 / 4.0625, 0.0])
    assert index.scores("blue blue") == pytest.approx([0, 0, 2 * math.log(1 + 2.5 / 1.5) * 2.5 / 1.9375])
    assert index.scores("cat").tolist() == [0, 0, 0]


def test_bm25_of_nothing() -> None:
    assert BM25([]).scores("a").tolist() == []
    assert BM25(["", "?"]).scores("a").tolist() == [0, 0]


@given(st.lists(st.text("ab ", max_size=8), min_size=1, max_size=6), st.text("ab ", max_size=8))
def test_bm25_is_never_negative_and_words_that_match_count(texts: list[str], query: str) -> None:
    scores = BM25(texts).scores(query)
    for text, score in zip(texts, scores, strict=True):
        assert (score > 0) == bool(set(words(text)) & set(words(query)))


def test_reciprocal_rank_fusion_by_hand() -> None:
    class Fixed:
        def __init__(self, *scores: float):
            self._scores = np.array(scores)

        def scores(self, query: str) -> np.ndarray:
            return self._scores

    fused = Fused([Fixed(3, 2, 1), Fixed(0, 5, 9)]).scores("")
    assert fused == pytest.approx([1 / 61 + 1 / 63, 1 / 62 + 1 / 62, 1 / 63 + 1 / 61])
    assert best(fused, 2) == [0, 2]


def test_embeddings_need_their_library() -> None:
    try:
        import sentence_transformers  # noqa: F401
    except ImportError:
        with pytest.raises(InputError, match=r"tunegate\[embed\]"):
            build_index(["a"], "some-model")
    else:
        with pytest.raises(InputError, match="cannot load the embedding model"):
            build_index(["a"], "/no/such/model")


def test_embeddings_are_ranked_by_cosine_and_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for the library that counts the letters a, b and c."""

    class Letters:
        def __init__(self, name: str):
            assert name == "letters"

        def encode(self, texts: list[str], normalize_embeddings: bool) -> list[list[float]]:
            counts = np.array([[t.count(c) for c in "abc"] for t in texts], dtype=float)
            return list(counts / np.linalg.norm(counts, axis=1, keepdims=True)) if normalize_embeddings else []

    module = types.ModuleType("sentence_transformers")
    module.SentenceTransformer = Letters  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "sentence_transformers", module)
    texts = ["aab", "cc", "b"]
    found = Embeddings(texts, "letters").scores("a")
    assert found == pytest.approx([2 / math.sqrt(5), 0, 0])
    fused = build_index(texts, "letters").scores("b aa")  # by words: b first; by letters: aab first
    assert fused == pytest.approx([1 / 62 + 1 / 61, 1 / 63 + 1 / 63, 1 / 61 + 1 / 62])


# --- passages -------------------------------------------------------------------------------------------------------


@given(st.text(st.sampled_from("ab ü好\n"), max_size=60), st.integers(1, 9), st.data())
def test_passages_cover_the_text(text: str, tokens: int, data: st.DataObject) -> None:
    tokenizer = tiny_tokenizer()
    overlap = data.draw(st.integers(0, tokens - 1))
    pieces = cut(text, tokenizer, tokens, overlap)
    assert all(piece in text for piece in pieces)
    for character in text:  # every character that is no space is in some piece, in order
        if not character.isspace():
            assert any(character in piece for piece in pieces)
    if overlap == 0:
        assert "".join("".join(pieces).split()) == "".join(text.split())


def test_passages_have_their_length_and_overlap() -> None:
    tokenizer = tiny_tokenizer()
    text = "a b c d e f g h i j"
    pieces = cut(text, tokenizer, 4, 2)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(pieces) == math.ceil((len(ids) - 4) / 2) + 1
    assert all(len(tokenizer(" " + piece, add_special_tokens=False)["input_ids"]) <= 5 for piece in pieces)
    assert pieces[0].split()[-1] in pieces[1]


def test_documents(tmp_path: Path) -> None:
    (tmp_path / "docs" / "sub").mkdir(parents=True)
    (tmp_path / "docs" / "b.md").write_text("the fox is red", encoding="utf-8")
    (tmp_path / "docs" / "sub" / "a.txt").write_bytes(b"\xef\xbb\xbfthe dog is blue")
    (tmp_path / "docs" / "picture.png").write_bytes(b"\x89PNG")
    (tmp_path / "secret.txt").write_text("outside")
    (tmp_path / "docs" / "link.txt").symlink_to(tmp_path / "secret.txt")
    found, others = read_passages(tmp_path / "docs", tiny_tokenizer(), tokens=50, overlap=5, where="d")
    assert found == [Passage("b.md", "the fox is red"), Passage("sub/a.txt", "the dog is blue")]
    assert others == 1


def test_documents_that_cannot_be_read_are_all_named(tmp_path: Path) -> None:
    for name in ("one.txt", "two.md"):
        (tmp_path / name).write_bytes(b"\xff\xfe\xff")
    with pytest.raises(InputError) as caught:
        read_passages(tmp_path, tiny_tokenizer(), tokens=50, overlap=5, where="d")
    assert [Path(p.where).name for p in caught.value.problems] == ["one.txt", "two.md"]
    for folder, says in ((tmp_path / "none", "no such folder"), (tmp_path / "empty", "cannot be used")):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(InputError, match=says):
            read_passages(folder, tiny_tokenizer(), tokens=50, overlap=5, where="d")


# --- finders --------------------------------------------------------------------------------------------------------

TRAIN = [row("the red fox", "A", 1), row("a blue dog", "B", 2), row("the red dog", "C", 3), row("green", "D", 4)]


def test_similar_shots_stand_nearest_last() -> None:
    shots, text = SimilarShots(TRAIN, 2).find(row("red fox?", "?"))
    assert [e.answer for e in shots] == ["C", "A"] and text == ""


def test_the_row_itself_is_never_shown() -> None:
    shots, _ = SimilarShots(TRAIN, 2).find(row("The  RED fox", "?"))
    assert "A" not in [e.answer for e in shots] and len(shots) == 2


def test_looked_up_passages_are_in_the_prompt() -> None:
    lookup = Lookup([Passage("x", "foxes are red"), Passage("y", "dogs bark"), Passage("z", "cats")], 2)
    prompt = Prompt("p", finder=lookup)
    (head, asked) = prompt.messages(row("what do dogs do", "?"))
    assert head["role"] == "system" and "[1] (y) dogs bark" in head["content"] and "cats" not in head["content"]
    assert asked == {"role": "user", "content": "what do dogs do"}
    assert prompt.messages(row("zzz", "?")) == ({"role": "user", "content": "zzz"},)


def test_both_finders_and_a_template_without_system() -> None:
    prompt = Prompt(
        "p", suffix="Be brief.", in_user=True, finder=Both(SimilarShots(TRAIN, 1), Lookup([Passage("x", "red")], 1))
    )
    said = [m["content"] for m in prompt.messages(row("red fox", "?"))]
    assert said == ["Be brief.\n\nPassages that may help to answer:\n\n[1] (x) red\n\nthe red fox", "A", "red fox"]


def test_hashes_follow_what_can_be_found() -> None:
    made = [
        Prompt("p"),
        Prompt("p", finder=SimilarShots(TRAIN, 2)),
        Prompt("p", finder=SimilarShots(TRAIN, 3)),
        Prompt("p", finder=SimilarShots(TRAIN[:3], 2)),
        Prompt("p", finder=Lookup([Passage("x", "a")], 1)),
        Prompt("p", finder=Lookup([Passage("x", "b")], 1)),
    ]
    assert len({p.hash for p in made}) == len(made)
    assert Prompt("p", finder=SimilarShots(TRAIN, 2)).hash == made[1].hash
