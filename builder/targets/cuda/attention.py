"""What the CUDA kernels of PagedAttention want to be told."""

from __future__ import annotations

import onnx_ir as ir

from slipstream.builder.graph.program import Program
from slipstream.errors import BuildError


def use_row_major_keys(program: Program) -> int:
    """A page of keys is ``[page_size, head_dim]``, as a tile of a matrix product wants it.

    BuildError for attention whose keys and values the kernels do not make.
    """
    nodes = program.nodes("PagedAttention")
    for node in nodes:
        if node.attributes.get_int("kv_parts", 2) != 2 or node.attributes.get_int("v_norm", 0) != 0:
            raise BuildError(
                f"{node.name} has a norm of v heads, k that are v too, or keys of another layer, "
                "for which the cuda target has no kernel: use --target cpu"
            )
        node.attributes["k_row_major"] = ir.AttrInt64("k_row_major", 1)
    return len(nodes)
