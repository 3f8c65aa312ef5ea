"""Where tokens begin in a text."""

from __future__ import annotations

from dataclasses import dataclass

from slipstream.runtime.text.stream import TextStream


@dataclass(slots=True)
class TextOffsets:
    """Tells where each token of a sequence begins, in characters of a text.

    ``stream`` makes the text, which begins at ``start``. The parts of a character begin where it
    does; a token that adds nothing stands where the text before it ends.
    """

    stream: TextStream
    start: int = 0
    _last: int = 0

    def take(self, token_id: int) -> int:
        """Where the next token begins."""
        self._last = max(self._last, self.start + self.stream.before(token_id))
        self.start += len(self.stream.push(token_id))
        return self._last
