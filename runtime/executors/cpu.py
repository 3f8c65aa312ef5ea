"""Runs an engine of the ``cpu`` target: an ONNX Runtime session a graph, one run a step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from slipstream.builder.contract import (
    LOGITS,
    CacheArray,
    CacheSpec,
    GraphSpec,
    Output,
    bytes_per_token,
    paged,
    states,
)
from slipstream.builder.engine import WEIGHTS, Engine, weight_file
from slipstream.cores import usable_cores
from slipstream.errors import CapacityError, EngineMismatchError, ExecutionError
from slipstream.plugins import library
from slipstream.runtime.config import RuntimeConfig
from slipstream.runtime.engine.kv_cache import Move
from slipstream.runtime.engine.step import StepBatch, StepResult
from slipstream.runtime.executors.cpu_binding import Arrays, Binding, Graph
from slipstream.runtime.executors.host_slots import CPUHost
from slipstream.runtime.executors.page_memory import (
    PageMemory,
    free_bytes,
    give_back,
    whole_regions,
)
from slipstream.runtime.sampling.sampler import Sampler
from slipstream.runtime.speculation.proposer import OFF

# What KV pages take when nobody says: enough for a desk, well under what a laptop has.
DEFAULT_KV_BYTES = 4 << 30
_ONNX_FLOAT8 = 17  # TensorProto.FLOAT8E4M3FN, which NumPy has no type for
_CACHED_BINDINGS = 64
MAX_DRAFTS = 7
_PRODUCTS = 4  # of a layer that each wait for the one before: q/k/v, o, gate/up and down
_LEAST_SHARE = 100_000  # bytes
# Kernels of onnxruntime that add up in an order which depends on the number of rows.
_BY_ROWS = ("Gemm", "MatMul", "MatMulNBits")
# Element types as ONNX Runtime spells them.
_ORT_TYPES = {
    "float32": "float",
    "float16": "float16",
    "bfloat16": "bfloat16",
    "float8_e4m3fn": "float8e4m3fn",
    "int8": "int8",
    "uint8": "uint8",
    "int32": "int32",
}
_Kind = tuple[str, tuple[int | str | None, ...]]


@dataclass(slots=True)
class _Pending:
    """A step whose inputs are in place. The session runs when the result is asked for."""

    binding: Binding
    batch: StepBatch
    sampler: Sampler

    def sample(self) -> _Pending:
        """Only ask what forms allow: rows are edited and sampled when the logits are there."""
        self.sampler.constrain(self.batch.sampling)
        return self

    def result(self) -> StepResult:
        return self.sampler.result(self.outputs(), self.batch)

    def outputs(self) -> Arrays:
        try:
            self.binding.run(self.binding.io)
        except Exception as error:
            raise ExecutionError(f"the step failed in onnxruntime: {error}") from error
        return self.binding.outputs


class CPUExecutor(CPUHost):
    """The ``Executor`` of the CPU.

    ``rank`` is whose weights it runs, of an engine of several ranks, which the thread that runs it
    has joined. ``config.num_threads`` None takes ``useful_threads``. The session runs in the
    caller's thread: the device is made of the cores that would do the bookkeeping meanwhile, and
    handing a step to a thread of its own cost as much as it hid (and up to the interpreter's
    switch interval of 5 ms when other threads were busy).
    """

    runs_ahead = False  # a step is computed when its result is asked for
    draft_tokens = 0
    max_drafts = MAX_DRAFTS  # as many as ``auto`` may choose from; a step has room for more

    def __init__(self, engine: Engine, config: RuntimeConfig, rank: int = 0) -> None:
        manifest = engine.manifest
        self._config = config
        self._cache_specs = manifest.caches
        self._caches: dict[str, ort.OrtValue] = {}
        # What the values above are views of, by cache.
        self._arrays: dict[str, list[NDArray[Any]]] = {}
        self._memory: dict[str, list[PageMemory]] = {}
        self._used: dict[str, NDArray[Any]] = {}  # the last page table of a cache
        super().__init__(manifest.caches, self._arrays, engine.fingerprint)
        self._bindings: dict[tuple[object, ...], Binding] = {}
        rows = config.max_batch_size
        if config.speculative != OFF:
            rows = min(rows * (1 + MAX_DRAFTS), config.max_num_tokens)
        self._logits = np.empty((rows, manifest.vocab_size), np.float32)
        # Mapped here, and for as long as sessions read it, because onnxruntime follows no link out
        # of the engine's directory.
        self._weights = _map_weights(engine, rank)
        weight_bytes = sum(file.nbytes for file in self._weights.values())
        threads = config.num_threads or useful_threads(weight_bytes, manifest.caches)
        self._sampler = Sampler(manifest.vocab_size, threads)
        library.load().slipstream_set_threads(threads)
        if config.deterministic:
            _check_products(engine)
        self._graphs = {
            name: Graph(spec, _create_session(engine, spec, self._weights, threads))
            for name, spec in manifest.graphs.items()
        }

    def reserve_kv(self, num_bytes: int | None) -> int:
        """Allocate states for every sequence and, within what they leave of ``num_bytes``, pages,
        as many in every paged cache; None takes ``default_kv_bytes``. Pages cost memory when they
        are first written. CapacityError when not even one page fits, or there is no such memory."""
        specs, config = self._cache_specs, self._config
        slots = config.max_batch_size
        taken = slots * sum(cache.bytes_per_page for cache in states(specs))
        if num_bytes is None:
            num_bytes = default_kv_bytes(specs, config)
        page_bytes = sum(cache.bytes_per_page for cache in paged(specs))
        pages = (num_bytes - taken) // page_bytes
        if pages < 1:
            beside = f" beside {taken} of states" if taken else ""
            raise CapacityError(
                f"{num_bytes} bytes of KV cache hold no page{beside}; one page takes {page_bytes} "
                f"bytes: raise --kv-cache-bytes"
            )
        self.shutdown()
        try:
            for cache in specs:
                largest = max(array.nbytes for array in cache.arrays)
                count = slots if cache.kind == "state" else whole_regions(pages, largest)
                for array in cache.arrays:
                    self._allocate(cache, array, count)
        except (
            MemoryError,
            OverflowError,
            ValueError,
        ) as error:  # NumPy's for what no address space holds
            self.shutdown()
            raise CapacityError(
                f"{num_bytes} bytes of KV cache cannot be had ({error}): lower --kv-cache-bytes"
            ) from error
        give_back()
        return pages

    def submit(self, batch: StepBatch) -> _Pending:
        """Put a step's inputs in place."""
        if batch.transfers:
            self.transfer(batch.transfers)
        if batch.moves:
            self._move_pages(batch.moves)
        for name, inputs in batch.pages.items():
            table, pages = inputs.page_table, 0
            if table is not self._used.get(name):
                self._used[name], pages = table, int(table.max(initial=-1)) + 1
            for memory in self._memory[name]:
                memory.use(pages)
        binding = self._binding(batch)
        binding.write(batch)
        return _Pending(binding, batch, self._sampler)

    def logits(self, batch: StepBatch) -> NDArray[np.float32]:
        """Run a step and return its logits float32 ``[L, vocab]``; nothing is sampled."""
        logits: NDArray[np.float32] = self.run(batch)[LOGITS].copy()
        return logits

    def run(self, batch: StepBatch) -> Arrays:
        """Run a step and return what it gives, in arrays that later steps overwrite."""
        return self.submit(batch).outputs()

    def shutdown(self) -> None:
        """Let go of the pages."""
        self.close_host()
        self._bindings.clear()
        self._caches.clear()
        self._arrays.clear()
        self._memory.clear()
        self._used.clear()

    def _allocate(self, cache: CacheSpec, array: CacheArray, count: int) -> None:
        """Zeros for ``count`` pages or slots of all layers."""
        float8 = array.dtype == "float8_e4m3fn"
        shape = (len(cache.layers), count, *array.shape)
        memory = PageMemory(shape, "uint8" if float8 else array.dtype)
        zeros = memory.array
        self._memory.setdefault(cache.name, []).append(memory)
        self._arrays.setdefault(cache.name, []).append(zeros)
        self._caches[array.name] = (
            ort.OrtValue.ortvalue_from_numpy_with_onnx_type(zeros, _ONNX_FLOAT8)
            if float8
            else ort.OrtValue.ortvalue_from_numpy(zeros)
        )

    def _move_pages(self, moves: Sequence[Move]) -> None:
        for move in moves:
            for array in self._arrays[move.cache]:
                array[:, move.destination] = array[:, move.source]

    def _binding(self, batch: StepBatch) -> Binding:
        rows = len(batch.logits_rows)
        shape = [batch.graph, batch.outputs, len(batch.token_ids), rows]
        for inputs in batch.pages.values():
            shape += inputs.page_table.shape
        key = tuple(shape)
        binding = self._bindings.get(key)
        if binding is None:
            graph = self._graphs[batch.graph]
            outputs = {output.name: self._output(output, batch) for output in graph.wanted(batch)}
            binding = Binding(graph, batch, self._caches, outputs)
            # More rows than these are prompt logprobs: rare and large, so not kept.
            if rows <= len(self._logits):
                if len(self._bindings) >= _CACHED_BINDINGS:
                    self._bindings.pop(next(iter(self._bindings)))
                self._bindings[key] = binding
        return binding

    def _output(self, output: Output, batch: StepBatch) -> NDArray[Any]:
        """An array for an output of a step; the usual logits of all steps share one."""
        sizes = {
            "T": len(batch.token_ids),
            "S": len(batch.context_len),
            "L": len(batch.logits_rows),
        }
        shape = [size if isinstance(size, int) else sizes[size] for size in output.shape]
        if output.name == LOGITS and shape[0] <= len(self._logits):
            return self._logits[: shape[0]]
        return np.empty(shape, output.dtype)


