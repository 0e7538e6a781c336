"""What a prompt can look up: similar training examples, and passages of a folder of documents.

Texts are cut into words and ranked by BM25 (Robertson and Zaragoza 2009, with the idf of Lucene, which is never
negative). Where an embedding model is named, its cosine ranking is merged with BM25's by reciprocal rank fusion
(Cormack et al. 2009). Documents are cut into passages of so many tokens that overlap. Only the training split and
the documents are indexed, never an evaluation item.

It keeps everything in memory, reads plain text only (.txt, .md, .rst), and does not rerank with a model.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import regex

from tunegate.data.types import Example
from tunegate.errors import InputError, Problem
from tunegate.files import hash_json

K1, B = 1.5, 0.75  # BM25: how fast repeated words stop counting, how much long texts are marked down
FUSION = 60  # reciprocal rank fusion: 1 / (FUSION + rank), the paper's constant
SUFFIXES = (".txt", ".md", ".rst")
MOST_BYTES = 256 * 2**20  # of all documents together
PASSAGES = "Passages that may help to answer:"

# Scripts written without spaces count every character as a word.
_WORD = regex.compile(
    r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}]|[\w--[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}]]+", regex.VERSION1
)


def words(text: str) -> list[str]:
    """The words of ``text``, case folded."""
    return _WORD.findall(text.casefold())


class Index(Protocol):
    """Texts that can be ranked by how well they match a query."""

    def scores(self, query: str) -> np.ndarray:
        """(n,) float64, one for each text, higher is better; 0 where nothing matches."""


class BM25:
    """``sum over query words of idf * tf * (K1 + 1) / (tf + K1 * (1 - B + B * length / mean length))``, with
    ``idf = ln(1 + (N - df + 0.5) / (df + 0.5))``. A word counts as often as it stands in the query."""

    def __init__(self, texts: Sequence[str]):
        cut = [words(text) for text in texts]
        self.lengths = np.array([len(one) for one in cut], dtype=np.float64)
        self.mean = float(self.lengths.mean()) if self.lengths.any() else 1.0
        found: dict[str, list[tuple[int, int]]] = defaultdict(list)
        for number, one in enumerate(cut):
            for word, times in Counter(one).items():
                found[word].append((number, times))
        self.postings = {word: (np.array([n for n, _ in at]), np.array([t for _, t in at], dtype=np.float64))
                         for word, at in found.items()}  # fmt: skip

    def scores(self, query: str) -> np.ndarray:
        total = np.zeros(len(self.lengths))
        for word, times in Counter(words(query)).items():
            if word not in self.postings:
                continue
            at, tf = self.postings[word]
            idf = math.log(1 + (len(self.lengths) - len(at) + 0.5) / (len(at) + 0.5))
            long = 1 - B + B * self.lengths[at] / self.mean
            total[at] += times * idf * tf * (K1 + 1) / (tf + K1 * long)
        return total


class Embeddings:
    """Cosine similarity under a sentence-transformers model. :class:`InputError` where the library is missing."""

    def __init__(self, texts: Sequence[str], model: str):
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError:
            raise InputError(
                "embeddings need a library that is not installed", where="--embed", got="no sentence-transformers",
                fix="pip install 'tunegate[embed]', or leave --embed out: BM25 needs nothing",
            ) from None  # fmt: skip
        try:
            self.model: Any = SentenceTransformer(model)
        except (OSError, ValueError) as error:
            fix = "a folder or hub id of a sentence-transformers model"
            raise InputError(
                "cannot load the embedding model", where=f"--embed {model}", got=str(error), fix=fix
            ) from None
        self.vectors = np.asarray(self.model.encode(list(texts), normalize_embeddings=True), dtype=np.float64)

    def scores(self, query: str) -> np.ndarray:
        (vector,) = np.asarray(self.model.encode([query], normalize_embeddings=True), dtype=np.float64)
        return np.asarray(self.vectors @ vector)


class Fused:
    """Several rankings of the same texts as one: the sum of ``1 / (60 + rank)``, ranks from 1."""

    def __init__(self, indexes: Sequence[Index]):
        self.indexes = indexes

    def scores(self, query: str) -> np.ndarray:
        total: np.ndarray | None = None
        for index in self.indexes:
            order = np.argsort(-index.scores(query), kind="stable")
            part = np.empty(len(order))
            part[order] = 1.0 / (FUSION + 1 + np.arange(len(order)))
            total = part if total is None else total + part
        assert total is not None
        return total


def build_index(texts: Sequence[str], embed: str | None = None) -> Index:
    """BM25, or BM25 and the embedding model called ``embed`` together."""
    plain = BM25(texts)
    return plain if embed is None else Fused([plain, Embeddings(texts, embed)])


def best(scores: np.ndarray, n: int) -> list[int]:
    """The ``n`` highest scores' places, best first; of equal ones the earlier."""
    return [int(i) for i in np.argsort(-scores, kind="stable")[:n]]


