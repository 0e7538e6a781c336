"""The step in which a judge model scores stored answers: those of a run's test, or new ones to validation items.

The same items are judged for every subject, chosen by content hash. Replies lie in ``judge/replies.jsonl`` of the
task's folder under a key of everything they depend on, so that all runs of the task pay for a reply once and share one
budget; what a kill or the budget cut off goes on from there. A step leaves one line per item, a record, and
``measures.json`` for the gate. Agreement with the people of a spot check is computed from these files when it is asked
for, because labels may come later than scores.

It decides nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tunegate import records
from tunegate.data.split import in_order
from tunegate.data.types import Example
from tunegate.errors import InputError
from tunegate.evaluation.judge.ask import Asker
from tunegate.evaluation.judge.items import (
    Answered,
    conversation,
    item_questions,
    judge_items,
    judge_pairs,
    pair_questions,
)
from tunegate.evaluation.judge.providers import open_provider
from tunegate.evaluation.judge.results import (
    PAIRS,
    Agreement,
    Results,
    compare_scores,
    compare_with_people,
    read_labels,
    read_results,
    scores_of,
    self_agreement,
    win_rate,
    write_results,
)
from tunegate.evaluation.measures import Measure, save_measures
from tunegate.files import hash_json, read_jsonl
from tunegate.gate.evidence import BEST_PROMPT
from tunegate.pipeline.folders import STEP, begin, finish, is_done, short
from tunegate.pipeline.prepare import Prepared
from tunegate.pipeline.questions import JUDGE, Judge
from tunegate.pipeline.reporter import Reporter
from tunegate.pipeline.session import Session
from tunegate.records import JudgeRecord

REPLIES, RECORD = "judge/replies.jsonl", "judge.json"
LABELS = "review/labels.jsonl"
WORST = 10  # items in the record


@dataclass(frozen=True)
class Answers:
    """Subjects' answers to the same examples of one split."""

    split: str
    examples: Sequence[Example]
    texts: Mapping[str, Sequence[str]]

    @property
    def key(self) -> str:
        return hash_json([self.split, [e.content_hash for e in self.examples], self.texts])

    def items(self, subject: str, other: str = "") -> list[Answered]:
        others = self.texts[other] if other else [None] * len(self.examples)
        return [
            Answered(example.row_id, conversation(example.prompt), text, example.answer or None, against)
            for example, text, against in zip(self.examples, self.texts[subject], others, strict=True)
        ]


def judge_run(prepared: Prepared, run: Path, reporter: Reporter) -> JudgeRecord | None:
    """Judge the answers of the run's test; None if the task does not ask."""
    asked = prepared.judge
    if asked is None:
        return None
    record = judge(prepared, asked, tested_answers(prepared, asked, run), run / JUDGE, reporter)
    people = with_people(run)
    if people is not None:
        reporter.line(describe_people(people))
    return record


def tested_answers(prepared: Prepared, asked: Judge, run: Path) -> Answers:
    """The stored answers of the run's test to the items that are judged."""
    if not (run / "test" / STEP).exists():
        raise InputError(
            "there is no tested run of this task with these settings", where=str(run), fix="`tunegate run` makes it"
        )
    wanted = chosen(prepared.data.splits.test, asked.settings.items)
    texts = {}
    for subject in _subjects(asked):
        name = "prompt" if subject == BEST_PROMPT else subject
        path = run / "test" / f"{name}.items.jsonl"
        if subject == BEST_PROMPT and not path.exists():  # no prompt was better than the task's own
            path = run / "test" / "base.items.jsonl"
        rows = {row["row_id"]: row["prediction"] for row in read_jsonl(path)}
        texts[subject] = [rows[example.row_id] for example in wanted]
    return Answers("test", wanted, texts)


