"""What of an engine is tuned, and that its candidates run; how long they take is for a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx_ir as ir
import pytest
import torch
from torch import Tensor

from slipstream.builder.contract import TARGET_GRAPH
from slipstream.builder.engine import TACTICS
from slipstream.plugins.cuda import tuning
from slipstream.plugins.expert_linear.cuda import tuning as expert_tuning
from slipstream.plugins.expert_linear.cuda.tactics import candidate_tactics as every
from slipstream.plugins.expert_linear.cuda.tuning import ExpertProblem
from slipstream.plugins.linear.cuda.packing import format_attributes, packed_size
from slipstream.plugins.linear.cuda.tactics import BUCKETS, Tactic, Tactics
from slipstream.plugins.linear.cuda.tuning import LinearProblem
from slipstream.plugins.normed_router.cuda import FUSED_TOKENS
from slipstream.plugins.operators import DOMAIN
from slipstream.runtime.executors.cuda import tuning as engine_tuning
from slipstream.runtime.executors.cuda.tuning import problems
from slipstream.weights.tensor import WeightFormat

pytestmark = pytest.mark.kernel

EXPERTS, TOP_K, HIDDEN, WIDTH = 6, 2, 64, 32


def product(op_type: str, index: int, n: int, k: int, inputs: int, **attributes: float) -> ir.Node:
    """A lowered node with a bfloat16 weight; of its inputs, the last is there."""
    values = [ir.Value(name=f"{op_type}_{n}x{k}_{index}_{i}") for i in range(inputs)]
    fmt = WeightFormat((n, k), "dense", "bfloat16")
    node = ir.node(
        op_type,
        [*values[:2], *[None] * (inputs - 3), *values[2:][-1:]],
        {**format_attributes(fmt), "in_features": k, "out_features": n, **attributes},
        domain=DOMAIN,
        num_outputs=1,
    )
    node.outputs[0].type = ir.TensorType(ir.DataType.BFLOAT16)
    return node


@pytest.fixture
def found(device: str) -> list[tuning.Problem]:
    """The problems of two layers."""
    nodes, experts = [], {"experts": EXPERTS, "top_k": TOP_K}
    for layer in range(2):
        nodes += [
            product("Linear", layer, 48, HIDDEN, 4),
            product("NormedRouter", layer, EXPERTS, HIDDEN, 3, top_k=TOP_K, norm_eps=1e-5),
            product("ExpertLinear", layer, 2 * WIDTH, HIDDEN, 2, gated=1, **experts),
            product("ExpertLinear", layer, HIDDEN, WIDTH, 6, reduce=1, **experts),
        ]
    weights: dict[str, Tensor] = {}
    for node in nodes:
        count = EXPERTS if node.op_type == "ExpertLinear" else 1
        n, k = (node.attributes[name].as_int() for name in ("out_features", "in_features"))
        fmt = WeightFormat((count * n, k), "dense", "bfloat16")
        assert node.inputs[1] is not None
        blob = torch.zeros(packed_size(fmt), dtype=torch.uint8, device=device)
        weights[str(node.inputs[1].name)] = blob
    return problems(nodes, weights)


def test_layers_of_one_shape_are_one_problem(found: list[tuning.Problem]) -> None:
    linear, _, gated, summed = found
    assert isinstance(linear, LinearProblem) and linear.residual and not linear.norm
    assert isinstance(gated, ExpertProblem) and not gated.residual and gated.experts.gated
    assert isinstance(summed, ExpertProblem) and summed.residual and summed.experts.reduce
    assert [problem.key(16) for problem in found] == [
        "bfloat16 48x64 16", "bfloat16 6x64 16",
        "bfloat16 64x64 gated 2/6 16", "bfloat16 64x32 2/6 16",
    ]  # fmt: skip
    assert max(linear.buckets) == 2048 and max(gated.buckets) == 8192


def test_routers_are_timed_where_their_product_is_a_launch_of_its_own(
    found: list[tuning.Problem],
) -> None:
    router = found[1]
    assert isinstance(router, LinearProblem) and len(router.weights) > 2
    assert router.buckets == tuple(size for size in BUCKETS if size > FUSED_TOKENS)
    assert router.out_dtype == torch.float32 and not (router.norm or router.residual)
    tokens = router.buckets[0]
    for call in router.calls(tokens, router.candidates(tokens, (9, 0))[-1:]):
        assert call(1).shape == (tokens, EXPERTS) and call(1).dtype == torch.float32


def test_a_floor_counts_the_experts_that_are_chosen(found: list[tuning.Problem]) -> None:
    *_, gated, _ = found
    assert isinstance(gated, ExpertProblem)
    one, many = gated.distinct(1), gated.distinct(64)
    assert (one, many) == (TOP_K, EXPERTS) and TOP_K < gated.distinct(2) < 2 * TOP_K
    assert gated.nbytes(1) == TOP_K * 2 * WIDTH * HIDDEN * 2
    assert [ids.tolist() for ids in gated.routes(3)] == [ids.tolist() for ids in gated.routes(3)]


def test_the_quickest_candidate_of_each_is_kept(
    found: list[tuning.Problem], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each candidate runs; buckets that a problem does not have are not its own."""
    timed: list[Callable[[int], Tensor]] = []

    def seconds(call: Callable[[int], Tensor], weights: int, best: float) -> float:
        timed.append(call)
        return 1.0 / len(timed)  # the last is the quickest

    monkeypatch.setattr(tuning, "_seconds", seconds)
    monkeypatch.setattr(tuning, "record", lambda works: [])
    monkeypatch.setattr(expert_tuning, "candidate_tactics", lambda *use: every(*use)[:2])
    experts = found[2:]
    table = Tactics((9, 0))
    tunings = tuning.tune(experts, [1], table)
    report = [next(tunings)]
    assert list(table.entries) == [experts[0].key(1)]  # whoever stops here keeps it
    report += tunings
    assert list(table.entries) == [problem.key(1) for problem in experts]
    for tuned in report:
        candidates = tuned.problem.candidates(1, table.capability)
        assert [timing.tactic for timing in tuned.timings] == candidates[::-1]
        assert table.entries[tuned.problem.key(1)] == candidates[1]
    assert not list(tuning.tune(found[:1], [2048], table))


