"""Calls with a tag an argument, whose values are text or JSON by the tool's schema: Qwen3-Coder,
GLM."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from slipstream.runtime.chat.calls import MOST_NAME, Calls, openai_id, to_json
from slipstream.runtime.chat.events import ContentText
from slipstream.runtime.chat.grammar import Grammar, alternatives, quoted
from slipstream.runtime.chat.held_text import conditions
from slipstream.runtime.chat.json_calls import free_calls
from slipstream.runtime.chat.options import Tool
from slipstream.runtime.chat.tape import Markers, Steps, Tape

_NAME = re.compile(r"[^\s<>=]*")
_LITERALS = {"True": "true", "False": "false", "None": "null"}


@dataclass(frozen=True, slots=True)
class TaggedCalls:
    """A marker, ``name`` and the name, ``after_name``; for each argument ``key``, its name,
    ``value``, text and ``value_end``; then ``close``.

    Each of them is written with the newlines that the model writes; those around a marker are read
    whether they are there or not, except those of a value: one at each end, if ``framed``.
    """

    begins: tuple[str, ...]
    name: str
    after_name: str
    key: str
    value: tuple[str, ...]
    value_end: str
    close: tuple[str, ...]
    written: tuple[str, str, str, str]  # before a name, after it, between arguments, at the end
    framed: bool = False
    new_id: Callable[[], str] = openai_id

    @property
    def marks(self) -> tuple[str, ...]:
        """All its markers that may be special tokens."""
        return (*self.begins, self.key, *self.value, self.value_end, *self.close)

    def opening(self, tape: Tape, calls: Calls) -> Steps[None]:
        """There are none without a marker."""
        yield from ()

    def read(self, tape: Tape, calls: Calls) -> Steps[None]:
        """Read one call."""
        yield from tape.space()
        begun = self.name in tape.recorded() or (yield from tape.starts(self.name))
        name = (yield from tape.run(_NAME, MOST_NAME)) if begun else ""
        yield from tape.space()
        if self.after_name and (yield from tape.starts(self.after_name)) is None:
            name = ""
        if not name or not (yield from self._follows(tape)):
            yield ContentText(tape.recorded())
            return
        yield calls.begin(name)
        yield from self._arguments(tape, calls, _properties(calls.tools.get(name)))

    def _follows(self, tape: Tape) -> Steps[bool]:
        """Whether what follows a name can belong to a call."""
        yield from tape.space()
        found = yield from tape.starts(self.key, *self.close)
        if found is None:
            return False
        tape.unread(found)
        return True

    def _arguments(self, tape: Tape, calls: Calls, properties: Mapping[str, Any]) -> Steps[None]:
        """Tell arguments as an object, which is closed only where the call is."""
        lead = "{"
        while True:
            tape.record()
            yield from tape.space()
            if (yield from tape.starts(self.key)) is None:
                break
            name = yield from tape.run(_NAME, MOST_NAME)
            if not name or not (yield from self._begun(tape)):
                break
            head = f"{lead}{to_json(name)}: "
            if not (yield from self._value(tape, calls, head, properties.get(name))):
                break
            lead = ", "
        if tape.recorded().strip() or not (yield from self._closed(tape)):
            yield ContentText(tape.recorded())
            tape.record()
        else:
            yield calls.arguments("{}" if lead == "{" else "}")

    def _begun(self, tape: Tape) -> Steps[bool]:
        for part in self.value:
            yield from tape.space()
            if (yield from tape.starts(part)) is None:
                return False
        return True

    def _closed(self, tape: Tape) -> Steps[bool]:
        closed = False
        for close in self.close:
            if (yield from tape.starts(close)):
                closed = True
                yield from tape.all_space()
        return closed

    def _value(self, tape: Tape, calls: Calls, head: str, schema: Any) -> Steps[bool]:  # noqa: ANN401
        """Tell one argument, text as it comes; False: the text ends within it."""
        if self.framed:
            yield from tape.starts("\n")
        ends = [self.value_end] if not self.framed else ["\n" + self.value_end, self.value_end]
        markers = Markers(*ends, exact=True)
        if _is_text(schema):
            tape.record()
            yield calls.arguments(head + '"')
            found = yield from tape.until(markers, lambda text: calls.arguments(_inner(text)))
            if found is not None:
                yield calls.arguments('"')
            return found is not None
        text = yield from tape.text_until(markers)
        if text is not None:
            yield calls.arguments(head + _as_json(text))
        return text is not None

    def group(self, grammar: Grammar, tools: Collection[Tool], *, many: bool) -> str:
        """Calls with their markers."""
        one = self._call(grammar, tools, grammar.literal(self.begins[0]))
        return grammar.rule(f'{one} ("\\n" {one})*') if many else one

    def free(self, grammar: Grammar, tools: Collection[Tool], *, many: bool) -> str:
        """Text in which each marker begins a call."""
        one = self._call(grammar, tools, grammar.until(self.begins[0]))
        return free_calls(grammar, one, self.begins, many=many)

    def _call(self, grammar: Grammar, tools: Collection[Tool], begin: str) -> str:
        before, after, _, end = self.written
        each = [
            f"{quoted(before + tool.name + after)} {self._parameters(grammar, tool)}"
            for tool in tools
        ]
        return grammar.rule(f"{begin} {grammar.rule(alternatives(each))} {grammar.literal(end)}")

    def _parameters(self, grammar: Grammar, tool: Tool) -> str:
        required = (tool.parameters or {}).get("required", ())
        parts = []
        for name, schema in _properties(tool).items():
            key, value = grammar.literal(self.key), grammar.literal("\n".join(self.value))
            one = grammar.rule(f"{key} {quoted(name)} {value} {self._held(grammar, tool, schema)}")
            parts.append(one if name in required else f"{one}?")
        return " ".join(parts)

    def _held(self, grammar: Grammar, tool: Tool, schema: Any) -> str:  # noqa: ANN401 - JSON
        frame, after = ("\n" if self.framed else ""), self.written[2]
        lead, end = grammar.literal(frame), grammar.literal(frame + self.value_end + after)
        if not _is_text(schema):
            return f"{lead} {grammar.schema(schema_of(tool, schema))} {end}"
        options = schema.get("enum", [schema["const"]] if "const" in schema else None)
        if options:
            return f"{lead} {grammar.rule(alternatives([quoted(each) for each in options]))} {end}"
        tail = grammar.literal(after)
        held = conditions(schema, strict=tool.strict)
        return f"{lead} {grammar.until(frame + self.value_end, held=held)} {tail}"


def schema_of(tool: Tool, schema: Any) -> Any:  # noqa: ANN401 - JSON
    """The schema of one argument, with what it may refer to."""
    given = tool.parameters or {}
    shared = {key: given[key] for key in ("$defs", "definitions") if key in given}
    options = {"x-guidance": given.get("x-guidance", {})}
    return {**shared, **schema, **options} if isinstance(schema, dict) else schema


def _properties(tool: Tool | None) -> Mapping[str, Any]:
    properties = (tool.parameters or {}).get("properties") if tool is not None else None
    return properties if isinstance(properties, Mapping) else {}


def _is_text(schema: Any) -> bool:  # noqa: ANN401 - JSON
    """Whether a value of this schema is written as it is, not as JSON."""
    if not isinstance(schema, Mapping):
        return False
    if schema.get("type") == "string":
        return True
    options = schema.get("enum", [schema.get("const")])
    texts = isinstance(options, list) and options and all(isinstance(x, str) for x in options)
    return "type" not in schema and bool(texts)


def _inner(text: str) -> str:
    return to_json(text)[1:-1]


def _as_json(text: str) -> str:
    """A value as JSON: itself, what Python would write so, or a text."""
    stripped = text.strip()
    try:
        json.loads(stripped, parse_constant=_refuse)
        return stripped
    except (ValueError, RecursionError):
        return _from_python(stripped) or to_json(text)


def _from_python(text: str) -> str | None:
    """What is written in Python's way as JSON."""
    if text in _LITERALS:
        return _LITERALS[text]
    if text[:1] not in ("[", "{"):
        return None
    try:
        return json.dumps(ast.literal_eval(text), ensure_ascii=False, allow_nan=False)
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        return None


def _refuse(constant: str) -> None:
    raise ValueError(constant)
