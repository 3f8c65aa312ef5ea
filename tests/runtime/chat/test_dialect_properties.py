"""Streams in random pieces, of random fragments, and random walks through the grammars."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.runtime.chat.families import ARGUMENTS, BY_NAME, FAMILIES, Written
from tests.runtime.chat.reading import WITH_TOOLS, matcher, read, turn

from slipstream.runtime.chat.events import AssistantTurn
from slipstream.runtime.chat.options import NamedTool
from slipstream.runtime.structured.output import StructuredOutput
from slipstream.runtime.text.tokenizer import Tokenizer

every_family = pytest.mark.parametrize("family", FAMILIES, ids=[each.name for each in FAMILIES])
# No name holds what words begin with, so that each must be shown.
_WORDS = [f"\u00a7{i}" for i in range(3)]
_FRAGMENTS = [
    *(*_WORDS, " ", "\n", "\n\n", "<", "[", "{", "}", "]", '"', ",", ";", "\\", "\ufffd"),
    *("now", "get_weather", "get_weather(", "city=", "'", '{"name": "now"', ', "arguments": '),
    *('{"name": "now", "parameters": {"a": [1, 2.5e3', '"x\\u00e9', "-", "0", "true", "nul", ": "),
    *("<function=now>", "<parameter=city>", "\n</parameter>", "</function>", "```json\n", "\n```"),
    *("<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>", "</tool_call>", "function"),
    *(
        "<response>",
        "</response>",
        " to=functions.now",
        "analysis",
        "commentary",
        "final",
        "[ARGS]",
    ),
    ARGUMENTS,
]


def _pieces(text: str, cuts: list[int]) -> list[str]:
    ends = sorted({cut % (len(text) + 1) for cut in cuts} | {0, len(text)})
    return [text[a:b] for a, b in pairwise(ends)]


def _texts(family: Written) -> st.SearchStrategy[str]:
    whole = [family.call, family.second, family.thoughts, family.calls(family.call, family.second)]
    marks = [mark for mark in (*family.dialect.special_tokens, *family.special) if mark]
    parts = st.sampled_from([*_FRAGMENTS, *marks, *whole, *whole, family.begin, family.end])
    return st.lists(parts | st.text(max_size=3), max_size=14).map("".join)


@every_family
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_how_a_stream_is_cut_changes_nothing(family: Written, data: st.DataObject) -> None:
    text = data.draw(_texts(family))
    cuts = data.draw(st.lists(st.integers(0, 1 << 16), max_size=12))
    prompt = data.draw(st.sampled_from([family.prompt, "", "</think>", "<think>\n"]))

    def parsed(pieces: list[str]) -> AssistantTurn:
        return turn(family.dialect.parser(WITH_TOOLS, prompt), pieces)

    once = parsed([text])
    assert parsed(_pieces(text, cuts)) == once
    assert parsed(list(text)) == once


@pytest.mark.parametrize("family", FAMILIES[:-1], ids=[each.name for each in FAMILIES[:-1]])
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_nothing_is_lost(family: Written, data: st.DataObject) -> None:
    text = data.draw(_texts(family))
    told = read(family.dialect, text, "</think>")
    shown = told.reasoning + told.content + "".join(c.name + c.arguments for c in told.calls)
    for word in _WORDS:
        assert shown.count(word) == text.count(word)


@every_family
def test_what_is_held_back_is_bounded(family: Written) -> None:
    for unit in (
        "\n",
        "<",
        "\u00a7",
        '<tool_call>{"name": "',
        family.call + " ",
        family.begin + family.call[:20],
    ):
        parser = family.dialect.parser(WITH_TOOLS, "</think>")
        for char in unit * (20_000 // len(unit)):
            parser.push(char)
            assert len(parser._tape._text) <= 4096  # type: ignore[attr-defined]


def _walk(tokenizer: Tokenizer, form: StructuredOutput, random_: random.Random) -> str | None:
    """A random text that a grammar takes; None if none was found."""
    held = matcher(tokenizer, form)
    tokens: list[int] = []
    # What ends values, which random bytes would not.
    ends = ['"', "}", "\n</parameter>\n", "</arg_value>\n", "2", '"Paris"', "True", "<think>"]
    snippets = [tokenizer.encode(text, add_special_tokens=False) for text in ends]
    while len(tokens) < 600:
        if held.is_stopped() or (held.is_accepting() and random_.random() < 0.5):
            return tokenizer.decode(tokens, skip_special_tokens=False)
        forced = held.compute_ff_tokens()
        if not forced and random_.random() < 0.5:
            forced = random_.choice(snippets)
        if forced:
            taken = held.try_consume_tokens(forced)
            tokens += forced[:taken]
        if not forced or not taken:
            bits = np.frombuffer(held.compute_bitmask(), np.uint8)
            allowed = np.flatnonzero(np.unpackbits(bits, bitorder="little"))
            allowed = allowed[allowed != tokenizer.token_to_id("<eos>")]
            if not len(allowed):
                return tokenizer.decode(tokens, skip_special_tokens=False)
            token = int(random_.choice(allowed))
            assert held.consume_token(token)
            tokens.append(token)
    return None


@every_family
@pytest.mark.parametrize("choice", ["auto", "required", NamedTool("get_weather")])
def test_what_the_grammar_allows_is_read(family: Written, choice: object) -> None:
    options = replace(WITH_TOOLS, tool_choice=choice, thinking_budget=20)  # type: ignore[arg-type]
    form = family.dialect.structured(options, None, family.prompt)
    assert form is not None
    random_ = random.Random(family.name)
    walks = [_walk(family.tokenizer, form, random_) for _ in range(12)]
    texts = [text for text in walks if text is not None]
    assert texts
    for text in texts:
        told = read(family.dialect, text, family.prompt)
        if choice != "auto":
            assert told.calls, text
            assert told.content == "", text
        for call in told.calls:
            arguments = json.loads(call.arguments)
            if call.name == "get_weather":
                assert isinstance(arguments["city"], str)
                assert isinstance(arguments.get("days", 0), int | float)
                assert arguments.keys() <= {"city", "days"}
            else:
                assert call.name == "now"


def test_ids_are_of_the_shape_of_the_family() -> None:
    for name, length in (("qwen", 29), ("mistral", 9), ("ministral", 9)):
        family = BY_NAME[name]
        parser = family.dialect.parser(WITH_TOOLS, "</think>")
        (begin,) = [e for e in parser.push(family.calls(family.call)) if hasattr(e, "call_id")]
        assert len(begin.call_id) == length
        assert begin.call_id.removeprefix("call_").isalnum()
