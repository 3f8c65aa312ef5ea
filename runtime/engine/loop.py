"""The loop: schedule a step and start it, wait for the step before, tell callers of that."""

from __future__ import annotations

import itertools
import os
import random
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import asdict

from slipstream.builder.contract import STATES
from slipstream.errors import ExecutionError, SlipstreamError
from slipstream.runtime.engine.batch import BatchBuilder
from slipstream.runtime.engine.flight import Flight, step_failed
from slipstream.runtime.engine.health import PROBE, Health, forked_from, probe
from slipstream.runtime.engine.plan import StepPlan
from slipstream.runtime.engine.prompt_share import PromptShare
from slipstream.runtime.engine.request_state import CompletionState, RequestState, sequences_of
from slipstream.runtime.engine.scheduler import Scheduler
from slipstream.runtime.engine.sequence import Sequence
from slipstream.runtime.engine.stats import EngineStats
from slipstream.runtime.engine.step import REJECTED, StepResult
from slipstream.runtime.engine.step_stats import StepStats
from slipstream.runtime.executors.base import PreparingExecutor, padded_sizes
from slipstream.runtime.host_memory import make_transfers, reserve_host, spill, traffic
from slipstream.runtime.kv_events.announcer import Announcer
from slipstream.runtime.loaded_engine import LoadedEngine
from slipstream.runtime.pooling import PoolingParams, broken_states, pooled
from slipstream.runtime.request import (
    FinishReason,
    Request,
    RequestMetrics,
    RequestOutput,
    check_tokens,
    id_in_use,
)
from slipstream.runtime.speculation.speculator import speculator_of

_SCORED_BYTES = 256 << 20  # logits of prompt tokens that one step scores


