"""One YAML file, checked before anything runs.

The file is read with line numbers, merged with ``--set`` overrides and validated by the models of
``config_sections``. Every problem of the file is reported at once, each with its line and the nearest real key.
:class:`Config` remembers where each value came from, so ``alpha=32 (default 2*rank)`` can be printed and kept on
the card. Values that depend on the base or the data (learning rate, answer length) are filled in later by
:meth:`Config.settle`, with their reason as origin.

It does not open data, bases or the network.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from tunegate.config_problems import Entries, choices_of, inner_model, overridden_by, problems_of
from tunegate.config_sections import (
    BaseSection,
    DataSection,
    GateSection,
    GuardSection,
    JudgeSection,
    PromptSection,
    RegressionSection,
    RuleSection,
    SafetySection,
    Section,
    Task,
    TaskKind,
    TaskSection,
    TrainSection,
    parse_size,
)
from tunegate.errors import InputError, Problem
from tunegate.files import hash_json
from tunegate.yaml_file import Parsed, parse, read_text

# what a task is made of is read from here
__all__ = [
    "BaseSection", "Config", "DataSection", "FaultyTask", "GateSection", "GuardSection", "JudgeSection",
    "PromptSection", "RegressionSection", "RuleSection", "SafetySection", "Section", "Task", "TaskKind", "TaskSection",
    "TrainSection", "default_lr", "describe_defaults", "load_config", "parse_size",
]  # fmt: skip

_ENTRIES: Entries = {"task.prompts": PromptSection, "gate.rules": RuleSection}  # the lists of mappings
STAND_IN = "-"  # what a required section of FaultyTask.rest names where it could not be kept
_STAND_INS = {"base": {"name": STAND_IN}, "data": {"train": [STAND_IN]}, "task": {"metric": "exact_match"}}
_SHORT = {"base": "name", "data": "train", "task": "metric"}
_SHORT_KEYS = {section: f"{section}.{key}" for section, key in _SHORT.items()}
_SECTIONS = [name for name, field in Task.model_fields.items() if inner_model(field.annotation) is not None]


@dataclass(frozen=True)
class Config:
    """A validated :class:`Task` with the folder relative paths start from and the origin of every value."""

    task: Task
    folder: Path
    origins: Mapping[str, str]

    @property
    def name(self) -> str:
        assert self.task.name is not None
        return self.task.name

    @property
    def run_dir(self) -> Path:
        return self.path(self.task.output or f"runs/{self.name}")

    def path(self, text: str) -> Path:
        """``text`` as a path; a relative one starts at the task file's folder."""
        try:
            return self.folder / Path(text).expanduser()
        except RuntimeError as error:  # ~name of a user who does not exist
            raise InputError(f"no such home folder: {error}", where=text, fix="write the folder's full path") from None

    @property
    def alpha(self) -> float:
        assert self.task.train.alpha is not None
        return self.task.train.alpha

    def settle(self, key: str, value: Any, reason: str) -> Config:
        """A copy with ``section.key`` set to ``value`` and ``reason`` as its origin."""
        section, name = key.split(".")
        part = getattr(self.task, section).model_copy(update={name: value})
        return dataclasses.replace(
            self,
            task=self.task.model_copy(update={section: part}),
            origins={**self.origins, key: reason},
        )

    def section_hash(self, *sections: str) -> str:
        return hash_json({s: getattr(self.task, s).model_dump(mode="json") for s in sections})

    def items(self) -> Iterator[tuple[str, Any, str]]:
        """Every ``(key, value, origin)`` in file order."""
        for key, value in _flatten(self.task.model_dump(mode="json")):
            yield key, value, self.origins.get(key, "default")


