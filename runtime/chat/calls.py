"""What parsers of calls share: who is called, and calls that are written as JSON objects."""

from __future__ import annotations

import json
import re
import secrets
import string
from collections.abc import Callable, Collection
from typing import Any, Protocol

from slipstream.runtime.chat.events import CallArguments, CallBegin, ContentText
from slipstream.runtime.chat.grammar import Grammar
from slipstream.runtime.chat.json_scanner import JsonScanner
from slipstream.runtime.chat.options import Tool
from slipstream.runtime.chat.tape import Steps, Tape

MOST_NAME = 256
MOST_HELD = 1 << 20  # characters of a call that cannot be told before its end
NAME = re.compile(r"[\w.-]*")
_ALPHANUMERIC = string.ascii_letters + string.digits
_KEYS = frozenset(("type", "function", "id", "arguments", "parameters"))


def openai_id() -> str:
    """An id as OpenAI's."""
    return f"call_{secrets.token_hex(12)}"


def mistral_id() -> str:
    """Nine letters and digits, which is all that Mistral's templates take."""
    return "".join(secrets.choice(_ALPHANUMERIC) for _ in range(9))


class Calls:
    """The calls of one turn, as they are told."""

    __slots__ = ("_new_id", "index", "tools")

    def __init__(self, tools: Collection[Tool], new_id: Callable[[], str] = openai_id) -> None:
        self.tools = {tool.name: tool for tool in tools}
        self.index = -1
        self._new_id = new_id

    def begin(self, name: str) -> CallBegin:
        """Tell the next call."""
        self.index += 1
        return CallBegin(self.index, self._new_id(), name)

    def arguments(self, text: str) -> CallArguments:
        """Tell more of it."""
        return CallArguments(self.index, text)


class CallFormat(Protocol):
    """How a family writes calls."""

    @property
    def new_id(self) -> Callable[[], str]:
        """Makes an id of a call."""
        ...

    @property
    def begins(self) -> tuple[str, ...]:
        """Markers in free text after which calls come."""
        ...

    @property
    def marks(self) -> tuple[str, ...]:
        """All its markers that may be special tokens."""
        ...

    def opening(self, tape: Tape, calls: Calls) -> Steps[None]:
        """Read calls that stand at the very beginning of the answer without a marker."""
        ...

    def read(self, tape: Tape, calls: Calls) -> Steps[None]:
        """Read calls after a marker, which ``tape`` has recorded; what is none is content."""
        ...

    def group(self, grammar: Grammar, tools: Collection[Tool], *, many: bool) -> str:
        """The rule of calls of these tools with their markers: one, or any number but none."""
        ...

    def free(self, grammar: Grammar, tools: Collection[Tool], *, many: bool) -> str:
        """The rule of an answer in which such calls may stand."""
        ...


def read_object(tape: Tape, calls: Calls, *, known: bool = False) -> Steps[bool]:
    """Read ``{"name": ..., "arguments": {...}}`` and tell it; False: it is none, and what was read
    of it is on the record.

    The arguments are told while they come if they come last; else when the object is whole. A call
    that was begun stays begun: if it breaks off, so do its arguments, and what cannot belong to
    them comes as content. ``known``: only calls of the tools given are any.
    """
    start = len(tape.recorded())
    if (yield from tape.starts("{")) is None:
        return False
    yield from tape.space()
    key = yield from _string(tape)
    if key == "name":
        return (yield from _after_name(tape, calls, start, known=known))
    if key in _KEYS:
        return (yield from _whole(tape, calls, start, known=known))
    return False


def _after_name(tape: Tape, calls: Calls, start: int, *, known: bool) -> Steps[bool]:
    if not (yield from _colon(tape)):
        return False
    name = yield from _string(tape)
    if not name or (known and name not in calls.tools):
        return False
    yield from tape.space()
    after = yield from tape.starts(",", "}")
    if after == "}":
        yield calls.begin(name)
        yield calls.arguments("{}")
        return True
    if after is None:
        return False
    yield from tape.space()
    key = yield from _string(tape)
    if key is None:
        return False
    follows = key in ("arguments", "parameters") and (yield from _colon(tape))
    if not follows or (yield from tape.peek()) != "{":
        return (yield from _whole(tape, calls, start, known=known))
    yield calls.begin(name)
    if (yield from stream_value(tape, calls)):
        yield from _rest_of_object(tape)
    return True


def stream_value(tape: Tape, calls: Calls) -> Steps[bool]:
    """Tell a JSON value as arguments while it comes; whether it is whole."""
    scanner = JsonScanner()
    while not scanner.done and not scanner.failed:
        tape.record()
        piece = yield from tape.scan(scanner)
        if not piece:
            break
        yield calls.arguments(piece)
    tape.record()
    return scanner.done


def _rest_of_object(tape: Tape) -> Steps[None]:
    """Pass over what follows the arguments in their object."""
    yield from tape.space()
    while (end := (yield from tape.starts("}", ","))) == ",":
        yield from tape.space()
        if (yield from _string(tape)) is None or not (yield from _colon(tape)):
            break
        if (yield from tape.value(MOST_NAME)) is None:
            break
        yield from tape.space()
    if end != "}":
        yield ContentText(tape.recorded())
    tape.record()


def _whole(tape: Tape, calls: Calls, start: int, *, known: bool) -> Steps[bool]:
    """Tell a call when its object is whole."""
    scanner = JsonScanner()
    head, _ = scanner.scan(tape.recorded()[start:], 0)
    rest = yield from tape.rest_of_value(scanner, MOST_HELD)
    named = _named(head + rest) if scanner.done else None
    if named is None or (known and named[0] not in calls.tools):
        return False
    yield calls.begin(named[0])
    yield calls.arguments(named[1])
    tape.record()
    return True


def _named(text: str) -> tuple[str, str] | None:
    """Name and arguments of a call, as models write it who do not keep to the order."""
    try:
        call = json.loads(text)
        function = call.get("function")
        if isinstance(function, dict):
            call = function
        name = call.get("name", function)
        arguments = call.get("arguments", call.get("parameters"))
        given = json.loads(arguments) if isinstance(arguments, str) else arguments
        if not isinstance(name, str) or not name or not isinstance(given, dict | None):
            return None
        return name, arguments if isinstance(arguments, str) else to_json(given or {})
    except (ValueError, RecursionError):
        return None


def to_json(value: Any) -> str:  # noqa: ANN401 - JSON
    """As most models write it."""
    return json.dumps(value, ensure_ascii=False)


def _string(tape: Tape) -> Steps[str | None]:
    """A short JSON string."""
    if (yield from tape.peek()) != '"':
        return None
    text = yield from tape.value(MOST_NAME)
    if text is None:
        return None
    value = json.loads(text)
    assert isinstance(value, str)
    return value


def _colon(tape: Tape) -> Steps[bool]:
    yield from tape.space()
    colon = yield from tape.starts(":")
    yield from tape.space()
    return colon is not None
