"""The one operator surface that model files call, and the one place that spells ONNX nodes for
them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from slipstream.builder.contract import (
    PAGED_SOURCES,
    CacheSpec,
    GraphSpec,
    Output,
    Port,
    Source,
    array_port,
    hidden_port,
    paged,
    paged_port,
    step_port,
)
from slipstream.builder.graph.program import Program, dtype_name, ir_dtype
from slipstream.plugins.gated_mlp import GATES
from slipstream.plugins.operators import DOMAIN, OPERATORS
from slipstream.plugins.shapes import bindings, evaluate
from slipstream.weights.tensor import LazyTensor

Dim = int | str
Attributes = dict[str, int | float | list[int]]
FLOAT = ir.DataType.FLOAT


@dataclass(frozen=True, slots=True)
class Routes:
    """Where the tokens go: experts and their weights, ``[T, top_k]``."""

    ids: ir.Value
    weights: ir.Value


class Ops:
    """Appends nodes to a program; node names are paths, such as ``layers.0/attn/q_proj``.

    What the graph reads and gives becomes the program's contract as it is named: a step's arrays
    and ``caches`` are inputs from their first use on.
    """

    def __init__(self, program: Program, caches: Sequence[CacheSpec] = ()) -> None:
        self.program = program
        self.caches = tuple(caches)
        self._ports: dict[str, Port] = {}
        self._outputs: list[Output] = []
        self._seam: tuple[ir.Value, ir.Value] | None = None
        self._path: list[str] = []
        self._names: dict[str, int] = {}

    @contextmanager
    def scope(self, name: str) -> Iterator[None]:
        """Put the nodes made inside under ``name/``."""
        self._path.append(name)
        yield
        self._path.pop()

    def contract(self, file: str) -> GraphSpec:
        """What the graph reads and gives, as far as it is declared."""
        seam = None
        if self._seam is not None:
            before, after = (str(value.name) for value in self._seam)
            seam = before, after
        return GraphSpec(file, tuple(self._ports.values()), tuple(self._outputs), seam)

    def input(self, source: Source) -> ir.Value:
        """An array of the step."""
        return self._input(step_port(source))

    def hidden(self, width: int) -> ir.Value:
        """What a head takes of each token ``[T, width]``."""
        return self._input(hidden_port(width))

    def arrays(self, cache: CacheSpec) -> list[ir.Value]:
        """The arrays of a cache, ``[layers, pages or slots, ...]`` each."""
        return [self._input(array_port(array, cache)) for array in cache.arrays]

    def output(self, value: ir.Value, name: str, updates: ir.Value | None = None) -> None:
        """Make a value an output of the graph, or the next content of an array of a cache."""
        assert value.dtype is not None
        value.name = name
        self.program.graph.outputs.append(value)
        array = None if updates is None else str(updates.name)
        self._outputs.append(Output(name, dtype_name(value.dtype), shape_of(value), array))

    def pick_rows(self, x: ir.Value) -> ir.Value:
        """The rows of ``x [T, K]`` whose logits are wanted ``[L, K]``: here a device may part the
        graph, so nothing after it may read anything else that was made before."""
        picked = self.gather_rows(x, self.input(Source.LOGITS_ROWS))
        self._seam = x, picked
        return picked

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
        return self._node("RMSNormalization", inputs, shape_of(x), {"axis": -1, "epsilon": eps})

    def rms_norm_parts(self, x: ir.Value, weight: LazyTensor, eps: float) -> ir.Value:
        """x / rms(x) * weight of every so many columns of x as the weight has, apart."""
        tokens, columns = shape_of(x)
        (width,) = weight.format.shape
        assert isinstance(columns, int)
        parts = self._reshaped(x, (tokens, columns // width, width))
        return self._reshaped(self.rms_norm(parts, weight, eps), (tokens, columns))

    def layer_norm(self, x: ir.Value, weight: LazyTensor, eps: float) -> ir.Value:
        """(x - mean(x)) / deviation(x) * weight over the last axis."""
        inputs = [x, self.program.add_weight(weight)]
        return self._node("LayerNormalization", inputs, shape_of(x), {"axis": -1, "epsilon": eps})

    def gated_activation(self, gate_up: ir.Value, gate: str = "silu") -> ir.Value:
        """The first half of the columns as gates of the second; ``gate`` is a key of ``GATES``."""
        width = shape_of(gate_up)[1]
        assert isinstance(width, int)
        shape = _rows(gate_up), width // 2
        return self._node("GatedActivation", [gate_up], shape, {"gate": GATES[gate]}, DOMAIN)

    def router(
        self, logits: ir.Value, attributes: Attributes, correction: LazyTensor | None = None
    ) -> Routes:
        """The experts of each token by logits ``[T, E]``; ``attributes`` are those of
        ``plugins/router``."""
        inputs = [logits]
        if correction is not None:
            inputs.append(self.program.add_weight(correction))
        shape = ir.Shape((_rows(logits), int(attributes["top_k"])))  # type: ignore[arg-type]
        name = self._unique("/".join([*self._path, "Router"]))
        outputs = [
            ir.Value(name=f"{name}/{part}", shape=shape, type=ir.TensorType(kind))
            for part, kind in (("ids", ir.DataType.INT32), ("weights", FLOAT))
        ]
        typed = {**OPERATORS["Router"].typed(attributes)}
        self.program.graph.append(
            ir.node("Router", inputs, typed, domain=DOMAIN, outputs=outputs, name=name)
        )
        return Routes(*outputs)

    def scale_routes(self, routes: Routes, factors: LazyTensor) -> Routes:
        """The same experts, their weights times ``factors [E]`` of each."""
        shape = shape_of(routes.weights)
        own = self._node("Gather", [self.program.add_weight(factors), routes.ids], shape)
        return Routes(routes.ids, self._node("Mul", [routes.weights, own], shape))

    def expert_linear(
        self,
        x: ir.Value,
        weight: LazyTensor,
        routes: Routes,
        attributes: Attributes,
        bias: LazyTensor | None = None,
    ) -> ir.Value:
        """Rows of x times the weights ``[experts * N, K]`` of their experts; ``attributes`` are
        those of ``plugins/expert_linear`` but for sizes, and the number of experts."""
        experts = int(attributes["experts"])  # type: ignore[arg-type]
        reduce, gated = attributes.get("reduce", 0), attributes.get("gated", 0)
        rows, width = weight.format.shape[0] // experts, weight.format.shape[1]
        top_k = shape_of(routes.ids)[1]
        assert isinstance(top_k, int) and isinstance(gated, int)
        tokens = _rows(routes.ids)
        inputs: list[ir.Value | None] = [x, self.program.add_weight(weight), routes.ids]
        inputs.append(routes.weights if reduce else None)
        inputs.append(None if bias is None else self.program.add_weight(bias))
        while inputs[-1] is None:
            inputs.pop()
        sizes: Attributes = {"in_features": width, "out_features": rows, "top_k": top_k}
        made = tokens if reduce else f"{tokens}*{top_k}"
        shape = made, rows // (1 + gated)
        return self._node("ExpertLinear", inputs, shape, {**attributes, **sizes}, DOMAIN)

    def paged_attention(
        self,
        qkv: ir.Value,
        rotary: tuple[ir.Value, ir.Value],
        norms: Sequence[LazyTensor],
        attributes: Attributes,
        sinks: LazyTensor | None = None,
    ) -> ir.Value:
        """Attention over the pages of the cache that has the layer.

        ``attributes`` are those of ``plugins/paged_attention``, but the page size and that
        ``layer`` is the model's. ``norms``: q and k, q or none; ``sinks``: one of each query head.
        """
        cache = next(c for c in paged(self.caches) if attributes["layer"] in c.layers)
        pages, *scales = self.arrays(cache)
        inputs: list[ir.Value | None] = [
            *(qkv, *rotary, pages),
            *map(self.input, (Source.QUERY_START, Source.CONTEXT_LEN)),
            *(self._input(paged_port(source, cache)) for source in PAGED_SOURCES),
            *(scales or (None,)),
            *map(self.program.add_weight, norms),
            *(None,) * (2 - len(norms)),
            None if sinks is None else self.program.add_weight(sinks),
        ]
        while inputs[-1] is None:
            inputs.pop()
        heads, width = attributes["num_heads"], attributes["head_dim"]
        assert isinstance(heads, int) and isinstance(width, int)
        layer = cache.layers.index(attributes["layer"])
        of_cache: Attributes = {"layer": layer, "page_size": cache.page_size}
        return self._node(
            "PagedAttention",
            inputs,
            (_rows(qkv), heads * width),
            {**attributes, **of_cache},
            DOMAIN,
        )

    def add(self, a: ir.Value, b: ir.Value) -> ir.Value:
        """a + b, of one shape."""
        return self._node("Add", [a, b], shape_of(a))

    def scale(self, x: ir.Value, factor: float) -> ir.Value:
        """x * factor."""
        number = self.program.constant("factor", np.array([factor], np.float32))
        return self._node("Mul", [x, number], shape_of(x))

    def scale_columns(self, x: ir.Value, factors: LazyTensor) -> ir.Value:
        """Columns of x ``[T, N]`` times ``factors [N]``, or all times ``factors [1]``."""
        return self._node("Mul", [x, self.program.add_weight(factors)], shape_of(x))

    def scale_rows(self, x: ir.Value, factors: ir.Value) -> ir.Value:
        """Rows of x ``[T, N]`` times ``factors [T, 1]``."""
        return self._node("Mul", [x, factors], shape_of(x))

    def sigmoid(self, x: ir.Value) -> ir.Value:
        """1 / (1 + exp(-x))."""
        return self._node("Sigmoid", [x], shape_of(x))

    def clip(self, x: ir.Value, limit: float) -> ir.Value:
        """x, but no further from 0 than ``limit``."""
        ends = [
            self.program.constant(name, np.array(end, np.float32))
            for name, end in (("lowest", -limit), ("highest", limit))
        ]
        return self._node("Clip", [x, *ends], shape_of(x))

    def soft_cap(self, x: ir.Value, cap: float) -> ir.Value:
        """cap * tanh(x / cap)."""
        return self._node("SoftCap", [x], shape_of(x), {"cap": cap}, DOMAIN)

    def concat(self, values: Sequence[ir.Value]) -> ir.Value:
        """Columns side by side."""
        widths = [shape_of(value)[1] for value in values]
        total = sum(width for width in widths if isinstance(width, int))
        return self._node("Concat", list(values), (_rows(values[0]), total), {"axis": -1})

    def replace_rows(
        self, x: ir.Value, token_ids: ir.Value, token: int, row: LazyTensor
    ) -> ir.Value:
        """x ``[T, K]`` with ``row [K]`` for every such token."""
        wanted = self.program.constant("token", np.array(token, np.int32))
        shape, boolean = (_rows(x),), ir.DataType.BOOL
        found = self._node("Equal", [token_ids, wanted], shape, dtype=boolean)
        axis = self.program.constant("axis_1", np.array([1]))
        column = self._node("Unsqueeze", [found, axis], (_rows(x), 1), dtype=boolean)
        return self._node("Where", [column, self.program.add_weight(row), x], shape_of(x))

    def likeliest(self, logits: ir.Value, tokens: NDArray[np.int32] | None) -> ir.Value:
        """The place of the largest of each row, int32 ``[L]``, or what ``tokens`` has there."""
        shape, int64 = (_rows(logits),), ir.DataType.INT64
        places = self._node("ArgMax", [logits], shape, {"axis": -1, "keepdims": 0}, dtype=int64)
        if tokens is None:
            to: Attributes = {"to": int(ir.DataType.INT32)}
            return self._node("Cast", [places], shape, to, dtype=ir.DataType.INT32)
        table = self.program.constant("tokens", tokens)
        return self._node("Gather", [table, places], shape, dtype=ir.DataType.INT32)

    def columns(self, x: ir.Value, first: int, count: int) -> ir.Value:
        """``x[:, first : first + count]``."""
        bounds = [
            self.program.constant("bound", np.array([bound])) for bound in (first, first + count, 1)
        ]
        return self._node("Slice", [x, *bounds], (_rows(x), count))

    def gather_rows(self, x: ir.Value, rows: ir.Value) -> ir.Value:
        """``x[rows]``."""
        return self._node("Gather", [x, rows], (_rows(rows), *shape_of(x)[1:]), {"axis": 0})

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
            sizes[name] = shape_of(value)[axis]
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

    def _reshaped(self, x: ir.Value, shape: tuple[Dim, ...]) -> ir.Value:
        """With the same rows."""
        sizes = [0, *shape[1:]]  # 0 is the size that x has there
        return self._node("Reshape", [x, self.program.constant("shape", np.array(sizes))], shape)

    def _input(self, port: Port) -> ir.Value:
        inputs = self.program.graph.inputs
        if port.name not in self._ports:
            self._ports[port.name] = port
            kind = ir.TensorType(ir_dtype(port.dtype))
            inputs.append(ir.Value(name=port.name, shape=ir.Shape(port.shape), type=kind))
        return next(value for value in inputs if value.name == port.name)

    def _node(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        shape: tuple[Dim, ...],
        attributes: Attributes | None = None,
        domain: str = "",
        dtype: ir.DataType = FLOAT,
    ) -> ir.Value:
        if domain:
            attributes = {**OPERATORS[op_type].typed(attributes or {})}
            self.program.model.opset_imports.setdefault(domain, 1)
        name = self._unique("/".join([*self._path, op_type]))
        output = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))
        node = ir.node(
            op_type, inputs, attributes or {}, domain=domain, outputs=[output], name=name
        )
        self.program.graph.append(node)
        return output

    def _unique(self, name: str) -> str:
        count = self._names.get(name, 0)
        self._names[name] = count + 1
        return f"{name}_{count}" if count else name


def shape_of(value: ir.Value) -> tuple[Dim, ...]:
    """The sizes of a value whose shape is known, numbers or names."""
    assert value.shape is not None, value
    return tuple(dim if isinstance(dim, int) else str(dim.value) for dim in value.shape)


def _rows(value: ir.Value) -> Dim:
    return shape_of(value)[0]
