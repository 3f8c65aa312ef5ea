"""Mistral's calls: a list of objects after one marker, or since 2025 a marker a call."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass

from slipstream.runtime.chat.calls import (
    MOST_NAME,
    NAME,
    Calls,
    mistral_id,
    read_object,
    stream_value,
)
from slipstream.runtime.chat.events import ContentText
from slipstream.runtime.chat.grammar import Grammar, alternatives, quoted
from slipstream.runtime.chat.json_calls import free_calls, object_rule, read_list
from slipstream.runtime.chat.options import Tool
from slipstream.runtime.chat.tape import Steps, Tape

_BEGIN, _ARGS, _ID = "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"
_ID_TEXT = re.compile(r"[a-zA-Z0-9]*")


@dataclass(frozen=True, slots=True)
class MistralCalls:
    """``[TOOL_CALLS][{"name": ..., "arguments": {...}}, ...]``, or with ``named``
    ``[TOOL_CALLS]name[ARGS]{...}``; both are read."""

    named: bool
    begins: tuple[str, ...] = (_BEGIN,)
    marks: tuple[str, ...] = (_BEGIN, _ARGS, _ID)
    new_id: Callable[[], str] = mistral_id

    def opening(self, tape: Tape, calls: Calls) -> Steps[None]:
        """There are none without a marker."""
        yield from ()

    def read(self, tape: Tape, calls: Calls) -> Steps[None]:
        """Read a list, or one call."""
        yield from tape.space()
        if (yield from tape.starts("[")) is not None:
            yield from tape.space()
            if (yield from read_object(tape, calls)):
                yield from read_list(tape, calls)
                yield from tape.all_space()
                return
        elif (yield from self._named(tape, calls)):
            yield from tape.all_space()
            return
        yield ContentText(tape.recorded())

    def _named(self, tape: Tape, calls: Calls) -> Steps[bool]:
        name = yield from tape.run(NAME, MOST_NAME)
        if (yield from tape.starts(_ID)) is not None:
            yield from tape.run(_ID_TEXT)
        yield from tape.starts(_ARGS)
        yield from tape.space()
        if not name or (yield from tape.peek()) != "{":
            return False
        yield calls.begin(name)
        yield from stream_value(tape, calls)
        return True

    def group(self, grammar: Grammar, tools: Collection[Tool], *, many: bool) -> str:
        """Calls with their markers."""
        begin = grammar.literal(_BEGIN)
        one = grammar.rule(f"{begin} {self._call(grammar, tools, many=many)}")
        return grammar.rule(f"{one}+") if many and self.named else one

    def free(self, grammar: Grammar, tools: Collection[Tool], *, many: bool) -> str:
        """Text in which each marker begins a call."""
        one = grammar.rule(f"{grammar.until(_BEGIN)} {self._call(grammar, tools, many=many)}")
        return free_calls(grammar, one, self.begins, many=many and self.named)

    def _call(self, grammar: Grammar, tools: Collection[Tool], *, many: bool) -> str:
        if not self.named:
            call = object_rule(grammar, tools, "arguments")
            more = f' (", " {call})*' if many else ""
            return grammar.rule(f'"[" {call}{more} "]"')
        args = grammar.literal(_ARGS)
        each = [f"{quoted(t.name)} {args} {grammar.schema(t.parameters)}" for t in tools]
        return grammar.rule(alternatives(each))
