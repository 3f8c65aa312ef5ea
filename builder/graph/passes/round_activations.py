"""Where a target's kernels round x in a way of their own, what a checkpoint says of it goes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from slipstream.builder.graph.passes.matrices import rewrite_matrices
from slipstream.builder.graph.program import Program
from slipstream.weights.tensor import Activation, LazyTensor, QuantTensor, WeightFormat

# What the checkpoint says; a scale that somebody calibrated is not dropped silently.
_SAID: Mapping[Activation, tuple[str, int]] = MappingProxyType(
    {
        "token": ("activations rounded by token in the checkpoint", logging.INFO),
        "group": ("activations rounded by token and group in the checkpoint", logging.INFO),
        "static": ("activations rounded by a fixed scale in the checkpoint", logging.WARNING),
    }
)


@dataclass(frozen=True, slots=True)
class RoundActivations:
    """Takes the rounding of x out of the formats that ``kept`` does not say yes to.

    ``instead`` is what the kernels do, for the log.
    """

    kept: Callable[[WeightFormat], bool]
    instead: str

    def __call__(self, program: Program) -> int:
        """Returns the number of weights whose x is rounded otherwise."""
        return sum(self._rewrite(program, activation) for activation in _SAID)

    def _rewrite(self, program: Program, activation: Activation) -> int:
        said, level = _SAID[activation]

        def rewrite(tensor: LazyTensor) -> LazyTensor | None:
            fmt = tensor.format
            return None if fmt.activation != activation or self.kept(fmt) else _without(tensor)

        return rewrite_matrices(program, rewrite, lambda *_: f"{said}, here {self.instead}", level)


def _without(tensor: LazyTensor) -> LazyTensor:
    fmt = replace(tensor.format, activation="none")

    def load() -> QuantTensor:
        return replace(tensor.load(), format=fmt, input_scale=None)

    return LazyTensor(tensor.name, fmt, load, tensor.input)
