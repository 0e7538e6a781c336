"""Odd messages: the prompt is what transformers renders of the same messages, or a 400 says why there is none."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import pytest

from chat import CHATML_TOKENS, make_tokenizer, tokenizer_of
from serving import Serving, serving

pytest.importorskip("tunegate.serve.openai_documents", exc_type=ImportError)

USER: dict[str, Any] = {"role": "user", "content": "Where is my order?"}
SAID: dict[str, Any] = {"role": "assistant", "content": "On its way."}
SYSTEM: dict[str, Any] = {"role": "system", "content": "Be brief."}
RESULT: dict[str, Any] = {"role": "tool", "tool_call_id": "c1", "content": "done"}
FAMILIES = ("smollm2", "qwen3", "llama3", "gemma")


def part(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def calling(arguments: Any = '{"state": "open"}', **more: Any) -> dict[str, Any]:
    call = {"id": "c1", "type": "function", "function": {"name": "status", "arguments": arguments}}
    return {"role": "assistant", "tool_calls": [call], **more}


@pytest.fixture(scope="module", params=FAMILIES)
def server(request: pytest.FixtureRequest) -> Iterator[Serving]:
    with serving(tokenizer_of(request.param), lambda job: "fine", context=512) as found:
        yield found


def ask(server: Serving, messages: list[dict[str, Any]], path: str = "/v1/chat/completions", **more: Any) -> Any:
    """Status and body, which is checked to be an answer or an error of OpenAI's shape."""
    connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=60)
    body = json.dumps({"model": "tiny", "messages": messages, **more})
    connection.request("POST", path, body, {"Content-Type": "application/json"})
    reply = connection.getresponse()
    found = json.loads(reply.read())
    connection.close()
    assert ("error" in found) == (reply.status != 200)
    return reply.status, found.get("error", found)


def rendered(server: Serving, messages: list[dict[str, Any]]) -> list[int] | str:
    """The ids by transformers, or what the template says against the messages."""
    try:
        return list(
            server.engine.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        )
    except Exception as error:
        return str(error)


PLAIN = [
    ([{"role": "user", "content": [part("Where is "), part("my order?")]}], [USER]),
    ([{"role": "system", "content": [part("Be brief.")]}, USER], [SYSTEM, USER]),
    ([{"role": "developer", "content": "Be brief."}, USER], [SYSTEM, USER]),
    ([USER, {"role": "assistant", "content": [part("On its "), part("way.")]}, USER], [USER, SAID, USER]),
    ([{"role": "user", "content": [part("")]}], [{"role": "user", "content": ""}]),
    ([{"role": "user", "content": ""}], [{"role": "user", "content": ""}]),
    ([{"role": "user", "content": None}], [{"role": "user", "content": ""}]),
    ([{"role": "user"}], [{"role": "user", "content": ""}]),
    ([USER, {"role": "assistant", "content": None}, USER], [USER, {"role": "assistant", "content": ""}, USER]),
    ([USER, {**SAID, "tool_calls": []}, USER], [USER, SAID, USER]),
    ([SYSTEM], [SYSTEM]),
    ([SYSTEM, SYSTEM, USER], [SYSTEM, SYSTEM, USER]),
    ([USER, SYSTEM, USER], [USER, SYSTEM, USER]),
    ([USER, SAID], [USER, SAID]),  # as in OpenAI's and vLLM's answers, another turn follows
    ([SAID], [SAID]),
    ([USER, USER], [USER, USER]),
    ([RESULT], [{"role": "tool", "content": "done"}]),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(PLAIN)))
def test_the_prompt_is_the_templates_or_its_refusal_is_told(server: Serving, number: int) -> None:
    given, same = PLAIN[number]
    wanted = rendered(server, same)
    asked = len(server.engine.jobs)
    for path, more in (("/v1/chat/completions", {}), ("/v1/chat/completions", {"n": 3}), ("/tokenize", {})):
        status, found = ask(server, given, path, **more)
        if isinstance(wanted, str):
            assert status == 400 and wanted in found["message"] and found["param"] == "messages"
            assert "template refuses these messages" in found["message"] and len(server.engine.jobs) == asked
        else:
            got = found["tokens"] if path == "/tokenize" else list(server.engine.jobs[-1].tokens)
            assert status == 200 and got == wanted
    if isinstance(wanted, str):
        assert ask(server, given, stream=True)[0] == 400  # before a stream begins


