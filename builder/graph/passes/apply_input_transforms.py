"""What a weight wants done to x before its codes apply becomes nodes in front of its Linear.

    x ─ Linear(w; scale, perm)      ──▶      x ─ Mul(scale) ─ Gather(perm, axis 1) ─ Linear(w)

Linears that read the same x and want the same share the nodes.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from slipstream.builder.graph.passes.dequantize_unheld import as_dense
from slipstream.builder.graph.passes.matrices import embedded
from slipstream.builder.graph.program import Program, StoredTensor, StoredWeight
from slipstream.weights.tensor import InputTransform, LazyTensor, QuantTensor

log = logging.getLogger(__name__)
Array = NDArray[Any]


@dataclass(frozen=True, slots=True)
class ApplyInputTransforms:
    """Leaves no weight with an ``input``.

    With ``fold_norms`` a scale that all readers of a norm share goes into the norm's weight: for
    targets whose norm weights are float32, where that is as exact as a multiplication.
    """

    fold_norms: bool = False

    def __call__(self, program: Program) -> int:
        """Returns the number of weights that wanted something."""
        wanting = [name for name, tensor in program.weights.items() if tensor.input is not None]
        for name in embedded(program).intersection(wanting):
            # An Embedding reads rows as they are: permuted or scaled ones would be wrong.
            program.replace_weight(name, as_dense(program.weights[name], "float32"))
            log.warning("%s is an embedding too: it becomes dense", name)
        if self.fold_norms:
            for norm in program.nodes("RMSNormalization"):
                _fold(program, norm)
        steps = _Steps(program)
        for node in program.nodes("Linear"):
            transform = program.weight_of(node).input
            if transform is not None:
                node.replace_input_with(0, steps.before(node, transform))
        for name in wanting:
            _set_input(program, name, None)
        if wanting:
            log.info("%d weights: x is scaled or ordered first, %d nodes", len(wanting), steps.made)
        return len(wanting)


class _Steps:
    """The nodes made so far, by what they read and do."""

    def __init__(self, program: Program) -> None:
        self._program = program
        self._known: dict[tuple[ir.Value, str], list[tuple[Array, ir.Value]]] = {}
        self.made = 0

    def before(self, linear: ir.Node, transform: InputTransform) -> ir.Value:
        """The value that a Linear is to read."""
        x, (scale, perm) = linear.inputs[0], (transform.scale, transform.perm)
        assert x is not None
        if scale is not None and (scale != 1).any():
            x = self._step(linear, x, "scale", np.ascontiguousarray(scale, np.float32))
        if perm is not None and (perm != np.arange(len(perm))).any():
            x = self._step(linear, x, "perm", np.ascontiguousarray(perm, np.int32))
        return x

    def _step(self, linear: ir.Node, x: ir.Value, kind: str, array: Array) -> ir.Value:
        known = self._known.setdefault((x, kind), [])
        for other, value in known:
            if np.array_equal(other, array):
                return value
        made = self._node(linear, x, kind, array)
        self._program.graph.insert_before(linear, [made])
        known.append((array, made.outputs[0]))
        self.made += 1
        return made.outputs[0]

    def _node(self, linear: ir.Node, x: ir.Value, kind: str, array: Array) -> ir.Node:
        dtype = ir.DataType.from_numpy(array.dtype)
        name = f"{self._program.weight_of(linear).name}.x_{kind}"
        part = StoredTensor(name, dtype, array.shape)
        stored = self._program.store(StoredWeight((part,), lambda: (array,)))[0]
        name = f"{linear.name}/{kind}"
        output = ir.Value(name=name, shape=x.shape, type=x.type)
        if kind == "scale":
            return ir.node("Mul", [x, stored], outputs=[output], name=name)
        return ir.node("Gather", [x, stored], {"axis": 1}, outputs=[output], name=name)


def _fold(program: Program, norm: ir.Node) -> None:
    """A scale that every reader of a norm wants becomes part of the norm."""
    uses = norm.outputs[0].uses()
    if not uses or norm.outputs[0].is_graph_output() or norm.inputs[1] is None:
        return
    if any(use.node.op_type != "Linear" or use.idx != 0 for use in uses):
        return
    if len(norm.inputs[1].uses()) != 1:
        return
    transforms = [program.weight_of(use.node).input for use in uses]
    scale = _common_scale(transforms)
    weights = {use.node.inputs[1] for use in uses}
    if scale is None or any(len(value.uses()) != 1 for value in weights if value is not None):
        return
    name = norm.inputs[1].name
    assert name is not None
    program.replace_weight(name, _multiplied(program.weights[name], scale))
    for value in weights:
        assert value is not None and value.name is not None
        perm = program.weights[value.name].input.perm  # type: ignore[union-attr]
        rest = None if perm is None else InputTransform(perm)
        _set_input(program, value.name, rest)


def _common_scale(transforms: Iterable[InputTransform | None]) -> NDArray[np.float32] | None:
    scales = [None if transform is None else transform.scale for transform in transforms]
    first = scales[0]
    if first is None or any(s is None or not np.array_equal(s, first) for s in scales):
        return None
    return first


def _multiplied(norm: LazyTensor, scale: NDArray[np.float32]) -> LazyTensor:
    fmt = replace(norm.format, dtype="float32")

    def load() -> QuantTensor:
        return QuantTensor(norm.name, fmt, norm.load().dequantize() * scale)

    return LazyTensor(norm.name, fmt, load)


def _set_input(program: Program, name: str, transform: InputTransform | None) -> None:
    tensor = program.weights[name]
    load = partial(_loaded_with, tensor, transform)
    program.replace_weight(name, LazyTensor(tensor.name, tensor.format, load, transform))


def _loaded_with(tensor: LazyTensor, transform: InputTransform | None) -> QuantTensor:
    return replace(tensor.load(), input=transform)
