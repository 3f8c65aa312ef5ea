"""What is kept of a sequence that guesses are made for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from slipstream.runtime.speculation.lookup import OtherText
from slipstream.runtime.speculation.proposer import Context

FIRST_CHANCE = 0.5
SMOOTHING = 0.15  # the weight of the newest guess


@dataclass(slots=True)
class Tracked:
    """The last guess, how many tokens came before it and whether it is the client's prediction, how
    often guesses were right of late, and how many the device makes after the last step."""

    context: Context
    chance: float
    predicted: OtherText | None = None
    guess: Sequence[int] = ()
    guessed_at: int = 0
    of_prediction: bool = False
    offered: int = 0

    def compare(self, came: Sequence[int]) -> tuple[int, bool]:
        """Take into account what came after the last guess, and return how many tokens of it that
        shows to be right, and whether one to be wrong."""
        guess = self.guess[: len(came)]
        right = next((i for i, token in enumerate(guess) if token != came[i]), len(guess))
        wrong = right < len(guess)
        self.note(right, wrong)
        return right, wrong

    def note(self, right: int, wrong: bool) -> None:
        """Take into account that so many guesses were right, and whether the next was wrong."""
        self.chance = noted(self.chance, right, wrong, SMOOTHING)


def noted(chance: float, right: int, wrong: bool, weight: float) -> float:
    """A chance after so many guesses that were right, and maybe a wrong one."""
    chance = 1 - (1 - chance) * (1 - weight) ** right
    return chance * (1 - weight) if wrong else chance
