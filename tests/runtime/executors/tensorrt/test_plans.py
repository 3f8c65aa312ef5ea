"""How plans are called, with a stand-in for TensorRT's API."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import onnx_ir as ir
import pytest
import torch

from slipstream.errors import ExecutionError
from slipstream.runtime.executors.tensorrt.plans import PlanRunner

SHAPES = {"x": (-1, 4), "w": (4, 8), "y": (-1, 8)}
MOST = (4, 64)


class Context:
    """Notes what it is told."""

    def __init__(self) -> None:
        self.profile = -1
        self.shapes: list[tuple[str, tuple[int, ...]]] = []
        self.addresses: dict[str, int] = {}
        self.memory = (0, 0)
        self.runs: list[int] = []
        self.works = True

    def set_optimization_profile_async(self, profile: int, stream: int) -> None:
        self.profile = profile

    def set_device_memory(self, address: int, size: int) -> None:
        self.memory = (address, size)

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> None:
        self.shapes.append((name, shape))

    def set_tensor_address(self, name: str, address: int) -> None:
        self.addresses[name] = address

    def execute_async_v3(self, stream: int) -> bool:
        self.runs.append(stream)
        return self.works


class Engine:
    """A plan for up to 4 and up to 64 rows."""

    num_optimization_profiles = len(MOST)
    device_memory_size_v2 = 512

    def __init__(self) -> None:
        self.contexts: list[Context] = []

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return SHAPES[name]

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[tuple[int, ...]]:
        return [(n, *SHAPES[name][1:]) for n in (1, MOST[profile], MOST[profile])]

    def create_execution_context(self, strategy: str) -> Context:
        assert strategy == "by hand"
        self.contexts.append(Context())
        return self.contexts[-1]


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> tuple[PlanRunner, Engine]:
    stream = SimpleNamespace(cuda_stream=7, synchronize=lambda: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    trt: Any = SimpleNamespace(
        ExecutionContextAllocationStrategy=SimpleNamespace(USER_MANAGED="by hand")
    )
    values = [ir.Value(name=name) for name in ("x", "w", "scale.constant")]
    graph = ir.Graph(values, [ir.Value(name="y")], nodes=[], name="layer")
    function = ir.Function("slipstream.segments", "layer", graph=graph, attributes=[])
    engine = Engine()
    return PlanRunner(trt, engine, function, torch.empty(1024, dtype=torch.uint8)), engine


def call(runner: PlanRunner, rows: int) -> dict[str, int]:
    x, w, y = torch.empty(rows, 4), torch.empty(4, 8), torch.empty(rows, 8)
    runner([x, w], [y])
    return {"x": x.data_ptr(), "w": w.data_ptr(), "y": y.data_ptr()}


def test_a_step_takes_the_smallest_range_that_holds_it(made: tuple[PlanRunner, Engine]) -> None:
    runner, engine = made
    decodes, steps = engine.contexts
    assert (decodes.profile, steps.profile) == (0, 1)
    assert decodes.memory == steps.memory  # they never run at the same time
    assert decodes.memory[0] % 256 == 0
    addresses = call(runner, 4)
    assert (decodes.addresses, decodes.runs, steps.runs) == (addresses, [7], [])
    call(runner, 5)
    assert (decodes.runs, steps.runs) == ([7], [7])


def test_sizes_are_told_when_they_change(made: tuple[PlanRunner, Engine]) -> None:
    runner, engine = made
    for rows in (3, 3, 2):
        call(runner, rows)
    assert engine.contexts[0].shapes == [("x", (3, 4)), ("x", (2, 4))]


def test_a_plan_that_does_not_run_fails_the_step(made: tuple[PlanRunner, Engine]) -> None:
    runner, engine = made
    engine.contexts[0].works = False
    with pytest.raises(ExecutionError, match="did not run its plan for 2 rows"):
        call(runner, 2)
