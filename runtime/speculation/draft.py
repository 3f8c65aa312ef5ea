"""Guesses of a smaller model with the same tokenizer."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from slipstream.builder.contract import states
from slipstream.builder.engine import is_engine, open_engine
from slipstream.errors import EngineMismatchError, InvalidRequestError
from slipstream.runtime.engine.batch import BatchBuilder
from slipstream.runtime.engine.cache_groups import kv_cache_manager
from slipstream.runtime.engine.plan import StepPlan
from slipstream.runtime.engine.sequence import Sequence as Running
from slipstream.runtime.executors.base import PendingStep
from slipstream.runtime.loaded_engine import LoadedEngine
from slipstream.runtime.loading import load
from slipstream.runtime.request import Request
from slipstream.runtime.sampling.params import SamplingParams
from slipstream.runtime.speculation.proposer import Context

# Of the memory that both models leave free on a GPU: a token takes less of a smaller one.
_GPU_SHARE = 0.2
_GREEDY = SamplingParams(temperature=0, ignore_eos=True)


def draft_proposer(engine: LoadedEngine) -> DraftProposer:
    """What the draft model of an engine's configuration says.

    Raises ``InvalidRequestError`` where it names none, and ``EngineMismatchError`` for one that
    cannot guess for this engine.
    """
    config = engine.config
    if config.speculative_model is None:
        raise InvalidRequestError(
            "speculative is 'draft', which needs speculative_model, a smaller model's engine",
            param="speculative_model",
        )
    return DraftProposer(engine, load(config.speculative_model, _options(engine)))


def _options(engine: LoadedEngine) -> dict[str, Any]:
    """With which the draft model of an engine is loaded, or built for the same target."""
    config, model = engine.config, Path(engine.config.speculative_model or "")
    options: dict[str, Any] = {"enable_prefix_caching": False, "num_threads": config.num_threads}
    target = None if engine.engine is None else engine.engine.manifest.target
    if is_engine(model):
        target = open_engine(model).manifest.target
    elif target is not None:
        options["target"] = target
    if target == "cuda":
        options["kv_cache_free_gpu_memory_fraction"] = _GPU_SHARE
    return options


class DraftProposer:
    """Runs a draft model, greedily, on what sequences have said; its pages are its own.

    What it has computed of a sequence stays until that ends, and is computed again from the first
    token on that came otherwise. Where pages or rows are short, who was asked for longest ago loses
    them.
    """

    def __init__(self, engine: LoadedEngine, draft: LoadedEngine) -> None:
        """``draft`` guesses for ``engine``; raises ``EngineMismatchError`` where it cannot."""
        _check(engine, draft)
        config = self._config = draft.config
        self._vocab_size = draft.vocab_size
        self._executor = draft.executor
        num_pages = draft.executor.reserve_kv(config.kv_cache_bytes)
        self._kv = kv_cache_manager(config, num_pages, draft.caches)
        self._builder = BatchBuilder(config, draft.caches)
        self._rows = list(range(config.max_batch_size - 1, -1, -1))
        # Those that have pages, who was asked for longest ago first.
        self._running: dict[Context, Running] = {}

    def propose(self, contexts: Sequence[Context], most: int) -> list[list[int]]:
        """What the model says next, where there is room; most likely first, nothing drawn."""
        followed = [self._follow(context, most, contexts) for context in contexts]
        asked = [sequence for sequence in followed if sequence is not None]
        ends = {sequence: len(sequence.tokens) + most for sequence in asked}
        started: deque[tuple[PendingStep, list[Running]]] = deque()
        while asked:
            started.append(self._start(asked))
            if len(started) > self._executor.runs_ahead:
                _land(*started.popleft())
            asked = [each for each in asked if each.num_tokens < ends[each]]
        for step in started:
            _land(*step)
        return [[] if each is None else each.tokens[-most:] for each in followed]

    def finish(self, context: Context) -> None:
        """Give its pages back."""
        sequence = self._running.pop(context, None)
        if sequence is not None:
            assert sequence.allocation is not None
            self._kv.release(sequence.allocation)
            self._rows.append(sequence.row)

    def shutdown(self) -> None:
        """Free the model's device, or end its ranks."""
        self._executor.shutdown()

    def _follow(self, context: Context, most: int, asked: Sequence[Context]) -> Running | None:
        """A sequence that has a context's tokens, and room for ``most`` more; None if there is
        none."""
        sequence = self._running.pop(context, None) or self._begin(context, asked)
        if sequence is None:
            return None
        self._running[context] = sequence
        tokens, known = context.tokens, context.state
        if max(tokens[known:], default=0) >= self._vocab_size:
            return None
        end = len(tokens) + most
        if end > self._config.max_seq_len or not self._grow(sequence, end, asked):
            return None
        _go_back(sequence, tokens, known)
        context.state = len(tokens)
        return sequence

    def _begin(self, context: Context, asked: Sequence[Context]) -> Running | None:
        if not self._rows and not self._evict(asked):
            return None
        prompt = list(context.tokens)
        sequence = Running(Request("draft", prompt, _GREEDY), 0, (0, 0, 0), len(prompt), seed=0)
        sequence.allocation = self._kv.allocate(self._kv.no_match(), 0)
        sequence.row, context.state = self._rows.pop(), 0
        return sequence

    def _grow(self, sequence: Running, num_tokens: int, asked: Sequence[Context]) -> bool:
        assert sequence.allocation is not None
        while not self._kv.grow(sequence.allocation, num_tokens):
            if not self._evict(asked):
                return False
        return True

    def _evict(self, asked: Sequence[Context]) -> bool:
        """Take the pages of one that is not ``asked`` for."""
        victim = next((each for each in self._running if each not in asked), None)
        if victim is not None:
            self.finish(victim)
        return victim is not None

    def _start(self, sequences: Sequence[Running]) -> tuple[PendingStep, list[Running]]:
        """Compute what is left of each, and the next token of those that are complete then, to
        which the answers will belong."""
        plan, budget = StepPlan(), self._config.max_num_tokens
        for sequence in sequences:
            if count := min(sequence.num_left, budget):
                plan.add(sequence, count)
                budget -= count
        plan.drafts = [0] * len(plan.sequences)
        batch, owners, _ = self._builder.build(plan)
        return self._executor.submit(batch).sample(), owners


