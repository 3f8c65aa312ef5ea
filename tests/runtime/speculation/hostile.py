"""A proposer that knows the answers, and gives them in every wrong way as well."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from unittest.mock import patch

from slipstream.runtime.loaded_engine import LoadedEngine
from slipstream.runtime.speculation import proposer
from slipstream.runtime.speculation.proposer import Context

NAME = "hostile"


class HostileProposer:
    """Right up to some token, then wrong; beyond the vocabulary, too long, too short, or nothing.

    ``texts`` are whole sequences; where a context begins none, the next token counts on from the
    last, as the counting model does.
    """

    texts: Sequence[Sequence[int]] = ()

    def __init__(self, engine: LoadedEngine) -> None:
        self._vocab_size = engine.vocab_size

    def propose(self, contexts: Sequence[Context], most: int) -> list[list[int]]:
        guesses = [self._guess(context.tokens, most) for context in contexts]
        # At times it forgets those at the end.
        return guesses[: -(sum(len(context.tokens) for context in contexts) % 7 == 0) or None]

    def finish(self, context: Context) -> None:
        assert 0 < context.prompt_len <= len(context.tokens)

    def _guess(self, tokens: Sequence[int], most: int) -> list[int]:
        size, kind = len(tokens), (len(tokens) * 7 + tokens[-1]) % 6
        known = next((t[size:] for t in self.texts if list(t[:size]) == list(tokens)), None)
        right = list(known or ((tokens[-1] + 1 + i) % self._vocab_size for i in range(most + 3)))
        if kind == 0:
            return right  # perhaps too long
        if kind == 1:
            return []
        if kind == 2:
            return [*right[: size % 3], -1, *right]
        if kind == 3:
            return [*right[: size % 3], self._vocab_size + 5]
        if kind == 4:
            return [(token + 1) % self._vocab_size for token in right]
        return [*right[: size % 4], (size * 5) % self._vocab_size, *right[size % 4 + 1 :]]


@contextmanager
def hostile(texts: Sequence[Sequence[int]] = ()) -> Iterator[None]:
    """Engines that are loaded meanwhile know the proposer by its name."""
    place = f"{__name__}:{HostileProposer.__name__}"
    with (
        patch.dict(proposer._PROPOSERS, {NAME: place}),
        patch.object(HostileProposer, "texts", texts),
    ):
        yield
