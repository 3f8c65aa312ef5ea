"""The weights of experts for this package's own kernel: their blobs one behind the other."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from slipstream.builder.graph.passes.dequantize_unheld import as_dense
from slipstream.builder.graph.program import Program, StoredWeight
from slipstream.builder.targets.cpu.packed import SUFFIX, activation_of, format_attributes
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
    if not can_pack(tensor.format):
        tensor = as_dense(tensor, "float32")
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
    return {**format_attributes(fmt), "activation": activation_of(fmt)}


def blob_size(fmt: WeightFormat, experts: int, gated: bool) -> int:
    """Bytes of what ``pack_experts`` makes of a weight of this format."""
    rows, columns = fmt.shape
    return experts * packed_size(replace(fmt, shape=(rows // experts, columns)), gated)


def pack_experts(tensor: QuantTensor, experts: int, *, gated: bool) -> NDArray[np.uint8]:
    """The blob u8 of weights ``[experts * N, K]``."""
    rows = tensor.format.shape[0] // experts
    parts = (row_slice(tensor, e * rows, (e + 1) * rows) for e in range(experts))
    return np.concatenate([pack(part, gated) for part in parts])
