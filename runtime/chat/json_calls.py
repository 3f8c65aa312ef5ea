"""Calls that are JSON objects between markers: Hermes, Qwen, Granite, older Mistral."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

from slipstream.runtime.chat.calls import Calls, openai_id, read_object, to_json
from slipstream.runtime.chat.events import ContentText
from slipstream.runtime.chat.grammar import Grammar, alternatives, quoted
from slipstream.runtime.chat.options import Tool
from slipstream.runtime.chat.tape import Steps, Tape


@dataclass(frozen=True, slots=True)
class JsonCalls:
    """``begin{"name": ..., "arguments": {...}}end``, or with ``listed`` all calls in one list.

    ``begins``: what else models write for ``begin``. ``before`` and ``after`` stand around the
    object.
    """

    begin: str
    end: str = ""
    before: str = ""
    after: str = ""
    listed: bool = False
    others: tuple[str, ...] = ()
    new_id: Callable[[], str] = openai_id

    @property
    def begins(self) -> tuple[str, ...]:
        """Markers in free text after which calls come."""
        return (self.begin, *self.others)

    @property
    def marks(self) -> tuple[str, ...]:
        """All its markers that may be special tokens."""
        return (*self.begins, self.end)

    def opening(self, tape: Tape, calls: Calls) -> Steps[None]:
        """There are none without a marker."""
        yield from ()

    def read(self, tape: Tape, calls: Calls) -> Steps[None]:
        """Read an object or a list of them."""
        yield from tape.space()
        listed = (yield from tape.starts("[")) is not None
        yield from tape.space()
        told = yield from read_object(tape, calls)
        if not told:
            yield ContentText(tape.recorded())
            return
        if listed:
            yield from read_list(tape, calls)
        yield from tape.all_space()
        if self.end and (yield from tape.starts(self.end)):
            yield from tape.all_space()

    def group(self, grammar: Grammar, tools: Collection[Tool], *, many: bool) -> str:
        """Calls with their markers."""
        call = object_rule(grammar, tools, "arguments")
        begin, end = (grammar.literal(t) for t in (self.begin + self.before, self.after + self.end))
        if self.listed:
            more = f' (", " {call})*' if many else ""
            return grammar.rule(f'{begin} "[" {call}{more} "]" {end}')
        one = grammar.rule(f"{begin} {call} {end}")
        return grammar.rule(f'{one} ("\\n" {one})*') if many else one

    def free(self, grammar: Grammar, tools: Collection[Tool], *, many: bool) -> str:
        """Text in which each marker begins a call."""
        call = object_rule(grammar, tools, "arguments")
        end = grammar.literal(self.after + self.end)
        before = grammar.literal(self.before)
        if self.listed:
            more = f' (", " {call})*' if many else ""
            call = f'"[" {call}{more} "]"'
        one = grammar.rule(f"{grammar.until(self.begin)} {before} {call} {end}")
        return free_calls(grammar, one, self.begins, many=many and not self.listed)


def read_list(tape: Tape, calls: Calls, separator: str = ",", end: str = "]") -> Steps[None]:
    """Read further calls of a list, and its end."""
    tape.record()
    yield from tape.space()
    while (found := (yield from tape.starts(separator, end))) == separator:
        yield from tape.space()
        if not (yield from read_object(tape, calls)):
            break
        tape.record()
        yield from tape.space()
    if found != end:
        yield ContentText(tape.recorded())
    tape.record()


def free_calls(grammar: Grammar, one: str, begins: tuple[str, ...], *, many: bool) -> str:
    """Text with calls in it; where there is one at most, no marker stands elsewhere."""
    if many:
        return grammar.rule(f"{one}* {grammar.text()}")
    rest = grammar.text_without(*begins)
    return grammar.rule(f"({one})? {rest}")


def object_rule(grammar: Grammar, tools: Collection[Tool], key: str) -> str:
    """A call of one of these tools, as models write it."""
    one = [
        f"{quoted(f'{to_json(tool.name)}, {to_json(key)}: ')} {grammar.schema(tool.parameters)}"
        for tool in tools
    ]
    return grammar.rule(f'"{{\\"name\\": " {grammar.rule(alternatives(one))} "}}"')
