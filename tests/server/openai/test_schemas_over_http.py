"""Schemas of JSONSchemaBench end to end: SmolLM2 at temperature 1, over HTTP."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from jsonschema.validators import Draft202012Validator, validator_for
from tests.runtime.structured.forms import schemas
from tests.server.openai.serving import Running, serving

from slipstream.runtime.loading import load

AT_ONCE = 8


@pytest.fixture(scope="module")
def smollm2(smollm2_engine: Path) -> Iterator[Running]:
    """A server of the real model."""
    with serving(load(smollm2_engine, {"max_seq_len": 512, "max_batch_size": AT_ONCE})) as running:
        yield running


def outcome(server: Running, number: int, case: dict[str, Any]) -> str:
    """What became of a request for an answer of a schema: it is refused, cut, or ends by itself."""
    form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": case["schema"]}}
    body = {
        "messages": [{"role": "user", "content": "Answer with a short example in JSON."}],
        "response_format": form,
        "temperature": 1.0,
        "seed": number,
        "max_tokens": 160,
    }
    response = server.post("/v1/chat/completions", body)
    if response.status_code == 400:
        error = response.json()["error"]
        assert error["param"] == "response_format" and "cannot be held: " in error["message"]
        return "refused"
    assert response.status_code == 200, response.text
    (choice,) = response.json()["choices"]
    if choice["finish_reason"] == "stop":
        value = json.loads(choice["message"]["content"])
        validator = validator_for(case["schema"], default=Draft202012Validator)
        errors = [error.message for error in validator(case["schema"]).iter_errors(value)]
        assert not errors, f"{case['name']}: {errors} in {value}"
    return str(choice["finish_reason"])


@pytest.mark.real_model
@pytest.mark.slow
def test_every_answer_that_ends_by_itself_is_valid(smollm2: Running) -> None:
    cases = list(schemas())
    with ThreadPoolExecutor(AT_ONCE) as threads:
        ends = Counter(threads.map(outcome, [smollm2] * len(cases), range(len(cases)), cases))
    assert ends["stop"] >= 20 and ends["refused"] < len(cases) / 2, ends
    assert ends.total() - ends["refused"] >= 45, ends
