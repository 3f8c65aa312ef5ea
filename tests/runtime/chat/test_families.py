"""What holds of the dialects of all families alike."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from tests.runtime.chat.families import ARGUMENTS, FAMILIES, Written
from tests.runtime.chat.reading import TOOLS, WITH_TOOLS, allows, read

from slipstream.errors import InvalidRequestError
from slipstream.runtime.chat.events import AssistantTurn, ToolCall
from slipstream.runtime.chat.options import AllowedTools, ChatOptions, NamedTool
from slipstream.runtime.chat.tagged_calls import TaggedCalls
from slipstream.runtime.structured.compiler import GrammarCompiler
from slipstream.runtime.structured.output import StructuredOutput

every_family = pytest.mark.parametrize("family", FAMILIES, ids=[each.name for each in FAMILIES])
CALLS = [ToolCall("", "get_weather", ARGUMENTS), ToolCall("", "now", "{}")]


@every_family
def test_it_reads_thoughts_content_and_calls(family: Written) -> None:
    text = family.thoughts + family.content + family.calls(family.call, family.second)
    thoughts = "hm" if family.thoughts else ""
    expected = AssistantTurn(thoughts, family.content, CALLS)
    assert read(family.dialect, text, family.prompt) == expected


@every_family
def test_grammars_take_what_it_reads(family: Written) -> None:
    def held(text: str, **options: Any) -> bool:  # noqa: ANN401 - fields differ
        form = family.dialect.structured(replace(WITH_TOOLS, **options), None, family.prompt)
        assert form is not None
        return allows(family.tokenizer, form, text)

    one, both = family.calls(family.call), family.calls(family.call, family.second)
    for thoughts in {family.thoughts, "" if not family.prompt else family.thoughts}:
        assert held(thoughts + family.content + one)
        assert held(thoughts + family.content + both) == family.parallel
        assert not held(thoughts + both, parallel_tool_calls=False)
        assert held(thoughts + both, tool_choice="required") == family.parallel
        assert held(thoughts + one, tool_choice="required", parallel_tool_calls=False)
        assert held(thoughts + one, tool_choice=NamedTool("get_weather"))
        assert not held(thoughts + one, tool_choice=NamedTool("now"))
        assert not held(thoughts + one.replace("Paris", "P").replace("city", "town"))
        assert not held(thoughts + one.replace("2", '"x"').replace("days=x", "days='x'"))
        assert not held(thoughts, tool_choice="required")


@every_family
def test_grammars_let_it_answer(family: Written) -> None:
    final = "<|channel|>final<|message|>" if family.name == "harmony" else ""
    form = family.dialect.structured(WITH_TOOLS, None, family.prompt)
    assert form is not None
    assert allows(family.tokenizer, form, f"{family.thoughts}{final}It is 5 < 7.")
    wanted = StructuredOutput(json={"type": "integer"})
    for options in (ChatOptions(), WITH_TOOLS):
        form = family.dialect.structured(options, wanted, family.prompt)
        assert form is not None
        if form is not wanted:
            assert allows(family.tokenizer, form, f"{family.thoughts}{final}12")
            assert not allows(family.tokenizer, form, f"{family.thoughts}{final}x")


@every_family
def test_past_calls_are_written_as_they_are_read(family: Written) -> None:
    def call(name: str, arguments: str, index: int) -> dict[str, Any]:
        function = {"name": name, "arguments": arguments}
        return {"id": f"12345678{index}", "type": "function", "function": function}

    made = family.dialect.messages(
        [
            {"role": "user", "content": "Hi"},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [call("get_weather", ARGUMENTS, 1), call("now", "", 2)],
            },
            {"role": "tool", "tool_call_id": "123456781", "content": "rain"},
            {"role": "tool", "tool_call_id": "123456782", "content": "12:00"},
        ]
    )
    tools = family.dialect.tools(WITH_TOOLS)
    text = family.tokenizer.apply_chat_template(made, tools=tools)
    assert "get_weather" in text.split("Hi")[0] + text
    past = text.split("Hi", 1)[1]
    assert past.index("Paris") < past.index("rain")
    assert past.index("rain") < past.index("12:00")
    if family.name == "harmony":
        past = past.replace("<|start|>assistant to", "<|start|>assistant<|channel|>commentary to")
    begin = past.index((family.begin + family.call)[:12])
    turn = read(family.dialect, past[begin : past.index("rain")], "</think>")
    assert turn.calls[0] == CALLS[0]


@every_family
def test_a_cut_call_is_content_or_begun(family: Written) -> None:
    text = family.calls(family.call)
    for end in range(len(text)):
        turn = read(family.dialect, text[:end], "</think>")
        if turn.calls:
            (call,) = turn.calls
            assert call.name == "get_weather"
            told = len(call.arguments)
            assert call.arguments[:15] == ARGUMENTS[: min(told, 15)]
        elif family.name != "harmony":
            assert turn.content == text[:end]


@every_family
def test_without_tools_nothing_is_a_call(family: Written) -> None:
    text = family.calls(family.call)
    parser = family.dialect.parser(replace(WITH_TOOLS, tool_choice="none"), "</think>")
    turn = AssistantTurn()
    for event in [*parser.push(text), *parser.finish()]:
        turn.add(event)
    assert turn.calls == []
    assert turn.content == (ARGUMENTS if family.name == "harmony" else text)


@every_family
def test_special_tokens_that_it_must_see(family: Written) -> None:
    written = family.thoughts + family.calls(family.call, family.second)
    for token in family.special:
        if token in written:
            assert token in family.dialect.special_tokens


@every_family
def test_any_number_of_tools_and_tools_named_like_tags(family: Written) -> None:
    tags = [replace(TOOLS[0], name=name) for name in ("<tool_call>", "</think>", '"]}', "a b")]
    many = [replace(TOOLS[1], name=f"tool_{i}") for i in range(1000)]
    for choice in ("auto", "required"):
        options = ChatOptions(tools=[*tags, *many, *TOOLS], tool_choice=choice)
        form = family.dialect.structured(options, None, family.prompt)
        assert form is not None
        assert allows(family.tokenizer, form, family.thoughts + family.calls(family.call))


@every_family
def test_tools_that_need_not_be_held_have_any_schema(family: Written) -> None:
    odd = replace(TOOLS[1], parameters={"type": "object", "if": {}, "then": {}}, strict=False)
    options = ChatOptions(tools=[TOOLS[0], odd])
    form = family.dialect.structured(options, None, family.prompt)
    assert form is not None
    assert allows(family.tokenizer, form, family.thoughts + family.calls(family.call))


@every_family
def test_the_engine_compiles_the_grammars(family: Written) -> None:
    compiler = GrammarCompiler(family.tokenizer, family.tokenizer.vocab_size)
    forced = replace(WITH_TOOLS, tool_choice="required", thinking_budget=9)
    user = StructuredOutput(grammar='start: "a" b\nb: "c"')
    for options, wanted in ((WITH_TOOLS, None), (forced, None), (WITH_TOOLS, user)):
        form = family.dialect.structured(options, wanted, family.prompt)
        assert form is not None
        compiler.compile(form)


@every_family
def test_small_models_find_no_endless_space(family: Written) -> None:
    form = family.dialect.structured(WITH_TOOLS, None, family.prompt)
    assert form is not None
    text = family.thoughts + family.calls(family.call)
    if "{" in family.call:
        assert not allows(family.tokenizer, form, text.replace('{"city', "{" + " " * 99 + '"city'))


@every_family
def test_none_but_allowed_tools_are_called(family: Written) -> None:
    def held(text: str, *names: str, required: bool = False) -> bool:
        options = ChatOptions(tools=TOOLS, tool_choice=AllowedTools(names, required=required))
        form = family.dialect.structured(options, None, family.prompt)
        assert form is not None
        assert family.dialect.tools(options) == family.dialect.tools(ChatOptions(tools=TOOLS))
        return allows(family.tokenizer, form, family.thoughts + text)

    first, second = family.calls(family.call), family.calls(family.second)
    final = "<|channel|>final<|message|>" if family.name == "harmony" else ""
    for required in (False, True):
        assert held(first, "get_weather", required=required)
        assert held(second, "now", required=required)
        assert not held(first, "now", required=required)
        assert held(f"{final}No.", "now", required=required) != required
    with pytest.raises(InvalidRequestError, match="then"):
        held(first, "get_weather", "then")
    with pytest.raises(InvalidRequestError, match="allows no tools"):
        held(first)


TAGGED = [
    each for each in FAMILIES if isinstance(getattr(each.dialect, "calls", None), TaggedCalls)
]


@pytest.mark.parametrize("family", TAGGED, ids=lambda family: family.name)
@pytest.mark.parametrize(
    ("schema", "good", "bad"),
    [
        ({"maxLength": 5}, ("Paris", "", "a\nb"), ("Berlin",)),
        ({"minLength": 2}, ("Oslo",), ("O",)),
        ({"pattern": "^[a-z]+$"}, ("paris",), ("Paris", "a b", "")),
        ({"pattern": "a|^b|c$"}, ("xax", "bx", "xc"), ("xb", "cx")),
        ({"pattern": "[$^|]\\d"}, ("x|1",), ("x|",)),
        ({"pattern": "i", "maxLength": 3}, ("xix",), ("xxi4", "abc")),
        ({"format": "date"}, ("2026-02-03",), ("2026-13-03", "today")),
        ({"format": "date-time"}, ("2026-02-03T04:05:06Z",), ("2026-02-03",)),
        ({"format": "email"}, ("a.b@c.org",), ("a@", "a")),
        ({"format": "uuid"}, ("01234567-89ab-cdef-0123-456789abcdef",), ("0123",)),
        ({"format": "ipv4"}, ("10.0.0.255",), ("10.0.0.256",)),
    ],
    ids=str,
)
def test_texts_in_tags_are_held_to_their_schema(
    family: Written, schema: dict[str, Any], good: tuple[str, ...], bad: tuple[str, ...]
) -> None:
    given: dict[str, Any] = dict(TOOLS[0].parameters or {})
    properties = {**given["properties"], "city": {"type": "string", **schema}}
    tool = replace(TOOLS[0], parameters={**given, "properties": properties})
    options = ChatOptions(tools=[tool], tool_choice="required")
    form = family.dialect.structured(options, None, family.prompt)
    assert form is not None
    for text in (*good, *bad):
        written = family.thoughts + family.calls(family.call.replace("Paris", text))
        assert allows(family.tokenizer, form, written) == (text in good), text


@pytest.mark.parametrize("family", TAGGED, ids=lambda family: family.name)
def test_what_cannot_be_held_in_tags_is_refused_of_strict_tools_only(family: Written) -> None:
    for odd in ({"pattern": "(?=a)b"}, {"pattern": "(^a)b"}, {"format": "tea"}):
        properties = {"city": {"type": "string", **odd}}
        parameters = {"type": "object", "properties": properties}
        tool = replace(TOOLS[0], parameters=parameters, strict=True)
        options = ChatOptions(tools=[tool], tool_choice="required")
        with pytest.raises(InvalidRequestError, match="cannot be held"):
            family.dialect.structured(options, None, family.prompt)
        free = replace(options, tools=[replace(tool, strict=False)])
        assert family.dialect.structured(free, None, family.prompt) is not None
