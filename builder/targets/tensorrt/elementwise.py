"""Gates and types: what is left of a graph in standard operators, each of one type of number."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from slipstream.builder.graph.passes.rewrite import replace
from slipstream.builder.graph.program import Program, StoredWeight, ir_dtype
from slipstream.plugins.gated_mlp import GATES
from slipstream.weights.safetensors import ArraySpec
from slipstream.weights.tensor import numpy_dtype

_FLOAT = ir.DataType.FLOAT
# The last of these before an output makes it; what follows, such as a cap, is of float32.
_MAKERS = ("Linear", "RMSNormalization", "LayerNormalization")
# Their numbers have the types that they were made with.
_TYPED = ("PagedAttention", "QuantizeLinear", "DequantizeLinear")


def lower_gates(program: Program) -> int:
    """A gated activation as Split, what its gate is of ONNX's operators, and Mul."""
    nodes = program.nodes("GatedActivation")
    for node in nodes:
        _lower_gate(program, node)
    return len(nodes)


def cast_outputs(program: Program) -> int:
    """Logits, or states, become float32 behind the operator that makes them."""
    for output in program.graph.outputs:
        value: ir.Value | None = output
        while value is not None and (node := value.producer()) and node.op_type not in _MAKERS:
            value = node.inputs[0]
        assert value is not None and node is not None
        cast = ir.node(
            "Cast", [value], {"to": int(_FLOAT)}, num_outputs=1, name=f"{node.name}/cast"
        )
        wide, name = cast.outputs[0], value.name
        wide.shape, wide.type = value.shape, ir.TensorType(_FLOAT)
        program.graph.insert_after(node, [cast])
        value.replace_all_uses_with(wide, replace_graph_outputs=True)
        cast.replace_input_with(0, value)
        value.name, wide.name = f"{name}/narrow", name
    return len(program.graph.outputs)


@dataclass(frozen=True, slots=True)
class SetTypes:
    """Gives ``dtype`` to every value and every number of the graph, but to rotary angles and to
    what ``cast_outputs`` has made float32: TensorRT converts nothing by itself."""

    dtype: str

    def __call__(self, program: Program) -> int:
        """Returns the number of values that changed."""
        kept, changed = set(_angles(program)) | set(_outputs(program)), 0
        for node in program.graph:
            if node in kept or node.op_type == "Cast":
                continue
            self._numbers(program, node)
            for value in node.outputs:
                if value.dtype == _FLOAT:
                    value.type = ir.TensorType(ir_dtype(self.dtype))
                    changed += 1
        self._drop_unread(program)
        return changed

    def _drop_unread(self, program: Program) -> None:
        """Forget what was stored in another type."""
        values = program.graph.initializers
        for name, stored in list(program.stored.items()):
            if not any(values[part.name].uses() for part in stored.parts):
                del program.stored[name]

    def _numbers(self, program: Program, node: ir.Node) -> None:
        """Small arrays of the graph, and what was stored for x before its type was known."""
        for index, value in enumerate(node.inputs):
            if value is None or value.dtype != _FLOAT or node.op_type in _TYPED:
                continue
            if value.name in program.stored:
                value = self._stored(program, value)
            elif value.is_initializer():
                assert value.const_value is not None
                array = value.const_value.numpy().astype(numpy_dtype(self.dtype))
                value = program.constant(f"{value.name}.{self.dtype}", array)
            node.replace_input_with(index, value)

    def _stored(self, program: Program, value: ir.Value) -> ir.Value:
        (part,), load = (stored := program.stored[value.name or ""]).parts, stored.load
        dtype = numpy_dtype(self.dtype)
        made = ArraySpec(f"{part.name}.{self.dtype}", dtype, part.shape)
        return program.store(StoredWeight((made,), lambda: (load()[0].astype(dtype),)))[0]


def _angles(program: Program) -> Iterator[ir.Node]:
    """The nodes that rotary angles are made of."""
    stack = [value for node in program.nodes("PagedAttention") for value in node.inputs[1:3]]
    while stack:
        node = value.producer() if (value := stack.pop()) is not None else None
        if node is not None:
            yield node
            stack += node.inputs


def _outputs(program: Program) -> Iterator[ir.Node]:
    """The nodes behind the casts of outputs."""
    for output in program.graph.outputs:
        node = output.producer()
        while node is not None and node.op_type != "Cast":
            yield node
            first = node.inputs[0]
            node = None if first is None else first.producer()


def _lower_gate(program: Program, node: ir.Node) -> None:
    (gate_up,) = node.inputs
    assert gate_up is not None
    made = [ir.node("Split", [gate_up], {"axis": -1, "num_outputs": 2}, num_outputs=2)]

    def make(op: str, *inputs: ir.Value, **attributes: float | str) -> ir.Value:
        made.append(ir.node(op, inputs, attributes, num_outputs=1))
        return made[-1].outputs[0]

    def number(value: float) -> ir.Value:
        return program.constant("number", np.array(value, np.float32))

    gate, up = made[0].outputs
    kind = node.attributes.get_int("gate", GATES["silu"])
    if kind == GATES["silu"]:
        gate = make("Mul", gate, make("Sigmoid", gate))
    elif kind == GATES["gelu_tanh"]:
        gate = make("Gelu", gate, approximate="tanh")
    else:
        gate = make("Min", gate, number(7.0))
        gate = make("Mul", gate, make("Sigmoid", make("Mul", gate, number(1.702))))
        up = make("Add", make("Clip", up, number(-7.0), number(7.0)), number(1.0))
    product = make("Mul", gate, up)
    for index, part in enumerate(made):
        part.name = f"{node.name}/{index}"
        for output, value in enumerate(part.outputs):
            value.name, value.shape = f"{part.name}/{output}", node.outputs[0].shape
            value.type = ir.TensorType(_FLOAT)
    replace(program, [node], made, {node.outputs[0]: product})
