"""Should this task be fine-tuned at all? A pure function from measurements to a recommendation.

The order of the questions is the advice itself. Safety behaviour belongs in guardrails. What a prompt already does
needs no training. A format is constrained first, knowledge is looked up first. With few examples, or a learning curve
that says so, more data comes first. What is left is a case for fine-tuning. Every reason carries its figures.

An option is enough when its whole interval is above the target, not its point. Nothing is corrected for having
compared several options, and nothing here measures: see ``pipeline.advise``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from tunegate.config import TaskKind, TaskSection
from tunegate.data.refusal import is_refusal
from tunegate.evaluation.answer_form import JSON_METRICS
from tunegate.evaluation.learning_curve import Curve
from tunegate.evaluation.retrieval import words
from tunegate.records import Comparison, Score

FINE_TUNE, PROMPT, CONSTRAIN = "fine-tune", "prompt is enough", "constrain the output"
RETRIEVE, MORE_DATA, DO_NOT = "use retrieval", "more data first", "do not (safety)"
VERDICTS = (FINE_TUNE, PROMPT, CONSTRAIN, RETRIEVE, MORE_DATA, DO_NOT)

FEWEST_ROWS, MOST_ROWS = 500, 50_000  # labelled examples with which fine-tuning usually pays
FEWEST_ITEMS = 30
ASSUMED_TARGET = 0.9
SAFETY_SHARE = 0.2  # of the rows are refusals, or flagged as harm: the task is about safety

Uses = Literal["prompt", "shots", "constraint", "passages", "reference"]


@dataclass(frozen=True)
class Guess:
    """What sort of task this is, and why; ``given`` if the user said so."""

    kind: TaskKind
    reason: str
    given: bool = False


@dataclass(frozen=True)
class Target:
    """The score that is good enough, and where it comes from."""

    value: float
    reason: str


@dataclass(frozen=True)
class Option:
    """One way to answer without training, measured.

    Tokens are means per request; ``seconds`` per request, on this machine and in batches, None for a service.
    ``gain`` is over the task's own prompt, item by item; None for that prompt itself. ``uses`` says what it is made of.
    ``to_decide``: items like these that would show on which side of the target the score lies; None if unknown.
    ``counted``: False for a service that does not count its tokens.
    """

    name: str
    uses: frozenset[Uses]
    score: Score
    prompt_tokens: float
    answer_tokens: float
    stop_rate: float
    seconds: float | None
    gain: Comparison | None = None
    to_decide: int | None = None
    counted: bool = True

    @property
    def own(self) -> bool:
        return "reference" not in self.uses


@dataclass(frozen=True)
class Trained:
    """Quick training on shares of the rows: the curve, and the adapter of all rows against the best option.

    ``steps`` were trained for each size; a run takes ``run_steps``.
    """

    curve: Curve
    score: Score
    over_best: Comparison
    steps: int
    run_steps: int


@dataclass(frozen=True)
class Evidence:
    """``missing``: what could not be measured, by use ("constraint", "passages"), with the reason. ``flagged``:
    training and validation rows that would teach compliance with harm, by ``data.safety_scan``."""

    kind: Guess
    target: Target
    rows: int
    options: tuple[Option, ...]
    missing: dict[str, str]
    trained: Trained | None = None
    flagged: int = 0


@dataclass(frozen=True)
class Advice:
    """``verdict`` is one of :data:`VERDICTS`; ``option`` names the measured option that it rests on."""

    verdict: str
    option: str | None
    reasons: tuple[str, ...]
    warnings: tuple[str, ...]
    questions: tuple[str, ...]


# --- the recommendation --------------------------------------------------------------------------------------------


def recommend(evidence: Evidence) -> Advice:
    """The recommendation for ``evidence``, which has at least one option of the base itself."""
    if evidence.kind.kind == "safety":
        reason = (
            f"the task is taken for a safety task ({evidence.kind.reason}): guardrails and system prompts can be "
            "changed, tested and rolled back; weights trained to refuse or to comply lose refusals elsewhere"
        )
        return _advice(evidence, DO_NOT, None, [reason])
    enough = _enough(evidence)
    if enough is not None:
        return enough
    best = best_option(evidence.options)
    reasons = [f"no option without training is shown to reach {_target(evidence)}; the best is {_shown(best)}"]
    first = _format_first(evidence, reasons) or _knowledge_first(evidence, reasons)
    if first is not None:
        return first
    if best.score.value >= evidence.target.value:
        needed = f"; about {best.to_decide:,} evaluation items would decide" if best.to_decide else ""
        reasons.append(f"its point is above the target but not its whole interval{needed}")
    said = None if evidence.trained is None else _by_training(evidence, evidence.trained, best, reasons)
    if said is not None:
        return said
    if best.score.value >= evidence.target.value:
        return _advice(evidence, MORE_DATA, best.name, reasons)
    if evidence.rows < FEWEST_ROWS:
        reasons.append(f"{evidence.rows:,} rows to train on are fewer than {FEWEST_ROWS}")
        return _advice(evidence, MORE_DATA, best.name, reasons)
    reasons.append(f"{evidence.rows:,} rows to train on, and the best prompt stops {_gap(evidence, best)} short")
    return _advice(evidence, FINE_TUNE, best.name, reasons)


def best_option(options: Sequence[Option]) -> Option:
    """The base's option with the highest score; of equal ones the one with fewest tokens, then the first."""
    own = [option for option in options if option.own]
    return min(own, key=lambda o: (-o.score.value, o.prompt_tokens + o.answer_tokens))


