"""Wrong requests: one answer with everything that is wrong, in OpenAI's shape, and never a 500."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving import Serving, serving
from tiny import tiny_tokenizer
from tunegate.errors import InputError
from tunegate.serve.openai_bodies import read_request
from tunegate.serve.openai_requests import TokenizeRequest

documents = pytest.importorskip("tunegate.serve.openai_documents", exc_type=ImportError)

CHAT, COMPLETE = "/v1/chat/completions", "/v1/completions"
HELLO = [{"role": "user", "content": "hi"}]
BASE = {"model": "tiny", "messages": HELLO}
TEXT = {"model": "tiny", "prompt": "a"}


@pytest.fixture(scope="module")
def server() -> Iterator[Serving]:
    with serving(tiny_tokenizer(), lambda job: "fine", context=64) as found:
        yield found


def post(
    server: Serving, path: str, body: Any, method: str = "POST", kind: str = "application/json; charset=utf-8"
) -> tuple[int, dict[str, Any]]:
    connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=20)
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    connection.request(method, path, data, {"Content-Type": kind})
    reply = connection.getresponse()
    found = json.loads(reply.read())
    connection.close()
    return reply.status, found


def refused(server: Serving, path: str, body: Any, status: int = 400) -> dict[str, Any]:
    got, found = post(server, path, body)
    assert got == status, found
    documents.Error.model_validate(found)
    error: dict[str, Any] = found["error"]
    return error


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"temperatur": 1}, "temperatur", "did you mean 'temperature'"),
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": None}, "messages", "list"),
        ({"messages": [{"role": "user", "content": "x", "contnt": 1}]}, "messages[0].contnt", "'content'"),
        ({"messages": [{"role": "usr", "content": "x"}]}, "messages[0].role", "user"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content", "text"),
        ({"messages": [{"role": "user", "content": []}]}, "messages[0].content", "text"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content", "images"),
        ({"messages": [{"role": "user", "content": "\ufdd0"}]}, "messages", "code point"),
        ({"messages": [{"role": "user", "content": "w " * 200}]}, "messages", "longer than the context"),
        ({"max_tokens": -1}, "max_tokens", "greater"),
        ({"max_tokens": 0}, "max_tokens", "greater"),
        ({"max_tokens": 10**30}, "max_tokens", "less"),
        ({"max_tokens": 64}, "messages", "at most"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, None, "two names"),
        ({"n": 0}, "n", "greater"),
        ({"n": True}, "n", "integer"),
        ({"n": "2"}, "n", "integer"),
        ({"temperature": 3}, "temperature", "less"),
        ({"top_p": 0}, "top_p", "greater"),
        ({"seed": 2**63}, "seed", "less"),
        ({"stop": ""}, "stop", "string"),
        ({"stop": ["a"] * 33}, "stop", "string"),
        ({"logit_bias": {"x": 1}}, "logit_bias", "token ids"),
        ({"logit_bias": {"400": 1}}, "logit_bias", "0 to 399"),
        ({"logit_bias": {"1": 101}}, "logit_bias.1", "less"),
        ({"logit_bias": {f"{n:06}": 1 for n in range(1025)}}, "logit_bias", "at most 1024"),
        ({"guided_regex": "a" * 65_537}, "regex", "too large"),
        ({"guided_choice": ["a" * 65_537]}, "choices", "too large"),
        ({"guided_json": {"maximum": 10**200}, "seed": -1}, "json_schema", "cannot be enforced"),
        ({"guided_json": {"$ref": "#"}}, None, "too complex to follow"),
        ({"guided_json": '{"type": 7}'}, "json_schema", "cannot be enforced"),
        ({"top_logprobs": 2}, None, "logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "less"),
        ({"stop_token_ids": [400]}, "stop_token_ids", "vocabulary"),
        ({"store": True}, "store", "False"),
        ({"functions": []}, "functions", "None"),
        ({"stream_options": {"include_usage": True}}, None, "stream"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "json_schema"),
        ({"response_format": {"type": "xml"}}, "response_format.type", "json_object"),
        ({"guided_regex": "a", "guided_choice": ["b"]}, "guided_regex and guided_choice", "one form"),
        ({"guided_choice": ["b"], "ignore_eos": True}, "ignore_eos", "stop token"),
        ({"guided_json": "{"}, "guided_json", "not a JSON schema"),
        ({"tool_choice": "required"}, None, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name", "pattern"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools", "leaves tools out"),
    ],
)  # fmt: skip
def test_wrong_chats(server: Serving, fields: dict[str, Any], param: str | None, says: str) -> None:
    error = refused(server, CHAT, {**BASE, **fields})
    assert (error["param"], error["type"]) == (param, "invalid_request_error") and says in error["message"]


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"prompt": ""}, "no tokens"),
        ({"prompt": []}, "expected"),
        ({"prompt": [[]]}, "expected"),
        ({"prompt": ["a", [1]]}, "expected"),
        ({"prompt": [True]}, "expected"),
        ({"prompt": [1.0]}, "expected"),
        ({"prompt": [-1]}, "0 to 399"),
        ({"prompt": [1, 400]}, "0 to 399"),
        ({"prompt": [10**40]}, "0 to 399"),
        ({"prompt": [[1], [400]]}, "prompt[1]"),
        ({"prompt": ["a"] * 129}, "128"),
        ({"prompt": "a", "n": 129}, "128"),
        ({"prompt": "a", "best_of": 2}, "best_of"),
        ({"prompt": "a", "max_tokens": 0}, "echo"),
        ({"prompt": "a", "max_tokens": -1, "echo": True}, "greater"),
        ({"prompt": "a", "suffix": "b"}, "None"),
    ],
)
def test_wrong_completions(server: Serving, fields: dict[str, Any], says: str) -> None:
    assert says in refused(server, COMPLETE, {**TEXT, **fields})["message"]


def test_an_echo_has_so_many_log_probabilities(server: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tunegate.serve.openai_plan.MOST_ECHOED", 2 * 3 * 21 * 4 - 1)
    fields = {"prompt": [[5, 6, 7]] * 2, "echo": True, "logprobs": 20}
    assert "(expected at most 503, got 504)" in refused(server, COMPLETE, {**TEXT, **fields, "n": 4})["message"]
    made = server.client().completions.create(**{**TEXT, **fields, "n": 3})
    assert len(made.choices) == 6


def test_everything_wrong_is_said_at_once(server: Serving) -> None:
    fields = {"mesages": HELLO, "model": "tiny", "n": 0, "temperature": "hot", "stop": [1]}
    said = refused(server, CHAT, fields)["message"].splitlines()
    assert sorted(line.split(":")[0] for line in said) == ["mesages", "messages", "n", "stop", "temperature"]
    later = {"logit_bias": {"9999": 1}, "stop_token_ids": [9999], "messages": [{"role": "user", "content": "w " * 200}]}
    assert len(refused(server, CHAT, {**BASE, **later})["message"].splitlines()) == 3


@pytest.mark.parametrize("path", [CHAT, COMPLETE, "/tokenize", "/detokenize", "/v1/load_lora_adapter"])
@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"[]", b"null", b'"x"', b"\xff\xfe", b'{"model": NaN}', b'{"model": 1e999}', b"[" * 100_000,
        b'{"model": ' + b'{"a":' * 200 + b"1" + b"}" * 200 + b"}", b'{"model": "a", "model": "b"}',
        b'{"model": "tiny", "prompt": "\\ud800"}', b'{"prompt": ' + b"9" * 5000 + b"}",
        b'{"model": "\\u0000", "messages": [{"role": "user", "content": "\\udc00"}]}',
    ],
)  # fmt: skip
def test_bodies_that_are_no_requests(server: Serving, path: str, body: bytes) -> None:
    refused(server, path, body)


def test_bodies_that_are_too_large(server: Serving) -> None:
    assert "too large" in refused(server, CHAT, b" " * (2 * 1024 * 1024 + 1), 413)["message"]
    assert refused(server, CHAT, json.dumps({**BASE, "user": "u" * 10**6, "n": 0}).encode())["param"] == "n"


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", ""])
def test_bodies_that_a_page_of_another_site_could_send(server: Serving, kind: str) -> None:
    status, found = post(server, "/v1/load_lora_adapter", {"lora_name": "x", "lora_path": "/x"}, kind=kind)
    assert (status, found["error"]["code"]) == (415, "not_json")
    assert "x" not in {served.name for served in server.catalogue.names()}


def test_names_that_are_not_served(server: Serving) -> None:
    for path, body in (
        (CHAT, BASE),
        (COMPLETE, TEXT),
        ("/tokenize", {"prompt": "a"}),
        ("/detokenize", {"tokens": [1]}),
    ):
        error = refused(server, path, {**body, "model": "suport"}, 404)
        assert error["code"] == "model_not_found" and "'support'" in error["message"]
    assert post(server, "/v1/nothing", {})[1]["error"]["code"] == "not_found"
    assert post(server, "/v1/embeddings", {})[0] == 404
    assert post(server, CHAT, b"", "GET")[0] == 405
    assert "0 to 399" in refused(server, "/detokenize", {"tokens": [400]})["message"]


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(max_size=5)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=8,
)


@pytest.mark.parametrize("model", documents.BODIES, ids=lambda model: model.__name__)
@settings(max_examples=120)
@given(data=st.data())
def test_reading_never_fails_otherwise(model: Any, data: st.DataObject) -> None:
    """Any JSON under the fields' own names is a request or an InputError that names a place."""
    names = [field.alias or name for name, field in model.model_fields.items()]
    value = data.draw(st.dictionaries(st.sampled_from(names), JSON, max_size=3))
    sound = {**BASE, **TEXT, "tokens": [1], "lora_name": "x", "lora_path": "/x"}
    whole = {name: given for name, given in sound.items() if name in names and model is not TokenizeRequest}
    try:
        found = read_request(json.dumps({**whole, **value}).encode(), model)
        assert isinstance(found, model)
    except InputError as error:
        assert all(problem.what for problem in error.problems)
