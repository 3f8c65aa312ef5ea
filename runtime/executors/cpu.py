"""Runs an engine of the ``cpu`` target: one ONNX Runtime session, one run a step."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from slipstream.builder.engine import GRAPH, Engine
from slipstream.errors import CapacityError, EngineMismatchError, ExecutionError
from slipstream.plugins import library
from slipstream.runtime.config import RuntimeConfig
from slipstream.runtime.engine.kv_cache import Move
from slipstream.runtime.engine.step import StepBatch, StepResult
from slipstream.runtime.sampling.params import SamplingParams
from slipstream.runtime.sampling.sampler import Sampler

STEP_INPUTS = (
    "token_ids",
    "positions",
    "query_start",
    "context_len",
    "page_table",
    "slot_mapping",
    "logits_rows",
)
# What KV pages take when nobody says: enough for a desk, well under what a laptop has.
DEFAULT_KV_BYTES = 4 << 30
_CACHE_LINE = 64
_ONNX_FLOAT8 = 17  # TensorProto.FLOAT8E4M3FN, which NumPy has no type for
_CACHED_BINDINGS = 64


class _Binding:
    """A session's inputs and outputs for steps of one shape, bound to arrays that steps write."""

    def __init__(
        self,
        session: ort.InferenceSession,
        batch: StepBatch,
        kv: dict[str, ort.OrtValue],
        logits: NDArray[np.float32],
    ) -> None:
        self.io = session.io_binding()
        self.inputs = tuple(np.empty_like(getattr(batch, name)) for name in STEP_INPUTS)
        self.logits = logits
        for name, array in zip(STEP_INPUTS, self.inputs, strict=True):
            self.io.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(array))
        for name, value in kv.items():
            self.io.bind_ortvalue_input(name, value)
        self.io.bind_ortvalue_output("logits", ort.OrtValue.ortvalue_from_numpy(logits))

    def write(self, batch: StepBatch) -> None:
        """Copy a step of this shape into the bound arrays."""
        for name, array in zip(STEP_INPUTS, self.inputs, strict=True):
            np.copyto(array, getattr(batch, name))


@dataclass(slots=True)
class _Pending:
    """A step whose inputs are in place. The session runs when the result is asked for."""

    run: Callable[[Any], None]
    binding: _Binding
    batch: StepBatch
    sampler: Sampler

    def result(self) -> StepResult:
        return self.sampler.sample(self.logits(), self.batch.sampling)

    def logits(self) -> NDArray[np.float32]:
        try:
            self.run(self.binding.io)
        except Exception as error:
            raise ExecutionError(f"the step failed in onnxruntime: {error}") from error
        return self.binding.logits


