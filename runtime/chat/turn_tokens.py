"""Which tokens of a completion are thoughts, and which are said."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, repeat

from slipstream.runtime.chat.events import ContentText, Event, ReasoningText
from slipstream.runtime.engine.step import TokenLogprobs
from slipstream.runtime.request import CompletionOutput
from slipstream.runtime.text.offsets import TextOffsets

# Where a token begins in the text, and its score.
_Token = tuple[int, TokenLogprobs | None]


@dataclass(slots=True)
class TurnTokens:
    """Tells tokens apart by the events that their text became.

    The text is to be parsed in the pieces that ``cut`` gives, so that what is told of a token does
    not depend on how the text came. Marks around thoughts and calls are neither.
    """

    offsets: TextOffsets
    reasoning: int = 0  # tokens that are thoughts
    content: list[TokenLogprobs] = field(default_factory=list)  # scores of those that are said
    _ahead: deque[_Token] = field(default_factory=deque)
    _end: int = 0  # of the text that was parsed
    _held: str = ""  # the end of it, of which no event has told
    _held_tokens: list[_Token] = field(default_factory=list)
    _kind: type[Event] = ContentText

    def add(self, completion: CompletionOutput) -> None:
        """Take the tokens of a completion, or those that are new."""
        entries: Sequence[TokenLogprobs] | None = completion.logprobs
        scores = repeat(None) if entries is None else chain(entries, repeat(None))
        for token_id, entry in zip(completion.token_ids, scores, strict=False):
            self._ahead.append((self.offsets.take(token_id), entry))

    def cut(self, text: str) -> Iterator[str]:
        """The next text, token by token."""
        begin, end = self._end, self._end + len(text)
        for place, _ in list(self._ahead):
            if place >= end:
                break
            if place > begin:
                yield text[begin - end : place - end]
                begin = place
        if begin < end:
            yield text[begin - end :]

    def parsed(self, piece: str, events: Sequence[Event]) -> None:
        """Hear what a piece became."""
        self._end += len(piece)
        self._held += piece
        while self._ahead and self._ahead[0][0] < self._end:
            self._held_tokens.append(self._ahead.popleft())
        if not events:
            return
        cursor = 0
        for event in events:
            self._kind = type(event)
            if isinstance(event, ContentText | ReasoningText):
                cursor = self._told(event.text, cursor)
        if not isinstance(events[-1], ContentText | ReasoningText):
            cursor = len(self._held)
        self._let_go(cursor)

    def finish(self, events: Sequence[Event]) -> None:
        """Hear what was held back, at the end: what has no text goes with what is told last."""
        self.parsed("", events)
        self._count([*self._held_tokens, *self._ahead])

    def _told(self, text: str, cursor: int) -> int:
        """Count the tokens of a text that stands in what was held back; return where it ends."""
        at = self._held.find(text, cursor)
        if at < 0:
            return cursor
        start = self._end - len(self._held) + at
        self._count([t for t in self._held_tokens if start <= t[0] < start + len(text)])
        return at + len(text)

    def _let_go(self, cursor: int) -> None:
        self._held = self._held[cursor:]
        start = self._end - len(self._held)
        self._held_tokens = [token for token in self._held_tokens if token[0] >= start]

    def _count(self, tokens: Sequence[_Token]) -> None:
        if self._kind is ReasoningText:
            self.reasoning += len(tokens)
        elif self._kind is ContentText:
            self.content += [entry for _, entry in tokens if entry is not None]