def _enough(evidence: Evidence) -> Advice | None:
    """The plainest kind of option that reaches the target, if one does."""
    reach = [o for o in evidence.options if o.own and o.score.low >= evidence.target.value]
    for verdict, extra in ((PROMPT, set()), (CONSTRAIN, {"constraint"}), (RETRIEVE, {"constraint", "passages"})):
        plain = [o for o in reach if o.uses <= {"prompt", "shots"} | extra]
        if plain:
            chosen = min(plain, key=lambda o: (o.prompt_tokens + o.answer_tokens, -o.score.value))
            what = "the task's own prompt" if not chosen.uses else chosen.name
            reason = f"{what} already reaches {_target(evidence)} without training: {_shown(chosen)}"
            return _advice(evidence, verdict, chosen.name, [reason])
    return None


def _format_first(evidence: Evidence, reasons: list[str]) -> Advice | None:
    """Constrained decoding comes before training a format; adds to ``reasons`` what it did where it was measured."""
    if evidence.kind.kind != "format":
        return None
    held = [o for o in evidence.options if o.own and "constraint" in o.uses]
    if not held:
        why = evidence.missing.get("constraint", "not measured")
        reasons.append(
            f"the task asks for a format ({evidence.kind.reason}), and constrained output is to be tried first: {why}"
        )
        return _advice(evidence, CONSTRAIN, None, reasons)
    best = best_option(held)
    free = best_option([o for o in evidence.options if o.own and "constraint" not in o.uses])
    if best.score.value > free.score.value:
        reasons.append(
            f"constrained output gives {_shown(best)} and the best free one {_shown(free)}: keep the constraint, "
            "what is missing is content and not form"
        )
    else:
        reasons.append(f"constrained output does not help: {_shown(best)}, against {_shown(free)} without")
    return None


def _knowledge_first(evidence: Evidence, reasons: list[str]) -> Advice | None:
    """Looking things up comes before training facts into weights."""
    if evidence.kind.kind != "knowledge":
        return None
    looked = [o for o in evidence.options if o.own and "passages" in o.uses]
    if not looked:
        why = evidence.missing.get("passages", "no documents were given")
        reasons.append(
            f"the task asks for knowledge ({evidence.kind.reason}), and retrieval is to be tried first: {why}"
        )
        return _advice(evidence, RETRIEVE, None, reasons)
    best = best_option(looked)
    if best.gain is not None and best.gain.low > 0:
        reasons.append(
            f"retrieval gains {_difference(best.gain)} over the task's own prompt: better documents, passages or "
            "ranking come before training"
        )
        return _advice(evidence, RETRIEVE, best.name, reasons)
    reasons.append(f"retrieval is not shown to help ({_shown(best)}): the documents may not hold the answers")
    return None


