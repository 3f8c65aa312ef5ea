"""A checkpoint's scales of a float8 KV cache become attributes of its attention layers."""

from __future__ import annotations

import math
from dataclasses import dataclass

import onnx_ir as ir

from slipstream.builder.graph.program import Program
from slipstream.errors import CheckpointError
from slipstream.weights.tensor import KVScales


@dataclass(frozen=True, slots=True)
class SetKVScales:
    """Keys and values are stored divided by ``scales`` of their layer, and saturate at 448 times
    that."""

    scales: KVScales

    def __call__(self, program: Program) -> int:
        """Set the attributes; CheckpointError for scales that are not one positive number a
        layer."""
        nodes = program.nodes("PagedAttention")
        for name in ("k", "v"):
            numbers: tuple[float, ...] = getattr(self.scales, name)
            if len(numbers) != len(nodes) or not all(0 < x < math.inf for x in numbers):
                raise CheckpointError(
                    f"the checkpoint has {len(numbers)} scales of {name} for {len(nodes)} layers, "
                    "which must be positive numbers, one a layer; choose another --kv-cache-dtype "
                    "or download the checkpoint again"
                )
            for node, scale in zip(nodes, numbers, strict=True):  # in the order of the layers
                node.attributes[f"{name}_scale"] = ir.AttrFloat32(f"{name}_scale", scale)
        return len(nodes)
