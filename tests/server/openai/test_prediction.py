"""OpenAI's ``prediction``, and what is told of drafts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from tests.server.openai.serving import Running, serving

from slipstream.runtime.testing import counting_engine

CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def guessing() -> Iterator[Running]:
    """A server whose engine verifies up to three drafts a step."""
    with serving(counting_engine(speculative="ngram", num_speculative_tokens=3)) as running:
        yield running


def chat(server: Running, **fields: Any) -> dict[str, Any]:  # noqa: ANN401 - JSON
    # The template ends in ":", after which the counting model goes on with ";!?-_".
    body = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 12, **fields}
    response = server.post(CHAT, body)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def details(answer: dict[str, Any]) -> tuple[int, int]:
    told = answer["usage"]["completion_tokens_details"]
    return told["accepted_prediction_tokens"], told["rejected_prediction_tokens"]


def test_a_prediction_changes_the_usage_and_nothing_else(guessing: Running) -> None:
    plain = chat(guessing)
    text = plain["choices"][0]["message"]["content"]
    right = chat(guessing, prediction={"type": "content", "content": text})
    parts = [{"type": "text", "text": text[:4]}, {"type": "text", "text": text[4:]}]
    parted = chat(guessing, prediction={"type": "content", "content": parts})
    wrong = chat(guessing, prediction={"type": "content", "content": text[0] + "QQQQ" + text[1:]})
    for answer in (right, parted, wrong):
        assert answer["choices"] == plain["choices"]
    assert details(plain) == (0, 0)
    assert details(right) == details(parted) and details(right)[0] >= 3 and details(right)[1] == 0
    assert details(wrong)[1] > 0
    off = chat(guessing, prediction={"type": "content", "content": text}, speculative=False)
    assert off["choices"] == plain["choices"] and details(off) == (0, 0)


def test_a_stream_tells_the_same(guessing: Running) -> None:
    text = chat(guessing)["choices"][0]["message"]["content"]
    prediction = {"type": "content", "content": text}
    body = {
        "messages": [{"role": "user", "content": "a"}],
        "max_tokens": 12,
        "prediction": prediction,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    lines = guessing.post(CHAT, body).text.splitlines()
    chunks = [json.loads(line[6:]) for line in lines if line and line != "data: [DONE]"]
    assert details(chunks[-1]) == details(chat(guessing, prediction=prediction))


def test_drafts_are_counted(guessing: Running) -> None:
    text = chat(guessing)["choices"][0]["message"]["content"]
    chat(guessing, prediction={"type": "content", "content": text})
    stats = guessing.llm.stats.speculation
    assert stats is not None and stats.num_accepted_tokens > 0
    values = guessing.samples()
    prefix = "slipstream:spec_decode_num_accepted_tokens"
    assert values[f"{prefix}_total"] == stats.num_accepted_tokens
    places = [values[f"{prefix}_per_pos_total {place}"] for place in range(3)]
    assert sum(places) == stats.num_accepted_tokens


@pytest.mark.parametrize("prediction", ["x", {"type": "text", "content": "x"}, {"type": "content"}])
def test_another_shape_is_refused(guessing: Running, prediction: object) -> None:
    body = {"messages": [{"role": "user", "content": "a"}], "prediction": prediction}
    response = guessing.post(CHAT, body)
    assert response.status_code == 400 and "prediction" in response.json()["error"]["param"]