def _by_training(evidence: Evidence, trained: Trained, best: Option, reasons: list[str]) -> Advice | None:
    """What the quick training on shares of the rows says. One that is shorter than a run can win, but not lose: then
    it is one of ``reasons`` and decides nothing."""
    curve, over = trained.curve, trained.over_best
    seen = f"{trained.steps} steps on all {evidence.rows:,} rows give {_score(trained.score)}"
    double = curve.predicted["2x"]
    more = f"every share of the rows gives {trained.score.value:.3f}: the curve tells nothing about more rows"
    if not curve.flat:
        more = (
            f"twice the rows are predicted to give {double.value:.3f} ({double.low:.3f} to {double.high:.3f}), a gain "
            f"of {curve.doubling.value:+.3f} ({curve.doubling.low:+.3f} to {curve.doubling.high:+.3f})"
        )
    if over.low > 0 or trained.score.low >= evidence.target.value:
        reasons += [f"{seen}, {_difference(over)} against {best.name}", more]
        return _advice(evidence, FINE_TUNE, best.name, reasons)
    reasons += [f"{seen}, not shown to be better than {best.name}: {_difference(over)}", more]
    if trained.steps < trained.run_steps:
        reasons.append(
            f"a run takes {trained.run_steps:,} steps, so this does not speak against one "
            f"(--curve-steps {trained.run_steps} would)"
        )
        return None
    if over.high < 0 and not curve.more_rows_help:
        reasons.append("training stays behind the prompt, and more rows are not predicted to change that")
        return _advice(evidence, PROMPT, best.name, reasons)
    if curve.more_rows_help:
        reasons.append("more rows are predicted to help")
    else:
        reasons.append("neither these rows nor more of them are shown to help: look at what is wrong in them first")
    return _advice(evidence, MORE_DATA, best.name, reasons)


def _advice(evidence: Evidence, verdict: str, option: str | None, reasons: Sequence[str]) -> Advice:
    return Advice(verdict, option, tuple(reasons), tuple(_warnings(evidence, verdict)), tuple(_questions(evidence)))


def _warnings(evidence: Evidence, verdict: str) -> list[str]:
    found = []
    n = max(o.score.n for o in evidence.options)
    if n < FEWEST_ITEMS:
        found.append(f"only {n} evaluation items: every interval here is wide (task.prompt_items, data.valid)")
    if verdict == FINE_TUNE and evidence.rows < FEWEST_ROWS:
        found.append(
            f"{evidence.rows:,} rows are fewer than {FEWEST_ROWS}: start at rank 4 to 8, and watch for over-fitting"
        )
    if evidence.rows > MOST_ROWS:
        found.append(f"{evidence.rows:,} rows are more than {MOST_ROWS:,}: a sample may do as well")
    ended = best_option(evidence.options)
    if ended.stop_rate < 0.9:
        found.append(
            f"{1 - ended.stop_rate:.0%} of the answers of {ended.name} ran to the length limit (task.max_new_tokens)"
        )
    if evidence.flagged:
        found.append(f"{evidence.flagged:,} rows would teach compliance with harm: `tunegate check` lists them")
    found += [f"not measured: {use}, {why}" for use, why in evidence.missing.items()]
    return found


def _questions(evidence: Evidence) -> list[str]:
    """What no figure here can answer."""
    asked = [
        "Do these items stand for what will be asked in production, and are their answers right?",
        "Is a prompt's cost per request acceptable at your volume, or would a smaller tuned model pay?",
        "Will the task change? A prompt is changed in a minute, an adapter is trained and tested again.",
    ]
    if not evidence.kind.given:
        asked.append(f"Is this a {evidence.kind.kind} task? That is a guess: {evidence.kind.reason} (--kind sets it).")
    if evidence.target.reason.startswith("assumed"):
        asked.append("Which score is good enough? Set gate.min_score; the target here is assumed.")
    if not any("reference" in o.uses for o in evidence.options):
        asked.append("What would a larger model reach with the same prompt? --reference measures one.")
    if evidence.trained is not None:
        asked.append("Would a full run do better? The curve trained a few steps, once for each size.")
    return asked


