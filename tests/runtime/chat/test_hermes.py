"""Qwen's and Hermes' way: thoughts in tags, calls as JSON in tags."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from tests.runtime.chat import templates
from tests.runtime.chat.reading import TOOLS, WITH_TOOLS, allows, byte_tokenizer, read

from slipstream.errors import InvalidRequestError
from slipstream.runtime.chat.detection import dialect_of
from slipstream.runtime.chat.events import AssistantTurn, ToolCall
from slipstream.runtime.chat.options import ChatOptions, NamedTool, ToolChoice
from slipstream.runtime.structured.output import StructuredOutput

TOKENIZER = byte_tokenizer(
    templates.QWEN,
    "<|im_start|>",
    "<|im_end|>",
    added=["<think>", "</think>", "<tool_call>", "</tool_call>"],
)
QWEN = dialect_of(TOKENIZER)
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'
PARIS = ToolCall("", "get_weather", '{"city": "Paris"}')


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Hello\n", AssistantTurn(content="Hello\n")),
        ("<think>\nhm\n</think>\n\nHello", AssistantTurn("hm", "Hello")),
        (CALL, AssistantTurn(calls=[PARIS])),
        (
            f"<think>x</think>\n\nI look.\n{CALL}\n{CALL}",
            AssistantTurn("x", "I look.", [PARIS] * 2),
        ),
        (CALL.replace("\n</tool_call>", ""), AssistantTurn(calls=[PARIS])),
        (f"{CALL}\nDone.", AssistantTurn(content="Done.", calls=[PARIS])),
        (
            '<tool_call>{"name": "now"}</tool_call>',
            AssistantTurn(calls=[ToolCall("", "now", "{}")]),
        ),
        (
            '<tool_call>{"arguments": "{\\"a\\": 1}", "name": "now"}</tool_call>',
            AssistantTurn(calls=[ToolCall("", "now", '{"a": 1}')]),
        ),
        (
            '<tool_call>{"name": "now", "arguments": {"a": "1\n2\ufffd"}}</tool_call>',
            AssistantTurn(calls=[ToolCall("", "now", '{"a": "1\\n2\ufffd"}')]),
        ),
    ],
)
def test_it_reads(text: str, expected: AssistantTurn) -> None:
    assert read(QWEN, text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>now</tool_call>",
        '<tool_call>{"name": 1, "arguments": {}}</tool_call>',
        '<tool_call>{"name": "now", "arguments": 7}</tool_call>',
        '<tool_call>{"name": "now", "arguments": ',
        '<tool_call>{"name": "' + "n" * 1000 + '", "arguments": {}}',
        "<tool_cal",
        "a < b <tool_",
    ],
)
def test_a_malformed_call_is_content(text: str) -> None:
    assert read(QWEN, text) == AssistantTurn(content=text)


def test_after_a_malformed_call_others_are_found() -> None:
    assert read(QWEN, f"<tool_call>oops {CALL}") == AssistantTurn("", "<tool_call>oops", [PARIS])


def test_a_call_that_breaks_off_after_it_was_told_keeps_what_is_valid() -> None:
    cut = '<tool_call>{"name": "now", "arguments": {"a": 1, "b": "x'
    assert read(QWEN, cut).calls == [ToolCall("", "now", '{"a": 1, "b": "x')]
    bad = '<tool_call>{"name": "now", "arguments": {"a": oops}}</tool_call>'
    assert read(QWEN, bad) == AssistantTurn(
        "", "oops}}</tool_call>", [ToolCall("", "now", '{"a": ')]
    )


def test_thoughts_that_the_prompt_begins_or_ends() -> None:
    assert read(QWEN, "hm</think>Yes", "assistant\n<think>\n") == AssistantTurn("hm", "Yes")
    assert read(QWEN, "hm", "assistant\n<think>\n") == AssistantTurn("hm")
    assert read(QWEN, "<think>", "<think>\n\n</think>\n\n") == AssistantTurn(content="<think>")


def test_without_tools_calls_are_text() -> None:
    for options in (ChatOptions(), replace(WITH_TOOLS, tool_choice="none")):
        parser = QWEN.parser(options, "")
        (event,) = parser.push(CALL + "\n")[:1] or parser.finish()
        assert CALL in event.text  # type: ignore[union-attr]
        assert QWEN.tools(options) is None


def test_the_template_gets_what_it_wants() -> None:
    called = {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {
                "id": "a",
                "type": "function",
                "function": {"name": "now", "arguments": '{"x": "1"}'},
            }
        ],
    }
    answer = {"role": "tool", "tool_call_id": "a", "content": [{"type": "text", "text": "12:00"}]}
    plain = {"role": "assistant", "content": "Hi", "tool_calls": [], "reasoning_content": "so"}
    made = QWEN.messages([plain, called, answer])
    assert made[2] == {**answer, "content": "12:00", "name": "now"}
    text = TOKENIZER.apply_chat_template(made, tools=QWEN.tools(WITH_TOOLS))
    assert '{"name": "now", "arguments": {"x": "1"}}' in text
    assert "<think>\nso\n</think>\n\nHi<|im_end|>" in text
    assert QWEN.variables(ChatOptions(thinking=False)) == {"enable_thinking": False}
    assert QWEN.variables(ChatOptions(reasoning_effort="none")) == {"enable_thinking": False}
    assert QWEN.variables(ChatOptions(reasoning_effort="high")) == {}


def test_a_malformed_past_call_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="tool_calls"):
        QWEN.messages([{"role": "assistant", "tool_calls": [{"name": "now"}]}])


def test_what_cannot_be_asked_for_is_refused() -> None:
    for options in (
        ChatOptions(tool_choice="required"),
        ChatOptions(tools=TOOLS, tool_choice=NamedTool("then")),
        ChatOptions(tools=[*TOOLS, TOOLS[0]]),
    ):
        with pytest.raises(InvalidRequestError):
            QWEN.tools(options)


def test_free_answers_have_no_form() -> None:
    assert QWEN.structured(ChatOptions(), None, "") is None
    loose = [replace(tool, strict=False) for tool in TOOLS]
    assert QWEN.structured(ChatOptions(tools=loose), None, "") is None
    wanted = StructuredOutput(json_object=True)
    assert QWEN.structured(ChatOptions(), wanted, "<think></think>") is wanted


@pytest.mark.parametrize(
    ("choice", "parallel", "good", "bad"),
    [
        ("auto", True, ["Hi", CALL, f"a {CALL}\n{CALL} b"], [CALL.replace("city", "town")]),
        ("auto", False, ["Hi", CALL, f"a {CALL} b"], [f"{CALL}{CALL}"]),
        ("required", True, [CALL, f"{CALL}\n{CALL}"], ["Hi", "", CALL[:-1]]),
        ("required", False, [CALL], ["Hi", f"{CALL}\n{CALL}"]),
        (NamedTool("get_weather"), True, [CALL], ["Hi", f"{CALL}\n{CALL}"]),
        (NamedTool("now"), True, [], [CALL]),
        ("none", True, [], []),
    ],
)
def test_grammars_hold_calls(
    choice: ToolChoice | NamedTool, parallel: bool, good: list[str], bad: list[str]
) -> None:
    options = replace(WITH_TOOLS, tool_choice=choice, parallel_tool_calls=parallel)
    form = QWEN.structured(options, None, "")
    if choice == "none":
        assert form is None
        return
    assert form is not None
    for thoughts in ("", "<think>\nhm\n</think>\n\n"):
        for text in good:
            assert allows(TOKENIZER, form, thoughts + text), text
        for text in bad:
            assert not allows(TOKENIZER, form, thoughts + text), text
    closed = QWEN.structured(options, None, "<think>\n\n</think>\n\n")
    assert closed is not None
    assert not allows(TOKENIZER, closed, f"<think>hm</think>{CALL}")


def test_a_wanted_form_follows_the_thoughts() -> None:
    forms = [
        (StructuredOutput(json={"type": "integer"}), "12", "x"),
        (StructuredOutput(regex="a/\\d\n"), "a/1\n", "a"),
        (StructuredOutput(choice=["yes", 'n"o']), 'n"o', "no"),
        (StructuredOutput(grammar='start: "a" rest\nrest: "b"+'), "abb", "a"),
    ]
    for wanted, good, bad in forms:
        form = QWEN.structured(ChatOptions(), wanted, "<think>\n")
        assert form is not None
        assert allows(TOKENIZER, form, f"{{}}</think>\n\n{good}")
        assert not allows(TOKENIZER, form, f"{{}}</think>\n\n{bad}")
        assert not allows(TOKENIZER, form, good)
        both = QWEN.structured(WITH_TOOLS, wanted, "</think>")
        assert both is not None
        assert allows(TOKENIZER, both, good)
        assert allows(TOKENIZER, both, CALL)
        assert not allows(TOKENIZER, both, bad)


@pytest.mark.parametrize(("tokens", "budget"), [(True, 5), (False, 5 + len("</think>"))])
def test_a_budget_ends_the_thoughts(tokens: bool, budget: int) -> None:
    tokenizer = TOKENIZER if tokens else byte_tokenizer(templates.QWEN)
    options = ChatOptions(thinking_budget=budget)
    form = dialect_of(tokenizer).structured(options, None, "<think>")
    assert form is not None
    assert allows(tokenizer, form, "four</think>Hi")
    assert allows(tokenizer, form, "x" * budget + "</think>Hi")
    assert not allows(tokenizer, form, "x" * (budget + 1) + "</think>Hi")


def test_arguments_are_json_for_any_client() -> None:
    text = '<tool_call>{"name": "now", "arguments": {"a": [1.5e3, null, {"b": "\\u00e9"}]}}'
    (call,) = read(QWEN, text).calls
    assert json.loads(call.arguments) == {"a": [1500.0, None, {"b": "é"}]}
