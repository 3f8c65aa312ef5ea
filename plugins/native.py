"""The compiled kernel of an operator called without a session: to sample, to test, to measure."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slipstream.plugins import library
from slipstream.plugins.arguments import ELEMENT_TYPES, cpu_dtypes, fields
from slipstream.plugins.shapes import bindings, evaluate
from slipstream.plugins.spec import OperatorSpec, TensorSpec

Array = NDArray[Any]
_TYPES: dict[str, type] = {
    "pointer": ctypes.c_void_p,
    "element": ctypes.c_int32,
    "int": ctypes.c_int64,
    "float": ctypes.c_float,
}
_NUMPY_NAMES = {"float8_e4m3fn": "float8e4m3fn"}


@cache
def arguments_type(spec: OperatorSpec) -> type[ctypes.Structure]:
    """``NAMEArgs`` of the generated ``operators.h`` in ctypes."""
    members = [(field.name, _TYPES[field.kind]) for field in fields(spec)]
    return type(f"{spec.name}Args", (ctypes.Structure,), {"_fields_": members})


def arguments(
    spec: OperatorSpec, values: Mapping[str, Any], outputs: Mapping[str, Array]
) -> ctypes.Structure:
    """The struct of a call: it points into the arrays, which must outlive it.

    ``values`` has the inputs (None or left out where optional) and the attributes by name. Arrays
    are C-contiguous, in the shapes and dtypes of the spec.
    """
    sizes = _sizes(spec, values)
    members: dict[str, Any] = spec.typed({a.name: sizes[a.name] for a in spec.attributes})
    members |= {name: sizes[name] for name in bindings(spec)}
    for tensor in spec.inputs:
        members |= _members(tensor, values.get(tensor.name), sizes)
    for tensor in spec.outputs:
        members |= _members(tensor, outputs[tensor.name], sizes)
    known = {field.name for field in fields(spec)}
    return arguments_type(spec)(**{name: v for name, v in members.items() if name in known})


def run(
    spec: OperatorSpec, args: ctypes.Structure, isa: str | None = None, threads: int = 1
) -> None:
    """The kernel of an instruction set, one of ``library.isas()``, None for the first;
    ValueError for another. Threads beyond the caller's are made for the call."""
    if _entry(spec)(ctypes.byref(args), isa.encode() if isa else None, threads) != 0:
        raise ValueError(f"no kernels for {isa!r}; this machine has {', '.join(library.isas())}")


def call(
    spec: OperatorSpec, values: Mapping[str, Any], isa: str, threads: int = 1
) -> tuple[Array, ...]:
    """The outputs that a kernel makes of inputs and attributes by name (see ``arguments``)."""
    sizes = _sizes(spec, values)
    outputs = {
        tensor.name: _unwritten(_shape(tensor, sizes), np.dtype(cpu_dtypes(tensor)[0]))
        for tensor in spec.outputs
    }
    run(spec, arguments(spec, values, outputs), isa, threads)
    return tuple(outputs.values())


def _unwritten(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    """An array that shows what no kernel has written."""
    return np.full(shape, np.iinfo(dtype).min if dtype.kind == "i" else np.nan, dtype)


def _sizes(spec: OperatorSpec, values: Mapping[str, Any]) -> dict[str, Any]:
    """Attributes, and what the inputs' shapes say."""
    sizes = {a.name: values.get(a.name, a.default) for a in spec.attributes}
    for name, (index, axis) in bindings(spec).items():
        sizes[name] = values[spec.inputs[index].name].shape[axis]
    return sizes


def _shape(tensor: TensorSpec, sizes: Mapping[str, int]) -> tuple[int, ...]:
    found = (evaluate(size, sizes) for size in tensor.shape)
    return tuple(size for size in found if size is not None)


def _members(tensor: TensorSpec, array: Array | None, sizes: Mapping[str, int]) -> dict[str, Any]:
    if array is None:
        assert tensor.optional, f"{tensor.name} is missing"
        return {tensor.name: None}
    dtype = _NUMPY_NAMES.get(array.dtype.name, array.dtype.name)
    assert dtype in cpu_dtypes(tensor), f"{tensor.name} has dtype {dtype}"
    assert array.flags.c_contiguous, f"{tensor.name} of shape {array.shape} is not contiguous"
    assert not tensor.shape or array.shape == _shape(tensor, sizes), (tensor.name, array.shape)
    members = {tensor.name: array.ctypes.data, f"{tensor.name}_size": array.size}
    if len(cpu_dtypes(tensor)) > 1:
        members[f"{tensor.name}_type"] = ELEMENT_TYPES[dtype]
    return members


@cache
def _entry(spec: OperatorSpec) -> Callable[..., int]:
    assert spec.native is not None, f"{spec.name} has no CPU kernel"
    function: Any = getattr(library.load(spec.native), f"slipstream_{spec.function}")
    function.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int)
    function.restype = ctypes.c_int
    return function  # type: ignore[no-any-return]
