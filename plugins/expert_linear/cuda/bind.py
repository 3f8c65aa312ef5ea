"""ExpertLinear nodes as calls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import onnx_ir as ir
from torch import Tensor

from slipstream.plugins.cuda.binding import (
    SETTLED,
    Context,
    Kernel,
    Run,
    attributes_of,
    input_names,
    name_of,
)
from slipstream.plugins.expert_linear.cuda.experts import Experts, Grouping, group, needs_grouping
from slipstream.plugins.expert_linear.cuda.experts import expert_linear as multiply
from slipstream.plugins.expert_linear.cuda.tactics import find_tactic
from slipstream.plugins.linear.cuda.packing import format_of
from slipstream.plugins.linear.cuda.weight import DeviceWeight


def expert_linear(node: ir.Node, context: Context) -> Kernel:
    """The products of a step are grouped by expert once for all nodes that share their ids."""
    x, ids = name_of(node.inputs[0]), name_of(node.inputs[2])
    *_, weights, _, residual = input_names(node, 6)
    experts = experts_of(node, context.constants)
    shape = experts.shape(attributes_of(node)["top_k"])

    def kernel(run: Run) -> Sequence[Tensor]:
        places = run.values[ids]
        tactic = find_tactic(context.tactics, shape, len(places))
        grouped = needs_grouping(tactic, len(places)) and len(places) > 0
        y = multiply(
            run.values[x],
            experts,
            places,
            run.get(weights),
            run.get(residual),
            tactic=tactic,
            grouping=_grouping(run, ids, places, experts.number) if grouped else None,
            pdl=run.pdl,
            early=f"{ids} read" in run.shared,
        )
        if not grouped and weights is None:  # what comes later finds the ids written
            run.shared[f"{ids} read"] = run.shared[SETTLED] = True
        return (y,)

    return kernel


def experts_of(node: ir.Node, constants: Mapping[str, Tensor]) -> Experts:
    """The experts of an ExpertLinear, their weights in its blob."""
    bias = input_names(node, 5)[4]
    attributes = attributes_of(node)
    fmt = format_of(attributes)
    rows, columns = fmt.shape
    fmt = replace(fmt, shape=(attributes["experts"] * rows, columns))
    return Experts(
        DeviceWeight.from_blob(constants[name_of(node.inputs[1])], fmt),
        attributes["experts"],
        None if bias is None else constants[bias],
        reduce=bool(attributes["reduce"]),
        gated=bool(attributes["gated"]),
        gate=attributes["gate"],
    )


def _grouping(run: Run, name: str, ids: Tensor, experts: int) -> Grouping:
    key = f"{name} grouped"
    if key not in run.shared:
        run.shared[key] = group(ids, experts, pdl=run.pdl)
    found: Grouping = run.shared[key]
    return found
