"""How the arrays of a step get into an ONNX Runtime session, and what it makes out of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from slipstream.builder.contract import SAMPLED, GraphSpec, Output, Source
from slipstream.runtime.engine.step import StepBatch, reader_of

# Arrays by name, as ONNX Runtime sees them: those of caches.
Values = Mapping[str, ort.OrtValue]
Arrays = dict[str, NDArray[Any]]


class Graph:
    """A session, and how the arrays of a step get into it."""

    def __init__(self, spec: GraphSpec, session: ort.InferenceSession) -> None:
        self.session = session
        self.readers = [
            (port.name, reader_of(port)) for port in spec.inputs if port.source is not Source.CACHE
        ]
        self.arrays = [port.name for port in spec.inputs if port.source is Source.CACHE]
        self.updates = {output.name: output.updates for output in spec.outputs if output.updates}
        self.outputs = {output.name: output for output in spec.outputs if output.updates is None}

    def wanted(self, batch: StepBatch) -> list[Output]:
        """The outputs that a step asks for; what is sampled of a graph is always given."""
        names = [*(name for name in SAMPLED if name in self.outputs), *batch.outputs]
        return [self.outputs[name] for name in names]


class _Input:
    """An array that is bound, and the one that it was filled from; if others may write to that, it
    is read through ``source``, which is less code than NumPy walks through, into ``target``."""

    __slots__ = ("array", "given", "read", "source", "target")

    def __init__(self, array: NDArray[Any], read: Callable[[StepBatch], NDArray[Any]]) -> None:
        self.array, self.read = array, read
        self.given: NDArray[Any] | None = None
        self.source: memoryview | None = None
        self.target = array.data

    def take(self, given: NDArray[Any]) -> None:
        """Copy another array than the last."""
        self.array[...] = given
        self.given, self.source = given, None
        if given.flags.writeable:
            if given.ndim == 1:
                self.source = given.data
            else:
                self.given = None


class Binding:
    """A graph's inputs and outputs for steps of one shape, bound to arrays that steps write."""

    def __init__(self, graph: Graph, batch: StepBatch, caches: Values, outputs: Arrays) -> None:
        self.io = graph.session.io_binding()
        self.run: Callable[[Any], None] = graph.session.run_with_iobinding
        self.outputs = outputs
        self._inputs: list[_Input] = []
        for name, read in graph.readers:
            array = np.empty_like(read(batch))
            self._inputs.append(_Input(array, read))
            self.io.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(array))
        for name in graph.arrays:
            self.io.bind_ortvalue_input(name, caches[name])
        for name, array in outputs.items():
            self.io.bind_ortvalue_output(name, ort.OrtValue.ortvalue_from_numpy(array))
        for name, array_name in graph.updates.items():
            self.io.bind_ortvalue_output(name, caches[array_name])

    def write(self, batch: StepBatch) -> None:
        """Copy a step of this shape into the bound arrays, but for what is there: many steps give
        arrays of the step before."""
        for each in self._inputs:
            given = each.read(batch)
            if given is not each.given:
                each.take(given)
            elif each.source is not None:
                each.target[:] = each.source