def default_kv_bytes(caches: Sequence[CacheSpec], config: RuntimeConfig, ranks: int = 1) -> int:
    """What states and pages of a rank take when nobody says: as much as the limits can use, of all
    ranks together at most 4 GiB and half of what is free."""
    slots = config.max_batch_size
    full = slots * sum(cache.bytes_per_page for cache in states(caches))
    full += slots * bytes_per_token(caches) * config.max_seq_len
    return min(full, DEFAULT_KV_BYTES // ranks, free_bytes() // 2 // ranks)


def useful_threads(weight_bytes: int, caches: Sequence[CacheSpec]) -> int:
    """The cores that this process may use, or fewer where a layer's ``weight_bytes`` are few.

    An estimate, measured on few cores only: a thread's share of a product is to take twice as long
    as handing it over, 5 microseconds, in which it would read 50 KB.
    """
    products = _PRODUCTS * max(1, sum(len(cache.layers) for cache in caches))
    return max(1, min(usable_cores(), weight_bytes // (products * _LEAST_SHARE)))


def _map_weights(engine: Engine, rank: int) -> dict[str, NDArray[np.uint8]]:
    """A rank's file of weights, if the engine has one, by the name that graphs have for it."""
    file = weight_file(rank)
    if file not in engine.manifest.files:
        return {}
    return {WEIGHTS: np.memmap(engine.path / file, np.uint8, "r").view(np.ndarray)}


def _create_session(
    engine: Engine, spec: GraphSpec, weights: Mapping[str, NDArray[np.uint8]], num_threads: int
) -> ort.InferenceSession:
    graph, options = engine.path / spec.file, ort.SessionOptions()
    options.add_external_initializers_from_files_in_memory(
        list(weights), list(weights.values()), [file.nbytes for file in weights.values()]
    )
    options.add_session_config_entry("session.use_external_initializer_file_buffers_directly", "1")
    for module in library.modules(engine.manifest.plugins):
        options.register_custom_ops_library(library.path(module))
        library.load(module).slipstream_set_threads(num_threads)
    options.intra_op_num_threads = num_threads
    options.inter_op_num_threads = 1
    # The builder has fused what there is to fuse, and every step may have another shape.
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.enable_mem_pattern = False
    options.log_severity_level = 3
    options.add_session_config_entry("session.dynamic_block_base", "4")
    try:
        session = ort.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise EngineMismatchError(
            f"onnxruntime {ort.__version__} refuses the graph of {engine.path} ({error}); build it "
            f"again: "
            f"{engine.manifest.command}"
        ) from error
    _check_ports(engine, spec, session)
    return session


def _check_products(engine: Engine) -> None:
    """Raise EngineMismatchError where bits of a row depend on the rows beside it: all kernels of
    ours add up in one order, and onnxruntime's products do not."""
    for spec in engine.manifest.graphs.values():
        graph = (engine.path / spec.file).read_bytes()
        # How protobuf writes the fourth field of a node, its operator: nothing here reads ONNX.
        found = [name for name in _BY_ROWS if bytes((0x22, len(name))) + name.encode() in graph]
        if found:
            raise EngineMismatchError(
                f"the engine in {engine.path} multiplies with onnxruntime's {', '.join(found)}, "
                "whose bits depend on the number of tokens in a step: for --deterministic build it "
                "again with --gemm-plugin auto, and weights in groups of 32 or more; it was built "
                f"by {engine.manifest.command}"
            )


def _check_ports(engine: Engine, spec: GraphSpec, session: ort.InferenceSession) -> None:
    """Raise EngineMismatchError unless a graph takes and gives what the manifest says."""
    for kind, found, told in (
        ("inputs", session.get_inputs(), spec.inputs),
        ("outputs", session.get_outputs(), spec.outputs),
    ):
        wanted = {port.name: (f"tensor({_ORT_TYPES[port.dtype]})", port.shape) for port in told}
        known = {value.name: (value.type, tuple(value.shape)) for value in found}
        for name in wanted.keys() | known.keys():
            if not _alike(wanted.get(name), known.get(name)):
                raise EngineMismatchError(
                    f"the {kind} of {spec.file} in {engine.path} are not those of its manifest: "
                    f"{name} is {known.get(name)}, not {wanted.get(name)}; build it again: "
                    f"{engine.manifest.command}"
                )


def _alike(wanted: _Kind | None, known: _Kind | None) -> bool:
    """Whether types, ranks and all sizes that are numbers agree."""
    if wanted is None or known is None or wanted[0] != known[0] or len(wanted[1]) != len(known[1]):
        return False
    return all(
        a == b
        for a, b in zip(wanted[1], known[1], strict=True)
        if isinstance(a, int) or isinstance(b, int)
    )
