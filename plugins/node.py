"""Checks a node of a graph against the spec of its operator: attributes, dtypes and shapes."""

from __future__ import annotations

from collections.abc import Container

import onnx_ir as ir

from slipstream.plugins.operators import OPERATORS, STANDARD_DOMAINS
from slipstream.plugins.shapes import evaluate
from slipstream.plugins.spec import OperatorSpec, TensorSpec

Bindings = dict[str, int | str]
_ATTRIBUTE_TYPES = {"int": ir.AttributeType.INT, "float": ir.AttributeType.FLOAT}


def node_problem(node: ir.Node, weights: Container[str | None] = ()) -> str | None:
    """What is wrong with a node, None if nothing, or if it is of ONNX's own domains.

    ``weights`` names values that are no arrays yet, but weights in the checkpoint's type.
    """
    if node.domain in STANDARD_DOMAINS:
        return None
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
