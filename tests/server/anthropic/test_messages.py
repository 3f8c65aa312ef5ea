"""Messages through Anthropic's own client, on a model that counts."""

from __future__ import annotations

from typing import Any

import anthropic
import pytest
from tests.server.anthropic.clients import HELLO, client, joined
from tests.server.devices import GatedDevice, engine_on
from tests.server.openai.marked import MarkedDialect
from tests.server.openai.serving import Running, serving

from slipstream.runtime.chat.options import ChatOptions, NamedTool, Tool
from slipstream.runtime.structured.output import StructuredOutput

# The model says ";!?-_\n" after a prompt that ends in ":", and "fghijklmn..." after "e".
GOING_ON: list[Any] = [*HELLO, {"role": "assistant", "content": "bade"}]
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}


def ask(running: Running, **changes: Any) -> Any:  # noqa: ANN401 - the client's types
    given = {"model": "counting", "messages": GOING_ON, "max_tokens": 14, **changes}
    return client(running).messages.create(**given)


THINKING: Any = {"type": "adaptive"}


def test_a_message_says_why_it_ended(chat: Running) -> None:
    cut = ask(chat, messages=HELLO, max_tokens=3)
    assert (cut.type, cut.role, cut.model) == ("message", "assistant", "counting")
    assert [block.text for block in cut.content] == [";!?"]
    assert (cut.stop_reason, cut.stop_sequence) == ("max_tokens", None)
    ended = ask(chat, messages=HELLO)
    assert ended.content[0].text == ";!?-_\n" and ended.stop_reason == "end_turn"
    stopped = ask(chat, messages=HELLO, stop_sequences=["-", "x"])
    assert stopped.content[0].text == ";!?"
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", "-")


def test_thoughts_text_and_calls_are_blocks_in_their_order(chat: Running) -> None:
    # f gh i jk l m n op q rs
    answer = ask(chat, stop_sequences=["t"], max_tokens=30, thinking=THINKING)
    assert [block.type for block in answer.content] == ["thinking", "text", "tool_use", "text"]
    thoughts, text, call, rest = answer.content
    assert thoughts.thinking == "gh" and thoughts.signature
    assert (text.text, rest.text) == ("jk", "rs")
    assert (call.id, call.name, call.input) == ("call_0", "m", {})  # "op" is no JSON
    assert answer.stop_reason == "tool_use"
    assert answer.usage.output_tokens_details.thinking_tokens == 2


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"thinking": THINKING},
        {"thinking": {"type": "disabled"}},
        {"max_tokens": 3},
        {"max_tokens": 3, "thinking": THINKING},
        {"max_tokens": 10},
        {"messages": HELLO},
        {"messages": HELLO, "stop_sequences": ["-"]},
        {"stop_sequences": ["rs"], "max_tokens": 20},
        {"stop_sequences": ["gh"]},
        {"stop_sequences": ["gh"], "thinking": THINKING},
        {"thinking": {"type": "adaptive", "display": "omitted"}},
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "k"}],
         "max_tokens": 8},
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "bad"}],
         "max_tokens": 8},
    ],
    ids=str,
)  # fmt: skip
def test_a_stream_joins_to_the_message_in_one_piece(chat: Running, changes: dict[str, Any]) -> None:
    whole = ask(chat, **changes)
    stream = joined(ask(chat, stream=True, **changes))
    for block in stream["content"]:
        arguments = block.pop("json")
        assert arguments in ("", "o", "op") if block["type"] == "tool_use" else not arguments
    for block, same in zip(stream["content"], whole.content, strict=True):
        signed = {"signature": stream["id"]} if block["type"] == "thinking" else {}
        assert block == {**same.model_dump(), **signed}
    assert (stream["stop_reason"], stream["stop_sequence"]) == (
        whole.stop_reason, whole.stop_sequence)  # fmt: skip
    assert stream["usage"].output_tokens == whole.usage.output_tokens
    assert stream["usage"].output_tokens_details == whole.usage.output_tokens_details


def test_omitted_thoughts_are_blocks_without_text(chat: Running) -> None:
    answer = ask(chat, thinking={"type": "adaptive", "display": "omitted"})
    assert answer.content[0].type == "thinking" and answer.content[0].thinking == ""
    assert answer.usage.output_tokens_details.thinking_tokens == 2


