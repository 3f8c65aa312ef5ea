"""Cuts a graph at attention: what lies between becomes functions that the graph calls.

    head ─ PagedAttention ─ layer ─ PagedAttention ─ … ─ last ─ Gather ─ tail

A function is written once for all layers that compute the same; weights are arguments. ONNX says
what a function is, so a graph that is cut still says all that it computes.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import onnx_ir as ir

from slipstream.builder.graph.program import OPSET, Program, dtype_name
from slipstream.plugins.operators import LOOKED_UP, PRODUCTS, SEGMENTS

_LAYER = re.compile(r"\blayers\.\d+[./]")


@dataclass(slots=True)
class _Segment:
    """Neighbouring nodes, what they read that others make, and what others read of them."""

    nodes: list[ir.Node]
    inputs: list[ir.Value] = field(default_factory=list)
    outputs: list[ir.Value] = field(default_factory=list)


def cut_segments(program: Program) -> int:
    """Returns the number of calls; ``program.model.functions`` has the functions."""
    groups = list(_groups(program))
    layers = len(program.nodes("PagedAttention"))
    kinds = ["head", *["layer"] * (layers - 1), "last", "tail"]
    known: dict[str, ir.Function] = {}
    for nodes, kind in zip(groups, kinds, strict=True):
        segment = _bounded(nodes)
        text = _text(segment)
        if text not in known:
            known[text] = _function(segment, _unique(kind, known.values()))
            program.model.functions[known[text].identifier()] = known[text]
        _call(program, segment, known[text])
    program.model.opset_imports[SEGMENTS] = 1
    return len(groups)


def _groups(program: Program) -> Iterator[list[ir.Node]]:
    """Runs of nodes between those that the executor computes itself."""
    group: list[ir.Node] = []
    for node in list(program.graph):
        if _is_between(program, node):
            yield from [group] if group else []
            group = []
        else:
            group.append(node)
    yield from [group] if group else []


def _is_between(program: Program, node: ir.Node) -> bool:
    assert program.contract is not None
    seam = program.contract.seam
    picks = seam is not None and node.outputs[0].name == seam[1]
    return picks or node.op_type == "PagedAttention"


def _bounded(nodes: list[ir.Node]) -> _Segment:
    inside = set(nodes)
    inputs: dict[ir.Value, None] = {}
    for node in nodes:
        for value in node.inputs:
            if value is not None and value.producer() not in inside and not _is_small(value):
                inputs[value] = None
    outputs = [
        value
        for node in nodes
        for value in node.outputs
        if value.is_graph_output() or any(use.node not in inside for use in value.uses())
    ]
    return _Segment(nodes, list(inputs), outputs)


def _is_small(value: ir.Value) -> bool:
    """Whether a value is an array that lives in the graph itself."""
    return value.is_initializer() and not isinstance(value.const_value, ir.ExternalTensor)


def _text(segment: _Segment) -> str:
    """All that a segment computes, but for names."""
    numbers = {value: f"i{n}" for n, value in enumerate(segment.inputs)}
    lines = [str([(value.dtype, value.shape) for value in segment.inputs])]
    for node in segment.nodes:
        for value in node.outputs:
            numbers[value] = f"v{len(numbers)}"
        read = [_argument(value, numbers) for value in node.inputs]
        attributes = sorted((a.name, str(a.value)) for a in node.attributes.values())
        lines.append(f"{node.op_type} {read} {attributes} {[numbers[v] for v in node.outputs]}")
    return "\n".join([*lines, *(numbers[value] for value in segment.outputs)])


def _argument(value: ir.Value | None, numbers: dict[ir.Value, str]) -> str:
    if value is None or value in numbers:
        return "" if value is None else numbers[value]
    assert value.const_value is not None
    return f"{value.dtype} {value.shape} {value.const_value.tobytes().hex()}"


def _function(segment: _Segment, name: str) -> ir.Function:
    """A segment as a function whose names say nothing of the layer that it was first found in."""
    names: set[str] = set()
    inside: dict[ir.Value, ir.Value] = {}

    def copy(value: ir.Value) -> ir.Value:
        made = ir.Value(name=_named(value, names), shape=value.shape, type=value.type)
        inside[value] = made
        return made

    inputs, nodes = [copy(value) for value in segment.inputs], []
    for node in segment.nodes:
        for value in node.inputs:
            if value is not None and value not in inside:
                nodes.append(_constant(value, copy(value)))
        read = [None if value is None else inside[value] for value in node.inputs]
        outputs = [copy(value) for value in node.outputs]
        label = _LAYER.sub("", node.name or "")
        nodes.append(ir.node(node.op_type, read, node.attributes, outputs=outputs, name=label))
    outputs = [inside[value] for value in segment.outputs]
    graph = ir.Graph(inputs, outputs, nodes=nodes, opset_imports={"": OPSET}, name=name)
    return ir.Function(SEGMENTS, name, graph=graph, attributes=[])


def _constant(value: ir.Value, made: ir.Value) -> ir.Node:
    assert value.const_value is not None
    return ir.node("Constant", [], {"value": value.const_value}, outputs=[made], name=made.name)


def _named(value: ir.Value, names: set[str]) -> str:
    plain = _LAYER.sub("", (value.name or "").removeprefix("model."))
    name, count = plain, 1
    while name in names:
        count += 1
        name = f"{plain}_{count}"
    names.add(name)
    return name


def _unique(kind: str, functions: Iterable[ir.Function]) -> str:
    same = sum(function.name.split("_")[0] == kind for function in functions)
    return f"{kind}_{same}" if same else kind


def _call(program: Program, segment: _Segment, function: ir.Function) -> None:
    graph, first = program.graph, segment.nodes[0]
    outputs = [ir.Value(shape=value.shape, type=value.type) for value in segment.outputs]
    name = f"{function.name}.{sum(n.domain == SEGMENTS for n in graph)}"
    call = ir.node(function.name, segment.inputs, domain=SEGMENTS, outputs=outputs, name=name)
    products = dict(Counter(_product(node) for node in segment.nodes if node.op_type == "MatMul"))
    tables = [str(n.inputs[0].name) for n in segment.nodes if n.op_type == "Gather" and n.inputs[0]]
    call.metadata_props[PRODUCTS] = json.dumps(products)
    call.metadata_props[LOOKED_UP] = json.dumps(tables)
    graph.insert_before(first, [call])
    for before, after in zip(segment.outputs, outputs, strict=True):
        told = before.name
        before.replace_all_uses_with(after, replace_graph_outputs=True)
        before.name, after.name = None, told
    for node in reversed(segment.nodes):
        graph.remove(node, safe=True)


def _product(node: ir.Node) -> str:
    """What the weight of a product holds, for people: ``int4, groups of 32``."""
    weight = node.inputs[1]
    maker = weight.producer() if weight is not None else None
    if maker is not None and maker.op_type == "Transpose":
        weight = maker.inputs[0]
        maker = weight.producer() if weight is not None else None
    assert weight is not None and weight.dtype is not None
    if maker is None:
        return dtype_name(weight.dtype)
    codes, x = maker.inputs[0], node.inputs[0]
    assert codes is not None and codes.dtype is not None and x is not None
    group = maker.attributes.get_int("block_size", 0)
    scales = f"groups of {group}" if group else "a scale a row"
    rounder = x.producer()
    rounded = rounder is not None and rounder.op_type == "DequantizeLinear"
    return f"{dtype_name(codes.dtype)}, {scales}{', x rounded by a fixed scale' * rounded}"
