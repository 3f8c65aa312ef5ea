"""Drafts for the sequences of a step: whose guess, how many of them, and what became of them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import Any

from numpy.typing import NDArray

from slipstream.builder.contract import states
from slipstream.errors import EngineMismatchError, InvalidRequestError
from slipstream.runtime.engine.plan import StepPlan
from slipstream.runtime.engine.sequence import Sequence as Running
from slipstream.runtime.engine.step import Guesses, StepResult
from slipstream.runtime.executors.base import (
    CapturingExecutor,
    Executor,
    LeadingExecutor,
    TimedExecutor,
)
from slipstream.runtime.loaded_engine import LoadedEngine
from slipstream.runtime.speculation.lengths import Lengths
from slipstream.runtime.speculation.lookup import OtherText
from slipstream.runtime.speculation.proposer import (
    OFF,
    Computed,
    Context,
    Follower,
    Guessed,
    Listener,
    Owner,
    Proposer,
    create_proposer,
)
from slipstream.runtime.speculation.stats import SpeculationStats
from slipstream.runtime.speculation.tracked import FIRST_CHANCE, Tracked, noted, weight_of

_logger = logging.getLogger(__name__)
_FAILED = "the proposer failed; there will be no more drafts of it"


class Speculator:
    """Asks a proposer what comes next in sequences whose tokens the host knows, and decides how
    much of that a step verifies.

    Every guess is compared with the tokens that came, whether or not it was verified: where none
    pay, it still shows when that changes. While none do, a device may run ahead; guesses are then
    made of the tokens that are known, for the comparison.

    A device that keeps what it has guessed ``leads``: it is only told how many drafts to verify,
    before the host knows them or the tokens before them.
    """

    def __init__(
        self,
        proposer: Proposer,
        most: int,
        vocab_size: int,
        lengths: Lengths | None,
        clock: Callable[[], float],
        leads: bool = False,
    ) -> None:
        """Up to ``most`` drafts a sequence, as many as are guessed where there are no
        ``lengths``; whether a device that guesses ``leads``."""
        self._proposer: Proposer | None = proposer
        self._owner = proposer if isinstance(proposer, Owner) else None
        self._listener = proposer if isinstance(proposer, Listener) else None
        self._follower = proposer if isinstance(proposer, Follower) else None
        self._weight = weight_of(proposer)
        self.most = most
        self._vocab_size = vocab_size
        self._lengths = lengths
        self._clock = clock
        self._leads = leads
        self._captures: Callable[[], int] = lambda: 0  # of graphs, so far
        self._captured = 0  # when the last step landed
        self._pays = False  # to guess before the next step
        self._chance = FIRST_CHANCE
        self._num_drafts = self._num_tokens = 0
        self._accepted = [0] * most

    @property
    def stats(self) -> SpeculationStats:
        """A snapshot; may be read from another thread."""
        accepted = tuple(self._accepted)
        return SpeculationStats(self._num_drafts, self._num_tokens, sum(accepted), accepted)

    def shutdown(self) -> None:
        """Free what the proposer has of its own, also of one that has failed."""
        if self._owner is not None:
            self._owner.shutdown()

    def draft(
        self, sequences: Sequence[Running], room: Sequence[int], budget: int
    ) -> list[list[int]]:
        """Tokens to verify after each of the decoding ``sequences`` of a step, no more than there
        is ``room`` for, and than a ``budget`` in all; none where tokens before are on their way."""
        drafts: list[list[int]] = [[] for _ in sequences]
        places = [place for place, free in enumerate(room) if free > 0]
        self._pays = False
        if not places or budget <= 0:
            return drafts
        tracked = [self._follow(sequences[place]) for place in places]
        self._guess([sequences[place] for place in places], tracked)
        offered = [
            self._allowed(sequences[place], each.guess[: min(room[place], self.most)])
            for place, each in zip(places, tracked, strict=True)
        ]
        counts = [len(guess) for guess in offered]
        if self._lengths is not None:
            chances = [each.chance for each in tracked]
            counts = self._lengths.choose(len(sequences), chances, counts, budget)
        self._pays = any(counts)
        if any(sequence.awaits_token for sequence in sequences):
            return drafts
        for place, guess, count in zip(places, offered, counts, strict=True):
            drafts[place] = guess[: min(count, budget)]
            budget -= len(drafts[place])
        return drafts

    def leads(self, running: Iterable[Running]) -> bool:
        """Whether the device goes on by itself with what it guesses of these sequences: none of
        them needs the host between two tokens."""
        guesses = self._leads and self._listener is not None and self._proposer is not None
        return guesses and all(sequence.goes_alone for sequence in running)

    def lead(
        self, sequences: Sequence[Running], room: Sequence[int], budget: int
    ) -> tuple[list[int], list[int]]:
        """How many of the tokens that the device has guessed of each of the decoding ``sequences``
        of a step it is to verify, within the same limits as ``draft``; and how many it has
        guessed."""
        self._pays = False
        offered = [
            self._known(sequence).offered if free > 0 else 0
            for sequence, free in zip(sequences, room, strict=True)
        ]
        fits = list(map(min, offered, room))
        if self._lengths is None:
            counts = fits
        else:
            known = [sequence.speculation for sequence in sequences]
            chances = [
                each.chance if each is not None and free > 0 else 0.0
                for each, free in zip(known, room, strict=True)
            ]
            counts = self._lengths.choose(len(sequences), chances, fits, budget)
        if sum(counts) > budget:
            before = accumulate(counts, initial=0)
            counts = [
                max(0, min(count, budget - taken))
                for count, taken in zip(counts, before, strict=False)
            ]
        return counts, offered

    @property
    def outputs(self) -> tuple[str, ...]:
        """What the proposer reads of the target's outputs."""
        if self._proposer is None or self._follower is None:
            return ()
        return tuple(self._follower.outputs)

    def ahead(self, plan: StepPlan, page_size: int) -> int | None:
        """How many tokens of each sequence the device is to guess after a step, None if nobody
        hears of them; guesses after the first end with the last page of ``page_size`` tokens."""
        if self._proposer is None or self._listener is None:
            return None
        most = self.most if self._lengths is None else self._lengths.wanted()
        ends = zip(plan.sequences, plan.outputs, plan.allocations, strict=True)
        for sequence, output, held in ends:
            if sequence.request.params.speculative:
                longest = sequence.num_scheduled + sequence.num_drafted
                sure = 1 + max(0, len(held.pages) * page_size - longest)
                self._known(sequence).offered = min(most, sure) if output >= 0 else 0
        return most

    def computed(
        self, plan: StepPlan, runs: Mapping[Running, list[int]], result: StepResult, latest: bool
    ) -> None:
        """Show the proposer what a step computed of those that go on, if it wants to know; of one
        that is not the ``latest``, whose guesses the device leads with, nobody does."""
        if self._proposer is None:
            return
        if plan.offered is not None and result.right is not None and self._lengths is not None:
            self._compare(plan.sequences, plan.offered, runs, result.right)
        if plan.offered is not None and not latest:
            return
        if self._listener is not None and result.guesses is not None:
            with self._unless_it_fails():
                self._listener.heard(list(self._heard(plan, runs, result.guesses)))
        elif (follower := self._follower) and result.outputs.keys() >= set(follower.outputs):
            with self._unless_it_fails():
                follower.computed(list(self._parts(plan, runs, result.outputs)))

    def landed(self, plan: StepPlan, runs: Mapping[Running, list[int]], seconds: float) -> None:
        """Take into account in which runs a step ended, and how long it took."""
        for sequence, count in zip(plan.sequences, plan.drafts, strict=True):
            tracked = sequence.speculation
            if not count or tracked is None or sequence not in runs:
                continue
            right = len(runs[sequence]) - 1
            self._num_drafts += 1
            self._num_tokens += count
            for position in range(right):
                self._accepted[position] += 1
            if tracked.of_prediction:
                sequence.num_accepted += right
                sequence.num_rejected += count - right
        if self._lengths is not None and plan.num_decodes == len(plan.sequences):
            asked = 0.0
            if plan.ahead is not None and self._listener is not None:
                asked = self._listener.seconds(len(plan.sequences), plan.ahead)
            before, self._captured = self._captured, self._captures()
            if before == self._captured:  # else it took longer than a step does
                self._lengths.landed(sum(plan.counts), max(seconds - asked, seconds / 8))

    def waits_for(self, plan: StepPlan, running: Iterable[Running]) -> bool:
        """Whether the host must know the tokens of a step before it plans the next, of ``running``
        sequences: it guessed some of them, or it pays to guess what comes after them, as where the
        device says guesses with tokens and all are wanted; or the device leads no more."""
        if self.leads(running):
            return bool(plan.guesses)
        if plan.offered is not None and any(plan.drafts):
            return True
        heard = bool(plan.ahead) and self._lengths is None
        return bool(plan.guesses) or self._pays or heard

    def learn(self, executor: Executor) -> None:
        """Take into account what steps of decodes cost, where a device can tell before there were
        any."""
        if isinstance(executor, CapturingExecutor):
            self._captures = lambda: executor.captures
            self._captured = executor.captures
        if self._lengths is not None and isinstance(executor, TimedExecutor):
            for rows, seconds in sorted(executor.step_seconds().items()):
                self._lengths.landed(rows, seconds, sure=True)

    def finish(self, sequence: Running) -> None:
        """A sequence has ended."""
        if self._proposer is not None and sequence.speculation is not None:
            with self._unless_it_fails():
                self._proposer.finish(sequence.speculation.context)

    @contextmanager
    def _unless_it_fails(self) -> Iterator[None]:
        try:
            yield
        except Exception:  # the engine needs no guess
            _logger.exception(_FAILED)
            self._proposer = None

    def _parts(
        self,
        plan: StepPlan,
        runs: Mapping[Running, list[int]],
        outputs: Mapping[str, NDArray[Any]],
    ) -> Iterator[Computed]:
        end = 0
        parts = zip(
            plan.sequences, plan.starts, plan.counts, plan.drafts, plan.allocations, strict=True
        )
        for sequence, start, count, drafts, allocation in parts:
            begin, end = end, end + count
            right = max(0, len(runs.get(sequence, ())) - 1)
            goes_on = not sequence.finish_reason and sequence.allocation is allocation
            if goes_on and sequence.request.params.speculative:
                rows = slice(begin, end - drafts + right)
                shown = {name: output[rows] for name, output in outputs.items()}
                yield Computed(self._known(sequence).context, allocation, start, shown)

    def _heard(
        self, plan: StepPlan, runs: Mapping[Running, list[int]], guesses: Guesses
    ) -> Iterator[Guessed]:
        for row, sequence in enumerate(plan.sequences):
            goes_on = sequence in runs and not sequence.finish_reason
            if goes_on and sequence.request.params.speculative:
                total = len(sequence.tokens) + len(runs[sequence])
                yield Guessed(self._known(sequence).context, total, guesses, row)

    def _known(self, sequence: Running) -> Tracked:
        """What is kept of a sequence."""
        tracked = sequence.speculation
        if tracked is None:
            predicted = sequence.request.params.prediction_token_ids
            tracked = sequence.speculation = Tracked(
                Context(sequence.tokens, sequence.prompt_len, sequence.request.cache_namespace),
                self._chance,
                self._weight,
                OtherText(predicted) if predicted else None,
            )
        return tracked

    def _follow(self, sequence: Running) -> Tracked:
        """What is kept of a sequence, with the last guess compared with what came."""
        tracked = self._known(sequence)
        came = sequence.tokens[tracked.guessed_at : tracked.guessed_at + len(tracked.guess)]
        right, wrong = tracked.compare(came)
        self._note(right, wrong)
        return tracked

    def _compare(
        self,
        sequences: Sequence[Running],
        offered: Sequence[int],
        runs: Mapping[Running, list[int]],
        right: Sequence[int],
    ) -> None:
        """Take into account how many of the tokens that were offered are those that came."""
        for sequence, count, found in zip(sequences, offered, right, strict=False):
            tracked, came = sequence.speculation, min(count, len(runs.get(sequence, ())))
            if came and tracked is not None:
                found = min(came, found)
                tracked.note(found, found < came)
                self._note(found, found < came)

    def _note(self, right: int, wrong: bool) -> None:
        self._chance = noted(self._chance, right, wrong, self._weight / 4)

    def _guess(self, sequences: Sequence[Running], tracked: Sequence[Tracked]) -> None:
        asked, known = [], all(each.guessed_at for each in tracked)
        for sequence, each in zip(sequences, tracked, strict=True):
            each.guess, each.guessed_at = (), len(sequence.tokens)
            if each.predicted is not None:
                each.guess = each.predicted.propose(sequence.output, self.most)
            each.of_prediction = bool(each.guess)
            if not each.guess:
                asked.append(each)
        listens = self._listener is not None  # who has been asked with the step before
        most = self.most if self._lengths is None or listens else self._lengths.wanted()
        if not asked or not most:
            return
        began = self._clock()
        for each, guess in zip(asked, self._proposals(asked, most), strict=False):
            each.guess = guess
        if known and self._lengths is not None and not listens:  # else it has read prompts, too
            self._lengths.asked(most, self._clock() - began)

    def _proposals(self, asked: Sequence[Tracked], most: int) -> Iterable[Sequence[int]]:
        if self._proposer is None:
            return ()
        with self._unless_it_fails():
            proposals = self._proposer.propose([each.context for each in asked], most)
            return [[int(token) for token in guess[:most]] for guess in proposals]
        return ()

    def _allowed(self, sequence: Running, guess: Sequence[int]) -> list[int]:
        """A guess up to the first token that there is none of, that ends the sequence, or that the
        form forbids."""
        constraint = sequence.constrained()
        ends = sequence.stop_token_ids
        if constraint is not None:
            ends |= sequence.eos_token_ids
        tokens: list[int] = []
        for token in guess:
            if not 0 <= token < self._vocab_size or token in ends:
                break
            tokens.append(token)
        return tokens if constraint is None else tokens[: constraint.num_valid(tokens)]


