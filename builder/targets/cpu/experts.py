"""The weights of experts for this package's own kernel: their blobs one behind the other, or
float32 where no blob holds them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from slipstream.builder.graph.program import Program, StoredWeight
from slipstream.builder.targets.cpu.packed import SUFFIX, format_attributes
from slipstream.plugins.linear import ACTIVATIONS, WEIGHT_TYPES
from slipstream.plugins.linear.cpu.packing import can_pack, pack, packed_size
from slipstream.weights.safetensors import ArraySpec
from slipstream.weights.tensor import QuantTensor, WeightFormat, row_slice


def lower_expert_linear(program: Program) -> int:
    """Store the weight of every ExpertLinear."""
    nodes = program.nodes("ExpertLinear")
    for node in nodes:
        _lower(program, node)
    return len(nodes)


def _lower(program: Program, node: ir.Node) -> None:
    tensor = program.weight_of(node)
    experts = node.attributes["experts"].as_int()
    gated = "gated" in node.attributes and bool(node.attributes["gated"].as_int())
    part = ArraySpec(
        tensor.name + SUFFIX, np.dtype(np.uint8), (blob_size(tensor.format, experts, gated),)
    )
    stored = StoredWeight((part,), lambda: (pack_experts(tensor.load(), experts, gated=gated),))
    node.replace_input_with(1, program.store(stored)[0])
    for name, value in expert_attributes(tensor.format).items():
        node.attributes[name] = ir.AttrInt64(name, value)


def expert_attributes(fmt: WeightFormat) -> dict[str, int]:
    """The attributes by which the kernel reads the blobs of this format, and rounds x."""
    if can_pack(fmt):
        return {**format_attributes(fmt), "activation": ACTIVATIONS["block"]}
    return {"weight_type": WEIGHT_TYPES["float32"]}


def blob_size(fmt: WeightFormat, experts: int, gated: bool) -> int:
    """Bytes of what ``pack_experts`` makes of a weight of this format."""
    rows, columns = fmt.shape
    if can_pack(fmt):
        return experts * packed_size(replace(fmt, shape=(rows // experts, columns)), gated)
    return rows * columns * 4


def pack_experts(tensor: QuantTensor, experts: int, *, gated: bool) -> NDArray[np.uint8]:
    """The blob u8 of weights ``[experts * N, K]``."""
    if not can_pack(tensor.format):
        values = np.ascontiguousarray(tensor.dequantize(), np.float32)
        return values.reshape(-1).view(np.uint8)
    rows = tensor.format.shape[0] // experts
    parts = (row_slice(tensor, e * rows, (e + 1) * rows) for e in range(experts))
    return np.concatenate([pack(part, gated) for part in parts])
