"""DeepSeek's calls: a name and JSON between tokens, in V3 and R1 within a fence of Markdown."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

from slipstream.runtime.chat.calls import MOST_NAME, NAME, Calls, openai_id, stream_value
from slipstream.runtime.chat.events import ContentText
from slipstream.runtime.chat.grammar import Grammar, alternatives, quoted
from slipstream.runtime.chat.json_calls import free_calls
from slipstream.runtime.chat.options import Tool
from slipstream.runtime.chat.tape import Steps, Tape

_BEGIN, _END, _CALL, _SEP, _CALL_END = (
    f"<\uff5ctool▁{name}\uff5c>"
    for name in ("calls▁begin", "calls▁end", "call▁begin", "sep", "call▁end")
)


@dataclass(frozen=True, slots=True)
class DeepSeekCalls:
    """``call name sep {...} end``, or ``fenced`` ``call function sep name ```json {...} ``` end``;
    both are read."""

    fenced: bool
    begins: tuple[str, ...] = (_BEGIN, _CALL)
    marks: tuple[str, ...] = (_BEGIN, _CALL, _SEP, _CALL_END, _END)
    new_id: Callable[[], str] = openai_id

    def opening(self, tape: Tape, calls: Calls) -> Steps[None]:
        """There are none without a marker."""
        yield from ()

    def read(self, tape: Tape, calls: Calls) -> Steps[None]:
        """Read calls, each after its marker, of which the first may have been the one found."""
        begun: str | None = tape.recorded().strip()
        if begun == _BEGIN:
            yield from tape.space()
            begun = yield from tape.starts(_CALL)
        while begun is not None and (yield from self._call(tape, calls)):
            yield from tape.space()
            begun = yield from tape.starts(_CALL, _END)
            if begun == _END:
                yield from tape.all_space()
                return
        if tape.recorded().strip():
            yield ContentText(tape.recorded())

    def _call(self, tape: Tape, calls: Calls) -> Steps[bool]:
        yield from tape.space()
        name = yield from tape.run(NAME, MOST_NAME)
        if (yield from tape.starts(_SEP)) is None:
            return False
        yield from tape.space()
        if (yield from tape.peek()) != "{":
            name = yield from tape.run(NAME, MOST_NAME)
            yield from tape.space()
            yield from tape.starts("```json", "```")
            yield from tape.space()
        if not name or (yield from tape.peek()) != "{":
            return False
        yield calls.begin(name)
        if not (yield from stream_value(tape, calls)):
            return False
        yield from tape.space()
        yield from tape.starts("```")
        yield from tape.space()
        if (yield from tape.starts(_CALL_END)) is not None:
            tape.record()
        return True

    def group(self, grammar: Grammar, tools: Collection[Tool], *, many: bool) -> str:
        """Calls with their markers."""
        return grammar.rule(f"{grammar.literal(_BEGIN)} {self._calls(grammar, tools, many=many)}")

    def free(self, grammar: Grammar, tools: Collection[Tool], *, many: bool) -> str:
        """Text that ends with calls, if with any."""
        one = grammar.rule(f"{grammar.until(_BEGIN)} {self._calls(grammar, tools, many=many)}")
        return free_calls(grammar, one, self.begins, many=False)

    def _calls(self, grammar: Grammar, tools: Collection[Tool], *, many: bool) -> str:
        call, sep, end = (grammar.literal(mark) for mark in (_CALL, _SEP, _CALL_END))
        each = [self._named(grammar, tool, sep) for tool in tools]
        one = grammar.rule(f"{call} {grammar.rule(alternatives(each))} {end}")
        between = '"\\n"' if self.fenced else ""
        more = f" ({between} {one})*" if many else ""
        return f"{one}{more} {grammar.literal(_END)}"

    def _named(self, grammar: Grammar, tool: Tool, sep: str) -> str:
        schema = grammar.schema(tool.parameters)
        if not self.fenced:
            return f"{quoted(tool.name)} {sep} {schema}"
        fence = quoted(f"{tool.name}\n```json\n")
        closed = quoted("\n```")
        return f'"function" {sep} {fence} {schema} {closed}'
