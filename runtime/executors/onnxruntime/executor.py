"""Runs an engine of the ``onnxruntime`` target: a session of the CPU's or the CUDA provider."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slipstream.builder.contract import (
    LOGITS,
    STATES,
    TARGET_GRAPH,
    TOP_LOGIT,
    TOP_TOKEN,
    CacheSpec,
    Source,
    paged,
)
from slipstream.builder.engine import WEIGHTS, Engine
from slipstream.errors import CapacityError, EngineMismatchError
from slipstream.runtime.config import RuntimeConfig
from slipstream.runtime.engine.cache_groups import window_pages
from slipstream.runtime.engine.kv_cache import Move
from slipstream.runtime.engine.step import SamplingRow, StepBatch, StepResult, reject
from slipstream.runtime.executors.cpu import DEFAULT_KV_BYTES, MAX_DRAFTS, useful_threads
from slipstream.runtime.executors.onnxruntime.memory import (
    Buffer,
    CUDAMemory,
    HostMemory,
    Memory,
)
from slipstream.runtime.executors.onnxruntime.provider import CUDA
from slipstream.runtime.executors.onnxruntime.runs import Run, Runs, SlotRuns, whole_steps
from slipstream.runtime.executors.onnxruntime.session import (
    StepSession,
    check_ports,
    create_session,
)
from slipstream.runtime.sampling.logits_processors import edits_logits
from slipstream.runtime.sampling.sampler import Sampler, likeliest
from slipstream.runtime.speculation.proposer import OFF

# What the provider's kernels take beside weights and pages while a step runs.
_RESERVE_BYTES = 1 << 30


@dataclass(slots=True)
class _Pending:
    """A step whose runs are planned. The session runs when the result is asked for."""

    executor: ONNXRuntimeExecutor
    batch: StepBatch
    runs: list[Run]

    def sample(self) -> _Pending:
        """Only ask what forms allow: rows are edited and sampled when the logits are there."""
        self.executor.sampler.constrain(self.batch.sampling)
        return self

    def result(self) -> StepResult:
        rows = self.batch.sampling
        if STATES in self.batch.outputs:
            states = self.executor.gather(self.runs, STATES)
            return StepResult([-1] * len(rows), [None] * len(rows), {STATES: states})
        if self.executor.picks_on_device and all(map(_is_plain, rows)):
            return self._best_tokens()
        return self.executor.sampler.sample(self.executor.gather(self.runs, LOGITS), rows)

    def _best_tokens(self) -> StepResult:
        """What the graph found to be the best token of each row: no logits leave the device."""
        tokens, peaks = self.executor.gather_all(self.runs, (TOP_TOKEN, TOP_LOGIT))
        result = likeliest((tokens.tolist(), peaks.tolist()))
        reject(self.batch.sampling, result)
        return result


class ONNXRuntimeExecutor:
    """The ``Executor`` of ONNX Runtime's own operators.

    Nothing of torch or Triton is loaded. A session works in the caller's thread until the device is
    done, so no step runs ahead.
    """

    runs_ahead = False
    draft_tokens = 0
    max_drafts = MAX_DRAFTS

    def __init__(self, engine: Engine, config: RuntimeConfig) -> None:
        """Load an engine. The machine has been checked (``provider.require``).

        Raises EngineMismatchError for a provider that does not load, a graph that this release
        refuses, and ``config.deterministic``.
        """
        manifest = engine.manifest
        if config.deterministic:
            raise EngineMismatchError(
                f"the engine in {engine.path} multiplies with onnxruntime's kernels, whose bits "
                "depend on the number of tokens in a step: for --deterministic build it for another"
                f" target; it was built by {manifest.command}"
            )
        self._config, self._caches = config, paged(manifest.caches)
        spec = manifest.graphs[TARGET_GRAPH]
        # Where no page table goes in, a page is a slot of the buffers that are bound.
        self._has_slots = all(port.source is not Source.PAGE_TABLE for port in spec.inputs)
        file = engine.path / WEIGHTS
        weight_bytes = file.stat().st_size if file.exists() else 0
        threads = config.num_threads or useful_threads(weight_bytes, manifest.caches)
        rows = config.max_batch_size * (1 + MAX_DRAFTS * (config.speculative != OFF))
        session, provider, self._captures = create_session(
            engine, spec, threads, rows=rows, capture=self._has_slots
        )
        check_ports(engine, spec, session)
        self.sampler = Sampler(manifest.vocab_size, threads)
        self.picks_on_device = provider == CUDA and spec.output(TOP_TOKEN) is not None
        self._memory: Memory = CUDAMemory() if provider == CUDA else HostMemory()
        self._session = StepSession(session, spec, self._memory, config.max_num_tokens, rows)
        self._spec = spec
        self._runs: Runs = whole_steps(spec)
        self._arrays: dict[str, list[Buffer]] = {}

    def reserve_kv(self, num_bytes: int | None) -> int:
        """Allocate pages, or a slot for each of as many sequences, within ``num_bytes`` and no more
        than the limits can use; None takes, on a CPU, at most 4 GiB and half of what is free, and
        on a GPU ``kv_cache_free_gpu_memory_fraction`` of it. CapacityError if not even one fits."""
        config, page_bytes = self._config, self._bytes_of(1)
        columns = -(-config.max_seq_len // config.page_size)
        most = config.max_batch_size * columns
        budget = self._default_bytes() if num_bytes is None else num_bytes
        count = min(most, budget // page_bytes)
        if count < 1:
            what = "slot of a sequence" if self._has_slots else "page"
            raise CapacityError(
                f"{budget} bytes of KV cache hold no {what}; one takes {page_bytes} bytes: raise "
                "--kv-cache-bytes, or lower --max-seq-len when the engine is built"
            )
        self.shutdown()
        try:
            self._allocate(count)
        except (MemoryError, ValueError, RuntimeError) as error:
            self.shutdown()
            raise CapacityError(
                f"{count * page_bytes} bytes of KV cache cannot be had ({error}): lower "
                "--kv-cache-bytes"
            ) from error
        self._runs = self._planner(count)
        return count

    def submit(self, batch: StepBatch) -> _Pending:
        """Move pages and plan the runs of a step."""
        self._move_pages(batch.moves)
        return _Pending(self, batch, self._runs(batch))

    def logits(self, batch: StepBatch) -> NDArray[np.float32]:
        """Run a step and return its logits float32 ``[L, vocab]``; nothing is sampled."""
        return self.gather(self.submit(batch).runs, LOGITS)

    def gather(self, runs: Sequence[Run], name: str) -> NDArray[Any]:
        """An output of a step, its rows in the order of the step."""
        return self.gather_all(runs, (name,))[0]

    def gather_all(self, runs: Sequence[Run], names: Sequence[str]) -> list[NDArray[Any]]:
        """Outputs of a step, in rows of its order."""
        parts: list[list[NDArray[Any]]] = []
        for run in runs:
            outputs = self._session.run(run)
            read = [self._session.read(outputs[name], run.num_rows) for name in names]
            if run.rows is not None:
                read = [rows[run.rows] for rows in read]
            parts.append([rows.copy() for rows in read])
        if len(parts) == 1:
            return parts[0]
        order = np.argsort(np.concatenate([run.order for run in runs]))
        return [np.concatenate(rows)[order] for rows in zip(*parts, strict=True)]

    def shutdown(self) -> None:
        """Let go of the pages."""
        self._session.bind({})
        self._arrays.clear()

    def _planner(self, count: int) -> Runs:
        """How steps are cut on ``count`` pages or slots; widths to capture are run here first."""
        if not self._has_slots:
            return whole_steps(self._spec)
        cache = self._caches[0]
        runs = SlotRuns(cache.name, count, cache.page_size, captures=self._captures)
        for width in runs.buckets:
            for _ in range(2):  # the provider captures what has run before
                self._session.run(runs.padding(width))
        return runs

    def _default_bytes(self) -> int:
        free = self._memory.free_bytes()
        if self._memory.device == "cpu":
            return min(DEFAULT_KV_BYTES, free // 2)
        fraction = self._config.kv_cache_free_gpu_memory_fraction
        return int(max(free - _RESERVE_BYTES, 0) * fraction)

    def _count(self, cache: CacheSpec, pages: int) -> int:
        """How many pages a cache has where those that remember every token have ``pages``."""
        return window_pages(cache.window, pages, self._config) if cache.window else pages

    def _bytes_of(self, pages: int) -> int:
        return sum(cache.bytes_per_page * self._count(cache, pages) for cache in self._caches)

    def _allocate(self, pages: int) -> None:
        """Every layer's arrays by the names of their ports."""
        ports: dict[str, Buffer] = {}
        for cache in self._caches:
            for array in cache.arrays:
                shape = (self._count(cache, pages), *array.shape)
                for layer in range(len(cache.layers)):
                    buffer = self._memory.zeros(shape, array.dtype)
                    ports[f"{array.name}.{layer}"] = buffer
                    self._arrays.setdefault(cache.name, []).append(buffer)
        self._session.bind(ports)

    def _move_pages(self, moves: Sequence[Move]) -> None:
        for move in moves:
            for buffer in self._arrays[move.cache]:
                self._memory.copy_row(buffer, move.source, move.destination)


def _is_plain(row: SamplingRow) -> bool:
    """Whether a row wants the best token and nothing else."""
    params = row.params
    scored = row.target is not None or params.logprobs is not None
    return params.greedy and not scored and row.constraint is None and not edits_logits(row)
