"""Linear and Embedding nodes as calls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx_ir as ir
from torch import Tensor

from slipstream.plugins.cuda.binding import (
    Context,
    Kernel,
    Run,
    attributes_of,
    dtype_of,
    input_names,
    name_of,
)
from slipstream.plugins.linear.cuda import linear as kernels
from slipstream.plugins.linear.cuda.packing import format_of
from slipstream.plugins.linear.cuda.weight import DeviceWeight


def weight_of(node: ir.Node, weights: Mapping[str, Tensor]) -> DeviceWeight:
    """The weight of a Linear or an Embedding, in its blob."""
    return DeviceWeight.from_blob(weights[name_of(node.inputs[1])], format_of(attributes_of(node)))


def linear(node: ir.Node, context: Context) -> Kernel:
    """The kernel of a step is that of the tactic for its tokens."""
    _, _, bias, residual, norm = input_names(node, 5)
    x = name_of(node.inputs[0])
    weight = weight_of(node, context.constants)
    attributes = attributes_of(node)
    gated, gate, eps = bool(attributes["gated"]), attributes["gate"], attributes["norm_eps"]
    dtype = dtype_of(node)

    def kernel(run: Run) -> Sequence[Tensor]:
        tokens = run.values[x]
        y = kernels.linear(
            tokens,
            weight,
            bias=run.get(bias),
            residual=run.get(residual),
            norm_weight=run.get(norm),
            norm_eps=eps,
            gated=gated,
            gate=gate,
            out_dtype=dtype,
            tactic=context.tactics.find(weight.format, gated, tokens.shape[0]),
            out=run.out,
            pdl=run.pdl,
        )
        return (y,)

    return kernel


def embedding(node: ir.Node, context: Context) -> Kernel:
    """Ids that the host does not know come from the last tokens of their slots."""
    ids = name_of(node.inputs[0])
    weight = weight_of(node, context.constants)
    dtype = dtype_of(node)

    def kernel(run: Run) -> Sequence[Tensor]:
        step, memory = run.kv()
        found = kernels.embedding(
            run.values[ids],
            weight,
            dtype,
            last_tokens=memory.last_tokens,
            slots=step.token_slots,
            pdl=run.pdl,
        )
        return (found,)

    return kernel