def speculator_of(engine: LoadedEngine, clock: Callable[[], float]) -> Speculator | None:
    """What the configuration of an engine asks for; ``clock`` tells seconds.

    Raises ``EngineMismatchError`` where nothing can be verified and ``InvalidRequestError`` for an
    unknown proposer or more drafts than the executor verifies.
    """
    config, limit = engine.config, engine.executor.max_drafts
    if engine.executor.draft_tokens and states(engine.caches):
        raise EngineMismatchError(
            f"the device guesses {engine.executor.draft_tokens} tokens ahead, and of states, "
            "which this engine keeps, none can be taken back: load it where nothing is guessed"
        )
    if config.speculative == OFF or engine.pooling is not None:
        return None
    if states(engine.caches):
        raise EngineMismatchError(
            f"speculative is {config.speculative!r}, and of states, which this engine keeps, none "
            f"can be taken back; leave it {OFF}"
        )
    if not limit:
        raise EngineMismatchError(
            f"speculative is {config.speculative!r}, and the executor of this engine's target "
            f"verifies no drafts; leave it {OFF}"
        )
    auto = config.num_speculative_tokens == "auto"
    most = limit if config.num_speculative_tokens == "auto" else config.num_speculative_tokens
    if most > limit:
        raise InvalidRequestError(
            f"num_speculative_tokens is {most}; this engine's executor verifies up to {limit}",
            param="num_speculative_tokens",
        )
    proposer = create_proposer(config.speculative, engine)
    executor, listener = engine.executor, proposer if isinstance(proposer, Listener) else None
    lengths = Lengths(most, listener) if auto else None
    leads = isinstance(executor, LeadingExecutor) and executor.verifies_unseen
    return Speculator(proposer, most, engine.vocab_size, lengths, clock, leads)
