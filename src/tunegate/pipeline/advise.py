"""``advise``: measure what the base does without training, then say whether training is worth it.

Every option is scored on the same validation items with the task's metric: the task's own prompt, label lists, the
user's prompts, fixed and looked-up examples, passages of a documents folder, answers held to their form, and a
reference model behind a URL. First come the free prompts; the best of them is then tried with the form and with
passages. Where this leaves training open, a learning curve trains a few steps on shares of the rows.

::

    runs/NAME/advise-KEY/    KEY: base, template, task, training rows, items, confidence
      NAME.json NAME.items.jsonl    one option; its record holds the hash of its prompt
      curve/p010/ ...               one training each
      best.json advice.json

A record whose prompt hash is still right is read back, so a second call measures only what is new. ``run`` takes the
best option as the bar (see ``bar``). The test set is never opened here, and no adapter is kept for use.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from tunegate import records
from tunegate.config import Config
from tunegate.engine.constrain import AnswerForm, build_constraint
from tunegate.errors import InputError
from tunegate.evaluation.advise import (
    ASSUMED_TARGET,
    FINE_TUNE,
    MORE_DATA,
    Advice,
    Evidence,
    Guess,
    Option,
    Target,
    Uses,
    best_option,
    guess_kind,
    recommend,
)
from tunegate.evaluation.answer_form import find_form
from tunegate.evaluation.answering import takes_system
from tunegate.evaluation.endpoint import Reference
from tunegate.evaluation.prompts import AS_IS, Prompt, candidates
from tunegate.evaluation.retrieval import Both, Lookup, SimilarShots, question, read_passages
from tunegate.evaluation.statistics import compare, items_to_decide
from tunegate.evaluation.types import Measurement
from tunegate.files import update_json
from tunegate.pipeline.evidence import measurement_of
from tunegate.pipeline.folders import owned, short
from tunegate.pipeline.prepare import Prepared, prepare
from tunegate.pipeline.reporter import Reporter
from tunegate.pipeline.session import Session
from tunegate.records import EvalRecord

BEST, ADVICE = "best.json", "advice.json"
FORMED, PASSED = "_constrained", "_passages_"  # in the names of options


@dataclass(frozen=True)
class Request:
    """What to measure. ``embed`` names a sentence-transformers model; ``passage_tokens`` counts the base's tokens."""

    shots: int = 8
    passages: int = 3
    passage_tokens: int = 160
    embed: str | None = None


@dataclass(frozen=True)
class Extras:
    """What costs more than prompts of the base: a service, and training of so many steps for each size, for at most
    ``curve_minutes`` in all; 0: none."""

    reference: str | None = None
    reference_model: str | None = None
    curve_steps: int = 40
    curve_minutes: float = 10.0


@dataclass(frozen=True)
class Way:
    """A prompt with what it is made of."""

    prompt: Prompt
    uses: frozenset[Uses]

    @property
    def name(self) -> str:
        return self.prompt.name


@dataclass(frozen=True)
class Outcome:
    """``form`` says where the form of the answers comes from, empty without one; ``skipped`` counts documents that
    are no text."""

    folder: Path
    evidence: Evidence
    advice: Advice
    form: str
    skipped: int


def advise_folder(prepared: Prepared) -> Path:
    return prepared.config.run_dir / f"advise-{short(prepared.advise_key)}"


