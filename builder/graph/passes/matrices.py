"""What passes over weights share: which weights are matrices of a Linear or an Embedding."""

from __future__ import annotations

import logging
from collections.abc import Callable

from slipstream.builder.graph.program import Program
from slipstream.weights.tensor import LazyTensor

log = logging.getLogger(__name__)
_OPERATORS = ("Linear", "Embedding")
# A weight that says something else or the same in another way; None leaves it as it is.
Rewrite = Callable[[LazyTensor], LazyTensor | None]


def matrices(program: Program) -> dict[str, LazyTensor]:
    """The weights that Linears and Embeddings read and that are not lowered, by their value."""
    values = (node.inputs[1] for op in _OPERATORS for node in program.nodes(op))
    names = dict.fromkeys(value.name for value in values if value is not None)
    return {name: program.weights[name] for name in names if name in program.weights}


def embedded(program: Program) -> set[str]:
    """Values of the weights that an Embedding reads."""
    values = (node.inputs[1] for node in program.nodes("Embedding"))
    return {value.name for value in values if value is not None and value.name is not None}


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