def _flatten(values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for section, value in values.items():
        if section in Task.model_fields and isinstance(value, dict):
            yield from ((f"{section}.{key}", inner) for key, inner in value.items())
        elif (
            value is not None or inner_model(Task.model_fields[section].annotation) is None
        ):  # not a section that is off
            yield section, value


def describe_defaults(base: str, data: str, metric: str) -> str:
    """A first task file: the three required keys, then every other key as a comment with its default."""
    lines = [
        "# A tunegate task. Only base, data and task are required; commented lines show the defaults.",
        f"base: {json.dumps(base)}",
        f"data: {json.dumps(data)}",
        f"task: {json.dumps(metric)}",
    ]
    for section, field in Task.model_fields.items():
        model = inner_model(field.annotation)
        if model is None:
            lines += [*[""] * lines[-1].startswith("#   "), _default_line("# ", section, field)]
            continue
        needed = [name for name, inner in model.model_fields.items() if inner.is_required()]
        note = f"   # as a mapping, the line above becomes {_SHORT[section]}: ..." if section in _SHORT else ""
        if not field.is_required() and field.default is None:
            how = f"needs {', '.join(needed)}" if needed else "this line without its # switches it on"
            note = f"   # off; {how}"
        lines += ["", f"# {section}:{note}"]
        lines += [_default_line("#   ", name, f) for name, f in model.model_fields.items() if name not in needed]
    return "\n".join(lines) + "\n"


def _default_line(indent: str, name: str, field: FieldInfo) -> str:
    """``name: default   # choices; meaning``"""
    default = field.get_default(call_default_factory=True)
    value = json.dumps(list(default) if isinstance(default, tuple) else default)
    notes = [" | ".join(map(str, choices_of(field.annotation))), field.description or ""]
    note = "; ".join(filter(None, notes))
    return f"{indent}{name}: {value}" + (f"   # {note}" if note else "")


def default_lr(parameters: int) -> tuple[float, str]:
    """Learning rate for a base of ``parameters`` weights, with its reason.

    2e-4 holds for 7-8 B (QLoRA paper, arXiv:2305.14314, table 9: 2e-4 at 7B and 13B, 1e-4 at 33B and 65B); smaller
    bases want more. The rule lr = 2e-4 * (8e9 / n)^0.4, kept within [1e-4, 1e-3], meets the paper's points and the
    1e-3 that SmolLM2-135M was measured to like.
    """
    lr = min(max(2e-4 * (8e9 / parameters) ** 0.4, 1e-4), 1e-3)
    lr = float(f"{lr:.2g}")
    return lr, f"default for {parameters / 1e6:,.0f}M parameters: 2e-4*(8e9/n)^0.4 within 1e-4..1e-3"


# --- reading -----------------------------------------------------------------------------------------------------


def _read(path: Path) -> Parsed:
    parsed = parse(read_text(path), str(path), path.name)
    if not isinstance(parsed.value, dict):
        empty = parsed.value is None
        raise InputError(
            "the file is empty" if empty else "a task is a mapping of keys",
            where=str(path),
            expected="" if empty else "base:, data:, task:",
            got="" if empty else type(parsed.value).__name__,
            fix="`tunegate init` writes a first task.yaml",
        )
    values, lines = parsed.value, parsed.lines
    for section, key in _SHORT.items():
        if isinstance(values.get(section), (str, list)):
            values[section] = {key: values[section]}
            lines[f"{section}.{key}"] = lines.get(section, 1)
            for entry in range(len(values[section][key])):
                lines[f"{section}.{key}.{entry}"] = lines.get(f"{section}.{entry}", lines.get(section, 1))
    for section in _SECTIONS:
        if section in values and values[section] is None:  # a section whose lines are all commented out
            values[section] = {}
    return parsed


def _apply_overrides(values: dict[str, Any], overrides: Sequence[str], problems: list[Problem]) -> set[str]:
    """Set ``section.key=value`` pairs; a value is YAML. Adds to ``problems``, returns the keys set."""
    done = set()
    for text in overrides:
        where = f"--set {text[:80]}"
        key, equals, raw = text.partition("=")
        if not equals or not key:
            problems.append(Problem("an override is KEY=VALUE", where, fix="for example --set train.rank=8"))
            continue
        try:
            parsed = parse(raw, where, where)
        except InputError as error:
            problems += error.problems
            continue
        problems += parsed.problems
        if key in _SHORT_KEYS and not isinstance(parsed.value, dict):
            key = _SHORT_KEYS[key]
        *sections, last = key.split(".")
        target: Any = values
        for part in sections:
            target = target.setdefault(part, {})
            if not isinstance(target, dict):
                problems.append(Problem(f"{part!r} is not a mapping of keys in the file", where))
                break
        else:
            target[last] = parsed.value
            done.add(key)
    return done


def freeze(value: Any) -> Any:
    """Lists as tuples, what strict pydantic takes for a tuple field."""
    if isinstance(value, dict):
        return {key: freeze(inner) for key, inner in value.items()}
    return tuple(freeze(inner) for inner in value) if isinstance(value, list) else value


class FaultyTask(InputError):
    """A task file with problems. ``rest`` is the task without what is wrong, for a look at what else is; a required
    section that cannot do without it holds a stand-in. ``sections``: where the problems are."""

    def __init__(self, problems: list[Problem], rest: Config, sections: AbstractSet[str]):
        super().__init__(problems)
        self.rest, self.sections = rest, sections


def load_config(path: Path | str, overrides: Sequence[str] = ()) -> Config:
    """Read ``path`` and ``--set`` overrides. :class:`InputError` lists every problem of the file: a
    :class:`FaultyTask` where it could be read as a mapping."""
    path = Path(path)
    parsed = _read(path)
    problems = parsed.problems
    overridden = _apply_overrides(parsed.value, overrides, problems)
    sections: set[str] = set()
    try:
        task = Task.model_validate(freeze(parsed.value))
    except ValidationError as error:
        problems += problems_of(error, Task, _ENTRIES, path.name, parsed.lines, overridden)
        task, sections = _without_faults(parsed.value, error)
    config = _with_origins(task, path, parsed.lines, overridden)
    if problems:
        raise FaultyTask(problems, config, sections)
    return config


def _without_faults(values: dict[str, Any], error: ValidationError) -> tuple[Task, set[str]]:
    """The task without the keys, or entries of a list, that ``error`` names, and the sections that they are in. A
    section that is wrong without them goes as a whole."""
    values = {
        key: dict(value) if isinstance(value, dict) else value
        for key, value in values.items()
        if key in Task.model_fields
    }
    places = {item["loc"] for item in error.errors(include_url=False)}
    cuts = {
        (place[2] if len(place) > 2 and isinstance(place[2], int) else -1, str(place[0]), "".join(map(str, place[1:2])))
        for place in places
    }
    for entry, section, key in sorted(cuts, reverse=True):  # the last entries of a list first
        held = values.get(section)
        if not key or not isinstance(held, dict):  # the section, or a key outside of sections
            values.pop(section, None)
        elif entry >= 0 and isinstance(held.get(key), list):
            held[key] = [*held[key][:entry], *held[key][entry + 1 :]]
        else:
            held.pop(key, None)
    sections = {str(place[0]) for place in places}
    try:
        return Task.model_validate(freeze(values)), sections
    except ValidationError as left:
        more = {str(item["loc"][0]) for item in left.errors(include_url=False)}
    whole = {key: value for key, value in values.items() if key not in more}
    stand_ins = {key: value for key, value in _STAND_INS.items() if key in more}
    return Task.model_validate(freeze({**whole, **stand_ins})), sections | more


def _with_origins(task: Task, path: Path, lines: Mapping[str, int], overridden: set[str]) -> Config:
    origins = {}
    for key, _ in _flatten(task.model_dump(mode="json")):
        if overridden_by(key, overridden):
            origins[key] = "--set"
        elif key in lines:
            origins[key] = f"{path.name}:{lines[key]}"
        else:
            origins[key] = "default"
    config = Config(task, path.resolve().parent, origins)
    if task.train.alpha is None:
        config = config.settle("train.alpha", 2.0 * task.train.rank, "default 2*rank")
    if task.name is None:
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", path.stem).strip("-._")[:100] or "task"
        config = dataclasses.replace(
            config,
            task=config.task.model_copy(update={"name": name}),
            origins={**config.origins, "name": "default: the file's name"},
        )
    return config
