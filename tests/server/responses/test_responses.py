"""The Responses API through OpenAI's client, on a model that counts."""

from __future__ import annotations

import json
from typing import Any

import httpx
import openai
import pytest
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter
from tests.server.devices import GatedDevice, engine_on
from tests.server.openai.serving import Running, serving
from tests.server.responses.asking import (
    SAID,
    SCHEMA,
    SCORED,
    TOOL,
    Hearing,
    ask,
    told,
    without_ids,
)

from slipstream.runtime.chat.options import ChatOptions, NamedTool, Tool
from slipstream.runtime.structured.output import StructuredOutput
from slipstream.server.core.refusal import Refusal
from slipstream.server.responses.reply import ResponseReply


def test_thoughts_texts_and_calls_are_items(server: Running) -> None:
    answer = ask(server, tools=[TOOL], metadata={"a": "b"}, reasoning={"effort": "low"},
                 extra_body={"stop": ["k"]}, max_output_tokens=40)  # fmt: skip
    assert [told(item) for item in answer.output] == SAID
    assert {item.status for item in answer.output} == {"completed"}
    call = answer.output[3]
    assert (call.call_id, call.name) == ("call_0", "d")
    assert answer.output_text == ";\nabij" and answer.status == "completed"
    assert answer.incomplete_details is None and answer.completed_at
    usage = answer.usage
    assert (usage.input_tokens, usage.output_tokens, usage.total_tokens) == (7, 18, 25)
    assert usage.output_tokens_details.reasoning_tokens == 2
    assert usage.input_tokens_details.cached_tokens == 0
    assert answer.metadata == {"a": "b"} and answer.reasoning.effort == "low"
    assert (answer.tools[0].name, answer.tools[0].strict) == ("d", False)
    assert answer.parallel_tool_calls and answer.temperature == 0
    Response.model_validate(answer.to_dict())


@pytest.mark.parametrize(
    "changes",
    [{}, {"max_output_tokens": 3}, {"max_output_tokens": 13}, {"extra_body": {"stop": ["fg"]}}],
    ids=str,
)
def test_a_stream_tells_the_answer_in_one_piece(server: Running, changes: dict[str, Any]) -> None:
    whole = ask(server, **changes)
    events = ask(server, stream=True, **changes)
    known: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
    for number, event in enumerate(events):
        assert event.sequence_number == number
        known.validate_python(event.to_dict())
    kinds = [event.type for event in events]
    assert kinds[:2] == ["response.created", "response.in_progress"]
    assert kinds[-1] == f"response.{whole.status}"
    assert events[0].response.status == "in_progress" and events[0].response.output == []
    assert events[0].response.id == events[-1].response.id
    assert without_ids(events[-1].response) == without_ids(whole)
    items = [event.item for event in events if event.type == "response.output_item.done"]
    assert [item.to_dict() for item in items] == [
        item.to_dict() for item in events[-1].response.output
    ]
    joined = ["" for _ in items]
    for event in events:
        if event.type.endswith(".delta"):
            joined[event.output_index] += event.delta
        if event.type.endswith(("text.done", "arguments.done")):
            done = event.arguments if event.type.endswith("arguments.done") else event.text
            assert joined[event.output_index] == done
    assert joined == [told(item)[1] for item in items]


def test_the_events_of_an_item_are_in_order(server: Running) -> None:
    kinds = [
        event.type.removeprefix("response.")
        for event in ask(server, stream=True)
        if getattr(event, "output_index", None) in (1, 3)
    ]
    assert kinds == [
        "output_item.added",
        "content_part.added",
        "reasoning_text.delta",
        "reasoning_text.delta",
        "reasoning_text.done",
        "content_part.done",
        "output_item.done",
        "output_item.added",
        "function_call_arguments.delta",
        "function_call_arguments.delta",
        "function_call_arguments.done",
        "output_item.done",
    ]


def test_an_answer_that_is_cut_off_says_so(server: Running) -> None:
    answer = ask(server, max_output_tokens=4)
    assert answer.status == "incomplete" and answer.completed_at is None
    assert answer.incomplete_details.reason == "max_output_tokens"
    assert [(item.type, item.status) for item in answer.output] == [
        ("message", "completed"),
        ("reasoning", "incomplete"),
    ]


def test_the_clients_helper_follows_a_stream(server: Running) -> None:
    with server.client() as client, client.responses.stream(
        model="counting", input="hi", max_output_tokens=40, extra_body={"ignore_eos": True,
                                                                      "stop": ["k"]}
    ) as stream:  # fmt: skip
        final = stream.get_final_response()
    assert [told(item) for item in final.output] == SAID


