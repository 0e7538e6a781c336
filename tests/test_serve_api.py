"""OpenAI's own client against a real server on 127.0.0.1, whose engine is scripted."""

from __future__ import annotations

import json
import threading
import time
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest

from chat import tokenizer_of
from serving import Serving, serving
from tiny import tiny_tokenizer
from tunegate.data.render import Renderer
from tunegate.serve.catalogue import ModelRefused
from tunegate.serve.jobs import Job

openai = pytest.importorskip("openai")
documents = pytest.importorskip("tunegate.serve.openai_documents", exc_type=ImportError)

ANSWER = "Your card 你好 🙂 is on its way. Thank you, and good bye."
HELLO: list[Any] = [{"role": "user", "content": "Where is my order?"}]
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "status",
        "parameters": {
            "type": "object", "properties": {"state": {"enum": ["open", "done"]}}, "required": ["state"],
            "additionalProperties": False,
        },
    },
}  # fmt: skip
OTHER: dict[str, Any] = {"type": "function", "function": {"name": "other"}}
CALL = '<tool_call>\n{"name": "status", "arguments": {"state": "done"}}\n</tool_call>'


def says(job: Job) -> str:
    if job.form is not None:
        return '{"name": "status", "arguments": {"state": "done"}}'
    return {"b3:caller": f"Let me look.\n{CALL}\n{CALL}", "b3:other": "A short one"}.get(job.adapter or "", ANSWER)


@pytest.fixture(scope="module")
def plain() -> Iterator[Serving]:
    """A model without tools."""
    with serving(tiny_tokenizer(), says) as found:
        yield found


@pytest.fixture(scope="module")
def tooled() -> Iterator[Serving]:
    """A model whose template takes tools, as Qwen's does."""
    with serving(tokenizer_of("qwen3"), says, context=2048) as found:
        found.catalogue._served["caller"] = found.catalogue._made("caller", "ship", "/adapters/caller")
        yield found


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def chat(server: Serving, **fields: Any) -> Any:
    return server.client().chat.completions.create(**{"model": "support", "messages": HELLO, **fields})


def raw(server: Serving, path: str, body: dict[str, Any]) -> tuple[Any, Any]:
    request = urllib.request.Request(
        server.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}, method="POST"
    )
    with urllib.request.urlopen(request, timeout=20) as reply:
        return json.load(reply), reply.headers


# --- chat ---------------------------------------------------------------------------------------------------------


def test_a_chat(plain: Serving) -> None:
    found = chat(plain, temperature=0, max_tokens=200, seed=3)
    assert found.choices[0].message.content == ANSWER and found.choices[0].finish_reason == "stop"
    assert (found.model, found.system_fingerprint) == ("support", "b3:support")
    job = plain.engine.jobs[-1]
    renderer = Renderer(tiny_tokenizer())
    assert list(job.tokens) == renderer.prompt_ids(HELLO)  # what training rendered
    assert (job.adapter, job.stop_ids, job.max_new_tokens) == ("b3:support", renderer.stop_ids, 200)
    assert (job.picking.temperature, job.picking.seed, job.form, job.logprobs) == (0, 3, None, None)
    made = len(tiny_tokenizer()(ANSWER)["input_ids"])
    counts = (found.usage.prompt_tokens, found.usage.completion_tokens, found.usage.total_tokens)
    assert counts == (len(job.tokens), made, len(job.tokens) + made)
    assert found.usage.prompt_tokens_details.cached_tokens == 4


def test_answers_have_the_documented_form(plain: Serving, tooled: Serving) -> None:
    """Strictly, nothing left out and nothing added; the header names the adapter."""
    asks = [{"n": 2, "logprobs": True, "top_logprobs": 2}, {"max_tokens": 2}, {"response_format": {"type": "text"}}]
    for fields in asks:
        found, headers = raw(plain, "/v1/chat/completions", {"model": "support", "messages": HELLO, **fields})
        documents.ChatCompletion.model_validate(found)
        assert headers["X-Tunegate-Adapter"] == "b3:support"
    found, _ = raw(tooled, "/v1/chat/completions", {"model": "caller", "messages": HELLO, "tools": [TOOL]})
    documents.ChatCompletion.model_validate(found)
    for fields in ({"logprobs": 3, "n": 2}, {"echo": True}):
        found, headers = raw(plain, "/v1/completions", {"model": "tiny", "prompt": "a", **fields})
        documents.Completion.model_validate(found)
        assert headers["X-Tunegate-Adapter"] == "b3:base"


