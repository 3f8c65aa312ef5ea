"""A hand-made engine for a CPU: two graphs, pages and a state a sequence, a second output.

With E an embedding, both graphs compute ``hidden = x + attention(x)`` of ``x = E[token_ids]``, on
the same pages. ``target`` also keeps, in the slot of each sequence, the sum of all its ``hidden``
so far, and gives it as ``memory``.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from slipstream.builder.contract import (
    LOGITS,
    TARGET_GRAPH,
    CacheArray,
    CacheSpec,
    GraphSpec,
    Source,
    attention_cache,
)
from slipstream.builder.engine import MANIFEST, EngineLimits, Manifest, digest
from slipstream.builder.graph.ops import Ops
from slipstream.builder.graph.program import new_program
from slipstream.builder.graph.verifier import verify

VOCAB, WIDTH, PAGE = 24, 8, 32
CACHES = (
    attention_cache("float32", [0], PAGE, 1, WIDTH),
    CacheSpec("sum", "state", (0,), (CacheArray("sums", "float32", (WIDTH,)),)),
)
_RNG = np.random.default_rng(0)
EMBEDDING = _RNG.normal(0, 1, (VOCAB, WIDTH)).astype(np.float32)
_QKV = _RNG.normal(0, 0.5, (WIDTH, 3 * WIDTH)).astype(np.float32)
Shape = tuple[int | str, ...]
Floats = NDArray[np.float64]


@dataclass(slots=True)
class Nodes:
    """Standard ONNX nodes beside what the operator surface has."""

    ops: Ops

    def __call__(
        self, op_type: str, *inputs: ir.Value, shape: Shape, dtype: str = "FLOAT", **attributes: int
    ) -> ir.Value:
        graph = self.ops.program.graph
        name = f"{op_type}.{len(graph)}"
        output = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(ir.DataType[dtype]))
        graph.append(ir.node(op_type, inputs, attributes, outputs=[output], name=name))
        return output

    def number(self, *values: int, dtype: type[np.generic] = np.int64) -> ir.Value:
        name = f"{dtype.__name__}.{'.'.join(map(str, values))}"
        return self.ops.program.constant(name, np.array(values, dtype))


def hidden(ops: Ops) -> ir.Value:
    """x + attention(x)."""
    node = Nodes(ops)
    embedding = ops.program.constant("embedding", EMBEDDING)
    x = node("Gather", embedding, ops.input(Source.TOKEN_IDS), shape=("T", WIDTH), axis=0)
    qkv = node("MatMul", x, ops.program.constant("qkv", _QKV), shape=("T", 3 * WIDTH))
    angles = ops.rotary(ops.input(Source.POSITIONS), np.ones(WIDTH // 2, np.float32), 1.0)
    heads = {"layer": 0, "num_heads": 1, "num_kv_heads": 1, "head_dim": WIDTH}
    attended = ops.paged_attention(qkv, angles, [], {**heads, "scale": 0.5})
    total = ops.add(x, attended)
    ops.output(total, "hidden")
    return total


def keep_sums(ops: Ops, total: ir.Value) -> None:
    """The slot's state, unless the sequence begins, and all rows of this step."""
    node, (sums,) = Nodes(ops), ops.arrays(CACHES[1])
    zero = ops.program.constant("nothing", np.zeros((1, WIDTH), np.float32))
    running = node("CumSum", total, node.number(0), shape=("T", WIDTH))
    running = node("Concat", zero, running, shape=("T+1", WIDTH), axis=0)
    bounds = ops.input(Source.QUERY_START)
    begins = node("Slice", bounds, node.number(0), node.number(-1), shape=("S",), dtype="INT32")
    ends = node("Slice", bounds, node.number(1), node.number(1 << 31), shape=("S",), dtype="INT32")
    parts = [node("Gather", running, at, shape=("S", WIDTH), axis=0) for at in (ends, begins)]
    added = node("Sub", *parts, shape=("S", WIDTH))
    counts = node("Sub", ends, begins, shape=("S",), dtype="INT32")
    before = node("Sub", ops.input(Source.CONTEXT_LEN), counts, shape=("S",), dtype="INT32")
    fresh = node("Equal", before, node.number(0, dtype=np.int32), shape=("S",), dtype="BOOL")
    fresh = node("Unsqueeze", fresh, node.number(1), shape=("S", 1), dtype="BOOL")
    slots = ops.input(Source.SLOTS)
    state = node("Gather", sums, slots, shape=(1, "S", WIDTH), axis=1)
    state = node("Squeeze", state, node.number(0), shape=("S", WIDTH))
    state = node("Where", fresh, zero, state, shape=("S", WIDTH))
    memory = node("Add", state, added, shape=("S", WIDTH))
    place = node("Cast", slots, shape=("S",), dtype="INT64", to=int(ir.DataType.INT64))
    place = node("Unsqueeze", place, node.number(1), shape=("S", 1), dtype="INT64")
    layer = node("Sub", place, place, shape=("S", 1), dtype="INT64")
    place = node("Concat", layer, place, shape=("S", 2), dtype="INT64", axis=1)
    after = node("ScatterND", sums, place, memory, shape=(1, "slots.sum", WIDTH))
    ops.output(after, "sums_after", updates=sums)
    ops.output(memory, "memory")


def save_graph(directory: Path, name: str) -> GraphSpec:
    """Write ``NAME.onnx`` and return its contract."""
    ops = Ops(new_program(name), CACHES)
    total = hidden(ops)
    if name == TARGET_GRAPH:
        keep_sums(ops, total)
    head = ops.program.constant("head", np.ascontiguousarray(EMBEDDING.T))
    ops.output(Nodes(ops)("MatMul", ops.pick_rows(total), head, shape=("L", VOCAB)), LOGITS)
    contract = ops.contract(f"{name}.onnx")
    ops.program.contract, ops.program.caches = contract, ops.caches
    verify(ops.program, "the test")
    ir.save(ops.program.model, directory / contract.file)
    return contract


def save_engine(directory: Path) -> Manifest:
    """The engine, with no tokenizer."""
    graphs = {name: save_graph(directory, name) for name in (TARGET_GRAPH, "draft")}
    manifest = Manifest(
        target="cpu",
        model={"architecture": "tests"},
        limits=EngineLimits(4, 64, 128),
        graphs=graphs,
        caches=CACHES,
        quantization="none",
        plugins={"PagedAttention": 1},
        source="tests",
        command="slipstream build tests -o engine",
        files={file.name: digest(file) for file in directory.glob("*.onnx")},
    )
    (directory / MANIFEST).write_text(manifest.to_json())
    return manifest


def attention(tokens: list[int]) -> Floats:
    """``hidden [T, WIDTH]`` of a whole sequence, in NumPy."""
    x = EMBEDDING[tokens].astype(np.float64)
    q, k, v = np.split(x @ _QKV, 3, axis=1)
    angle = np.arange(len(tokens))[:, None]
    q, k = (_rotated(heads, np.cos(angle), np.sin(angle)) for heads in (q, k))
    scores = np.where(np.tri(len(tokens)) > 0, q @ k.T * 0.5, -np.inf)
    weights = np.exp(scores - scores.max(1, keepdims=True))
    hidden: Floats = x + weights / weights.sum(1, keepdims=True) @ v
    return hidden


def _rotated(x: Floats, cos: Floats, sin: Floats) -> Floats:
    first, second = np.split(x, 2, axis=1)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=1)
