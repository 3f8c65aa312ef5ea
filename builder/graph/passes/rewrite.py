"""The one edit that passes make: some nodes out, others in, uses redirected."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import onnx_ir as ir

from slipstream.builder.graph.program import Program
from slipstream.weights.tensor import WeightFormat

# Whether a target's kernels of Linear take a weight of this format, with all that is fused into it.
Holds = Callable[[WeightFormat], bool]


def replace(
    program: Program,
    old: Sequence[ir.Node],
    new: Sequence[ir.Node],
    values: Mapping[ir.Value, ir.Value],
) -> None:
    """Put ``new`` where the last of ``old`` stood, let ``values`` take over all uses, and remove
    ``old``.

    A taken-over value passes on its name, shape and type, so that names stay those of the model.
    """
    graph = program.graph
    graph.insert_after(old[-1], list(new))
    for before, after in values.items():
        after.shape, after.type = before.shape, before.type
        name = before.name
        before.replace_all_uses_with(after, replace_graph_outputs=True)
        before.name, after.name = None, name
    for node in reversed(old):
        graph.remove(node, safe=True)


def linear_only_for(consumer: ir.Node, value: ir.Value | None) -> ir.Node | None:
    """The Linear that makes ``value`` for ``consumer`` and nobody else; None if it is not so."""
    producer = value.producer() if value is not None else None
    if value is None or producer is None or producer.op_type != "Linear":
        return None
    return producer if sole_consumer(value) is consumer else None


def sole_consumer(value: ir.Value) -> ir.Node | None:
    """The only node that reads ``value``, or None when there are several, none, or a graph
    output."""
    uses = value.uses()
    return next(iter(uses)).node if len(uses) == 1 and not value.is_graph_output() else None
