"""A step on its way on the GPU: first its layers, then, when rows have been edited, all of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from slipstream.builder.contract import STATES
from slipstream.errors import ExecutionError
from slipstream.runtime.engine.step import IntArray, SamplingRow, StepBatch, StepResult, reject
from slipstream.runtime.executors.cuda.device import Device, Event
from slipstream.runtime.executors.cuda.drafter import PendingGuesses
from slipstream.runtime.executors.cuda.runner import StepRunner
from slipstream.runtime.executors.cuda.sampling import CUDASampler, PendingSample, lists_logprobs
from slipstream.runtime.executors.cuda.scores import PendingScores, rows_at_once, score
from slipstream.runtime.executors.cuda.unseen import Unseen
from slipstream.runtime.sampling.sampler import broken_row


@dataclass(frozen=True, slots=True)
class Scored:
    """Rows that are scored beside those that are sampled, by their places in the batch."""

    places: Sequence[int]
    pending: PendingScores


@dataclass(frozen=True, slots=True)
class StartedCUDAStep:
    """A step whose layers are enqueued.

    ``places`` are the rows of the batch that sample, which are gathered; the others score tokens of
    a prompt, from the last layer's output of every token, ``hidden``. ``guessed [slots, COLUMNS]``
    is what a head had guessed before.
    """

    device: Device
    runner: StepRunner
    sampler: CUDASampler
    batch: StepBatch
    places: Sequence[int]
    hidden: Tensor
    guessed: IntArray | None = None

    def sample(self) -> PendingCUDAStep:
        """Enqueue head and sampling, then what the kernels of sampling do not do."""
        rows = [self.batch.sampling[place] for place in self.places]
        sampled, scored = None, list[Scored]()
        with self.device.work():
            if rows:
                sampled = self._sampled(rows)
                scored += self._listed(rows)
            states = self._states() if self.runner.pools else None
            if states is None and len(rows) < len(self.batch.sampling):
                scored += self._prompts()
            done = Event(self.device)
            done.record()
            guesses = self._guessed()  # while the host learns what was sampled
        unseen = None
        if self.guessed is not None and sampled is not None and guesses is not None:
            unseen = Unseen.of(
                self.batch, self.places, self.guessed, self.sampler.buffers.vocab_size
            )
        return PendingCUDAStep(
            done, self.batch.sampling, self.places, sampled, scored, states, guesses, unseen
        )

    def _guessed(self) -> PendingGuesses | None:
        """What a head guesses after the step, on its way to the host; the head reads the step
        whether or not anything is to be guessed."""
        wanted = self.batch.guessing
        if wanted is None:
            return None
        self.runner.guess(wanted.count)
        assert self.runner.guessing is not None
        return self.runner.guessing.fetch(self.batch.slots, wanted.count)

    def _states(self) -> Tensor:
        """The states of all rows on their way to the host, as many at a time as the head takes."""
        rows, size = self.batch.logits_rows, len(self.runner.logits)
        width = self.runner.logits.shape[1]
        host = self.device.pinned((len(rows), width), torch.float32)
        for start in range(0, len(rows), size):
            states = self.runner.logits_of(self.hidden, rows[start : start + size])
            host[start : start + size].copy_(states, non_blocking=True)
        return host

    def _sampled(self, rows: Sequence[SamplingRow]) -> PendingSample:
        slots: list[int] = self.batch.sampling_slots[self.places].tolist()
        kind, padded = self.sampler.kind(rows), self.runner.padded_rows(len(rows))
        padded = self.runner.ready_head(padded, kind)
        self.sampler.prepare(rows, slots, padded, kind)
        self.runner.head(padded, kind)
        return self.sampler.fetch(len(rows), kind)

    def _listed(self, rows: Sequence[SamplingRow]) -> Iterator[Scored]:
        """Log probabilities of sampled tokens with more of the likeliest than the kernels list, or
        with others."""
        for row, params in enumerate(each.params for each in rows):
            if params.logprobs is not None and not lists_logprobs(params):
                token = self.sampler.buffers.tokens[row : row + 1].long().clamp(min=0)
                logits = self.runner.logits[row : row + 1]
                listed = params.logprob_token_ids
                ids = None if listed is None else self.device.index(np.array([listed], np.int32))
                yield Scored([self.places[row]], score(logits, token, params.logprobs, ids))

    def _prompts(self) -> Iterator[Scored]:
        """Scores of given tokens; rows of one request follow each other."""
        samples = set(self.places)
        rows = [i for i in range(len(self.batch.sampling)) if i not in samples]
        size = min(rows_at_once(self.runner.logits.shape[1]), len(self.runner.logits))
        for start in range(0, len(rows), size):
            part = rows[start : start + size]
            counts = [self.batch.sampling[row].params.prompt_logprobs or 0 for row in part]
            targets = np.array([self.batch.sampling[row].target for row in part], np.int32)
            count = -1 if min(counts) < 0 else max(counts)
            logits = self.runner.logits_of(self.hidden, self.batch.logits_rows[part])
            yield Scored(part, score(logits, self.device.index(targets), count))


@dataclass(frozen=True, slots=True)
class PendingCUDAStep:
    """A step of which all is enqueued."""

    done: Event
    rows: Sequence[SamplingRow]
    places: Sequence[int]
    sampled: PendingSample | None
    scored: Sequence[Scored]
    states: Tensor | None = None
    guesses: PendingGuesses | None = None
    unseen: Unseen | None = None

    def result(self) -> StepResult:
        """Wait for the device, then answer every row in the order of the batch."""
        result = StepResult([-1] * len(self.rows), [None] * len(self.rows))
        try:
            self.done.wait()
            if self.sampled is not None:
                self._take_sampled(result, self.sampled)
            for scored in self.scored:
                self._take_scored(result, scored)
            if self.states is not None:
                result.outputs[STATES] = self.states.numpy()
            result.guesses = self.guesses
        except RuntimeError as error:
            raise ExecutionError(f"the step failed on the GPU: {error}") from error
        reject(self.rows, result)
        if self.unseen is not None:
            self.unseen.reject(result)
        return result

    def _take_sampled(self, result: StepResult, sampled: PendingSample) -> None:
        answers = sampled.result([self.rows[place] for place in self.places])
        if len(self.places) == len(self.rows):
            result.token_ids, result.logprobs = answers.token_ids, answers.logprobs
        else:
            for place, token, entry in zip(
                self.places, answers.token_ids, answers.logprobs, strict=True
            ):
                result.token_ids[place], result.logprobs[place] = token, entry
        result.failed = {self.places[row]: why for row, why in answers.failed.items()}

    def _take_scored(self, result: StepResult, scored: Scored) -> None:
        for place, entry in zip(scored.places, scored.pending.result(), strict=True):
            row = self.rows[place]
            if entry is None:
                result.failed.setdefault(place, broken_row("NaN or infinite"))
                continue
            if row.target is not None:  # scored beside others that wanted more
                entry = entry.only(row.params.prompt_logprobs or 0)
            result.logprobs[place] = entry
