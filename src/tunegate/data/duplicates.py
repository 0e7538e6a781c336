"""Rows that say the same: exact duplicates, near duplicates, leaks between splits, conflicting answers.

Exact means equal inputs after folding case and white space (``Example.input_hash``). Near means that the sets of
character 5-grams of the user's text have a Jaccard similarity of at least 0.8. Candidates come from MinHash with
banding (Broder 1997; Leskovec, Rajaraman and Ullman, Mining of Massive Datasets, chapter 3): 20 bands of 5 rows
find a pair at 0.8 with probability 1 - (1 - 0.8^5)^20 = 0.9996, and the estimate from all 100 hashes, which must
come within 0.12 of the threshold, keeps 0.999 of those. Every pair reported is verified on the exact sets, so a
hash never accuses; it may, rarely, overlook. In a bucket of many rows each is compared with a few only.

Character 5-grams, not word 3-grams: in a question of eight words one changed word breaks half of the word
3-grams, while a typing error or a plural leaves most 5-grams whole. One changed word of a short question mostly
falls below 0.8, as it should, since it may change the label; a changed digit or a short name may not.

What rows share by construction is left out (``boilerplate``): the system message, and an instruction that opens
or closes many rows. It does not know paraphrases: same meaning in other words is not found.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tunegate.data.boilerplate import strip_shared
from tunegate.data.rows import excerpt
from tunegate.data.types import Example
from tunegate.files import canonical_json

THRESHOLD = 0.8
SHINGLE = 5  # characters
BANDS, BAND_ROWS = 20, 5
REACH = 8  # rows of one bucket each row is compared with: bounds the work on data made from one template
CHUNK = 1 << 18  # characters hashed at a time: the working set stays in the cache
_SLACK = 0.12  # three standard deviations of a 100-hash estimate at 0.8

U32 = npt.NDArray[np.uint32]
U64 = npt.NDArray[np.uint64]
I64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Duplicates:
    """``exact``: groups of row ids with one input and one answer. ``near``: (row id, row id, Jaccard)."""

    exact: list[list[str]]
    near: list[tuple[str, str, float]]


@dataclass(frozen=True)
class Leaks:
    """Candidate rows that are also in the reference: each once, with its first or its most similar match."""

    exact: list[tuple[str, str]]
    near: list[tuple[str, str, float]]


@dataclass(frozen=True)
class Sketches:
    """What near-duplicate search needs of some rows: text that varies (n), signatures (n, 100), bands (n, 20)."""

    texts: list[str]
    signatures: U32
    bands: U64

    def take(self, start: int, stop: int) -> Sketches:
        return Sketches(self.texts[start:stop], self.signatures[start:stop], self.bands[start:stop])


def answer_key(example: Example) -> str:
    """What two rows must share to have the same answer: its text, and its tool calls if there are any."""
    if not example.messages:
        return ""
    calls = example.messages[-1].get("tool_calls")
    return example.answer.strip() + (canonical_json(calls) if calls else "")


def find_duplicates(
    examples: list[Example], threshold: float = THRESHOLD, sketches: Sketches | None = None
) -> Duplicates:
    """Duplicates among ``examples``. Rows with one input but different answers are conflicts, not duplicates."""
    same: dict[tuple[str, str], list[str]] = defaultdict(list)
    firsts: dict[str, int] = {}
    for i, example in enumerate(examples):
        same[example.input_hash, answer_key(example)].append(example.row_id)
        firsts.setdefault(example.input_hash, i)
    exact = [ids for ids in same.values() if len(ids) > 1]
    rows = np.fromiter(firsts.values(), np.int64, len(firsts))  # one row for each input
    sketches = sketches or sketch(examples)
    bands = sketches.bands[rows]
    pairs = ((rows[a], rows[b]) for a, b in (_pairs_within(bands[:, k]) for k in range(BANDS)))
    near = [
        (examples[a].row_id, examples[b].row_id, jaccard)
        for a, b, jaccard in _verified(pairs, sketches, sketches, threshold)
    ]
    return Duplicates(exact, near)


def find_leaks(
    reference: list[Example],
    candidate: list[Example],
    threshold: float = THRESHOLD,
    sketches: tuple[Sketches, Sketches] | None = None,
) -> Leaks:
    """Rows of ``candidate`` (a valid or test split) whose input is, or is nearly, in ``reference`` (train)."""
    seen: dict[str, str] = {}
    for example in reference:
        seen.setdefault(example.input_hash, example.row_id)
    exact = [(e.row_id, seen[e.input_hash]) for e in candidate if e.input_hash in seen]
    if sketches is None:
        both = sketch([*reference, *candidate])
        sketches = both.take(0, len(reference)), both.take(len(reference), len(both.texts))
    ours, theirs = sketches
    rows = np.array([i for i, e in enumerate(candidate) if e.input_hash not in seen], np.int64)
    best: dict[int, tuple[float, int]] = {}
    pairs = _pairs_between(theirs.bands[rows], ours.bands)
    for i, j, jaccard in _verified(((rows[a], b) for a, b in pairs), theirs, ours, threshold):
        best[i] = max(best.get(i, (0.0, 0)), (jaccard, -j))
    near = [(candidate[i].row_id, reference[-j].row_id, jaccard) for i, (jaccard, j) in sorted(best.items())]
    return Leaks(exact, near)


def find_conflicts(examples: list[Example]) -> list[tuple[str, dict[str, list[str]]]]:
    """Inputs with more than one answer: (excerpt of the input, {answer: row ids}), in order of appearance."""
    answers: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    shown: dict[str, str] = {}
    for example in examples:
        if example.messages:
            answers[example.input_hash][answer_key(example)].append(example.row_id)
            shown.setdefault(example.input_hash, excerpt(user_text(example)))
    return [(shown[key], dict(found)) for key, found in answers.items() if len(found) > 1]


def user_text(example: Example) -> str:
    """The user's side of the prompt: user and tool messages, or the plain text."""
    if example.text is not None:
        return example.text
    return "\n".join(str(m.get("content") or "") for m in example.prompt if m["role"] in ("user", "tool"))


