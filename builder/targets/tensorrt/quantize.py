"""Integers of the forms that TensorRT's fused kernels take, rounded to nearest at build time."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from slipstream.builder.graph.passes.matrices import readers, routing
from slipstream.builder.graph.passes.quantize_weights import nothing_quantized
from slipstream.builder.graph.program import Program
from slipstream.weights.rtn import Bits, largest_group, quantize_rtn
from slipstream.weights.tensor import LazyTensor, QuantTensor, WeightFormat


@dataclass(frozen=True, slots=True)
class QuantizeProducts:
    """Every dense weight of a product but a router's, an embedding's and the output head's.

    8 bits have a scale a row; 4 bits one a group of ``group_size``, or the largest of 128, 64 and
    32 below it that divides the width.
    """

    bits: Bits
    group_size: int

    def __call__(self, program: Program) -> int:
        """Returns the number of weights; BuildError where there is none."""
        kept = routing(program)
        found = readers(program, "product")
        kept |= {value for node, value in found if node.outputs[0].is_graph_output()}
        kept |= {value for _, value in readers(program, "rows")}
        values = dict.fromkeys(value for _, value in found if value not in kept)
        matched = sum(self._quantize(program, value) for value in values)
        if not matched:
            raise nothing_quantized()
        return matched

    def _quantize(self, program: Program, value: ir.Value) -> bool:
        assert value.name is not None
        dense = program.weights[value.name]
        width = dense.format.shape[1]
        group = width if self.bits == 8 else largest_group(width, self.group_size)
        if dense.format.kind != "dense" or group is None:
            return False
        fmt = WeightFormat(dense.format.shape, "int", "float16", self.bits, group)

        def load() -> QuantTensor:
            return quantize_rtn(dense, bits=self.bits, group_size=group, symmetric=True)

        program.replace_weight(value.name, LazyTensor(dense.name, fmt, load))
        return True
