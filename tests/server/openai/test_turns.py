"""Thoughts and calls through OpenAI's own client, on a model that counts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from tests.server.openai.marked import MarkedDialect
from tests.server.openai.serving import Running, serving
from tests.server.openai.test_requests import tool

from slipstream.runtime.chat.options import AllowedTools, ChatOptions, NamedTool, Tool
from slipstream.runtime.structured.output import StructuredOutput

# The model says ";!?-_\n" after a prompt that ends in ":", and "fghijklmn..." after "e".
HELLO: list[Any] = [{"role": "user", "content": "hi"}]
GOING_ON: list[Any] = [*HELLO, {"role": "assistant", "content": "bade"}]


@pytest.fixture(scope="module")
def dialect() -> MarkedDialect:
    """Thoughts from f to i, calls from l to q with a name up to n."""
    return MarkedDialect("filqn")


@pytest.fixture(scope="module")
def chat(dialect: MarkedDialect) -> Iterator[Running]:
    """A server whose model has that dialect."""
    with serving() as running:
        running.service.dialect = dialect
        yield running


def ask(running: Running, **changes: Any) -> Any:  # noqa: ANN401 - the client's types
    extra = {"continue_final_message": True, **changes.pop("extra_body", {})}
    given = {"model": "counting", "messages": GOING_ON, "max_tokens": 14, **changes}
    return running.client().chat.completions.create(**given, extra_body=extra)


def streamed(running: Running, changes: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """The chunks of every choice joined to its message."""
    told: dict[int, dict[str, Any]] = {}
    for chunk in ask(running, stream=True, stream_options={"include_usage": True}, **changes):
        for choice in chunk.choices:
            joined = told.setdefault(
                choice.index,
                {"content": "", "reasoning": "", "reasoning_content": "", "calls": [],
                 "scored": []},
            )  # fmt: skip
            _join(joined, choice)
        if chunk.usage:
            told[-1] = {"reasoning": chunk.usage.completion_tokens_details.reasoning_tokens}
    return told


def _join(joined: dict[str, Any], choice: Any) -> None:  # noqa: ANN401 - the client's types
    delta = choice.delta
    joined["content"] += delta.content or ""
    for name in ("reasoning", "reasoning_content"):
        joined[name] += getattr(delta, name, None) or ""
    for call in delta.tool_calls or ():
        if call.id:
            assert call.type == "function" and call.index == len(joined["calls"])
            joined["calls"].append([call.id, call.function.name, ""])
        joined["calls"][call.index][2] += call.function.arguments
    joined["scored"] += [t.token for t in (choice.logprobs and choice.logprobs.content) or ()]
    joined["reason"] = choice.finish_reason


def whole(answer: Any) -> dict[int, dict[str, Any]]:  # noqa: ANN401 - the client's types
    told: dict[int, dict[str, Any]] = {
        choice.index: {
            "content": choice.message.content or "",
            "reasoning": getattr(choice.message, "reasoning", ""),
            "reasoning_content": getattr(choice.message, "reasoning_content", ""),
            "calls": [[c.id, c.function.name, c.function.arguments]
                      for c in choice.message.tool_calls or ()],
            "scored": [t.token for t in (choice.logprobs and choice.logprobs.content) or ()],
            "reason": choice.finish_reason,
        }
        for choice in answer.choices
    }  # fmt: skip
    told[-1] = {"reasoning": answer.usage.completion_tokens_details.reasoning_tokens}
    return told


def test_thoughts_text_and_calls_are_told_apart(chat: Running) -> None:
    # f gh i jk l m n op q rs
    answer = ask(chat, logprobs=True, stop=["t"], max_tokens=30)
    message = answer.choices[0].message
    assert message.reasoning == message.reasoning_content == "gh"
    assert message.content == "jkrs"
    (call,) = message.tool_calls
    assert (call.id, call.type) == ("call_0", "function")
    assert (call.function.name, call.function.arguments) == ("m", "op")
    assert answer.choices[0].finish_reason == "tool_calls"
    assert answer.usage.completion_tokens_details.reasoning_tokens == 2
    assert [t.token for t in answer.choices[0].logprobs.content] == [*"jkrs", "t"]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"max_tokens": 3},
        {"max_tokens": 10},
        {"stop": ["rs"], "max_tokens": 20, "logprobs": True},
        {"stop": ["gh"], "logprobs": True},
        {"stop": ["op", "opq"], "n": 2},
        {"stop": ["opr", "hij"], "max_tokens": 20, "logprobs": True, "top_logprobs": 1},
        {"n": 3, "logprobs": True},
        {"max_tokens": 4, "extra_body": {"echo": True}},
        {"extra_body": {"include_reasoning": False}},
    ],
    ids=str,
)
def test_a_stream_joins_to_the_answer_in_one_piece(chat: Running, changes: dict[str, Any]) -> None:
    assert streamed(chat, changes) == whole(ask(chat, **changes))


def test_a_call_without_text_has_no_content(chat: Running) -> None:
    messages = [*HELLO, {"role": "assistant", "content": "k"}]
    answer = ask(chat, messages=messages, stop=["r"], max_tokens=10)
    assert answer.choices[0].message.content is None
    assert answer.choices[0].finish_reason == "tool_calls"
    cut = ask(chat, messages=messages, max_tokens=5)
    assert cut.choices[0].finish_reason == "length" and cut.choices[0].message.tool_calls


def test_thoughts_are_left_out_on_demand_and_counted(chat: Running) -> None:
    answer = ask(chat, extra_body={"include_reasoning": False})
    assert "reasoning" not in answer.choices[0].message.model_extra
    assert answer.usage.completion_tokens_details.reasoning_tokens == 2


def test_an_echo_begins_with_what_the_assistant_said(chat: Running) -> None:
    answer = ask(chat, max_tokens=6, extra_body={"echo": True})
    assert answer.choices[0].message.content == "badejk"
    asked = ask(
        chat,
        messages=HELLO,
        max_tokens=3,
        extra_body={"echo": True, "continue_final_message": False},
    )
    assert asked.choices[0].message.content == ";!?"


@pytest.mark.parametrize("mode", ["auto", "required"])
def test_tools_are_allowed_by_name(chat: Running, dialect: MarkedDialect, mode: str) -> None:
    allowed = {"mode": mode, "tools": [{"type": "function", "function": {"name": "g"}}]}
    choice = {"type": "allowed_tools", "allowed_tools": allowed}
    ask(chat, tools=[tool("f"), tool("g")], tool_choice=choice)
    assert dialect.asked is not None
    options = dialect.asked[0]
    assert [given.name for given in options.tools] == ["f", "g"]
    assert options.tool_choice == AllowedTools(["g"], required=mode == "required")


def test_the_dialect_hears_what_is_asked(chat: Running, dialect: MarkedDialect) -> None:
    choice = {"type": "function", "function": {"name": "f"}}
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    ask(
        chat,
        tools=[tool("f", schema), {**tool("g"), "function": {"name": "g", "strict": True}}],
        tool_choice=choice,
        parallel_tool_calls=False,
        reasoning_effort="none",
        response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}},
        extra_body={"thinking_token_budget": 7},
    )
    assert dialect.asked is not None
    options, wanted, prompt = dialect.asked
    assert options == ChatOptions(
        tools=[Tool("f", None, schema), Tool("g", strict=True)],
        tool_choice=NamedTool("f"),
        parallel_tool_calls=False,
        thinking=False,
        reasoning_effort="none",
        thinking_budget=7,
    )
    assert wanted == StructuredOutput(json=schema) and prompt == "u:hi;a:bade"


@pytest.mark.parametrize(
    "calls",
    [
        None,
        [],
        [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
        [{"function": {"name": "f", "arguments": {"a": 1}}}],
    ],
    ids=str,
)
def test_past_calls_and_their_answers_are_taken(chat: Running, calls: object) -> None:
    messages: list[Any] = [
        *HELLO,
        {"role": "assistant", "content": None, "tool_calls": calls},
        {"role": "tool", "tool_call_id": "1", "content": [{"type": "text", "text": "seen"}]},
    ]
    tokens = chat.post("/tokenize", {"messages": messages, "tools": [tool("f")]}).json()["tokens"]
    assert chat.llm.tokenizer.decode(tokens) == "u:hi;a:;t:seen;a:"
    answer = chat.post("/v1/chat/completions", {"messages": messages, "max_tokens": 2})
    assert answer.status_code == 200


def test_a_server_says_how_long_answers_are_whose_request_does_not() -> None:
    with serving(default_max_tokens=3) as running:
        assert ask(running, messages=HELLO, max_tokens=None, extra_body={
            "continue_final_message": False}).usage.completion_tokens == 3  # fmt: skip
        answer = running.client().completions.create(model="counting", prompt="a")
        assert answer.choices[0].text == "bcd"
