"""Styles Markdown as it streams, without ever redrawing: the text stays as it came."""

from __future__ import annotations

from collections.abc import Iterator

Segment = tuple[str, str]  # text and a rich style

_CODE, _BOLD, _HEADING = "cyan", "bold", "bold"
_FENCE = "```"


class MarkdownStream:
    """Splits increments of text into styled segments whose texts join to the input.

    Knows code fences, headings, `code` and **bold**. Only characters that could begin a marker
    (at most the first three of a line, or one asterisk) are held back until the next increment.
    """

    def __init__(self) -> None:
        self._held = ""
        self._line_start = True
        self._fenced = False
        self._style = ""

    def feed(self, text: str) -> Iterator[Segment]:
        """Segments for more text."""
        self._held += text
        while self._held and not self._undecided():
            yield self._next()

    def finish(self) -> Iterator[Segment]:
        """What was held back."""
        if self._held:
            yield self._held, self._style
        self._held = ""

    def _undecided(self) -> bool:
        held = self._held
        if self._line_start and len(held) < len(_FENCE) and _FENCE.startswith(held):
            return True
        return held == "*" and not self._fenced

    def _next(self) -> Segment:
        if self._line_start:
            self._line_start = False
            if self._held.startswith(_FENCE):
                return self._fence()
            if self._held.startswith("#") and not self._fenced:
                self._style = _HEADING
        return self._newline() or self._inline()

    def _fence(self) -> Segment:
        self._fenced = not self._fenced
        self._style = _CODE if self._fenced else ""
        return self._take(len(_FENCE)), _CODE

    def _newline(self) -> Segment | None:
        if not self._held.startswith("\n"):
            return None
        self._line_start = True
        if not self._fenced:  # no other style goes beyond its line
            self._style = ""
        return self._take(1), ""

    def _inline(self) -> Segment:
        if not self._fenced:
            for marker, style in (("`", _CODE), ("**", _BOLD)):
                if self._held.startswith(marker) and self._style in ("", style):
                    self._style = "" if self._style else style
                    return self._take(len(marker)), style
        length = 1
        while length < len(self._held) and self._held[length] not in "\n`*":
            length += 1
        return self._take(length), self._style

    def _take(self, length: int) -> str:
        text, self._held = self._held[:length], self._held[length:]
        return text
