"""What a request may say: OpenAI's fields, some of vLLM's, and nothing that would be ignored.

Pydantic models without conversions: ``"1"`` is no number. Fields of OpenAI's API that are not supported may stand with
the value that asks for nothing; they are the models' ``Literal`` and ``None`` fields. ``null`` is the same as absent.

The models are the OpenAPI document's, too. Whether a request fits a model (ids, lengths, templates) is not asked here.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    PrivateAttr,
    WithJsonSchema,
    model_validator,
)

from tunegate.data.rows import excerpt

MOST_ANSWERS = 128  # of one request: prompts times n
MOST_STOPS, LONGEST_STOP = 32, 500  # strings; characters
MOST_LOGPROBS = 20
MOST_BIASES = 1024  # token ids of logit_bias; they go to the engine with every answer
MOST_SEED = 2**63 - 1
LONGEST_NAME = 512
FUNCTION_NAME = re.compile(r"^[a-zA-Z0-9_.-]{1,128}$")

Name = Annotated[str, Field(min_length=1, max_length=LONGEST_NAME)]
Id = Annotated[int, Field(ge=0, le=2**31 - 1)]


def _stop(value: Any) -> Any:
    listed = [value] if isinstance(value, str) else value
    if value is not None and (
        not isinstance(listed, list)
        or len(listed) > MOST_STOPS
        or not all(isinstance(s, str) and 0 < len(s) <= LONGEST_STOP for s in listed)
    ):
        raise ValueError(f"a string of 1 to {LONGEST_STOP} characters, or up to {MOST_STOPS} of them, is expected")
    return listed or []


def _prompt(value: Any) -> Any:
    """A list of prompts, each a text or a list of ids."""

    def ids(item: Any) -> bool:
        return isinstance(item, list) and bool(item) and all(type(i) is int for i in item)

    if isinstance(value, str) or ids(value):
        return [value]
    if isinstance(value, list) and value and (all(isinstance(p, str) for p in value) or all(map(ids, value))):
        return value
    raise ValueError("a text, a list of token ids, or a list of either is expected, none of them empty lists")


def _content(value: Any) -> Any:
    parts = value if isinstance(value, list) else []
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text" or not isinstance(part.get("text"), str) or set(part) != {"type", "text"}:
            raise ValueError('text parts are expected ({"type": "text", "text": ...}); images and sound are not taken')
    if (value is not None and not isinstance(value, (str, list))) or value == []:
        raise ValueError("text, or a list of text parts, is expected")
    return value


def _choice(value: Any) -> Any:
    if value in (None, "none", "auto", "required"):
        return value
    function = value.get("function") if isinstance(value, dict) else None
    named = isinstance(function, dict) and set(function) == {"name"} and isinstance(function["name"], str)
    if not named or value != {"type": "function", "function": function}:
        shape = '{"type": "function", "function": {"name": ...}}'
        raise ValueError(f'"none", "auto", "required" or {shape} is expected')
    return value


def _bias(value: dict[str, float] | None) -> dict[str, float] | None:
    if len(value or {}) > MOST_BIASES:
        raise ValueError(f"at most {MOST_BIASES} token ids are expected")
    if wrong := [key for key in value or {} if not re.fullmatch(r"[0-9]{1,9}", key)]:
        raise ValueError(f"token ids are expected as keys; got {excerpt(wrong[0])}")
    return value


_TEXT_PART = {
    "type": "object", "additionalProperties": False, "required": ["type", "text"],
    "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
}  # fmt: skip
_STRING, _NULL = {"type": "string"}, {"type": "null"}
_IDS = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
_STOP_STRING = {"type": "string", "minLength": 1, "maxLength": LONGEST_STOP}
Stop = Annotated[
    Any,
    AfterValidator(_stop),
    WithJsonSchema({"anyOf": [_STOP_STRING, {"type": "array", "items": _STOP_STRING, "maxItems": MOST_STOPS}, _NULL]}),
]
Prompt = Annotated[
    Any,
    AfterValidator(_prompt),
    WithJsonSchema(
        {
            "anyOf": [
                _STRING,
                {"type": "array", "items": _STRING, "minItems": 1},
                _IDS,
                {"type": "array", "items": _IDS, "minItems": 1},
            ]
        }
    ),
]
Content = Annotated[
    Any,
    AfterValidator(_content),
    WithJsonSchema({"anyOf": [_STRING, {"type": "array", "items": _TEXT_PART, "minItems": 1}, _NULL]}),
]
Choice = Annotated[
    Any,
    AfterValidator(_choice),
    WithJsonSchema(
        {
            "anyOf": [
                {"enum": ["none", "auto", "required"]},
                {
                    "type": "object", "additionalProperties": False, "required": ["type", "function"],
                    "properties": {
                        "type": {"const": "function"},
                        "function": {
                            "type": "object", "additionalProperties": False, "required": ["name"],
                            "properties": {"name": _STRING},
                        },
                    },
                },
                _NULL,
            ]
        }
    ),
]  # fmt: skip
Bias = Annotated[dict[str, Annotated[float, Field(ge=-100, le=100)]] | None, AfterValidator(_bias)]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, hide_input_in_errors=True)


class Verbatim(Strict):
    """Keeps what the client wrote in ``raw``: templates see keys in the order in which training rows had them."""

    _raw: dict[str, Any] = PrivateAttr(default_factory=dict)

    @model_validator(mode="wrap")
    @classmethod
    def _keep(cls, value: Any, check: ModelWrapValidatorHandler[Any]) -> Any:
        found = check(value)
        if isinstance(value, dict):
            found._raw = value
        return found

    @property
    def raw(self) -> dict[str, Any]:
        return self._raw


class FunctionCall(Strict):
    name: Name
    arguments: str | dict[str, Any]


class ToolCall(Strict):
    id: str | None = None
    type: Literal["function"] = "function"
    function: FunctionCall
    index: int | None = None


class ChatMessage(Verbatim):
    role: Literal["developer", "system", "user", "assistant", "tool"]
    content: Content = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    refusal: None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None
    audio: None = None
    function_call: None = None


class Function(Strict):
    name: Annotated[str, Field(pattern=FUNCTION_NAME.pattern)]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Verbatim):
    type: Literal["function"]
    function: Function


class JsonSchema(Strict):
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(Strict):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _whole(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError('`json_schema` goes with {"type": "json_schema"}, and only with it')
        return self


class StructuredOutputs(Strict):
    json_: dict[str, Any] | str | None = Field(None, alias="json")
    regex: str | None = None
    choice: Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1)] | None = None
    json_object: bool | None = None


class StreamOptions(Strict):
    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class Sampling(Strict):
    """What both ways of asking share."""

    model: Name
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=MOST_ANSWERS)] | None = None
    max_tokens: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=2**31 - 1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    logit_bias: Bias = None
    seed: Annotated[int, Field(ge=-MOST_SEED - 1, le=MOST_SEED)] | None = None
    stop: Stop = None
    stop_token_ids: list[Id] | None = None
    ignore_eos: bool | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1)] | None = None
    user: str | None = None  # who asks changes no answer

    @model_validator(mode="after")
    def _options_of_a_stream(self) -> Sampling:
        if self.stream_options is not None and not self.stream:
            raise ValueError("`stream_options` go with `stream: true` only")
        return self


class ChatRequest(Sampling):
    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    tools: list[Tool] | None = None
    tool_choice: Choice = None
    parallel_tool_calls: bool | None = None
    # asks for nothing, or for what is done anyway
    add_generation_prompt: Literal[True] | None = None  # vLLM's, like the next
    continue_final_message: Literal[False] | None = None
    store: Literal[False] | None = None
    metadata: dict[str, str] | None = None
    modalities: Annotated[list[Literal["text"]], Field(min_length=1, max_length=1)] | None = None
    service_tier: Literal["auto", "default"] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    reasoning_effort: Literal["none"] | None = None
    verbosity: Literal["medium"] | None = None
    audio: None = None
    prediction: None = None
    web_search_options: None = None
    functions: None = None
    function_call: None = None

    @model_validator(mode="after")
    def _together(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("`top_logprobs` goes with `logprobs: true` only")
        both = (self.max_tokens, self.max_completion_tokens)
        if None not in both and both[0] != both[1]:
            raise ValueError("`max_tokens` and `max_completion_tokens` differ; they are two names of one limit")
        if self.tool_choice not in (None, "none") and not self.tools:
            raise ValueError("`tool_choice` needs `tools`")
        return self


class CompletionRequest(Sampling):
    prompt: Prompt
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    max_tokens: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    best_of: int | None = None
    suffix: None = None

    @model_validator(mode="after")
    def _together(self) -> CompletionRequest:
        if self.best_of not in (None, self.n or 1):
            raise ValueError("`best_of` other than `n` is not supported")
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("`max_tokens: 0` asks for nothing without `echo: true`")
        if len(self.prompt) * (self.n or 1) > MOST_ANSWERS:
            raise ValueError(f"prompts times `n` is more than {MOST_ANSWERS}")
        return self


class TokenizeRequest(Strict):
    """vLLM's: a ``prompt``, or ``messages`` as a chat would send them."""

    model: Name | None = None
    prompt: str | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1)] | None = None
    tools: list[Tool] | None = None
    add_special_tokens: bool = True
    add_generation_prompt: Literal[True] = True
    continue_final_message: Literal[False] = False
    return_token_strs: bool | None = None

    @model_validator(mode="after")
    def _one(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("either `prompt` or `messages` is expected")
        return self


class DetokenizeRequest(Strict):
    model: Name | None = None
    tokens: list[Id]


class LoadAdapterRequest(Strict):
    """vLLM's. ``lora_path``: a folder or a registry reference."""

    lora_name: Name
    lora_path: Annotated[str, Field(min_length=1, max_length=4096)]
    load_inplace: bool = False
    pinned: bool = False
    is_3d_lora_weight: Literal[False] = False


class UnloadAdapterRequest(Strict):
    lora_name: Name
    lora_int_id: int | None = None
