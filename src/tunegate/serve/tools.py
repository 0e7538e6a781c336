"""Tool calls: how a template writes them, read back from an answer, and forced where a call is required.

Nothing is known of model families. A probe call is rendered by the renderer's own template, the one that training
rows went through, and a :class:`CallFormat` is read off it: the mark before a call (``<tool_call>``, ``[TOOL_CALLS]``,
none), the JSON's keys, the mark behind it, whether calls stand in a list. :class:`CallReader` takes an answer's text as
it comes and finds calls of that form. What is not a whole call of a tool that was offered stays text, as it was
written. A required call is the template's own opening put behind the prompt, and a JSON schema for the rest.

Templates that write calls in another form than JSON objects with a name are refused, and so are templates that leave
tools out: the model would never see them.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tunegate.data.render import Renderer
from tunegate.data.rows import JsonError, parse_json
from tunegate.errors import InputError
from tunegate.serve.text import held_back

_NAME, _KEY = "tunegate_probe", "tunegate_key"
_PROBE_TOOL = {
    "type": "function",
    "function": {
        "name": _NAME, "description": "A probe.",
        "parameters": {"type": "object", "properties": {_KEY: {"type": "integer"}}, "required": [_KEY]},
    },
}  # fmt: skip
_PROBE_CALL = {"id": "probe0000", "type": "function", "function": {"name": _NAME, "arguments": {_KEY: 1}}}
_QUESTION = {"role": "user", "content": "Question"}
_DECODER = json.JSONDecoder()


@dataclass(frozen=True)
class CallFormat:
    """How one template writes a call: ``opening`` is all that stands between the prompt and the JSON, ``mark`` its last
    word and ``closing`` what follows the JSON (both may be empty); ``arguments`` is the key of the arguments."""

    opening: str
    mark: str
    closing: str
    arguments: str
    listed: bool
    compact: bool


@dataclass(frozen=True)
class Call:
    """A call in an answer; ``arguments`` is JSON text."""

    id: str
    name: str
    arguments: str


def call_format(renderer: Renderer) -> CallFormat:
    """The format of ``renderer``'s template. :class:`InputError` if it takes no tools, or writes calls otherwise."""
    if not renderer.has_template:
        raise InputError("tools need a chat template, and this model has none", where="tools")
    plain, given = (renderer.rendered([_QUESTION], prompt=True, tools=tools) for tools in ((), [_PROBE_TOOL]))
    if plain == given or _NAME not in given:
        raise InputError(
            "this model's chat template leaves tools out, so the model would not see them",
            where="tools",
            fix="leave `tools` out, or describe them in a message",
        )
    answer = {"role": "assistant", "content": "", "tool_calls": [_PROBE_CALL]}
    try:
        whole = renderer.rendered([_QUESTION, answer], tools=[_PROBE_TOOL])
    except InputError:
        whole = ""
    found = _read_probe(whole[len(given) :], renderer) if whole.startswith(given) else None
    if found is None:
        raise InputError(
            "this model's chat template writes tool calls in a form that is not read here",
            where="tools",
            expected="a JSON object with the name and the arguments of the call",
            got=repr(whole[len(given) : len(given) + 80]) if whole.startswith(given) else "no call behind the prompt",
        )
    return found


def _read_probe(text: str, renderer: Renderer) -> CallFormat | None:
    at = text.rfind("{", 0, max(0, text.find(_NAME)))
    if at < 0:
        return None
    try:
        value, end = _DECODER.raw_decode(text, at)
    except ValueError:
        return None
    if not isinstance(value, dict) or value.get("name") != _NAME:
        return None
    arguments = next((key for key in ("arguments", "parameters") if value.get(key) == {_KEY: 1}), None)
    if arguments is None:
        return None
    opening, behind = text[:at], text[end:]
    listed = opening.endswith("[") and behind.startswith("]")
    opening, behind = (opening[:-1], behind[1:]) if listed else (opening, behind)
    stop = next(
        (m.start() for m in renderer.control.whole(behind) if renderer.control.ids[m[0]] in renderer.stop_ids), 0
    )
    mark = (opening.split() or [""])[-1]
    return CallFormat(opening, mark, behind[:stop].strip(), arguments, listed, '": ' not in text[at:end])


def call_schema(form: CallFormat, tools: Sequence[Mapping[str, Any]], several: bool) -> str:
    """The JSON schema of a call of one of ``tools``, as the template writes calls; ``several``: a list may hold more
    than one."""
    above = ("/items" if form.listed else "") + ("/anyOf/{}" if len(tools) > 1 else "")
    calls = []
    for number, tool in enumerate(tools):
        place = f"{above.format(number)}/properties/{form.arguments}"
        properties = {
            "name": {"const": tool["name"]},
            form.arguments: _moved(tool.get("parameters") or {"type": "object"}, place),
        }
        calls.append(
            {
                "type": "object",
                "properties": properties,
                "required": ["name", form.arguments],
                "additionalProperties": False,
            }
        )
    one = calls[0] if len(calls) == 1 else {"anyOf": calls}
    listed = {"type": "array", "items": one, "minItems": 1, **({} if several else {"maxItems": 1})}
    return json.dumps(listed if form.listed else one)


