"""Guesses that a sequence repeats itself, or what the engine has said before."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from slipstream.runtime.speculation.lookup import RunIndex, longest
from slipstream.runtime.speculation.ngram import NgramProposer
from slipstream.runtime.speculation.proposer import Context

if TYPE_CHECKING:
    from slipstream.runtime.loaded_engine import LoadedEngine

# Tokens that are kept of outputs; each takes some 150 bytes.
_KEPT = 1 << 18
# Between outputs; no token is that.
_END = -1
# Shorter runs say little about what others said.
_SHORTEST = 3


class SuffixProposer:
    """Looks up the last tokens of a sequence in its own text and in outputs that have ended, and
    takes the guess that more tokens agree with.

    It keeps the latest outputs, ``_KEPT`` tokens of them at most, apart for each namespace: how
    fast an answer comes tells nobody what was said in another one.
    """

    def __init__(self, engine: LoadedEngine) -> None:
        """Runs have ``prompt_lookup_min`` tokens and more, 3 and more in other outputs."""
        self._own = NgramProposer(engine)
        self._earlier = EarlierOutputs(
            max(_SHORTEST, engine.config.prompt_lookup_min), engine.config.prompt_lookup_max, _KEPT
        )

    def propose(self, contexts: Sequence[Context], most: int) -> list[list[int]]:
        """What followed the longest run that is the last one of a sequence; its own if equal."""
        return [self._guess(context, most) for context in contexts]

    def finish(self, context: Context) -> None:
        """Keep what a sequence has said."""
        self._earlier.add(context.namespace, context.tokens[context.prompt_len :])

    def _guess(self, context: Context, most: int) -> list[int]:
        text = self._own.text(context)
        own = text.propose(context.tokens, most)
        agreed, earlier = self._earlier.find(context.namespace, context.tokens, most)
        return earlier if agreed > text.agreed else own


class EarlierOutputs:
    """The latest outputs by namespace, in two generations: when the newer one holds half of what
    may be kept, the older one is forgotten."""

    def __init__(self, shortest: int, longest: int, kept: int) -> None:
        """Runs have ``shortest`` tokens and more, of which up to ``longest`` are compared; ``kept``
        tokens are."""
        self._shortest = shortest
        self._longest = longest
        self._half = kept // 2
        self._generations: list[dict[str, _Texts]] = [{}, {}]
        self._size = 0

    def add(self, namespace: str, output: Sequence[int]) -> None:
        """Keep the end of an output."""
        output = output[-self._half + 1 :]
        if len(output) <= self._shortest:  # after a run there is nothing
            return
        if self._size + len(output) >= self._half:
            self._generations, self._size = [{}, self._generations[0]], 0
        self._size += len(output) + 1
        newer = self._generations[0]
        if namespace not in newer:
            newer[namespace] = _Texts(self._shortest)
        newer[namespace].add(output)

    def find(self, namespace: str, tokens: Sequence[int], most: int) -> tuple[int, list[int]]:
        """What followed the longest run that ends ``tokens``, up to ``most`` tokens, and how many
        that run has."""
        best: tuple[int, list[int]] = 0, []
        for generation in self._generations:
            if namespace in generation:
                found = generation[namespace].find(tokens, most, self._longest)
                best = max(best, found, key=lambda each: each[0])
        return best


class _Texts:
    def __init__(self, shortest: int) -> None:
        self._tokens: list[int] = []
        self._index = RunIndex(shortest)

    def add(self, text: Sequence[int]) -> None:
        self._tokens.extend(text)
        self._tokens.append(_END)
        self._index.extend(self._tokens)

    def find(self, tokens: Sequence[int], most: int, compared: int) -> tuple[int, list[int]]:
        agreed, place = longest(self._tokens, self._index.places(tokens), tokens, compared)
        guess = self._tokens[place : place + most] if place >= 0 else []
        return agreed, guess[: guess.index(_END)] if _END in guess else guess