class EngineLoop:
    """Drives one engine; all but ``validate``, ``stats`` and ``unhealthy`` belongs to one thread.

    Between two calls of ``step`` one step may be on its way: the caller reads and passes on the
    outputs of a step while the device computes the next. A device that runs ahead gets yet another
    step before that one has landed, unless the host guesses tokens (``Speculator.waits_for``), so
    that it is never idle; what a sequence has there beyond its end is ignored. Where edits of a row
    need the token before (``SamplingParams.needs_output``), the layers of the next step are started
    all the same, and its head when the last has landed.

    A step that fails ends the requests in it, a row that fails its own; a request of the loop's own
    then tells whether the device still computes. An engine that is ``unhealthy`` goes on trying;
    whoever drives it decides. A process that was forked has no device: every request is refused.
    """

    def __init__(
        self,
        engine: LoadedEngine,
        *,
        clock: Callable[[], float] = time.monotonic,
        detokenizes: bool = True,
        streams: bool = False,
    ) -> None:
        """``detokenizes``: else the tokens have no text, and stop strings are found by whoever is
        told, who says ``stop``. ``streams``: every token is waited for, which bounds prompts."""
        self._speculator = speculator_of(engine, clock)
        num_pages = engine.reserve_pages()
        if self._speculator is not None:
            self._speculator.learn(engine.executor)
        host = reserve_host(engine)
        self.staging = host.staging
        self.scheduler = Scheduler(
            engine.config,
            num_pages,
            engine.caches,
            engine.executor.draft_tokens,
            max_scored=max(1, _SCORED_BYTES // (4 * engine.vocab_size)),
            speculator=self._speculator,
            host=host.offload,
            share=PromptShare(padded_sizes(engine.executor)) if streams else None,
        )
        self.kv_events = Announcer(engine.config, self.scheduler.kv)
        self._engine = engine
        self._tokenizer = engine.tokenizer if detokenizes else None
        ends = engine.tokenizer.eos_token_ids  # some may have no logits
        self._eos_token_ids = frozenset(token for token in ends if token < engine.vocab_size)
        self._process = os.getpid()
        self._drafts = engine.executor.draft_tokens > 0 or self._speculator is not None
        self._jumps = engine.config.enable_jump_decoding
        self._builder = BatchBuilder(engine.config, engine.caches)
        self._clock = clock
        self._health = Health(engine.config.step_timeout, clock, engine.executor)
        self._steps = StepStats(clock)
        self._arrivals = itertools.count()
        self._seeds = random.Random()  # the module's own belongs to the program
        self._requests: dict[str, RequestState] = {}
        self._changed: dict[RequestState, None] = {}
        self._need_output: set[RequestState] = set()  # before their rows are sampled
        self._flight: Flight | None = None

    @property
    def has_work(self) -> bool:
        """Whether ``step`` still has something to compute or to tell."""
        return bool(self._changed or self._flight or self.scheduler.has_work)

    @property
    def stats(self) -> EngineStats:
        """A snapshot of the scheduler, and all steps; may be read from any thread."""
        steps = self._steps
        scheduled = asdict(self.scheduler.stats) | traffic(self._engine.executor)
        drafts = None if self._speculator is None else self._speculator.stats
        return EngineStats(
            **scheduled, step_tokens=steps.tokens, step_seconds=steps.seconds, speculation=drafts
        )

    @property
    def forked(self) -> str | None:
        """Why nothing runs in a process that was forked from the engine's, None elsewhere."""
        return None if os.getpid() == self._process else forked_from(self._process)

    @property
    def unhealthy(self) -> str | None:
        """Why the device is to be given up, None while it works; may be read from any thread."""
        return self._health.reason

    def validate(self, request: Request) -> None:
        """Raise the typed error that ``add_request`` would raise; safe from any thread."""
        if (reason := self.forked) is not None:
            raise ExecutionError(reason)
        self._clamp(request)
        check_tokens(request.prompt_token_ids, self._engine.vocab_size)

    def add_request(self, request: Request) -> None:
        """Queue a request.

        Raises ``InvalidRequestError`` or ``CapacityError`` for one that could never run, and
        ``ExecutionError`` in a forked process.
        """
        self.validate(request)
        if request.request_id in self._requests:
            raise id_in_use(request.request_id)
        completions = [CompletionState.of(s, self._tokenizer) for s in self._sequences(request)]
        state = RequestState(request, completions, RequestMetrics(arrival_time=self._clock()))
        self._requests[request.request_id] = state
        if request.params.needs_output:
            self._need_output.add(state)
        self.scheduler.add(completions[0].sequence)

    def abort(self, request_id: str) -> None:
        """End a request; its pages are free for the next step. Unknown ids are ignored."""
        state = self._requests.get(request_id)
        if state is not None:
            self._end(state, "abort")

    def shutdown(self) -> None:
        """Wait for the device and free it, whatever fails on the way; unfinished requests are
        dropped."""
        flight, self._flight = self._flight, None
        self._health.began()
        with ExitStack() as at_last:
            at_last.callback(self._health.ended)
            at_last.callback(self.kv_events.close)
            if self._speculator is not None:
                at_last.callback(self._speculator.shutdown)
            at_last.callback(self._engine.executor.shutdown)
            if flight and flight.pending:  # it is unsampled after a defect in ``step`` only
                self._land(flight)
            if self.unhealthy is None:
                spill(self._engine, self.scheduler.kv)

    def stop(self, request_id: str, index: int) -> None:
        """End one completion whose text has come to a stop string; unknown ones are ignored."""
        state = self._requests.get(request_id)
        if state is None:
            return
        sequence = state.completions[index].sequence
        if not sequence.finish_reason:
            sequence.finish_reason = "stop"
            self._note_change(state, sequence, self._clock())

    def step(self) -> list[RequestOutput]:
        """The same as ``advance``; returns what callers are to hear, with what is new as text."""
        outputs = []
        for state in self.advance():
            output = state.output()
            if state.error is not None:  # its text may be what cannot be told
                self._settle(state)
            if output is not None:
                outputs.append(output)
        return outputs

    def advance(self) -> list[RequestState]:
        """Finish the step on its way, start the next (before that, if the device runs ahead), and
        return the requests that the finished one changed."""
        if os.getpid() != self._process:
            raise ExecutionError(forked_from(self._process))
        self._health.began()
        try:
            self._advance()
        finally:
            self._health.ended()
        changed, self._changed = self._changed, {}
        told = []
        for state in changed:
            if state.error is not None:
                self._settle(state)
            if state.request.request_id != PROBE:
                told.append(state)
        return told

    def prepare(self) -> bool:
        """Do what later steps are quicker for, while there is no work; False: all is done."""
        executor = self._engine.executor
        if self.unhealthy or not isinstance(executor, PreparingExecutor):
            return False
        self._health.began()
        try:
            return executor.prepare_next()
        finally:
            self._health.ended()

    def _advance(self) -> None:
        """Land the step on its way, with the next started before or after that."""
        flight, self._flight = self._flight, None
        runs_ahead, guesses = self._engine.executor.runs_ahead, self._speculator
        waits = flight and guesses and guesses.waits_for(flight.plan, self.scheduler.running)
        if flight and runs_ahead and not (waits or flight.refused):
            self._flight = self._launch()
            if self._flight and not self._need_output:
                self._flight.sample()
        self._land(flight)
        if self._flight is None:
            self._flight = self._launch()
            if self._flight is None:
                make_transfers(self._engine.executor, self.scheduler.kv)
            elif flight and runs_ahead:
                self._flight.idle = self._steps.since_landing
        if self._flight and self._flight.pending is None:
            self._flight.sample()
        if self.kv_events.publisher is not None:
            self.kv_events.flush()

    def _sequences(self, request: Request) -> list[Sequence]:
        """The first of the ``n`` sequences is scheduled; it releases the others."""
        params = request.params
        assert (request.grammar is None) == (params.structured is None), "it is compiled before"
        jumps = request.grammar is not None and params.logprobs is None and self._jumps
        seed = self._seeds.getrandbits(32) if params.seed is None else params.seed
        of = (request, next(self._arrivals), self._clamp(request), seed, self._eos_token_ids)
        return sequences_of(*of, jumps=jumps, pooling=self._engine.pooling)

    def _clamp(self, request: Request) -> int:
        length, pools = len(request.prompt_token_ids), request.pooling is not None
        return self.scheduler.clamp_max_tokens(length, request.params.max_tokens, pools)

    def _launch(self) -> Flight | None:
        plan = self.scheduler.schedule()
        if not plan.sequences:
            return None
        if plan.admitted:
            self._note_admitted(plan.admitted)
        outputs: tuple[str, ...] = ()
        if (guesses := self._speculator) is not None:
            outputs, size = guesses.outputs, self.scheduler.kv.page_size
            plan.ahead = guesses.ahead(plan, size)
        batch, owners, positions = self._builder.build(plan, outputs)
        self._steps.began()
        return Flight.begin(self._engine.executor, plan, batch, owners, positions)

    def _note_admitted(self, sequences: Iterable[Sequence]) -> None:
        for metrics in (self._requests[s.request.request_id].metrics for s in sequences):
            if metrics.first_scheduled_time is None:
                metrics.first_scheduled_time = self._clock()

    def _land(self, flight: Flight | None) -> None:
        if flight is None:
            return
        assert flight.pending is not None, "a step lands after it was sampled"
        try:
            result = flight.pending.result()
        except Exception as error:  # noqa: BLE001 - whatever a device raises ends only this step
            self._health.failed(error)
            self.scheduler.kv.failed(flight.plan.transfers)
            self._fail(flight.plan, error)
            return
        finally:
            seconds = self._steps.landed(sum(flight.plan.counts))
        if STATES in result.outputs:
            result.failed |= broken_states(flight.rows, result.outputs[STATES])
        if not result.failed or len(result.failed) < len(flight.rows):
            self._health.succeeded()
        if result.failed:
            self._fail_rows(flight.owners, result.failed)
        self.scheduler.commit(flight.plan, seconds)
        if self._drafts:
            self._accept(flight, result, seconds)
        if STATES in result.outputs:
            for sequence in pooled(flight.owners, flight.rows, result.outputs[STATES]):
                state = self._requests[sequence.request.request_id]
                state.metrics.first_token_time = self._clock()
                self._end(state, "stop")
        else:
            self._take(flight, result)

    def _accept(self, flight: Flight, result: StepResult, seconds: float) -> None:
        """Tell scheduler and speculator of runs of more than one token."""
        runs = flight.runs(result)
        for sequence, run in runs.items():
            if not sequence.finish_reason:
                self.scheduler.accept(sequence, run)
        if self._speculator is not None:
            self._speculator.landed(flight.plan, runs, seconds + flight.idle)
            self._speculator.computed(flight.plan, runs, result, latest=self._flight is None)

    def _take(self, flight: Flight, result: StepResult) -> None:
        """Give every logits row's answer to its sequence and end those that are complete."""
        assert len(result.token_ids) == len(flight.owners), "a token for every row"
        now = self._clock()
        for index, sequence in enumerate(flight.owners):
            token, position = result.token_ids[index], flight.positions[index]
            # It ended while the step was on its way, or with a token before this one of its run.
            if sequence.finish_reason or token == REJECTED:
                continue
            if flight.rows[index].target is not None:
                scores = sequence.prompt_logprobs
                assert scores is not None
                if position == len(scores):  # a preempted one may be scored twice
                    scores.append(result.logprobs[index])
                continue
            # Else the step was on its way when the token was forced.
            if not (sequence.jumps and position < len(sequence.output)):
                state = self._requests[sequence.request.request_id]
                completion = state.completions[sequence.index]
                try:
                    completion.take(token, result.logprobs[index])
                    if sequence.jumps:
                        completion.jump()
                except SlipstreamError as error:  # of the tokenizer, or of the form
                    state.fail(error)
                self._note_change(state, sequence, now)

    def _note_change(self, state: RequestState, sequence: Sequence, now: float) -> None:
        """Note that a sequence has something to tell, and may have ended."""
        self._changed[state] = None
        if state.metrics.first_token_time is None:
            state.metrics.first_token_time = now
        if sequence.finish_reason:
            self.scheduler.finish(sequence)
            if state.finished:
                self._forget(state)

    def _fail_rows(self, owners: list[Sequence], errors: Mapping[int, ExecutionError]) -> None:
        """End the requests of the rows that failed, before anything of theirs is committed, and ask
        the device whether it is to blame."""
        for row, error in errors.items():
            sequence = owners[row]
            if sequence.request.request_id == PROBE:
                self._health.failed(error)
            if not sequence.finish_reason:
                state = self._requests[sequence.request.request_id]
                state.error = error
                self._end(state, "error", spoiled=True)
        if PROBE not in self._requests and self.unhealthy is None:
            self.add_request(probe(PoolingParams() if self._engine.pooling else None))

    def _fail(self, plan: StepPlan, cause: Exception) -> None:
        """End the requests of a failed step; nothing that it computed was committed."""
        for sequence in plan.sequences:
            if not sequence.finish_reason:
                state = self._requests[sequence.request.request_id]
                state.error = step_failed(cause)
                self._end(state, "error")

    def _end(self, state: RequestState, reason: FinishReason, *, spoiled: bool = False) -> None:
        for completion in state.completions:
            sequence = completion.sequence
            if not sequence.finish_reason:
                sequence.finish_reason = reason
                self.scheduler.finish(sequence, spoiled=spoiled)
        self._forget(state)
        self._changed[state] = None

    def _forget(self, state: RequestState) -> None:
        """Note that a request has ended."""
        del self._requests[state.request.request_id]
        self._need_output.discard(state)
        state.metrics.finished_time = self._clock()

    def _settle(self, state: RequestState) -> None:
        """End a request that is to fail, if it has not ended."""
        if not state.finished:
            self._end(state, "error")
            del self._changed[state]
