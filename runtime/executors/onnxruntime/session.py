"""A session of an engine's graph, and its arrays at fixed addresses."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from slipstream.builder.contract import GraphSpec, Output, Source
from slipstream.builder.engine import WEIGHTS, Engine, Manifest
from slipstream.errors import EngineMismatchError, ExecutionError
from slipstream.runtime.executors.onnxruntime.memory import (
    ONNX_TYPES,
    Buffer,
    HostMemory,
    Memory,
    view,
)
from slipstream.runtime.executors.onnxruntime.provider import (
    CPU,
    CUDA,
    check_loaded,
    load_libraries,
    provider_options,
    session_entries,
    wanted_provider,
)
from slipstream.runtime.executors.onnxruntime.runs import Run, in_host_memory, step_ports

_CACHED_BINDINGS = 64
_NOT_CAPTURED = "-1"
# Above those that count slots in the number of a captured graph.
_EPOCH_BITS = 20
_INT32_BYTES = 4
_ALIGNED = 64
# What a session says that was asked to capture graphs that it cannot.
_CANNOT_CAPTURE = "graph capture"


def create_session(
    engine: Engine, spec: GraphSpec, threads: int, *, rows: int, capture: bool
) -> tuple[ort.InferenceSession, str, bool]:
    """A session, the provider it runs on, and whether that captures graphs.

    A step decodes at most ``rows`` tokens.

    Raises EngineMismatchError for a provider that does not load, and a graph that is refused.
    """
    provider = wanted_provider(engine.manifest)
    load_libraries(provider)
    capture = capture and provider == CUDA
    try:
        session = _session(engine, spec, provider, threads, rows, capture)
    except EngineMismatchError as error:
        if not capture or _CANNOT_CAPTURE not in str(error):
            raise
        capture = False
        session = _session(engine, spec, provider, threads, rows, capture)
    loaded = check_loaded(engine.manifest, provider, session)
    return session, loaded, capture and loaded == CUDA


def _session(
    engine: Engine, spec: GraphSpec, provider: str, threads: int, rows: int, capture: bool
) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # The builder has fused what there is to fuse, and every step may have another shape.
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.enable_mem_pattern = False
    options.log_severity_level = 3 if provider == CPU else 2
    for name, value in session_entries(provider, rows).items():
        options.add_session_config_entry(name, value)
    weights = _mapped(engine)
    options.add_external_initializers_from_files_in_memory(
        list(weights), list(weights.values()), [file.nbytes for file in weights.values()]
    )
    providers = provider_options(provider, capture=capture)
    try:
        return ort.InferenceSession(str(engine.path / spec.file), options, providers=providers)
    except Exception as error:
        raise EngineMismatchError(
            f"onnxruntime {ort.__version__} refuses the graph of {engine.path} on {provider} "
            f"({error}); build it again: {engine.manifest.command}"
        ) from error


def _mapped(engine: Engine) -> dict[str, NDArray[np.uint8]]:
    """The file of the weights, because onnxruntime follows no link out of the engine's
    directory; it is copied while the session is made."""
    if WEIGHTS not in engine.manifest.files:
        return {}
    return {WEIGHTS: np.memmap(engine.path / WEIGHTS, np.uint8, "r").view(np.ndarray)}


class StepSession:
    """Runs of a graph, whose inputs are written to, and outputs read from, arrays of the
    device that stay where they are."""

    def __init__(
        self, session: ort.InferenceSession, spec: GraphSpec, memory: Memory, tokens: int, rows: int
    ) -> None:
        """``tokens`` of a step and ``rows`` of its logits, at most; larger ones are rare and get
        arrays of their own."""
        self._session, self._spec, self._memory = session, spec, memory
        self._rows = rows
        ports = step_ports(spec)
        # A scalar, as an array of one element.
        self._on_host = {
            p.name: HostMemory().zeros((1,), p.dtype) for p in ports if in_host_memory(p)
        }
        # The others lie one behind the other, to be written at once.
        self._on_device = [port for port in ports if port.name not in self._on_host]
        most = len(self._on_device) * _aligned(max(tokens, rows) + 1)
        self._inputs, self._staged = memory.zeros((most,), "int32"), np.zeros(most, np.int32)
        self._outputs = {o.name: self._output(o, rows) for o in spec.outputs if o.updates is None}
        self._caches: dict[str, Buffer] = {}
        self._bindings: dict[tuple[object, ...], tuple[ort.IOBinding, object]] = {}
        self._options: dict[int, ort.RunOptions] = {}
        self._epoch = 0

    def bind(self, caches: Mapping[str, Buffer]) -> None:
        """Run on these arrays of caches, by the names of their ports, from now on."""
        self._forget()
        self._caches = dict(caches)

    def run(self, run: Run) -> dict[str, Buffer]:
        """The outputs of a run, each with at least its rows, until the next. Raises
        ExecutionError if the device fails."""
        outputs = self._outputs
        if run.num_rows > self._rows:
            spec = [output for output in self._spec.outputs if output.updates is None]
            outputs = {output.name: self._output(output, run.num_rows) for output in spec}
        self._write(run)
        binding = self._binding(run, outputs)
        try:
            self._session.run_with_iobinding(binding, self._run_options(run))
        except Exception as error:
            raise ExecutionError(f"the step failed in onnxruntime: {error}") from error
        return outputs

    def read(self, buffer: Buffer, rows: int) -> NDArray[Any]:
        """The first rows of an output."""
        return self._memory.read(buffer, rows)

    def _forget(self) -> None:
        """Arrays have moved: bind them anew, and replay no graph that was captured before."""
        self._bindings.clear()
        self._options.clear()
        self._epoch += 1

    def _write(self, run: Run) -> None:
        """Put the inputs of a run where its binding reads them."""
        for name, buffer in self._on_host.items():
            view(buffer)[:] = run.values[name]
        places = self._places(run)
        size = places[-1]
        if size > len(self._staged):
            self._inputs = self._memory.zeros((size,), "int32")
            self._staged = np.zeros(size, np.int32)
            self._forget()
        for port, start in zip(self._on_device, places, strict=False):
            values = run.values[port.name].reshape(-1)
            self._staged[start : start + values.size] = values
        self._memory.write(self._inputs, self._staged[:size])
        self._memory.settle()

    def _places(self, run: Run) -> list[int]:
        """Where each input on the device starts, which its shapes tell, and where the last ends."""
        sizes = [_aligned(run.values[port.name].size) for port in self._on_device]
        return [0, *itertools.accumulate(sizes)]

    def _output(self, output: Output, rows: int) -> Buffer:
        shape = [size if isinstance(size, int) else rows for size in output.shape]
        return self._memory.zeros(shape, output.dtype)

    def _binding(self, run: Run, outputs: Mapping[str, Buffer]) -> ort.IOBinding:
        """What a run reads and writes, which runs of the same shape in the same place share."""
        shapes = [run.values[port.name].shape for port in self._on_device]
        key = (run.first, run.count, *shapes)
        known = self._bindings.get(key)
        if known is not None and known[1] is outputs:
            return known[0]
        binding = self._session.io_binding()
        for name, buffer in self._on_host.items():
            where = buffer.shape, buffer.address
            binding.bind_input(name, "cpu", 0, ONNX_TYPES[buffer.dtype], *where)
        for port, start in zip(self._on_device, self._places(run), strict=False):
            where = run.values[port.name].shape, self._inputs.address + start * _INT32_BYTES
            binding.bind_input(port.name, self._memory.device, 0, ONNX_TYPES[port.dtype], *where)
        for port in self._spec.inputs:
            if port.source is Source.LAYER:
                binding.bind_input(port.name, *self._part(port.name, run))
        for output in self._spec.outputs:
            if output.updates is not None:
                binding.bind_output(output.name, *self._part(output.updates, run))
            else:
                buffer = outputs[output.name]
                shape = (run.num_rows, *buffer.shape[1:])
                kind = self._memory.device, 0, ONNX_TYPES[buffer.dtype]
                binding.bind_output(output.name, *kind, shape, buffer.address)
        if outputs is self._outputs:
            if len(self._bindings) >= _CACHED_BINDINGS:
                self._bindings.pop(next(iter(self._bindings)))
            self._bindings[key] = binding, outputs
        return binding

    def _part(self, name: str, run: Run) -> tuple[str, int, int, tuple[int, ...], int]:
        """The slots of a run, or all pages, of a layer's array."""
        buffer = self._caches[name]
        shape = (run.count or buffer.shape[0], *buffer.shape[1:])
        address = buffer.address + run.first * buffer.row_bytes
        return self._memory.device, 0, ONNX_TYPES[buffer.dtype], shape, address

    def _run_options(self, run: Run) -> ort.RunOptions:
        """A captured run is known by the slots it is as wide as, and by the arrays they are in."""
        number = run.count if run.captured else 0
        if number not in self._options:
            options = self._options[number] = ort.RunOptions()
            identity = str(self._epoch << _EPOCH_BITS | number) if number else _NOT_CAPTURED
            options.add_run_config_entry("gpu_graph_id", identity)
        return self._options[number]


def _aligned(count: int) -> int:
    """Elements up to where another array may start."""
    return -(-count // _ALIGNED) * _ALIGNED


def check_ports(engine: Engine, spec: GraphSpec, session: ort.InferenceSession) -> None:
    """Raise EngineMismatchError unless a graph takes and gives what the manifest says."""
    found = {value.name for value in (*session.get_inputs(), *session.get_outputs())}
    told = {port.name for port in spec.inputs} | {output.name for output in spec.outputs}
    if found != told:
        raise _differs(engine.manifest, sorted(found ^ told))


def _differs(manifest: Manifest, names: Sequence[str]) -> EngineMismatchError:
    return EngineMismatchError(
        f"the graph and the manifest differ in {', '.join(names)}; build the engine again: "
        f"{manifest.command}"
    )
