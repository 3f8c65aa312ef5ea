"""What passes over weights share: the weights that operators mark, whatever they compute."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import get_args

import onnx_ir as ir

from slipstream.builder.graph.program import Program
from slipstream.plugins.operators import OPERATORS, STANDARD_DOMAINS
from slipstream.plugins.spec import WeightUse
from slipstream.weights.tensor import LazyTensor

log = logging.getLogger(__name__)
# A weight that says something else or the same in another way; None leaves it as it is.
Rewrite = Callable[[LazyTensor], LazyTensor | None]


def weight_index(node: ir.Node, use: WeightUse | None = None) -> int | None:
    """Which input of a node its operator marks as a weight, of this use if one is given."""
    spec = None if node.domain in STANDARD_DOMAINS else OPERATORS.get(node.op_type)
    inputs = () if spec is None or spec.domain != node.domain else spec.inputs
    found = (i for i, tensor in enumerate(inputs) if tensor.weight and use in (None, tensor.weight))
    return next(found, None)


def readers(program: Program, use: WeightUse | None = None) -> list[tuple[ir.Node, ir.Value]]:
    """The nodes that read a weight in this way, and its value, in graph order."""
    found = []
    for node in program.graph:
        index = weight_index(node, use)
        value = None if index is None else node.inputs[index]
        if value is not None:
            found.append((node, value))
    return found


def matrices(program: Program) -> dict[str, LazyTensor]:
    """The weights that are read in any format and are not lowered, by their value: first those of
    products."""
    values = (value for use in get_args(WeightUse) for _, value in readers(program, use))
    names = dict.fromkeys(value.name for value in values)
    return {name: program.weights[name] for name in names if name in program.weights}


def looked_up(program: Program) -> set[str]:
    """Values of the weights whose rows an operator looks up."""
    values = (value for _, value in readers(program, "rows"))
    return {value.name for value in values if value.name is not None}


def routing(program: Program) -> set[ir.Value]:
    """The weights whose products choose experts, or are the one number by which a token takes a
    shared one: another choice is another model, so quantization leaves them as they are."""
    linears = (node.inputs[0] and node.inputs[0].producer() for node in program.nodes("Router"))
    products = {linear for linear in linears if linear is not None}
    return {
        value
        for node, value in readers(program, "product")
        if node in products or node.attributes["out_features"].as_int() == 1
    }


def rewrite_matrices(
    program: Program,
    rewrite: Rewrite,
    message: Callable[[LazyTensor, LazyTensor], str],
    level: int,
) -> int:
    """Replace every matrix that ``rewrite`` has another one for.

    ``message`` of the old and the new weight is logged at ``level``, equal ones once, behind their
    number and the name of the first.
    """
    messages: dict[str, list[str]] = {}
    for name, tensor in matrices(program).items():
        new = rewrite(tensor)
        if new is None:
            continue
        program.replace_weight(name, new)
        messages.setdefault(message(tensor, new), []).append(tensor.name)
    for text, names in messages.items():
        log.log(
            level, "%d weights (%s%s): %s", len(names), names[0], ", …" * (len(names) > 1), text
        )
    return sum(map(len, messages.values()))