def test_an_engine_keeps_what_was_timed_before_the_rest_was_cut(
    found: list[tuning.Problem], monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut(problems: list[tuning.Problem], buckets: list[int], table: Tactics) -> Iterator[str]:
        assert buckets == [1, 2, 4, 8, 16]  # what a step of 12 tokens takes is the last
        table.entries[problems[0].key(1)] = Tactic("blas")
        yield "the first"
        raise KeyboardInterrupt

    written: dict[str, str] = {}
    limits, graphs = SimpleNamespace(max_num_tokens=12), {TARGET_GRAPH: SimpleNamespace(file="")}
    engine = SimpleNamespace(
        manifest=SimpleNamespace(limits=limits, graphs=graphs),
        path=Path(),
        write_file=written.__setitem__,
    )
    fakes: dict[str, Any] = {
        "require": lambda manifest: None,
        "load_weights": lambda *_: {},
        "problems": lambda *_: found,
        "tune": cut,
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(engine_tuning, name, fake)
    monkeypatch.setattr(ir, "load", lambda _: SimpleNamespace(graph=[]))
    with pytest.raises(KeyboardInterrupt):
        engine_tuning.tune_engine(engine)  # type: ignore[arg-type]
    assert list(Tactics.from_json(written[TACTICS]).entries) == [found[0].key(1)]


@pytest.mark.parametrize(("best", "replays", "found"), [(1.0, 1, 9.0), (7.0, 5, 5.0)])
def test_a_candidate_that_begins_slow_is_not_timed_again(
    best: float, replays: int, found: float
) -> None:
    times = iter([9.0, 2.0, 5.0, 8.0, 3.0])
    assert tuning.typical(lambda: next(times), best) == found
    assert len(list(times)) == 5 - replays
