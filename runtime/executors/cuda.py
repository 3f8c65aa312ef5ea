"""Runs an engine of the ``cuda`` target: captured graphs of our own kernels, one step ahead."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torch import Tensor

from slipstream.builder.engine import GRAPH, TACTICS, WEIGHTS, Engine, Manifest
from slipstream.errors import CapacityError, ExecutionError
from slipstream.plugins.cuda.launch import PDL_TOKENS
from slipstream.plugins.linear.tactics import Tactics
from slipstream.plugins.paged_attention.cuda import DecodeWorkspace, query_block
from slipstream.plugins.sampling import Kind
from slipstream.runtime.config import RuntimeConfig
from slipstream.runtime.executors.cuda_device import Device, Event, Work, require
from slipstream.runtime.executors.cuda_inputs import Blocks, Shape, StepInputs, query_blocks
from slipstream.runtime.executors.cuda_program import CUDAProgram, Memory
from slipstream.runtime.executors.cuda_sampling import (
    CUDASampler,
    PendingSample,
    supports,
    supports_params,
)
from slipstream.runtime.executors.cuda_weights import load_weights
from slipstream.runtime.sampler import Sampler
from slipstream.runtime.sampling_params import SamplingParams
from slipstream.runtime.step import IntArray, SamplingRow, StepBatch, StepResult, TokenLogprobs

log = logging.getLogger(__name__)
# Steps of mixed prefill chunks and decodes up to the last of these are captured, too.
MIXED_TOKENS = (16, 32, 64, 128, 256, 512, 768, 1024, 1536, 2048)
# What cuBLAS, captured graphs and torch's own rounding take beside what is counted.
_RESERVE_BYTES = 512 << 20
# Kinds of sampling that are captured at the start; the others are, when they are first asked for.
PREPARED_KINDS = (Kind.GREEDY, Kind.SAMPLE)
_KV_TYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float8_e4m3fn": torch.float8_e4m3fn,
}


_NO_BLOCKS = Blocks(np.empty(0, np.int32), np.empty(0, np.int32))


def decode_buckets(limit: int) -> list[int]:
    """Batch sizes of captured decode steps: powers of two to 16, then steps of 8, 16 and 32."""
    sizes = [1, 2, 4, 8, 16, *range(24, 64, 8), *range(64, 128, 16), *range(128, 256, 32)]
    sizes += range(256, limit + 64, 64)
    return [*(size for size in sizes if size < limit), limit]


def bucket(count: int, sizes: Sequence[int]) -> int:
    """The smallest of ``sizes`` that holds ``count``."""
    return next(size for size in sizes if size >= count)


@dataclass(slots=True)
class _Pending:
    """A step on its way. ``hosted`` rows are sampled here from their copied logits."""

    executor: CUDAExecutor
    done: Event
    count: int
    rows: Sequence[SamplingRow]
    sampled: PendingSample | None
    sampled_at: Sequence[int]
    hosted: Tensor | None
    hosted_at: Sequence[int]
    hosted_slots: Sequence[int]

    def result(self) -> StepResult:
        """Wait for the device, then answer every row in the order of the batch."""
        try:
            self.done.wait()
            tokens: list[int] = [-1] * self.count
            logprobs: list[TokenLogprobs | None] = [None] * self.count
            if self.sampled is not None:
                part = self.sampled.result([self.rows[i] for i in self.sampled_at])
                _scatter(part, self.sampled_at, tokens, logprobs)
            if self.hosted is not None:
                rows = [self.rows[i] for i in self.hosted_at]
                part = self.executor.sample_on_host(self.hosted, rows, self.hosted_slots)
                _scatter(part, self.hosted_at, tokens, logprobs)
        except RuntimeError as error:
            raise ExecutionError(f"the step failed on the GPU: {error}") from error
        return StepResult(tokens, logprobs)


def _scatter(
    part: StepResult,
    places: Sequence[int],
    tokens: list[int],
    logprobs: list[TokenLogprobs | None],
) -> None:
    for place, token, entry in zip(places, part.token_ids, part.logprobs, strict=True):
        tokens[place], logprobs[place] = token, entry


class CUDAExecutor:
    """The ``Executor`` of an NVIDIA GPU.

    A step is at most three launches that Python pays for: all layers (one captured graph for a
    bucket of decodes or of up to 512 mixed tokens; kernel by kernel above), then norm, head and
    sampling (one graph for a bucket of rows), then the copy of the tokens to the host. Sampled
    tokens stay on the device, from where the next step reads them.
    """

    runs_ahead = True

    def __init__(self, engine: Engine, config: RuntimeConfig) -> None:
        """Put an engine's weights on the GPU.

        Raises EngineMismatchError for a GPU, driver or torch that cannot run it, CapacityError
        when its weights do not fit.
        """
        manifest = engine.manifest
        require(manifest.capability, manifest.command)
        device = Device()
        graph = ir.load(engine.path / GRAPH).graph
        weights = load_weights(engine.path / WEIGHTS, device)
        tactics = Tactics.load(engine.path / TACTICS, device.capability, device.name)
        self._start(manifest, config, device, CUDAProgram(graph, weights, tactics, device.torch))

    @classmethod
    def from_weights(
        cls,
        manifest: Manifest,
        config: RuntimeConfig,
        graph: ir.Graph,
        weights: Mapping[str, Tensor],
        tactics: Path | None = None,
    ) -> CUDAExecutor:
        """An executor of a graph whose weights are on the device already."""
        executor = cls.__new__(cls)
        device = Device()
        table = Tactics.load(tactics, device.capability, device.name)
        program = CUDAProgram(graph, weights, table, device.torch)
        executor._start(manifest, config, device, program)
        return executor

    def _start(
        self, manifest: Manifest, config: RuntimeConfig, device: Device, program: CUDAProgram
    ) -> None:
        model, self._kv, self._config = manifest.model, manifest.kv, config
        self._device, self._program = device, program
        self._heads = int(model["num_heads"])
        self._query_block = query_block(self._heads, self._kv.num_kv_heads)
        self._buckets = decode_buckets(config.max_batch_size)
        self._mixed = [t for t in MIXED_TOKENS if t <= max(config.max_num_tokens, MIXED_TOKENS[0])]
        self._memory: Memory | None = None
        self._graphs: dict[Shape, Work] = {}
        self._samplers: dict[tuple[int, Kind], Work] = {}
        vocab, rows = int(model["vocab_size"]), config.max_batch_size
        self._host_sampler = Sampler(vocab)
        with device.work():
            self._sampler = CUDASampler(rows, rows, vocab, config.max_seq_len, device.torch)
            self._rows = torch.zeros(
                (rows, int(model["hidden_size"])), dtype=program.dtype, device=device.torch
            )
            self._logits = torch.zeros((rows, vocab), device=device.torch)
            self._inputs = StepInputs(
                device,
                self._eager_shape(config.max_num_tokens, rows, rows),
                -(-config.max_seq_len // self._kv.page_size),
            )

    def reserve_kv(self, num_bytes: int | None) -> int:
        """Allocate pages, then capture the graphs that write to them.

        None takes ``kv_cache_free_gpu_memory_fraction`` of what weights and the largest step leave
        free, at most what the limits can use. More than is free shrinks to that, with a message.
        """
        layout, config = self._kv, self._config
        page_bytes = layout.bytes_per_token * layout.page_size
        self._allocate(1)
        free = self._free_after_largest_step() + page_bytes
        fraction = config.kv_cache_free_gpu_memory_fraction
        usable = int(free * fraction) if num_bytes is None else min(num_bytes, free)
        if num_bytes is not None and num_bytes > free:
            log.warning(
                "the KV cache takes %d MiB, not the %d MiB asked for: the GPU has no more free",
                usable >> 20,
                num_bytes >> 20,
            )
        pages = usable // page_bytes
        columns = -(-config.max_seq_len // layout.page_size)
        if num_bytes is None:
            pages = min(pages, columns * config.max_batch_size)
        if pages < 1:
            raise CapacityError(
                f"{usable} bytes of KV cache hold no page; one page takes {page_bytes} bytes: "
                "raise --kv-cache-bytes, lower --max-num-tokens, or free memory on the GPU"
            )
        self._allocate(pages)
        self._capture_all()
        return pages

    def runs_ahead_of(self, params: SamplingParams) -> bool:
        """Whether the device samples such a request by itself."""
        return supports_params(params)

    def submit(self, batch: StepBatch) -> _Pending:
        """Enqueue a step and return at once."""
        with self._device.work():
            ours = [supports(row) for row in batch.sampling]
            at = [i for i, mine in enumerate(ours) if mine]
            hosted_at = [i for i, mine in enumerate(ours) if not mine]
            hidden = self._layers(batch, batch.logits_rows[at], eager=bool(hosted_at))
            hosted = None
            if hosted_at:
                rows = torch.from_numpy(batch.logits_rows[hosted_at].astype(np.int64))
                hosted = hidden.index_select(0, rows.to(self._device.torch))
            sampled = self._sample(batch, at) if at else None
            done = Event(self._device)
            done.record()
        slots = [int(batch.sampling_slots[i]) for i in hosted_at]
        return _Pending(
            self, done, len(batch.sampling), batch.sampling, sampled, at, hosted, hosted_at, slots
        )

    def shutdown(self) -> None:
        """Let go of the graphs and the pages."""
        self._device.synchronize()
        self._graphs.clear()
        self._samplers.clear()
        self._memory = None

    def sample_on_host(
        self, hidden: Tensor, rows: Sequence[SamplingRow], slots: Sequence[int]
    ) -> StepResult:
        """Answer rows ``[L, hidden]`` from logits copied to the host, a batch's worth at a time."""
        result = StepResult([], [])
        size = len(self._logits)
        for start in range(0, len(rows), size):
            part = self._copied_logits(hidden[start : start + size])
            chosen = self._host_sampler.sample(part, rows[start : start + size])
            result.token_ids += chosen.token_ids
            result.logprobs += chosen.logprobs
        kept = [i for i, row in enumerate(rows) if row.target is None]
        if kept:
            with self._device.work():
                self._sampler.set_last_tokens(
                    [slots[i] for i in kept], [result.token_ids[i] for i in kept]
                )
        return result

    def logits(self, batch: StepBatch) -> NDArray[np.float32]:
        """Run a step and return its logits float32 ``[L, vocab]``; nothing is sampled."""
        with self._device.work():
            hidden = self._layers(batch, batch.logits_rows[:0], eager=True)
            rows = torch.from_numpy(batch.logits_rows.astype(np.int64)).to(self._device.torch)
            wanted = hidden.index_select(0, rows)
        size = len(self._logits)
        parts = [self._copied_logits(wanted[i : i + size]) for i in range(0, len(rows), size)]
        return np.concatenate(parts)

    def _copied_logits(self, hidden: Tensor) -> NDArray[np.float32]:
        with self._device.work():
            out = self._logits[: len(hidden)]
            self._program.logits(hidden, out)
            copied: NDArray[np.float32] = out.cpu().numpy().copy()
        return copied

    def _sample(self, batch: StepBatch, at: Sequence[int]) -> PendingSample:
        rows = [batch.sampling[i] for i in at]
        kind, padded = self._sampler.kind(rows), bucket(len(rows), self._buckets)
        slots = [int(slot) for slot in batch.sampling_slots[at]]
        self._sampler.prepare(rows, slots, padded, kind)
        self._sampling(padded, kind)()
        return self._sampler.fetch(len(rows), kind)

    def _layers(self, batch: StepBatch, rows: IntArray, *, eager: bool) -> Tensor:
        """Run all layers; the wanted ``rows`` are then in ``self._rows``. Returns every row."""
        tokens, sequences = len(batch.token_ids), len(batch.context_len)
        decodes = self._num_decodes(batch)
        if not eager and decodes == tokens == len(rows):
            shape = self._decode_shape(bucket(tokens, self._buckets))
            self._inputs.load(batch, shape, _NO_BLOCKS, rows[:0])
        elif not eager and tokens <= self._mixed[-1]:
            shape = self._mixed_shape(bucket(tokens, self._mixed))
            blocks = query_blocks(batch, 0, self._query_block)
            self._inputs.load(batch, shape, blocks, rows)
        else:
            return self._layers_by_kernel(batch, rows, tokens, sequences, decodes)
        self._graphs[shape]()
        return self._rows

    def _layers_by_kernel(
        self, batch: StepBatch, rows: IntArray, tokens: int, sequences: int, decodes: int
    ) -> Tensor:
        blocks = query_blocks(batch, decodes, self._query_block)
        shape = Shape(tokens, sequences, len(blocks.sequence), len(rows))
        self._inputs.load(batch, shape, blocks, rows)
        step = self._inputs.step(shape, decodes, pdl=False)
        assert self._memory is not None
        hidden = self._program.hidden(step, self._memory)
        if len(rows):
            wanted = self._inputs.logits_rows(shape)
            torch.index_select(hidden, 0, wanted, out=self._rows[: len(rows)])
        return hidden

    def _num_decodes(self, batch: StepBatch) -> int:
        """How many sequences, from the first on, compute a single token."""
        longer = np.flatnonzero(np.diff(batch.query_start) != 1)
        return int(longer[0]) if len(longer) else len(batch.context_len)

    def _sampling(self, padded: int, kind: Kind) -> Work:
        """Norm, head and sampling of the first ``padded`` rows, captured on first use."""
        key = (padded, kind)
        if key not in self._samplers:
            self._samplers[key] = self._device.capture(self._sampling_work(padded, kind))
        return self._samplers[key]

    def _sampling_work(self, padded: int, kind: Kind) -> Work:
        rows, logits = self._rows[:padded], self._logits[:padded]
        pdl = self._device.has_pdl and padded <= PDL_TOKENS

        def work() -> None:
            self._program.logits(rows, logits, pdl)
            self._sampler.launch(logits, padded, kind, pdl)

        return work

    def _decode_shape(self, size: int) -> Shape:
        return Shape(size, size)

    def _mixed_shape(self, tokens: int) -> Shape:
        return self._eager_shape(tokens, min(tokens, self._config.max_batch_size), None)

    def _eager_shape(self, tokens: int, sequences: int, rows: int | None) -> Shape:
        """Every sequence may end in a block that is not full."""
        blocks = tokens // self._query_block + sequences
        return Shape(tokens, sequences, blocks, sequences if rows is None else rows)

    def _allocate(self, pages: int) -> None:
        layout, config = self._kv, self._config
        self._graphs.clear()
        self._samplers.clear()
        self._memory = None  # before the new ones, so that both need not fit
        shape = (layout.num_layers, pages, 2, layout.num_kv_heads)
        with self._device.work():
            self._memory = Memory(
                torch.zeros(
                    (*shape, layout.page_size * layout.head_dim),
                    dtype=_KV_TYPES[layout.dtype],
                    device=self._device.torch,
                ),
                self._sampler.last_tokens,
                DecodeWorkspace.allocate(
                    config.max_batch_size,
                    self._heads,
                    layout.head_dim,
                    config.max_seq_len,
                    self._device.torch,
                ),
            )

    def _free_after_largest_step(self) -> int:
        """Bytes left when the largest step runs, measured by running one of padding."""
        device = self._device
        if not device.is_cuda:
            return device.free_memory()
        layers, samplers = self._works()
        device.compile([*layers.values(), *samplers.values(), self._largest_step])
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        try:
            with device.work():
                self._largest_step()
            device.synchronize()
        except torch.OutOfMemoryError as error:
            raise CapacityError(
                f"a step of {self._config.max_num_tokens} tokens does not fit in the GPU's memory "
                "beside the weights; lower --max-num-tokens or --max-batch-size"
            ) from error
        peak = torch.cuda.max_memory_allocated() - before
        return device.free_memory() - peak - _RESERVE_BYTES

    def _largest_step(self) -> None:
        rows = self._config.max_batch_size
        shape = self._eager_shape(self._config.max_num_tokens, rows, rows)
        assert self._memory is not None
        self._inputs.clear()
        step = self._inputs.step(shape, 0, pdl=False)
        self._program.hidden(step, self._memory)
        self._program.logits(self._rows, self._logits)

    def _works(self) -> tuple[dict[Shape, Work], dict[tuple[int, Kind], Work]]:
        """What is captured at the start: the layers of all shapes, and the usual sampling."""
        shapes = {self._decode_shape(size): size for size in self._buckets}
        shapes |= {self._mixed_shape(tokens): 0 for tokens in self._mixed}
        layers = {shape: self._layers_work(shape, decodes) for shape, decodes in shapes.items()}
        keys = [(size, kind) for size in self._buckets for kind in PREPARED_KINDS]
        return layers, {key: self._sampling_work(*key) for key in keys}

    def _capture_all(self) -> None:
        layers, samplers = self._works()
        with self._device.work():
            self._inputs.clear()
        for shape, work in layers.items():
            self._graphs[shape] = self._device.capture(work)
        for key, work in samplers.items():
            self._samplers[key] = self._device.capture(work)
        self._device.synchronize()

    def _layers_work(self, shape: Shape, num_decodes: int) -> Work:
        """All layers of a shape; ``num_decodes`` is all of its tokens, or 0."""
        assert self._memory is not None
        memory = self._memory
        pdl = self._device.has_pdl and shape.tokens <= PDL_TOKENS
        step = self._inputs.step(shape, num_decodes, pdl=pdl)
        wanted = self._inputs.logits_rows(shape)

        def decode() -> None:
            self._program.hidden(step, memory, out=self._rows[: shape.tokens])

        def mixed() -> None:
            hidden = self._program.hidden(step, memory)
            torch.index_select(hidden, 0, wanted, out=self._rows[: shape.rows])

        return decode if num_decodes else mixed
