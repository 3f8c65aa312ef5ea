"""The model by rules, on which suites of others run, calls tools and holds forms."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.server.by_rules import JOKE, SENTENCE, engine_by_rules
from tests.server.openai.serving import Running, serving

MAGIC = {"type": "object", "properties": {"input": {"type": "integer"}}, "required": ["input"]}
TOOLS: Any = [
    {"type": "function", "function": {"name": "magic_function", "parameters": MAGIC}},
    {"type": "function", "function": {"name": "other"}},
]


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "thinks"])
def rules(request: pytest.FixtureRequest, smollm2_engine: Path) -> Iterator[Running]:
    with serving(engine_by_rules(smollm2_engine, thinks=request.param)) as running:
        yield running


def ask(server: Running, content: str, **fields: Any) -> Any:  # noqa: ANN401 - the client's types
    messages: Any = [{"role": "user", "content": content}, *fields.pop("more", ())]
    return server.client().chat.completions.create(model="counting", messages=messages, **fields)


@pytest.mark.real_model
def test_a_loop_of_an_agent_ends(rules: Running) -> None:
    question = "What is the value of magic_function(7)?"
    message = ask(rules, question, tools=TOOLS).choices[0].message
    (call,) = message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == (
        "magic_function", {"input": 7})  # fmt: skip
    said = {"role": "assistant", "content": None, "tool_calls": [call.model_dump()]}
    returned = {"role": "tool", "tool_call_id": call.id, "content": "9"}
    answer = ask(rules, question, tools=TOOLS, more=[said, returned]).choices[0]
    assert answer.message.content == SENTENCE and answer.finish_reason == "stop"
    assert not answer.message.tool_calls


@pytest.mark.real_model
def test_a_form_chooses_among_its_texts(rules: Running) -> None:
    assert ask(rules, "Tell me a joke").choices[0].message.content == JOKE
    assert ask(rules, "Hello").choices[0].message.content == SENTENCE
    chosen = ask(rules, "Hello", tools=TOOLS, tool_choice={
        "type": "function", "function": {"name": "other"}}).choices[0].message  # fmt: skip
    assert [call.function.name for call in chosen.tool_calls] == ["other"]
    form = {"type": "json_object"}
    assert ask(rules, "Hello", response_format=form).choices[0].message.content == JOKE
