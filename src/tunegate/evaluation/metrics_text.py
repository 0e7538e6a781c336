"""Metrics that read an answer as text, a label, a number or a letter.

Each ``*_metric`` function returns a :class:`Metric`. Texts are compared in Python; ROUGE comes from ``rouge-score``
and BLEU from ``sacrebleu``, both scaled to [0, 1]. chrF keeps sacrebleu's per-order counts so that the corpus
value can be recomputed for any resample; it equals ``sacrebleu.CHRF().corpus_score(...) / 100``.

Nothing here searches an answer for something to reward beyond what each docstring says.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Sequence

import numpy as np

from tunegate.errors import InputError, Problem
from tunegate.evaluation.types import Item, Metric

SENTENCE_END = ".,;:!?…。！？"
BLEU_ORDER = 4
CHRF_ORDER = 6
CHRF_BETA = 2
NUMBER_TOLERANCE = 1e-6  # relative to the reference

# A sign counts only where no letter, digit or closing bracket stands before it: the 4 of "GPT-4" and the 20 of
# "10-20" are positive.
_NUMBER = re.compile(
    r"""(?:(?<![\w)\]])(?P<sign>[-+−]))?
        [$€£¥₹]?(?P<late_sign>(?<=[$€£¥₹])[-−])?
        (?P<digits>(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<![\w.])\.\d+)
        (?P<exponent>[eE][-+]?\d+)?""",
    re.VERBOSE,
)
_CHOICE_FIRST = re.compile(r"[\s*_\"'`]*(?:[(\[]\s*)?([A-Za-z])[\s*_\"'`]*(?:[)\].:,]|\Z)")
_CHOICE_STATED = re.compile(
    r"\b(?i:answer|option|choice)(?:\s+(?i:is|was)|\s*[:=])+[\s*_\"'`]*[(\[]?([A-Z])(?![A-Za-z'’])"
)


def exact_match_metric() -> Metric:
    """1 if the answer equals the reference character by character, white space at both ends aside."""
    return Metric("exact_match", lambda item: float(item.prediction.strip() == item.reference.strip()))


def label_key(text: str) -> str:
    """The form labels are compared in: stripped, case folded, without the punctuation that ends a sentence."""
    folded = text.strip().casefold()
    return folded.rstrip(SENTENCE_END + string.whitespace) or folded


def accuracy_metric(labels: Sequence[str]) -> Metric:
    """1 if the answer is the reference's label. An answer outside ``labels`` is wrong and counted as unreadable.

    Raises :class:`InputError` for fewer than two labels, an empty one, or two that compare as equal.
    """
    known: dict[str, str] = {}
    problems = []
    for label in labels:
        key = label_key(label)
        if not key:
            problems.append(Problem("a label is empty", where="labels"))
        elif key in known:
            problems.append(
                Problem(
                    f"labels {known[key]!r} and {label!r} cannot be told apart",
                    where="labels",
                    expected="labels that differ by more than case, outer white space and final punctuation",
                )
            )
        known.setdefault(key, label)
    if not problems and len(known) < 2:
        problems.append(Problem("accuracy needs at least two labels", where="labels", got=repr(list(labels))))
    if problems:
        raise InputError(problems)

    def check(reference: str) -> str | None:
        if label_key(reference) in known:
            return None
        return f"the reference {shorten(reference)} is not one of the {len(known)} labels"

    return Metric(
        "accuracy",
        lambda item: float(label_key(item.prediction) == label_key(item.reference)),
        check_reference=check,
        readable=lambda prediction: label_key(prediction) in known,
    )


def _squad_tokens(text: str) -> list[str]:
    kept = "".join(char for char in text.lower() if char not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", kept).split()


def _token_f1(prediction: str, reference: str) -> float:
    got, wanted = _squad_tokens(prediction), _squad_tokens(reference)
    if not got or not wanted:
        return float(got == wanted)
    common = sum((Counter(got) & Counter(wanted)).values())
    return 2 * common / (len(got) + len(wanted))


def token_f1_metric() -> Metric:
    """Token F1 after SQuAD's normalisation: lower case, no ASCII punctuation, no articles (Rajpurkar et al. 2016).

    Tokens are split at white space, so a text without spaces is one token. Two empty texts score 1.
    """
    return Metric("token_f1", lambda item: _token_f1(item.prediction, item.reference))


def rouge_metric(name: str) -> Metric:
    """ROUGE F-measure of ``rouge-score`` without stemming: ``rouge1``, ``rouge2`` or ``rougeL`` (Lin 2004).

    Its tokenizer knows a-z and 0-9 only; texts in other scripts score 0, chrF reads them.
    """
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer([name], use_stemmer=False)
    return Metric(name, lambda item: float(scorer.score(item.reference, item.prediction)[name].fmeasure))


def bleu_metric() -> Metric:
    """BLEU as sacrebleu computes it (13a tokens, exponential smoothing), in [0, 1] (Post 2018).

    An item's score is sentence BLEU with effective order; the reported value is corpus BLEU.
    """
    from sacrebleu.metrics.bleu import BLEU

    sentence = BLEU(effective_order=True)

    def counts(item: Item) -> list[float]:
        score = sentence.sentence_score(item.prediction, [item.reference])
        return [float(score.sys_len), float(score.ref_len), *map(float, score.counts + score.totals)]

    def aggregate(total: np.ndarray) -> float:
        system, reference, *rest = (round(float(count)) for count in total)
        score = BLEU.compute_bleu(rest[:BLEU_ORDER], rest[BLEU_ORDER:], system, reference, smooth_method="exp")
        return _unit(score.score / 100)

    def per_item(item: Item) -> float:
        return _unit(sentence.sentence_score(item.prediction, [item.reference]).score / 100)

    return Metric("bleu", per_item, counts=counts, aggregate=aggregate)


def _chrf_counts(prediction: str, reference: str) -> list[float]:
    from sacrebleu.metrics.helpers import extract_all_char_ngrams

    counts: list[float] = []
    got = extract_all_char_ngrams(prediction, CHRF_ORDER)
    wanted = extract_all_char_ngrams(reference, CHRF_ORDER)
    for mine, theirs in zip(got, wanted, strict=True):
        # sacrebleu leaves an order out when the reference is too short to have n-grams of that order
        counts += [mine.total() if theirs else 0, theirs.total(), (mine & theirs).total()]
    return counts


def _chrf(counts: np.ndarray) -> float:
    """Precision and recall averaged over the orders both sides have, then F with beta 2 (Popović 2015)."""
    got, wanted, common = np.asarray(counts, dtype=np.float64).reshape(CHRF_ORDER, 3).T
    usable = (got > 0) & (wanted > 0)
    if not usable.any() or not common.any():
        return 0.0
    precision = float((common[usable] / got[usable]).mean())
    recall = float((common[usable] / wanted[usable]).mean())
    return _unit((1 + CHRF_BETA**2) * precision * recall / (CHRF_BETA**2 * precision + recall))


def chrf_metric() -> Metric:
    """chrF2 of sacrebleu (character order 6, no words), in [0, 1]. Reported value: corpus chrF."""

    def counts(item: Item) -> list[float]:
        return _chrf_counts(item.prediction, item.reference)

    return Metric("chrf", lambda item: _chrf(np.array(counts(item))), counts=counts, aggregate=_chrf)


def last_number(text: str) -> float | None:
    """The last number of ``text``; thousands commas and a currency sign are dropped, ``%`` is ignored.

    The decimal mark is a point. None if there is no number or it is too large for a float.
    """
    numbers = list(_NUMBER.finditer(text))
    if not numbers:
        return None
    found = numbers[-1]
    value = float(found["digits"].replace(",", "") + (found["exponent"] or ""))
    if not np.isfinite(value):
        return None
    negative = (found["sign"] or found["late_sign"] or "+") != "+"
    return -value if negative else value


def number_metric() -> Metric:
    """1 if the last number of the answer equals the reference's within one part in a million."""

    def per_item(item: Item) -> float:
        got, wanted = last_number(item.prediction), last_number(item.reference)
        if got is None or wanted is None:
            return 0.0
        return float(abs(got - wanted) <= NUMBER_TOLERANCE * abs(wanted))

    def check(reference: str) -> str | None:
        return None if last_number(reference) is not None else f"no number in {shorten(reference)}"

    return Metric("number", per_item, check_reference=check, readable=lambda text: last_number(text) is not None)


