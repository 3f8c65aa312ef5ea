"""Requests to Ollama's paths made up by schemathesis from our own OpenAPI document."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from tests.server.openai.serving import Running, serving
from tests.server.openai.test_openapi import CHECKS

from slipstream.server.ollama.api import OLLAMA

OPERATIONS = ["chat", "generate", "embed", "show"]


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with serving(apis=[OLLAMA]) as running:
        yield running


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("mode", list(GenerationMode))
def test_no_request_makes_the_server_fail(server: Running, name: str, mode: GenerationMode) -> None:
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    operation = schema[f"/api/{name}"]["POST"]

    @settings(
        max_examples=6,
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
    server.wait_idle()
