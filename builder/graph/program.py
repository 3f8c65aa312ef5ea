"""A model on its way through the compiler: an ONNX graph and the weights it names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from slipstream.builder.contract import CacheSpec, GraphSpec, Output
from slipstream.weights.safetensors import ArraySpec
from slipstream.weights.tensor import LazyTensor, numpy_dtype

OPSET = 23
IR_VERSION = 11
# Where the contract's names of dtypes are not those of ONNX in lower case.
_NAMES = {ir.DataType.FLOAT: "float32", ir.DataType.FLOAT8E4M3FN: "float8_e4m3fn"}


@dataclass(frozen=True, slots=True)
class StoredWeight:
    """One weight as the arrays of the engine's file that a kernel reads; ``load`` makes them, in
    the order of ``parts``."""

    parts: tuple[ArraySpec, ...]
    load: Callable[[], tuple[NDArray[np.generic], ...]] = field(repr=False)


@dataclass(slots=True)
class Program:
    """``weights`` maps a graph value to its lazy data; lowering turns each into a
    ``StoredWeight``. ``contract`` says what the graph reads and gives, and ``caches`` what of an
    engine's; None where a graph is not an engine's."""

    model: ir.Model
    weights: dict[str, LazyTensor] = field(default_factory=dict)
    stored: dict[str, StoredWeight] = field(default_factory=dict)
    contract: GraphSpec | None = None
    caches: tuple[CacheSpec, ...] = ()

    @property
    def graph(self) -> ir.Graph:
        """The only graph of the model."""
        return self.model.graph

    def nodes(self, op_type: str) -> list[ir.Node]:
        """Nodes of one operator in graph order; a copy, so that a pass may edit the graph."""
        return [node for node in self.graph if node.op_type == op_type]

    def weight_of(self, node: ir.Node, index: int = 1) -> LazyTensor:
        """The weight at an input of a node."""
        value = node.inputs[index]
        assert value is not None and value.name is not None, node
        return self.weights[value.name]

    def add_weight(self, tensor: LazyTensor, name: str | None = None) -> ir.Value:
        """The graph value of a weight, made on first use."""
        name = name or tensor.name
        known = self.graph.initializers.get(name)
        if known is not None:
            return known
        self.weights[name] = tensor
        value = ir.Value(
            name=name, shape=ir.Shape(tensor.format.shape), type=ir.TensorType(_dtype(tensor))
        )
        # A placeholder keeps the graph well-formed until the engine writer knows the data's place
        # in the file.
        value.const_value = ir.LazyTensor(
            lambda: ir.Tensor(tensor.load().codes),
            dtype=_dtype(tensor),
            shape=ir.Shape(tensor.format.shape),
            name=name,
        )
        self.graph.register_initializer(value)
        return value

    def replace_weight(self, name: str, tensor: LazyTensor) -> None:
        """Give a value another weight of the same shape."""
        self.weights[name] = tensor
        self.graph.initializers[name].type = ir.TensorType(_dtype(tensor))

    def constant(self, name: str, array: NDArray[np.generic]) -> ir.Value:
        """A small array that lives in graph.onnx itself, made once; a number is added to a name
        that another array has."""
        stem, count = name, 0
        while (known := self.graph.initializers.get(name)) is not None:
            assert known.const_value is not None
            if np.array_equal(known.const_value.numpy(), array):
                return known
            count += 1
            name = f"{stem}_{count}"
        tensor = ir.Tensor(array, name=name)
        value = ir.Value(
            name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor
        )
        self.graph.register_initializer(value)
        return value

    def store(self, weight: StoredWeight) -> tuple[ir.Value, ...]:
        """The graph values of a stored weight's parts, made on first use of the first part's
        name."""
        first = weight.parts[0].name
        if first not in self.stored:
            self.stored[first] = weight
            for part in weight.parts:
                dtype, shape = ir.DataType.from_numpy(part.dtype), ir.Shape(part.shape)
                value = ir.Value(name=part.name, shape=shape, type=ir.TensorType(dtype))
                # The engine writer sets offset and length when it has laid out the file.
                value.const_value = ir.ExternalTensor(
                    "", 0, part.nbytes, dtype, shape=shape, name=part.name
                )
                self.graph.register_initializer(value)
        return tuple(self.graph.initializers[part.name] for part in self.stored[first].parts)

    def give(self, value: ir.Value, name: str) -> None:
        """Make a value, whose type and shape are known, an output of an engine's graph."""
        assert self.contract is not None and value.dtype is not None and value.shape is not None
        value.name = name
        self.graph.outputs.append(value)
        shape = tuple(dim if isinstance(dim, int) else str(dim.value) for dim in value.shape)
        outputs = (*self.contract.outputs, Output(name, dtype_name(value.dtype), shape))
        self.contract = replace(self.contract, outputs=outputs)

    def drop_unused_weights(self) -> None:
        """Forget weights that no node reads any more."""
        for name, value in list(self.graph.initializers.items()):
            if not value.uses():
                del self.graph.initializers[name]
                self.weights.pop(name, None)


def new_program(name: str) -> Program:
    """An empty program."""
    graph = ir.Graph(
        [],
        [],
        nodes=[],
        opset_imports={"": OPSET, "slipstream": 1, "com.microsoft": 1},
        name=name,
    )
    return Program(ir.Model(graph, ir_version=IR_VERSION, producer_name="slipstream"))


def dtype_name(dtype: ir.DataType) -> str:
    """A dtype as contracts and operators spell it, such as ``float8_e4m3fn``."""
    return _NAMES.get(dtype, dtype.name.lower())


def ir_dtype(name: str) -> ir.DataType:
    """The dtype of that name."""
    return next(dtype for dtype in ir.DataType if dtype_name(dtype) == name)


def _dtype(tensor: LazyTensor) -> ir.DataType:
    if tensor.format.kind == "dense":
        return ir.DataType.from_numpy(numpy_dtype(tensor.format.dtype))
    return ir.DataType.UINT4 if tensor.format.bits == 4 else ir.DataType.UINT8
