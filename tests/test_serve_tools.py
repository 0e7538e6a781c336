"""Tool calls: formats read off templates, calls found in answers, text never taken for a call."""

from __future__ import annotations

import itertools
import json
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chat import LLAMA3_TOKENS, QWEN3, THINK_TOKENS, make_tokenizer, tokenizer_of
from tunegate.data.render import Renderer
from tunegate.errors import InputError
from tunegate.serve.tools import Call, CallFormat, CallReader, call_format, call_schema

HERMES = CallFormat("<tool_call>\n", "<tool_call>", "</tool_call>", "arguments", False, False)
MISTRAL = CallFormat("[TOOL_CALLS]", "[TOOL_CALLS]", "", "arguments", True, False)
LLAMA = CallFormat("", "", "", "parameters", False, False)
NAMES = ["weather", "time"]

LLAMA3_TOOLS = (
    "{{ bos_token }}{% if tools %}{{ '<|start_header_id|>system<|end_header_id|>\n\n' }}"
    "{% for tool in tools %}{{ tool | tojson }}{% endfor %}{{ '<|eot_id|>' }}{% endif %}"
    "{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' }}"
    "{% if m.tool_calls %}{% set call = m.tool_calls[0].function %}"
    '{{ \'{"name": "\' + call.name + \'", "parameters": \' }}{{ call.arguments | tojson }}{{ "}" }}'
    "{% else %}{{ m.content | trim }}{% endif %}{{ '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
MISTRAL_TOOLS = (
    "{{ bos_token }}{% if tools %}{{ '[AVAILABLE_TOOLS]' }}{{ tools | tojson }}{{ '[/AVAILABLE_TOOLS]' }}{% endif %}"
    "{% for m in messages %}{% if m.role == 'user' %}{{ '[INST]' + m.content + '[/INST]' }}"
    "{% elif m.tool_calls %}{{ '[TOOL_CALLS][' }}{% for call in m.tool_calls %}"
    '{{ \'{"name": "\' + call.function.name + \'", "arguments": \' }}{{ call.function.arguments | tojson }}'
    "{{ ', \"id\": \"' + call.id + '\"}' }}{% endfor %}{{ ']' + eos_token }}"
    "{% else %}{{ m.content + eos_token }}{% endif %}{% endfor %}"
)
MISTRAL_TOKENS = ("<s>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]")
XML = QWEN3.replace("{{ call.function | tojson }}", "{{ '<function=' + call.function.name + '>' }}")


def renderer(template: str, special: tuple[str, ...] = LLAMA3_TOKENS, bos: str = "", eos: str = "") -> Renderer:
    tokenizer = make_tokenizer(
        "llama3", special, template, bos=bos or special[0], eos=eos or special[1], added=THINK_TOKENS
    )
    return Renderer(tokenizer)


def test_formats_are_read_off_templates() -> None:
    found = call_format(Renderer(tokenizer_of("qwen3")))
    assert found == CallFormat(
        "<think>\n\n</think>\n\n\n<tool_call>\n", "<tool_call>", "</tool_call>", "arguments", False, False
    )
    assert call_format(renderer(LLAMA3_TOOLS)) == LLAMA
    assert call_format(renderer(MISTRAL_TOOLS, MISTRAL_TOKENS)) == MISTRAL


def test_templates_without_tools_are_refused() -> None:
    with pytest.raises(InputError, match="leaves tools out"):
        call_format(Renderer(tokenizer_of("smollm2")))
    with pytest.raises(InputError, match="no"):
        call_format(Renderer(tokenizer_of("base")))
    with pytest.raises(InputError, match="form that is not read"):
        call_format(renderer(XML, eos="<|eot_id|>"))


def written(form: CallFormat, calls: list[dict[str, Any]]) -> str:
    one = [json.dumps({"name": call["name"], form.arguments: call["arguments"]}) for call in calls]
    if form.listed:
        return form.mark + "[" + ", ".join(one) + "]"
    if form.mark:
        return "\n".join(f"{form.mark}\n{text}\n{form.closing}" for text in one)
    return "; ".join(one)


def read(form: CallFormat, text: str, cuts: list[int], forced: bool = False) -> tuple[str, list[Call]]:
    reader = CallReader(form, NAMES, forced)
    edges = [0, *sorted(min(c, len(text)) for c in cuts), len(text)]
    said, calls = "", list[Call]()
    for a, b in itertools.pairwise(edges):
        more, found = reader.push(text[a:b])
        said, calls = said + more, calls + found
    more, found = reader.finish()
    return said + more, calls + found


CALLS = st.lists(
    st.fixed_dictionaries(
        {
            "name": st.sampled_from(NAMES),
            "arguments": st.dictionaries(st.text(max_size=5), st.one_of(st.integers(), st.text(max_size=8))),
        }
    ),
    min_size=1,
    max_size=3,
)


@pytest.mark.parametrize("form", [HERMES, MISTRAL, LLAMA], ids=["hermes", "mistral", "llama"])
@settings(max_examples=100)
@given(calls=CALLS, cuts=st.lists(st.integers(0, 200), max_size=6))
def test_calls_are_read_back_however_they_come(form: CallFormat, calls: list[dict[str, Any]], cuts: list[int]) -> None:
    text = written(form, calls)
    if form.closing and any(form.closing in json.dumps(call) for call in calls):
        return
    said, found = read(form, text, cuts)
    assert said == ""
    assert [(call.name, json.loads(call.arguments)) for call in found] == [(c["name"], c["arguments"]) for c in calls]
    assert len({call.id for call in found}) == len(found)


@pytest.mark.parametrize("form", [HERMES, MISTRAL, LLAMA], ids=["hermes", "mistral", "llama"])
@settings(max_examples=150)
@given(
    text=st.text('<tool_call>[TOOL_CALLS]{"name": } \n/', max_size=40), cuts=st.lists(st.integers(0, 40), max_size=4)
)
def test_what_is_no_call_stays_as_it_was_written(form: CallFormat, text: str, cuts: list[int]) -> None:
    assert read(form, text, cuts) == (text, [])


@pytest.mark.parametrize(
    ("form", "text"),
    [
        (HERMES, 'Say <tool_call>\n{"name": "other", "arguments": {}}\n</tool_call> no'),  # a tool nobody offered
        (HERMES, 'Hm. \n<tool_call>\n{"name": "weather", "arguments": {}\n</tool_call>'),  # broken
        (HERMES, '<tool_call>{"name": "weather", "arguments": {}, "x": 1}</tool_call>'),
        (HERMES, '<tool_call>{"name": "weather", "arguments": [1]}</tool_call>'),
        (HERMES, '<tool_call>{"name": ["weather"], "arguments": {}}</tool_call>'),
        (HERMES, '<tool_call>{"name": "weather", "arguments": {"x": NaN}}</tool_call>'),
        (HERMES, '<tool_call>{"name": "weather", "arguments": {"x": 1, "x": 2}}</tool_call>'),
        (HERMES, '{"name": "weather", "arguments": {}}'),  # JSON without its marks
        (LLAMA, '{"name": "Anna", "parameters": {}}'),
        (LLAMA, '{"name": "weather", "arguments": {}}'),
        (LLAMA, '{"name": "weather", "parameters": {}} and more'),
        (LLAMA, 'Text first {"name": "weather", "parameters": {}}'),
        (MISTRAL, '[{"name": "weather", "arguments": {}}]'),
        (MISTRAL, '[TOOL_CALLS][{"name": "weather", "arguments": {}}'),
    ],
)
@pytest.mark.parametrize("cuts", [[], list(range(90))], ids=["at once", "by character"])
def test_text_is_not_taken_for_a_call(form: CallFormat, text: str, cuts: list[int]) -> None:
    assert read(form, text, cuts) == (text, [])


@pytest.mark.parametrize("cuts", [[], list(range(200))], ids=["at once", "by character"])
def test_text_and_calls_in_turn(cuts: list[int]) -> None:
    call = '<tool_call>\n{"name": "time", "arguments": {"zone": "é"}}\n</tool_call>'
    said, found = read(HERMES, f"Let me look.\n\n{call}\n{call}\n", cuts)
    assert said == "Let me look."
    assert [(c.name, c.arguments) for c in found] == [("time", '{"zone": "é"}')] * 2
    # the closing that an end-of-turn token took the place of
    assert read(HERMES, '<tool_call>\n{"name": "time", "arguments": {}}', cuts)[1][0].name == "time"


def test_forced_calls_are_the_json_alone() -> None:
    assert read(HERMES, '{"name": "time", "arguments": {"a": 1}}', [3], forced=True)[1][0].arguments == '{"a": 1}'
    assert read(MISTRAL, '[{"name": "time", "arguments": {}}]', [3], forced=True)[1][0].name == "time"
    assert read(HERMES, '{"name": "time", "argum', [3], forced=True) == ('{"name": "time", "argum', [])  # cut off


def test_schemas_of_calls() -> None:
    tools = [
        {"name": "time", "parameters": {"type": "object", "properties": {"zone": {"type": "string"}}}},
        {"name": "weather"},
    ]
    one = json.loads(call_schema(HERMES, tools[:1], several=True))
    assert one["properties"]["name"] == {"const": "time"} and one["properties"]["arguments"] == tools[0]["parameters"]
    both = json.loads(call_schema(LLAMA, tools, several=True))
    assert [schema["required"] for schema in both["anyOf"]] == [["name", "parameters"]] * 2
    listed = json.loads(call_schema(MISTRAL, tools[:1], several=False))
    assert (listed["type"], listed["minItems"], listed["maxItems"]) == ("array", 1, 1)


@pytest.mark.parametrize("form", [HERMES, MISTRAL, LLAMA], ids=["hermes", "mistral", "llama"])
@pytest.mark.parametrize("alone", [True, False])
def test_references_in_a_tools_schema_are_followed(form: CallFormat, alone: bool) -> None:
    """As pydantic writes them, and to the schema itself; ``jsonschema`` is the judge, and the grammar's library."""
    zone = {
        "type": "object", "required": ["zone"], "additionalProperties": False,
        "properties": {"zone": {"$ref": "#/$defs/Zone"}, "inner": {"$ref": "#"}},
        "$defs": {"Zone": {"enum": ["utc", {"$ref": "#"}]}},
    }  # fmt: skip
    tools = [{"name": "time", "parameters": zone}] + ([] if alone else [{"name": "weather", "parameters": zone}])
    schema = json.loads(call_schema(form, tools, several=True))

    def fits(arguments: Any) -> bool:
        call = {"name": tools[-1]["name"], form.arguments: arguments}
        return bool(jsonschema.Draft202012Validator(schema).is_valid([call] if form.listed else call))

    assert fits({"zone": "utc", "inner": {"zone": {"$ref": "#"}}})
    assert not fits({"zone": "x"}) and not fits({"zone": "utc", "inner": {"zone": "x"}})
    llguidance = pytest.importorskip("llguidance")
    grammar = llguidance.LLMatcher.grammar_from_json_schema(schema)
    assert llguidance.LLMatcher.validate_grammar(grammar) == ""