def _land(step: PendingStep, owners: Sequence[Running]) -> None:
    for sequence, token in zip(owners, step.result().token_ids, strict=True):
        sequence.append(token)


def _go_back(sequence: Running, tokens: Sequence[int], known: int) -> None:
    """Make what a sequence knows ``tokens``, of which it knew so many; what it has computed of
    others counts no more."""
    ours, agreed = sequence.tokens, max(known, sequence.prompt_len)
    most = min(len(ours), len(tokens))
    while agreed < most and ours[agreed] == tokens[agreed]:
        agreed += 1
    ours[agreed:] = tokens[agreed:]
    sequence.output[agreed - sequence.prompt_len :] = tokens[agreed:]
    sequence.num_scheduled = min(sequence.num_scheduled, agreed, len(tokens) - 1)


def _check(engine: LoadedEngine, draft: LoadedEngine) -> None:
    reason = None
    if draft.tokenizer.vocabulary != engine.tokenizer.vocabulary:
        reason = "its tokenizer is another one"
    elif draft.pooling is not None:
        reason = "it makes no text"
    elif draft.executor.runs_ahead != engine.executor.runs_ahead:
        reason = "it is for another device"
    elif states(draft.caches) or any(cache.window for cache in draft.caches):
        reason = "it keeps states, or windows of tokens, of which none can be taken back"
    if reason is not None:
        raise EngineMismatchError(
            f"speculative_model {engine.config.speculative_model} cannot guess for this engine: "
            f"{reason}. Name another, or leave speculative off"
        )
