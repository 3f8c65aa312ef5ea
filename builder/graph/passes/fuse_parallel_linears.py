"""Concat(Linear(x, A), Linear(x, B), …) becomes one Linear whose weight stacks the rows.

        x                    x
      / | \\                  |
     A  B  C      ──▶    [A; B; C]
      \\ | /                  |
      Concat                 y

This fuses q/k/v and gate/up: one activation read, one quantization of x, one parallel region.
"""

from __future__ import annotations

import onnx_ir as ir

from slipstream.builder.graph.passes.rewrite import replace, sole_consumer
from slipstream.builder.graph.program import Program
from slipstream.plugins.operators import DOMAIN
from slipstream.quantize.tensor import LazyTensor, stack_rows


def fuse_parallel_linears(program: Program) -> int:
    """Fuse every Concat of Linears that read one input and share one weight format."""
    return sum(_fuse(program, concat) for concat in program.nodes("Concat"))


def _fuse(program: Program, concat: ir.Node) -> bool:
    producers = [value.producer() if value is not None else None for value in concat.inputs]
    linears = [node for node in producers if node is not None and node.op_type == "Linear"]
    if len(linears) != len(concat.inputs) or not _compatible(program, linears, concat):
        return False
    inputs: list[ir.Value | None] = [linears[0].inputs[0], _stack(program, linears, 1)]
    if len(linears[0].inputs) > 2:
        inputs.append(_stack(program, linears, 2))
    first = linears[0].attributes
    rows = sum(node.attributes["out_features"].as_int() for node in linears)
    attributes = {"in_features": first["in_features"].as_int(), "out_features": rows}
    name = f"{(concat.name or '').rpartition('/')[0]}/Linear"
    fused = ir.node("Linear", inputs, attributes, domain=DOMAIN, name=name, num_outputs=1)
    replace(program, [*linears, concat], [fused], {concat.outputs[0]: fused.outputs[0]})
    return True


def _compatible(program: Program, linears: list[ir.Node], concat: ir.Node) -> bool:
    formats = {_without_rows(program.weight_of(node)) for node in linears}
    same_input = len({node.inputs[0] for node in linears}) == 1
    same_arity = len({len(node.inputs) for node in linears}) == 1
    single_use = all(sole_consumer(node.outputs[0]) is concat for node in linears)
    plain = all(len(node.inputs) <= 3 and "gated" not in node.attributes for node in linears)
    plain = plain and all(_rows_stack(program.weight_of(node)) for node in linears[:-1])
    return len(formats) == 1 and same_input and same_arity and single_use and plain


def _without_rows(tensor: LazyTensor) -> tuple[object, ...]:
    f = tensor.format
    return (f.shape[1:], f.kind, f.dtype, f.bits, f.group, f.zero, f.rows, f.activation)


def _rows_stack(tensor: LazyTensor) -> bool:
    """Whether another weight can stand below this one: no block of rows is left open."""
    return tensor.format.shape[0] % tensor.format.rows == 0


def _stack(program: Program, linears: list[ir.Node], index: int) -> ir.Value:
    tensors = [program.weight_of(node, index) for node in linears]
    return program.add_weight(stack_rows(tensors))
