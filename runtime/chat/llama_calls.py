"""Llama's calls as JSON: an answer that begins with an object, several parted by semicolons."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

from slipstream.runtime.chat.calls import Calls, openai_id, read_object
from slipstream.runtime.chat.events import ContentText
from slipstream.runtime.chat.grammar import Grammar, alternatives
from slipstream.runtime.chat.json_calls import object_rule
from slipstream.runtime.chat.options import Tool
from slipstream.runtime.chat.tape import Steps, Tape


@dataclass(frozen=True, slots=True)
class LlamaCalls:
    """``{"name": ..., "parameters": {...}}; {...}``, perhaps after ``<|python_tag|>``.

    Without that tag it is a call only if a tool has that name: answers may be JSON, too.
    """

    begins: tuple[str, ...] = ("<|python_tag|>",)
    marks: tuple[str, ...] = ("<|python_tag|>",)
    new_id: Callable[[], str] = openai_id

    def opening(self, tape: Tape, calls: Calls) -> Steps[None]:
        """Read calls without a tag."""
        tape.record()
        yield from tape.space()
        if (yield from tape.peek()) == "{":
            yield from self._objects(tape, calls, known=True)
        else:
            tape.unread(tape.recorded())

    def read(self, tape: Tape, calls: Calls) -> Steps[None]:
        """Read calls after the tag."""
        yield from tape.space()
        yield from self._objects(tape, calls, known=False)

    def _objects(self, tape: Tape, calls: Calls, *, known: bool) -> Steps[None]:
        while (yield from read_object(tape, calls, known=known)):
            yield from tape.all_space()
            if (yield from tape.starts(";")) is None:
                return
            yield from tape.space()
        yield ContentText(tape.recorded())
        tape.record()

    def group(self, grammar: Grammar, tools: Collection[Tool], *, many: bool) -> str:
        """Calls without a tag, which need none."""
        call = object_rule(grammar, tools, "parameters")
        return grammar.rule(f'{call} ("; " {call})*') if many else call

    def free(self, grammar: Grammar, tools: Collection[Tool], *, many: bool) -> str:
        """Calls, perhaps with the tag, or a text that begins like none."""
        calls = self.group(grammar, tools, many=many)
        tag = grammar.literal(self.begins[0])
        text = grammar.rule(grammar.terminal(r"/[^{\s<](?s:.*)/"))
        return grammar.rule(alternatives([f"{tag}? {calls}", f"({text})?"]))