def test_a_tools_answer_goes_on_by_id_and_by_items(server: Running, dialect: Hearing) -> None:
    """Both ways the model sees the same conversation."""
    first = ask(server, instructions="be nice", tools=[TOOL], max_output_tokens=19)
    output: Any = {"type": "function_call_output", "call_id": "call_0", "output": "5"}
    call = {"id": "call_0", "type": "function", "function": {"name": "d", "arguments": "fg"}}
    expected: list[dict[str, Any]] = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": ";\nabijkl", "reasoning_content": "?-",
         "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_0", "content": "5"},
    ]  # fmt: skip
    second = ask(server, previous_response_id=first.id, input=[output], tools=[TOOL])
    assert dialect.heard == expected  # instructions are not carried over
    assert second.previous_response_id == first.id
    passed: list[Any] = [{"role": "user", "content": "hi"}, *first.to_dict()["output"], output]
    ask(server, input=passed, instructions="new", store=False)
    assert dialect.heard == [{"role": "system", "content": "new"}, *expected]
    third = ask(server, previous_response_id=second.id, input="and?")
    assert dialect.heard[:3] == expected and len(dialect.heard) == 5 and third.id


def test_the_dialect_hears_what_is_asked(server: Running, dialect: Hearing) -> None:
    ask(
        server,
        tools=[TOOL, {**TOOL, "name": "g", "strict": True, "description": "x"}],
        tool_choice={"type": "function", "name": "g"},
        parallel_tool_calls=False,
        reasoning={"effort": "none", "summary": "auto"},
        text={"format": {"type": "json_schema", "name": "x", "schema": SCHEMA, "strict": True}},
        extra_body={"thinking_token_budget": 7},
    )
    assert dialect.asked is not None
    options, wanted, prompt = dialect.asked
    assert options == ChatOptions(
        tools=[Tool("d", None, SCHEMA), Tool("g", "x", SCHEMA, strict=True)],
        tool_choice=NamedTool("g"),
        parallel_tool_calls=False,
        thinking=False,
        reasoning_effort="none",
        thinking_budget=7,
    )
    assert wanted == StructuredOutput(json=SCHEMA) and prompt == "u:hi;a:"
    ask(server, text={"format": {"type": "json_object"}})
    assert dialect.asked[1] == StructuredOutput(json_object=True)
    ask(server, text={"format": {"type": "text"}})
    assert dialect.asked[1] is None


def test_a_coding_agents_request_is_streamed(server: Running, dialect: Hearing) -> None:
    """The shape that OpenAI's command line agent sends in the middle of its work."""
    request = {
        "model": "counting",
        "instructions": "You are a coding agent.",
        "input": [
            {"type": "message", "role": "developer",
             "content": [{"type": "input_text", "text": "<permissions>"}]},
            {"type": "message", "role": "user",
             "content": [{"type": "input_text", "text": "<environment>"}]},
            {"type": "message", "role": "user",
             "content": [{"type": "input_text", "text": "list the files"}]},
            {"type": "reasoning", "summary": [], "content": None, "encrypted_content": None},
            {"type": "function_call", "name": "shell", "call_id": "c1",
             "arguments": '{"command":["ls"]}'},
            {"type": "function_call", "name": "shell", "call_id": "c2", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "c1", "output": "a.py"},
            {"type": "function_call_output", "call_id": "c2",
             "output": [{"type": "input_text", "text": "none"}]},
        ],
        "tools": [
            {"type": "function", "name": "shell", "description": "Runs a command.",
             "strict": False,
             "parameters": {"type": "object", "required": ["command"],
                            "additionalProperties": False,
                            "properties": {"command": {"type": "array",
                                                       "items": {"type": "string"}},
                                           "timeout_ms": {"type": "number"}}}},
            *({"type": "function", "name": name, "strict": False, "description": f"Does {name}.",
               "parameters": {"type": "object", "additionalProperties": False,
                              "properties": {"path": {"type": "string"}}}}
              for name in ("update_plan", "apply_patch", "view_image", "read_file", "list_dir",
                           "grep_files", "exec_command", "write_stdin", "spawn_agent",
                           "wait_agent", "close_agent")),
        ],
        "tool_choice": "auto",
        "parallel_tool_calls": False,
        "reasoning": {"effort": "medium", "summary": "auto"},
        "store": False,
        "stream": True,
        "include": ["reasoning.encrypted_content"],
        "prompt_cache_key": "0199",
    }  # fmt: skip
    with httpx.stream("POST", f"{server.url}/v1/responses", json=request, timeout=60) as answer:
        assert answer.status_code == 200
        lines = [line for line in answer.iter_lines() if line]
    names = [line.removeprefix("event: ") for line in lines[::2]]
    data = [json.loads(line.removeprefix("data: ")) for line in lines[1::2]]
    assert names == [event["type"] for event in data] and names[-1] == "response.completed"
    assert [message["role"] for message in dialect.heard] == [
        "system", "user", "user", "assistant", "tool", "tool",
    ]  # fmt: skip
    assert dialect.heard[0]["content"] == "You are a coding agent.\n\n<permissions>"
    calls = dialect.heard[3]["tool_calls"]
    assert [call["id"] for call in calls] == ["c1", "c2"]
    assert dialect.heard[5]["content"] == "none"
    with server.client() as client, pytest.raises(openai.NotFoundError):
        client.responses.retrieve(data[-1]["response"]["id"])