def judge_valid(session: Session, asked: Judge, adapter: Path | None, digest: str) -> tuple[Path, JudgeRecord]:
    """Answer validation items with the adapter and its base (or the base alone) and judge the answers; the test split
    stays closed. Also returns the folder with the items."""
    prepared = session.prepared
    if asked.against == BEST_PROMPT:
        fix = "--split test reads what the run's test left; or --set judge.pairs=base"
        raise InputError("only a run's test has answers of the best prompt", where="judge.pairs", fix=fix)
    asked = replace(asked, subjects=("base",) if adapter is None else ("adapter", "base"))
    wanted = chosen(prepared.data.splits.valid, asked.settings.items)
    texts = {}
    for subject in asked.subjects:
        path = _answered(session, subject, wanted, adapter, digest)
        texts[subject] = [row["prediction"] for row in read_jsonl(path)]
    answers = Answers("valid", wanted, texts)
    folder = prepared.config.run_dir / f"eval-{short(hash_json([asked.key, answers.key, digest]))}"
    return folder, judge(prepared, asked, answers, folder, session.reporter)


def _answered(session: Session, subject: str, examples: list[Example], adapter: Path | None, digest: str) -> Path:
    """The file with ``subject``'s answers, generated unless they are there."""
    prepared = session.prepared
    task, own = prepared.config.task.task.model_dump(mode="json"), digest if subject == "adapter" else ""
    key = hash_json([prepared.base_key, task, own, "valid", [e.content_hash for e in examples]])
    path = prepared.config.run_dir / f"eval-{short(key)}" / f"{subject}-valid.items.jsonl"
    if not path.exists():
        if adapter is not None:
            session.use_adapter(adapter, digest)
        with session.as_base() if subject == "base" else contextlib.nullcontext():
            session.evaluate(examples, subject, "valid", path)
    return path


def _subjects(asked: Judge) -> list[str]:
    """Whose answers are needed, for scores or for pairs."""
    return list(dict.fromkeys([*asked.subjects, *([asked.against] if asked.against else [])]))


def chosen(examples: Sequence[Example], items: int | None) -> list[Example]:
    """The first ``items`` in an order of content hashes."""
    return in_order(examples)[:items]


def judge(prepared: Prepared, asked: Judge, answers: Answers, folder: Path, reporter: Reporter) -> JudgeRecord:
    """Judge ``answers`` into ``folder``; read back if that is done. :class:`TunegateError` where the budget or the
    attempts are used up; the same call goes on."""
    confidence = prepared.policy.confidence
    key = hash_json([asked.key, answers.key, confidence])
    if not is_done(folder, key):
        begin(folder)
        path = prepared.config.run_dir / REPLIES
        asker = Asker(open_provider(asked.model), asked.model, asked.limits, path)
        found = _ask(asker, asked, answers, reporter)
        measures = write_results(folder, found)
        records.save(folder / RECORD, _record(asker, asked, answers, found, folder, confidence))
        save_measures(folder, measures)
        finish(folder, key)
    record = records.load(folder / RECORD, JudgeRecord)
    reporter.line(describe(record))
    return record


def _ask(asker: Asker, asked: Judge, answers: Answers, reporter: Reporter) -> Results:
    samples, rubric, first = asked.settings.samples, asked.rubric, asked.subjects[0]
    judged, pairs = {}, []
    for subject in asked.subjects:
        items = answers.items(subject)
        with reporter.progress(f"judge on {subject}", samples * len(items)) as advance:
            judged[subject] = judge_items(asker, rubric, items, samples, advance)
    if asked.against and asked.against != first:
        items = answers.items(first, asked.against)
        with reporter.progress("judge on pairs", len(pair_questions(rubric, items, samples))) as advance:
            pairs = judge_pairs(asker, rubric, items, samples, advance)
    return Results(judged, pairs, asked.against if pairs else "")


