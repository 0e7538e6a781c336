"""A checked request and the model it names as jobs for the engine, and how their answers are to be read.

Prompts go through the model's own :class:`Renderer`, with the tools as training rows had them. An answer is held to at
most one form: a response format, one of vLLM's structured outputs, or a call of a tool. Everything that does not fit
the model (ids outside of the vocabulary, a prompt longer than the context) is found here and reported together.

It is plain computation, and long for long prompts: the routes run it on a thread of its own.
"""

from __future__ import annotations

import json
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tunegate.data.messages import RowProblems, read_messages
from tunegate.data.render import Renderer
from tunegate.data.rows import JsonError, parse_json
from tunegate.data.types import Message
from tunegate.engine.constrain import AnswerForm, form_problem
from tunegate.errors import InputError, Problem, TunegateError, collecting
from tunegate.serve.catalogue import Served
from tunegate.serve.jobs import EngineFacts, Job, Picking
from tunegate.serve.openai_requests import (
    FUNCTION_NAME,
    ChatMessage,
    ChatRequest,
    CompletionRequest,
    Sampling,
    StructuredOutputs,
    TokenizeRequest,
    Tool,
)
from tunegate.serve.text import Words
from tunegate.serve.tools import CallFormat, call_format, call_schema

MOST_ECHOED = 1 << 18  # log-probabilities of prompts in one answer: some 15 MB
COMPLETION_TOKENS = 16  # OpenAI's default for completions; a chat may go on to the end of the context
Form = tuple[str, str | tuple[str, ...], bool]


@dataclass(frozen=True)
class Calls:
    """How calls are found in an answer: the names offered, whether one is forced, whether one is all."""

    format: CallFormat
    names: tuple[str, ...]
    forced: bool
    single: bool


@dataclass(frozen=True)
class Plan:
    """``jobs[i]`` makes choice i; its prompt is ``i // n``. ``echo``: the prompts as text, where they are asked for."""

    served: Served
    words: Words
    jobs: tuple[Job, ...]
    n: int
    stops: tuple[str, ...] = ()
    calls: Calls | None = None
    echo: tuple[str, ...] = ()

    @property
    def prompt_tokens(self) -> int:
        return sum(len(job.tokens) for job in self.jobs[:: self.n])


class Known:
    """What is worked out once for each renderer: its tokens, and how it writes calls."""

    def __init__(self) -> None:
        self._words: weakref.WeakKeyDictionary[Renderer, Words] = weakref.WeakKeyDictionary()
        self._formats: weakref.WeakKeyDictionary[Renderer, CallFormat] = weakref.WeakKeyDictionary()

    def words(self, renderer: Renderer) -> Words:
        if renderer not in self._words:
            self._words[renderer] = Words(renderer)
        return self._words[renderer]

    def call_format(self, renderer: Renderer) -> CallFormat:
        if renderer not in self._formats:
            self._formats[renderer] = call_format(renderer)
        return self._formats[renderer]


def chat_plan(asked: ChatRequest, served: Served, facts: EngineFacts, known: Known) -> Plan:
    """:class:`InputError` with everything that does not fit."""
    problems: list[Problem] = []
    renderer, form, calls = served.renderer, None, None
    prompt: list[int] = []
    with collecting(problems):
        form = _form(asked)
    with collecting(problems):
        calls, forced = _calls(asked, renderer, known)
        if forced is not None and form is not None:
            raise InputError("a required tool call leaves no room for another form of answer", where="tool_choice")
        form = forced or form
    with collecting(problems):
        prompt = render_chat(renderer, asked.messages, asked.tools or [])
        if calls is not None and calls.forced:
            prompt += renderer.tokenizer(calls.format.opening, add_special_tokens=False)["input_ids"]
    logprobs = (asked.top_logprobs or 0) if asked.logprobs else None
    limit = asked.max_completion_tokens or asked.max_tokens
    job = _job(asked, served, facts, problems, form, logprobs)
    jobs = _fitted([prompt] if prompt else [], job, limit, facts, problems, "messages")
    if problems:
        raise InputError(problems)
    stops = tuple(asked.stop or ())
    return Plan(served, known.words(renderer), _copies(jobs, asked.n or 1), asked.n or 1, stops, calls)


