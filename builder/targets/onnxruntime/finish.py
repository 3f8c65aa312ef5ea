"""The edges of the lowered graph: biases, the type of logits, the best token, and what is left."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from slipstream.builder.contract import LOGITS, STATES, TOP_LOGIT, TOP_TOKEN
from slipstream.builder.graph.program import Program
from slipstream.builder.targets.cpu.matmul_nbits import can_lower
from slipstream.builder.targets.onnxruntime.attention import Emitter, refuse
from slipstream.plugins.operators import STANDARD_DOMAINS

_BIAS = 2
# The one whose operators all providers have kernels for since 1.24: for a newer one the CUDA
# provider may leave a Shape or a Reshape to the CPU, and then captures no graph.
_OPSET = 20


def part_biases(program: Program) -> int:
    """The bias of a Linear of integer groups becomes an Add: MatMulNBits takes none on CUDA."""
    nodes = [
        node
        for node in program.nodes("Linear")
        if len(node.inputs) > _BIAS and can_lower(program.weight_of(node).format)
    ]
    for node in nodes:
        bias = node.inputs[_BIAS]
        node.resize_inputs(_BIAS)
        made = ir.node("Add", [*node.outputs, bias], num_outputs=1, name=f"{node.name}/bias")
        y, (total,) = node.outputs[0], made.outputs
        total.shape, total.type, name = y.shape, y.type, y.name
        y.replace_all_uses_with(total, replace_graph_outputs=True)
        made.replace_input_with(0, y)
        y.name, total.name = f"{node.name}/product", name
        program.graph.insert_after(node, made)
    return len(nodes)


def widen_output(program: Program) -> int:
    """Logits, or states, become float32 before their soft cap, whatever the layers compute in."""
    output = next(v for v in program.graph.outputs if v.name in (LOGITS, STATES))
    made = output.producer()
    assert made is not None
    reader = made if made.op_type == "SoftCap" else None
    emitter = Emitter(program, f"{made.name}/widened")
    (wide,) = emitter.node("Cast", [None], {"to": int(ir.DataType.FLOAT)})
    cast = emitter.nodes[0]
    if reader is not None:
        narrow = reader.inputs[0]
        assert narrow is not None
        wide.shape = narrow.shape
        program.graph.insert_before(reader, cast)
        reader.replace_input_with(0, wide)
        cast.replace_input_with(0, narrow)
        return 1
    program.graph.insert_after(made, cast)
    wide.shape, wide.type, name = output.shape, output.type, output.name
    output.replace_all_uses_with(wide, replace_graph_outputs=True)
    output.name, wide.name = f"{name}/narrow", name
    cast.replace_input_with(0, output)
    return 1


def add_top_tokens(program: Program) -> int:
    """Beside logits the graph gives the best token of each row and its logit, which is NaN where
    any of the row is not finite: a device then need not hand out the rest."""
    logits = next((value for value in program.graph.outputs if value.name == LOGITS), None)
    if logits is None:
        return 0
    emitter = Emitter(program, "top")
    axis, best = emitter.integers("last_axis", -1), emitter.integers("top_1", 1)
    peaks, tokens = emitter.node("TopK", [logits, best], {"axis": -1}, outputs=2)
    tokens.type = ir.TensorType(ir.DataType.INT64)
    (sums,) = emitter.node("ReduceSum", [logits, axis], {"keepdims": 1})
    zero = program.constant("nothing", np.array(0, np.float32))
    (nothing,) = emitter.node("Mul", [sums, zero])
    (checked,) = emitter.node("Add", [peaks, nothing])
    (peak,) = emitter.node("Squeeze", [checked, axis])
    (token,) = emitter.node("Squeeze", [tokens, axis])
    emitter.typed(ir.DataType.INT64)
    (short,) = emitter.node("Cast", [token], {"to": int(ir.DataType.INT32)})
    emitter.typed(ir.DataType.INT32)
    program.graph.extend(emitter.nodes)
    for value, name in ((short, TOP_TOKEN), (peak, TOP_LOGIT)):
        value.shape = ir.Shape(("L",))
        program.give(value, name)
    return 1


def refuse_unlowered(program: Program) -> int:
    """Raise BuildError if an operator of ours is left; else the graph names the operators that it
    needs, and no more."""
    for node in program.graph:
        if node.domain not in STANDARD_DOMAINS:
            refuse(node, "no operator of ONNX or of ONNX Runtime computes it on both providers")
    program.graph.opset_imports.pop("slipstream", None)
    program.graph.opset_imports[""] = _OPSET
    return 0
