"""Log probabilities, allowed tools and the items of an input, through OpenAI's client."""

from __future__ import annotations

from typing import Any

import openai
import pytest
from openai.types.responses import ResponseItem, ResponseStreamEvent
from pydantic import TypeAdapter
from tests.server.openai.serving import Running
from tests.server.responses.asking import SCORED, TOOL, Hearing, ask, without_ids

from slipstream.runtime.chat.options import AllowedTools


def test_texts_have_log_probabilities(server: Running) -> None:
    """Those of what is said; the tokens of thoughts, calls and marks have none."""
    answer = ask(server, **SCORED)
    first, _, middle, _, last = answer.output
    tokens = [[entry.token for entry in m.content[0].logprobs] for m in (first, middle, last)]
    assert tokens == [[";"], ["\n", "<eos>", "a", "b"], ["i", "j"]] and answer.top_logprobs == 2
    entry = middle.content[0].logprobs[2]
    assert entry.bytes == [97] and entry.logprob <= 0
    assert entry.top_logprobs[0].token == "a"
    events = ask(server, stream=True, **SCORED)
    known: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
    streamed: dict[int, list[Any]] = {}
    for event in events:
        known.validate_python(event.to_dict())
        if event.type == "response.output_text.delta":
            streamed.setdefault(event.output_index, []).extend(event.to_dict()["logprobs"])
        if event.type == "response.output_text.done":
            assert event.to_dict()["logprobs"] == streamed[event.output_index]
    whole = [item.to_dict() for item in events[-1].response.output]
    assert streamed == {i: whole[i]["content"][0]["logprobs"] for i in (0, 2, 4)}
    assert without_ids(events[-1].response)["output"] == without_ids(answer)["output"]
    assert [item.content[0].logprobs for item in ask(server).output if item.type == "message"] == (
        [[], [], []]
    )


def test_tools_are_allowed_by_name(server: Running, dialect: Hearing) -> None:
    tools: Any = [{**TOOL, "name": name} for name in "abc"]
    allowed: Any = [{"type": "function", "name": name} for name in "ab"]
    for mode in ("auto", "required"):
        choice: Any = {"type": "allowed_tools", "mode": mode, "tools": allowed}
        answer = ask(server, tools=tools, tool_choice=choice)
        assert dialect.asked is not None
        assert [tool.name for tool in dialect.asked[0].tools] == ["a", "b", "c"]
        assert dialect.asked[0].tool_choice == AllowedTools(["a", "b"], required=mode == "required")
        assert answer.tool_choice.to_dict() == choice


def test_input_items_are_listed_page_by_page(server: Running, client: openai.OpenAI) -> None:
    parts: Any = [{"type": "input_text", "text": "b"}]
    first = ask(
        server, input=[{"role": "user", "content": "a"}, {"role": "user", "content": parts}]
    )
    result: Any = {"type": "function_call_output", "call_id": "call_0", "output": "5"}
    second = ask(server, previous_response_id=first.id, input=[result])
    listed: list[Any] = list(client.responses.input_items.list(second.id, limit=3, order="asc"))
    assert [item.type for item in listed] == [
        "message", "message", *(item.type for item in first.output), "function_call_output",
    ]  # fmt: skip
    known: TypeAdapter[Any] = TypeAdapter(ResponseItem)
    for item in listed:
        known.validate_python(item.to_dict())
    assert [item.to_dict() for item in listed[2:-1]] == [item.to_dict() for item in first.output]
    assert [item.content[0].text for item in listed[:2]] == ["a", "b"]
    assert len({item.id for item in listed}) == len(listed)
    backwards = client.responses.input_items.list(second.id)
    assert [item.id for item in backwards.data] == [item.id for item in reversed(listed)]
    assert not backwards.has_more
    page = client.responses.input_items.list(second.id, limit=2, after=listed[4].id, order="desc")
    assert [item.id for item in page.data] == [listed[3].id, listed[2].id] and page.has_more
    with pytest.raises(openai.BadRequestError, match="no item"):
        client.responses.input_items.list(second.id, after="msg_nowhere")
    with pytest.raises(openai.BadRequestError, match="limit"):
        client.responses.input_items.list(second.id, limit=101)
    with pytest.raises(openai.NotFoundError):
        client.responses.input_items.list("resp_nowhere")