@pytest.mark.parametrize("batch", [1, 3])
def test_a_stream_is_the_same_answer(plain: Serving, batch: int) -> None:
    plain.engine.batch = batch
    events = list(chat(plain, stream=True, stream_options={"include_usage": True}))
    plain.engine.batch = 1
    assert events[0].choices[0].delta.role == "assistant"
    pieces = [event.choices[0].delta.content or "" for event in events[:-1]]
    assert "".join(pieces) == ANSWER and not any("\ufffd" in piece for piece in pieces) and len(pieces) > 8
    assert [event.choices[0].finish_reason for event in events[:-1]] == [None] * (len(events) - 2) + ["stop"]
    assert {event.system_fingerprint for event in events} == {"b3:support"}
    assert events[-1].choices == [] and events[-1].usage.completion_tokens == len(tiny_tokenizer()(ANSWER)["input_ids"])
    assert all(event.usage is None for event in events[:-1])


@pytest.mark.parametrize("stream", [False, True])
def test_stops_end_the_answer_and_its_job(plain: Serving, stream: bool) -> None:
    cancelled = plain.engine.cancelled
    found = chat(plain, stop=["way. T", "never"], stream=stream)
    if stream:
        events = list(found)
        text = "".join(event.choices[0].delta.content or "" for event in events)
        finish = events[-1].choices[0].finish_reason
    else:
        text, finish = found.choices[0].message.content, found.choices[0].finish_reason
    assert (text, finish) == (ANSWER[: ANSWER.index("way. T")], "stop")
    assert plain.engine.cancelled == cancelled + 1 and plain.engine.running == 0
    assert chat(plain, stop="way").choices[0].message.content == ANSWER[: ANSWER.index("way")]


def test_several_answers(plain: Serving) -> None:
    found = chat(plain, n=3, seed=7)
    assert [choice.index for choice in found.choices] == [0, 1, 2]
    assert {job.picking.seed for job in plain.engine.jobs[-3:]} == {7, 8, 9}
    one = chat(plain).usage
    assert found.usage.prompt_tokens == one.prompt_tokens  # a prompt is counted once
    assert found.usage.completion_tokens == 3 * one.completion_tokens
    texts = {0: "", 1: "", 2: ""}
    for event in chat(plain, n=3, stream=True):
        for choice in event.choices:
            texts[choice.index] += choice.delta.content or ""
    assert set(texts.values()) == {ANSWER}


def test_log_probabilities_of_a_chat(plain: Serving) -> None:
    found = chat(plain, logprobs=True, top_logprobs=2).choices[0].logprobs.content
    assert b"".join(bytes(entry.bytes) for entry in found).decode() == ANSWER
    assert all(entry.logprob == -0.5 and len(entry.top_logprobs) == 2 for entry in found)
    assert [(t.token, t.logprob) for t in found[0].top_logprobs] == [("Y", -0.5), (tiny_tokenizer().decode([5]), -1.5)]
    streamed = [
        entry
        for event in chat(plain, logprobs=True, stream=True)
        if event.choices[0].logprobs
        for entry in event.choices[0].logprobs.content
    ]
    assert [entry.bytes for entry in streamed] == [entry.bytes for entry in found]
    assert not streamed[0].top_logprobs
    cut = chat(plain, logprobs=True, stop="is on").choices[0]
    read = [bytes(entry.bytes).decode(errors="replace") for entry in cut.logprobs.content]
    assert "".join(read[-2:]).endswith("is") and not "".join(read[:-1]).endswith("is")  # to the token that it cuts


