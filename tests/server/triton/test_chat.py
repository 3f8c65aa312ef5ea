"""Conversations and forms of answers as inputs, without a server."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tests.server.openai.marked import MarkedDialect
from tests.server.triton.test_serving import Bench, Client

from slipstream.errors import InvalidRequestError
from slipstream.runtime.chat.conversation import Conversation
from slipstream.runtime.chat.options import ChatOptions, NamedTool, Tool
from slipstream.runtime.sampling.params import SamplingParams
from slipstream.runtime.structured.output import StructuredOutput
from slipstream.runtime.testing import counting_engine, counting_tokenizer
from slipstream.server.triton.parameters import Query, read_query

DEFAULTS = SamplingParams(temperature=0)
TOKENIZER = counting_tokenizer()
HI = [{"role": "user", "content": "hi"}]
FUNCTION = {"name": "f", "description": "does", "parameters": {"type": "object"}, "strict": True}
TOOLS = [{"type": "function", "function": FUNCTION}]
CHOICE = {"type": "function", "function": {"name": "f"}}
TAG = {"triggers": ["<f"], "structures": [{"begin": "<f=a>", "schema": {}, "end": "</f>"}]}


def tensors(inputs: dict[str, Any]) -> dict[str, NDArray[Any]]:
    """Texts as they are, anything else as JSON, as Triton's Python backend has them."""
    texts = {k: v if isinstance(v, str) else json.dumps(v) for k, v in inputs.items()}
    return {name: np.array([text.encode()], np.object_) for name, text in texts.items()}


def read(parameters: dict[str, Any] | None = None, **inputs: Any) -> Query:  # noqa: ANN401
    return read_query(tensors(inputs), parameters or {}, DEFAULTS, TOKENIZER)


def conversation(**inputs: Any) -> Conversation:  # noqa: ANN401
    query = read(**{"messages": HI, **inputs})
    assert isinstance(query.prompt, Conversation)
    return query.prompt


def test_messages_stand_for_a_prompt() -> None:
    query = read(messages=HI)
    assert query.prompt == Conversation(HI, options=ChatOptions(tools=[]))
    # A chat has room for an answer, which does not begin with its question.
    assert query.params.max_tokens is None and not query.echo
    assert query == read({"messages": json.dumps(HI)}) == read(sampling_parameters={"messages": HI})


@pytest.mark.parametrize(
    ("given", "choice"),
    [("auto", "auto"), ("required", "required"), ('"none"', "none"), (CHOICE, NamedTool("f"))],
)
def test_tools_and_thinking_are_options_of_the_conversation(given: Any, choice: Any) -> None:  # noqa: ANN401
    made = conversation(tools=TOOLS, tool_choice=given, reasoning_effort="none")
    tool = Tool("f", "does", {"type": "object"}, strict=True)
    assert made.options == ChatOptions(
        tools=[tool], tool_choice=choice, thinking=False, reasoning_effort="none"
    )


def test_empty_texts_say_nothing() -> None:
    assert conversation(tools="", tool_choice="", reasoning_effort="") == conversation()
    query = read(text_input="hi", messages="", guided_decoding_guide_type="")
    assert query == read(text_input="hi")


def test_past_calls_and_parts_are_plain() -> None:
    call = {"id": "1", "function": {"name": "f", "arguments": {"a": 1}}}
    messages = [
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": [{"type": "text", "text": "a"}] * 2},
    ]
    function = {"name": "f", "arguments": '{"a": 1}'}
    assert conversation(messages=messages).messages == [
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"id": "1", "type": "function", "function": function}],
        },
        {"role": "tool", "tool_call_id": "1", "content": "a\na"},
    ]


