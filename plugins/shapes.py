"""The sizes in a spec's shapes: names, and expressions of names and attributes."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from functools import cache
from types import CodeType

from slipstream.plugins.spec import OperatorSpec

# Functions of ``plugins/cpu/call.h``, which refuse what 64 bits do not hold.
_OPERATIONS = {ast.Add: "add", ast.Sub: "subtract", ast.Mult: "multiply", ast.FloorDiv: "divide"}


@cache
def names(expression: str) -> tuple[str, ...]:
    """The names in an expression, in order."""
    return tuple(n.id for n in ast.walk(ast.parse(expression)) if isinstance(n, ast.Name))


def evaluate(expression: str, sizes: Mapping[str, int]) -> int | None:
    """The value of an expression, or None where a name has none yet."""
    if any(name not in sizes for name in names(expression)):
        return None
    # Expressions come from specs, never from a file.
    return int(eval(_compiled(expression), {"__builtins__": {}}, dict(sizes)))


def bindings(spec: OperatorSpec) -> dict[str, tuple[int, int]]:
    """Where each size that is no attribute comes from: an input that must be there, and its axis.

    ValueError for a name that is the whole of no such axis.
    """
    known = {attribute.name for attribute in spec.attributes}
    found: dict[str, tuple[int, int]] = {}
    for index, tensor in enumerate(spec.inputs):
        for axis, size in enumerate(tensor.shape):
            if size.isidentifier() and size not in known and not tensor.optional:
                found.setdefault(size, (index, axis))
    for tensor in (*spec.inputs, *spec.outputs):
        for size in tensor.shape:
            for name in names(size):
                if name not in known and name not in found:
                    raise ValueError(
                        f"{spec.name}: {name}, in the shape of {tensor.name}, is neither an "
                        f"attribute nor a whole axis of a required input"
                    )
    return found


def in_cpp(expression: str) -> str:
    """The expression in C++, of fields of ``args``."""
    return _in_cpp(ast.parse(expression, mode="eval").body)


@cache
def _compiled(expression: str) -> CodeType:
    return compile(expression, "<a spec's shape>", "eval")


def _in_cpp(node: ast.expr) -> str:
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.Name):
        return f"args.{node.id}"
    assert isinstance(node, ast.BinOp), f"a size may not hold {ast.unparse(node)}"
    left, right = _in_cpp(node.left), _in_cpp(node.right)
    return f"{_OPERATIONS[type(node.op)]}({left}, {right})"
