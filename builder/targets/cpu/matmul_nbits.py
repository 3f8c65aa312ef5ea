"""Integer groups on ONNX Runtime's MatMulNBits; on a CPU at accuracy level 4 (int8 dot products).

A format with float offsets, w = q·s + m, would run 100 times slower there, so it is computed as
the symmetric product plus a product 1/group the size:

    x ──┬─ MatMulNBits(q, s) ───────────────────────────┐
        └─ group sums [T, K/g] ─ MatMul(m + 2^(b-1)·s) ─ Add ─ y

The group sums are made once for all Linears that read the same x in groups of one size.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from slipstream.builder.graph.passes.rewrite import replace
from slipstream.builder.graph.program import Program, StoredWeight
from slipstream.errors import BuildError
from slipstream.weights.safetensors import ArraySpec
from slipstream.weights.tensor import LazyTensor, QuantTensor, WeightFormat, pack_nibbles

ACCURACY_LEVEL = 4
BLOCKS = (16, 32, 64, 128, 256)
FLOAT = ir.TensorType(ir.DataType.FLOAT)


def lower_matmul_nbits(program: Program, accuracy_level: int = ACCURACY_LEVEL) -> int:
    """Lower every Linear that is still unlowered and holds integer groups; ``accuracy_level`` 0
    multiplies in the type of x."""
    nodes = [node for node in program.nodes("Linear") if _is_integer(program, node)]
    for node in nodes:
        _lower(program, node, accuracy_level)
    return len(nodes)


def can_lower(fmt: WeightFormat) -> bool:
    """Whether MatMulNBits holds a weight of this format."""
    whole = fmt.group in BLOCKS and fmt.shape[1] % fmt.group == 0
    return fmt.kind == "int" and fmt.rows == 1 and whole


def _is_integer(program: Program, node: ir.Node) -> bool:
    name = node.inputs[1].name if node.inputs[1] is not None else None
    tensor = program.weights.get(name or "")
    return tensor is not None and can_lower(tensor.format)


def _lower(program: Program, node: ir.Node, accuracy_level: int) -> None:
    tensor = program.weight_of(node)
    x, bias = node.inputs[0], node.inputs[2] if len(node.inputs) > 2 else None
    assert x is not None
    codes, scale, *rest = program.store(_stored(tensor))
    zero = rest[0] if tensor.format.zero == "zero" else None
    n, k = tensor.format.shape
    attributes = {
        "K": k,
        "N": n,
        "bits": tensor.format.bits,
        "block_size": tensor.format.group,
        "accuracy_level": accuracy_level,
    }
    inputs: list[ir.Value | None] = [x, codes, scale, zero, None, bias]
    while inputs[-1] is None:
        inputs.pop()
    product = ir.node(
        "MatMulNBits",
        inputs,
        attributes,
        domain="com.microsoft",
        num_outputs=1,
        name=f"{node.name}/MatMulNBits",
    )
    new = [product]
    if tensor.format.zero == "offset":
        sums, made = _group_sums(program, x, node, tensor.format.group)
        product.outputs[0].name, product.outputs[0].type = f"{node.name}/symmetric", FLOAT
        correction = ir.node("MatMul", [sums, rest[0]], num_outputs=1, name=f"{node.name}/offset")
        correction.outputs[0].name = f"{node.name}/correction"
        total = ir.node(
            "Add",
            [product.outputs[0], correction.outputs[0]],
            num_outputs=1,
            name=f"{node.name}/Add",
        )
        new = [*made, product, correction, total]
    replace(program, [node], new, {node.outputs[0]: new[-1].outputs[0]})


def _group_sums(
    program: Program, x: ir.Value, node: ir.Node, group: int
) -> tuple[ir.Value, list[ir.Node]]:
    """Sums of x over each group along K ``[T, K/g]``, and the nodes to insert when they are new."""
    name = f"{x.name}/sums_{group}"
    known = {use.node.name: use.node for use in x.uses()}.get(f"{name}/reshape")
    if known is not None:
        return next(iter(known.outputs[0].uses())).node.outputs[0], []
    groups = node.attributes["in_features"].as_int() // group
    shape = program.constant(
        f"group_shape_{groups}_{group}", np.array([-1, groups, group], np.int64)
    )
    axis = program.constant("axis_2", np.array([2], np.int64))
    reshape = ir.node("Reshape", [x, shape], num_outputs=1, name=f"{name}/reshape")
    reshape.outputs[0].name = f"{name}/grouped"
    total = ir.node(
        "ReduceSum", [reshape.outputs[0], axis], {"keepdims": 0}, num_outputs=1, name=name
    )
    total.outputs[0].name = name
    return total.outputs[0], [reshape, total]


def _stored(tensor: LazyTensor) -> StoredWeight:
    n, k = tensor.format.shape
    groups, bits = k // tensor.format.group, tensor.format.bits
    parts = [
        ArraySpec(
            f"{tensor.name}.codes", np.dtype(np.uint8), (n, groups, tensor.format.group * bits // 8)
        ),
        ArraySpec(f"{tensor.name}.scale", np.dtype(np.float32), (n, groups)),
    ]
    if tensor.format.zero == "zero":
        width = groups if bits == 8 else (groups + 1) // 2
        parts.append(ArraySpec(f"{tensor.name}.zero", np.dtype(np.uint8), (n, width)))
    elif tensor.format.zero == "offset":
        parts.append(ArraySpec(f"{tensor.name}.offset", np.dtype(np.float32), (groups, n)))
    shape = parts[0].shape
    return StoredWeight(tuple(parts), lambda: _arrays(tensor.load(), shape))


def _arrays(weight: QuantTensor, codes_shape: tuple[int, ...]) -> tuple[NDArray[np.generic], ...]:
    assert weight.scale is not None
    scale = weight.scale.astype(np.float32)
    arrays: list[NDArray[np.generic]] = [weight.codes.reshape(codes_shape), scale]
    if weight.zero is not None:
        if weight.zero.max(initial=0) >= 2**weight.format.bits:
            raise BuildError(
                f"{weight.name} has the zero point {weight.zero.max()}, which {weight.format.bits} "
                "bits of MatMulNBits cannot hold (some GPTQ files do); build for target cpu or "
                "cuda, without --gemm-plugin disable"
            )
        arrays.append(weight.zero if weight.format.bits == 8 else pack_nibbles(weight.zero))
    elif weight.offset is not None:
        midpoint = np.float32(2 ** (weight.format.bits - 1))
        arrays.append(np.ascontiguousarray((weight.offset.astype(np.float32) + midpoint * scale).T))
    return tuple(arrays)
