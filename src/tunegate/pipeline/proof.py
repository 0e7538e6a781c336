"""What shows that two models are one: golden prompts, and validation items with the task's metric.

Both models answer the cards' golden prompts, and items of the validation split that each adapter's run had: the first
of those that its eval gate looked at. Distributions and greedy answers are compared by ``export.parity``; the task's
metric is compared item by item, and its paired interval has to hold zero. The items come from the task's files, found
through the run folder beside the adapter, what the registry noted, or the folder that the user names; the files must be
those of the card. A file of the user's own may take their place.

The test set is not asked: it is opened once, by the run. Metrics that are code of the task's folder run only if the
user names that folder. Answers are greedy, whatever the task's temperature is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError

from tunegate.adapter.card import CARD, load_card
from tunegate.config import Config, Task, TaskSection, freeze
from tunegate.data.forms import load_examples
from tunegate.data.render import Renderer
from tunegate.data.split import in_order
from tunegate.data.types import Example, Rendered
from tunegate.errors import InputError, TunegateError
from tunegate.evaluation import statistics
from tunegate.evaluation.answering import rendered
from tunegate.evaluation.evaluator import LIKELIHOOD, Scorer, build_scorer
from tunegate.evaluation.metrics import PYTHON_PREFIX, score_items
from tunegate.evaluation.types import Measurement
from tunegate.export import parity
from tunegate.export.parity import Limits, Parity, Questions, Reading, Subject
from tunegate.files import hash_file, read_json
from tunegate.pipeline.folders import task_folder
from tunegate.pipeline.reading import labels_of, load_data
from tunegate.records import AdapterCard, Comparison
from tunegate.registry.pulling import PROVENANCE

ITEMS = 32
NEW_TOKENS = 16


@dataclass(frozen=True)
class Wanted:
    """Which items. ``data``: the folder where the cards' relative paths start, or a file of labelled examples; None:
    what the adapters' runs noted. ``count``: of each adapter; 0 for none."""

    data: Path | None = None
    count: int = ITEMS


@dataclass(frozen=True)
class Items:
    """Labelled examples that one adapter is asked. ``data`` says what they are."""

    adapter: str
    data: str
    examples: tuple[Example, ...]
    asked: Questions
    scorer: Scorer
    renderer: Renderer

    def measure(self, subject: Subject, reading: Reading) -> Measurement:
        """The task's metric on ``subject``, whose answers stand in ``reading``."""
        task = self.scorer.task
        if task.metric == LIKELIHOOD:
            values = [_likelihood(subject, row) for row in rendered(self.renderer, self.examples)]
            return Measurement(LIKELIHOOD, tuple(e.row_id for e in self.examples), np.array(values))
        if task.answer_by == LIKELIHOOD:
            texts = [self._most_likely(subject, prompt) for prompt in self.asked.prompts]
        else:
            texts = [self.renderer.decode(ids).strip() for ids in reading.answers]
        references = [e.answer for e in self.examples]
        return score_items(self.scorer.metrics, texts, references, self.examples)[1][task.metric]

    def _most_likely(self, subject: Subject, prompt: Sequence[int]) -> str:
        labels, encode = self.scorer.labels, self.renderer.tokenizer
        assert labels is not None
        ends = (self.renderer.end_of_turn_id,)
        tails = [(*encode(label, add_special_tokens=False)["input_ids"], *ends) for label in labels]
        return labels[int(np.argmax([_log_likelihood(subject, (*prompt, *t), len(t)).sum() for t in tails]))]


def _log_likelihood(subject: Subject, row: Sequence[int], count: int) -> torch.Tensor:
    """(count,) log-probabilities of the last tokens of ``row``, each after those before it."""
    found = subject.log_probs(row, count + 1)[:-1]
    return found.gather(1, torch.tensor(row[-count:])[:, None])[:, 0].double()


def _likelihood(subject: Subject, row: Rendered) -> float:
    """exp of the mean log-probability of the row's targets, as the evaluator's metric has it."""
    first = max(1, row.target.index(True))
    found = _log_likelihood(subject, row.ids, len(row.ids) - first)
    return min(1.0, float(found[torch.tensor(row.target[first:])].mean().exp()))


