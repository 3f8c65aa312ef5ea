"""What the ranks of an engine do together, on the operator surface of models.

All ranks have one graph. What differs between them is in their weight files: shards, and the few
numbers that say which shard it is.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from slipstream.builder.contract import CacheSpec
from slipstream.builder.graph.ops import FLOAT, Dim, Ops, shape_of
from slipstream.builder.graph.program import Program, StoredWeight
from slipstream.weights.safetensors import ArraySpec
from slipstream.weights.tensor import LazyTensor

_INT, _BOOL = ir.DataType.INT32, ir.DataType.BOOL


class RankOps(Ops):
    """The surface of a graph of ``ranks``; of one rank alone the others are never there to ask."""

    def __init__(self, program: Program, caches: Sequence[CacheSpec], ranks: int = 1) -> None:
        super().__init__(program, caches)
        self.ranks = ranks

    def all_reduce(self, x: ir.Value) -> ir.Value:
        """The sum of x ``[T, N]`` over the ranks; x itself where there is one."""
        return self._together("AllReduce", x)

    def all_gather(self, x: ir.Value) -> ir.Value:
        """The columns of x ``[T, N]`` of all ranks: ``[T, ranks * N]``."""
        return self._together("AllGather", x)

    def pick_columns(self, x: ir.Value, columns: NDArray[np.int32], name: str) -> ir.Value:
        """``x[:, columns]``; other ranks pick as many others."""
        picked = self._of_rank(name, columns)
        return self._node("Gather", [x, picked], (_tokens(x), len(columns)), {"axis": 1})

    def embedding_shard(self, token_ids: ir.Value, weight: LazyTensor, first: int) -> ir.Value:
        """Rows of a table of which this rank has ``weight [V, K]`` from token ``first`` on.

        token_ids ─ Sub(first) ─┬─ Clip(0, V-1) ─┬─ Embedding ─ Mul ─ AllReduce
                                └───── Equal ────┘               │
                                         └── Cast ─ Unsqueeze ───┘
        """
        tokens, last = (_tokens(token_ids),), weight.format.shape[0] - 1
        before = self._of_rank("tokens_before", np.array([first], np.int32))
        ends = [
            self.program.constant(name, np.array(end, np.int32))
            for name, end in (("first_row", 0), ("last_row", last))
        ]
        own = _typed(self._node("Sub", [token_ids, before], tokens), _INT)
        row = _typed(self._node("Clip", [own, *ends], tokens), _INT)
        here = _typed(self._node("Equal", [own, row], tokens), _BOOL)
        factor = self._node("Cast", [here], tokens, {"to": int(FLOAT)})
        axis = self.program.constant("axis_1", np.array([1]))
        column = self._node("Unsqueeze", [factor, axis], (*tokens, 1))
        return self.all_reduce(self.scale_rows(self.embedding(row, weight), column))

    def rms_norm_of_all(self, x: ir.Value, weight: LazyTensor, eps: float) -> ir.Value:
        """x / rms(x of all ranks) * weight; each has as many columns of what is one row."""
        if self.ranks == 1:
            return self.rms_norm(x, weight, eps)
        one, axis = (_tokens(x), 1), self.program.constant("axis_1", np.array([1]))
        square = self._node("Mul", [x, x], shape_of(x))
        mean = self._node("ReduceMean", [square, axis], one, {"keepdims": 1})
        epsilon = self.program.constant("epsilon", np.array([eps], np.float32))
        total = self.scale(self.all_reduce(mean), 1 / self.ranks)
        root = self._node("Sqrt", [self._node("Add", [total, epsilon], one)], one)
        return self.scale_columns(self._node("Div", [x, root], shape_of(x)), weight)

    def _together(self, op_type: str, x: ir.Value) -> ir.Value:
        return x if self.ranks == 1 else self.operator(op_type, [x], {"ranks": self.ranks})

    def _of_rank(self, name: str, array: NDArray[np.int32]) -> ir.Value:
        """An array of which each rank has its own."""
        return self.program.store(StoredWeight((ArraySpec.of(name, array),), lambda: (array,)))[0]


def _typed(value: ir.Value, dtype: ir.DataType) -> ir.Value:
    value.type = ir.TensorType(dtype)
    return value


def _tokens(value: ir.Value) -> Dim:
    return shape_of(value)[0]