def _record(
    asker: Asker, asked: Judge, answers: Answers, found: Results, folder: Path, confidence: float
) -> JudgeRecord:
    samples, rubric, (first, *others) = asked.settings.samples, asked.rubric, found.judged
    questions = [q for subject in found.judged for q in item_questions(rubric, answers.items(subject), samples)]
    if found.pairs:
        questions += pair_questions(rubric, answers.items(first, found.against), samples)
    scores = {subject: scores_of(items, confidence) for subject, items in found.judged.items()}
    mine = found.judged[first]
    worst = sorted(range(len(mine)), key=lambda n: (mine[n].score, n))[:WORST]
    return JudgeRecord(
        provider=asked.model.provider,
        model=asked.model.name,
        rubric=rubric.name,
        pass_at=rubric.pass_at,
        split=answers.split,
        samples=samples,
        mean={subject: one for subject, (one, _) in scores.items()},
        pass_rate={subject: one for subject, (_, one) in scores.items()},
        comparisons={name: compare_scores(mine, found.judged[name], name, confidence) for name in others},
        against=found.against,
        win_rate=win_rate(found.pairs, confidence) if found.pairs else None,
        consistent=sum(p.consistent for p in found.pairs) / len(found.pairs) if found.pairs else None,
        alpha=self_agreement(mine),
        cost=asker.cost_of(questions) if asked.limits.price_in is not None else None,
        worst=[
            {"row_id": mine[n].row_id, "score": mine[n].score, "answer": answers.texts[first][n],
             "reasons": mine[n].reasons[0]}
            for n in worst
        ],
        items_paths={
            name: f"{folder.name}/{name}.items.jsonl" for name in (*found.judged, *([PAIRS] if found.pairs else []))
        },
        settings={**asked.model.identity, "rubric_hash": rubric.hash, "items": len(mine)},
    )  # fmt: skip


# --- people ------------------------------------------------------------------------------------------------------


def with_people(run: Path) -> dict[str, Agreement] | None:
    """How the judge agrees with the people of the run's spot check: on ``verdicts``, and on who is ``preferred``; None
    where one of the two has not judged."""
    if not (run / JUDGE / STEP).exists() or not (run / LABELS).exists():
        return None
    record = records.load(run / JUDGE / RECORD, JudgeRecord)
    return compare_with_people(read_results(run / JUDGE, list(record.mean), record.against), read_labels(run / LABELS))


def people_measures(run: Path) -> dict[str, Measure]:
    """``judge.kappa``, where it is defined."""
    people = with_people(run)
    if people is None or people["verdicts"].kappa is None:
        return {}
    items = {"": f"{JUDGE}/adapter.items.jsonl", "others": LABELS}
    got = f"{people['verdicts'].kappa:.3f} on {people['verdicts'].n} answers that people judged"
    return {"judge.kappa": Measure("scalar", value=people["verdicts"].kappa, items=items, got=got)}


# --- words -------------------------------------------------------------------------------------------------------


def describe(record: JudgeRecord) -> str:
    """One line: mean, share passed, the others' means, pairs, agreement of the samples, cost."""
    (subject, own), *others = record.mean.items()
    parts = [f"{subject} {own.value:.2f} of 5, {100 * record.pass_rate[subject].value:.1f} % pass ({own.n} items)"]
    parts += [f"{name.replace('_', ' ')} {score.value:.2f}" for name, score in others]
    if record.win_rate is not None:
        parts.append(f"wins {100 * record.win_rate.value:.1f} % against {record.against.replace('_', ' ')}")
    if record.alpha is not None:
        parts.append(f"alpha of its samples {record.alpha:.2f}")
    if record.cost is not None:
        parts.append(f"${record.cost:.4f}")
    return f"judge {record.model}: {'; '.join(parts)}"


def describe_people(people: Mapping[str, Agreement]) -> str:
    """One line: alpha and kappa with the people of the spot check."""
    parts = []
    for name, found in people.items():
        if found.n:
            numbers = [f"{label} {_number(value)}" for label, value in (("kappa", found.kappa), ("alpha", found.alpha))]
            parts.append(f"{name} {', '.join(numbers)} ({found.n} answers)")
    return f"judge and people: {'; '.join(parts) or 'no answer that both have judged'}"


def _number(value: float | None) -> str:
    return "not defined" if value is None else f"{value:.2f}"
