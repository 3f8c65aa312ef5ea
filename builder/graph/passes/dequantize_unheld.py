"""Weights that no kernel of a target holds become dense, and the log names them."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from slipstream.builder.graph.describe import describe_format
from slipstream.builder.graph.passes.matrices import rewrite_matrices
from slipstream.builder.graph.passes.rewrite import Holds
from slipstream.builder.graph.program import Program
from slipstream.weights.tensor import LazyTensor, QuantTensor, WeightFormat, dense_values


@dataclass(frozen=True, slots=True)
class DequantizeUnheld:
    """The dense fallback: after it, kernels hold every quantized weight.

    ``target`` is for the log; ``dtype`` is what such a weight becomes.
    """

    holds: Holds
    target: str
    dtype: str

    def __call__(self, program: Program) -> int:
        """Returns the number of weights that became dense."""

        def rewrite(tensor: LazyTensor) -> LazyTensor | None:
            held = tensor.format.kind == "dense" or self.holds(tensor.format)
            return None if held else as_dense(tensor, self.dtype)

        def message(old: LazyTensor, _: LazyTensor) -> str:
            kind = describe_format(old.format)
            return f"target {self.target} has no kernel for {kind}; they become {self.dtype}"

        return rewrite_matrices(program, rewrite, message, logging.WARNING)


def as_dense(tensor: LazyTensor, dtype: str) -> LazyTensor:
    """A weight as dense numbers of ``dtype``."""
    fmt = WeightFormat(tensor.format.shape, "dense", dtype)

    def load() -> QuantTensor:
        weight = tensor.load()
        same = weight.format == fmt and weight.input is None
        return QuantTensor(tensor.name, fmt, weight.codes if same else dense_values(weight, dtype))

    return LazyTensor(tensor.name, fmt, load)