def question(example: Example) -> str:
    """What a lookup asks for: the last user message's text."""
    asked = [m for m in example.prompt if m.get("role") == "user"]
    content = asked[-1].get("content") if asked else None
    return content if isinstance(content, str) else ""


class SimilarShots:
    """The ``n`` training examples whose questions are most like the one asked, the most similar one last, beside it.

    Rows of more than four messages, or longer than three times the median, are no examples to show.
    """

    def __init__(self, train: Sequence[Example], n: int, embed: str | None = None):
        chats = [e for e in train if e.messages and len(e.messages) <= 4 and question(e)]
        sizes = sorted(len(question(e)) + len(e.answer) for e in chats)
        limit = 3 * sizes[len(sizes) // 2] if sizes else 0
        self.pool = [e for e in chats if len(question(e)) + len(e.answer) <= limit]
        self.n, self.embed = min(n, len(self.pool)), embed
        self._index = build_index([question(e) for e in self.pool], embed) if self.pool else None

    @property
    def hash(self) -> str:
        return hash_json(["shots", self.n, self.embed, K1, B, [e.content_hash for e in self.pool]])

    def find(self, example: Example) -> tuple[tuple[Example, ...], str]:
        if self._index is None:
            return (), ""
        ranked = best(self._index.scores(question(example)), self.n + 1)
        found = [self.pool[i] for i in ranked if self.pool[i].input_hash != example.input_hash][: self.n]
        return tuple(reversed(found)), ""


@dataclass(frozen=True)
class Passage:
    """A piece of a document; ``source`` is its path below the folder."""

    source: str
    text: str


class Lookup:
    """The ``n`` passages that match the question best, as text; passages that share no word with it are left out."""

    def __init__(self, passages: Sequence[Passage], n: int, embed: str | None = None):
        self.passages, self.n, self.embed = tuple(passages), n, embed
        self._index = build_index([p.text for p in passages], embed)

    @property
    def hash(self) -> str:
        return hash_json(["passages", self.n, self.embed, K1, B, [[p.source, p.text] for p in self.passages]])

    def find(self, example: Example) -> tuple[tuple[Example, ...], str]:
        scores = self._index.scores(question(example))
        found = [self.passages[i] for i in best(scores, self.n) if scores[i] > 0]
        blocks = [f"[{number}] ({p.source}) {p.text}" for number, p in enumerate(found, 1)]
        return (), "\n\n".join([PASSAGES, *blocks]) if blocks else ""


@dataclass(frozen=True)
class Both:
    """Two finders at once: the shots of both, the texts of both."""

    first: Any
    second: Any

    @property
    def hash(self) -> str:
        return hash_json(["both", self.first.hash, self.second.hash])

    def find(self, example: Example) -> tuple[tuple[Example, ...], str]:
        (a, one), (b, two) = self.first.find(example), self.second.find(example)
        return (*a, *b), "\n\n".join(text for text in (one, two) if text)


def cut(text: str, tokenizer: Any, tokens: int, overlap: int) -> list[str]:
    """``text`` in pieces of at most ``tokens`` tokens, each beginning ``tokens - overlap`` tokens after the one before.

    Pieces are cut from the text itself at token borders, so together they hold all of it.
    """
    if not 0 <= overlap < tokens:
        raise ValueError(f"an overlap of {overlap} in pieces of {tokens}")
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)["offset_mapping"]
    pieces = []
    for start in range(0, len(offsets), tokens - overlap):
        end = min(start + tokens, len(offsets))
        piece = text[0 if start == 0 else offsets[start][0] : len(text) if end == len(offsets) else offsets[end][0]]
        if piece.strip():
            pieces.append(piece.strip())
        if end == len(offsets):
            break
    return pieces


def read_passages(folder: Path, tokenizer: Any, *, tokens: int, overlap: int, where: str) -> tuple[list[Passage], int]:
    """Passages of every text file below ``folder``, in the order of their paths, and how many other files there are.

    :class:`InputError` with every file that cannot be read, for a folder without text, and for one above 256 MiB.
    """
    if not folder.is_dir():
        raise InputError("no such folder of documents", where=where, got=str(folder))
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.resolve().is_relative_to(folder.resolve()))
    texts = [p for p in files if p.suffix.lower() in SUFFIXES]
    size = sum(p.stat().st_size for p in texts)
    if not texts or size > MOST_BYTES:
        got = f"{size:,} bytes" if texts else f"{len(files)} other files"
        expected = f"text files ({', '.join(SUFFIXES)}) of at most {MOST_BYTES:,} bytes together"
        raise InputError("these documents cannot be used", where=where, expected=expected, got=got)
    problems, passages = [], []
    for path in texts:
        try:
            text = path.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            problems.append(Problem("cannot read the document", str(path), "UTF-8 text", reason))
            continue
        name = path.relative_to(folder).as_posix()
        passages += [Passage(name, piece) for piece in cut(text, tokenizer, tokens, overlap)]
    if not passages and not problems:
        problems.append(Problem("the documents are empty", where))
    if problems:
        raise InputError(problems)
    return passages, len(files) - len(texts)
