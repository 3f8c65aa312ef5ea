"""Fills an engine's tactics.json on the GPU that will run it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict

import onnx_ir as ir
import torch
from torch import Tensor

from slipstream.builder.contract import EAGLE3, HEAD_GRAPH, TARGET_GRAPH, page_size_of
from slipstream.builder.engine import COSTS, TACTICS, WEIGHTS, Engine, open_engine
from slipstream.plugins.cuda.binding import attributes_of, dtype_of, input_names
from slipstream.plugins.cuda.tuning import Problem, Tuned, cold, tune
from slipstream.plugins.expert_linear.cuda.bind import experts_of
from slipstream.plugins.expert_linear.cuda.tuning import ExpertProblem
from slipstream.plugins.linear.cuda.bind import weight_of
from slipstream.plugins.linear.cuda.tactics import BUCKETS, Tactics
from slipstream.plugins.linear.cuda.tuning import LinearProblem
from slipstream.plugins.normed_router.cuda import in_one_launch
from slipstream.runtime.config import RuntimeConfig
from slipstream.runtime.executors.cuda.costs import StepCosts
from slipstream.runtime.executors.cuda.device import Device, require
from slipstream.runtime.executors.cuda.executor import CUDAExecutor
from slipstream.runtime.executors.cuda.weights import load_weights

_PAGES = 16  # of padding, for steps whose time is measured


def tune_engine(engine: Engine) -> list[Tuned]:
    """Time every kernel of Linear, NormedRouter and ExpertLinear for every shape of an engine and
    store the quickest; then what steps take with them.

    Returns the timings of each shape and number of tokens. Raises what loading raises.
    """
    report = _tune_kernels(engine)
    if engine.manifest.pooling is None:
        costs = step_costs(open_engine(engine.path))
        engine = open_engine(engine.path)
        engine.write_file(COSTS, costs.to_json())
    return report


def step_costs(engine: Engine) -> StepCosts:
    """What steps of decodes of an engine take, with drafts and guesses of its head if it has one;
    pages are few, because contexts are left out."""
    manifest = engine.manifest
    config = RuntimeConfig(
        **asdict(manifest.limits),
        page_size=page_size_of(manifest.caches),
        speculative="ngram" if manifest.head is None else EAGLE3,
    )
    executor = CUDAExecutor(engine, config)
    executor.reserve_kv(_PAGES * sum(cache.bytes_per_page for cache in manifest.caches))
    costs = executor.measure()
    executor.shutdown()
    return costs


def _tune_kernels(engine: Engine) -> list[Tuned]:
    """Store the quickest tactics."""
    manifest = engine.manifest
    require(manifest)
    device = Device()
    names = [name for name in (TARGET_GRAPH, HEAD_GRAPH) if name in manifest.graphs]
    graphs = [ir.load(engine.path / manifest.graphs[name].file).graph for name in names]
    weights = load_weights(engine.path / WEIGHTS, device)
    table = Tactics(device.capability, device.name)
    found = problems([node for graph in graphs for node in graph], weights)
    sizes = sorted({size for problem in found for size in problem.buckets})
    # A step that is not full takes the tactic of the next larger bucket.
    most = next((size for size in sizes if size >= manifest.limits.max_num_tokens), sizes[-1])
    report = []
    for tuned in tune(found, [size for size in sizes if size <= most], table):
        engine.write_file(
            TACTICS, table.to_json().encode()
        )  # what is cut short keeps what it timed
        report.append(tuned)
    return report


def problems(graph: Iterable[ir.Node], weights: Mapping[str, Tensor]) -> list[Problem]:
    """The products of a lowered graph, those of one shape and use together."""
    groups: dict[tuple[object, ...], list[ir.Node]] = defaultdict(list)
    for node in graph:
        if node.op_type in _PROBLEMS:
            inputs = [name is not None for name in input_names(node, 6)[2:]]
            use = (node.op_type, *attributes_of(node).values(), *inputs, dtype_of(node))
            groups[use].append(node)
    return [_PROBLEMS[members[0].op_type](members, weights) for members in groups.values()]


def _linears(members: list[ir.Node], weights: Mapping[str, Tensor]) -> LinearProblem:
    node = members[0]
    _, _, _, residual, norm = input_names(node, 5)
    x = node.inputs[0]
    assert x is not None
    return LinearProblem(
        weights=cold([weight_of(member, weights) for member in members]),
        gated=bool(attributes_of(node)["gated"]),
        norm=norm is not None,
        residual=residual is not None,
        dtype=dtype_of(x.producer() or node),
        out_dtype=dtype_of(node),
    )


def _routers(members: list[ir.Node], weights: Mapping[str, Tensor]) -> LinearProblem:
    """The products of routers for so many tokens that the norm and the choice are apart."""
    node = members[0]
    width = attributes_of(node)["in_features"]
    return LinearProblem(
        weights=cold([weight_of(member, weights) for member in members]),
        gated=False,
        norm=False,
        residual=False,
        dtype=dtype_of(node),
        out_dtype=torch.float32,
        buckets=tuple(size for size in BUCKETS if not in_one_launch(size, width)),
    )


def _experts(members: list[ir.Node], weights: Mapping[str, Tensor]) -> ExpertProblem:
    node = members[0]
    layers = [experts_of(member, weights) for member in members]
    return ExpertProblem(
        weights=cold([experts.weight for experts in layers]),
        experts=layers[0],
        top_k=attributes_of(node)["top_k"],
        residual=input_names(node, 6)[5] is not None,
        dtype=dtype_of(node),
    )


_PROBLEMS: dict[str, Callable[[list[ir.Node], Mapping[str, Tensor]], Problem]] = {
    "Linear": _linears,
    "NormedRouter": _routers,
    "ExpertLinear": _experts,
}
