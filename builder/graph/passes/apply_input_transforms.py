"""What a weight wants done to x before its codes apply becomes nodes in front of its product.

    x ─ Linear(w; scale, perm)      ──▶      x ─ Mul(scale) ─ Gather(perm, axis 1) ─ Linear(w)

Products that read the same x and want the same share the nodes.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from slipstream.builder.graph.passes.dequantize_unheld import as_dense
from slipstream.builder.graph.passes.matrices import looked_up, readers, weight_index
from slipstream.builder.graph.program import Program, StoredWeight
from slipstream.weights.safetensors import ArraySpec
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
        _make_dense(program, wanting)
        if self.fold_norms:
            for norm in program.nodes("RMSNormalization"):
                _fold(program, norm)
        steps = _Steps(program)
        for node, value in readers(program, "product"):
            tensor = program.weights[value.name or ""]
            if tensor.input is not None:
                node.replace_input_with(0, steps.before(node, tensor))
        for name in wanting:
            _set_input(program, name, None)
        if wanting:
            log.info("%d weights: x is scaled or ordered first, %d nodes", len(wanting), steps.made)
        return len(wanting)


def _make_dense(program: Program, wanting: Sequence[str]) -> None:
    """Whatever does not multiply by a weight reads it as it is: permuted or scaled it is wrong."""
    rows, told = looked_up(program), dict[str, list[str]]()
    for name in wanting:
        if not _only_in_products(program.graph.initializers[name]):
            program.replace_weight(name, as_dense(program.weights[name], "float32"))
            told.setdefault("looked up" if name in rows else "read otherwise", []).append(name)
    for reader, names in told.items():
        more = ", …" * (len(names) > 1)
        log.warning(
            "%d weights (%s%s) are %s too: they become dense", len(names), names[0], more, reader
        )


class _Steps:
    """The nodes made so far, by what they read and do."""

    def __init__(self, program: Program) -> None:
        self._program = program
        self._known: dict[tuple[ir.Value, str], list[tuple[Array, ir.Value]]] = {}
        self.made = 0

    def before(self, node: ir.Node, weight: LazyTensor) -> ir.Value:
        """The value that the product of a weight is to read."""
        x, transform = node.inputs[0], weight.input
        assert x is not None and transform is not None
        scale, perm = transform.scale, transform.perm
        names = (f"{node.name}/", f"{weight.name}.x_")
        if scale is not None and (scale != 1).any():
            x = self._step(node, x, "scale", np.ascontiguousarray(scale, np.float32), names)
        if perm is not None and (perm != np.arange(len(perm))).any():
            x = self._step(node, x, "perm", np.ascontiguousarray(perm, np.int32), names)
        return x

    def _step(
        self, reader: ir.Node, x: ir.Value, kind: str, array: Array, names: tuple[str, str]
    ) -> ir.Value:
        known = self._known.setdefault((x, kind), [])
        for other, value in known:
            if np.array_equal(other, array):
                return value
        made = self._node(x, kind, array, names)
        self._program.graph.insert_before(reader, [made])
        known.append((array, made.outputs[0]))
        self.made += 1
        return made.outputs[0]

    def _node(self, x: ir.Value, kind: str, array: Array, names: tuple[str, str]) -> ir.Node:
        part = ArraySpec.of(names[1] + kind, array)
        stored = self._program.store(StoredWeight((part,), lambda: (array,)))[0]
        name = names[0] + kind
        output = ir.Value(name=name, shape=x.shape, type=x.type)
        if kind == "scale":
            return ir.node("Mul", [x, stored], outputs=[output], name=name)
        return ir.node("Gather", [x, stored], {"axis": 1}, outputs=[output], name=name)


def _only_in_products(weight: ir.Value) -> bool:
    return all(weight_index(use.node, "product") == use.idx for use in weight.uses())


def _fold(program: Program, norm: ir.Node) -> None:
    """A scale that every reader of a norm wants becomes part of the norm."""
    uses = norm.outputs[0].uses()
    if not uses or norm.outputs[0].is_graph_output() or norm.inputs[1] is None:
        return
    indices = [weight_index(use.node, "product") for use in uses]
    if any(index is None or use.idx != 0 for use, index in zip(uses, indices, strict=True)):
        return
    if len(norm.inputs[1].uses()) != 1:
        return
    weights = {use.node.inputs[i or 0] for use, i in zip(uses, indices, strict=True)}
    names = [value.name for value in weights if value is not None and value.name is not None]
    scale = _common_scale([program.weights[name].input for name in names])
    if scale is None or any(len(value.uses()) != 1 for value in weights if value is not None):
        return
    norm_name = norm.inputs[1].name
    assert norm_name is not None
    program.replace_weight(norm_name, _multiplied(program.weights[norm_name], scale))
    for name in names:
        perm = program.weights[name].input.perm  # type: ignore[union-attr]
        _set_input(program, name, None if perm is None else InputTransform(perm))


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
