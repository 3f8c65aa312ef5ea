"""Replaces dense weights of products and lookups by round-to-nearest integer groups, lazily."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass

import onnx_ir as ir

from slipstream.builder.graph.passes.matrices import readers, routing, weight_index
from slipstream.builder.graph.passes.rewrite import sole_consumer
from slipstream.builder.graph.program import Program
from slipstream.errors import BuildError
from slipstream.weights.rtn import Bits, largest_group, quantize_rtn
from slipstream.weights.tensor import LazyTensor, QuantTensor, WeightFormat, ZeroKind

log = logging.getLogger(__name__)
_AFTER_LOGITS = ("AllGather", "Slice", "SoftCap")


@dataclass(frozen=True, slots=True)
class QuantizeWeights:
    """Weight-only quantization at build time.

    ``bits`` of products; the embedding and the output head, which are read by rows and by logits,
    get at least 8. ``group_size`` is what is asked for: a weight whose width it does not divide
    takes the largest of 128, 64 and 32 that does, and stays dense where none does.
    """

    bits: Bits
    group_size: int
    symmetric: bool

    def __call__(self, program: Program) -> int:
        """Quantize every dense weight that an operator reads in any format, but a router's;
        BuildError where none can be."""
        heads = {
            value
            for node, value in readers(program)
            if weight_index(node, "rows") is not None or _makes_logits(node)
        }
        kept = routing(program)
        values = dict.fromkeys(value for _, value in readers(program) if value not in kept)
        dense = [value for value in values if _weight(program, value).format.kind == "dense"]
        self._tell(_weight(program, value) for value in dense)
        matched = sum(
            self._quantize(program, value, 8 if value in heads else self.bits) for value in dense
        )
        if not matched:
            raise nothing_quantized()
        return matched

    def _tell(self, weights: Iterable[LazyTensor]) -> None:
        """Log the widths that the group asked for does not divide, once each."""
        named: dict[int, list[str]] = {}
        for weight in weights:
            named.setdefault(weight.format.shape[1], []).append(weight.name)
        for width, names in named.items():
            group = largest_group(width, self.group_size)
            told = (len(names), names[0], ", …" * (len(names) > 1), width)
            if group is None:
                log.warning(
                    "%d weights (%s%s) stay dense: no group of 128, 64 or 32 divides %d columns",
                    *told,
                )
            elif group != self.group_size:
                log.info("%d weights (%s%s) of %d columns take groups of %d", *told, group)

    def _quantize(self, program: Program, value: ir.Value, bits: Bits) -> bool:
        assert value.name is not None
        dense = program.weights[value.name]
        group = largest_group(dense.format.shape[1], self.group_size)
        if group is None:
            return False
        zero: ZeroKind = "midpoint" if self.symmetric else "zero"
        format = WeightFormat(dense.format.shape, "int", "float16", bits, group, zero)

        def load() -> QuantTensor:
            return quantize_rtn(dense, bits=bits, group_size=group, symmetric=self.symmetric)

        program.weights[value.name] = LazyTensor(dense.name, format, load)
        value.type = ir.TensorType(ir.DataType.UINT4 if bits == 4 else ir.DataType.UINT8)
        return True


def nothing_quantized() -> BuildError:
    """The error of a quantization that would do nothing."""
    return BuildError(
        "no weight can be quantized: each is quantized in the checkpoint already, or has a width "
        "that no group divides; leave --quantization out"
    )


def _makes_logits(node: ir.Node) -> bool:
    """Whether what a node makes leaves the graph, perhaps gathered from ranks or capped."""
    value = node.outputs[0]
    reader = sole_consumer(value)
    if reader is None:
        return value.is_graph_output()
    return reader.op_type in _AFTER_LOGITS and _makes_logits(reader)


def _weight(program: Program, value: ir.Value) -> LazyTensor:
    return program.weights[value.name or ""]