def sketch(examples: list[Example]) -> Sketches:
    """Signatures of the rows' user text without what many rows share. Rows left without text get none alike."""
    texts, templates = strip_shared([user_text(e) for e in examples], [_system_text(e) for e in examples])
    signatures = _signatures(texts)
    bands = np.empty((len(texts), BANDS), np.uint64)
    label = np.array(templates, np.uint64)  # rows of different templates ask for different things: never alike
    empty = np.array([not text for text in texts], bool)
    for k in range(BANDS):
        key = _mix(label + np.uint64(k << 40))
        for row in range(BAND_ROWS):
            key = _mix(key ^ signatures[:, k * BAND_ROWS + row].astype(np.uint64))
        bands[:, k] = np.where(empty, np.arange(len(texts), dtype=np.uint64), key)
    return Sketches(texts, signatures, bands)


def jaccard(a: str, b: str) -> float:
    """Similarity of two texts as sets of character 5-grams, white space folded and padded at both ends."""
    return _similarity(_shingles(a), _shingles(b))


def _similarity(ours: set[str], theirs: set[str]) -> float:
    both = len(ours & theirs)
    return both / (len(ours) + len(theirs) - both)


def _system_text(example: Example) -> str:
    return str(example.messages[0]["content"]) if example.messages and example.messages[0]["role"] == "system" else ""


def _padded(text: str) -> str:
    return f" {text} ".ljust(SHINGLE)


def _shingles(text: str) -> set[str]:
    text = _padded(text)
    return {text[i : i + SHINGLE] for i in range(len(text) - SHINGLE + 1)}


