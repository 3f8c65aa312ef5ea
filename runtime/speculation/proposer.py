"""What guesses the next tokens of sequences, and how one is found by its name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from slipstream.builder.contract import EAGLE3
from slipstream.errors import InvalidRequestError
from slipstream.extensions import entry_points, load

if TYPE_CHECKING:  # the names of proposers are also asked by those who run nothing
    import numpy as np
    from numpy.typing import NDArray

    from slipstream.runtime.engine.kv_cache import Allocation
    from slipstream.runtime.engine.step import Guesses
    from slipstream.runtime.loaded_engine import LoadedEngine

OFF = "off"
GROUP = "slipstream.proposers"
_PROPOSERS = {
    EAGLE3: "slipstream.runtime.speculation.eagle3:eagle3_proposer",
    "draft": "slipstream.runtime.speculation.draft:draft_proposer",
    "ngram": "slipstream.runtime.speculation.ngram:NgramProposer",
    "suffix": "slipstream.runtime.speculation.suffix:SuffixProposer",
}


@dataclass(slots=True, eq=False)
class Context:
    """A sequence as a proposer sees it: its ``tokens``, of which ``prompt_len`` are the prompt's.

    The list is the live one: it only grows, and is not to be changed. Of other sequences only those
    with the same ``namespace`` may be told from how fast this one is. ``state`` is the proposer's
    own, and goes with the sequence.
    """

    tokens: Sequence[int]
    prompt_len: int
    namespace: str = ""
    state: Any = field(default=None, repr=False)


class Proposer(Protocol):
    """Guesses tokens; used from the engine loop's thread, before steps in which they are verified.

    Made by a class, or function, that is called with the ``LoadedEngine`` to guess for. What it
    guesses, however wrong, changes how fast answers come and nothing else.
    """

    def propose(self, contexts: Sequence[Context], most: int) -> Sequence[Sequence[int]]:
        """Up to ``most`` tokens that may follow each of ``contexts``, none where there is no guess.

        One that raises is asked no more, and the engine goes on without.
        """
        ...

    def finish(self, context: Context) -> None:
        """A sequence that guesses were made for has ended, in whatever way."""
        ...


@dataclass(frozen=True, slots=True)
class Computed:
    """Rows of the target's ``outputs`` for tokens of a context from ``start`` on, all of which are
    its own now, in the pages of its ``allocation``."""

    context: Context
    allocation: Allocation
    start: int
    outputs: Mapping[str, NDArray[np.float32]]


@runtime_checkable
class Follower(Protocol):
    """A proposer that is shown what every step computes."""

    @property
    def outputs(self) -> Sequence[str]:
        """Those of the target's graph that it reads, a row a token."""
        ...

    def computed(self, parts: Sequence[Computed]) -> None:
        """A step has landed; the tokens that it sampled are not among a context's yet."""
        ...


@dataclass(frozen=True, slots=True)
class Guessed:
    """What the device guesses for a context, when it has ``num_tokens`` tokens: a row of the
    guesses of a step."""

    context: Context
    num_tokens: int
    guesses: Guesses
    row: int

    @property
    def tokens(self) -> list[int]:
        """Wait for them."""
        return self.guesses.rows()[self.row]


@runtime_checkable
class Listener(Protocol):
    """A proposer whose guesses the device makes, after every step and before anyone asks."""

    def heard(self, guesses: Sequence[Guessed]) -> None:
        """A step has landed; the tokens that it sampled are not among a context's yet, and the
        device may still guess."""
        ...

    @property
    def counts(self) -> Sequence[int]:
        """How many guesses the device makes of a sequence, where that is known: fewer take as long
        as the next of these."""
        ...

    def seconds(self, num_sequences: int, count: int) -> float:
        """What ``count`` guesses for each of so many sequences take, or to read a step for none, as
        far as is known."""
        ...


@runtime_checkable
class Owner(Protocol):
    """A proposer that has a device, or processes, of its own."""

    def shutdown(self) -> None:
        """Free them; nothing is asked any more."""
        ...


def create_proposer(name: str, engine: LoadedEngine) -> Proposer:
    """The proposer of a name; raises ``InvalidRequestError`` for one that nobody brings."""
    places = {**entry_points(GROUP), **_PROPOSERS}
    if name not in places:
        raise InvalidRequestError(
            f"speculative is {name!r}; known are {OFF}, {', '.join(sorted(places))}. Packages add "
            f"proposers by entry points of the group {GROUP}",
            param="speculative",
        )
    proposer: Proposer = load(places[name], "PROPOSER", GROUP)(engine)
    return proposer
