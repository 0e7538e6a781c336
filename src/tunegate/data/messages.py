"""Checked chat messages: one shape, whatever the file wrote.

Content is a string (parts are joined, ``null`` is empty), a tool call is OpenAI's ``{"type": "function",
"function": {"name", "arguments"}}`` with ``arguments`` as an object, the form that chat templates expect. Then
the order of roles is checked: system only first, user and assistant in turn, tool results after the call.

It says what is wrong and repairs nothing: a row with a problem makes no example.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tunegate.data.rows import JsonError, excerpt, parse_json
from tunegate.data.types import Message
from tunegate.errors import Problem, nearest
from tunegate.files import canonical_json

ROLES = ("system", "user", "assistant", "tool")
SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bard": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_call": "assistant",
}
_FOLLOWERS = {
    None: ("system", "user"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user",),  # or tool, after a tool call
    "tool": ("tool", "assistant"),
}


class RowProblems:
    """Collects what is wrong with one row."""

    def __init__(self, where: str):
        self.where = where
        self.found: list[Problem] = []

    def add(self, what: str, **fields: str) -> None:
        self.found.append(Problem(what, self.where, **fields))


def is_json(value: Any) -> bool:
    """Whether ``value`` can be hashed and written as JSON (dates, bytes and the like cannot)."""
    try:
        canonical_json(value).encode("utf-8")
    except (TypeError, ValueError, RecursionError):
        return False
    return True


def kind_of(value: Any) -> str:
    """The JSON name of a value's type, with an excerpt."""
    names = {str: "text", dict: "an object", list: "a list", bool: "a boolean", int: "a number", float: "a number"}
    return "null" if value is None else f"{names.get(type(value), type(value).__name__)}: {excerpt(value)}"


def answer_text(value: Any) -> Any:
    """Numbers and booleans as text: labels come as such from Parquet and JSON. Anything else as it is."""
    return str(value) if isinstance(value, (int, float)) else value


def read_messages(value: Any, bad: RowProblems, field: str = "messages") -> list[Message]:
    """Messages of a chat row (``role``, ``content``); problems go to ``bad``, the list is then incomplete."""
    messages = []
    for i, item in _items(value, bad, field):
        message = {key: v for key, v in item.items() if v is not None}  # Parquet fills absent keys with null
        name = f"message {i} of {field}"
        role = message.get("role")
        if role not in ROLES:
            near = nearest(role, ROLES) if isinstance(role, str) else ""
            bad.add(f"unknown role in {name}", expected=" | ".join(ROLES), got=kind_of(role), fix=near)
            continue
        weight = message.pop("weight", 1)
        if weight != 1:
            bad.add(f"{name} has a weight", expected="no weight: every assistant turn is learned", got=str(weight))
        content = _content(message.get("content"), bad, name)
        calls = message.pop("tool_calls", None)
        if calls:
            message["tool_calls"] = _tool_calls(calls, bad, name)
            if role != "assistant":
                bad.add(f"tool_calls in {name}, whose role is {role!r}", expected="tool_calls of an assistant only")
        if content is None:
            continue
        message["content"] = content
        messages.append(message)
    return messages


def read_sharegpt(value: Any, bad: RowProblems, field: str = "conversations") -> list[Message]:
    """Messages of a ShareGPT row (``from``, ``value``), as :func:`read_messages`."""
    messages: list[Message] = []
    for i, item in _items(value, bad, field):
        sender, name = item.get("from"), f"message {i} of {field}"
        role = SHAREGPT_ROLES.get(sender) if isinstance(sender, str) else None
        if role is None:
            near = nearest(sender, list(SHAREGPT_ROLES)) if isinstance(sender, str) else ""
            bad.add(f"unknown sender in {name}", expected=" | ".join(SHAREGPT_ROLES), got=kind_of(sender), fix=near)
        elif sender == "function_call":
            messages.append({"role": role, "content": "", "tool_calls": _tool_calls(item.get("value"), bad, name)})
        else:
            content = _content(item.get("value"), bad, name)
            if content is not None:
                messages.append({"role": role, "content": content})
    return messages


