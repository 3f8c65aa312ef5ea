"""The type of everything that flows, chosen when all is lowered: until then it is float32."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from slipstream.builder.graph.program import Program, StoredWeight, ir_dtype
from slipstream.weights.tensor import numpy_dtype

_FLOAT = ir.DataType.FLOAT
_SUFFIX = ".float32"
Arrays = tuple[NDArray[np.generic], ...]


@dataclass(frozen=True, slots=True)
class SetPrecision:
    """Gives ``dtype`` to what is float32: stored arrays, constants, and every value up to the Cast
    that widens the graph's output."""

    dtype: str

    def __call__(self, program: Program) -> int:
        """Returns the number of values and stored arrays of another type."""
        if self.dtype == "float32":
            return 0
        program.stored = {
            made.parts[0].name: made
            for made in (self._stored(program, weight) for weight in program.stored.values())
        }
        changed = len(program.stored)
        wide: set[ir.Value] = set()
        for node in program.graph:
            if node.op_type == "Cast" or any(value in wide for value in node.inputs):
                wide.update(node.outputs)
                continue
            for index, value in enumerate(node.inputs):
                if value is not None and _is_float(value) and _is_constant(program, value):
                    node.replace_input_with(index, self._constant(program, value))
            for value in filter(_is_float, node.outputs):
                value.type = ir.TensorType(ir_dtype(self.dtype))
                changed += 1
        return changed

    def _stored(self, program: Program, weight: StoredWeight) -> StoredWeight:
        wide = [part.dtype == np.float32 for part in weight.parts]
        parts = tuple(
            replace(part, name=self._renamed(part.name), dtype=numpy_dtype(self.dtype))
            if is_wide
            else part
            for part, is_wide in zip(weight.parts, wide, strict=True)
        )
        for old, part in zip(weight.parts, parts, strict=True):
            if old is not part:
                self._retype(program, old.name, part.name, part.nbytes)
        return StoredWeight(parts, _rounded(weight.load, wide, numpy_dtype(self.dtype)))

    def _retype(self, program: Program, old: str, new: str, nbytes: int) -> None:
        """Let a stored value have another name and type."""
        value = program.graph.initializers.pop(old)
        dtype = ir_dtype(self.dtype)
        value.name, value.type = new, ir.TensorType(dtype)
        value.const_value = ir.ExternalTensor("", 0, nbytes, dtype, shape=value.shape, name=new)  # type: ignore[arg-type]
        program.graph.register_initializer(value)

    def _renamed(self, name: str) -> str:
        stem = name.removesuffix(_SUFFIX)
        return f"{stem}.{self.dtype}" if stem != name else name

    def _constant(self, program: Program, value: ir.Value) -> ir.Value:
        assert value.const_value is not None
        array = value.const_value.numpy().astype(numpy_dtype(self.dtype))
        return program.constant(f"{value.name}.{self.dtype}", array)


def _rounded(
    load: Callable[[], Arrays], wide: list[bool], dtype: np.dtype[np.generic]
) -> Callable[[], Arrays]:
    def rounded() -> Arrays:
        pairs = zip(load(), wide, strict=True)
        return tuple(array.astype(dtype) if is_wide else array for array, is_wide in pairs)

    return rounded


def _is_float(value: ir.Value) -> bool:
    return value.dtype == _FLOAT


def _is_constant(program: Program, value: ir.Value) -> bool:
    return value.name in program.graph.initializers