def test_every_choice_of_sampling_reaches_the_engine(plain: Serving) -> None:
    extra = {"top_k": 5, "min_p": 0.1, "repetition_penalty": 1.2, "stop_token_ids": [9]}
    chat(
        plain, temperature=0.5, top_p=0.9, presence_penalty=0.1, frequency_penalty=0.2, logit_bias={"7": -100},
        max_completion_tokens=5, extra_body=extra,
    )  # fmt: skip
    job = plain.engine.jobs[-1]
    picked = job.picking
    assert (picked.temperature, picked.top_p, picked.top_k, picked.min_p) == (0.5, 0.9, 5, 0.1)
    assert (picked.presence, picked.frequency, picked.repetition) == (0.1, 0.2, 1.2)
    assert (picked.logit_bias, job.stop_ids[-1], job.max_new_tokens) == (((7, -100.0),), 9, 5)
    found = chat(plain, max_tokens=5)
    assert found.choices[0].finish_reason == "length" and found.usage.completion_tokens == 5
    chat(plain, extra_body={"ignore_eos": True, "user": "anna", "store": False, "parallel_tool_calls": True})
    assert plain.engine.jobs[-1].stop_ids == ()
    assert plain.engine.jobs[-1].max_new_tokens == plain.engine.context - len(job.tokens)  # to the context's end


def test_messages_are_read_as_training_rows_are(plain: Serving) -> None:
    parts = [{"type": "text", "text": "Where is "}, {"type": "text", "text": "my order?"}]
    messages: list[Any] = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": parts}]
    chat(plain, messages=messages)
    said = [{"role": "system", "content": "Be brief."}, *HELLO]
    assert list(plain.engine.jobs[-1].tokens) == Renderer(tiny_tokenizer()).prompt_ids(said)
    answer = chat(plain).choices[0].message
    chat(plain, messages=[*HELLO, answer, *HELLO])  # the client's own object, with all its nulls
    typed = [{"role": "user", "content": "a<|im_end|>b"}]
    chat(plain, messages=typed)
    assert plain.engine.jobs[-1].tokens.count(tiny_tokenizer().eos_token_id) == 1  # the template's own


# --- forms and tools ----------------------------------------------------------------------------------------------


def test_structured_answers(plain: Serving) -> None:
    pytest.importorskip("llguidance")
    schema = {
        "type": "object", "properties": {"colour": {"enum": ["red", "blue"]}, "n": {"enum": [1, 2]}},
        "required": ["colour", "n"], "additionalProperties": False,
    }  # fmt: skip
    wanted = {"type": "json_schema", "json_schema": {"name": "c", "schema": schema, "strict": True}}
    found = json.loads(chat(plain, response_format=wanted).choices[0].message.content)
    assert found["colour"] in ("red", "blue") and found["n"] in (1, 2)
    assert plain.engine.jobs[-1].form == ("json_schema", json.dumps(schema), False)
    assert isinstance(json.loads(chat(plain, response_format={"type": "json_object"}).choices[0].message.content), dict)
    for extra in ({"guided_choice": ["yes", "no"]}, {"structured_outputs": {"choice": ["yes", "no"]}}):
        assert chat(plain, extra_body=extra).choices[0].message.content in ("yes", "no")
    for extra in ({"guided_regex": "[ab]{3}"}, {"structured_outputs": {"regex": "[ab]{3}"}}):
        assert set(chat(plain, extra_body=extra).choices[0].message.content) <= {"a", "b"}
    assert "red" in chat(plain, extra_body={"guided_json": json.dumps({"const": "red"})}).choices[0].message.content


def test_tools_that_the_model_chooses(tooled: Serving) -> None:
    found = chat(tooled, model="caller", tools=[TOOL, OTHER])
    message = found.choices[0].message
    assert message.content == "Let me look." and found.choices[0].finish_reason == "tool_calls"
    assert [(c.function.name, json.loads(c.function.arguments)) for c in message.tool_calls] == [
        ("status", {"state": "done"})
    ] * 2
    renderer = Renderer(tokenizer_of("qwen3"))
    assert list(tooled.engine.jobs[-1].tokens) == renderer.prompt_ids(HELLO, [TOOL, OTHER])
    # the next turn, with the calls as the client has them, is rendered as a training row would be
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "done"}
    chat(tooled, messages=[*HELLO, message, result], tools=[TOOL])
    text = renderer.tokenizer.decode(tooled.engine.jobs[-1].tokens)
    assert '<tool_call>\n{"name": "status", "arguments": {"state": "done"}}\n</tool_call>' in text
    assert "<tool_response>\ndone\n</tool_response>" in text
    assert chat(tooled, tools=[TOOL]).choices[0].message.content == ANSWER  # text stays text
    silent = chat(tooled, model="caller", tools=[TOOL], tool_choice="none").choices[0]
    assert CALL in silent.message.content and silent.message.tool_calls is None and silent.finish_reason == "stop"
    one = chat(tooled, model="caller", tools=[TOOL], parallel_tool_calls=False).choices[0]
    assert len(one.message.tool_calls) == 1 and one.finish_reason == "tool_calls"
    assert chat(tooled, model="caller", tools=[OTHER]).choices[0].message.tool_calls is None