def _moved(schema: Any, place: str) -> Any:
    """``schema`` as it must be at ``place`` (a JSON pointer) of another: its references begin at the root."""
    if isinstance(schema, list):
        return [_moved(inner, place) for inner in schema]
    if not isinstance(schema, dict):
        return schema
    moved = {key: inner if key in ("const", "enum") else _moved(inner, place) for key, inner in schema.items()}
    if isinstance(schema.get("$ref"), str) and schema["$ref"].startswith("#"):
        moved["$ref"] = f"#{place}{schema['$ref'][1:]}"
    return moved


class CallReader:
    """Text in, text and calls out. ``names``: the tools that were offered; ``forced``: the answer is the JSON of calls
    alone, its opening was part of the prompt. A call is given out when it is whole."""

    def __init__(self, form: CallFormat, names: Sequence[str], forced: bool = False):
        self._form, self._names = form, frozenset(names)
        self._held = ""  # text that may be, or is, part of a call
        self._inside = forced or not form.mark
        self._forced = forced
        self._plain = False  # text that does not begin like a call, where no mark tells one
        self.calls = 0

    def push(self, text: str) -> tuple[str, list[Call]]:
        """The text that is no call, and the calls that are whole now."""
        self._held += text
        said, found = "", list[Call]()
        while True:
            before = (len(self._held), self._inside)
            part, calls = self._inner() if self._inside else self._outer()
            said, found = said + part, found + calls
            if (len(self._held), self._inside) == before:
                return said, found

    def finish(self) -> tuple[str, list[Call]]:
        """What was kept back: whole calls, else the text as it is."""
        held, self._held = self._held, ""
        if not self._inside:
            return ("" if self.calls and not held.strip() else held), []
        body = held.strip() if self._forced else held.strip().removeprefix(self._form.mark).strip()
        calls = self._calls(body)
        return ("", calls) if calls else (held, [])

    def _outer(self) -> tuple[str, list[Call]]:
        """Text up to a mark; the white space before it is kept back with it."""
        at = self._held.find(self._form.mark)
        self._inside = at >= 0
        end = at if at >= 0 else len(self._held) - held_back(self._held, [self._form.mark])
        text = self._held[:end].rstrip()
        self._held = self._held[len(text) :]
        return text, []

    def _inner(self) -> tuple[str, list[Call]]:
        """A call up to its closing; where nothing closes it, up to the answer's end, if it begins like JSON."""
        form = self._form
        if self._forced or (form.mark and not form.closing):
            return "", []
        start = len(self._held) - len(self._held.lstrip())
        if form.mark:
            end = self._held.find(form.closing, start + len(form.mark)) + len(form.closing)
            if end < len(form.closing):
                return "", []
            whole, self._held, self._inside = self._held[:end], self._held[end:], False
            calls = self._calls(whole[start + len(form.mark) : -len(form.closing)].strip())
            return ("", calls) if calls else (whole, [])
        if self._plain or self._held[start : start + 1] not in ("", "{", "["):
            text, self._held, self._plain = self._held, "", True
            return text, []
        return "", []

    def _calls(self, text: str) -> list[Call]:
        """The calls that ``text`` is, none if it is anything else."""
        values: list[Any] = []
        at = 0
        try:
            while at < len(text):
                end = _DECODER.raw_decode(text, at)[1]
                value = parse_json(text[at:end])
                values += value if isinstance(value, list) else [value]
                while end < len(text) and text[end] in " \t\r\n;":
                    end += 1
                at = end
        except (ValueError, RecursionError):
            return []
        calls = [call for call in map(self._call, values) if call is not None]
        if len(calls) != len(values):
            return []
        self.calls += len(calls)
        return calls

    def _call(self, value: Any) -> Call | None:
        if not isinstance(value, dict) or not isinstance(value.get("name"), str) or value["name"] not in self._names:
            return None
        rest = {key: inner for key, inner in value.items() if key not in ("name", "id", "type")}
        arguments = rest.pop(self._form.arguments, None)
        if isinstance(arguments, str):  # some models write the arguments as JSON text
            try:
                arguments = parse_json(arguments)
            except JsonError:
                return None
        if rest or not isinstance(arguments, dict):
            return None
        return Call(f"call_{secrets.token_hex(12)}", value["name"], json.dumps(arguments, ensure_ascii=False))
