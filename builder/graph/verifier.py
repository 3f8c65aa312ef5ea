"""Checks a program between stages: operators fit their specs, shapes fit each other, weights are
accounted for."""

from __future__ import annotations

from slipstream.builder.graph.program import Program
from slipstream.builder.graph.verify_contract import contract_problem
from slipstream.plugins.node import node_problem


class VerificationError(AssertionError):
    """A stage of the compiler made a program that is not well-formed; always a defect of
    Slipstream."""


def verify(program: Program, stage: str) -> None:
    """Raise VerificationError, naming the stage and the node, unless the program is well-formed."""
    problem = program_problem(program)
    if problem:
        raise VerificationError(f"after {stage}: {problem}")


def program_problem(program: Program) -> str | None:
    """What is not well-formed about a program; None if nothing."""
    return (
        _order_problem(program)
        or _weight_problem(program)
        or (
            contract_problem(program.graph, program.contract, program.caches)
            if program.contract
            else None
        )
    )


def _order_problem(program: Program) -> str | None:
    """Of the nodes, in their order."""
    known = set(program.graph.inputs) | set(program.graph.initializers.values())
    for node in program.graph:
        for value in node.inputs:
            if value is not None and value not in known:
                return f"{node.name} reads {value.name} before anything makes it"
        known.update(node.outputs)
        if problem := node_problem(node, program.weights):
            return problem
    for value in program.graph.outputs:
        if value not in known:
            return f"output {value.name} is made by no node"
    return None


def _weight_problem(program: Program) -> str | None:
    for name in (
        *program.weights,
        *(part.name for s in program.stored.values() for part in s.parts),
    ):
        if name not in program.graph.initializers:
            return f"weight {name} belongs to no value of the graph"
    return None