def completion_plan(asked: CompletionRequest, served: Served, facts: EngineFacts, known: Known) -> Plan:
    """:class:`InputError` with everything that does not fit."""
    problems: list[Problem] = []
    renderer, form = served.renderer, None
    prompts: list[list[int]] = []
    with collecting(problems):
        form = _form(asked)
    for number, prompt in enumerate(asked.prompt):
        with collecting(problems):
            ids = text_prompt(renderer, prompt) if isinstance(prompt, str) else prompt
            _check_ids(ids, facts, f"prompt[{number}]" if len(asked.prompt) > 1 else "prompt")
            prompts.append(ids)
    limit = COMPLETION_TOKENS if asked.max_tokens is None else asked.max_tokens
    job = _job(asked, served, facts, problems, form, asked.logprobs)
    if asked.echo:
        job = replace(job, prompt_logprobs=asked.logprobs)
    jobs = _fitted(prompts, job, limit, facts, problems, "prompt")
    if problems:
        raise InputError(problems)
    echo = tuple(p if isinstance(p, str) else renderer.decode(p) for p in asked.prompt) if asked.echo else ()
    n = asked.n or 1
    if asked.echo and asked.logprobs is not None:
        _check_echoed(n * (1 + asked.logprobs) * sum(len(job.tokens) for job in jobs))
    return Plan(served, known.words(renderer), _copies(jobs, n), n, tuple(asked.stop or ()), echo=echo)


def _check_echoed(count: int) -> None:
    if count > MOST_ECHOED:
        raise InputError(
            "too many log-probabilities of prompts", where="echo with logprobs", expected=f"at most {MOST_ECHOED:,}",
            got=f"{count:,}", fix="fewer prompts or answers in one request, or fewer logprobs",
        )  # fmt: skip


def tokenized(asked: TokenizeRequest, served: Served) -> list[int]:
    """The ids that a request with this prompt would give the model."""
    if asked.messages is not None:
        return render_chat(served.renderer, asked.messages, asked.tools or [])
    assert asked.prompt is not None
    ids = served.renderer.text_ids(asked.prompt)
    begins = served.renderer.adds_bos and not asked.add_special_tokens
    return ids[1:] if begins else ids


def render_chat(renderer: Renderer, messages: Sequence[ChatMessage], tools: Sequence[Tool]) -> list[int]:
    """The prompt's ids, by the reader and the renderer that training rows went through."""
    bad = RowProblems("messages")
    read = read_messages([_as_in_a_row(message) for message in messages], bad)
    if bad.found:
        raise InputError(bad.found)
    given = [tool.raw for tool in tools]
    ids = _prompt_ids(renderer, read, given)
    _check_calls(renderer, read, given)
    return ids


def _check_calls(renderer: Renderer, messages: Sequence[Message], tools: Sequence[dict[str, Any]]) -> None:
    """:class:`InputError` for calls in ``messages`` that the prompt says nothing of. Names that a template may have to
    escape are not looked for."""
    found = [call["function"]["name"] for message in messages for call in message.get("tool_calls", ())]
    names = sorted({name for name in found if FUNCTION_NAME.fullmatch(name)})
    text = renderer.rendered(messages, prompt=True, tools=tools) if names else ""
    if lost := [name for name in names if name not in text]:
        raise InputError(
            "this model's chat template leaves tool calls out, so the model would not see them", where="messages",
            got=", ".join(lost[:5]), fix="say in a message's content what was called",
        )  # fmt: skip


