"""The one operator surface that model files call, and the one place that spells ONNX nodes for
them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from slipstream.builder.graph.program import Program
from slipstream.plugins.operators import DOMAIN, OPERATORS
from slipstream.plugins.shapes import bindings, evaluate
from slipstream.weights.tensor import LazyTensor

Dim = int | str
Attributes = dict[str, int | float | list[int]]
FLOAT, INT32 = ir.DataType.FLOAT, ir.DataType.INT32


class Ops:
    """Appends nodes to a program; node names are paths, such as ``layers.0/attn/q_proj``."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self._path: list[str] = []
        self._names: dict[str, int] = {}

    @contextmanager
    def scope(self, name: str) -> Iterator[None]:
        """Put the nodes made inside under ``name/``."""
        self._path.append(name)
        yield
        self._path.pop()

    def input(self, name: str) -> ir.Value:
        """A step input by name."""
        return next(value for value in self.program.graph.inputs if value.name == name)

    def output(self, value: ir.Value, name: str) -> None:
        """Make a value an output of the graph."""
        value.name = name
        self.program.graph.outputs.append(value)

    def embedding(self, token_ids: ir.Value, weight: LazyTensor) -> ir.Value:
        """Rows of ``weight [V, K]``: ``[T, K]``."""
        rows, columns = weight.format.shape
        attributes: Attributes = {"in_features": columns, "out_features": rows}
        inputs = [token_ids, self.program.add_weight(weight)]
        return self._node("Embedding", inputs, (_rows(token_ids), columns), attributes, DOMAIN)

    def linear(self, x: ir.Value, weight: LazyTensor, bias: LazyTensor | None = None) -> ir.Value:
        """x·Wᵀ (+ bias) with ``weight [N, K]``: ``[T, N]``."""
        n, k = weight.format.shape
        inputs = [x, self.program.add_weight(weight)]
        if bias is not None:
            inputs.append(self.program.add_weight(bias))
        return self._node(
            "Linear", inputs, (_rows(x), n), {"in_features": k, "out_features": n}, DOMAIN
        )

    def rms_norm(self, x: ir.Value, weight: LazyTensor, eps: float) -> ir.Value:
        """x / rms(x) * weight over the last axis."""
        inputs = [x, self.program.add_weight(weight)]
        return self._node("RMSNormalization", inputs, _shape(x), {"axis": -1, "epsilon": eps})

    def gated_activation(self, gate_up: ir.Value) -> ir.Value:
        """silu(first half of the columns) * second half."""
        width = _shape(gate_up)[1]
        assert isinstance(width, int)
        return self._node("GatedActivation", [gate_up], (_rows(gate_up), width // 2), {}, DOMAIN)

    def paged_attention(
        self,
        qkv: ir.Value,
        rotary: tuple[ir.Value, ir.Value],
        norms: Sequence[LazyTensor],
        attributes: Attributes,
    ) -> ir.Value:
        """Attention over the KV pages; see ``plugins/paged_attention`` for the attributes.
        ``norms``: q, k or none."""
        names = ("kv_cache", "query_start", "context_len", "page_table", "slot_mapping")
        inputs: list[ir.Value | None] = [qkv, *rotary, *(self.input(name) for name in names)]
        has_scales = any(value.name == "kv_scales" for value in self.program.graph.inputs)
        inputs.append(self.input("kv_scales") if has_scales else None)
        inputs += [self.program.add_weight(norm) for norm in norms]
        while inputs[-1] is None:
            inputs.pop()
        heads, width = attributes["num_heads"], attributes["head_dim"]
        assert isinstance(heads, int) and isinstance(width, int)
        return self._node("PagedAttention", inputs, (_rows(qkv), heads * width), attributes, DOMAIN)

    def add(self, a: ir.Value, b: ir.Value) -> ir.Value:
        """a + b, of one shape."""
        return self._node("Add", [a, b], _shape(a))

    def concat(self, values: Sequence[ir.Value]) -> ir.Value:
        """Columns side by side."""
        widths = [_shape(value)[1] for value in values]
        total = sum(width for width in widths if isinstance(width, int))
        return self._node("Concat", list(values), (_rows(values[0]), total), {"axis": -1})

    def gather_rows(self, x: ir.Value, rows: ir.Value) -> ir.Value:
        """``x[rows]``."""
        return self._node("Gather", [x, rows], (_rows(rows), *_shape(x)[1:]), {"axis": 0})

    def operator(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        attributes: Attributes | None = None,
    ) -> ir.Value:
        """The output of any operator of the table that has one, such as another package's, in the
        shape that its spec says."""
        spec = OPERATORS[op_type]
        (output,) = spec.outputs
        sizes: dict[str, Dim] = {**spec.complete(attributes or {})}  # type: ignore[dict-item]
        for name, (index, axis) in bindings(spec).items():
            value = inputs[index]
            assert value is not None, f"{op_type} needs its input {spec.inputs[index].name}"
            sizes[name] = _shape(value)[axis]
        known = {name: size for name, size in sizes.items() if isinstance(size, int)}
        computed = [(size, evaluate(size, known)) for size in output.shape]
        shape = tuple(sizes.get(size, size) if n is None else n for size, n in computed)
        return self._node(op_type, inputs, shape, attributes, spec.domain)

    def rotary(
        self, positions: ir.Value, inv_freq: NDArray[np.float32], attention_factor: float
    ) -> tuple[ir.Value, ir.Value]:
        """Cosines and sines ``[T, R]`` of positions times frequencies ``[R]``, computed once a
        step."""
        tokens, half = _rows(positions), len(inv_freq)
        as_float = self._node("Cast", [positions], (tokens,), {"to": int(FLOAT)})
        column = self._node(
            "Unsqueeze", [as_float, self.program.constant("axis_1", np.array([1]))], (tokens, 1)
        )
        angles = self._node(
            "Mul", [column, self.program.constant("inv_freq", inv_freq[None, :])], (tokens, half)
        )
        waves = [self._node(wave, [angles], (tokens, half)) for wave in ("Cos", "Sin")]
        if attention_factor != 1.0:
            factor = self.program.constant(
                "attention_factor", np.array(attention_factor, np.float32)
            )
            waves = [self._node("Mul", [wave, factor], (tokens, half)) for wave in waves]
        return waves[0], waves[1]

    def _node(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        shape: tuple[Dim, ...],
        attributes: Attributes | None = None,
        domain: str = "",
    ) -> ir.Value:
        if domain:
            attributes = {**OPERATORS[op_type].typed(attributes or {})}
            self.program.model.opset_imports.setdefault(domain, 1)
        name = self._unique("/".join([*self._path, op_type]))
        output = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(FLOAT))
        node = ir.node(
            op_type, inputs, attributes or {}, domain=domain, outputs=[output], name=name
        )
        self.program.graph.append(node)
        return output

    def _unique(self, name: str) -> str:
        count = self._names.get(name, 0)
        self._names[name] = count + 1
        return f"{name}_{count}" if count else name


def _shape(value: ir.Value) -> tuple[Dim, ...]:
    assert value.shape is not None, value
    return tuple(dim if isinstance(dim, int) else str(dim.value) for dim in value.shape)


def _rows(value: ir.Value) -> Dim:
    return _shape(value)[0]
