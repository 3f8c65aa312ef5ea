"""A compiled form, and where one continuation is in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from slipstream.errors import InvalidRequestError

if TYPE_CHECKING:
    from llguidance import LLMatcher


@dataclass(frozen=True, slots=True, eq=False)
class Grammar:
    """What all continuations of a form begin with; shared by requests and never advanced."""

    matcher: LLMatcher

    def start(self) -> Constraint:
        """A constraint at the beginning of the form."""
        return Constraint(self.matcher.deep_copy())


@dataclass(frozen=True, slots=True, eq=False)
class Constraint:
    """What may come next in one continuation; advances token by token."""

    matcher: LLMatcher

    def take(self, token: int) -> None:
        """Go on by a token. Raises ``InvalidRequestError`` where the form has become too complex to
        follow, here or when what may come next was last asked for."""
        if not self.matcher.consume_token(token):
            raise InvalidRequestError(
                f"the structured output cannot be followed any further: "
                f"{short(self.matcher.get_error())}; use a simpler schema or grammar",
                param="structured",
            )

    def num_valid(self, tokens: list[int]) -> int:
        """How many of ``tokens``, none of which ends a sequence, may come next one by one."""
        return self.matcher.validate_tokens(tokens)

    def after(self, tokens: Sequence[int]) -> Constraint:
        """Where it would be after valid tokens; it does not move itself."""
        matcher = self.matcher.deep_copy()
        matcher.consume_tokens(list(tokens))
        return Constraint(matcher)

    @property
    def complete(self) -> bool:
        """Whether nothing can follow but the end."""
        return self.matcher.is_stopped()

    def forced(self) -> list[int]:
        """The tokens that must come next, as the tokenizer makes them of the only possible text."""
        return self.matcher.compute_ff_tokens()


def short(error: str) -> str:
    """A message of the library in one line, without its state."""
    return " ".join(error.replace("<non-verbose/>", "").split())[:600]
