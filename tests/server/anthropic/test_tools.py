"""Tools, thoughts and forms through Anthropic's own client, by a tiny random model."""

from __future__ import annotations

import json
from typing import Any, Literal

from pydantic import BaseModel
from tests.server.anthropic.clients import HELLO, client, joined
from tests.server.openai.serving import Running

# Small, since the model takes a token a character; and a random model likes white space.
DAYS: dict[str, Any] = {
    "type": "object",
    "properties": {"days": {"enum": [1, 2]}},
    "required": ["days"],
    "additionalProperties": False,
    "x-guidance": {"whitespace_flexible": False},
}
TOOL: Any = {"name": "f", "description": "Counts.", "input_schema": DAYS, "strict": True}
ANSWERS = ({"days": 1}, {"days": 2})


class Weather(BaseModel):
    """What an answer is parsed as."""

    unit: Literal["celsius", "kelvin"]
    rains: bool


def given(**changes: Any) -> Any:  # noqa: ANN401 - the client's types
    thinking = {"type": "disabled"}
    body = {"messages": HELLO, "max_tokens": 100, "thinking": thinking}
    return {"model": "counting", **body, **changes}


def test_a_tool_is_called_and_its_result_taken(tiny: Running) -> None:
    messages = client(tiny).messages
    choice = {"type": "any", "disable_parallel_tool_use": True}
    asked = given(tools=[TOOL], tool_choice=choice)
    answer = messages.create(**asked)
    assert answer.stop_reason == "tool_use"
    (call,) = (block for block in answer.content if block.type == "tool_use")
    assert call.name == "f" and call.id and call.input in ANSWERS
    with messages.stream(**asked) as stream:
        final = stream.get_final_message()
    (same,) = (block for block in final.content if block.type == "tool_use")
    assert (same.name, same.input, final.stop_reason) == ("f", call.input, "tool_use")
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "42", "is_error": False}
    turns = [*HELLO, {"role": "assistant", "content": answer.content},
             {"role": "user", "content": [result]}]  # fmt: skip
    after = given(messages=turns, tools=[TOOL], max_tokens=5)
    assert messages.create(**after).usage.output_tokens == 5
    counted = messages.count_tokens(model="counting", messages=turns, tools=[TOOL])
    assert counted.input_tokens > answer.usage.input_tokens


def test_a_call_that_is_cut_off_has_what_there_is_of_its_input(tiny: Running) -> None:
    choice = {"type": "tool", "name": "f", "disable_parallel_tool_use": True}
    whole = client(tiny).messages.create(**given(tools=[TOOL], tool_choice=choice))
    found = set()
    for less in range(12, 30, 4):
        most = whole.usage.output_tokens - less
        cut = given(tools=[TOOL], tool_choice=choice, max_tokens=most)
        answer = client(tiny).messages.create(**cut)
        with client(tiny).messages.stream(**cut) as stream:
            final = stream.get_final_message()
        assert answer.stop_reason == final.stop_reason == "max_tokens"
        # The message of the stream is read by the client.
        called = [[b.model_dump() for b in m.content] for m in (answer, final)]
        (mine,), (same,) = ([b["input"] for b in c if b["type"] == "tool_use"] for c in called)
        assert mine == same
        found.add(json.dumps(mine))
    assert len(found) > 1


def test_an_answer_is_held_to_a_schema_after_thoughts_in_their_budget(tiny: Running) -> None:
    roomy = given(max_tokens=400)  # for white space
    parsed = client(tiny).messages.parse(**roomy, output_format=Weather)
    assert isinstance(parsed.parsed_output, Weather) and parsed.stop_reason == "end_turn"
    form = {"format": {"type": "json_schema", "schema": DAYS}}
    thinking = {"type": "enabled", "budget_tokens": 8}
    answer = client(tiny).messages.create(**given(output_config=form, thinking=thinking))
    thoughts, text = answer.content
    assert thoughts.type == "thinking" and text.type == "text"
    assert json.loads(text.text) in ANSWERS
    assert answer.usage.output_tokens_details is not None
    assert 0 < answer.usage.output_tokens_details.thinking_tokens <= 10


def test_a_coding_agents_request_is_streamed(tiny: Running) -> None:
    """The shape of what Claude Code sends in the middle of a session."""
    cached = {"cache_control": {"type": "ephemeral"}}
    path = {"type": "object", "properties": {"path": {"type": "string"}}}
    body: dict[str, Any] = {
        "model": "counting",
        "max_tokens": 40,
        "stream": True,
        "temperature": 1,
        "metadata": {"user_id": "user_1_account__session_2"},
        "thinking": {"type": "adaptive"},
        "output_config": {"effort": "medium"},
        "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        "system": [
            {"type": "text", "text": "x-anthropic-billing-header: cc_version=2.1.77; cch=aa;"},
            {"type": "text", "text": "You are an agent.", **cached},
        ],
        "tools": [{"name": "Read", "input_schema": path, **cached}],
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "<system-reminder>"},
                                         {"type": "text", "text": "mend it"}]},
            {"role": "assistant", "content": [
                {"type": "thinking", "thinking": "read first", "signature": "c2ln"},
                {"type": "text", "text": "I read it."},
                {"type": "tool_use", "id": "toolu_1", "name": "Read", "input": {"path": "x"},
                 "caller": {"type": "direct"}}]},
            {"role": "user", "content": [
                {"type": "tool_result", "tool_use_id": "toolu_1", "is_error": True,
                 "content": [{"type": "text", "text": "no such file"}], **cached}]},
        ],
    }  # fmt: skip
    headers = {"anthropic-beta": "claude-code-20250219", "anthropic-version": "2023-06-01"}
    stream = client(tiny).post(
        "/v1/messages?beta=true",
        body=body,
        options={"headers": headers},
        cast_to=object,
        stream=True,
        stream_cls=_stream(),
    )
    message = joined(stream)
    assert message["content"] and message["usage"].output_tokens
    again = tiny.post("/v1/messages?beta=true", {**body, "stream": False}).json()
    body["system"][0]["text"] = "x-anthropic-billing-header: cc_version=2.1.77; cch=bb;"
    other = tiny.post("/v1/messages?beta=true", {**body, "stream": False}).json()
    cached_tokens = other["usage"]["cache_read_input_tokens"]
    assert cached_tokens == again["usage"]["cache_read_input_tokens"] > 0


def _stream() -> Any:  # noqa: ANN401 - the client's types
    from anthropic import Stream
    from anthropic.types import RawMessageStreamEvent

    return Stream[RawMessageStreamEvent]