def test_tools_in_a_stream(tooled: Serving) -> None:
    text, calls = "", dict[int, tuple[str, str]]()
    for event in chat(tooled, model="caller", tools=[TOOL], stream=True):
        text += event.choices[0].delta.content or ""
        for call in event.choices[0].delta.tool_calls or []:
            calls[call.index] = (call.function.name, call.function.arguments)
        finish = event.choices[0].finish_reason
    assert (text, finish) == ("Let me look.", "tool_calls")
    assert calls == dict.fromkeys((0, 1), ("status", '{"state": "done"}'))


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "status"}}])
def test_tools_that_are_required(tooled: Serving, choice: Any) -> None:
    pytest.importorskip("llguidance")
    found = chat(tooled, tools=[OTHER, TOOL], tool_choice=choice)
    call = found.choices[0].message.tool_calls[0]
    assert (call.function.name, json.loads(call.function.arguments)) == ("status", {"state": "done"})
    assert found.choices[0].message.content is None and found.choices[0].finish_reason == "tool_calls"
    job = tooled.engine.jobs[-1]
    assert job.form is not None and job.form[0] == "json_schema"
    text = tokenizer_of("qwen3").decode(job.tokens)
    assert text.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n\n<tool_call>\n")  # as the template writes it


# --- completions --------------------------------------------------------------------------------------------------


def test_completions(plain: Serving) -> None:
    client = plain.client()
    ids = tiny_tokenizer()("the quick brown")["input_ids"]
    found = client.completions.create(model="tiny", prompt="the quick brown", max_tokens=100)
    assert found.choices[0].text == ANSWER and plain.engine.jobs[-1].tokens == tuple(ids)
    client.completions.create(model="tiny", prompt=ids)
    assert plain.engine.jobs[-1].tokens == tuple(ids) and plain.engine.jobs[-1].max_new_tokens == 16
    found = client.completions.create(model="tiny", prompt=["a", "the fox"], n=2, echo=True, max_tokens=100)
    assert [c.text for c in found.choices] == ["a" + ANSWER] * 2 + ["the fox" + ANSWER] * 2
    assert found.usage.prompt_tokens == 1 + len(tiny_tokenizer()("the fox")["input_ids"])
    assert found.usage.prompt_tokens_details.cached_tokens == 8
    streamed = client.completions.create(model="tiny", prompt="a", echo=True, stream=True, max_tokens=100)
    assert "".join(event.choices[0].text for event in streamed) == "a" + ANSWER


def test_log_probabilities_of_completions(plain: Serving) -> None:
    found = plain.client().completions.create(model="tiny", prompt="a", logprobs=2, max_tokens=100).choices[0].logprobs
    assert found.tokens[0] == "Y" and found.token_logprobs == [-0.5] * len(found.tokens)
    for token, offset in zip(found.tokens, found.text_offset, strict=True):
        assert token.startswith("bytes:") or ANSWER[offset:].startswith(token)
    assert any(token.startswith("bytes:\\x") for token in found.tokens)
    assert found.top_logprobs[0]["Y"] == -0.5 and len(found.top_logprobs[0]) == 2


