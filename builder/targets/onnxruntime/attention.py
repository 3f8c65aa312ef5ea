"""What both forms of attention have in common: which nodes ONNX Runtime has kernels for, the tables
of rotary angles, and the heads of q, k and v."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NoReturn

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from slipstream.builder.contract import CacheSpec, GraphSpec, Output, Port
from slipstream.builder.graph.program import Program, StoredWeight, ir_dtype
from slipstream.errors import BuildError
from slipstream.plugins.rotary.reference import rotary_angles
from slipstream.weights.safetensors import ArraySpec

CONTRIB = "com.microsoft"
_QKV, _COS, _PAGES = 0, 1, 3
_Q_NORM, _K_NORM, _SINKS = 9, 10, 11
# What the kernels turn of a head at a time, on both providers.
_LANES = 8
Tables = tuple[ir.Value, ir.Value]


@dataclass(frozen=True, slots=True)
class Attention:
    """A PagedAttention of the canonical graph, and the cache whose layer it is."""

    node: ir.Node
    cache: CacheSpec

    def number(self, name: str, default: int = 0) -> int:
        """An attribute that is an integer."""
        return self.node.attributes.get_int(name, default)

    def real(self, name: str, default: float = 0.0) -> float:
        """An attribute that is no integer."""
        return self.node.attributes.get_float(name, default)

    def weight(self, index: int) -> ir.Value | None:
        """An optional input."""
        return self.node.inputs[index] if index < len(self.node.inputs) else None

    @property
    def qkv(self) -> ir.Value:
        """Rows of the heads of q, k and v."""
        return _given(self.node.inputs[_QKV])

    @property
    def sinks(self) -> ir.Value | None:
        """A logit of each query head that only joins the denominator."""
        return self.weight(_SINKS)

    def widths(self) -> tuple[int, int, int]:
        """Columns of q, k and v."""
        heads, kv_heads, size = map(self.number, ("num_heads", "num_kv_heads", "head_dim"))
        return heads * size, kv_heads * size, kv_heads * size

    def attributes(self) -> dict[str, int | float]:
        """Those that GroupQueryAttention and PagedAttention of ONNX Runtime share."""
        return {
            "num_heads": self.number("num_heads"),
            "kv_num_heads": self.number("num_kv_heads"),
            "scale": self.real("scale"),
            "softcap": self.real("soft_cap"),
            "local_window_size": self.number("sliding_window") or -1,
            "do_rotary": 1,
            "rotary_interleaved": 0,
        }


def _attentions(program: Program) -> Iterator[Attention]:
    """Every attention of a canonical program.

    Raises BuildError for one that neither operator of ONNX Runtime computes.
    """
    owners = {port.name: port.cache for port in contract(program).inputs}
    caches = {cache.name: cache for cache in program.caches}
    for node in program.nodes("PagedAttention"):
        owner = owners[str(_given(node.inputs[_PAGES]).name)]
        attention = Attention(node, caches[str(owner)])
        _check(attention)
        yield attention


def lower_attentions(
    program: Program,
    positions: int,
    cache_of: Callable[[Attention], CacheSpec],
    lower: Callable[[Attention, CacheSpec, Tables], None],
) -> int:
    """Give every attention its cache and the tables of ``positions`` rotary angles, put what
    ``lower`` makes in its place, and forget what only attentions read; returns their number."""
    found = list(_attentions(program))
    caches = {a.cache.name: cache_of(a) for a in found}
    program.caches = tuple(caches[cache.name] for cache in program.caches)
    for attention in found:
        tables = _rotary_tables(program, attention, positions)
        lower(attention, caches[attention.cache.name], tables)
    _drop_angles(program)
    _drop_unread_inputs(program)
    return len(found)


def contract(program: Program) -> GraphSpec:
    """That of an engine's graph."""
    assert program.contract is not None
    return program.contract


def refuse(node: ir.Node, reason: str) -> NoReturn:
    """Raise BuildError for a node that ONNX Runtime has no operator for."""
    raise BuildError(
        f"operator {node.op_type} ({node.name}) cannot be lowered to onnxruntime: {reason}; use "
        "--target cpu or cuda"
    )


def _check(attention: Attention) -> None:
    node, size = attention.node, attention.number("head_dim")
    if attention.number("kv_parts", 2) != 2:
        refuse(node, "its keys and values are those of another layer, or its keys are its values")
    half = _frequencies(attention).shape[0]
    if size % (2 * _LANES) or half % _LANES:
        refuse(
            node,
            f"heads of {size} elements of which {2 * half} are rotated; its kernels turn heads of "
            "a multiple of 16 in halves of a multiple of 8",
        )


def _rotary_tables(program: Program, attention: Attention, positions: int) -> Tables:
    """Cosines and sines ``[positions, R]``, stored once for all layers that turn alike."""
    angles = _given(attention.weight(_COS)).producer()
    assert angles is not None
    frequencies, factor = _frequencies(attention), angles.attributes["factor"].as_float()
    stem = str(_given(angles.inputs[1]).name).replace("inv_freq", "table")
    shape = (positions, len(frequencies))
    parts = tuple(
        ArraySpec(f"{stem}.{factor:g}.{wave}.float32", np.dtype(np.float32), shape)
        for wave in ("cos", "sin")
    )

    def load() -> tuple[NDArray[np.generic], ...]:
        return rotary_angles(np.arange(positions, dtype=np.int32), frequencies, factor)

    cos, sin = program.store(StoredWeight(parts, load))
    return cos, sin