class Ways:
    """Every way to ask that a task and a request give; what is expensive is made when first needed."""

    def __init__(self, prepared: Prepared, request: Request):
        self.prepared, self.request = prepared, request
        self.task = prepared.config.task.task
        self.in_user = not takes_system(prepared.base.renderer)
        self.skipped = 0

    @cached_property
    def form(self) -> tuple[AnswerForm, str] | None:
        answers = [e.answer for e in self.prepared.data.splits.train]
        if self.task.answer_by == "likelihood":  # such answers are chosen from the labels already
            return None
        return find_form(self.task, self.prepared.scorer.labels, answers, self.prepared.config.folder)

    @cached_property
    def shots(self) -> SimilarShots:
        return SimilarShots(self.prepared.data.splits.train, self.request.shots, self.request.embed)

    @cached_property
    def lookup(self) -> Lookup | None:
        if self.task.documents is None:
            return None
        tokens = self.request.passage_tokens
        passages, self.skipped = read_passages(
            self.prepared.config.path(self.task.documents), self.prepared.base.renderer.tokenizer,
            tokens=tokens, overlap=tokens // 4, where="task.documents",
        )  # fmt: skip
        return Lookup(passages, self.request.passages, self.request.embed)

    @cached_property
    def plain(self) -> list[Way]:
        """Prompts without form and passages, the task's own first."""
        train, labels = self.prepared.data.splits.train, self.prepared.scorer.labels
        built = candidates(train, labels, None, takes_system=not self.in_user, few=self.request.shots)
        own = candidates(train, labels, self.task.prompts or (), takes_system=not self.in_user)[1:]
        taken = {p.name.casefold() for p in own}
        if made := sorted(name for name in taken if name.endswith(FORMED) or PASSED in name):
            what = f"names with {FORMED} at the end or {PASSED} in them are given by advise"
            raise InputError(what, where="task.prompts", got=", ".join(made), fix="rename the prompt")
        found = [Way(p, _uses(p)) for p in (*built, *own) if p in own or p.name.casefold() not in taken]
        if self.shots.n:
            similar = Prompt(f"retrieved_{self.shots.n}", in_user=self.in_user, finder=self.shots)
            listed = [p for p in built if p.name == "labels"]
            both = [replace(p, name=f"labels_{similar.name}", finder=self.shots) for p in listed]
            found += [Way(p, _uses(p)) for p in (similar, *both) if p.name not in taken]
        return found

    @cached_property
    def form_problem(self) -> str:
        """Why answers cannot be held to the form; empty if they can, or if there is none."""
        if self.form is None:
            return ""
        renderer = self.prepared.base.renderer
        try:
            build_constraint(self.form[0], renderer.tokenizer, renderer.stop_ids)
        except InputError as error:
            return "; ".join(f"{p.what}: {p.got}" for p in error.problems)
        return ""

    def with_form(self, way: Way) -> Way | None:
        if self.form is None or self.form_problem:
            return None
        prompt = replace(way.prompt, name=f"{way.name}{FORMED}", form=self.form[0])
        return Way(prompt, way.uses | {"constraint"})

    def with_passages(self, way: Way) -> Way | None:
        if self.lookup is None:
            return None
        finder = self.lookup if way.prompt.finder is None else Both(way.prompt.finder, self.lookup)
        name = f"{way.name}{PASSED}{self.request.passages}"
        return Way(replace(way.prompt, name=name, finder=finder, in_user=self.in_user), way.uses | {"passages"})

    def find(self, name: str) -> Way | None:
        """The way called ``name``, among all that can be made."""
        for way in self.plain:
            if not name.startswith(way.name):
                continue
            looked = self.with_passages(way) if PASSED in name else None
            for made in (way, looked, *(self.with_form(w) for w in (way, looked) if w is not None)):
                if made is not None and made.name == name:
                    return made
        return None

    def check(self, kind: Guess) -> dict[str, str]:
        """What cannot be measured here, and why. Everything that is looked up is read: wrong input is said before
        minutes of measuring."""
        missing = {"constraint": self.form_problem} if self.form_problem else {}
        if self.plain and self.lookup is None and kind.kind == "knowledge":
            missing["passages"] = "no documents were given (--documents)"
        return missing


def _uses(prompt: Prompt) -> frozenset[Uses]:
    found: set[Uses] = set()
    if prompt.system is not None or prompt.suffix:
        found.add("prompt")
    if prompt.shots or prompt.finder is not None:
        found.add("shots")
    return frozenset(found)


class Bench:
    """Scores ways of asking, or finds their scores, in one folder."""

    def __init__(self, session: Session, folder: Path, target: Target):
        self.session, self.folder, self.target, self.prepared = session, folder, target, session.prepared
        self.options: list[Option] = []
        self.measurements: dict[str, Measurement] = {}

    def measure(self, way: Way) -> Option | None:
        """The option, kept and returned; None where its prompts do not fit in the base's positions."""
        if not self._fits(way):
            return None
        path, items = self.folder / f"{way.name}.json", self.folder / f"{way.name}.items.jsonl"
        record = load_record(path, way.prompt.hash)
        if record is None:
            subject = "base" if way.name == AS_IS else f"prompt {way.name}"
            with self.session.as_base():
                found = self.session.evaluate(self.prepared.baseline_items, subject, "valid", items, way.prompt)
            record = found.record
            records.save(path, record)
        return self.add(way.name, way.uses, record, items)

    def add(self, name: str, uses: frozenset[Uses], record: EvalRecord, items: Path) -> Option:
        """Keep a record with its items as an option."""
        measured = self.measurements[name] = measurement_of(self.prepared, items, self.prepared.baseline_items)
        gain = more = None
        if measured.counts is None:  # the score is the mean of the items' scores
            good = self.target.value
            more = items_to_decide(measured.scores - good, -good, 1.0 - good, self.prepared.policy.confidence)
        if name != AS_IS and AS_IS in self.measurements:
            confidence = self.prepared.policy.confidence
            gain = compare(measured, self.measurements[AS_IS], AS_IS, confidence)
        n = record.score.n
        seconds = None if "reference" in uses else record.seconds / n
        read = record.settings["prompt_tokens"] / n
        option = Option(
            name, uses, record.score, read, record.generated_tokens / n, record.stop_rate, seconds, gain, more,
            record.settings.get("tokens_counted", True),
        )  # fmt: skip
        self.options.append(option)
        tokens = f", {read:,.0f} tokens in, {option.answer_tokens:,.1f} out" if option.counted else ""
        shown = f"{record.score.value:.4f} ({record.score.low:.3f} to {record.score.high:.3f})"
        self.session.reporter.line(f"{name}: {shown}{tokens}")
        return option

    def _fits(self, way: Way) -> bool:
        base = self.prepared.base
        if base.positions is None or way.name == AS_IS:
            return True
        items = self.prepared.baseline_items
        longest = max(len(base.renderer.prompt_ids(way.prompt.messages(e), e.tools)) for e in items)
        room = base.positions - (self.prepared.config.task.task.max_new_tokens or 0)
        if longest > room:
            self.session.reporter.line(
                f"{way.name} is left out: {longest:,} tokens, and the base takes {base.positions:,}"
            )
        return longest <= room


