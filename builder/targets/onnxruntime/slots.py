"""Attention over a slot a sequence: GroupQueryAttention, whose past and present share one buffer.

A page of such a cache is a slot that holds the longest sequence and one token more, so that it is
never full, nor shared. Row b of a step is the sequence in row b of the buffers that are bound:

    qkv [T, N] ─ Reshape [S, T/S, N] ─ GroupQueryAttention ─ Reshape [T, M]
                                        │ ▲
               key_cache.0 [S, heads, positions, D], value_cache.0
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import onnx_ir as ir

from slipstream.builder.contract import CacheSpec, Source, key_value_cache, layer_port, step_port
from slipstream.builder.graph.passes.rewrite import replace as replace_nodes
from slipstream.builder.graph.program import Program
from slipstream.builder.targets.onnxruntime.attention import (
    CONTRIB,
    Attention,
    Emitter,
    Tables,
    add_port,
    add_update,
    lower_attentions,
    split_heads,
    step_value,
)


@dataclass(frozen=True, slots=True)
class UseSlots:
    """Every attention becomes a GroupQueryAttention; no sequence is longer than
    ``max_seq_len``."""

    max_seq_len: int

    def __call__(self, program: Program) -> int:
        """Rewrite attentions, caches and contract."""
        # A row of padding writes to the position after the last.
        positions = self.max_seq_len + 1
        lower = partial(_lower, program, _Step(program))
        return lower_attentions(program, positions, partial(_slots_of, positions=positions), lower)


class _Step:
    """What all layers read, made once a step in front of them."""

    def __init__(self, program: Program) -> None:
        context = step_value(program, step_port(Source.CONTEXT_LEN))
        self.longest = step_value(program, step_port(Source.LONGEST_CONTEXT))
        self._emitter = Emitter(program, "step")
        one = program.constant("one", np.array([1], np.int32))
        (self.last,) = self._emitter.node("Sub", [context, one])
        self._emitter.typed(ir.DataType.INT32)
        (self._rows,) = self._emitter.node("Shape", [context])
        self._emitter.typed(ir.DataType.INT64)
        self._shapes: dict[int, ir.Value] = {}
        self._first = program.graph[0]
        program.graph.insert_before(self._first, self._emitter.nodes)

    def shape(self, columns: int) -> ir.Value:
        """``[S, -1, columns]``."""
        if columns not in self._shapes:
            rest = self._emitter.integers(f"rows_{columns}", -1, columns)
            (shape,) = self._emitter.node("Concat", [self._rows, rest], {"axis": 0})
            self._emitter.typed(ir.DataType.INT64)
            self._first.graph.insert_before(self._first, self._emitter.nodes[-1:])  # type: ignore[union-attr]
            self._shapes[columns] = shape
        return self._shapes[columns]


def _slots_of(attention: Attention, positions: int) -> CacheSpec:
    heads, size = attention.number("num_kv_heads"), attention.number("head_dim")
    cache = key_value_cache(attention.cache, _dtype(attention.cache), (heads, positions, size))
    # No slot is given back behind a window: every cache has a sequence in the same one.
    return replace(cache, page_size=positions, window=0)


def _lower(
    program: Program, step: _Step, attention: Attention, cache: CacheSpec, tables: Tables
) -> None:
    node = attention.node
    emitter = Emitter(program, str(node.name))
    heads: list[ir.Value | None] = []
    for value, columns in zip(split_heads(emitter, attention), attention.widths(), strict=True):
        if value is attention.qkv:
            columns = sum(attention.widths())
        if value is not None:
            (value,) = emitter.node("Reshape", [value, step.shape(columns)])
        heads.append(value)
    layer = attention.number("layer")
    ports = [layer_port(array, cache, layer) for array in cache.arrays]
    past = [add_port(program, port) for port in ports]
    inputs = [*heads, *past, step.last, step.longest, *tables]
    if attention.sinks is not None:
        inputs += [None, None, attention.sinks]
    attended, *present = emitter.node(
        "GroupQueryAttention", inputs, attention.attributes(), CONTRIB, outputs=3
    )
    for value, port in zip(present, ports, strict=True):
        add_update(program, value, port)
    flat = emitter.integers(f"tokens_{attention.widths()[0]}", -1, attention.widths()[0])
    (output,) = emitter.node("Reshape", [attended, flat])
    replace_nodes(program, [node], emitter.nodes, {node.outputs[0]: output})


def _dtype(cache: CacheSpec) -> str:
    return cache.arrays[0].dtype
