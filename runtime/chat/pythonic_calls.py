"""Calls in Python's syntax: Llama 3.2 and 4, ``[f(a=1), g()]``."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from slipstream.runtime.chat.calls import MOST_NAME, NAME, Calls, openai_id, to_json
from slipstream.runtime.chat.events import ContentText
from slipstream.runtime.chat.grammar import Grammar, alternatives, quoted
from slipstream.runtime.chat.options import Tool
from slipstream.runtime.chat.tagged_calls import schema_of
from slipstream.runtime.chat.tape import Steps, Tape

_STOPS = re.compile(r"""[^"'()\[\]{},\\]*""")
_QUOTED = {quote: re.compile(rf"[^{quote}\\]*") for quote in "\"'"}
_PAIRS = {"(": ")", "[": "]", "{": "}"}
_DEEPEST = 64


@dataclass(frozen=True, slots=True)
class PythonicCalls:
    """A list of calls of tools that are known, at the very beginning of an answer or after
    ``<|python_start|>``. Each argument is told when it is whole."""

    begins: tuple[str, ...] = ("<|python_start|>",)
    marks: tuple[str, ...] = ("<|python_start|>", "<|python_end|>")
    new_id: Callable[[], str] = openai_id

    def opening(self, tape: Tape, calls: Calls) -> Steps[None]:
        """Read a list that begins the answer."""
        tape.record()
        yield from tape.space()
        if (yield from tape.peek()) == "[":
            yield from self._list(tape, calls)
        else:
            tape.unread(tape.recorded())

    def read(self, tape: Tape, calls: Calls) -> Steps[None]:
        """Read a list after the marker."""
        yield from tape.space()
        yield from self._list(tape, calls)

    def _list(self, tape: Tape, calls: Calls) -> Steps[None]:
        opened = yield from tape.starts("[")
        while opened and (yield from self._call(tape, calls)):
            tape.record()
            yield from tape.space()
            end = yield from tape.starts(",", "]")
            if end == "]":
                yield from tape.all_space()
                yield from tape.starts(self.marks[1])
                yield from tape.all_space()
                return
            if end is None:
                break
        yield ContentText(tape.recorded())
        tape.record()

    def _call(self, tape: Tape, calls: Calls) -> Steps[bool]:
        """Read ``name(key=value, ...)``; what is on the record afterwards is content."""
        yield from tape.space()
        name = yield from tape.run(NAME, MOST_NAME)
        if name not in calls.tools or (yield from tape.starts("(")) is None:
            return False
        yield from tape.space()
        if (yield from tape.starts(")")) is not None:
            yield calls.begin(name)
            yield calls.arguments("{}")
            return True
        first, lead = True, "{"
        while True:
            argument = yield from self._argument(tape)
            if argument is None:
                return False
            if first:
                yield calls.begin(name)
            first = False
            yield calls.arguments(lead + argument)
            tape.record()
            lead = ", "
            yield from tape.space()
            if (yield from tape.starts(")")) is not None:
                yield calls.arguments("}")
                return True
            if (yield from tape.starts(",")) is None:
                return False

    def _argument(self, tape: Tape) -> Steps[str | None]:
        yield from tape.space()
        key = yield from tape.run(NAME, MOST_NAME)
        yield from tape.space()
        if not key or (yield from tape.starts("=")) is None:
            return None
        yield from tape.space()
        text = yield from _expression(tape)
        value = None if text is None else _as_json(text.strip())
        return None if value is None else f"{to_json(key)}: {value}"

    def group(self, grammar: Grammar, tools: Collection[Tool], *, many: bool) -> str:
        """A list of calls."""
        call = grammar.rule(alternatives([_call_rule(grammar, tool) for tool in tools]))
        more = f' (", " {call})*' if many else ""
        return grammar.rule(f'"[" {call}{more} "]"')

    def free(self, grammar: Grammar, tools: Collection[Tool], *, many: bool) -> str:
        """A list, perhaps between the markers, or a text that begins like none."""
        calls = self.group(grammar, tools, many=many)
        begin, end = (grammar.literal(mark) for mark in self.marks)
        text = grammar.rule(grammar.terminal(r"/[^\[\s<](?s:.*)/"))
        return grammar.rule(alternatives([calls, f"{begin} {calls} {end}", f"({text})?"]))


def _expression(tape: Tape) -> Steps[str | None]:
    """Read an expression up to a comma or bracket that does not belong to it."""
    pieces: list[str] = []
    stack: list[str] = []
    while True:
        pieces.append((yield from tape.whole_run(_STOPS)))
        char = yield from tape.peek()
        if not stack and char in (",", ")"):
            return "".join(pieces)
        if char in _QUOTED:
            text = yield from _string(tape, char)
            if text is None:
                return None
            pieces.append(text)
            continue
        if char in _PAIRS and len(stack) < _DEEPEST:
            stack.append(_PAIRS[char])
        elif stack and char == stack[-1]:
            stack.pop()
        elif char != "," or not stack:
            return None
        yield from tape.starts(char)
        pieces.append(char)


def _string(tape: Tape, quote: str) -> Steps[str | None]:
    pieces = [quote]
    yield from tape.starts(quote)
    while True:
        pieces.append((yield from tape.whole_run(_QUOTED[quote])))
        char = yield from tape.peek()
        if not char:
            return None
        yield from tape.starts(char)
        pieces.append(char)
        if char == quote:
            return "".join(pieces)
        pieces.append((yield from tape.peek()))
        if pieces[-1]:
            yield from tape.starts(pieces[-1])


def _as_json(text: str) -> str | None:
    """A literal of Python, or JSON, as JSON."""
    try:
        return to_json(json.loads(text, parse_constant=_refuse))
    except (ValueError, RecursionError):
        pass
    for written in (text, text.replace("\n", "\\n")):  # a string may be broken into lines
        try:
            return json.dumps(ast.literal_eval(written), ensure_ascii=False, allow_nan=False)
        except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
            continue
    return None


def _refuse(constant: str) -> None:
    raise ValueError(constant)


def _call_rule(grammar: Grammar, tool: Tool) -> str:
    schema: Any = tool.parameters or {}
    required = schema.get("required", ())
    parts: list[str] = []
    optional: list[str] = []
    for name, inner in schema.get("properties", {}).items():
        one = grammar.rule(f"{quoted(name + '=')} {_value_rule(grammar, tool, inner)}")
        (parts if name in required else optional).append(one)
    body = ' ", " '.join(parts)
    if parts:
        body += "".join(f' (", " {one})?' for one in optional)
    elif optional:
        # Any of them may come first; each is followed by later ones only.
        chains, rest = [], ""
        for one in reversed(optional):
            chains.append(f"{one} {rest}")
            rest = grammar.rule(f'(", " {one})? {rest}')
        body = grammar.rule(alternatives(chains)) + "?"
    return grammar.rule(f'{quoted(tool.name + "(")} {body} ")"')


def _value_rule(grammar: Grammar, tool: Tool, schema: Any) -> str:  # noqa: ANN401 - JSON
    if isinstance(schema, dict) and schema.get("type") == "boolean" and "enum" not in schema:
        return '("True" | "False")'
    return grammar.schema(schema_of(tool, schema))
