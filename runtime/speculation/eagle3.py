"""Guesses of a head inside of the engine, which reads what the target computes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from slipstream.builder.contract import DRAFTS, HEAD_GRAPH, HIDDEN, NEXT_HIDDEN, Head
from slipstream.errors import EngineMismatchError, InvalidRequestError
from slipstream.runtime.engine.kv_cache import Allocation
from slipstream.runtime.engine.step import PagedInputs, StepBatch
from slipstream.runtime.executors.base import GuessingExecutor
from slipstream.runtime.loaded_engine import LoadedEngine
from slipstream.runtime.speculation.proposer import Computed, Context, Guessed

Floats = NDArray[np.float32]


@dataclass(slots=True)
class _Unread:
    """What the target has computed of a sequence and the head has not read: the hidden states of
    ``count`` tokens from ``start`` on."""

    allocation: Allocation
    start: int
    count: int = 0
    parts: list[Floats] = field(default_factory=list)

    def add(self, hidden: Floats) -> None:
        """More of them; a step's own array is not to be kept for the sake of a row."""
        self.parts.append(hidden.copy())
        self.count += len(hidden)

    def take(self, count: int) -> Floats:
        """The first ones, which count no more."""
        hidden = np.concatenate(self.parts)
        self.parts = [hidden[count:]] if count < self.count else []
        self.start, self.count = self.start + count, self.count - count
        return hidden[:count]


class _Rows(NamedTuple):
    """Tokens of one sequence for the head, from position ``start`` on, each with what is known of
    the one before it; guesses are wanted of the last ``wanted``."""

    pages: Sequence[int]
    start: int
    tokens: list[int]
    hidden: Floats
    wanted: int


def eagle3_proposer(engine: LoadedEngine) -> Eagle3Proposer | DeviceHeadProposer:
    """What the head of an engine guesses.

    Raises ``EngineMismatchError`` for an engine without a head, and ``InvalidRequestError`` where
    the head that is asked for is another one.
    """
    executor = engine.executor
    if isinstance(executor, GuessingExecutor) and executor.guesses:
        if engine.engine is not None:
            _head_of(engine)
        return DeviceHeadProposer(executor)
    return Eagle3Proposer(engine)


class DeviceHeadProposer:
    """Says what the device has guessed after the last step; a sequence that was told another token
    since, as by a form, has no guess."""

    def __init__(self, executor: GuessingExecutor) -> None:
        self._executor = executor
        self._seconds: _Timed | None = None

    def heard(self, guesses: Sequence[Guessed]) -> None:
        """Keep them until they are asked for."""
        for each in guesses:
            each.context.state = each

    def propose(self, contexts: Sequence[Context], most: int) -> list[list[int]]:
        """What came with the last token, in the same step for all most often."""
        rows: dict[int, list[list[int]]] = {}
        return [_kept(context, most, rows) for context in contexts]

    def finish(self, context: Context) -> None:
        """Nothing is needed."""
        context.state = None

    @property
    def counts(self) -> Sequence[int]:
        """Those that were timed."""
        return self._timed.counts

    def seconds(self, num_sequences: int, count: int) -> float:
        """Between two numbers of sequences that were timed, in proportion."""
        return self._timed.seconds(num_sequences, count)

    @property
    def _timed(self) -> _Timed:
        if self._seconds is None:  # pages have been reserved by now
            self._seconds = _Timed.of(self._executor.guess_seconds())
        return self._seconds


@dataclass(frozen=True, slots=True)
class _Timed:
    """What guesses take: seconds ``by_count``, after steps of so many ``sequences``."""

    by_count: dict[int, tuple[list[int], list[float]]]

    @classmethod
    def of(cls, measured: Mapping[tuple[int, int], float]) -> _Timed:
        """By sequences and guesses of each."""
        found: dict[int, tuple[list[int], list[float]]] = {}
        for (sequences, count), seconds in sorted(measured.items()):
            places, taken = found.setdefault(count, ([], []))
            places.append(sequences)
            taken.append(seconds)
        return cls(found)

    @property
    def counts(self) -> list[int]:
        """Numbers of guesses that were timed, but none."""
        return sorted(count for count in self.by_count if count)

    def seconds(self, num_sequences: int, count: int) -> float:
        """Of the next count that was timed; 0 where there is none."""
        timed = next((each for each in sorted(self.by_count) if each >= count), None)
        if timed is None or (not count and timed):
            return 0.0
        return float(np.interp(num_sequences, *self.by_count[timed]))