@pytest.mark.parametrize(
    ("kind", "guide", "form"),
    [
        ("json", None, {"json": True}),
        ("json_schema", {"type": "object"}, {"json": {"type": "object"}}),
        ("regex", "[0-9]+", {"regex": "[0-9]+"}),
        ("ebnf_grammar", "root ::= [0-9]+", {"grammar": "%llguidance {}\n\nstart: /[0-9]/+\n"}),
        ("ebnf_grammar", "start: /[0-9]+/", {"grammar": "start: /[0-9]+/"}),
    ],
)
def test_guides_of_tensorrt_llm(kind: str, guide: Any, form: dict[str, Any]) -> None:  # noqa: ANN401
    inputs: dict[str, Any] = {"guided_decoding_guide_type": kind}
    if guide is not None:
        inputs["guided_decoding_guide"] = guide
    structured = read(text_input="hi", **inputs).params.structured
    wanted = StructuredOutput(**form)
    assert structured is not None
    assert (structured.kind, structured.text.strip()) == (wanted.kind, wanted.text.strip())
    assert read(messages=HI, **inputs).params.structured == structured


def test_a_structural_tag_is_a_grammar() -> None:
    structured = read(
        text_input="hi", guided_decoding_guide_type="structural_tag", guided_decoding_guide=TAG
    ).params.structured
    assert structured is not None and '"<f"' in str(structured.grammar)


