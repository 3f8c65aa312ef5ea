"""Requests made up by schemathesis from our own OpenAPI document."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import response_schema_conformance, status_code_conformance
from tests.server.openai.serving import Running

CHECKS = [not_a_server_error, status_code_conformance, response_schema_conformance]
OPERATIONS = [
    "POST /v1/completions",
    "POST /v1/chat/completions",
    "POST /v1/chat/completions/batch",
    "POST /invocations",
    "POST /ping",
    "GET /ping",
    "GET /load",
    "POST /v1/embeddings",
    "POST /v1/rerank",
    "POST /v1/score",
    "POST /v1/responses",
    "GET /v1/responses/{response_id}",
    "GET /v1/responses/{response_id}/input_items",
    "DELETE /v1/responses/{response_id}",
    "POST /v1/messages",
    "POST /v1/messages/count_tokens",
    "POST /api/chat",
    "POST /api/generate",
    "POST /api/embed",
    "POST /api/embeddings",
    "POST /api/show",
    "GET /api/tags",
    "GET /api/ps",
    "GET /api/version",
    "POST /tokenize",
    "POST /detokenize",
    "GET /v1/models",
    "GET /v1/models/{model}",
    "GET /health",
    "GET /metrics",
    "GET /version",
    "GET /tokenizer_info",
]
# Of those without a body nothing can be wrong.
BODIES = {label for label in OPERATIONS if label.startswith("POST")} - {"POST /ping"}


@pytest.fixture(scope="module")
def operations(server: Running) -> dict[str, Any]:
    """The operations of the document that the server gives."""
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    found: list[Any] = list(schema.get_all_operations())
    return {result.ok().label: result.ok() for result in found}


def test_the_document_tells_what_values_may_be(server: Running) -> None:
    document = httpx.get(f"{server.url}/openapi.json").json()
    answers = document["paths"]["/metrics"]["get"]["responses"]
    assert list(answers["200"]["content"]) == ["text/plain"]
    schemas = document["components"]["schemas"]

    def branch(request: str, field: str, kind: str) -> dict[str, Any]:
        described = schemas[request]["properties"][field]
        branches = described.get("anyOf", [described])
        found: dict[str, Any] = next(b for b in branches if b.get("type") == kind)
        return found

    for request in ("CompletionRequest", "ChatRequest"):
        top_p = branch(request, "top_p", "number")
        assert (top_p["minimum"], top_p["maximum"]) == (0, 1)
        assert branch(request, "seed", "integer")["minimum"] == -(2**63)
        bias = branch(request, "logit_bias", "object")["additionalProperties"]
        assert bias == {"type": "number", "minimum": -100, "maximum": 100}
        assert branch(request, "allowed_token_ids", "array")["minItems"] == 1
    assert branch("CompletionRequest", "prompt", "array")["minItems"] == 1
    assert branch("ChatRequest", "messages", "array")["minItems"] == 1
    assert branch("CompletionRequest", "max_tokens", "integer")["minimum"] == 0
    assert branch("ChatRequest", "max_tokens", "integer")["minimum"] == 1
    assert schemas["ChatRequest"]["properties"]["verbosity"]["enum"] == [None, "medium"]


def test_the_document_has_all_operations(operations: dict[str, Any]) -> None:
    assert set(operations) == set(OPERATIONS)


@pytest.mark.parametrize(
    ("label", "mode"),
    [
        (label, mode)
        for label in OPERATIONS
        for mode in GenerationMode
        if label in BODIES or mode is GenerationMode.POSITIVE
    ],
)
def test_no_request_makes_the_server_fail(
    server: Running, operations: dict[str, Any], label: str, mode: GenerationMode
) -> None:
    operation = operations[label]

    @settings(
        max_examples=30,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def check(case: Any) -> None:  # noqa: ANN401 - generic in what it was made from
        case.call_and_validate(checks=CHECKS, timeout=60)

    check()
    assert httpx.get(f"{server.url}/health").status_code == 200
    server.wait_idle()