@dataclass(frozen=True)
class Exam:
    """Everything that the models are asked. ``absent``: a line for each adapter without items, why."""

    golden: Questions
    items: tuple[Items, ...] = ()
    absent: tuple[str, ...] = ()

    @property
    def count(self) -> str:
        prompts, items = len(self.golden.prompts), sum(len(one.examples) for one in self.items)
        return f"{prompts} prompts" + (f" and {items} validation items" if items else "")

    @property
    def longest(self) -> int:
        """Tokens of the longest row that a subject may have to read."""
        asked = [self.golden, *(one.asked for one in self.items)]
        rows = [len(row.ids) for one in self.items for row in rendered(one.renderer, one.examples)]
        return max([len(p) + q.new_tokens for q in asked for p in q.prompts] + rows)


@dataclass(frozen=True)
class Answered:
    """One subject's readings: of the golden prompts, and of each adapter's items with the task's metric."""

    golden: Reading
    items: tuple[tuple[Reading, Measurement], ...]


def sit(exam: Exam, subject: Subject, first: Answered | None = None) -> Answered:
    """``subject`` on everything, on the rows of ``first`` if that is given."""
    golden = parity.read(subject, exam.golden, first.golden.rows if first else None)
    found = []
    for number, items in enumerate(exam.items):
        reading = parity.read(subject, items.asked, first.items[number][0].rows if first else None)
        found.append((reading, items.measure(subject, reading)))
    return Answered(golden, tuple(found))


@dataclass(frozen=True)
class ItemsProof:
    """Two models on one adapter's items. ``comparison``: the second one's metric minus the first one's."""

    items: Items
    parity: Parity
    scores: tuple[float, float]
    comparison: Comparison

    def to_json(self) -> dict[str, Any]:
        """As a report has it; ``scores``: the adapter's, then the other form's."""
        return {
            "adapter": self.items.adapter, "data": self.items.data, "metric": self.comparison.metric,
            "scores": list(self.scores), "comparison": asdict(self.comparison), **self.parity.to_json(),
        }  # fmt: skip


