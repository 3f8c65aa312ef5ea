"""Text that arrives in pieces, read as if it were there already.

What reads it is a generator: it yields events, and None where it must wait for more text. So a
parser is plain code, and how the text was cut cannot change what it decides.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator
from typing import TypeVar

from slipstream.runtime.chat.events import ContentText, Event, ReasoningText
from slipstream.runtime.chat.json_scanner import JsonScanner

T = TypeVar("T")
Steps = Generator[Event | None, None, T]

_MOST_SPACE = 64  # between the parts of a call's head
_WINDOW = 1 << 14  # how much of the text is copied at once
_EATEN = 8  # characters of space that belong to a marker which follows them
_SPACE = re.compile(r"\s*")


class Markers:
    """Texts that end free text, with the space before them unless ``exact``.

    None of them may begin another.
    """

    __slots__ = ("_exact", "_first", "_longest", "_pattern", "_texts")

    def __init__(self, *texts: str, exact: bool = False) -> None:
        self._texts = texts
        self._exact = exact
        self._first = {text[0] for text in texts}
        self._longest = max(map(len, texts), default=0)
        self._pattern = re.compile("|".join(map(re.escape, texts)) or r"(?!)")

    def find(self, text: str, at: int) -> tuple[int, int] | None:
        """Where the first lies."""
        found = self._pattern.search(text, at)
        return None if found is None else (self._with_space(text, at, found.start()), found.end())

    def held(self, text: str, at: int) -> int:
        """From where on ``text`` may be the beginning of one."""
        start = len(text)
        for begin in range(max(at, len(text) - self._longest + 1), len(text)):
            if text[begin] in self._first and self._may_be(text[begin:]):
                start = begin
                break
        return self._with_space(text, at, start) if self._texts else start

    def _may_be(self, end: str) -> bool:
        return any(text.startswith(end) for text in self._texts)

    def _with_space(self, text: str, at: int, start: int) -> int:
        if self._exact:
            return start
        return max(at, start - _EATEN) + len(text[max(at, start - _EATEN) : start].rstrip())


class Tape:
    """The text, and how far it has been read.

    ``recorded`` is what was read since it was last emptied: that of a call which turns out to be
    none.
    """

    __slots__ = ("_at", "_recorded", "_text", "ended")

    def __init__(self) -> None:
        """Begin with no text."""
        self._text = ""
        self._at = 0
        self._recorded: list[str] = []
        self.ended = False

    def feed(self, piece: str) -> None:
        """Append to the text."""
        self._text = self._text[self._at :] + piece
        self._at = 0

    def record(self, *before: str) -> None:
        """Forget what was recorded, and begin with ``before``."""
        self._recorded = list(before)

    def recorded(self) -> str:
        """All that was read since."""
        return "".join(self._recorded)

    def unread(self, text: str) -> None:
        """Put back what was read last."""
        if self._at >= len(text):
            self._at -= len(text)
        else:
            self._text, self._at = text + self._text[self._at :], 0

    def until(self, markers: Markers, event: Callable[[str], Event]) -> Steps[str | None]:
        """Yield text up to a marker, read that and return it; None at the end of the text."""
        while True:
            piece, found = self._free(markers)
            self.record()
            if piece:
                yield event(piece)
            if found is not None or self.ended:
                return found
            yield None

    def text_until(self, markers: Markers) -> Steps[str | None]:
        """Read a marker and return the text before it; None if there is none."""
        pieces = []
        while True:
            piece, found = self._free(markers)
            pieces.append(piece)
            if found is not None:
                return "".join(pieces)
            if self.ended:
                return None
            yield None

    def _free(self, markers: Markers) -> tuple[str, str | None]:
        """Read what is there before a marker, and the marker."""
        found = markers.find(self._text, self._at)
        if found is not None:
            return self._take(found[0]), self._take(found[1])
        cut = len(self._text) if self.ended else markers.held(self._text, self._at)
        return self._take(cut), None

    def starts(self, *options: str) -> Steps[str | None]:
        """Read the longest of ``options`` with which the rest begins."""
        longest = max(map(len, options))
        while True:
            rest = self._text[self._at : self._at + longest]
            waits = any(len(each) > len(rest) and each.startswith(rest) for each in options)
            if not waits or self.ended:
                break
            yield None
        hits = [each for each in options if rest.startswith(each)]
        return self._take(self._at + max(map(len, hits))) if hits else None

    def peek(self) -> Steps[str]:
        """The next character, unread; none at the end."""
        while self._at == len(self._text) and not self.ended:
            yield None
        return self._text[self._at : self._at + 1]

    def run(self, pattern: re.Pattern[str], most: int = _MOST_SPACE) -> Steps[str]:
        """Read characters that match ``pattern`` (any number of one class), at most so many."""
        pieces, left = [], most
        while left:
            found = pattern.match(self._text, self._at, self._at + left)
            piece = self._take(found.end() if found else self._at)
            pieces.append(piece)
            left -= len(piece)
            if self._at < len(self._text) or self.ended:
                break
            if left:
                yield None
        return "".join(pieces)

    def whole_run(self, pattern: re.Pattern[str]) -> Steps[str]:
        """The same, of any length."""
        pieces = []
        while piece := (yield from self.run(pattern)):
            pieces.append(piece)
        return "".join(pieces)

    def space(self) -> Steps[None]:
        """Pass over some space."""
        yield from self.run(_SPACE)

    def all_space(self) -> Steps[None]:
        """Pass over any amount of space."""
        while (yield from self.run(_SPACE)):
            self.record()

    def scan(self, scanner: JsonScanner, most: int = _WINDOW) -> Steps[str]:
        """Read what is there of a JSON value, after waiting for some, but at most so many
        characters; nothing where it ends."""
        yield from self.peek()
        text = self._text[self._at : self._at + min(most, _WINDOW)]
        piece, end = scanner.scan(text, 0)
        self._take(self._at + end)
        if self.ended and self._at == len(self._text):
            scanner.end()
        return piece

    def value(self, most: int) -> Steps[str | None]:
        """Read a JSON value of at most ``most`` characters; None if it is none."""
        scanner = JsonScanner()
        text = yield from self.rest_of_value(scanner, most)
        return text if scanner.done else None

    def rest_of_value(self, scanner: JsonScanner, most: int) -> Steps[str]:
        """Read what ``scanner`` takes."""
        pieces, most = [], most + scanner.taken
        while scanner.taken < most and not scanner.done and not scanner.failed:
            piece = yield from self.scan(scanner, most - scanner.taken)
            pieces.append(piece)
            if not piece:
                break
        return "".join(pieces)

    def _take(self, end: int) -> str:
        piece = self._text[self._at : end]
        self._at = end
        if piece:
            self._recorded.append(piece)
        return piece


class StepParser:
    """An ``OutputParser`` that runs a generator."""

    __slots__ = ("_steps", "_tape")

    def __init__(self, steps: Callable[[Tape], Steps[None]]) -> None:
        """``steps`` reads the tape to its end."""
        self._tape = Tape()
        self._steps = steps(self._tape)

    def push(self, text: str) -> list[Event]:
        """Take more text and return what is now certain."""
        self._tape.feed(text)
        return self._advance()

    def finish(self) -> list[Event]:
        """Return what was held back."""
        self._tape.ended = True
        return self._advance()

    def _advance(self) -> list[Event]:
        events: list[Event] = []
        for event in self._steps:
            if event is None:
                break
            _append(events, event)
        return events


def _append(events: list[Event], event: Event) -> None:
    """Join neighbours that are text of one kind."""
    last = events[-1] if events else None
    if isinstance(event, ContentText) and isinstance(last, ContentText):
        events[-1] = ContentText(last.text + event.text)
    elif isinstance(event, ReasoningText) and isinstance(last, ReasoningText):
        events[-1] = ReasoningText(last.text + event.text)
    elif not isinstance(event, ContentText | ReasoningText) or event.text:
        events.append(event)