def _kept(context: Context, most: int, rows: dict[int, list[list[int]]]) -> list[int]:
    """What was guessed of a context as it is now; ``rows`` of guesses have been waited for."""
    kept: Guessed | None = context.state
    if kept is None or kept.num_tokens != len(context.tokens):
        return []
    key = id(kept.guesses)
    if key not in rows:
        rows[key] = kept.guesses.rows()
    return list(takewhile(lambda token: token >= 0, rows[key][kept.row][:most]))


class Eagle3Proposer:
    """Runs the graph ``head`` of an engine on the pages of the sequences themselves.

    At a token's position it reads the token after it, so the first guess needs all tokens that are
    known, and each further one the guess before it; a P-EAGLE head makes them all at once. A prompt
    is read as its chunks land, so that whoever shares its pages finds them whole; what comes after
    it when a guess is wanted, or where it fills a step. Guesses end with the last page.
    """

    outputs = (HIDDEN,)

    def __init__(self, engine: LoadedEngine) -> None:
        self._head = _head_of(engine)
        self._executor = engine.executor
        self._page_size = engine.config.page_size
        self._most = engine.config.max_num_tokens

    def computed(self, parts: Sequence[Computed]) -> None:
        """Keep the states of a step, and read what is of prompts."""
        due = []
        for part in parts:
            unread = self._unread(part)
            context, end = part.context, part.start + len(part.outputs[HIDDEN])
            unread.add(part.outputs[HIDDEN])
            if part.start < context.prompt_len - 1 or end - unread.start >= self._most:
                due.append(context)
        for rows in self._within(self._taken(due)):
            self._run(rows)

    def propose(self, contexts: Sequence[Context], most: int) -> list[list[int]]:
        """The likeliest tokens, by what is likeliest before them."""
        ready = [context for context in contexts if _is_ready(context)]
        guesses: dict[Context, list[int]] = {context: [] for context in ready}
        hidden, first = dict[Context, Floats](), list(self._taken(ready, most))
        places = iter(ready)
        for rows in self._within(first):
            # In this order, the next group begins with the next place.
            for (tokens, after), context in zip(self._run(rows), places, strict=False):
                guesses[context], hidden[context] = tokens, after
        if self._head.kind == "eagle3":
            self._go_on(guesses, hidden, most)
        return [guesses.get(context, []) for context in contexts]

    def finish(self, context: Context) -> None:
        """What is not read is not needed."""
        context.state = None

    def _go_on(
        self, guesses: dict[Context, list[int]], hidden: dict[Context, Floats], most: int
    ) -> None:
        """Guess after the last guesses, one token of every sequence at a time."""
        for _ in range(1, most):
            asked = [context for context in guesses if self._has_room(context, guesses[context])]
            if not asked:
                return
            rows = [
                _Rows(
                    context.state.allocation.pages,
                    len(context.tokens) + len(guesses[context]) - 2,
                    guesses[context][-1:],
                    hidden[context],
                    1,
                )
                for context in asked
            ]
            for context, (tokens, after) in zip(asked, self._run(rows), strict=True):
                guesses[context] += tokens
                hidden[context] = after

    def _has_room(self, context: Context, guess: list[int]) -> bool:
        """Whether the place before the next guess is in a page of the sequence."""
        place = len(context.tokens) + len(guess) - 2
        return place < len(context.state.allocation.pages) * self._page_size

    def _unread(self, part: Computed) -> _Unread:
        """What is not read of a sequence; a preempted one begins anew, in other pages."""
        unread: _Unread | None = part.context.state
        if (
            unread is None
            or unread.allocation is not part.allocation
            or unread.start + unread.count != part.start
        ):
            unread = part.context.state = _Unread(part.allocation, part.start)
        return unread

    def _taken(self, contexts: Sequence[Context], most: int = 0) -> Iterator[_Rows]:
        """What is not read of each, as far as the token after it is known; for ``most`` guesses
        with the places of those that a head makes at once."""
        for context in contexts:
            unread: _Unread = context.state
            start, pages = unread.start, unread.allocation.pages
            count = min(unread.count, len(context.tokens) - 1 - start)
            if not count:
                continue
            hidden = unread.take(count)
            tokens = list(context.tokens[start + 1 : start + 1 + len(hidden)])
            room = len(pages) * self._page_size - start - len(tokens)
            masked = min(most - 1, room) if most and self._head.mask_token is not None else 0
            if masked:
                tokens += [self._head.mask_token or 0] * masked
                hidden = np.concatenate([hidden, np.zeros((masked, hidden.shape[1]), np.float32)])
            yield _Rows(pages, start, tokens, hidden, 1 + masked)

    def _within(self, rows: Iterator[_Rows] | Sequence[_Rows]) -> Iterator[list[_Rows]]:
        """In groups of as many tokens as a step has, or one sequence."""
        group: list[_Rows] = []
        for each in rows:
            if group and sum(len(r.tokens) for r in group) + len(each.tokens) > self._most:
                yield group
                group = []
            group.append(each)
        if group:
            yield group

    def _run(self, rows: Sequence[_Rows]) -> Iterator[tuple[list[int], Floats]]:
        """The guesses of each sequence, and what the last of them is made of."""
        started = self._executor.submit(self._batch(rows))
        outputs = started.sample().result().outputs
        ends = np.cumsum([each.wanted for each in rows])
        return (
            (outputs[DRAFTS][end - each.wanted : end].tolist(), outputs[NEXT_HIDDEN][end - 1 : end])
            for each, end in zip(rows, ends, strict=True)
        )

    def _batch(self, rows: Sequence[_Rows]) -> StepBatch:
        size = self._page_size
        counts = np.array([len(each.tokens) for each in rows], np.int32)
        starts = np.array([each.start for each in rows], np.int32)
        query_start = np.zeros(len(rows) + 1, np.int32)
        np.cumsum(counts, out=query_start[1:])
        owners = np.arange(len(rows), dtype=np.int32).repeat(counts)
        positions = np.arange(query_start[-1], dtype=np.int32) + (starts - query_start[:-1])[owners]
        held = [-(-(each.start + len(each.tokens)) // size) for each in rows]
        table = np.zeros((len(rows), max(held)), np.int32)
        for row, each, count in zip(table, rows, held, strict=True):
            row[:count] = each.pages[:count]
        slots = table[owners, positions // size] * np.int32(size) + positions % np.int32(size)
        wanted = [
            np.arange(end - each.wanted, end, dtype=np.int32)
            for each, end in zip(rows, query_start[1:], strict=True)
        ]
        return StepBatch(
            token_ids=np.array([token for each in rows for token in each.tokens], np.int32),
            positions=positions,
            query_start=query_start,
            context_len=starts + counts,
            logits_rows=np.concatenate(wanted),
            sampling=[],
            slots=np.zeros(len(rows), np.int32),
            sampling_slots=np.full(sum(each.wanted for each in rows), -1, np.int32),
            pages={HEAD_GRAPH: PagedInputs(table, slots)},
            graph=HEAD_GRAPH,
            outputs=(DRAFTS, NEXT_HIDDEN),
            hidden=np.concatenate([each.hidden for each in rows]),
        )


def _is_ready(context: Context) -> bool:
    """Whether the target has computed all tokens but the last."""
    unread: _Unread | None = context.state
    return (
        unread is not None
        and unread.count > 0
        and unread.start + unread.count == len(context.tokens) - 1
    )


def _head_of(engine: LoadedEngine) -> Head:
    manifest = None if engine.engine is None else engine.engine.manifest
    if manifest is None or manifest.head is None:
        again = "slipstream build CHECKPOINT -o ENGINE" if manifest is None else manifest.command
        raise EngineMismatchError(
            "speculative is 'eagle3', and the engine has no head; build it again with one: "
            f"{again} --speculative-model HEAD"
        )
    asked, own = engine.config.speculative_model, manifest.head.source
    if asked is not None and own not in (asked, str(Path(asked).absolute())):
        raise InvalidRequestError(
            f"speculative_model is {asked}, and the head in the engine is {own}; leave it out, or "
            "build the engine again with the other",
            param="speculative_model",
        )
    return manifest.head
