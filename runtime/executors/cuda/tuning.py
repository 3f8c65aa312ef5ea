"""Fills an engine's tactics.json on the GPU that will run it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping

import onnx_ir as ir
from torch import Tensor

from slipstream.builder.contract import TARGET_GRAPH
from slipstream.builder.engine import TACTICS, WEIGHTS, Engine
from slipstream.plugins.linear.cuda.host import DeviceWeight
from slipstream.plugins.linear.cuda.tactics import BUCKETS, Tactics
from slipstream.plugins.linear.cuda.tuning import Problem, Tuned, cold, tune
from slipstream.runtime.executors.cuda.device import Device, require
from slipstream.runtime.executors.cuda.program import node_dtype, node_weight
from slipstream.runtime.executors.cuda.weights import load_weights


def tune_engine(engine: Engine) -> list[Tuned]:
    """Time every kernel of Linear for every shape of an engine and store the quickest.

    Returns the timings of each shape and number of tokens. Raises what loading raises.
    """
    manifest = engine.manifest
    require(manifest)
    device = Device()
    graph = ir.load(engine.path / manifest.graphs[TARGET_GRAPH].file).graph
    weights = load_weights(engine.path / WEIGHTS, device)
    table = Tactics(device.capability, device.name)
    buckets = [size for size in BUCKETS if size <= manifest.limits.max_num_tokens] or [1]
    report = tune(problems(graph, weights), buckets, table)
    engine.write_file(TACTICS, table.to_json())
    return report


def problems(graph: Iterable[ir.Node], weights: Mapping[str, Tensor]) -> list[Problem]:
    """The Linears of a lowered graph, those of one shape and use together."""
    groups: dict[tuple[object, ...], list[tuple[ir.Node, DeviceWeight]]] = defaultdict(list)
    for node in graph:
        if node.op_type == "Linear":
            weight = node_weight(node, weights)
            inputs = [value is not None for value in (*node.inputs, None, None, None)[3:5]]
            gated = node.attributes.get_int("gated", 0)
            groups[(weight.format, gated, *inputs, node_dtype(node))].append((node, weight))
    return [_problem(members) for members in groups.values()]


def _problem(members: list[tuple[ir.Node, DeviceWeight]]) -> Problem:
    node = members[0][0]
    inputs = (*node.inputs, None, None, None)
    x = node.inputs[0]
    assert x is not None
    return Problem(
        weights=cold([weight for _, weight in members]),
        gated=bool(node.attributes.get_int("gated", 0)),
        norm=inputs[4] is not None,
        residual=inputs[3] is not None,
        dtype=node_dtype(x.producer() or node),
        out_dtype=node_dtype(node),
    )
