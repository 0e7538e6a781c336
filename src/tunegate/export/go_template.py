"""A chat template as a Go template, where that is possible, and Ollama's Modelfile around it.

Jinja is a language and cannot be translated as such. Almost all chat templates compute something simple, though: fixed
text around the content of each turn. That text is found by rendering conversations of marker words, and believed only
if putting it together gives what the template renders for other conversations too: with and without a system message,
with several turns, with white space inside and around contents. A system message may stand in a turn of its own or in
front of the first user message; a default one becomes ``SYSTEM``.

What this form cannot say is named: tools, contents that the template trims, anything else it computes. Ollama then gets
``{{ .Prompt }}``, which is for prompts that the caller has rendered.

Source: Ollama's ``docs/template.mdx`` and ``docs/modelfile.mdx``. It runs no Go.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from tunegate.errors import TunegateError

Render = Callable[[Sequence[Mapping[str, str]], bool], str]
_S, _U, _A, _V, _B = "Wsystemw", "Wuserw", "Wanswerw", "Wsecondw", "Wreplyw"
RAW = "{{ .Prompt }}"


@dataclass(frozen=True)
class Turns:
    """Text before and after the content of each role. ``joined``: text between a system message and the first user
    message that it stands in; None where it has a turn of its own. ``generation`` opens the answer. ``default_system``
    is rendered where no system message is given. ``trims``: contents lose their outer white space."""

    start: str
    around: Mapping[str, tuple[str, str]]
    joined: str | None
    generation: str
    default_system: str | None = None
    trims: bool = False

    def text(self, messages: Sequence[Mapping[str, str]], prompt: bool) -> str:
        """What the Go template gives for ``messages``."""
        system, turns = None, list(messages)
        if turns and turns[0]["role"] != "system" and self.default_system is not None:
            turns.insert(0, {"role": "system", "content": self.default_system})
        if self.joined is not None and turns and turns[0]["role"] == "system":
            system = turns.pop(0)["content"]
        parts = [self.start]
        for number, turn in enumerate(turns):
            before, after = self.around[turn["role"]]
            content = turn["content"] if system is None or number else f"{system}{self.joined}{turn['content']}"
            parts += [before, content, after]
        return "".join(parts) + (self.generation if prompt else "")

    def go(self, leave_out: str = "") -> str:
        """The Go template, without ``leave_out`` (the BOS, where the server writes it) at its beginning."""
        around = {role: tuple(map(_literal, pair)) for role, pair in self.around.items()}
        user, answer = around["user"], around["assistant"]
        if self.joined is None:
            system = around["system"]
            own = f'{{{{ if eq .Role "system" }}}}{system[0]}{{{{ .Content }}}}{system[1]}{{{{ else if '
            head, first = "{{ range .Messages }}" + own, ""
        else:
            head = "{{ range $i, $_ := .Messages }}{{ if "
            first = f"{{{{ if and $.System (eq $i 1) }}}}{{{{ $.System }}}}{_literal(self.joined)}{{{{ end }}}}"
        text = (
            f'{head}eq .Role "user" }}}}{user[0]}{first}{{{{ .Content }}}}{user[1]}'
            f'{{{{ else if eq .Role "assistant" }}}}{answer[0]}{{{{ .Content }}}}{answer[1]}{{{{ end }}}}{{{{ end }}}}'
            f"{_literal(self.generation)}"
        )
        opening = _literal(self.start)
        if leave_out and self.start:
            return opening.removeprefix(leave_out) + text
        return opening + text.replace(_literal(leave_out), "", 1) if leave_out else opening + text


def _literal(text: str) -> str:
    return text.replace("{{", '{{ "{{" }}')


def find_turns(render: Render, examples: Sequence[Sequence[Mapping[str, str]]]) -> Turns | str:
    """The turns of a template, or in words why it is not made of turns.

    ``render`` takes messages and whether to open an answer. ``examples`` are conversations that must come out alike,
    such as the golden prompts.
    """
    try:
        found = _guess(render)
    except _Other as error:
        return str(error)
    except TunegateError as error:
        return f"it refuses a plain conversation: {error.problems[0].got or error.problems[0].what}"
    return _checked(render, found, examples)


class _Other(Exception):
    """Why a template is something else than turns."""


def _chat(*turns: tuple[str, str]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in turns]


def _cut(text: str, *marks: str) -> list[str]:
    """``text`` between markers that stand in it once and in this order."""
    parts = []
    for mark in marks:
        before, found, text = text.partition(mark)
        if not found or mark in text:
            raise _Other("it does not write every message once, in order")
        parts.append(before)
    return [*parts, text]


def _guess(render: Render) -> Turns:
    user, answer, second = ("user", _U), ("assistant", _A), ("user", _V)
    opening, user_after = _cut(render(_chat(user), False), _U)
    asked = render(_chat(user), True)
    if not asked.startswith(opening + _U + user_after):
        raise _Other("the prompt of an answer does not begin as the conversation does")
    generation = asked[len(opening + _U + user_after) :]
    _, between, answer_after = _cut(render(_chat(user, answer), False), _U, _A)
    _, _, next_turn, _ = _cut(render(_chat(user, answer, second), False), _U, _A, _V)
    if not between.startswith(user_after) or not next_turn.startswith(answer_after):
        raise _Other("a turn is written otherwise when another one follows")
    user_before = next_turn[len(answer_after) :]
    if not opening.endswith(user_before):
        raise _Other("the first user message is written otherwise than later ones")
    start = opening[: len(opening) - len(user_before)]
    around = {"user": (user_before, user_after), "assistant": (between[len(user_after) :], answer_after)}
    before, joint, _ = _cut(render(_chat(("system", _S), user), False), _S, _U)
    if before.endswith(user_before) and before == opening:
        return Turns(start, around, joint, generation)
    if not joint.endswith(user_before):
        raise _Other("a system message is neither a turn of its own nor part of the first user message")
    system_after = joint[: len(joint) - len(user_before)]
    if before.startswith(start) and not start.startswith(before):
        return Turns(start, {**around, "system": (before[len(start) :], system_after)}, None, generation)
    if start.startswith(before) and start.endswith(system_after):  # written although no system message was given
        default = start[len(before) : len(start) - len(system_after)]
        return Turns("", {**around, "system": (before, system_after)}, None, generation, default)
    raise _Other("what stands before the first message depends on whether it is a system message")


def _checked(render: Render, turns: Turns, examples: Sequence[Sequence[Mapping[str, str]]]) -> Turns | str:
    user, answer, second = ("user", "One\n\n two"), ("assistant", "A reply."), ("user", "And then?\nYes.")
    system = ("system", "Be brief.\nAlways.")
    conversations = [
        _chat(user), _chat(system, user), _chat(user, answer, second), _chat(system, user, answer, second),
        _chat(system, user, answer, second, answer, user), *examples,
    ]  # fmt: skip
    for messages in conversations:
        try:
            if any(turns.text(messages, prompt) != render(messages, prompt) for prompt in (False, True)):
                return "it computes more than text around each message"
        except KeyError as error:
            return f"it has turns of the role {error.args[0]!r}"
        except TunegateError:
            return "it refuses some conversations"
    spaced = _chat(("user", "  indented \n"))
    return Turns(**{**vars(turns), "trims": turns.text(spaced, True) != render(spaced, True)})


def modelfile(turns: Turns | str, *, gguf: str, stops: Sequence[str], bos: str, about: Sequence[str]) -> str:
    """Ollama's Modelfile. ``bos`` is the text that the server puts in front by itself, empty for none."""
    template = RAW if isinstance(turns, str) else turns.go(bos)
    lines = [f"# {' '.join(line.split())}" for line in about]  # a line break in a name would begin an instruction
    if isinstance(turns, str):
        lines += [f"# The chat template cannot be a Go template: {turns}.", "# Send prompts that you have rendered."]
    lines += [f"FROM ./{gguf}", f"TEMPLATE {_quoted(template)}"]
    if not isinstance(turns, str) and turns.default_system:
        lines.append(f"SYSTEM {_quoted(turns.default_system)}")
    lines += [f"PARAMETER stop {_quoted(stop)}" for stop in stops]
    lines.append("PARAMETER temperature 0")  # as the adapter was evaluated
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    if '"""' in text or text.endswith('"'):
        what = "a Modelfile cannot hold three quotation marks in a row, nor end a text with one"
        raise TunegateError(what, got=text[-80:])
    return f'"""{text}"""'
