"""Products and lookups as TensorRT's ONNX parser takes them.

    Linear:   x ─ [QuantizeLinear ─ DequantizeLinear] ─ MatMul ─ [Add] ─ y
                       W ─ [DequantizeLinear] ─ [Transpose] ─┘

The forms are those for which TensorRT was seen to choose one fused kernel: codes of 8 bits lie
``[K, N]`` and may be arguments of a plan, those of 4 bits must be constants of it, as must all
scales where x is rounded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from slipstream.builder.engine import CONSTANT
from slipstream.builder.graph.passes.dequantize_unheld import as_dense
from slipstream.builder.graph.passes.rewrite import replace
from slipstream.builder.graph.program import Program, StoredWeight, ir_dtype
from slipstream.weights.safetensors import ArraySpec
from slipstream.weights.tensor import LazyTensor, QuantTensor, WeightFormat, numpy_dtype

# Blocks of int4 that TensorRT's fused kernels were seen to take.
GROUPS = (16, 32, 64, 96, 128, 256)
_INT8 = np.dtype(np.int8)
_FP8 = np.dtype(ml_dtypes.float8_e4m3fn)
_SCALE = np.dtype(np.float32)
_MIDPOINT, _MIDPOINTS = 0x80, 0x88  # the sign bit of a code of 8 bits, and of two of 4


def holds(fmt: WeightFormat) -> bool:
    """Whether a plan multiplies by a matrix of this format in a fused kernel."""
    k = fmt.shape[-1]
    if len(fmt.shape) != 2 or fmt.rows != 1:
        return False
    if fmt.kind == "float8_e4m3":
        return fmt.group == k and fmt.activation in ("none", "static")
    if fmt.kind != "int" or fmt.zero != "midpoint":
        return False
    if fmt.bits == 8:
        return fmt.group == k and fmt.activation in ("none", "static")
    return fmt.group in GROUPS and fmt.group < k and k % fmt.group == 0


def rounds(fmt: WeightFormat) -> bool:
    """Whether x is rounded as a format says: by a scale that is known when the plan is made."""
    return fmt.activation == "static" and holds(fmt)


@dataclass(frozen=True, slots=True)
class LowerLinear:
    """Linear becomes MatMul; ``dtype`` is that of x, of dense weights and of scales."""

    dtype: str

    def __call__(self, program: Program) -> int:
        """Returns the number of products."""
        nodes = program.nodes("Linear")
        for node in nodes:
            made: list[ir.Node] = []
            y = _Maker(program, made, self.dtype).product(node)
            for number, part in enumerate(made):
                part.name = f"{node.name}/{number}"
                part.outputs[0].name = f"{part.name}/0"
            replace(program, [node], made, {node.outputs[0]: y})
        return len(nodes)


@dataclass(frozen=True, slots=True)
class LowerEmbedding:
    """Embedding becomes Gather of rows of ``dtype``; a table that products read, too, is stored
    once, if they read it dense."""

    dtype: str

    def __call__(self, program: Program) -> int:
        """Returns the number of lookups."""
        nodes = program.nodes("Embedding")
        for node in nodes:
            table = store_dense(program, program.weight_of(node), self.dtype)
            inputs = [table, node.inputs[0]]
            gather = ir.node("Gather", inputs, {"axis": 0}, num_outputs=1, name=node.name)
            replace(program, [node], [gather], {node.outputs[0]: gather.outputs[0]})
        return len(nodes)


def store_dense(program: Program, tensor: LazyTensor, dtype: str) -> ir.Value:
    """The graph value of a weight as numbers of ``dtype``, made on first use."""
    part = ArraySpec(f"{tensor.name}.{dtype}", numpy_dtype(dtype), tensor.format.shape)
    dense = as_dense(tensor, dtype)
    (value,) = program.store(
        StoredWeight((part,), lambda: (np.ascontiguousarray(dense.load().codes),))
    )
    return value


@dataclass(frozen=True, slots=True)
class _Maker:
    """Appends the nodes of one product to ``made``."""

    program: Program
    made: list[ir.Node]
    dtype: str

    def product(self, node: ir.Node) -> ir.Value:
        x, tensor = node.inputs[0], self.program.weight_of(node)
        assert x is not None
        if tensor.format.activation == "static":
            x = self._rounded(x, tensor)
        y = self._node("MatMul", x, self._weight(tensor), like=node.outputs[0])
        if len(node.inputs) > 2 and node.inputs[2] is not None:
            y = self._node("Add", y, node.inputs[2], like=node.outputs[0])
        return y

    def _rounded(self, x: ir.Value, tensor: LazyTensor) -> ir.Value:
        """x rounded to the type of the codes, by the scale that the checkpoint has for it."""
        part = ArraySpec(f"{tensor.name}.x_scale{CONSTANT}", _SCALE, ())
        (scale,) = self.program.store(StoredWeight((part,), lambda: (_input_scale(tensor.load()),)))
        array = np.zeros((), _code_dtype(tensor.format))
        zero = self.program.constant(f"zero_{array.dtype.name}", array)
        codes = self._node("QuantizeLinear", x, scale, zero, like=x)
        codes.type = zero.type
        return self._node(
            "DequantizeLinear", codes, scale, zero, like=x, output_dtype=int(ir_dtype(self.dtype))
        )

    def _weight(self, tensor: LazyTensor) -> ir.Value:
        """``[K, N]``."""
        fmt = tensor.format
        if fmt.kind == "dense":
            return self._transposed(store_dense(self.program, tensor, self.dtype), fmt)
        if fmt.bits == 4:
            codes, scale = self.program.store(_blocks(tensor, self.dtype))
            codes.type, codes.shape = ir.TensorType(ir.DataType.INT4), ir.Shape(fmt.shape)
            value = self._node("DequantizeLinear", codes, scale, axis=1, block_size=fmt.group)
            value.shape = codes.shape
            return self._transposed(value, fmt)
        codes, scale = self.program.store(_columns(tensor))
        dtype = int(ir_dtype(self.dtype))
        return self._node("DequantizeLinear", codes, scale, like=codes, axis=1, output_dtype=dtype)

    def _transposed(self, value: ir.Value, fmt: WeightFormat) -> ir.Value:
        weight = self._node("Transpose", value, perm=[1, 0])
        weight.shape = ir.Shape(fmt.shape[::-1])
        return weight

    def _node(
        self,
        op: str,
        *inputs: ir.Value,
        like: ir.Value | None = None,
        **attributes: int | list[int],
    ) -> ir.Value:
        node = ir.node(op, inputs, attributes, num_outputs=1)
        self.made.append(node)
        value = node.outputs[0]
        value.type = ir.TensorType(ir_dtype(self.dtype))
        value.shape = None if like is None else like.shape
        return value


def _blocks(tensor: LazyTensor, dtype: str) -> StoredWeight:
    """Codes of 4 bits, two a byte, the low one first, and the scales of their groups."""
    (n, k), name = tensor.format.shape, tensor.name
    kind = numpy_dtype(dtype)
    parts = (
        ArraySpec(f"{name}.int4{CONSTANT}", np.dtype(np.uint8), (n, k // 2)),
        ArraySpec(f"{name}.scale.{dtype}{CONSTANT}", kind, (n, k // tensor.format.group)),
    )

    def load() -> tuple[NDArray[np.generic], ...]:
        weight = tensor.load()
        codes = weight.codes.astype(np.uint8, copy=False) ^ _MIDPOINTS
        return np.ascontiguousarray(codes), weight.multipliers().astype(kind)

    return StoredWeight(parts, load)


def _columns(tensor: LazyTensor) -> StoredWeight:
    """Codes of 8 bits ``[K, N]``, and a scale a column."""
    (n, k), name = tensor.format.shape, tensor.name
    kind = _code_dtype(tensor.format)
    constant = CONSTANT if tensor.format.activation == "static" else ""
    parts = (
        ArraySpec(f"{name}.{kind.name}", kind, (k, n)),
        ArraySpec(f"{name}.scale{constant}", _SCALE, (n,)),
    )

    def load() -> tuple[NDArray[np.generic], ...]:
        weight = tensor.load()
        codes: NDArray[Any] = weight.codes
        if kind == _INT8:
            codes = (codes.astype(np.uint8, copy=False) ^ _MIDPOINT).view(np.int8)
        return np.ascontiguousarray(codes.T), weight.multipliers().reshape(n)

    return StoredWeight(parts, load)


def _input_scale(weight: QuantTensor) -> NDArray[np.float32]:
    assert weight.input_scale is not None, weight.name
    return weight.input_scale.astype(np.float32).reshape(())


def _code_dtype(fmt: WeightFormat) -> np.dtype[Any]:
    return _FP8 if fmt.kind == "float8_e4m3" else _INT8