def test_stored_answers_are_found_and_forgotten(server: Running, client: openai.OpenAI) -> None:
    answer = ask(server)
    assert without_ids(client.responses.retrieve(answer.id)) == without_ids(answer)
    streamed = ask(server, stream=True)[-1].response
    assert client.responses.retrieve(streamed.id).to_dict() == streamed.to_dict()
    client.responses.delete(answer.id)
    for act in (client.responses.retrieve, client.responses.delete):
        with pytest.raises(openai.NotFoundError):
            act(answer.id)
    with pytest.raises(openai.BadRequestError) as caught:
        ask(server, previous_response_id=answer.id)
    assert caught.value.code == "previous_response_not_found"
    assert caught.value.param == "previous_response_id"
    for _ in range(3):
        ask(server)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(streamed.id)


@pytest.mark.parametrize(
    ("changes", "param", "named"),
    [
        ({"tools": [{"type": "web_search"}]}, "tools", "web_search"),
        ({"tools": [TOOL, {"type": "custom", "name": "x"}]}, "tools", r"tools\[1\].*custom"),
        ({"tools": [{"type": "function"}]}, "tools", "name"),
        ({"tool_choice": {"type": "file_search"}}, "tool_choice", "file_search"),
        ({"tool_choice": {"type": "allowed_tools", "mode": "auto"}}, "tool_choice", "mode"),
        ({"tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "mcp"}]}},
         "tool_choice", "mcp"),
        ({"top_logprobs": 2}, "top_logprobs", "include"),
        ({**SCORED, "top_logprobs": 21}, "top_logprobs", "20"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input", "item_reference"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
         "input", "input_image"),
        ({"input": [{"role": "king", "content": "x"}]}, "input", "king"),
        ({"input": [{"role": "user"}]}, "input", "content"),
        ({"input": [{"type": "function_call", "name": "f"}]}, "input", "call_id"),
        ({"input": []}, "input", "missing"),
        ({"input": "x" * 5000}, "input", "tokens"),
        ({"background": True}, "background", "not supported"),
        ({"truncation": "auto"}, "truncation", "not supported"),
        ({"conversation": "c"}, "conversation", "previous_response_id"),
        ({"include": ["file_search_call.results"]}, "include", "encrypted_content"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text", "schema"),
        ({"max_output_tokens": 0}, "max_output_tokens", "greater"),
        ({"temperature": -1}, "temperature", "temperature"),
        ({"metadata": {str(i): "x" for i in range(17)}}, "metadata", "16"),
        ({"extra_body": {"nonsense": 1}}, "nonsense", "unknown"),
    ],
    ids=str,
)  # fmt: skip
def test_what_is_not_supported_is_refused_by_name(
    server: Running, changes: dict[str, Any], param: str, named: str
) -> None:
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError, match=named) as caught:
            ask(server, stream=stream, **changes)
        assert caught.value.param == param and caught.value.type == "invalid_request_error"


def test_an_unknown_model_is_404(server: Running) -> None:
    with pytest.raises(openai.NotFoundError):
        ask(server, model="other")


def test_a_device_that_fails_is_told_by_the_response_that_failed() -> None:
    device = GatedDevice()
    with serving(engine_on(device)) as running, device, running.client() as client:
        device.permits.release()
        body: Any = {"model": "counting", "input": "hi", "max_output_tokens": 200}
        stream = client.responses.create(**body, stream=True, extra_body={"ignore_eos": True})
        assert next(stream).type == "response.created"
        device.fail_next = True
        device.permits.release(1000)
        events: list[Any] = list(stream)
        assert [event.type for event in events[-2:]] == ["error", "response.failed"]
        assert [event.sequence_number for event in events] == list(range(1, len(events) + 1))
        assert "a step failed" in events[-2].message
        failed = events[-1].response
        assert failed.status == "failed" and failed.error.code == "server_error"
        device.fail_next = True
        refused = running.post("/v1/responses", {"input": "hi", "stream": True})
        assert refused.status_code == 503, "nothing was sent yet, so there is a status"
        assert refused.json()["error"]["type"] == "service_unavailable_error"


def test_a_stream_that_fails_before_its_first_event_begins_nevertheless() -> None:
    turns: Any = None
    reply = ResponseReply({"id": "resp_1", "status": "in_progress"}, turns, turns, lambda _: None)
    events = reply.error(Refusal("failed", "a step failed")).decode().split("\n\n")[:-1]
    assert [json.loads(event.split("data: ")[1])["type"] for event in events] == [
        "response.created", "response.in_progress", "error", "response.failed",
    ]  # fmt: skip
