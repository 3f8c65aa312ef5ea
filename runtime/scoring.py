"""What an engine predicts at every position of given texts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from slipstream.builder.contract import CacheSpec, paged
from slipstream.errors import CapacityError, EngineMismatchError, InvalidRequestError
from slipstream.runtime.engine.cache_groups import window_pages
from slipstream.runtime.engine.step import IntArray, PagedInputs, StepBatch
from slipstream.runtime.executors.base import ScoringExecutor
from slipstream.runtime.loaded_engine import LoadedEngine
from slipstream.runtime.pooling import no_text

# Logits of one step; a large vocabulary makes steps of fewer tokens.
_LOGITS_BYTES = 128 << 20
_NONE = np.empty(0, np.int32)


def window_logits(
    engine: LoadedEngine, windows: Sequence[IntArray]
) -> Iterator[NDArray[np.float32]]:
    """The logits of every token of each window, on its own from position 0, in blocks float32
    ``[rows, vocab]``.

    Windows run one after the other in chunks of at most ``max_num_tokens``, over the engine's own
    KV pages, which are reserved anew: the engine must not be serving. Raises InvalidRequestError
    for windows longer than ``max_seq_len``, CapacityError when the pages do not hold one,
    EngineMismatchError when the device shows no logits, and ExecutionError when it fails.
    """
    executor, config = engine.executor, engine.config
    if engine.pooling is not None:
        raise EngineMismatchError(f"{no_text(engine.pooling)}, so there is nothing to measure")
    if not isinstance(executor, ScoringExecutor):
        raise EngineMismatchError(
            f"{type(executor).__name__} does not show logits, so this engine cannot be measured; "
            "build the checkpoint for the target cpu or cuda and measure that engine"
        )
    longest = max(map(len, windows), default=0)
    if longest > config.max_seq_len:
        raise InvalidRequestError(
            f"windows have up to {longest} tokens, but max_seq_len is {config.max_seq_len}; use "
            "shorter windows or build the engine with a larger --max-seq-len"
        )
    pages = executor.reserve_kv(config.kv_cache_bytes)
    if pages * config.page_size < longest:
        raise CapacityError(
            f"the KV cache holds {pages * config.page_size} tokens, a window has {longest}; raise "
            "--kv-cache-bytes or use shorter windows"
        )
    held = {
        cache: window_pages(cache.window, pages, config) if cache.window else pages
        for cache in paged(engine.caches)
    }
    rows = min(config.max_num_tokens, max(1, _LOGITS_BYTES // (4 * engine.vocab_size)))
    for window in windows:
        for start in range(0, len(window), rows):
            yield executor.logits(_chunk(window[start : start + rows], start, held))


def _chunk(tokens: IntArray, start: int, held: Mapping[CacheSpec, int]) -> StepBatch:
    """A step of one sequence, all logits wanted; ``held`` says how many pages it takes in turn of
    each cache."""
    end = start + len(tokens)
    positions = np.arange(start, end, dtype=np.int32)
    return StepBatch(
        token_ids=np.ascontiguousarray(tokens, np.int32),
        positions=positions,
        query_start=np.array([0, len(tokens)], np.int32),
        context_len=np.array([end], np.int32),
        logits_rows=np.arange(len(tokens), dtype=np.int32),
        sampling=[],
        slots=np.zeros(1, np.int32),
        sampling_slots=_NONE,
        pages={cache.name: _inputs(cache, held[cache], positions) for cache in held},
    )


def _inputs(cache: CacheSpec, held: int, positions: IntArray) -> PagedInputs:
    table = np.arange(positions[-1] // cache.page_size + 1, dtype=np.int32) % held
    page, offset = np.divmod(positions, np.int32(cache.page_size))
    return PagedInputs(table[None], table[page] * np.int32(cache.page_size) + offset)
