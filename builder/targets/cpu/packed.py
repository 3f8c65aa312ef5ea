"""Weights for this package's own kernels: one blob a weight, read where the file is
mapped."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from slipstream.builder.graph.passes.matrices import weight_index
from slipstream.builder.graph.program import Program, StoredWeight
from slipstream.plugins.linear import ACTIVATIONS, WEIGHT_TYPES, ZERO_KINDS
from slipstream.plugins.linear.cpu.packing import can_pack, pack, packed_size, scale_bytes
from slipstream.weights.safetensors import ArraySpec
from slipstream.weights.tensor import LazyTensor, WeightFormat

SUFFIX = ".packed"


def pack_linear(program: Program) -> int:
    """Store the weight of every Linear whose format the kernels hold."""
    return sum(_pack(program, node) for node in program.nodes("Linear"))


def pack_embedding(program: Program) -> int:
    """Store the weight of every Embedding whose format the kernels hold; a tied one shares the
    Linear's blob."""
    return sum(_pack(program, node) for node in program.nodes("Embedding"))


def _pack(program: Program, node: ir.Node) -> bool:
    tensor = program.weight_of(node)
    gated = "gated" in node.attributes and bool(node.attributes["gated"].as_int())
    if not can_pack(tensor.format):
        return False
    node.replace_input_with(1, stored_blob(program, tensor, gated=gated))
    for name, value in format_attributes(tensor.format).items():
        node.attributes[name] = ir.AttrInt64(name, value)
    if weight_index(node, "product") is not None:
        node.attributes["activation"] = ir.AttrInt64("activation", activation_of(tensor.format))
    return True


def stored_blob(program: Program, tensor: LazyTensor, *, gated: bool) -> ir.Value:
    """The graph value of a weight's packed blob, made on first use."""
    name = tensor.name + SUFFIX
    part = ArraySpec(name, np.dtype(np.uint8), (packed_size(tensor.format, gated),))
    return program.store(StoredWeight((part,), lambda: (pack(tensor.load(), gated),)))[0]


def activation_of(fmt: WeightFormat) -> int:
    """How the kernels round x for a product with a weight of this format."""
    return ACTIVATIONS["none" if fmt.kind == "dense" else "block"]


def format_attributes(format: WeightFormat) -> dict[str, int]:
    """The attributes by which a kernel reads a blob of this format."""
    if format.kind == "dense":
        return {"weight_type": WEIGHT_TYPES[format.dtype]}
    return {
        "weight_type": WEIGHT_TYPES[format.kind],
        "bits": format.bits,
        "group_size": format.group,
        "zero_kind": ZERO_KINDS[format.zero],
        "scale_bytes": scale_bytes(format),
    }
