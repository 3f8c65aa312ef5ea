"""Guesses that a sequence repeats what stands in its prompt or its output."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from slipstream.runtime.speculation.lookup import OwnText
from slipstream.runtime.speculation.proposer import Context

if TYPE_CHECKING:
    from slipstream.runtime.loaded_engine import LoadedEngine


class NgramProposer:
    """Looks up the last tokens of a sequence in its own text; needs no weights.

    It keeps some hundred bytes a token of every sequence.
    """

    def __init__(self, engine: LoadedEngine) -> None:
        """Runs have ``prompt_lookup_min`` tokens and more."""
        self._shortest = engine.config.prompt_lookup_min
        self._longest = engine.config.prompt_lookup_max

    def propose(self, contexts: Sequence[Context], most: int) -> list[list[int]]:
        """What followed the longest run of tokens that are the last ones, the latest of several."""
        return [self.text(context).propose(context.tokens, most) for context in contexts]

    def finish(self, context: Context) -> None:
        """Nothing is kept."""

    def text(self, context: Context) -> OwnText:
        """What is known of the text of a sequence."""
        if context.state is None:
            context.state = OwnText(self._shortest, self._longest)
        text: OwnText = context.state
        return text
