"""The families: a template, its tokens, the prompt's end, and how the same turn is written."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from tests.runtime.chat import templates
from tests.runtime.chat.reading import byte_tokenizer

from slipstream.runtime.chat.detection import dialect_of
from slipstream.runtime.chat.dialect import Dialect
from slipstream.runtime.text.tokenizer import Tokenizer

ARGUMENTS = '{"city": "Paris", "days": 2}'


@dataclass(frozen=True)
class Written:
    """``call`` and ``second`` call get_weather with ARGUMENTS and now without any; ``between``
    parts them. ``thoughts`` is the beginning of a text that thinks "hm"."""

    name: str
    template: str
    special: tuple[str, ...]
    call: str
    second: str
    between: str = ""
    begin: str = ""
    end: str = ""
    thoughts: str = ""
    prompt: str = ""
    content: str = "I look."
    parallel: bool = True

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return byte_tokenizer(self.template, *self.special)

    @cached_property
    def dialect(self) -> Dialect:
        return dialect_of(self.tokenizer)

    def calls(self, *calls: str) -> str:
        return self.begin + self.between.join(calls) + self.end


def _json(name: str, arguments: str, key: str = "arguments") -> str:
    return f'{{"name": "{name}", "{key}": {arguments}}}'


_FIRST, _SECOND = _json("get_weather", ARGUMENTS), _json("now", "{}")
_TAGS = ("<think>", "</think>", "<tool_call>", "</tool_call>")
_NAMES = ("calls▁begin", "calls▁end", "call▁begin", "sep", "call▁end")
_D = [f"<\uff5ctool▁{name}\uff5c>" for name in _NAMES]
_CODER = (
    "<tool_call>\n<function=get_weather>\n<parameter=city>\nParis\n</parameter>\n"
    "<parameter=days>\n2\n</parameter>\n</function>\n</tool_call>"
)
_GLM = (
    "<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Paris</arg_value>\n"
    "<arg_key>days</arg_key>\n<arg_value>2</arg_value>\n</tool_call>"
)
_HARMONY_MARKS = (
    *("<|start|>", "<|channel|>", "<|message|>"),
    *("<|end|>", "<|call|>", "<|constrain|>"),
)
_TO = "<|channel|>commentary to=functions."

FAMILIES = [
    Written(
        "qwen",
        templates.QWEN,
        (),
        f"<tool_call>\n{_FIRST}\n</tool_call>",
        f"<tool_call>\n{_SECOND}\n</tool_call>",
        between="\n",
        thoughts="<think>\nhm\n</think>\n\n",
    ),
    Written(
        "coder",
        templates.QWEN_CODER,
        _TAGS,
        _CODER,
        "<tool_call>\n<function=now>\n</function>\n</tool_call>",
        between="\n",
    ),
    Written(
        "glm",
        templates.GLM,
        _TAGS,
        _GLM,
        "<tool_call>now\n</tool_call>",
        between="\n",
        thoughts="\n<think>hm</think>\n",
    ),
    Written(
        "granite",
        templates.GRANITE,
        ("<|tool_call|>",),
        _FIRST,
        _SECOND,
        between=", ",
        begin="<|tool_call|>[",
        end="]",
        thoughts="Here is my thought process:\nhm\nHere is my response:\n",
    ),
    Written(
        "granite-tags",
        templates.GRANITE_TAGS,
        ("<|tool_call|>", "<think>", "</think>"),
        _FIRST,
        _SECOND,
        between=", ",
        begin="<|tool_call|>[",
        end="]",
        thoughts="<think>hm</think><response>",
    ),
    Written(
        "llama",
        templates.LLAMA,
        ("<|python_tag|>",),
        _json("get_weather", ARGUMENTS, "parameters"),
        _json("now", "{}", "parameters"),
        between="; ",
        content="",
    ),
    Written(
        "pythonic",
        templates.PYTHONIC,
        ("<|python_start|>", "<|python_end|>"),
        'get_weather(city="Paris", days=2)',
        "now()",
        between=", ",
        begin="[",
        end="]",
        content="",
    ),
    Written(
        "mistral",
        templates.MISTRAL,
        ("[TOOL_CALLS]",),
        _FIRST,
        _SECOND,
        between=", ",
        begin="[TOOL_CALLS][",
        end="]",
    ),
    Written(
        "ministral",
        templates.MINISTRAL,
        ("[TOOL_CALLS]", "[ARGS]", "[THINK]", "[/THINK]"),
        f"[TOOL_CALLS]get_weather[ARGS]{ARGUMENTS}",
        "[TOOL_CALLS]now[ARGS]{}",
        thoughts="[THINK]hm[/THINK]",
    ),
    Written(
        "deepseek-3.1",
        templates.DEEPSEEK_31,
        (*_D, "<think>", "</think>"),
        f"{_D[2]}get_weather{_D[3]}{ARGUMENTS}{_D[4]}",
        f"{_D[2]}now{_D[3]}{{}}{_D[4]}",
        begin=_D[0],
        end=_D[1],
        thoughts="hm</think>",
        prompt="<think>",
    ),
    Written(
        "deepseek-r1",
        templates.DEEPSEEK_R1,
        (*_D, "<think>", "</think>"),
        f"{_D[2]}function{_D[3]}get_weather\n```json\n{ARGUMENTS}\n```{_D[4]}",
        f"{_D[2]}function{_D[3]}now\n```json\n{{}}\n```{_D[4]}",
        between="\n",
        begin=_D[0],
        end=_D[1],
        thoughts="hm\n</think>\n\n",
        prompt="<think>\n",
    ),
    Written(
        "harmony",
        templates.HARMONY,
        _HARMONY_MARKS,
        f"{_TO}get_weather <|constrain|>json<|message|>{ARGUMENTS}",
        f"{_TO}now <|constrain|>json<|message|>{{}}",
        between="<|call|><|start|>assistant",
        thoughts="<|channel|>analysis<|message|>hm<|end|><|start|>assistant",
        content="",
        parallel=False,
    ),
]
BY_NAME = {family.name: family for family in FAMILIES}