def read_tools(value: Any, bad: RowProblems) -> tuple[dict[str, Any], ...]:
    """The tools offered in a row: a list of JSON objects, or the JSON text of one."""
    if isinstance(value, str):
        try:
            value = parse_json(value) if value.strip() else []
        except JsonError as error:
            bad.add(f"tools: {error.what}", got=error.got)
            return ()
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value) or not is_json(value):
        bad.add("tools have the wrong type", expected="a list of JSON objects", got=kind_of(value))
        return ()
    return tuple(value)


def _items(value: Any, bad: RowProblems, field: str) -> list[tuple[int, dict[str, Any]]]:
    if not isinstance(value, list) or not value:
        bad.add(f"{field} has the wrong type", expected="a list of messages, at least one", got=kind_of(value))
        return []
    items = []
    for i, item in enumerate(value, 1):
        if isinstance(item, dict) and is_json(item):
            items.append((i, item))
        else:
            bad.add(f"message {i} of {field} has the wrong type", expected="a JSON object", got=kind_of(item))
    return items


def _content(value: Any, bad: RowProblems, name: str) -> str | None:
    if isinstance(value, str) or value is None:
        return value or ""
    if isinstance(value, list) and all(isinstance(part, dict) for part in value):
        others = sorted({str(part.get("type")) for part in value} - {"text"})
        texts = [part.get("text") for part in value]
        if not others and all(isinstance(text, str) for text in texts):
            return "".join(texts)
        if others:
            what = f"{name} holds parts that are not text"
            bad.add(what, expected="text only: images and sound cannot be learned here", got=", ".join(others))
            return None
    bad.add(f"content of {name} has the wrong type", expected="text, or a list of text parts", got=kind_of(value))
    return None


def _tool_calls(value: Any, bad: RowProblems, name: str) -> list[dict[str, Any]]:
    """Calls as OpenAI writes them, with or without the ``function`` wrapper, or the JSON text of them."""
    try:
        value = parse_json(value) if isinstance(value, str) else value
        calls = []
        for call in value if isinstance(value, list) else [value]:
            wrapped = isinstance(call, dict) and isinstance(call.get("function"), dict)
            function = call["function"] if wrapped else call
            if not isinstance(function, dict) or not isinstance(function.get("name"), str):
                raise JsonError("a tool call without a name", kind_of(call))
            arguments = function.get("arguments")
            if isinstance(arguments, str):
                arguments = parse_json(arguments) if arguments.strip() else {}
            if not isinstance(arguments, dict):
                raise JsonError("arguments of a tool call must be a JSON object", kind_of(arguments))
            outer = {k: v for k, v in call.items() if wrapped and v is not None}
            calls.append({**outer, "type": "function", "function": {**function, "arguments": arguments}})
        return calls
    except JsonError as error:
        bad.add(f"tool call in {name}: {error.what}", expected='{"name": ..., "arguments": {...}}', got=error.got)
        return []


def check_order(messages: Sequence[Message], bad: RowProblems) -> None:
    """Empty turns and the order of roles. One order problem a row: what follows it is not to be trusted."""
    for i, message in enumerate(messages):
        empty = not message["content"].strip()
        if empty and message["role"] == "assistant" and not message.get("tool_calls"):
            bad.add("the answer is empty", expected="text, or a tool call", got=f"message {i + 1}: an empty answer")
        elif empty and message["role"] == "user":
            bad.add("the user's text is empty", expected="text", got=f"message {i + 1}: empty")
    before: str | None = None
    for i, message in enumerate(messages):
        allowed = _FOLLOWERS[before]
        if before == "assistant" and messages[i - 1].get("tool_calls"):
            allowed = ("tool", "user")
        if message["role"] not in allowed:
            place = f"after {before!r}" if before else "first"
            got = f"message {i + 1} is {message['role']!r}, {place}"
            bad.add("roles in the wrong order", expected=f"{' or '.join(allowed)} {place}", got=got)
            return
        before = message["role"]
    if before != "assistant":
        what = "the row does not end with an answer"
        bad.add(what, expected="the last message is the assistant's", got=f"it is {before!r}")
