"""What the engine loop needs of a device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from slipstream.runtime.engine.host_pages import HostSpace, Transfer
from slipstream.runtime.engine.stats import Traffic
from slipstream.runtime.engine.step import StepBatch, StepResult


class PendingStep(Protocol):
    """A step of which all is on its way."""

    def result(self) -> StepResult:
        """Wait for the step; raises ``ExecutionError`` if the device failed."""
        ...


class StartedStep(Protocol):
    """A step whose layers are on their way: what they need is known to the device."""

    def sample(self) -> PendingStep:
        """Edit the rows and start head and sampling; once, before the next step is submitted.

        The host must know the output of every row whose parameters say ``needs_output``; other rows
        may be a token ahead of it.
        """
        ...


class Executor(Protocol):
    """Runs steps of one loaded engine, in order. Used from the engine-loop thread only.

    Results are asked for in the order of submission. Most often one step is on its way; where
    ``runs_ahead``, the next is submitted before the result of the last is asked for, and takes the
    tokens that the host does not know yet from the device.
    """

    @property
    def runs_ahead(self) -> bool:
        """Whether two steps may be on their way: the device works by itself and keeps the last
        token of every slot."""
        ...

    @property
    def draft_tokens(self) -> int:
        """How many tokens the device guesses for a sequence and verifies in one step, at most."""
        ...

    @property
    def max_drafts(self) -> int:
        """How many tokens guessed by the host it verifies for a sequence in one step, at most: a
        row after a wrong one is ``REJECTED`` (see ``step.reject``). Where it runs ahead, nothing is
        submitted before the result of such a step was asked for; with drafts that only the device
        knows (``LeadingExecutor``) the next step may be."""
        ...

    def reserve_kv(self, num_bytes: int | None) -> int:
        """Allocate KV pages within ``num_bytes`` (None: the executor's own default) and return how
        many."""
        ...

    def submit(self, batch: StepBatch) -> StartedStep:
        """Make the moves of a step and start its layers; may return before the device is done.

        The sampling rows of ``batch`` belong to the sequences and change with the next batch, as
        those of its arrays do that can be written to.
        """
        ...

    def shutdown(self) -> None:
        """Free the device."""
        ...


@runtime_checkable
class WatchedExecutor(Protocol):
    """An executor whose device may be gone while nothing is asked of it."""

    @property
    def lost(self) -> str | None:
        """Why no step can run any more, None while they can; may be read from any thread."""
        ...


@runtime_checkable
class OffloadingExecutor(Protocol):
    """An executor that also keeps pages on the host: it makes the ``transfers`` of a step."""

    @property
    def stored(self) -> Traffic:
        """What went to the host; may be read from any thread."""
        ...

    @property
    def loaded(self) -> Traffic:
        """What came back; may be read from any thread."""
        ...

    def reserve_host(self, num_bytes: int, file: str | None) -> HostSpace:
        """Make room within ``num_bytes``, after ``reserve_kv``; in a ``file`` that survives the
        process, if it is named. CapacityError when no page fits or there is no such memory,
        EngineMismatchError for a file of another engine."""
        ...

    def transfer(self, transfers: Sequence[Transfer]) -> None:
        """Make transfers outside of a step, all of them; nothing is on its way."""
        ...


@runtime_checkable
class TimedExecutor(Protocol):
    """An executor that can tell what its steps will cost before there are any."""

    def step_seconds(self) -> dict[int, float]:
        """Seconds of a step of decodes by its rows, measured when pages have been reserved."""
        ...


@runtime_checkable
class PreparingExecutor(Protocol):
    """An executor that is ready to run any step, some of which would be quicker with more done."""

    def prepare_next(self) -> bool:
        """Do some of that, in a tenth of a second, while no step is on its way; False: all is
        done."""
        ...


@runtime_checkable
class PaddingExecutor(Protocol):
    """An executor that pads steps with prompts to certain numbers of tokens."""

    @property
    def padded_sizes(self) -> Sequence[int]:
        """Which, in rising order; larger steps are not padded."""
        ...


def padded_sizes(executor: Executor) -> Sequence[int]:
    """To which numbers of tokens an executor pads steps with prompts, if it does."""
    return executor.padded_sizes if isinstance(executor, PaddingExecutor) else ()


@runtime_checkable
class GuessingExecutor(Protocol):
    """An executor with a head of the engine, which guesses tokens right after a step
    (``StepBatch.guessing``): the result has them as ``guesses``, of use for sequences that sampled.
    The host decides which are verified."""

    @property
    def guesses(self) -> int:
        """How many tokens of a sequence it guesses after a step, at most; 0 without a head."""
        ...

    def guess_seconds(self) -> dict[tuple[int, int], float]:
        """What that takes, by sequences of a step and tokens of each, with 0 for a head that only
        reads, as far as it was measured when pages were reserved."""
        ...


@runtime_checkable
class CapturingExecutor(Protocol):
    """An executor whose device captures steps of some shape when the first comes, which then takes
    far longer than the others."""

    @property
    def captures(self) -> int:
        """How often it has done that."""
        ...


@runtime_checkable
class LeadingExecutor(GuessingExecutor, Protocol):
    """One that also keeps its guesses and verifies them before the host has seen any: it puts them
    in where a step has drafts of -1, and says in the result how many were ``right``. What was
    guessed of a sequence holds for its next step, whatever others are in steps between."""

    @property
    def verifies_unseen(self) -> bool:
        """Whether it does that."""
        ...


@runtime_checkable
class ScoringExecutor(Protocol):
    """An executor that also shows the logits it computes, for measuring a model."""

    def reserve_kv(self, num_bytes: int | None) -> int:
        """As ``Executor.reserve_kv``."""
        ...

    def logits(self, batch: StepBatch) -> NDArray[np.float32]:
        """Run a step and return its logits float32 ``[L, vocab]``; nothing is sampled, and
        ``batch.sampling`` is not read. Raises ``ExecutionError`` if the device fails."""
        ...
