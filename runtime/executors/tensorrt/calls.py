"""Calls of a graph's functions: what goes in, what comes out, and who computes it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir
import torch
from torch import Tensor

from slipstream.builder.contract import Source
from slipstream.builder.engine import CONSTANT
from slipstream.errors import EngineMismatchError
from slipstream.plugins.cuda.binding import (
    Binding,
    Context,
    Kernel,
    Run,
    dtype_of_value,
    name_of,
)
from slipstream.plugins.operators import SEGMENTS

# Computes a call on the current stream: fills the outputs from the inputs, both in the order of the
# function's, weights that a plan holds itself left out.
Segment = Callable[[Sequence[Tensor], Sequence[Tensor]], None]


@dataclass(frozen=True, slots=True)
class Shape:
    """Of an output: its columns, or what stands in their place, behind its rows."""

    columns: tuple[int, ...]
    dtype: torch.dtype


def bindings(graph: ir.Graph, segments: Mapping[str, Segment]) -> dict[str, Binding]:
    """How every call of a graph is run, by the name of its node.

    EngineMismatchError for a call that no segment computes.
    """
    found = {}
    for node in graph:
        if node.domain != SEGMENTS:
            continue
        if node.name is None or node.name not in segments:
            raise EngineMismatchError(
                f"no plan computes {node.name}, a call of {node.op_type}; build the engine again"
            )
        found[node.name] = _binding(segments[node.name])
    return found


def drop_constants(graph: ir.Graph) -> None:
    """Take out of the graph what plans hold themselves, so that it is not loaded."""
    for node in graph:
        for index, value in enumerate(node.inputs):
            if value is not None and _is_held(value):
                node.replace_input_with(index, None)
    for name in [name for name, value in graph.initializers.items() if _is_held(value)]:
        del graph.initializers[name]


def _is_held(value: ir.Value) -> bool:
    return value.is_initializer() and (value.name or "").endswith(CONSTANT)


def _binding(segment: Segment) -> Binding:
    def bind(node: ir.Node, context: Context) -> Kernel:
        given = [value for value in node.inputs if value is not None]
        names = [name_of(value) for value in given]
        sized = next(name_of(value) for value in given if not value.is_initializer())
        shapes = [_shape(value) for value in node.outputs]

        def kernel(run: Run) -> Sequence[Tensor]:
            rows = run.values[sized]
            outputs = [
                torch.empty((len(rows), *shape.columns), dtype=shape.dtype, device=rows.device)
                for shape in shapes
            ]
            if run.out is not None:
                outputs[0] = run.out
            if len(rows):
                segment([_input(name, run) for name in names], outputs)
            return outputs

        return kernel

    return bind


def _shape(value: ir.Value) -> Shape:
    assert value.shape is not None
    _, *columns = value.shape
    return Shape(tuple(int(column) for column in columns), dtype_of_value(value))  # type: ignore[arg-type]


def _input(name: str, run: Run) -> Tensor:
    """A tensor; of ids, those that only the device knows are put in."""
    tensor = run.values[name]
    if name != Source.TOKEN_IDS:
        return tensor.contiguous()
    step, memory = run.kv()
    last = memory.last_tokens[step.token_slots.long()]
    return torch.where(tensor == -1, last, tensor)
