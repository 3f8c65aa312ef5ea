"""Conversations of the Python API."""

from __future__ import annotations

import pytest
from tests.runtime.chat.families import BY_NAME

from slipstream.errors import InvalidRequestError
from slipstream.runtime.chat.events import AssistantTurn, ToolCall
from slipstream.runtime.chat.options import ChatOptions, NamedTool, Tool, split_options
from slipstream.runtime.chat.turns import Conversations
from slipstream.runtime.llm import LLM
from slipstream.runtime.request import CompletionOutput, FinishReason, OutputKind
from slipstream.runtime.sampling.params import SamplingParams
from slipstream.runtime.testing import counting_engine

FAMILY = BY_NAME["deepseek-3.1"]
SHAPE = {"type": "function", "function": {"name": "now", "description": "T", "strict": True}}


def test_options_are_told_from_variables() -> None:
    given = {"tools": [SHAPE, Tool("f")], "tool_choice": "now", "x": 1, "thinking": None}
    options, rest = split_options(given)
    assert options == ChatOptions([Tool("now", "T", strict=True), Tool("f")], NamedTool("now"))
    assert rest == {"x": 1}
    for bad in ("f", {"function": 3}, {"type": "function"}):
        with pytest.raises(InvalidRequestError, match="a tool is"):
            split_options({"tools": [bad]})


@pytest.mark.parametrize("kind", ["delta", "cumulative"])
def test_turns_grow_with_the_outputs(kind: OutputKind) -> None:
    made = Conversations(FAMILY.tokenizer, SamplingParams())
    messages = [{"role": "user", "content": "Hi"}]
    conversation = made.make(messages, None, {"tools": [SHAPE], "thinking": True})
    assert conversation.prompt.endswith("<think>")
    assert conversation.params.structured is not None  # one tool is strict
    assert set(FAMILY.dialect.special_tokens) <= {*conversation.params.shown_special_tokens}
    text, turns = f"hm</think>Yes{FAMILY.calls(FAMILY.second)}", conversation.turns(kind)
    for end in range(1, len(text) + 1):
        shown = text[end - 1 : end] if kind == "delta" else text[:end]
        finished: FinishReason | None = "stop" if end == len(text) else None
        output = CompletionOutput(0, shown, [], finish_reason=finished)
        turns.add([output])
    assert output.turn is not None
    output.turn.calls[0].call_id = ""
    assert output.turn == AssistantTurn("hm", "Yes", [ToolCall("", "now", "{}")])


def test_chat_gives_turns() -> None:
    with LLM.from_engine(counting_engine()) as llm:
        (output,) = llm.chat([{"role": "user", "content": "a"}], SamplingParams(temperature=0))
        completion = output.outputs[0]
        assert completion.turn == AssistantTurn(content=completion.text)
        with pytest.raises(InvalidRequestError, match="knows no tools"):
            llm.chat([{"role": "user", "content": "a"}], tools=[SHAPE])
        with pytest.raises(InvalidRequestError, match="expected a dict"):
            llm.chat([[5]])  # type: ignore[arg-type]
