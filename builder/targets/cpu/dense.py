"""Dense weights: their type in an engine, and ONNX Runtime's float32 kernels for those that ours do
not run."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from slipstream.builder.graph.passes.dequantize_unheld import as_dense
from slipstream.builder.graph.passes.matrices import rewrite_matrices
from slipstream.builder.graph.passes.rewrite import Holds, replace
from slipstream.builder.graph.program import Program, StoredWeight
from slipstream.plugins.linear.cpu.packing import can_pack
from slipstream.weights.safetensors import ArraySpec
from slipstream.weights.tensor import LazyTensor, WeightFormat, dense_values


@dataclass(frozen=True, slots=True)
class SetDenseType:
    """Dense matrices become ``dtype``; with ``auto`` they stay as the checkpoint has them."""

    dtype: str

    def __call__(self, program: Program) -> int:
        """Returns the number of weights of another type."""

        def rewrite(tensor: LazyTensor) -> LazyTensor | None:
            kept = self.dtype in ("auto", tensor.format.dtype)
            return None if kept or tensor.format.kind != "dense" else as_dense(tensor, self.dtype)

        def message(old: LazyTensor, new: LazyTensor) -> str:
            return f"{old.format.dtype} becomes {new.format.dtype}"

        return rewrite_matrices(program, rewrite, message, logging.INFO)


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


def lower_dense_embedding(program: Program, held: Holds = can_pack) -> int:
    """Embedding of a dense weight becomes Gather; formats that no kernel of ours is to hold are
    dequantized."""
    nodes = [
        node
        for node in program.nodes("Embedding")
        if _is_unlowered(program, node) and _gathers(program.weight_of(node).format, held)
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


def _gathers(fmt: WeightFormat, held: Holds) -> bool:
    return fmt.kind == "dense" or not held(fmt)


def _is_unlowered(program: Program, node: ir.Node) -> bool:
    weight = node.inputs[1]
    return weight is not None and weight.name in program.weights
