"""Streaming text of one sequence, and stop strings found in it across token boundaries."""

from __future__ import annotations

from collections.abc import Sequence

from slipstream.runtime.sampling.params import SamplingParams
from slipstream.runtime.text.special_stops import special_stops
from slipstream.runtime.text.tokenizer import Tokenizer


class Detokenizer:
    """Text of one sequence, emitted as soon as it is certain.

    The joined results of ``append`` and ``finish`` equal ``tokenizer.decode`` of the same tokens
    up to a stop string, however the tokens were grouped. Text that may turn out to be the
    beginning of a stop string is held back; a special token that one names is found there also
    where it is not shown. With ``prompt`` the text is what follows the prompt,
    so a SentencePiece-like tokenizer keeps its leading space.

    The caller leaves out a final end-of-sequence or stop token, unless
    ``include_stop_str_in_output``. ``stopped`` and ``stop_reason`` (the stop string) tell that a
    stop string ended the text; ``num_tokens`` counts the tokens taken until then.
    """

    __slots__ = (
        "_exempt",
        "_keep",
        "_matcher",
        "_specials",
        "_stream",
        "num_tokens",
        "stop_reason",
    )

    def __init__(
        self, tokenizer: Tokenizer, params: SamplingParams, prompt: Sequence[int] = ()
    ) -> None:
        """Start with no text."""
        self._stream = tokenizer.text_stream(
            skip_special_tokens=params.skip_special_tokens,
            shown_special_tokens=params.shown_special_tokens,
            prompt=prompt,
        )
        stops = tuple(params.stop)
        self._specials = special_stops(
            tokenizer,
            stops,
            skipped=params.skip_special_tokens,
            shown=tuple(params.shown_special_tokens),
        )
        self._keep = params.include_stop_str_in_output
        self._matcher = StopMatcher([*self._specials.stops], keep=self._keep) if stops else None
        self._exempt = params.min_tokens
        self.num_tokens = 0
        self.stop_reason: str | None = None

    @property
    def stopped(self) -> bool:
        """Whether a stop string was found; later tokens are ignored."""
        return self.stop_reason is not None

    def append(self, token_ids: Sequence[int]) -> str:
        """Take the next tokens and return the new text that is safe to show."""
        if self._matcher is None:
            self.num_tokens += len(token_ids)
            return "".join(map(self._stream.push, token_ids))
        increment = ""
        for token_id in token_ids:
            if self.stop_reason is not None:
                break
            self.num_tokens += 1
            mark = self._specials.marks.get(token_id, "")
            increment += self._search(self._stream.push(token_id) + mark)
        return increment

    def finish(self) -> str:
        """Return the text still held back; nothing more follows."""
        if self.stop_reason is not None:
            return ""
        increment = self._search(self._stream.flush())
        if self._matcher is not None and self.stop_reason is None:
            increment += self._specials.shown(self._matcher.release())
        return increment

    def _search(self, text: str) -> str:
        if self._matcher is None or not text:
            return text
        if self.num_tokens > self._exempt:
            text = self._matcher.feed(text)
        found = self._matcher.matched
        if found is None:
            return self._specials.shown(text)
        self.stop_reason = self._specials.stops[found]
        return self._specials.shown_with(text, found) if self._keep else self._specials.shown(text)


class StopMatcher:
    """Finds the stop string that completes first in a text that arrives in pieces."""

    __slots__ = ("_first", "_held", "_inner", "_keep", "_longest", "_stops", "matched")

    def __init__(self, stops: Sequence[str], *, keep: bool) -> None:
        """``keep`` leaves the stop string in the text."""
        self._stops = stops
        self._keep = keep
        self._held = ""
        self._inner = {char for stop in stops for char in stop[:-1]}
        self._first = {stop[0] for stop in stops}
        self._longest = max(map(len, stops))
        self.matched: str | None = None

    def feed(self, text: str) -> str:
        """Take a piece and return the text that no stop string can claim any more."""
        held = len(self._held)
        text = self._held + text
        # Of several that complete at the same character the longest counts. None lies within what
        # was held.
        found = [
            (at + len(s), -len(s), s)
            for s in self._stops
            if (at := text.find(s, max(0, held - len(s) + 1))) >= 0
        ]
        if found:
            end, negative_length, self.matched = min(found)
            self._held = ""
            return text[:end] if self._keep else text[: end + negative_length]
        cut = len(text) - self._possible_beginning(text)
        self._held = text[cut:]
        return text[:cut]

    def release(self) -> str:
        """Return what was held back, at the end of the text."""
        held, self._held = self._held, ""
        return held

    def _possible_beginning(self, text: str) -> int:
        """Length of the longest end of ``text`` with which a stop string begins."""
        if text[-1] not in self._inner:
            return 0
        # What is passed over here is let go and never looked at again.
        for at in range(max(0, len(text) - self._longest + 1), len(text)):
            if text[at] in self._first:
                end = text[at:]
                if any(stop.startswith(end) for stop in self._stops):
                    return len(end)
        return 0