@pytest.mark.parametrize("stream", [False, True])
def test_log_probabilities_of_prompts(plain: Serving, stream: bool) -> None:
    client, prompt = plain.client(), "the fox 你好 runs"
    ids = tiny_tokenizer()(prompt)["input_ids"]
    asked = {"model": "tiny", "prompt": [prompt, "a"], "echo": True, "logprobs": 2, "max_tokens": 3, "stream": stream}
    told: list[Any] = [[], []]
    for choices in (event.choices for event in client.completions.create(**asked)) if stream else ():
        for choice in choices:
            told[choice.index].append(choice)
    if not stream:
        told = [[choice] for choice in client.completions.create(**asked).choices]
    assert [job.prompt_logprobs for job in plain.engine.jobs[-2:]] == [2, 2]
    for n, own in ((0, prompt), (1, "a")):
        text = "".join(choice.text for choice in told[n])
        assert text.startswith(own) and ANSWER.startswith(text[len(own) :])
        parts = {
            name: [value for choice in told[n] if choice.logprobs for value in getattr(choice.logprobs, name)]
            for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset")
        }
        count = len(tiny_tokenizer()(own)["input_ids"])
        assert parts["token_logprobs"] == [None] + [-2.0] * (count - 1) + [-0.5] * 3
        assert parts["top_logprobs"][0] is None and all(parts["top_logprobs"][1:])
        for token, offset in zip(parts["tokens"], parts["text_offset"], strict=True):
            assert token.startswith("bytes:") or text[offset:].startswith(token)
        assert parts["text_offset"][0] == 0 and parts["text_offset"][count] == len(own)
    alone = client.completions.create(model="tiny", prompt=ids, echo=True, logprobs=0, max_tokens=0)
    assert (alone.choices[0].text, alone.choices[0].finish_reason, alone.usage.completion_tokens) == (
        prompt,
        "length",
        0,
    )
    assert [len(top or ()) for top in alone.choices[0].logprobs.top_logprobs] == [0] + [1] * (len(ids) - 1)
    found, _ = raw(plain, "/v1/completions", {"model": "tiny", "prompt": "a", "echo": True, "logprobs": 1})
    documents.Completion.model_validate(found)


def test_time_in_the_queue_is_a_figure(plain: Serving) -> None:
    chat(plain, n=2)
    url = plain.url + "/metrics"
    lines = urllib.request.urlopen(url, timeout=20).read().decode().splitlines()
    name = 'tunegate_time_in_queue_seconds_{}{{model="support"}}'
    counts = {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if not line.startswith("#")}
    assert counts[name.format("count")] >= 2
    assert counts[name.format("sum")] == pytest.approx(0.02 * counts[name.format("count")])


def test_tokenize_and_back(plain: Serving) -> None:
    found, _ = raw(plain, "/tokenize", {"model": "tiny", "messages": HELLO, "return_token_strs": True})
    documents.Tokenized.model_validate(found)
    assert found["tokens"] == Renderer(tiny_tokenizer()).prompt_ids(HELLO) and found["token_strs"][0] == "<|im_start|>"
    back, _ = raw(plain, "/detokenize", {"tokens": found["tokens"]})
    assert back == {"prompt": "<|im_start|>user\nWhere is my order?<|im_end|>\n<|im_start|>assistant\n"}
    ids, _ = raw(plain, "/tokenize", {"prompt": "a<|im_end|>b"})
    plain.client().completions.create(model="tiny", prompt="a<|im_end|>b")
    assert ids["tokens"] == list(plain.engine.jobs[-1].tokens) and 2 not in ids["tokens"]


# --- models and state ---------------------------------------------------------------------------------------------


def test_models(plain: Serving) -> None:
    client = plain.client()
    listed = {model.id: model for model in client.models.list()}
    assert listed["support"].parent == "tiny" and listed["support"].root == "/adapters/support"
    assert (listed["tiny"].standing, listed["support"].standing) == ("base", "ship")
    assert client.models.retrieve("support").fingerprint == "b3:support"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("a/b")


def test_adapters_come_and_go(plain: Serving) -> None:
    def post(path: str, **fields: Any) -> tuple[int, str]:
        body = json.dumps(fields).encode()
        request = urllib.request.Request(f"{plain.url}/v1/{path}", body, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=20) as reply:
                return reply.status, reply.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)["error"]["message"]

    load, unload = "load_lora_adapter", "unload_lora_adapter"
    assert post(load, lora_name="other", lora_path="/x") == (200, "Success: LoRA adapter 'other' added successfully.")
    assert chat(plain, model="other").choices[0].message.content == "A short one"
    status, said = post(load, lora_name="other", lora_path="/y")
    assert status == 400 and "has already been loaded" in said and "load_inplace" in said
    assert post(load, lora_name="other", lora_path="/y", load_inplace=True)[0] == 200
    assert plain.client().models.retrieve("other").root == "/y"
    assert post(unload, lora_name="other") == (200, "Success: LoRA adapter 'other' removed successfully.")
    assert post(unload, lora_name="other")[0] == 404
    assert post(load, lora_name="new", lora_path="missing")[0] == 404
    assert post(load, lora_name="new", lora_path="another-base")[0] == 400
    assert post(load, lora_name="new")[0] == 400
    status, said = post(load, lora_name="tiny", lora_path="/x")
    assert status == 400 and "load_inplace" not in said  # the base's own name


