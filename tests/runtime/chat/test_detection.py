"""From templates, or names, to dialects."""

from __future__ import annotations

import pytest
from tests.runtime.chat import templates
from tests.runtime.chat.families import BY_NAME
from tests.runtime.chat.reading import WITH_TOOLS, byte_tokenizer, read

from slipstream.errors import InvalidRequestError
from slipstream.runtime.chat.deepseek_calls import DeepSeekCalls
from slipstream.runtime.chat.detection import REASONING_PARSERS, TOOL_PARSERS, dialect_of
from slipstream.runtime.chat.family import Family
from slipstream.runtime.chat.harmony import Harmony
from slipstream.runtime.chat.json_calls import JsonCalls
from slipstream.runtime.chat.llama_calls import LlamaCalls
from slipstream.runtime.chat.mistral_calls import MistralCalls
from slipstream.runtime.chat.options import ChatOptions
from slipstream.runtime.chat.pythonic_calls import PythonicCalls
from slipstream.runtime.chat.tagged_calls import TaggedCalls

FORMATS = {
    "qwen": JsonCalls,
    "granite": JsonCalls,
    "coder": TaggedCalls,
    "glm": TaggedCalls,
    "llama": LlamaCalls,
    "pythonic": PythonicCalls,
    "mistral": MistralCalls,
    "ministral": MistralCalls,
    "deepseek-3.1": DeepSeekCalls,
    "deepseek-r1": DeepSeekCalls,
}


@pytest.mark.parametrize("name", FORMATS)
def test_a_template_tells_its_format(name: str) -> None:
    dialect = BY_NAME[name].dialect
    assert isinstance(dialect, Family)
    assert isinstance(dialect.calls, FORMATS[name])
    assert (dialect.thoughts is not None) == bool(BY_NAME[name].thoughts)


def test_gpt_oss_has_a_dialect_of_its_own() -> None:
    dialect = BY_NAME["harmony"].dialect
    assert isinstance(dialect, Harmony)
    assert dialect.needs.single_calls
    assert dialect.variables(ChatOptions(reasoning_effort="high")) == {"reasoning_effort": "high"}
    assert dialect.variables(ChatOptions(thinking=False)) == {"reasoning_effort": "low"}


def test_what_templates_want_is_found_by_rendering() -> None:
    def needs(name: str) -> tuple[bool, bool, bool]:
        dialect = BY_NAME[name].dialect
        assert isinstance(dialect, Family)
        found = dialect.needs
        return found.text_arguments, found.null_content, found.single_calls

    assert needs("qwen") == (False, False, False)
    assert needs("llama") == (False, False, True)
    assert needs("deepseek-3.1") == (True, False, False)
    assert needs("deepseek-r1") == (True, True, False)


def test_a_template_that_shows_no_tools_refuses_them() -> None:
    plain = dialect_of(byte_tokenizer(templates.PLAIN))
    assert plain.tools(ChatOptions()) is None
    with pytest.raises(InvalidRequestError, match="knows no tools") as error:
        plain.tools(WITH_TOOLS)
    assert error.value.param == "tools"
    # Thoughts alone do not make it know them, nor do markers of calls in the past.
    past = "<think></think>{% for m in messages %}{{ m.content }}<tool_call>{% endfor %}"
    with pytest.raises(InvalidRequestError, match="knows no tools"):
        dialect_of(byte_tokenizer(past)).tools(WITH_TOOLS)


def test_a_template_that_shows_tools_in_a_way_of_its_own_is_taken_for_hermes() -> None:
    own = dialect_of(byte_tokenizer("{{ tools | tojson if tools }}" + templates.PLAIN))
    assert own.tools(WITH_TOOLS) is not None
    (call,) = read(own, '<tool_call>{"name": "now", "arguments": {}}</tool_call>').calls
    assert call.name == "now"


@pytest.mark.parametrize("name", dict.fromkeys(name for name, _, _ in TOOL_PARSERS))
def test_a_tool_parser_by_name(name: str) -> None:
    dialect = dialect_of(byte_tokenizer(templates.PLAIN), tool_parser=name)
    assert isinstance(dialect, Family)
    assert dialect.calls in [made for each, made, _ in TOOL_PARSERS if each == name]
    assert dialect.thoughts is None


@pytest.mark.parametrize("name", dict.fromkeys(name for name, _, _ in REASONING_PARSERS))
def test_a_reasoning_parser_by_name(name: str) -> None:
    dialect = dialect_of(byte_tokenizer(templates.PLAIN), reasoning_parser=name)
    assert isinstance(dialect, Family)
    assert dialect.thoughts in [made for each, made, _ in REASONING_PARSERS if each == name]


def test_names_of_gpt_oss() -> None:
    tokenizer = byte_tokenizer(templates.PLAIN)
    assert isinstance(dialect_of(tokenizer, tool_parser="openai"), Harmony)
    assert isinstance(dialect_of(tokenizer, reasoning_parser="openai_gptoss"), Harmony)
    with pytest.raises(InvalidRequestError, match="tokenizer lacks"):
        dialect_of(tokenizer, tool_parser="openai").structured(WITH_TOOLS, None, "")


def test_an_unknown_name_lists_the_known_ones() -> None:
    tokenizer = byte_tokenizer(templates.PLAIN)
    with pytest.raises(InvalidRequestError, match=r"known are deepseek_v3, .*hermes"):
        dialect_of(tokenizer, tool_parser="nobody")
    with pytest.raises(InvalidRequestError, match=r"known are granite, .*qwen3"):
        dialect_of(tokenizer, reasoning_parser="nobody")