def _frequencies(attention: Attention) -> NDArray[np.float32]:
    angles = _given(attention.weight(_COS)).producer()
    if angles is None or angles.op_type != "RotaryAngles":
        refuse(attention.node, "its rotary angles are not positions times constant frequencies")
    constant = _given(angles.inputs[1]).const_value
    assert constant is not None
    frequencies: NDArray[np.float32] = constant.numpy()
    return frequencies


class Emitter:
    """Makes the nodes that take the place of one, with names below its own."""

    def __init__(self, program: Program, path: str) -> None:
        self.program, self.path = program, path
        self.nodes: list[ir.Node] = []

    def node(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        attributes: dict[str, int | float] | None = None,
        domain: str = "",
        outputs: int = 1,
    ) -> list[ir.Value]:
        """The outputs of a new node, typed as activations until ``typed`` says otherwise."""
        name = f"{self.path}/{len(self.nodes)}.{op_type}"
        made = ir.node(
            op_type, inputs, attributes or {}, domain=domain, num_outputs=outputs, name=name
        )
        for index, value in enumerate(made.outputs):
            value.name = f"{name}/{index}"
            value.type = ir.TensorType(ir.DataType.FLOAT)
        self.nodes.append(made)
        return list(made.outputs)

    def typed(self, dtype: ir.DataType) -> None:
        """Give the outputs of the last node a type."""
        for value in self.nodes[-1].outputs:
            value.type = ir.TensorType(dtype)

    def integers(self, name: str, *numbers: int) -> ir.Value:
        """A constant int64 vector."""
        return self.program.constant(name, np.array(numbers, np.int64))


def split_heads(emitter: Emitter, attention: Attention) -> list[ir.Value | None]:
    """q, k and v ``[T, columns]``: packed in the first where nothing is done to heads before they
    are turned."""
    norms = (attention.weight(_Q_NORM), attention.weight(_K_NORM))
    normed_values = attention.number("v_norm")
    if not any(norms) and not normed_values:
        return [attention.qkv, None, None]
    widths = attention.widths()
    sizes = emitter.integers("widths_" + "_".join(map(str, widths)), *widths)
    q, k, v = emitter.node("Split", [attention.qkv, sizes], {"axis": -1}, outputs=3)
    eps, size = attention.real("norm_eps", 1e-6), attention.number("head_dim")
    if norms[0] is not None:
        q = _normed(emitter, q, norms[0], eps, size)
    if norms[1] is not None:
        k = _normed(emitter, k, norms[1], eps, size)
    if normed_values:
        ones = emitter.program.constant(f"ones_{size}", np.ones(size, np.float32))
        v = _normed(emitter, v, ones, eps, size)
    return [q, k, v]


def _normed(emitter: Emitter, x: ir.Value, weight: ir.Value, eps: float, size: int) -> ir.Value:
    """Every head of x with a norm of its own."""
    (heads,) = emitter.node("Reshape", [x, emitter.integers(f"heads_{size}", 0, -1, size)])
    attributes: dict[str, int | float] = {"axis": -1, "epsilon": eps, "stash_type": 1}
    (normed,) = emitter.node("SimplifiedLayerNormalization", [heads, weight], attributes)
    (flat,) = emitter.node("Reshape", [normed, emitter.integers("flat", 0, -1)])
    return flat


def add_port(program: Program, port: Port) -> ir.Value:
    """A new input of the graph and of its contract."""
    kind, shape = ir.TensorType(ir_dtype(port.dtype)), ir.Shape(port.shape)
    value = ir.Value(name=port.name, shape=shape, type=kind)
    program.graph.inputs.append(value)
    old = contract(program)
    program.contract = replace(old, inputs=(*old.inputs, port))
    return value


def add_update(program: Program, value: ir.Value, port: Port) -> None:
    """Make a value the next content of a port, in the same memory."""
    value.name = f"{port.name}.next"
    value.shape, value.type = ir.Shape(port.shape), ir.TensorType(ir_dtype(port.dtype))
    program.graph.outputs.append(value)
    old = contract(program)
    output = Output(str(value.name), port.dtype, port.shape, updates=port.name)
    program.contract = replace(old, outputs=(*old.outputs, output))


def step_value(program: Program, port: Port) -> ir.Value:
    """An input of the step, made on first use."""
    known = next((value for value in program.graph.inputs if value.name == port.name), None)
    return add_port(program, port) if known is None else known


def _drop_unread_inputs(program: Program) -> None:
    """Forget inputs that no node reads any more."""
    for value in list(program.graph.inputs):
        if not value.uses():
            program.graph.inputs.remove(value)
    old, left = contract(program), {value.name for value in program.graph.inputs}
    inputs = tuple(port for port in old.inputs if port.name in left)
    program.contract = replace(old, inputs=inputs)


def _drop_angles(program: Program) -> None:
    """Remove the rotary angles of a step, which the tables replace."""
    for node in program.nodes("RotaryAngles"):
        program.graph.remove(node, safe=True)


def _given(value: ir.Value | None) -> ir.Value:
    assert value is not None
    return value
