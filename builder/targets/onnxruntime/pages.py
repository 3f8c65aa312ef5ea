"""Attention over pages: PagedAttention of ONNX Runtime, which has kernels for the CUDA provider.

It takes the steps of our loop as they are, packed along tokens, and writes keys and values into
their pages itself: ``block_table`` is our page table.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
import onnx_ir as ir

from slipstream.builder.contract import (
    CacheSpec,
    Source,
    key_value_cache,
    layer_port,
    paged_port,
    step_port,
)
from slipstream.builder.graph.passes.rewrite import replace
from slipstream.builder.graph.program import Program
from slipstream.builder.targets.onnxruntime.attention import (
    CONTRIB,
    Attention,
    Emitter,
    Tables,
    add_port,
    add_update,
    lower_attentions,
    refuse,
    split_heads,
    step_value,
)


@dataclass(frozen=True, slots=True)
class UsePages:
    """Every attention becomes a PagedAttention of ONNX Runtime; no sequence is longer than
    ``max_seq_len``."""

    max_seq_len: int

    def __call__(self, program: Program) -> int:
        """Rewrite attentions, caches and contract."""
        lower = partial(_lower, program, _past_lengths(program))
        return lower_attentions(program, self.max_seq_len, _pages_of, lower)


def _past_lengths(program: Program) -> ir.Value:
    """Tokens of each sequence before this step ``[S]``, made in front of all layers."""
    starts, context = (
        step_value(program, step_port(source))
        for source in (Source.QUERY_START, Source.CONTEXT_LEN)
    )
    emitter = Emitter(program, "step")

    def part(name: str, first: int, end: int) -> ir.Value:
        bounds = [emitter.integers(f"{name}_{x}", x) for x in (first, end)]
        return _int32(emitter, "Slice", [starts, *bounds])

    new = _int32(emitter, "Sub", [part("ends", 1, np.iinfo(np.int64).max), part("starts", 0, -1)])
    past = _int32(emitter, "Sub", [context, new])
    program.graph.insert_before(program.graph[0], emitter.nodes)
    return past


def _int32(emitter: Emitter, op_type: str, inputs: list[ir.Value | None]) -> ir.Value:
    (value,) = emitter.node(op_type, inputs)
    emitter.typed(ir.DataType.INT32)
    return value


def _pages_of(attention: Attention) -> CacheSpec:
    if attention.sinks is not None:
        refuse(attention.node, "PagedAttention has sinks in new releases only; ort_attention slots")
    cache = attention.cache
    page = (cache.page_size, attention.number("num_kv_heads"), attention.number("head_dim"))
    return key_value_cache(cache, cache.arrays[0].dtype, page)


def _lower(
    program: Program, past: ir.Value, attention: Attention, cache: CacheSpec, tables: Tables
) -> None:
    node = attention.node
    emitter = Emitter(program, str(node.name))
    heads = split_heads(emitter, attention)
    ports = [layer_port(array, cache, attention.number("layer")) for array in cache.arrays]
    pages = [add_port(program, port) for port in ports]
    starts = step_value(program, step_port(Source.QUERY_START))
    table = step_value(program, paged_port(Source.PAGE_TABLE, cache))
    inputs = [*heads, *pages, starts, past, table, *tables]
    output, *written = emitter.node(
        "PagedAttention", inputs, attention.attributes(), CONTRIB, outputs=3
    )
    for value, port in zip(written, ports, strict=True):
        add_update(program, value, port)
    replace(program, [node], emitter.nodes, {node.outputs[0]: output})