def choice_letter(text: str) -> str | None:
    """The letter an answer to a multiple-choice question settles on, in upper case.

    Read are an answer that is a letter or starts with one (``B``, ``(b)``, ``B. Paris``), else the last phrase of
    the kind ``answer is B`` with a capital letter. A bare "A cat" is not read as A.
    """
    first = _CHOICE_FIRST.match(text)
    if first:
        return first[1].upper()
    stated = _CHOICE_STATED.findall(text)
    return stated[-1] if stated else None


def choice_metric() -> Metric:
    """1 if the answer settles on the reference's letter (see :func:`choice_letter`)."""

    def per_item(item: Item) -> float:
        got = choice_letter(item.prediction)
        return float(got is not None and got == choice_letter(item.reference))

    def check(reference: str) -> str | None:
        return None if choice_letter(reference) else f"no choice letter in {shorten(reference)}"

    return Metric("choice", per_item, check_reference=check, readable=lambda text: choice_letter(text) is not None)


def regex_metric(pattern: str) -> Metric:
    """1 if ``pattern`` matches the whole answer, outer white space aside. The reference is not looked at.

    The whole is asked for because the metric states a format; ``.*`` at both ends makes it a search.
    """
    try:
        compiled = re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise InputError("the regular expression is not valid", where="pattern", got=f"{pattern!r}: {error}") from error
    return Metric("regex", lambda item: float(compiled.fullmatch(item.prediction.strip()) is not None))


def _folded(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", text).casefold().split())


def contains_metric() -> Metric:
    """1 if the reference stands somewhere in the answer; case and the amount of white space do not matter."""
    return Metric(
        "contains",
        lambda item: float(_folded(item.reference) in _folded(item.prediction)),
        check_reference=lambda reference: None if reference.strip() else "the reference is empty",
    )


def _unit(value: float) -> float:
    """Into [0, 1]: a perfect BLEU comes out as 1.0000000000000004."""
    return min(max(float(value), 0.0), 1.0)


def shorten(text: str, width: int = 60) -> str:
    """``text`` quoted and cut to ``width`` characters, for messages."""
    return repr(text if len(text) <= width else text[:width] + "...")
