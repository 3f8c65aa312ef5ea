"""Checks a graph against its contract: what it reads and gives, its caches and its seam."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import onnx_ir as ir

from slipstream.builder.contract import (
    BOUND_SOURCES,
    PAGED_SOURCES,
    CacheSpec,
    GraphSpec,
    Output,
    Port,
)
from slipstream.builder.graph.program import dtype_name
from slipstream.plugins.operators import DOMAIN, OPERATORS


def contract_problem(
    graph: ir.Graph, contract: GraphSpec, caches: Sequence[CacheSpec]
) -> str | None:
    """What the graph does that its contract does not say; None if nothing."""
    return (
        _value_problem("inputs", graph.inputs, contract.inputs)
        or _value_problem("outputs", graph.outputs, contract.outputs)
        or _attention_problem(graph, contract, caches)
        or _update_problem(graph, contract)
        or (_seam_problem(graph, *contract.seam) if contract.seam else None)
    )


def _value_problem(
    which: str, values: Iterable[ir.Value], told: Sequence[Port] | Sequence[Output]
) -> str | None:
    found = {(str(value.name), _dtype(value), _shape(value)) for value in values}
    wanted = {(each.name, each.dtype, each.shape) for each in told}
    if found == wanted:
        return None
    return f"the {which} are not the contract's: {sorted(map(str, found ^ wanted))}"


def _attention_problem(
    graph: ir.Graph, contract: GraphSpec, caches: Sequence[CacheSpec]
) -> str | None:
    """Attention reads ports of one paged cache, has its layers and sees no further than that
    keeps. That shapes fit is checked with those of all operators."""
    owners = {port.name: port.cache for port in contract.inputs}
    specs = {cache.name: cache for cache in caches}
    inputs = OPERATORS["PagedAttention"].inputs
    for node in graph:
        if (node.domain, node.op_type) != (DOMAIN, "PagedAttention"):
            continue
        found = {
            owners.get(value.name or "")
            for tensor, value in zip(inputs, node.inputs, strict=False)
            if value is not None and (tensor.written or tensor.name in PAGED_SOURCES)
        }
        if len(found) != 1 or None in found:
            return f"{node.name} reads pages of {sorted(found, key=str)}, not of one cache"
        cache = specs[str(found.pop())]
        layer, window = (
            node.attributes["layer"].as_int(),
            node.attributes.get_int("sliding_window", 0),
        )
        if not 0 <= layer < len(cache.layers):
            return f"{node.name} is layer {layer} of {len(cache.layers)} in cache {cache.name}"
        if cache.window and not 0 < window <= cache.window:
            return f"{node.name} sees {window or 'all'} keys, of which {cache.window} are kept"
    return None


def _update_problem(graph: ir.Graph, contract: GraphSpec) -> str | None:
    """An output that takes the place of an array is made of, or after, all that reads it."""
    inputs = {value.name: value for value in graph.inputs}
    outputs = {value.name: value for value in graph.outputs}
    arrays = {port.name for port in contract.inputs if port.source in BOUND_SOURCES}
    for output in contract.outputs:
        if output.updates is None:
            continue
        if output.updates not in arrays:
            return f"output {output.name} updates {output.updates}, which is no array of a cache"
        before = _ancestors(outputs[output.name])
        late = [use.node.name for use in inputs[output.updates].uses() if use.node not in before]
        if late:
            return f"{late[0]} may read {output.updates} after {output.name} took its place"
    return None


def _seam_problem(graph: ir.Graph, before: str, after: str) -> str | None:
    """The rows are picked of what is before, and nothing else reaches what comes after."""
    nodes = list(graph)
    at = next((i for i, node in enumerate(nodes) if after in _made([node])), None)
    if at is None or before not in {value.name for value in nodes[at].inputs if value}:
        return f"{after} is not made of {before}, where the contract has a seam"
    known = {after, *graph.initializers, *_made(nodes[at + 1 :])}
    for node in nodes[at + 1 :]:
        for value in node.inputs:
            if value is not None and value.name not in known:
                return f"{node.name} reads {value.name} across the seam"
    return None


def _ancestors(value: ir.Value) -> set[ir.Node]:
    """The nodes that a value is made of, its own included."""
    found: set[ir.Node] = set()
    stack = [value.producer()]
    while stack:
        node = stack.pop()
        if node is not None and node not in found:
            found.add(node)
            stack += [source.producer() for source in node.inputs if source is not None]
    return found


def _made(nodes: Iterable[ir.Node]) -> set[str | None]:
    return {value.name for node in nodes for value in node.outputs}


def _dtype(value: ir.Value) -> str | None:
    return None if value.dtype is None else dtype_name(value.dtype)


def _shape(value: ir.Value) -> tuple[int | str | None, ...] | None:
    if value.shape is None:
        return None
    return tuple(dim if isinstance(dim, int) else dim.value for dim in value.shape)