@pytest.mark.parametrize("changes", [{}, {"thinking": {"type": "disabled"}}], ids=str)
def test_clients_that_do_not_ask_for_thoughts_find_text_first(
    chat: Running, changes: dict[str, Any]
) -> None:
    """Much code reads the text of the first block and has never seen another kind."""
    answer = ask(chat, stop_sequences=["t"], max_tokens=30, **changes)
    assert [block.type for block in answer.content] == ["text", "tool_use", "text"]
    assert answer.usage.output_tokens_details.thinking_tokens == 2
    # "e" f gh i jk: the texts around the thoughts are one.
    bad = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "bad"}]
    answer = ask(chat, messages=bad, max_tokens=7, **changes)
    assert [block.text for block in answer.content] == ["ejk"]


def test_tokens_are_counted_and_those_of_the_cache_apart(chat: Running) -> None:
    system: Any = [
        {"type": "text", "text": "remember this", "cache_control": {"type": "ephemeral"}}
    ]
    given: Any = {"messages": HELLO, "system": system}
    count = client(chat).messages.count_tokens(model="counting", **given).input_tokens
    assert count == len("s:remember this;u:hi;a:")
    ask(chat, **given, max_tokens=1)
    usage = ask(chat, **given, max_tokens=1).usage
    assert usage.cache_read_input_tokens == count // 4 * 4  # whole pages of 4
    assert usage.input_tokens == count - usage.cache_read_input_tokens
    started = joined(ask(chat, **given, stream=True))["started"]
    assert started.cache_read_input_tokens == usage.cache_read_input_tokens


def test_the_dialect_hears_what_is_asked(chat: Running, dialect: MarkedDialect) -> None:
    ask(
        chat,
        tools=[
            {"name": "f", "input_schema": SCHEMA, "cache_control": {"type": "ephemeral"}},
            {
                "name": "g",
                "description": "G.",
                "input_schema": {},
                "strict": True,
                "type": "custom",
            },
        ],
        tool_choice={"type": "tool", "name": "f", "disable_parallel_tool_use": True},
        thinking={"type": "enabled", "budget_tokens": 7},
        output_config={"effort": "low", "format": {"type": "json_schema", "schema": SCHEMA}},
    )
    assert dialect.asked is not None
    options, wanted, prompt = dialect.asked
    assert options == ChatOptions(
        tools=[Tool("f", None, SCHEMA), Tool("g", "G.", {}, strict=True)],
        tool_choice=NamedTool("f"),
        parallel_tool_calls=False,
        thinking=True,
        reasoning_effort="low",
        thinking_budget=7,
    )
    assert wanted == StructuredOutput(json=SCHEMA) and prompt == "u:hi;a:bade"


@pytest.mark.parametrize(
    ("choice", "heard"), [("auto", "auto"), ("any", "required"), ("none", "none")]
)
def test_choices_have_other_names(
    chat: Running, dialect: MarkedDialect, choice: str, heard: str
) -> None:
    tools = [{"name": "f", "input_schema": SCHEMA}]
    ask(chat, tools=tools, tool_choice={"type": choice}, thinking={"type": "disabled"})
    assert dialect.asked is not None
    options = dialect.asked[0]
    assert options.tool_choice == heard and options.parallel_tool_calls
    assert options.thinking is False


