"""Concat(Linear(x, A), Linear(x, B), …) becomes one Linear whose weight stacks the rows.

        x                    x
      / | \\                  |
     A  B  C      ──▶    [A; B; C]
      \\ | /                  |
      Concat                 y

This fuses q/k/v and gate/up: one activation read, one quantization of x, one parallel region. Of
weights in different formats, neighbours of one format are fused and the others stay apart.
"""

from __future__ import annotations

from itertools import pairwise

import onnx_ir as ir

from slipstream.builder.graph.passes.rewrite import replace, sole_consumer
from slipstream.builder.graph.program import Program
from slipstream.plugins.operators import DOMAIN
from slipstream.weights.tensor import LazyTensor, stack_rows


def fuse_parallel_linears(program: Program) -> int:
    """Fuse neighbours in every Concat of Linears that read one input in one weight format."""
    return sum(_fuse(program, concat) for concat in program.nodes("Concat"))


def _fuse(program: Program, concat: ir.Node) -> bool:
    producers = [value.producer() if value is not None else None for value in concat.inputs]
    linears = [node for node in producers if node is not None and node.op_type == "Linear"]
    if len(linears) != len(concat.inputs) or not all(_is_plain(node, concat) for node in linears):
        return False
    runs = _runs(program, linears)
    fused = [_stacked(program, run, concat) if len(run) > 1 else run[0] for run in runs]
    old = [node for run in runs if len(run) > 1 for node in run]
    new = [node for node in fused if node not in linears]
    if not old:
        return False
    last = new[0]
    if len(runs) > 1:
        inputs = [node.outputs[0] for node in fused]
        last = ir.node("Concat", inputs, concat.attributes, num_outputs=1, name=concat.name)
        new.append(last)
    replace(program, [*old, concat], new, {concat.outputs[0]: last.outputs[0]})
    return True


def _runs(program: Program, linears: list[ir.Node]) -> list[list[ir.Node]]:
    """Neighbours that one Linear can stand for."""
    runs = [[linears[0]]]
    for before, node in pairwise(linears):
        if _compatible(program, before, node):
            runs[-1].append(node)
        else:
            runs.append([node])
    return runs


def _compatible(program: Program, above: ir.Node, below: ir.Node) -> bool:
    formats = {_without_rows(program.weight_of(node)) for node in (above, below)}
    same_input = above.inputs[0] is below.inputs[0]
    same_arity = len(above.inputs) == len(below.inputs)
    return len(formats) == 1 and same_input and same_arity and _rows_stack(program.weight_of(above))


def _is_plain(node: ir.Node, concat: ir.Node) -> bool:
    single_use = sole_consumer(node.outputs[0]) is concat
    return single_use and len(node.inputs) <= 3 and "gated" not in node.attributes


def _stacked(program: Program, linears: list[ir.Node], concat: ir.Node) -> ir.Node:
    inputs: list[ir.Value | None] = [linears[0].inputs[0], _stack(program, linears, 1)]
    if len(linears[0].inputs) > 2:
        inputs.append(_stack(program, linears, 2))
    first = linears[0].attributes
    rows = sum(node.attributes["out_features"].as_int() for node in linears)
    attributes = {"in_features": first["in_features"].as_int(), "out_features": rows}
    whole = len(linears) == len(concat.inputs)
    parts = "" if whole else "+".join(_module(node) for node in linears) + "/"
    name = f"{(concat.name or '').rpartition('/')[0]}/{parts}Linear"
    shape = ir.Shape([linears[0].outputs[0].shape[0], rows])  # type: ignore[index]
    output = ir.Value(name=None if whole else name, shape=shape, type=linears[0].outputs[0].type)
    return ir.node("Linear", inputs, attributes, domain=DOMAIN, name=name, outputs=[output])


def _module(node: ir.Node) -> str:
    """``q_proj`` of a node called ``layers.0/attn/q_proj/Linear``."""
    return (node.name or "").rpartition("/")[0].rpartition("/")[2]


def _without_rows(tensor: LazyTensor) -> tuple[object, ...]:
    f = tensor.format
    return (f.shape[1:], f.kind, f.dtype, f.bits, f.group, f.zero, f.rows, f.activation)


def _rows_stack(tensor: LazyTensor) -> bool:
    """Whether another weight can stand below this one: no block of rows is left open."""
    return tensor.format.shape[0] % tensor.format.rows == 0


def _stack(program: Program, linears: list[ir.Node], index: int) -> ir.Value:
    tensors = [program.weight_of(node, index) for node in linears]
    return program.add_weight(stack_rows(tensors))