def _as_in_a_row(message: ChatMessage) -> dict[str, Any]:
    """A message as rows have it: ``system`` for its newer name, and calls with the name first. OpenAI's client sends
    the arguments first, and some templates write a call's keys as they come."""
    raw = {**message.raw, "role": "system" if message.role == "developer" else message.role}
    if message.tool_calls:
        raw["tool_calls"] = [
            {**call, "function": {"name": None, "arguments": None, **call["function"]}} for call in raw["tool_calls"]
        ]
    return raw


def _prompt_ids(renderer: Renderer, messages: list[Message], tools: list[dict[str, Any]]) -> list[int]:
    try:
        ids = renderer.prompt_ids(messages, tools)
    except TunegateError as error:  # whatever stops a prompt from being rendered is said of the prompt
        raise InputError([replace(p, where=p.where or "messages") for p in error.problems]) from error
    if not ids:
        raise InputError("the messages give no tokens", where="messages")
    return ids


def text_prompt(renderer: Renderer, prompt: str) -> list[int]:
    try:
        ids = renderer.text_ids(prompt)
    except TunegateError as error:
        raise InputError([replace(p, where=p.where or "prompt") for p in error.problems]) from error
    if not ids:
        raise InputError("the prompt has no tokens", where="prompt", expected="at least one")
    return ids


# --- jobs ---------------------------------------------------------------------------------------------------------


def _job(
    asked: Sampling,
    served: Served,
    facts: EngineFacts,
    problems: list[Problem],
    form: Form | None,
    logprobs: int | None,
) -> Job:
    """The job without a prompt."""

    def chosen(value: float | None, default: float) -> float:
        return default if value is None else float(value)

    bias = tuple((int(key), float(value)) for key, value in (asked.logit_bias or {}).items())
    with collecting(problems):
        _check_ids([i for i, _ in bias], facts, "logit_bias")
    with collecting(problems):
        _check_ids(asked.stop_token_ids or [], facts, "stop_token_ids")
    stop_ids: tuple[int, ...] = ()
    with collecting(problems):
        stop_ids = () if asked.ignore_eos else served.renderer.stop_ids
    if asked.ignore_eos and form is not None:
        problems.append(Problem("a form ends with a stop token, so `ignore_eos` does not go with it", "ignore_eos"))
    picking = Picking(
        temperature=chosen(asked.temperature, 1.0),
        top_p=chosen(asked.top_p, 1.0),
        top_k=max(0, asked.top_k or 0),
        min_p=chosen(asked.min_p, 0.0),
        presence=chosen(asked.presence_penalty, 0.0),
        frequency=chosen(asked.frequency_penalty, 0.0),
        repetition=chosen(asked.repetition_penalty, 1.0),
        logit_bias=bias,
        seed=asked.seed,
    )
    stops = tuple(dict.fromkeys((*stop_ids, *(asked.stop_token_ids or ()))))
    return Job((), 1, stops, served.key, picking, form, logprobs)


def _fitted(
    prompts: Sequence[Sequence[int]], job: Job, limit: int | None, facts: EngineFacts, problems: list[Problem], at: str
) -> list[Job]:
    """``job`` for every prompt. ``limit`` None: to the end of the context."""
    jobs = []
    for number, prompt in enumerate(prompts):
        where = f"{at}[{number}]" if len(prompts) > 1 else at
        room = facts.context - len(prompt)
        if room < (1 if limit is None else limit):
            asks = f"{len(prompt)} tokens" + (f" and {limit} for the answer" if limit else "")
            fix = "shorten the prompt" if room < 1 else f"shorten the prompt, or ask for at most {room} tokens"
            problems.append(Problem("longer than the context", where, f"{facts.context} tokens in all", asks, fix))
        else:
            jobs.append(replace(job, tokens=tuple(prompt), max_new_tokens=room if limit is None else limit))
    return jobs


def _copies(jobs: Sequence[Job], n: int) -> tuple[Job, ...]:
    """Each job ``n`` times; each copy draws by a seed of its own."""
    return tuple(
        job if copy == 0 or job.picking.seed is None else replace(job, picking=_reseeded(job.picking, copy))
        for job in jobs
        for copy in range(n)
    )


