"""Anthropic's messages as those that every template knows."""

from __future__ import annotations

from typing import Any

from slipstream.server.anthropic.conversation import conversation_of
from slipstream.server.anthropic.protocol import CountRequest

CALL = {"type": "tool_use", "id": "toolu_1", "name": "f", "input": {"a": "ü"}}


def converted(**body: Any) -> list[dict[str, Any]]:  # noqa: ANN401 - JSON
    return list(map(dict, conversation_of(CountRequest.model_validate(body)).messages))


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words, "cache_control": {"type": "ephemeral"}}


def test_a_system_prompt_comes_first_without_what_changes_with_every_request() -> None:
    billing = text("x-anthropic-billing-header: cc_version=2.1; cch=1f;")
    hi = {"role": "user", "content": "hi"}
    assert converted(system="be kind", messages=[hi])[0] == {"role": "system", "content": "be kind"}
    assert converted(system=[billing, text("a"), text("b")], messages=[hi]) == [
        {"role": "system", "content": "a\nb"},
        hi,
    ]
    assert converted(system=[billing], messages=[hi]) == [hi]


def test_a_turn_of_the_past_is_one_message() -> None:
    blocks = [
        {"type": "thinking", "thinking": "hm", "signature": "s"},
        {"type": "redacted_thinking", "data": "xxx"},
        text("I "),
        text("look"),
        CALL,
    ]
    result = {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "toolu_1"}]}
    said, answer = converted(messages=[{"role": "assistant", "content": blocks}, result])
    function = {"name": "f", "arguments": '{"a": "ü"}'}
    assert said == {
        "role": "assistant",
        "content": "I look",
        "reasoning_content": "hm",
        "tool_calls": [{"id": "toolu_1", "type": "function", "function": function}],
    }
    assert answer == {"role": "tool", "tool_call_id": "toolu_1", "content": ""}


def test_results_and_texts_keep_their_order() -> None:
    blocks = [
        {"type": "tool_result", "tool_use_id": "1", "content": [text("x"), text("y")]},
        {"type": "tool_result", "tool_use_id": "2", "content": "no file", "is_error": True},
        text("and"),
        text("now?"),
    ]
    assert converted(messages=[{"role": "user", "content": blocks}]) == [
        {"role": "tool", "tool_call_id": "1", "content": "x\ny"},
        {"role": "tool", "tool_call_id": "2", "content": "Error: no file"},
        {"role": "user", "content": "and\nnow?"},
    ]


def test_a_last_turn_of_the_assistant_is_gone_on_with() -> None:
    hi = {"role": "user", "content": "hi"}
    begun = {"role": "assistant", "content": "{"}
    assert conversation_of(CountRequest.model_validate({"messages": [hi, begun]})).going_on
    assert not conversation_of(CountRequest.model_validate({"messages": [hi]})).going_on
