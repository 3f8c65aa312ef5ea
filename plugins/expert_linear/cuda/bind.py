"""ExpertLinear nodes as calls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import onnx_ir as ir
from torch import Tensor

from slipstream.plugins.cuda.binding import (
    Context,
    Kernel,
    Run,
    attributes_of,
    input_names,
    name_of,
)
from slipstream.plugins.expert_linear.cuda.experts import GEMV_TOKENS, Experts, Grouping, group
from slipstream.plugins.expert_linear.cuda.experts import expert_linear as multiply
from slipstream.plugins.linear.cuda.packing import format_of
from slipstream.plugins.linear.cuda.weight import DeviceWeight


def expert_linear(node: ir.Node, context: Context) -> Kernel:
    """The products of a step are grouped by expert once for all nodes that share their ids."""
    x, ids = name_of(node.inputs[0]), name_of(node.inputs[2])
    *_, weights, bias, residual = input_names(node, 6)
    attributes = attributes_of(node)
    fmt = format_of(attributes)
    rows, columns = fmt.shape
    fmt = replace(fmt, shape=(attributes["experts"] * rows, columns))
    experts = Experts(
        DeviceWeight.from_blob(context.constants[name_of(node.inputs[1])], fmt),
        attributes["experts"],
        None if bias is None else context.constants[bias],
        bool(attributes["reduce"]),
        bool(attributes["gated"]),
        attributes["gate"],
    )

    def kernel(run: Run) -> Sequence[Tensor]:
        places = run.values[ids]
        y = multiply(
            run.values[x],
            experts,
            places,
            run.get(weights),
            run.get(residual),
            grouping=_grouping(run, ids, places, experts.number),
            pdl=run.pdl,
        )
        return (y,)

    return kernel


def _grouping(run: Run, name: str, ids: Tensor, experts: int) -> Grouping | None:
    if ids.shape[0] <= GEMV_TOKENS:
        return None
    key = f"{name} grouped"
    if key not in run.shared:
        run.shared[key] = group(ids, experts, pdl=run.pdl)
    found: Grouping = run.shared[key]
    return found