def _reseeded(picking: Picking, copy: int) -> Picking:
    assert picking.seed is not None
    return replace(picking, seed=(picking.seed + copy + 2**63) % 2**64 - 2**63)


def _check_ids(ids: Sequence[int], facts: EngineFacts, where: str) -> None:
    wrong = [i for i in ids if not 0 <= i < facts.vocabulary]
    if wrong:
        what = "token ids outside of the vocabulary"
        raise InputError(what, where=where, expected=f"0 to {facts.vocabulary - 1}", got=", ".join(map(str, wrong[:5])))


# --- forms --------------------------------------------------------------------------------------------------------


def _form(asked: Sampling) -> Form | None:
    """What the answer is held to; :class:`InputError` if that is two things, or cannot be here."""
    found: dict[str, AnswerForm] = {}
    if asked.response_format is not None and asked.response_format.type != "text":
        given = asked.response_format.json_schema
        schema = {"type": "object"} if given is None else given.schema_
        found["response_format"] = AnswerForm("json_schema", json.dumps(schema))
    outputs = asked.structured_outputs or StructuredOutputs()
    for where, value in (("guided_json", asked.guided_json), ("structured_outputs.json", outputs.json_)):
        if value is not None:
            found[where] = AnswerForm("json_schema", json.dumps(_schema(value, where)))
    for where, pattern in (("guided_regex", asked.guided_regex), ("structured_outputs.regex", outputs.regex)):
        if pattern is not None:
            found[where] = AnswerForm("regex", pattern)
    for where, listed in (("guided_choice", asked.guided_choice), ("structured_outputs.choice", outputs.choice)):
        if listed is not None:
            found[where] = AnswerForm("choices", tuple(listed))
    if outputs.json_object:
        found["structured_outputs.json_object"] = AnswerForm("json_schema", json.dumps({"type": "object"}))
    if len(found) > 1:
        raise InputError("an answer has one form", where=" and ".join(found), fix="leave all but one out")
    for where, form in found.items():
        if problem := form_problem(form):
            raise InputError("this server cannot hold answers to a form", where=where, got=problem)
        return form.kind, form.value, form.compact
    return None


def _schema(value: Any, where: str) -> Mapping[str, Any]:
    if isinstance(value, str):
        try:
            value = parse_json(value)
        except JsonError as error:
            raise InputError(f"not a JSON schema: {error.what}", where=where, got=error.got) from None
    if not isinstance(value, dict):
        raise InputError("not a JSON schema", where=where, expected="an object")
    return value


def _calls(asked: ChatRequest, renderer: Renderer, known: Known) -> tuple[Calls | None, Form | None]:
    """How calls are read, and the form where one is required."""
    choice: str | dict[str, Any] = asked.tool_choice or ("auto" if asked.tools else "none")
    if not asked.tools:
        return None, None
    format = known.call_format(renderer)  # tools that the model would not see are refused, whatever the choice
    if choice == "none":
        return None, None
    functions = [tool.function.model_dump(exclude_none=True) for tool in asked.tools]
    single = asked.parallel_tool_calls is False
    names = tuple(function["name"] for function in functions)
    if len(set(names)) < len(names):
        raise InputError("two tools of one name", where="tools")
    if choice == "auto":
        return Calls(format, names, False, single), None
    if isinstance(choice, dict):
        wanted = choice["function"]["name"]
        functions = [function for function in functions if function["name"] == wanted]
        if not functions:
            raise InputError("no tool of this name", where="tool_choice", expected=" or ".join(names), got=wanted)
    form = AnswerForm("json_schema", "")
    if problem := form_problem(form):
        raise InputError("this server cannot require a tool call", where="tool_choice", got=problem)
    schema = call_schema(format, functions, several=choice == "required" and not single)
    return Calls(format, names, True, single), ("json_schema", schema, format.compact)