def test_a_model_that_must_not_answer(plain: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    async def refuse(name: str) -> None:
        raise ModelRefused("its base was superseded", where=name)

    monkeypatch.setattr(plain.catalogue, "resolve", refuse)
    with pytest.raises(openai.PermissionDeniedError, match="superseded"):
        chat(plain)


def test_admin_routes_can_be_left_out() -> None:
    from serving import FakeCatalogue, FakeEngine
    from tunegate.serve.app import create_app

    engine = FakeEngine(tiny_tokenizer(), says)
    app = create_app(engine, FakeCatalogue(Renderer(tiny_tokenizer())), admin=False)  # type: ignore[arg-type]
    assert not any("lora" in path for path in app.openapi()["paths"])


def test_metrics_and_health(plain: Serving) -> None:
    chat(plain, n=2)
    with urllib.request.urlopen(plain.url + "/metrics", timeout=20) as reply:
        text = reply.read().decode()
    figures = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    answered = figures['tunegate_answers_total{finish="stop",model="support"}']
    generated = figures['tunegate_generated_tokens_total{model="support"}']
    assert float(answered) >= 2 and float(generated) >= 2 * len(tiny_tokenizer()(ANSWER)["input_ids"])
    assert figures["tunegate_engine_up"] == "1.0" and figures["tunegate_engine_running"] == "0.0"
    assert float(figures['tunegate_requests_total{route="/v1/chat/completions",status="200"}']) >= 1
    assert "nope" not in text
    with urllib.request.urlopen(plain.url + "/health", timeout=20) as reply:
        assert json.load(reply) == {"status": "ok"}


def test_an_engine_that_is_full_gone_or_dies() -> None:
    with serving(tiny_tokenizer(), says) as server:
        server.engine.full = True
        for stream in (False, True):
            with pytest.raises(openai.RateLimitError) as full:
                chat(server, stream=stream)
            assert full.value.response.headers["Retry-After"] == "1"
        server.engine.full, server.engine.dies_after = False, 3
        for n in (1, 2):
            with pytest.raises(openai.InternalServerError) as gone:
                chat(server, n=n)
            assert gone.value.status_code == 503 and gone.value.response.headers["Retry-After"] == "5"
            assert gone.value.body["code"] == "engine_gone"
        with pytest.raises(openai.APIError, match="engine ended"):  # in the middle of a stream: its last event
            list(chat(server, stream=True))
        server.engine.alive = False
        with pytest.raises(openai.InternalServerError) as down:
            chat(server)
        assert down.value.status_code == 503
        with pytest.raises(urllib.error.HTTPError) as health:
            urllib.request.urlopen(server.url + "/health", timeout=20)
        assert health.value.code == 503 and health.value.headers["Retry-After"]
        with urllib.request.urlopen(server.url + "/metrics", timeout=20) as reply:
            assert b"tunegate_engine_up 0.0" in reply.read()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("n", [1, 3])
def test_a_client_that_goes_away_cancels_its_jobs(stream: bool, n: int) -> None:
    with serving(tiny_tokenizer(), says, pause=0.05) as server:
        if stream:
            found = chat(server, stream=True, n=n)
            next(iter(found))
            assert server.engine.running == n
            found.close()
        else:
            with pytest.raises(openai.APITimeoutError):
                server.client().with_options(timeout=0.3).chat.completions.create(model="support", messages=HELLO, n=n)
        until = time.monotonic() + 10
        while server.engine.running and time.monotonic() < until:
            time.sleep(0.01)
        assert (server.engine.running, server.engine.cancelled) == (0, n)


def test_many_at_once_do_not_mix(plain: Serving) -> None:
    found: list[str] = []

    def ask(number: int) -> None:
        client = plain.client()
        text = f"number {number} of the fox"
        reply = client.completions.create(model="tiny", prompt=text, echo=True, max_tokens=100)
        found.append(reply.choices[0].text if reply.choices[0].text == text + ANSWER else f"wrong: {reply}")

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sorted(found) == sorted(f"number {n} of the fox{ANSWER}" for n in range(12))
