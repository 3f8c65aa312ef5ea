"""Weights as the CUDA kernels read them, and the type of everything that flows between."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import onnx_ir as ir

from slipstream.builder.contract import HIDDEN, NEXT_HIDDEN, Output, Port
from slipstream.builder.graph.passes.dequantize_unheld import as_dense
from slipstream.builder.graph.program import Program, StoredWeight
from slipstream.plugins.linear.cuda.packing import format_attributes, pack, packed_size
from slipstream.plugins.linear.cuda.tactics import describe, multiplies_in
from slipstream.plugins.operators import DOMAIN, OPERATORS
from slipstream.weights.safetensors import ArraySpec
from slipstream.weights.tensor import LazyTensor, QuantTensor, WeightFormat, numpy_dtype

SUFFIX = ".cuda"
_PACKED = ("Linear", "NormedRouter", "ExpertLinear", "Embedding", "EmbeddingShard")
# What these read is in what they make, as it is, summed up or in part.
_HANDING_ON = ("AllGather", "AllReduce", "Slice")
log = logging.getLogger(__name__)
_STATES = (HIDDEN, NEXT_HIDDEN)
_Place = TypeVar("_Place", Port, Output)
_IR_DTYPES = {"bfloat16": ir.DataType.BFLOAT16, "float16": ir.DataType.FLOAT16}


@dataclass(frozen=True, slots=True)
class PackWeights:
    """Stores the weight of every product and every Embedding as one blob.

    ``dtype`` is that of dense weights; kernels hold every other one (``DequantizeUnheld``).
    """

    dtype: str

    def __call__(self, program: Program) -> int:
        """Pack every weight; a tied one is stored once."""
        nodes = [n for kind in _PACKED for n in program.nodes(kind)]
        kernels: Counter[str] = Counter()
        for node in nodes:
            tensor = program.weight_of(node)
            if tensor.format.kind == "dense":
                tensor = as_dense(tensor, self.dtype)
            if node.op_type == "ExpertLinear" and not _rounds(tensor.format):
                tensor = _unrounded(tensor)
            if node.op_type == "Linear":
                kernels[describe(tensor.format)] += 1
            part = ArraySpec(
                tensor.name + SUFFIX, np.dtype(np.uint8), (packed_size(tensor.format),)
            )
            stored = StoredWeight((part,), lambda tensor=tensor: (pack(tensor.load()),))  # type: ignore[misc]
            node.replace_input_with(1, program.store(stored)[0])
            for name, value in format_attributes(tensor.format).items():
                node.attributes[name] = ir.AttrInt64(name, value)
        for kernel, count in kernels.items():
            log.info("%d linears run on %s", count, kernel)
        return len(nodes)


def _rounds(fmt: WeightFormat) -> bool:
    """Whether experts of a format have a kernel that rounds x, to float8 by a scale a token."""
    return fmt.activation == "token" and multiplies_in(fmt) == "float8"


def _unrounded(tensor: LazyTensor) -> LazyTensor:
    """The weight for a kernel that takes x as it is."""
    fmt = replace(tensor.format, activation="none")

    def load() -> QuantTensor:
        return replace(tensor.load(), format=fmt, input_scale=None)

    return LazyTensor(tensor.name, fmt, load)


@dataclass(frozen=True, slots=True)
class StoreVectors:
    """Norm weights and biases become stored arrays of ``dtype``; what an operator reads in another
    type only, such as sinks, of that type."""

    dtype: str

    def __call__(self, program: Program) -> int:
        """Store everything that is not stored yet."""
        vectors = list(program.weights.items())
        for name, tensor in vectors:
            value = program.graph.initializers[name]
            dtype = self._read_as(value)
            dense = as_dense(tensor, dtype)
            part = ArraySpec(f"{name}.{dtype}", numpy_dtype(dtype), tensor.format.shape)
            stored = StoredWeight(
                (part,),
                lambda dense=dense: (np.ascontiguousarray(dense.load().codes),),  # type: ignore[misc]
            )
            value.replace_all_uses_with(program.store(stored)[0])
        return len(vectors)

    def _read_as(self, value: ir.Value) -> str:
        for node, index in value.uses():
            spec = OPERATORS.get(node.op_type) if node.domain == DOMAIN else None
            if spec is not None and self.dtype not in spec.inputs[index].dtypes:
                return spec.inputs[index].dtypes[0]
        return self.dtype


@dataclass(frozen=True, slots=True)
class SetPrecision:
    """Gives ``dtype`` to every value between operators but the logits, before and after their cap
    and while ranks gather them, the rotary angles, what a router reads and says, weights of
    experts, and roots; and to what one graph gives to another, the states that a head takes."""

    dtype: str

    def __call__(self, program: Program) -> int:
        """Set the types."""
        changed = 0
        for node in program.graph:
            for value in node.outputs:
                if not self._gives(node, value):
                    continue
                if not _is_exact(value):
                    value.type = ir.TensorType(_IR_DTYPES[self.dtype])
                    changed += 1
        return changed + self._set_states(program)

    def _set_states(self, program: Program) -> int:
        """Those that pass from graph to graph, there and in the contract."""
        contract, graph = program.contract, program.graph
        assert contract is not None
        found = [value for value in (*graph.inputs, *graph.outputs) if value.name in _STATES]
        for value in found:
            value.type = ir.TensorType(_IR_DTYPES[self.dtype])
        program.contract = replace(
            contract, inputs=_typed(contract.inputs, self.dtype),
            outputs=_typed(contract.outputs, self.dtype),
        )  # fmt: skip
        return len(found)

    def _gives(self, node: ir.Node, value: ir.Value) -> bool:
        """Whether an operator can give a value in this type."""
        spec = OPERATORS.get(node.op_type) if node.domain == DOMAIN else None
        return spec is None or self.dtype in spec.outputs[node.outputs.index(value)].dtypes


def _typed(ports: tuple[_Place, ...], dtype: str) -> tuple[_Place, ...]:
    return tuple(replace(p, dtype=dtype) if p.name in _STATES else p for p in ports)


def _is_exact(value: ir.Value) -> bool:
    """Whether a value stays float32: who reads it wants that, or hands it on."""
    if value.is_graph_output():
        return True
    return any(
        _wants_exact(reader, index)
        or (reader.op_type in _HANDING_ON and _is_exact(reader.outputs[0]))
        for reader, index in value.uses()
    )


def _wants_exact(reader: ir.Node, index: int) -> bool:
    """Whether an operator wants its input ``index`` in float32."""
    return reader.op_type in ("SoftCap", "Router", "Sqrt", "ArgMax") or (reader.op_type, index) in (
        ("ExpertLinear", 3),
        ("Div", 1),
    )
