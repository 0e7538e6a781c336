"""YAML 1.2 text to plain values, with the line of every key.

PyYAML reads YAML 1.1, where ``yes`` is True, ``010`` is 8, ``1:30`` is 90 and ``1e-3`` is text. The loader here has the
scalars of YAML 1.2's core schema and builds nothing but mappings, lists, text, numbers, booleans and null: every other
tag is an error. Aliases and merge keys work, up to a bound on what they expand to. Keys that stand twice are
collected, not overwritten in silence.

It does not know which keys a task has: ``config`` does.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tunegate.errors import InputError, Problem, nearest

MAX_BYTES = 1 << 20  # a task is a page of text; a data file given by mistake is refused before it is parsed
MAX_NODES = 100_000  # after expanding aliases ("billion laughs")


class _Loader(yaml.SafeLoader):
    """Only the core schema of YAML 1.2 (https://yaml.org/spec/1.2.2/#103-core-schema) and the merge key ``<<``."""


_TAG = "tag:yaml.org,2002:"
_BOOL = re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$")
_INT = re.compile(r"^(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)$")
_FLOAT = re.compile(
    r"^(?:[-+]?(?:\.[0-9]+|[0-9]+\.[0-9]*)(?:[eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+"
    r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
)

_Loader.yaml_implicit_resolvers = {
    first: [(tag, expr) for tag, expr in pairs if tag in (_TAG + "null", _TAG + "merge")]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_TAG + "bool", _BOOL, list("tTfF"))
_Loader.add_implicit_resolver(_TAG + "int", _INT, list("-+0123456789"))
_Loader.add_implicit_resolver(_TAG + "float", _FLOAT, list("-+.0123456789"))


def _scalar(loader: _Loader, node: yaml.Node, form: re.Pattern[str], kind: str) -> str:
    text = str(loader.construct_scalar(node))  # type: ignore[arg-type]
    if not form.match(text):
        raise yaml.constructor.ConstructorError(None, None, f"{text[:40]!r} is not {kind}", node.start_mark)
    return text


def _construct_bool(loader: _Loader, node: yaml.Node) -> bool:
    return _scalar(loader, node, _BOOL, "a boolean").lower() == "true"


def _construct_int(loader: _Loader, node: yaml.Node) -> int:
    text = _scalar(loader, node, _INT, "a whole number")
    if len(text) > 100:  # far past any setting, and below Python's limit on digits
        raise yaml.constructor.ConstructorError(None, None, f"a number of {len(text)} digits", node.start_mark)
    return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))


def _construct_float(loader: _Loader, node: yaml.Node) -> float:
    text = _scalar(loader, node, _FLOAT, "a number").lower()
    return float(text.replace(".inf", "inf").replace(".nan", "nan"))


def _construct_str(loader: _Loader, node: yaml.Node) -> str:
    text = str(loader.construct_scalar(node))  # type: ignore[arg-type]
    for char in text:  # escapes can make them; neither can be a path, be hashed as UTF-8 or be printed
        if char == "\0" or "\ud800" <= char <= "\udfff":
            problem = f"the character \\u{ord(char):04x} cannot stand in a text"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
    return text


_Loader.yaml_constructors = {
    _TAG + "null": yaml.SafeLoader.construct_yaml_null,
    _TAG + "seq": yaml.SafeLoader.construct_yaml_seq,
    _TAG + "map": yaml.SafeLoader.construct_yaml_map,
    None: yaml.SafeLoader.construct_undefined,
}
_Loader.add_constructor(_TAG + "bool", _construct_bool)
_Loader.add_constructor(_TAG + "int", _construct_int)
_Loader.add_constructor(_TAG + "float", _construct_float)
_Loader.add_constructor(_TAG + "str", _construct_str)


@dataclass
class Parsed:
    """``value`` as plain Python, ``lines`` from dotted key (list entries by index) to line, duplicate keys."""

    value: Any
    lines: dict[str, int] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)