def load_record(path: Path, prompt_hash: str) -> EvalRecord | None:
    """The record in ``path`` if it is of this prompt; its items are beside it, written before it."""
    if not path.exists():
        return None
    record = records.load(path, EvalRecord)
    return record if record.hashes.get("prompt") == prompt_hash else None


def advise(
    config: Config, reporter: Reporter, request: Request, extras: Extras, *, stop: Callable[[], bool]
) -> Outcome:
    """Measure, and recommend. :class:`InputError` for a task whose metric scores no answers."""
    reporter.line("checking data and base")
    prepared = prepare(config, reporter)
    task = prepared.config.task.task
    if not any(m.name == task.metric for m in prepared.scorer.metrics):
        fix = "use a metric that scores answers; plain text has no prompt to compare with"
        raise InputError(
            "advise compares answers, and this metric scores none", where="task.metric", got=task.metric, fix=fix
        )
    ways = Ways(prepared, request)
    kind = _kind(prepared)
    missing = ways.check(kind)
    reference = None if extras.reference is None else Reference(extras.reference, extras.reference_model or "")
    if reference is not None:
        reference.endpoint()
    with owned(prepared.config.run_dir):
        bench = Bench(Session(prepared, reporter), advise_folder(prepared), _target(prepared))
        _measure(bench, ways)
        best = best_option(bench.options)
        chosen = ways.find(best.name)
        assert chosen is not None
        stored = {
            "prompt": best.name, "hash": chosen.prompt.hash, "value": best.score.value, "request": asdict(request),
            "documents": task.documents,
        }  # fmt: skip
        update_json(bench.folder / BEST, stored)
        if reference is not None:
            from tunegate.pipeline.reference import measure_reference

            measure_reference(bench, ways, reference, missing)
        rows, flagged = len(prepared.data.splits.train), prepared.report.stats["safety"]["flagged"]
        evidence = Evidence(kind, bench.target, rows, tuple(bench.options), missing, flagged=flagged)
        advice = recommend(evidence)
        if extras.curve_minutes and advice.verdict in (FINE_TUNE, MORE_DATA):  # nothing else asks for it
            from tunegate.pipeline.curve import measure_curve

            evidence = replace(evidence, trained=measure_curve(bench, best.name, extras, stop, missing))
            advice = recommend(evidence)
        update_json(bench.folder / ADVICE, describe(evidence, advice))
    form = "" if ways.form is None else f"{ways.form[0].kind}: {ways.form[1]}"
    return Outcome(bench.folder, evidence, advice, form, ways.skipped)


def _measure(bench: Bench, ways: Ways) -> None:
    """Free prompts, then the task's own and the best one with form, with passages and with both."""
    for way in ways.plain:
        bench.measure(way)
    best = ways.find(best_option(bench.options).name)
    assert best is not None
    for way in dict.fromkeys((ways.plain[0], best)):
        looked = ways.with_passages(way)
        for made in (ways.with_form(way), looked, ways.with_form(looked) if looked is not None else None):
            if made is not None:
                bench.measure(made)


def _kind(prepared: Prepared) -> Guess:
    rows = []
    for example in prepared.data.splits.train[:2000]:
        system = next((str(m.get("content") or "") for m in example.prompt if m.get("role") == "system"), "")
        rows.append((system, question(example), example.answer))
    safety = prepared.report.stats["safety"]
    flagged = safety["flagged"] / safety["rows"]
    return guess_kind(prepared.config.task.task, prepared.config.name, prepared.scorer.labels, rows, flagged)


def _target(prepared: Prepared) -> Target:
    """The highest score that the gate's policy asks of the task."""
    policy, metric = prepared.policy, prepared.config.task.task.metric
    asked = [] if policy.min_score is None else [Target(policy.min_score, "gate.min_score")]
    for rule in (setting.parsed for setting in policy.rules):
        about = rule.matches("task") or rule.matches(f"task.{metric}")
        if about and rule.form == "value" and rule.at_least and not rule.negated:
            asked.append(Target(rule.number, f"gate.rules: {rule}"))
    assumed = Target(ASSUMED_TARGET, "assumed: the gate asks for no score")
    return max(asked, key=lambda target: target.value, default=assumed)


def describe(evidence: Evidence, advice: Advice) -> dict[str, Any]:
    """Evidence and advice as JSON data."""
    data = asdict(replace(evidence, options=()))
    data["options"] = [{**asdict(o), "uses": sorted(o.uses)} for o in evidence.options]
    return {"advice": asdict(advice), "evidence": data}