def _mix(x: U64) -> U64:
    """The finalizer of SplitMix64 (Steele, Lea and Flood 2014): every input bit reaches every output bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _signatures(texts: list[str]) -> U32:
    """MinHash signatures, (n, 100). A hash function is h -> (h ^ b) * a mod 2^32 with odd a."""
    n_hashes = BANDS * BAND_ROWS
    seeds = _mix(np.arange(1, n_hashes + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15))
    flips = (seeds >> np.uint64(32)).astype(np.uint32)
    factors = seeds.astype(np.uint32) | np.uint32(1)
    out = np.empty((len(texts), n_hashes), np.uint32)
    for start, stop in _chunks(texts):
        hashes, offsets = _shingle_hashes(texts[start:stop])
        scratch = np.empty_like(hashes)
        for k in range(n_hashes):
            np.bitwise_xor(hashes, flips[k], out=scratch)
            np.multiply(scratch, factors[k], out=scratch)
            out[start:stop, k] = np.minimum.reduceat(scratch, offsets)
    return out


def _chunks(texts: list[str]) -> Iterator[tuple[int, int]]:
    start, size = 0, 0
    for i, text in enumerate(texts):
        size += len(text) + 2
        if size >= CHUNK:
            yield start, i + 1
            start, size = i + 1, 0
    if start < len(texts):
        yield start, len(texts)


def _shingle_hashes(texts: list[str]) -> tuple[U32, I64]:
    """32-bit hashes of all 5-grams, text after text, and where each text's begin. No text is without one."""
    padded = [_padded(text) for text in texts]
    lengths = np.array([len(text) for text in padded], np.int64)
    points = np.frombuffer("".join(padded).encode("utf-32-le"), np.uint32).astype(np.uint64)
    value: npt.NDArray[np.uint64] = np.zeros(len(points) - SHINGLE + 1, np.uint64)
    for k in range(SHINGLE):
        value = value * np.uint64(0x100000001B3) + points[k : k + len(value)]
    inside = np.ones(len(value), bool)  # 5-grams that begin in one text and end in the next are dropped
    ends = np.cumsum(lengths)
    for back in range(1, SHINGLE):
        inside[ends[:-1] - back] = False
    counts = lengths - SHINGLE + 1
    return (_mix(value)[inside] >> np.uint64(32)).astype(np.uint32), np.cumsum(counts) - counts


def _pairs_within(keys: U64) -> tuple[I64, I64]:
    """Pairs a < b of rows with equal keys, each row with at most ``REACH`` rows after it."""
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    left, right = [], []
    for step in range(1, min(REACH, len(keys) - 1) + 1):
        same = np.flatnonzero(ordered[step:] == ordered[:-step])
        if not len(same):
            break
        left.append(order[same])
        right.append(order[same + step])
    none = np.empty(0, np.int64)
    return np.concatenate([none, *left]), np.concatenate([none, *right])


def _pairs_between(keys: U64, others: U64) -> Iterator[tuple[I64, I64]]:
    """For each band, pairs (row of ``keys``, row of ``others``) with equal keys, at most ``REACH`` for a row."""
    for k in range(BANDS):
        order = np.argsort(others[:, k], kind="stable")
        ordered = others[order, k]
        first = np.searchsorted(ordered, keys[:, k], "left")
        count = np.minimum(np.searchsorted(ordered, keys[:, k], "right") - first, REACH)
        for step in range(int(count.max(initial=0))):
            rows = np.flatnonzero(count > step)
            yield rows, order[first[rows] + step]


def _verified(
    pairs: Iterable[tuple[I64, I64]], left: Sketches, right: Sketches, threshold: float
) -> list[tuple[int, int, float]]:
    """Distinct candidate pairs whose exact Jaccard reaches ``threshold``, in order."""
    width = np.int64(len(right.texts))
    likely: list[I64] = [np.empty(0, np.int64)]
    for a, b in pairs:
        estimate = np.empty(len(a))
        for start in range(0, len(a), 1 << 16):
            piece = slice(start, start + (1 << 16))
            estimate[piece] = (left.signatures[a[piece]] == right.signatures[b[piece]]).mean(axis=1)
        likely.append((a * width + b)[estimate >= threshold - _SLACK])
    codes = np.unique(np.concatenate(likely))
    found = []
    last, ours = -1, set[str]()
    for a_row, b_row in zip((codes // width).tolist(), (codes % width).tolist(), strict=True):
        if a_row != last:  # codes are in order of a: its set is built once
            last, ours = a_row, _shingles(left.texts[a_row])
        similarity = _similarity(ours, _shingles(right.texts[b_row]))
        if similarity >= threshold:
            found.append((a_row, b_row, similarity))
    return found