class _Walk:
    """Lines and duplicates of a node tree; aliases are walked as often as they are used."""

    def __init__(self, parsed: Parsed, file: str):
        self.parsed, self.file, self.left = parsed, file, MAX_NODES

    def walk(self, node: yaml.Node, prefix: str) -> None:
        self.left -= 1
        if self.left < 0:
            raise InputError(
                f"more than {MAX_NODES:,} entries with its aliases expanded",
                where=self.file,
                fix="a task is a page of text",
            )
        if isinstance(node, yaml.MappingNode):
            self._mapping(node, prefix)
        elif isinstance(node, yaml.SequenceNode):
            for index, value in enumerate(node.value):
                path = f"{prefix}.{index}"
                self.parsed.lines.setdefault(path, value.start_mark.line + 1)
                self.walk(value, path)

    def _mapping(self, node: yaml.MappingNode, prefix: str) -> None:
        seen: dict[str, int] = {}
        merged: list[yaml.Node] = []
        for key, value in node.value:
            self.walk(key, prefix)
            if not isinstance(key, yaml.ScalarNode):  # the constructor refuses it: a list or mapping as a key
                continue
            name, line = key.value, key.start_mark.line + 1
            path = f"{prefix}.{name}" if prefix else name
            if name in seen and key.tag != _TAG + "merge":
                first = f"keep one; the first is in line {seen[name]}"
                self.parsed.problems.append(Problem(f"key {path!r} stands twice", f"{self.file}:{line}", fix=first))
            seen.setdefault(name, line)
            self.parsed.lines.setdefault(path, line)
            if key.tag == _TAG + "merge":
                merged += value.value if isinstance(value, yaml.SequenceNode) else [value]
            else:
                self.walk(value, path)
        for part in merged:  # last: a key written here goes before one that a merge brings in
            self.walk(part, prefix)


def parse(text: str, where: str, file: str) -> Parsed:
    """Parse one YAML document. ``where`` names the source in errors, ``file`` in the problems of single lines."""
    parsed = Parsed(None)
    try:
        node = yaml.compose(text, Loader=_Loader)
        if node is not None:
            _Walk(parsed, file).walk(node, "")
            loader = _Loader("")
            try:
                parsed.value = loader.construct_document(node)
            finally:
                loader.dispose()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        context = getattr(error, "context", None)
        problem = getattr(error, "problem", None) or getattr(error, "reason", None) or str(error)
        raise InputError(
            f"not valid YAML: {context + ', ' if context else ''}{problem}",
            where=f"{where}:{mark.line + 1}:{mark.column + 1}" if mark else where,
            fix="check the indentation and the quotes around that place",
        ) from None
    except RecursionError:
        raise InputError("nested too deep to be a task", where=where) from None
    except (ValueError, OverflowError) as error:  # PyYAML lets some through: "\UFFFFFFFF", %YAML 1.<5000 digits>
        raise InputError(f"not valid YAML: {error}", where=where) from None
    return parsed


def _a_folder(path: Path, where: str) -> InputError:
    names = sorted(p.name for p in path.glob("*.y*ml"))[:5]
    fix = f"name a file in it: {', '.join(names)}" if names else "name the task's YAML file"
    return InputError("the task is a folder, not a file", where=where, fix=fix)


def read_text(path: Path) -> str:
    """The UTF-8 text of ``path``, or an :class:`InputError` that says what the file is instead."""
    where = str(path)
    first = "`tunegate init` writes a first task.yaml"
    try:
        with path.open("rb") as handle:
            data = handle.read(MAX_BYTES + 1)
    except IsADirectoryError:
        raise _a_folder(path, where) from None
    except FileNotFoundError:
        names = [p.name for p in sorted(path.parent.glob("*.y*ml"))] if path.parent.is_dir() else []
        near = nearest(path.name, names) or (f"this folder has {', '.join(names[:5])}" if names else "")
        raise InputError("no such file", where=where, fix=near or first) from None
    except (OSError, ValueError) as error:  # no permission, a name too long or with a NUL, a file used as a folder
        if isinstance(error, PermissionError) and path.is_dir():  # Windows reports PermissionError for a folder
            raise _a_folder(path, where) from None
        raise InputError(f"cannot read: {getattr(error, 'strerror', None) or error}", where=where) from None
    if len(data) > MAX_BYTES:
        raise InputError(
            "too large to be a task", where=where, expected="at most 1 MiB", fix="is this the data? name the YAML file"
        )
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise InputError("UTF-16 text, not UTF-8", where=where, fix="save the file as UTF-8")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        got = f"byte 0x{data[error.start]:02x} at offset {error.start}"
        raise InputError("not UTF-8 text", where=where, got=got, fix="save the file as UTF-8") from None
    if "\0" in text:
        got = f"byte 0x00 at offset {data.index(0)}"
        raise InputError("a binary or UTF-16 file, not UTF-8 text", where=where, got=got, fix="save it as UTF-8")
    if not text.strip():
        raise InputError("the file is empty", where=where, fix=first)
    return text