@dataclass(frozen=True)
class Proof:
    golden: Parity
    items: tuple[ItemsProof, ...]
    absent: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Three keys of a report."""
        items = [one.to_json() for one in self.items]
        return {"parity": self.golden.to_json(), "items": items, "items_absent": list(self.absent)}


def compare(exam: Exam, first: Answered, second: Answered, plain: Reading) -> Proof:
    """``plain``: the base on the golden rows of ``first``."""
    found = []
    for items, (one, score), (other, same) in zip(exam.items, first.items, second.items, strict=True):
        difference = statistics.compare(same, score, "adapter", items.scorer.confidence)
        found.append(ItemsProof(items, parity.compare(one, other), (score.value, same.value), difference))
    return Proof(parity.compare(first.golden, second.golden, plain), tuple(found), exam.absent)


def require(proof: Proof, limits: Limits, what: str, where: str) -> None:
    """:class:`TunegateError` unless everything is within ``limits`` and every metric within noise."""
    parity.require(proof.golden, limits, what, where)
    for one in proof.items:
        found = one.comparison
        parity.require(one.parity, limits, what, f"{where}, on {one.items.data}")
        if not found.low <= 0.0 <= found.high:
            raise TunegateError(
                f"{what} does not do the task as the adapter on its base does; nothing was kept",
                where=f"{where}, on {one.items.data}",
                expected=f"{found.metric} within noise of the adapter's {one.scores[0]:.4f}",
                got=f"{one.scores[1]:.4f}, a difference of {found.difference:+.4f} ({found.low:+.3f} to "
                f"{found.high:+.3f}) on {found.n} items",
                fix=parity.WAYS_OUT,
            )


# --- where items come from ---------------------------------------------------------------------------------------


def find_exam(golden: Questions, adapters: Sequence[Path], renderer: Renderer, wanted: Wanted) -> Exam:
    """``golden`` and the items of every adapter. What is missing is an error where the user named it, else a line."""
    if not wanted.count:
        return Exam(golden, absent=("none were asked for",))
    items, absent = [], []
    for adapter in adapters:
        try:
            items.append(_items_of(adapter, renderer, golden.stop_ids, wanted))
        except InputError as error:
            if wanted.data is not None:
                raise
            problem = error.problems[0]
            absent.append(f"{adapter.name}: {problem.what}" + (f" ({problem.where})" if problem.where else ""))
    return Exam(golden, tuple(items), tuple(absent))


def _items_of(adapter: Path, renderer: Renderer, stop_ids: tuple[int, ...], wanted: Wanted) -> Items:
    card = load_card(adapter) if (adapter / CARD).exists() else None
    own_file = wanted.data is not None and not wanted.data.is_dir()
    config = None if card is None else _config_of(adapter, card, wanted.data)
    if own_file:
        assert wanted.data is not None
        data, examples = str(wanted.data), _rows_of(wanted.data, card, config)
    else:
        if card is None or config is None:
            raise InputError("an adapter without a card has no items; --data FILE names some")
        data, examples = "validation rows of its run", _validation(card, config)
    chosen = in_order(examples)[: wanted.count]
    if not chosen:
        raise InputError("there are no rows to ask", where=data)
    task, labels, confidence = TaskSection(metric=LIKELIHOOD), None, 0.95
    if config is not None:
        task = config.task.task.model_copy(update={"report": ()})
        labels, confidence = labels_of(config), config.task.gate.confidence
    if task.metric.startswith(PYTHON_PREFIX) and (wanted.data is None or own_file):
        raise InputError("the metric is code of the task's folder, which runs only if --data names that folder")
    folder = config.folder if config is not None else Path.cwd()
    scorer = build_scorer(task, labels, folder, confidence, chosen)
    prompts = tuple(_prompt(example, renderer) for example in chosen)
    asked = Questions(prompts, stop_ids, task.max_new_tokens or NEW_TOKENS)
    return Items(adapter.name, data, tuple(chosen), asked, scorer, renderer)


def _prompt(example: Example, renderer: Renderer) -> tuple[int, ...]:
    """What a model is given; of a plain text the first half."""
    if example.text is None:
        return tuple(renderer.prompt_ids(example.prompt, example.tools))
    ids = renderer.text_ids(example.text)
    return tuple(ids[: max(1, len(ids) // 2)])


def _config_of(adapter: Path, card: AdapterCard, data: Path | None) -> Config:
    """The card's settings, in the folder where its relative paths start."""
    try:
        task = Task.model_validate(freeze(card.config))
    except ValidationError as error:
        raise InputError("the card's settings are not those of this tunegate", got=str(error)) from None
    if data is not None:
        return Config(task, data if data.is_dir() else Path.cwd(), {})
    folder = None
    try:
        run = adapter.resolve().parent
        if (run / "run.json").is_file():
            folder = task_folder(run, read_json(run / "run.json")["folder"], task.output)
        elif (adapter / PROVENANCE).is_file():
            folder = Path(read_json(adapter / PROVENANCE)["task_folder"])
    except (OSError, ValueError, KeyError, TypeError):
        folder = None
    if folder is None or not folder.is_dir():
        raise InputError("the task's data are not to be found from here; --data FOLDER names the task's folder")
    return Config(task, folder, {})


def _validation(card: AdapterCard, config: Config) -> list[Example]:
    """The validation split of the card's own files; :class:`InputError` if a file is another one by now."""
    for source, digest in card.data["files"].items():
        path = config.path(source)
        if path.is_file() and hash_file(path) != digest:
            raise InputError("the task's data have changed since the run", where=str(path))
    data = load_data(config)
    if data.files != card.data["files"]:
        raise InputError("the task's data have changed since the run", where=str(config.folder))
    return data.splits.valid


def _rows_of(path: Path, card: AdapterCard | None, config: Config | None) -> list[Example]:
    """The rows of a user's file, read as the task's are. A file of the run itself may hold its test rows."""
    if not path.is_file():
        raise InputError("no such file or folder", where=f"--data {path}")
    if card is not None and hash_file(path) in card.data["files"].values():
        what = "a file of the run itself, which may hold its test rows"
        raise InputError(what, where=f"--data {path}", fix="name its folder: the validation rows in it are asked")
    if config is None:
        loaded = load_examples([str(path)], base_dir=Path.cwd())
    else:
        section = config.task.data
        loaded = load_examples(
            [str(path)], base_dir=Path.cwd(), form=section.form, columns=section.columns, system=section.system
        )
    loaded.raise_bad_rows()
    return loaded.examples
