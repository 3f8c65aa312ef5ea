"""Forms and calls of a tiny random model through OpenAI's client of the Responses API."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import openai
import pytest
from pydantic import BaseModel
from tests.runtime.chat.templates import QWEN
from tests.server.openai.serving import serving

from slipstream.runtime.loading import load

# Small, since the model takes a token a character.
DAYS = {
    "type": "object",
    "properties": {"days": {"enum": [1, 2]}},
    "required": ["days"],
    "additionalProperties": False,
}
TOOL: Any = {"type": "function", "name": "f", "strict": True, "parameters": DAYS}
QUIET = {"chat_template_kwargs": {"enable_thinking": False}, "seed": 1}


class Weather(BaseModel):
    """What an answer is parsed as."""

    unit: Literal["celsius", "kelvin"]
    rains: bool


@pytest.fixture(scope="module")
def client(tiny_engine: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    """A client of a server of a random model with the chat template of Qwen 3."""
    template = tmp_path_factory.mktemp("template") / "qwen3.jinja"
    template.write_text(QWEN)
    engine = load(tiny_engine, {"chat_template": str(template)})
    with serving(engine) as running, running.client() as client:
        yield client


def test_a_pydantic_model_is_parsed(client: openai.OpenAI) -> None:
    answer = client.responses.parse(
        model="counting", input="hi", text_format=Weather, max_output_tokens=400, extra_body=QUIET
    )
    assert isinstance(answer.output_parsed, Weather) and answer.status == "completed"


def test_the_streaming_helper_parses_too(client: openai.OpenAI) -> None:
    with client.responses.stream(
        model="counting", input="hi", text_format=Weather, max_output_tokens=400, extra_body=QUIET
    ) as stream:
        final = stream.get_final_response()
    assert isinstance(final.output_parsed, Weather)


@pytest.mark.parametrize("by_id", [True, False])
def test_a_tool_is_called_and_answered(client: openai.OpenAI, by_id: bool) -> None:
    asked: list[Any] = [{"role": "user", "content": "hi"}]
    first = client.responses.create(
        model="counting", input=asked, tools=[TOOL], tool_choice="required",
        parallel_tool_calls=False, max_output_tokens=400, extra_body=QUIET,
    )  # fmt: skip
    (call,) = (item for item in first.output if item.type == "function_call")
    assert call.name == "f" and json.loads(call.arguments) in ({"days": 1}, {"days": 2})
    assert first.status == "completed"
    answer: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "rain"}
    past: Any = {"previous_response_id": first.id, "input": [answer]}
    if not by_id:
        past = {"input": [*asked, *first.output, answer]}
    second = client.responses.create(
        model="counting", tools=[TOOL], max_output_tokens=5, temperature=0, extra_body=QUIET, **past
    )
    assert second.usage and first.usage
    assert second.usage.input_tokens > first.usage.input_tokens + first.usage.output_tokens


def test_thoughts_within_their_budget_come_before_the_form(client: openai.OpenAI) -> None:
    answer = client.responses.create(
        model="counting", input="hi", max_output_tokens=100,
        text={"format": {"type": "json_schema", "name": "x", "schema": DAYS}},
        extra_body={"thinking_token_budget": 8, "seed": 1},
    )  # fmt: skip
    assert [item.type for item in answer.output] == ["reasoning", "message"]
    assert json.loads(answer.output_text) in ({"days": 1}, {"days": 2})
    assert answer.usage and answer.usage.output_tokens_details.reasoning_tokens <= 10


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"text": {"format": {"type": "json_schema", "name": "x",
                              "schema": {"$ref": "#/nowhere"}}}}, "text"),
        ({"tools": [{**TOOL, "parameters": {"properties": {"a": {"type": "nonsense"}}}}],
          "tool_choice": "required"}, "tools"),
    ],
)  # fmt: skip
def test_what_cannot_be_held_is_400(
    client: openai.OpenAI, fields: dict[str, Any], param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(model="counting", input="hi", **fields)
    assert caught.value.param == param
