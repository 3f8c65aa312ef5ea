"""Checks a program between stages: operators fit their specs, shapes fit each other, weights are
accounted for."""

from __future__ import annotations

from collections.abc import Container

import onnx_ir as ir

from slipstream.builder.graph.program import Program
from slipstream.builder.graph.verify_contract import contract_problem
from slipstream.plugins.operators import OPERATORS, STANDARD_DOMAINS
from slipstream.plugins.shapes import evaluate
from slipstream.plugins.spec import OperatorSpec, TensorSpec

Bindings = dict[str, int | str]
_ATTRIBUTE_TYPES = {"int": ir.AttributeType.INT, "float": ir.AttributeType.FLOAT}


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
        if node.domain not in STANDARD_DOMAINS and (
            problem := _node_problem(node, program.weights)
        ):
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


def _node_problem(node: ir.Node, weights: Container[str | None]) -> str | None:
    spec = OPERATORS.get(node.op_type)
    if spec is None or spec.domain != node.domain:
        return f"{node.name} is of unknown operator {node.domain}.{node.op_type}"
    problem = _attribute_problem(node, spec) or _tensor_problem(node, spec, weights)
    return f"{node.name} ({spec.name}) {problem}" if problem else None


def _attribute_problem(node: ir.Node, spec: OperatorSpec) -> str | None:
    known = {attribute.name: attribute for attribute in spec.attributes}
    unknown = set(node.attributes) - set(known)
    if unknown:
        return f"has unknown attributes {sorted(unknown)}"
    missing = {a.name for a in spec.attributes if a.default is None} - set(node.attributes)
    if missing:
        return f"lacks attributes {sorted(missing)}"
    for attribute in node.attributes.values():
        expected = known[attribute.name].type
        if attribute.type != _ATTRIBUTE_TYPES[expected]:
            found = attribute.type.name.lower()
            return f"has attribute {attribute.name} of type {found}, expected {expected}"
        try:
            known[attribute.name].typed(attribute.value)
        except ValueError as error:
            return f"is refused: {error}"
    return None


def _tensor_problem(
    node: ir.Node, spec: OperatorSpec, weights: Container[str | None]
) -> str | None:
    if len(node.inputs) > len(spec.inputs) or len(node.outputs) > len(spec.outputs):
        return f"has {len(node.inputs)} inputs and {len(node.outputs)} outputs"
    bindings: Bindings = {a.name: a.default for a in spec.attributes if isinstance(a.default, int)}
    bindings |= {
        a.name: a.as_int() for a in node.attributes.values() if a.type == ir.AttributeType.INT
    }
    for index, tensor in enumerate(spec.inputs):
        value = node.inputs[index] if index < len(node.inputs) else None
        if value is None:
            if not tensor.optional:
                return f"lacks input {tensor.name}"
            continue
        # A weight has the checkpoint's type until it is lowered.
        typed = None if value.name in weights else _dtype_problem(value, tensor)
        problem = typed or _shape_problem(value, tensor, bindings)
        if problem:
            return problem
    for value, tensor in zip(node.outputs, spec.outputs, strict=False):
        problem = _dtype_problem(value, tensor) or _shape_problem(value, tensor, bindings)
        if problem:
            return problem
    return None


def _dtype_problem(value: ir.Value, tensor: TensorSpec) -> str | None:
    found = "none" if value.dtype is None else value.dtype.name.lower()
    found = {"float": "float32"}.get(found, found)
    if found in tensor.dtypes:
        return None
    return f"has {tensor.name} of dtype {found}, expected {' or '.join(tensor.dtypes)}"


def _shape_problem(value: ir.Value, tensor: TensorSpec, bindings: Bindings) -> str | None:
    if not tensor.shape:
        return None
    if value.shape is None or len(value.shape) != len(tensor.shape):
        return f"has {tensor.name} of shape {value.shape}, expected {tensor.shape}"
    for actual, symbol in zip(value.shape, tensor.shape, strict=True):
        found = actual if isinstance(actual, int) else str(actual.value)
        expected = _evaluate(symbol, bindings)
        if expected is None:
            bindings[symbol] = found
        elif found != expected and isinstance(found, int) == isinstance(expected, int):
            return (
                f"has {tensor.name} of shape {value.shape}, "
                f"expected {tensor.shape} with {symbol} = {expected}"
            )
    return None


def _evaluate(size: str, bindings: Bindings) -> int | str | None:
    if size in bindings:
        return bindings[size]
    return evaluate(size, {n: v for n, v in bindings.items() if isinstance(v, int)})