@pytest.mark.parametrize("content", [{"content": None}, {"content": ""}, {}, {"content": [part("")]}])
def test_calls_without_content(server: Serving, content: dict[str, Any]) -> None:
    """They are in the prompt, or the request is refused: some templates know no calls."""
    seen = rendered(server, [USER, calling({"state": "open"}, content=""), RESULT])
    status, found = ask(server, [USER, calling(**content), RESULT])
    if "status" in server.engine.tokenizer.decode(seen):
        assert status == 200 and list(server.engine.jobs[-1].tokens) == seen
    else:
        assert status == 400 and "leaves tool calls out" in found["message"] and found["param"] == "messages"
    odd = calling(**content)
    odd["tool_calls"][0]["function"]["name"] = 'a "name" that a template escapes'
    assert ask(server, [USER, odd, RESULT])[0] == 200


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ([USER, calling("{"), RESULT], "not valid JSON"),
        ([USER, calling("[1]"), RESULT], "must be a JSON object"),
        ([{**calling(), "role": "user"}], "tool_calls of an assistant only"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}], "images and sound"),
        ([USER, {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]}], "text parts are expected"),
        ([{"role": "function", "name": "x", "content": "y"}], "'tool'"),
        ([{"role": "user", "content": "w " * 4000}], "longer than the context"),
    ],
)
def test_what_is_no_message_is_told(server: Serving, messages: list[dict[str, Any]], says: str) -> None:
    status, found = ask(server, messages, n=128)
    assert status == 400 and says in found["message"] and found["type"] == "invalid_request_error"


def test_many_answers_to_a_prompt_that_fills_the_context(server: Serving) -> None:
    longer = ([{"role": "user", "content": "x" + " 1" * words}] for words in range(server.engine.context, 0, -1))
    messages, length = next(
        (one, len(ids)) for one in longer if len(ids := rendered(server, one)) < server.engine.context
    )
    left = server.engine.context - length
    status, answer = ask(server, messages, n=128, max_tokens=left)
    assert status == 200 and [choice["index"] for choice in answer["choices"]] == list(range(128))
    assert answer["usage"]["prompt_tokens"] == length  # once for all
    status, found = ask(server, messages, n=128, max_tokens=left + 1)
    assert status == 400 and f"ask for at most {left} tokens" in found["message"]
    assert ask(server, messages, n=129)[1]["param"] == "n"


def test_to_go_on_with_the_last_message_is_refused(server: Serving) -> None:
    """vLLM's fields: what they ask for by default is done, the rest told."""
    assert ask(server, [USER], continue_final_message=False, add_generation_prompt=True)[0] == 200
    status, found = ask(server, [USER, SAID], continue_final_message=True, add_generation_prompt=False)
    assert status == 400 and {line.split(":")[0] for line in found["message"].splitlines()} == {
        "continue_final_message", "add_generation_prompt",
    }  # fmt: skip


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('only poems') }}",
        "{{ messages[7].content }}",
        "{% if messages %}{{ messages[0].content + none }}{% endif %}",
        "{{ 1 // 0 }}",
        "{% for m in messages %}",
        "{{ messages[0].__class__.__mro__ }}",
    ],
)
def test_a_template_that_fails(template: str) -> None:
    tokenizer = make_tokenizer("gpt2", CHATML_TOKENS, template, bos="<|im_start|>", eos="<|im_end|>")
    tool = {"type": "function", "function": {"name": "status"}}
    with serving(tokenizer, lambda job: "fine") as server:
        for more in ({}, {"stream": True}, {"n": 2}, {"tools": [tool]}, {"tools": [tool], "tool_choice": "required"}):
            status, found = ask(server, [USER], **more)
            assert status == 400 and "template refuses these messages" in found["message"], found
        assert ask(server, [USER], "/tokenize")[0] == 400 and not server.engine.jobs