def _target(evidence: Evidence) -> str:
    return f"{evidence.target.value:.3f} ({evidence.target.reason})"


def _score(score: Score) -> str:
    return f"{score.value:.3f} ({score.low:.3f} to {score.high:.3f}, n={score.n})"


def _shown(option: Option) -> str:
    return f"{option.name} {_score(option.score)}"


def _difference(comparison: Comparison) -> str:
    return f"{comparison.difference:+.3f} ({comparison.low:+.3f} to {comparison.high:+.3f})"


def _gap(evidence: Evidence, best: Option) -> str:
    return f"{evidence.target.value - best.score.value:.3f}"


# --- what sort of task ---------------------------------------------------------------------------------------------

_SAFETY = re.compile(
    r"\b(refus\w*|jailbreak\w*|guardrail\w*|uncensor\w*|red.?team\w*|harmful (?:requests?|prompts?|content)|"
    r"unsafe (?:requests?|prompts?)|safety (?:polic\w+|alignment|training))\b",
    re.IGNORECASE,
)
_ASKS = {"who", "what", "when", "where", "which", "why", "how", "whose", "whom", "is", "are", "was", "were", "does"}


def guess_kind(
    task: TaskSection, name: str, labels: Sequence[str] | None, rows: Sequence[tuple[str, str, str]],
    flagged: float = 0.0,
) -> Guess:  # fmt: skip
    """The sort of task, from its settings and ``rows`` of (system, question, answer) of the training split, a share
    ``flagged`` of which would teach compliance with harm.

    In this order: said by the user; safety words in the task's name or system messages, refusals or harm in the
    answers; a metric or schema of a format; labels; documents, or short questions whose answers are not in them; a
    skill.
    """
    if task.kind is not None:
        return Guess(task.kind, "set by the user", given=True)
    texts = [name, *(p.system or "" for p in task.prompts or ()), *dict.fromkeys(system for system, _, _ in rows)]
    found = next((m[0] for text in texts if (m := _SAFETY.search(text.replace("_", " ").replace("-", " ")))), None)
    if found:
        return Guess("safety", f"the task's name or system message says {found!r}")
    refused = sum(is_refusal(answer) for _, _, answer in rows)
    if rows and refused >= SAFETY_SHARE * len(rows):
        return Guess("safety", f"{refused / len(rows):.0%} of the training answers are refusals")
    if flagged >= SAFETY_SHARE:
        return Guess("safety", f"{flagged:.0%} of the training rows would teach compliance with harm")
    if task.metric in (*JSON_METRICS, "regex") or task.json_schema or task.pattern:
        what = "task.json_schema" if task.json_schema else "task.pattern" if task.pattern else f"metric {task.metric}"
        return Guess("format", f"{what} states a format")
    if labels or task.metric in ("accuracy", "choice"):
        return Guess("labels", f"{len(labels)} labels" if labels else f"metric {task.metric}")
    if task.documents:
        return Guess("knowledge", "task.documents names texts to look answers up in")
    return _knowledge_or_skill(rows)


def _knowledge_or_skill(rows: Sequence[tuple[str, str, str]]) -> Guess:
    """Questions whose short answers share few words with them ask for facts that the model must have."""
    asked = [(words(q), words(a)) for _, q, a in rows if q.strip() and a.strip()]
    questions = [(q, a) for q, a in asked if (q and q[0] in _ASKS) and len(q) <= 40 and 0 < len(a) <= 30]
    if asked and len(questions) >= 0.6 * len(asked):
        inside = sum(len(set(a) & set(q)) / len(set(a)) for q, a in questions) / len(questions)
        if inside < 0.5:
            share = len(questions) / len(asked)
            return Guess(
                "knowledge",
                f"{share:.0%} of the rows are short questions, {inside:.0%} of an answer's words stand in them",
            )
    return Guess("skill", "open answers that are made from the question")
