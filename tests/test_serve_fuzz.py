"""Requests that schemathesis makes from the server's own OpenAPI document: answers as documented, and never a 500."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from chat import tokenizer_of
from serving import Serving, serving

schemathesis = pytest.importorskip("schemathesis")
pytestmark = pytest.mark.slow

EXAMPLES = 150  # of each route and mode
ROUTES = [
    ("/v1/chat/completions", "POST"),
    ("/v1/completions", "POST"),
    ("/tokenize", "POST"),
    ("/detokenize", "POST"),
    ("/v1/load_lora_adapter", "POST"),
    ("/v1/unload_lora_adapter", "POST"),
    ("/v1/models", "GET"),
    ("/v1/models/{model_id}", "GET"),
    ("/health", "GET"),
    ("/metrics", "GET"),
]


@pytest.fixture(scope="module")
def server() -> Iterator[Serving]:
    with serving(tokenizer_of("qwen3"), lambda job: "A short answer.", context=2048) as found:
        yield found


@pytest.fixture(scope="module")
def schema(server: Serving) -> Any:
    found = schemathesis.openapi.from_dict(server.app.openapi())
    found.config.update(base_url=server.url)
    return found


def test_every_route_is_fuzzed(schema: Any) -> None:
    described = {(path, method.upper()) for path, methods in schema.raw_schema["paths"].items() for method in methods}
    assert described == set(ROUTES)


CASES = [
    (path, method, mode) for path, method in ROUTES for mode in ("positive", "negative")[: 2 if method == "POST" else 1]
]


@pytest.mark.parametrize(("path", "method", "mode"), CASES)
def test_requests_made_from_the_document(
    server: Serving, schema: Any, path: str, method: str, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    operation = schema[path][method]
    kinds = schemathesis.GenerationMode
    wanted = kinds.POSITIVE if mode == "positive" else kinds.NEGATIVE
    from schemathesis.checks import not_a_server_error
    from schemathesis.specs.openapi.checks import (
        content_type_conformance,
        response_schema_conformance,
        status_code_conformance,
    )

    checks = [not_a_server_error, content_type_conformance, response_schema_conformance, status_code_conformance]
    statuses: set[int] = set()

    @settings(max_examples=EXAMPLES, suppress_health_check=list(HealthCheck), phases=[Phase.generate], database=None)
    @given(case=operation.as_strategy(generation_mode=wanted), name=st.sampled_from(["tiny", "support", None]))
    def ask(case: Any, name: str | None) -> None:
        if isinstance(case.body, dict) and "model" in case.body and name is not None:
            case.body["model"] = name  # else every request ends at a name that is not served
        reply = case.call_and_validate(checks=checks, timeout=20)
        statuses.add(reply.status_code)

    ask()
    assert server.engine.running == 0
    if path.endswith("completions") and mode == "positive":
        assert 200 in statuses
