"""Replaces dense weights of products by float8 with a scale a row, lazily."""

from __future__ import annotations

import onnx_ir as ir

from slipstream.builder.graph.passes.matrices import readers, routing
from slipstream.builder.graph.passes.quantize_weights import nothing_quantized
from slipstream.builder.graph.program import Program
from slipstream.weights.fp8 import fp8_format, quantize_fp8
from slipstream.weights.tensor import LazyTensor, QuantTensor


def quantize_fp8_weights(program: Program) -> int:
    """Quantize every dense weight of a product but a router's, an embedding's only if it is the
    same; BuildError where there is none."""
    values = dict.fromkeys(value for _, value in readers(program, "product"))
    kept = routing(program)
    matched = sum(_quantize(program, value) for value in values if value not in kept)
    if not matched:
        raise nothing_quantized()
    return matched


def _quantize(program: Program, value: ir.Value) -> bool:
    assert value.name is not None
    dense = program.weights[value.name]
    if dense.format.kind != "dense":
        return False

    def load() -> QuantTensor:
        return quantize_fp8(dense)

    program.weights[value.name] = LazyTensor(dense.name, fp8_format(dense.format.shape), load)
    value.type = ir.TensorType(ir.DataType.FLOAT8E4M3FN)
    return True