GUIDED = {"text_input": "hi", "guided_decoding_guide_type": "regex", "guided_decoding_guide": "a"}


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"messages": HI, "text_input": "hi"}, "text_input and messages are both given; send one"),
        ({"tools": TOOLS, "text_input": "hi"}, "tools belongs to a conversation; send that as me"),
        ({"messages": "x"}, "messages='x' is not a list in JSON; write for example"),
        ({"messages": {"role": "user"}}, "is not a list in JSON"),
        ({"messages": []}, "messages is empty; send at least"),
        ({"messages": ["hi"]}, r"messages\[0\]='hi' is no message with a role"),
        ({"messages": [{"role": "user"}]}, r"messages\[0\].content=None is not text"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "is not text; send"),
        ({"messages": [{"role": "assistant", "tool_calls": [1]}]}, "tool_calls has 1; write"),
        ({"messages": [{"role": "assistant", "tool_calls": 1}]}, "tool_calls is no list"),
        ({"messages": "[" * 5_000_000}, "messages has 5000000 characters; this server takes"),
        ({"messages": HI, "tools": "x"}, "tools='x' is not a list"),
        ({"messages": HI, "tools": [{"name": "f"}]}, r"tools\[0\]=.* is no function; write e.g."),
        ({"messages": HI, "tools": TOOLS, "tool_choice": "f"}, "tool_choice='f' is not known; se"),
        ({**GUIDED, "guided_decoding_guide_type": "x"}, "guide_type='x' is not known; send one of"),
        ({**GUIDED, "guided_decoding_guide_type": ""}, "guide_type=None is not known"),
        ({**GUIDED, "guided_decoding_guide_type": "json"}, "guide says nothing where"),
        ({**GUIDED, "guided_decoding_guide": ""}, "is regex, but guided_decoding_guide is missing"),
        ({**GUIDED, "guided_decoding_guide": "a" * 300_000}, "guide has 300000 characters"),
        (
            {**GUIDED, "guided_decoding_guide_type": "json_schema"},
            "^guided_decoding_guide: this is no JSON",
        ),
        (
            {**GUIDED, "guided_decoding_guide_type": "ebnf_grammar"},
            "^guided_decoding_guide: the grammar cannot be read",
        ),
        (
            {**GUIDED, "guided_decoding_guide_type": "structural_tag", "guided_decoding_guide": {}},
            "^guided_decoding_guide: a structural tag is",
        ),
        (
            {
                **GUIDED,
                "guided_decoding_guide_type": "json_schema",
                "guided_decoding_guide": '{"not":' * 70 + "{}" + "}" * 70,
            },
            r"the structured output is nested more than",
        ),
        (
            {**GUIDED, "sampling_parameters": {"structured": {"regex": "a"}}},
            "structured and guided_decoding_guide_type both say",
        ),
    ],
)
def test_what_is_wrong_is_named(inputs: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        read(**inputs)


class Asked:
    """The counting model with its marks, which says ";!?-_" and a line end, and then no more."""

    def __init__(self, marks: str | None = None) -> None:
        self.bench = Bench(counting_engine())
        if marks is not None:
            self.bench.serving._service.dialect = MarkedDialect(marks)

    def __call__(self, **inputs: Any) -> Client:  # noqa: ANN401
        client = Client()
        query = read({"return_finish_reason": True}, **inputs)
        self.bench.serving.submit(query, client)
        return client


def outputs(client: Client) -> dict[str, list[str]]:
    """All that comes: the parts of each output of the first completion."""
    parts: dict[str, list[str]] = {}
    while not (client.ended and client.responses.empty()):
        for name, array in client.next().items():
            parts.setdefault(name, []).append(array[0].decode())
    return parts


@pytest.mark.parametrize("stream", ["true", "false"])
@pytest.mark.parametrize(
    ("marks", "content", "thoughts", "calls", "reason"),
    [
        (";?xyz", "-_\n", "!", [], "stop"),
        (";!?_-", "\n", "", [("", "")], "tool_calls"),
        ("yz;x!", "", "", [("", "?-_\n")], "tool_calls"),
        ("vwxyz", ";!?-_\n", "", [], "stop"),
    ],
)
def test_turns_are_told_apart(
    stream: str, marks: str, content: str, thoughts: str, calls: list[Any], reason: str
) -> None:
    asked = Asked(marks)
    told = outputs(asked(messages=HI, sampling_parameters={"stream": stream}))
    assert "".join(told["text_output"]) == content
    assert "".join(told["reasoning_output"]) == thoughts
    made: dict[int, list[str]] = {}
    for part in told["tool_calls"]:
        for call in json.loads(part):
            function = call["function"]
            if "id" in call:
                assert (call["id"], call["type"]) == (f"call_{call['index']}", "function")
                made[call["index"]] = [function["name"], ""]
            made[call["index"]][1] += function["arguments"]
    assert [tuple(call) for call in made.values()] == calls
    assert told["finish_reason"][-1] == reason
    asked.bench.serving.close()


def test_several_turns_end_each_for_itself() -> None:
    asked = Asked(";?xyz")
    given = {"n": 2, "stream": True, "temperature": 0}
    client = asked(messages=HI, sampling_parameters=given)
    texts, thoughts = ["", ""], ["", ""]
    while not (client.ended and client.responses.empty()):
        response = client.next()
        for index in range(2):
            texts[index] += response["text_output"][index].decode()
            thoughts[index] += response["reasoning_output"][index].decode()
    assert (texts, thoughts) == (["-_\n"] * 2, ["!"] * 2)
    asked.bench.serving.close()


def test_answers_are_held_to_their_form_and_prompts_have_no_turns() -> None:
    asked = Asked()
    for kind, guide, answer in (("regex", "[0-9]{3}", 3), ("ebnf_grammar", "root ::= [0-9]", 1)):
        inputs = {"guided_decoding_guide_type": kind, "guided_decoding_guide": guide}
        told = outputs(asked(text_input="hi:", sampling_parameters={"stream": True}, **inputs))
        text = "".join(told["text_output"])
        assert text.isdigit() and len(text) == answer
        assert "reasoning_output" not in told and "tool_calls" not in told
    told = outputs(asked(messages=HI, sampling_parameters={"structured": {"choice": ["no"]}}))
    assert told["text_output"] == ["no"]
    told = outputs(asked(text_input="hi:", guided_decoding_guide_type="json"))
    assert told["text_output"][0].startswith("hi:")
    asked.bench.serving.close()


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"messages": [{"role": "user", "content": "x" * 300}]}, "^messages: .*256"),
        (
            {
                "messages": HI,
                "guided_decoding_guide_type": "regex",
                "guided_decoding_guide": "(",
            },
            "^guided_decoding_guide: ",
        ),
        ({"messages": HI, "tools": [{"function": {"name": "a b"}}]}, r"^tools\[0\] is called"),
        ({"messages": HI, "tools": TOOLS}, "chat template knows no tools"),
        ({"messages": HI, "tool_choice": "required"}, "^tool_choice"),
    ],
)
def test_what_the_engine_refuses_is_named(inputs: dict[str, Any], message: str) -> None:
    asked = Asked()
    with pytest.raises(InvalidRequestError, match=message):
        outputs(asked(**inputs))
    asked.bench.serving.close()
