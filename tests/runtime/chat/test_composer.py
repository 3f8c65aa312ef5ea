"""Conversations: what is composed of them, and the turns that the Python API gives."""

from __future__ import annotations

import pytest
from tests.runtime.chat.families import BY_NAME
from tests.server.openai.marked import MarkedDialect

from slipstream.errors import ContextLengthError, InvalidRequestError
from slipstream.runtime.chat import composer
from slipstream.runtime.chat.composer import Composer
from slipstream.runtime.chat.conversation import Conversation
from slipstream.runtime.chat.events import AssistantTurn, ToolCall
from slipstream.runtime.chat.options import ChatOptions, NamedTool, Tool, split_options
from slipstream.runtime.llm import LLM
from slipstream.runtime.request import (
    CompletionOutput,
    FinishReason,
    OutputKind,
    RequestMetrics,
    RequestOutput,
)
from slipstream.runtime.sampling.params import SamplingParams
from slipstream.runtime.structured.output import StructuredOutput
from slipstream.runtime.testing import counting_engine

FAMILY = BY_NAME["deepseek-3.1"]
SHAPE = {"type": "function", "function": {"name": "now", "description": "T", "strict": True}}
HI = [{"role": "user", "content": "Hi"}]
ENDLESS: dict[str, object] = {}
ENDLESS["properties"] = {"a": ENDLESS}


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
    conversation = Conversation.of(HI, {"tools": [SHAPE], "thinking": True})
    made = Composer(FAMILY.tokenizer).compose(conversation, SamplingParams())
    assert made.text.endswith("<think>")
    assert made.params.structured is not None  # one tool is strict
    assert set(FAMILY.dialect.special_tokens) <= {*made.params.shown_special_tokens}
    text, turns = f"hm</think>Yes{FAMILY.calls(FAMILY.second)}", made.output_turns(kind)
    for end in range(1, len(text) + 1):
        shown = text[end - 1 : end] if kind == "delta" else text[:end]
        finished: FinishReason | None = "stop" if end == len(text) else None
        completion = CompletionOutput(0, shown, [], finish_reason=finished)
        output = RequestOutput("r", None, made.tokens, [completion], False, RequestMetrics(0))
        turns.add(output)
    assert output.prompt == made.text and completion.turn is not None
    completion.turn.calls[0].call_id = ""
    assert completion.turn == AssistantTurn("hm", "Yes", [ToolCall("", "now", "{}")])


def test_what_composes_is_asked_first_and_no_prompt_is_longer_than_the_engine_holds() -> None:
    def refuse(conversation: Conversation) -> None:
        raise InvalidRequestError(f"not {conversation.messages[0]['content']}")

    with pytest.raises(InvalidRequestError, match="not Hi"):
        Composer(FAMILY.tokenizer, check=refuse).render(Conversation(HI))
    short = Composer(FAMILY.tokenizer, max_seq_len=40)
    assert short.render(Conversation(HI))
    with pytest.raises(ContextLengthError):
        short.render(Conversation(HI, options=ChatOptions(tools=[Tool("f", "x" * 4000)])))
    for schema in ({"type": {1}}, ENDLESS):
        tools = ChatOptions(tools=[Tool("f", parameters=schema)])
        with pytest.raises(InvalidRequestError, match="parameters of tool 'f' are no JSON schema"):
            short.render(Conversation(HI, options=tools))


def test_what_callers_name_belongs_to_the_conversation() -> None:
    given = {"add_generation_prompt": False, "continue_final_message": True, "thinking": True}
    assert Conversation.of(HI, {**given, "x": 1}) == Conversation(
        HI,
        generating=False,
        going_on=True,
        variables={"x": 1},
        options=ChatOptions([], thinking=True),
    )


@pytest.mark.parametrize("kind", ["cumulative", "delta", "final"])
def test_a_stream_of_a_conversation_comes_to_the_turn_of_chat(
    kind: OutputKind, monkeypatch: pytest.MonkeyPatch
) -> None:
    dialect = MarkedDialect(";?xyz")  # the counting model thinks after ";" and answers after "?"
    monkeypatch.setattr(composer, "dialect_of", lambda tokenizer: dialect)
    params = SamplingParams(temperature=0, max_tokens=9, logprobs=0)
    with LLM.from_engine(counting_engine()) as llm:
        (whole,) = llm.chat(HI, params, thinking=True)
        assert whole.outputs[0].turn == AssistantTurn("!", "-_\n")
        dialect.asked = None
        *_, last = llm.stream(HI, params, output_kind=kind, thinking=True)
        assert last.outputs[0].turn == whole.outputs[0].turn
        assert last.prompt == whole.prompt == "u:Hi;a:"
        assert dialect.asked == (ChatOptions(thinking=True, tools=[]), None, "u:Hi;a:")


def test_a_stream_is_held_to_its_form() -> None:
    params = SamplingParams(temperature=0, structured=StructuredOutput(regex="[x-z]{3}"))
    with LLM.from_engine(counting_engine()) as llm:
        *_, last = llm.stream(HI, params)
        assert last.outputs[0].turn == AssistantTurn(content="xyz")
        with pytest.raises(InvalidRequestError, match="knows no tools"):
            llm.stream(HI, params, tools=[SHAPE])
        with pytest.raises(InvalidRequestError, match="tools is for conversations"):
            llm.stream("Hi", params, tools=[SHAPE])


def test_chat_gives_turns() -> None:
    with LLM.from_engine(counting_engine()) as llm:
        (output,) = llm.chat([{"role": "user", "content": "a"}], SamplingParams(temperature=0))
        completion = output.outputs[0]
        assert completion.turn == AssistantTurn(content=completion.text)
        with pytest.raises(InvalidRequestError, match="knows no tools"):
            llm.chat([{"role": "user", "content": "a"}], tools=[SHAPE])
        with pytest.raises(InvalidRequestError, match="expected a dict"):
            llm.chat([[5]])  # type: ignore[arg-type]
