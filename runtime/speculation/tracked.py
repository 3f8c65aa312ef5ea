"""What is kept of a sequence that guesses are made for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from slipstream.runtime.speculation.lookup import OtherText
from slipstream.runtime.speculation.proposer import Context, Follower, Listener, Owner, Proposer

FIRST_CHANCE = 0.5
# The weight of the newest guess. What a look-up finds is right in runs, and wrong in others; a
# model is right about as often all along, and what seems otherwise is mostly luck, by which drafts
# would go to the wrong sequences of a batch.
OF_LOOKUPS, OF_MODELS = 0.15, 0.05


@dataclass(slots=True)
class Tracked:
    """The last guess, how many tokens came before it and whether it is the client's prediction, how
    often guesses were right of late, by the ``weight`` of the newest, and how many the device makes
    after the last step."""

    context: Context
    chance: float
    weight: float = OF_LOOKUPS
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
        self.chance = noted(self.chance, right, wrong, self.weight)


def weight_of(proposer: Proposer) -> float:
    """Of the newest guess of a proposer; one that reads states or has a device is a model."""
    return OF_MODELS if isinstance(proposer, Listener | Follower | Owner) else OF_LOOKUPS


def noted(chance: float, right: int, wrong: bool, weight: float) -> float:
    """A chance after so many guesses that were right, and maybe a wrong one."""
    chance = 1 - (1 - chance) * (1 - weight) ** right
    return chance * (1 - weight) if wrong else chance
