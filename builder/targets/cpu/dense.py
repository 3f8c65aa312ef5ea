"""Dense weights on ONNX Runtime's float32 kernels."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from slipstream.builder.graph.passes.rewrite import replace
from slipstream.builder.graph.program import Program, StoredWeight
from slipstream.plugins.linear.cpu.packing import can_pack
from slipstream.weights.safetensors import ArraySpec
from slipstream.weights.tensor import LazyTensor, dense_values


def lower_dense_linear(program: Program) -> int:
    """Linear becomes Gemm(x, W, bias) with a transposed W; formats without a kernel are
    dequantized."""
    nodes = [node for node in program.nodes("Linear") if _is_unlowered(program, node)]
    for node in nodes:
        inputs = [node.inputs[0], store_float32(program, program.weight_of(node))]
        if len(node.inputs) > 2:
            inputs.append(node.inputs[2])
        gemm = ir.node("Gemm", inputs, {"transB": 1}, num_outputs=1, name=node.name)
        replace(program, [node], [gemm], {node.outputs[0]: gemm.outputs[0]})
    return len(nodes)


def lower_dense_embedding(program: Program) -> int:
    """Embedding becomes Gather; formats that our kernel does not hold are dequantized."""
    nodes = [
        node
        for node in program.nodes("Embedding")
        if _is_unlowered(program, node) and not can_pack(program.weight_of(node).format)
    ]
    for node in nodes:
        inputs = [store_float32(program, program.weight_of(node)), node.inputs[0]]
        gather = ir.node("Gather", inputs, {"axis": 0}, num_outputs=1, name=node.name)
        replace(program, [node], [gather], {node.outputs[0]: gather.outputs[0]})
    return len(nodes)


def store_dense_weights(program: Program) -> int:
    """Norm weights and biases become stored float32."""
    stored = 0
    for name, tensor in list(program.weights.items()):
        value = program.graph.initializers[name]
        value.replace_all_uses_with(store_float32(program, tensor))
        stored += 1
    return stored


def store_float32(program: Program, tensor: LazyTensor) -> ir.Value:
    """The graph value of a weight as float32, made on first use."""
    part = ArraySpec(f"{tensor.name}.float32", np.dtype(np.float32), tensor.format.shape)
    return program.store(StoredWeight((part,), lambda: (dense_values(tensor.load(), "float32"),)))[
        0
    ]


def _is_unlowered(program: Program, node: ir.Node) -> bool:
    weight = node.inputs[1]
    return weight is not None and weight.name in program.weights
