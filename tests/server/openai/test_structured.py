"""Answers held to a form, and calls of tools, by a tiny random model through OpenAI's client."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import openai
import pytest
from pydantic import BaseModel
from tests.runtime.chat.templates import QWEN
from tests.server.openai.serving import Running, serving

from slipstream.runtime.loading import load

HELLO: list[Any] = [{"role": "user", "content": "hi"}]
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "unit": {"enum": ["celsius", "kelvin"]},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
    },
    "required": ["unit", "days"],
    "additionalProperties": False,
    # A random model likes white space.
    "x-guidance": {"whitespace_flexible": False},
}
# Small, since the model takes a token a character.
DAYS = {
    "type": "object",
    "properties": {"days": {"enum": [1, 2]}},
    "required": ["days"],
    "additionalProperties": False,
    "x-guidance": {"whitespace_flexible": False},
}
TOOL: Any = {"type": "function", "function": {"name": "f", "strict": True, "parameters": DAYS}}


class Weather(BaseModel):
    """What an answer is parsed as."""

    unit: Literal["celsius", "kelvin"]
    rains: bool


@pytest.fixture(scope="module")
def tiny(tiny_engine: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server of a random model with the chat template of Qwen 3."""
    template = tmp_path_factory.mktemp("template") / "qwen3.jinja"
    template.write_text(QWEN)
    with serving(load(tiny_engine, {"chat_template": str(template)})) as running:
        yield running


def ask(running: Running, **changes: Any) -> Any:  # noqa: ANN401 - the client's types
    extra = {"chat_template_kwargs": {"enable_thinking": False}, **changes.pop("extra_body", {})}
    given = {"model": "counting", "messages": HELLO, "max_tokens": 400, "seed": 1, **changes}
    return running.client().chat.completions.create(**given, extra_body=extra)


def check(arguments: str) -> None:
    """Raise for what does not hold to the schema."""
    value = json.loads(arguments)
    assert set(value) == {"unit", "days"} and value["unit"] in ("celsius", "kelvin")
    assert 1 <= value["days"] <= 9


def test_a_pydantic_model_is_parsed(tiny: Running) -> None:
    answer = tiny.client().chat.completions.parse(
        model="counting",
        messages=HELLO,
        response_format=Weather,
        max_tokens=400,
        seed=1,
        extra_body={"chat_template_kwargs": {"enable_thinking": False}},
    )
    assert isinstance(answer.choices[0].message.parsed, Weather)
    assert answer.choices[0].finish_reason == "stop"


def test_the_streaming_helper_parses_too(tiny: Running) -> None:
    client = tiny.client()
    with client.chat.completions.stream(
        model="counting",
        messages=HELLO,
        response_format=Weather,
        max_tokens=400,
        seed=1,
        extra_body={"chat_template_kwargs": {"enable_thinking": False}},
    ) as stream:
        final = stream.get_final_completion()
    assert isinstance(final.choices[0].message.parsed, Weather)


@pytest.mark.parametrize("choice", ["required", {"type": "function",
                                                 "function": {"name": "f"}}])  # fmt: skip
def test_a_tool_is_called_with_arguments_that_hold(tiny: Running, choice: object) -> None:
    options: Any = {"tools": [TOOL], "tool_choice": choice, "parallel_tool_calls": False}
    answer = ask(tiny, **options)
    (call,) = answer.choices[0].message.tool_calls
    assert answer.choices[0].finish_reason == "tool_calls"
    assert call.function.name == "f"
    assert json.loads(call.function.arguments) in ({"days": 1}, {"days": 2})
    with tiny.client().chat.completions.stream(
        model="counting", messages=HELLO, max_tokens=400, seed=1, **options,
        extra_body={"chat_template_kwargs": {"enable_thinking": False}},
    ) as stream:  # fmt: skip
        calls: Any = stream.get_final_completion().choices[0].message.tool_calls
    (streamed,) = calls
    assert streamed.function.arguments == call.function.arguments


def test_thoughts_within_their_budget_come_before_the_form(tiny: Running) -> None:
    answer = ask(
        tiny,
        response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}},
        extra_body={"chat_template_kwargs": {}, "thinking_token_budget": 8},
    )
    check(answer.choices[0].message.content)
    details = answer.usage.completion_tokens_details
    assert answer.choices[0].message.reasoning and details.reasoning_tokens <= 10


@pytest.mark.parametrize(
    ("fields", "pattern"),
    [
        ({"guided_choice": ["yes", "no"]}, "yes|no"),
        ({"guided_regex": "[0-9]{3}"}, "[0-9]{3}"),
        ({"structured_outputs": {"grammar": 'start: "a" /[bc]/'}}, "a[bc]"),
        ({"structured_outputs": {"json": {"enum": [1, 2]}}}, "1|2"),
    ],
)
def test_both_endpoints_take_vllms_fields(
    tiny: Running, fields: dict[str, Any], pattern: str
) -> None:
    chat = ask(tiny, extra_body=fields).choices[0]
    assert re.fullmatch(pattern, chat.message.content) and chat.finish_reason == "stop"
    text = tiny.client().completions.create(
        model="counting", prompt="a", max_tokens=20, extra_body=fields
    )
    assert re.fullmatch(pattern, text.choices[0].text)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {
            "$ref": "#/nowhere"}}}}, "response_format"),
        ({"guided_regex": "("}, "guided_regex"),
        ({"structured_outputs": {"regex": "(" * 100 + "a{1000}" + "){1000}" * 100}},
         "structured_outputs"),
        ({"structured_outputs": {"grammar": "start: nothing"}}, "structured_outputs"),
        ({"tools": [{"type": "function", "function": {"name": "f", "strict": True, "parameters": {
            "properties": {"a": {"type": "nonsense"}}}}}], "tool_choice": "required"}, "tools"),
    ],
)  # fmt: skip
def test_what_cannot_be_held_is_400_while_others_stream(
    tiny: Running, fields: dict[str, Any], param: str
) -> None:
    stream = ask(tiny, stream=True, max_tokens=60, extra_body={"ignore_eos": True})
    next(iter(stream))
    with pytest.raises(openai.BadRequestError) as caught:
        ask(tiny, extra_body=fields)
    assert caught.value.param == param
    assert [chunk.choices[0].finish_reason for chunk in stream][-1] == "length"
