"""Chat templates: which one a base uses, and one call that renders it.

The template is Jinja text, run in transformers' sandbox and compiled once. Templates that print today's date would
render differently every day; here ``strftime_now`` always answers 26 July 2024, the date that Llama's templates
fall back to. Whatever a template raises becomes an :class:`InputError` that names the roles it was given.

It knows no token ids.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from tunegate.data.types import Message
from tunegate.errors import InputError, nearest
from tunegate.files import hash_json

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message.role + '\n' + (message.content or '') + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
PLAIN = (
    "{% for message in messages %}"
    "{{ message.content }}{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% if not loop.last or add_generation_prompt %}{{ '\n' }}{% endif %}"
    "{% endfor %}"
)
TEMPLATES = {"chatml": CHATML, "plain": PLAIN}
"""Templates a user can name for a base without one. ``plain``: contents joined by newlines, eos after answers."""

_MARKERS = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_DATE = datetime(2024, 7, 26)


def _with_fixed_date(template: str) -> str:
    """``template`` with ``strftime_now`` answering one date: a macro of that name in front shadows the clock."""
    if "strftime_now" not in template:
        return template
    steps = "".join(f"|replace('%{c}', '{_DATE.strftime('%' + c)}')" for c in "aAbBdeHIjmMpSuwyY")
    return "{% macro strftime_now(format) %}{{ format" + steps + " }}{% endmacro +%}" + template


class ChatTemplate:
    """The template of ``tokenizer``, or the one that ``template`` names.

    ``template`` is None (the tokenizer's own, possibly none), a name in ``TEMPLATES`` or among the tokenizer's
    templates, or Jinja text. ``adds_bos``: the tokenizer's own default writes a BOS, so the named templates,
    which are meant for bases without one, write it too. ``source`` and ``tool_source`` (for rows with tools) are
    what is rendered; ``hash`` covers them and the special tokens they can write.
    """

    def __init__(self, tokenizer: Any, template: str | None, adds_bos: bool):
        self._variables: dict[str, Any] = {
            name: token if isinstance(token, str) else [str(t) for t in token]
            for name, token in tokenizer.special_tokens_map.items()
        }
        pair = _choose(tokenizer, template, adds_bos)
        self.source: str | None = _with_fixed_date(pair[0]) if pair else None
        self.tool_source: str | None = _with_fixed_date(pair[1]) if pair else None
        self.hash = hash_json([self.source, self.tool_source, self._variables])

    def uses_markers(self, tools: Sequence[Any] = ()) -> bool:
        """Whether the template for such rows marks the assistant's text with ``{% generation %}``."""
        return bool(_MARKERS.search((self.tool_source if tools else self.source) or ""))

    def render(
        self, messages: Sequence[Message], tools: Sequence[Any] = (), *, prompt: bool = False, spans: bool = False
    ) -> tuple[str, list[tuple[int, int]]]:
        """The text of ``messages``, with the generation prompt behind it if ``prompt``.

        With ``spans`` also the (start, end) characters that the template marks as generated.
        """
        from transformers.utils.chat_template_utils import render_jinja_template

        source = self.tool_source if tools else self.source
        if source is None:
            raise InputError(
                "the tokenizer has no chat template",
                fix="use an instruct base, or choose a template: `base.template: plain`, `chatml` or Jinja text",
            )
        try:
            render: Any = render_jinja_template  # its annotations do not cover the template's own variables
            texts, found = render(
                conversations=[list(messages)],
                tools=list(tools) or None,
                chat_template=source,
                add_generation_prompt=prompt,
                return_assistant_tokens_mask=spans,
                **self._variables,
            )
        except Exception as error:  # the template is the base's program: it may fail in any way
            roles = " ".join(str(m.get("role")) for m in messages[:8]) or "no message"
            raise InputError(
                "the chat template refuses these messages",
                expected="messages that the base's template can render",
                got=f"{type(error).__name__}: {error} (roles: {roles})"[:300],
                fix="change the messages, or choose another template (base.template)",
            ) from error
        return texts[0], [(start, end) for start, end in found[0]] if found else []


def _choose(tokenizer: Any, template: str | None, adds_bos: bool) -> tuple[str, str] | None:
    """The templates for rows without and with tools."""
    own = tokenizer.chat_template
    named = own if isinstance(own, dict) else {}
    if template is None:
        if not own:
            return None
        if named and "default" not in named:
            raise InputError(
                "the base has several chat templates and no default",
                got=", ".join(sorted(named)),
                fix="name one in base.template",
            )
        return tokenizer.get_chat_template(None), tokenizer.get_chat_template(None, tools=[{}])
    if template in named:
        text = named[template]
    elif template in TEMPLATES:
        text = ("{{ bos_token }}" if adds_bos else "") + TEMPLATES[template]
    elif "{" in template:
        text = template
    else:
        known = [*TEMPLATES, *named]
        fix = nearest(template, known) or f"known names: {', '.join(known)}"
        raise InputError(f"unknown chat template {template!r}", expected="a name or Jinja text", fix=fix)
    return text, text
