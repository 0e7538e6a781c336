"""Prompt baselines: what the base can do without training, measured before and after.

A :class:`Prompt` rewrites the messages of an example: another system message, a line that lists the allowed answers,
worked examples from the training split put before the question. The built-in candidates are the task's own prompt,
the label list, and few-shot prompts; the best one on validation items is what the adapter has to beat.

It does not search over wordings, and never sees a test item.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from tunegate.config import PromptSection
from tunegate.data.types import Example, Message
from tunegate.engine.constrain import AnswerForm
from tunegate.errors import InputError, Problem
from tunegate.files import hash_json

MOST_LABELS = 200
FEW = 8
AS_IS = "as_is"


class Finder(Protocol):
    """What a prompt takes from elsewhere for each question. ``hash`` covers everything it may find."""

    @property
    def hash(self) -> str: ...

    def find(self, example: Example) -> tuple[tuple[Example, ...], str]:
        """Worked examples, and text for the system message."""


@dataclass(frozen=True)
class Prompt:
    """``system`` replaces the system message, ``suffix`` is added to it, ``shots`` come before the question.

    ``in_user``: for templates without a system role, what the prompt would say there begins the first user message.
    ``finder`` adds shots and text that depend on the question; ``form`` is what the answer is held to while it is
    generated.
    """

    name: str
    system: str | None = None
    suffix: str = ""
    shots: tuple[Example, ...] = ()
    in_user: bool = False
    finder: Finder | None = None
    form: AnswerForm | None = None

    def messages(self, example: Example) -> tuple[Message, ...]:
        """The messages the model is asked with, for a chat example."""
        found, text = ((), "") if self.finder is None else self.finder.find(example)
        suffix = "\n\n".join(part for part in (self.suffix, text) if part)
        given = list(example.prompt)
        head = [given.pop(0)] if given and given[0].get("role") == "system" else []
        if self.system is not None:
            head = [{"role": "system", "content": self.system}]
        if suffix:
            before = f"{head[0]['content']}\n\n" if head else ""
            head = [{"role": "system", "content": before + suffix}]
        shots = [m for shot in (*self.shots, *found) for m in shot.messages if m.get("role") != "system"]
        asked = [*shots, *given]
        if self.in_user and head and asked and asked[0].get("role") == "user":
            asked[0] = {**asked[0], "content": f"{head[0]['content']}\n\n{asked[0]['content']}"}
            head = []
        return (*head, *asked)

    @property
    def hash(self) -> str:
        """Hash of what the model is asked with; the name is not part of it."""
        parts: list[object] = [self.system, self.suffix, [shot.content_hash for shot in self.shots]]
        parts += ["in_user"] if self.in_user else []
        parts += [["finder", self.finder.hash]] if self.finder is not None else []
        parts += [["form", self.form.kind, self.form.value, self.form.compact]] if self.form is not None else []
        return hash_json(parts)


def pick_shots(train: Sequence[Example], n: int) -> tuple[Example, ...]:
    """``n`` short, varied examples: answers take turns (rarest last), the order within an answer is by hash."""
    chats = [e for e in train if e.messages and len(e.messages) <= 4]
    median = sorted(_size(e) for e in chats)[len(chats) // 2] if chats else 0
    by_answer: dict[str, list[Example]] = defaultdict(list)
    for example in sorted((e for e in chats if _size(e) <= median), key=lambda e: e.content_hash):
        by_answer[example.answer].append(example)
    answers = sorted(by_answer, key=lambda a: (-len(by_answer[a]), hash_json(a)))
    picked: list[Example] = []
    while len(picked) < n and answers:
        for answer in list(answers):
            if len(picked) < n:
                picked.append(by_answer[answer].pop(0))
            if not by_answer[answer]:
                answers.remove(answer)
    return tuple(picked)


def _size(example: Example) -> int:
    return sum(len(str(m.get("content") or "")) for m in example.messages if m.get("role") != "system")


def candidates(
    train: Sequence[Example],
    labels: Sequence[str] | None,
    wanted: Sequence[PromptSection] | None,
    *,
    takes_system: bool = True,
    few: int = FEW,
) -> list[Prompt]:
    """The prompts to measure, the task's own (``as_is``) first. ``takes_system``: the template has a system role.
    ``few``: examples in the built-in prompts that show some."""
    own, in_user = Prompt(AS_IS), not takes_system
    if wanted is not None:
        _check_names([AS_IS, *(p.name for p in wanted)])
        return [own, *(Prompt(p.name, p.system, "", pick_shots(train, p.shots), in_user) for p in wanted)]
    found = [own]
    shots = pick_shots(train, few)
    listed = ""
    if labels and len(labels) <= MOST_LABELS:
        listed = "Answer with exactly one of: " + ", ".join(labels)
        found.append(Prompt("labels", suffix=listed, in_user=in_user))
    if shots:
        found.append(Prompt(f"few_shot_{len(shots)}", shots=shots))
        if listed:
            found.append(Prompt(f"labels_few_shot_{len(shots)}", suffix=listed, shots=shots, in_user=in_user))
    return found


def _check_names(names: Sequence[str]) -> None:
    """Names of prompts are names of files too."""
    problems = [
        Problem("not a name for a prompt", "task.prompts", "letters, digits, '.', '_' and '-'", repr(name)[:80])
        for name in names
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name)
    ]
    if len({name.casefold() for name in names}) < len(names):
        fix = f"name each differently; {AS_IS} is the task's own prompt"
        problems.append(Problem("two prompts have one name", "task.prompts", got=", ".join(names), fix=fix))
    if problems:
        raise InputError(problems)
