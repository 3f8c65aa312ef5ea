from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from tests.server.devices import Clock

from slipstream.errors import InvalidRequestError
from slipstream.runtime.engine.stats import Traffic
from slipstream.runtime.executors import counting
from slipstream.runtime.executors.base import OffloadingExecutor, TimedExecutor
from slipstream.runtime.testing import counting_engine
from slipstream.server.bench import measure
from slipstream.server.bench.measure import Bench, Workload
from slipstream.server.bench.report import distribution


def test_every_request_gets_its_tokens_and_concurrency_is_kept() -> None:
    seen: list[int] = []
    with Bench(counting_engine(), Workload(input_len=5, output_len=4, seed=1)) as bench:
        measured = bench.measure(7, 2, seen.append)
    assert [len(trace.tokens) for trace in measured.traces] == [4] * 7
    assert seen[-1] == 7 and seen == sorted(seen)
    for index, trace in enumerate(measured.traces[2:], 2):
        # When a request was sent, all but one of those before it had ended.
        ended = sum(t.tokens[-1] <= trace.sent for t in measured.traces[:index])
        assert ended >= index - 1


def test_times_are_those_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(measure, "time", SimpleNamespace(perf_counter=clock))
    device_time = SimpleNamespace(sleep=clock.sleep, perf_counter=clock)
    monkeypatch.setattr(counting, "time", device_time)
    with Bench(counting_engine(delay=0.02), Workload(5, 4, 0)) as bench:
        measured = bench.measure(1, 1)
    (trace,) = measured.traces
    assert trace.first >= 0.02 and len(trace.gaps) == 3
    assert all(gap >= 0.015 for gap in trace.gaps)
    assert (measured.steps, len(measured.waits)) == (4, 3)
    # What the loop takes itself is far less than what the device takes.
    assert sum(measured.waits) < 0.02
    assert measured.seconds >= 0.08


def test_pages_of_the_host_are_measured_too() -> None:
    engine = counting_engine(kv_offload_gib=0.01)
    with Bench(engine, Workload(input_len=5, output_len=4, seed=1)) as bench:
        assert len(bench.measure(2, 1).traces) == 2


@pytest.mark.parametrize("offloads", [False, True])
@pytest.mark.parametrize("timed", [False, True])
def test_a_device_that_is_watched_can_do_what_it_could(timed: bool, offloads: bool) -> None:
    class Least:
        """An executor of which nothing is asked here but what it has."""

    class Offloads(Least):
        stored = loaded = Traffic(3, 0.5)

        def reserve_host(self, num_bytes: int, file: str | None) -> tuple[int, str | None]:
            return num_bytes, file

        def transfer(self, transfers: list[object]) -> None:
            transfers.append("done")

    class Times(Least):
        def step_seconds(self) -> dict[int, float]:
            return {1: 0.25}

    parts = (*([Offloads] if offloads else []), *([Times] if timed else []))
    device = measure.watched(type("Device", (*parts, Least), {})())
    assert isinstance(device, OffloadingExecutor) == offloads
    assert isinstance(device, TimedExecutor) == timed
    if isinstance(device, TimedExecutor):
        assert device.step_seconds() == {1: 0.25}
    if isinstance(device, OffloadingExecutor):
        done: Any = []
        device.transfer(done)
        room: Any = device.reserve_host(7, "f")
        assert (device.stored, room, done) == (Traffic(3, 0.5), (7, "f"), ["done"])


def test_a_device_that_runs_ahead_waits_for_nobody() -> None:
    with Bench(counting_engine(runs_ahead=True), Workload(5, 4, 0)) as bench:
        measured = bench.measure(3, 3)
    assert [len(trace.tokens) for trace in measured.traces] == [4] * 3
    assert measured.steps == 4 and measured.waits == [0.0] * 3


def test_a_workload_that_would_be_cut_short_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="max_seq_len of 256"):
        Bench(counting_engine(), Workload(200, 57, 0))


def test_a_distribution_is_in_milliseconds() -> None:
    assert distribution([0.001, 0.002, 0.003]) == pytest.approx(
        {"mean": 2, "p50": 2, "p90": 2.8, "p99": 2.98}
    )