class CPUExecutor:
    """The ``Executor`` of the CPU.

    ``config.num_threads`` None takes every core this process may use. The session runs in the
    caller's thread: the device is made of the cores that would do the bookkeeping meanwhile, and
    handing a step to a thread of its own cost as much as it hid (and up to the interpreter's
    switch interval of 5 ms when other threads were busy).
    """

    def __init__(self, engine: Engine, config: RuntimeConfig) -> None:
        vocab = int(engine.manifest.model["vocab_size"])
        self._kv_layout = engine.manifest.kv
        self._full_kv_bytes = (
            self._kv_layout.bytes_per_token * config.max_seq_len * config.max_batch_size
        )
        self._kv: dict[str, ort.OrtValue] = {}
        self._kv_arrays: list[NDArray[Any]] = []
        self._bindings: dict[tuple[int, ...], _Binding] = {}
        self._logits = np.empty((config.max_batch_size, vocab), np.float32)
        self._sampler = Sampler(vocab)
        self._session = _create_session(engine, config.num_threads or len(os.sched_getaffinity(0)))

    def reserve_kv(self, num_bytes: int | None) -> int:
        """Allocate pages within ``num_bytes``; None takes what the limits can use, at most 4 GiB
        and half of what is free. Pages cost memory when they are first written. CapacityError when
        not even one page fits."""
        layout = self._kv_layout
        if num_bytes is None:
            num_bytes = min(self._full_kv_bytes, DEFAULT_KV_BYTES, _available_memory() // 2)
        page_bytes = layout.bytes_per_token * layout.page_size
        pages = num_bytes // page_bytes
        if pages < 1:
            raise CapacityError(
                f"{num_bytes} bytes of KV cache hold no page; one page takes {page_bytes} bytes: "
                f"raise --kv-cache-bytes"
            )
        shape = (layout.num_layers, pages, 2, layout.num_kv_heads)
        float8 = layout.dtype == "float8_e4m3fn"
        dtype = "uint8" if float8 else layout.dtype
        arrays: dict[str, NDArray[Any]] = {
            "kv_cache": _aligned_zeros((*shape, layout.page_size * layout.head_dim), dtype)
        }
        if layout.dtype == "int8":
            arrays["kv_scales"] = _aligned_zeros((*shape, layout.page_size), "float32")
        self._bindings.clear()
        self._kv_arrays = list(arrays.values())
        self._kv = {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in arrays.items()}
        if float8:
            typed = ort.OrtValue.ortvalue_from_numpy_with_onnx_type
            self._kv["kv_cache"] = typed(arrays["kv_cache"], _ONNX_FLOAT8)
        return pages

    @property
    def runs_ahead(self) -> bool:
        """Never: a step is computed when its result is asked for."""
        return False

    def runs_ahead_of(self, params: SamplingParams) -> bool:
        """Never."""
        return False

    @property
    def draft_tokens(self) -> int:
        """None."""
        return 0

    def submit(self, batch: StepBatch) -> _Pending:
        """Put a step's inputs in place."""
        self._move_pages(batch.moves)
        binding = self._binding(batch)
        binding.write(batch)
        return _Pending(self._session.run_with_iobinding, binding, batch, self._sampler)

    def logits(self, batch: StepBatch) -> NDArray[np.float32]:
        """Run a step and return its logits float32 ``[L, vocab]``; nothing is sampled."""
        return self.submit(batch).logits().copy()

    def shutdown(self) -> None:
        """Let go of the pages."""
        self._bindings.clear()
        self._kv.clear()
        self._kv_arrays.clear()

    def _move_pages(self, moves: Sequence[Move]) -> None:
        for move in moves:
            for array in self._kv_arrays:
                array[:, move.destination] = array[:, move.source]

    def _binding(self, batch: StepBatch) -> _Binding:
        key = (len(batch.token_ids), *batch.page_table.shape, len(batch.logits_rows))
        binding = self._bindings.get(key)
        if binding is None:
            rows, (capacity, vocab) = len(batch.logits_rows), self._logits.shape
            # More rows than sequences are prompt logprobs: rare and large, so not kept.
            large = rows > capacity
            logits = np.empty((rows, vocab), np.float32) if large else self._logits[:rows]
            binding = _Binding(self._session, batch, self._kv, logits)
            if not large:
                if len(self._bindings) >= _CACHED_BINDINGS:
                    self._bindings.pop(next(iter(self._bindings)))
                self._bindings[key] = binding
        return binding


def _create_session(engine: Engine, num_threads: int) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.register_custom_ops_library(library.path())
    library.load().slipstream_set_threads(num_threads)
    options.intra_op_num_threads = num_threads
    options.inter_op_num_threads = 1
    # The builder has fused what there is to fuse, and every step may have another shape.
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.enable_mem_pattern = False
    options.log_severity_level = 3
    options.add_session_config_entry("session.dynamic_block_base", "4")
    try:
        return ort.InferenceSession(
            str(engine.path / GRAPH), options, providers=["CPUExecutionProvider"]
        )
    except Exception as error:
        raise EngineMismatchError(
            f"onnxruntime {ort.__version__} refuses the graph of {engine.path} ({error}); build it "
            f"again: "
            f"{engine.manifest.command}"
        ) from error


def _aligned_zeros(shape: tuple[int, ...], dtype: str) -> NDArray[Any]:
    """Zeros whose first byte starts a cache line, so that no vector of a page straddles two."""
    size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
    buffer = np.zeros(size + _CACHE_LINE, np.uint8)
    start = -buffer.ctypes.data % _CACHE_LINE
    return buffer[start : start + size].view(dtype).reshape(shape)


def _available_memory() -> int:
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
