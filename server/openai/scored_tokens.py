"""Tokens of a completion with their scores and their places in its text.

In a stream text is held back while it is uncertain: a part of a character, or what may be the
beginning of a stop string. Its tokens wait with it, so that what a stream tells of them is what an
answer in one piece tells.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from slipstream.runtime.text.offsets import TextOffsets
from slipstream.server.core.logprobs import TokenTexts
from slipstream.server.openai.logprobs import Scores, completion_logprobs


@dataclass(slots=True)
class ScoredTokens:
    """The tokens of one choice that were sampled, or scored, and not told yet."""

    texts: TokenTexts
    offsets: TextOffsets
    _told: int = 0  # characters of the text
    _token_ids: list[int] = field(default_factory=list)
    _entries: Scores = ()
    _places: list[int] = field(default_factory=list)

    def add(self, token_ids: Sequence[int], entries: Scores) -> None:
        """Append tokens that were sampled."""
        self.add_at([self.offsets.take(token) for token in token_ids], token_ids, entries)

    def add_at(self, offsets: Iterable[int], token_ids: Sequence[int], entries: Scores) -> None:
        """Append tokens whose places are known."""
        self._places += offsets
        self._token_ids += token_ids
        self._entries = [*self._entries, *entries]

    def tell(self, text: str, *, last: bool) -> dict[str, Any] | None:
        """The ``logprobs`` of the tokens that begin in the text up to ``text``, which is what comes
        next of it; of all if that is the ``last``. None if there is none."""
        self._told += len(text)
        count = len(self._places)
        if not last:
            count = sum(place < self._told for place in self._places)
        if not count and not last:
            return None
        told, self._token_ids = self._token_ids[:count], self._token_ids[count:]
        entries, self._entries = self._entries[:count], self._entries[count:]
        places, self._places = self._places[:count], self._places[count:]
        # What a stop string has cut off begins where the text ends.
        places = [min(place, self._told) for place in places]
        return completion_logprobs(told, entries, places, self.texts)
