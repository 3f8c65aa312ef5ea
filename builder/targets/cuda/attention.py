"""What the CUDA kernels of PagedAttention want to be told."""

from __future__ import annotations

import onnx_ir as ir

from slipstream.builder.graph.program import Program


def use_row_major_keys(program: Program) -> int:
    """A page of keys is ``[page_size, head_dim]``, as a tile of a matrix product wants it."""
    nodes = program.nodes("PagedAttention")
    for node in nodes:
        node.attributes["k_row_major"] = ir.AttrInt64("k_row_major", 1)
    return len(nodes)
