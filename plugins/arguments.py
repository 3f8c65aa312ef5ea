"""What a C++ kernel is given: the struct of its arguments, derived from the operator's spec.

``plugins/cpu/codegen.py`` spells it in C++, ``plugins/native.py`` in ctypes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from slipstream.plugins.shapes import bindings
from slipstream.plugins.spec import ACTIVATION_DTYPES, OperatorSpec, TensorSpec

# ONNX's numbers of the element types that a CPU kernel may be given.
ELEMENT_TYPES = {
    "float32": 1,
    "uint8": 2,
    "int8": 3,
    "int32": 6,
    "int64": 7,
    "float16": 10,
    "float8e4m3fn": 17,
}


@dataclass(frozen=True, slots=True)
class Field:
    """One member: a pointer to a tensor, the element type of one, a size, or an attribute."""

    name: str
    kind: Literal["pointer", "element", "int", "float"]
    doc: str
    tensor: TensorSpec | None = None


def cpu_dtypes(tensor: TensorSpec) -> tuple[str, ...]:
    """The dtypes of a tensor on a CPU: activations are float32, and there is no bfloat16."""
    if tensor.dtypes == ACTIVATION_DTYPES:
        return ("float32",)
    return tuple(dtype for dtype in tensor.dtypes if dtype in ELEMENT_TYPES)


def fields(spec: OperatorSpec) -> tuple[Field, ...]:
    """The members in order: tensors, then element types and sizes that vary, then attributes.

    A tensor whose shape the spec leaves open comes with its number of elements, ``NAME_size``; one
    that may have several dtypes with ``NAME_type``.
    """
    return tuple(_fields(spec))


def _fields(spec: OperatorSpec) -> Iterator[Field]:
    tensors = (*spec.inputs, *(replace(tensor, written=True) for tensor in spec.outputs))
    for tensor in tensors:
        shape = f"[{', '.join(tensor.shape)}]" if tensor.shape else "any shape"
        doc = f"{shape}{', or null' if tensor.optional else ''}: {tensor.doc}"
        yield Field(tensor.name, "pointer", doc, tensor)
    for tensor in tensors:
        if len(cpu_dtypes(tensor)) > 1:
            yield Field(f"{tensor.name}_type", "element", f"of {tensor.name}", tensor)
    for tensor in tensors:
        if not tensor.shape:
            yield Field(f"{tensor.name}_size", "int", f"elements of {tensor.name}", tensor)
    for name, (index, axis) in bindings(spec).items():
        yield Field(name, "int", f"axis {axis} of {spec.inputs[index].name}")
    for attribute in spec.attributes:
        yield Field(attribute.name, attribute.type, attribute.doc)