def content(*blocks: object, role: str = "user") -> dict[str, Any]:
    return {"messages": [{"role": role, "content": list(blocks)}]}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (content({"type": "image", "source": {"type": "url", "url": "http://x"}}),
         r"messages\[0\].content\[0\] is a block of type 'image', which is not supported"),
        (content({"type": "tool_result", "tool_use_id": "1", "content": [
            {"type": "text", "text": "a"}, {"type": "document", "source": {}}]}),
         r"messages\[0\].content\[0\].content\[1\] is a block of type 'document'"),
        ({"system": [{"type": "image"}]}, r"system\[0\] is a block of type 'image'"),
        (content({"type": "tool_use", "id": "1", "name": "f", "input": {}}),
         "a message of the role 'user' does not have"),
        (content({"type": "tool_use", "id": "1", "name": "f", "input": {}}, role="assistant"),
         "messages ends with a tool_use"),
        (content({"type": "tool_use", "id": "1", "name": "f"}, role="assistant"),
         "input is missing"),
        ({"messages": []}, "messages: "),
        ({"tools": [{"type": "mcp_toolset", "mcp_server_name": "x"}]},
         r"tools\[0\] is of type 'mcp_toolset', which is not supported"),
        ({"tools": [{"input_schema": {}}]}, r"tools\[0\].name is missing"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]},
         r"tools\[0\], 'web_search', is of type 'web_search_20250305', which is not supported"),
        ({"tools": [{"name": "f"}]}, "has no input_schema"),
        ({"tool_choice": {"type": "tool"}}, "tool_choice: of type tool needs the 'name'"),
        ({"max_tokens": 0}, "max_tokens: input should be greater"),
        ({"max_tokens": None}, "max_tokens: input should be a valid integer"),
        ({"thinking": {"type": "between_tools"}}, "thinking: input should be 'enabled'"),
        ({"extra_body": {"temperature": -1.0}}, "temperature"),
        ({"output_config": {"format": {"type": "json_schema", "schema": {}}},
          "extra_body": {"output_format": {"type": "json_schema", "schema": {}}}},
         "leave one out"),
        ({"extra_body": {"mcp_servers": [{"url": "x"}]}}, "mcp_servers: not supported"),
        ({"extra_body": {"nonsense": 1}}, "unknown field 'nonsense'"),
        ({"messages": [{"role": "user", "content": "a" * 1000}]}, "1[0-9]{3} tokens|max_seq_len"),
    ],
)  # fmt: skip
def test_what_cannot_be_answered_is_400(chat: Running, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(anthropic.BadRequestError, match=words) as caught:
        ask(chat, **changes)
    body: Any = caught.value.body
    assert body["type"] == "error" and body["error"]["type"] == "invalid_request_error"
    assert body["request_id"] == caught.value.response.headers["x-request-id"]


def test_errors_have_anthropics_statuses(chat: Running) -> None:
    with pytest.raises(anthropic.NotFoundError) as unknown:
        ask(chat, model="claude")
    assert unknown.value.body["error"]["type"] == "not_found_error"  # type: ignore[index]
    assert chat.post("/v1/messages/nothing", {}).status_code == 404
    with pytest.raises(anthropic.NotFoundError, match="batches") as batches:
        client(chat).messages.batches.list()
    assert batches.value.body["error"]["type"] == "not_found_error"  # type: ignore[index]
    chat.service.draining = True
    try:
        with pytest.raises(anthropic.OverloadedError, match="shutting down"):
            ask(chat)
        assert chat.post("/v1/completions", {"prompt": "a"}).status_code == 503
    finally:
        chat.service.draining = False


def test_a_key_is_taken_from_either_header() -> None:
    with serving(api_key=("secret",)) as running:
        given: Any = {"model": "counting", "messages": HELLO, "max_tokens": 1}
        assert client(running, api_key="secret").messages.create(**given)
        bearer = client(running, api_key=None, auth_token="secret")
        assert bearer.messages.create(**given)
        with pytest.raises(anthropic.AuthenticationError) as caught:
            client(running, api_key="wrong").messages.create(**given)
        assert caught.value.body["error"]["type"] == "authentication_error"  # type: ignore[index]


def test_a_failure_in_a_stream_is_an_event_and_before_it_a_status() -> None:
    device = GatedDevice()
    with serving(engine_on(device)) as running, device:
        device.permits.release()
        # From the end of one prompt's answer to the beginning of another's is a long way.
        messages = [*HELLO, {"role": "assistant", "content": "za"}]
        stream = ask(running, messages=messages, max_tokens=60, stream=True)
        assert next(stream).type == "message_start"
        device.fail_next = True
        device.permits.release(1000)
        with pytest.raises(anthropic.APIStatusError, match="a step failed on the device") as caught:
            list(stream)
        assert caught.value.body["error"]["type"] == "api_error"  # type: ignore[index]
        device.fail_next = True
        with pytest.raises(anthropic.InternalServerError, match="a step failed"):
            ask(running, stream=True)
