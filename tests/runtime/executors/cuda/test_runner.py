"""Which steps are captured, and when."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from slipstream.plugins.sampling import Kind
from slipstream.runtime.executors.cuda.buckets import Buckets
from slipstream.runtime.executors.cuda.device import Device
from slipstream.runtime.executors.cuda.inputs import Shape
from slipstream.runtime.executors.cuda.runner import StepRunner
from slipstream.runtime.executors.cuda.spared import Spared

BUCKETS = Buckets(1024, 8192, 64)


class Runner(StepRunner):
    """Its work is what it is made for, captured by being noted."""

    def __init__(self, captured: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
        self._device, self._buckets = Device(), BUCKETS
        self._layers, self._heads, self._guesses, self._drafter = {}, {}, {}, None
        self._spared = Spared()
        self._later = deque()
        self.inputs: Any = SimpleNamespace(load=lambda *_: None, logits_rows=id)
        self.inputs.clear = self.inputs.pad = lambda *_: None
        self._inputs, self.rows, self._hidden = self.inputs, np.zeros(1024), np.zeros(2048)  # type: ignore[assignment]
        self._program: Any = SimpleNamespace(pools=False)

        def capture(work: Callable[[], Any]) -> Callable[[], Any]:
            captured.append(work())
            return work

        monkeypatch.setattr(self._device, "capture", capture)

    def _layers_work(self, shape: Shape) -> Any:  # noqa: ANN401
        return lambda: shape

    def _head_work(self, padded: int, kind: Kind) -> Any:  # noqa: ANN401
        return lambda: (padded, kind)


@pytest.fixture
def captured() -> list[Any]:
    return []


@pytest.fixture
def runner(captured: list[Any], monkeypatch: pytest.MonkeyPatch) -> Runner:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    return Runner(captured, monkeypatch)


def test_the_largest_steps_come_first_then_those_of_the_first_answers(
    runner: Runner, captured: list[Any]
) -> None:
    runner.capture()
    sizes = [1, 2, 4, 8, 16]
    layers = [
        BUCKETS.mixed(2048),
        BUCKETS.decode(1024),
        *map(BUCKETS.decode, sizes),
        *map(BUCKETS.mixed, (16, 32, 64, 128, 256)),
    ]
    heads = [(size, kind) for size in (1024, *sizes) for kind in (Kind.GREEDY, Kind.SAMPLE)]
    assert captured == [*layers, *heads]


def test_the_first_answers_wait_for_the_largest_steps_and_a_decode_alone(
    runner: Runner, captured: list[Any]
) -> None:
    everything: list[Any] = [*runner._shapes]
    everything += itertools.product(BUCKETS.row_sizes, (Kind.GREEDY, Kind.SAMPLE))
    runner.capture(at_once=False)
    first = list(captured)
    alone = [BUCKETS.decode(1), *((1, kind) for kind in (Kind.GREEDY, Kind.SAMPLE))]
    largest = [(1024, kind) for kind in (Kind.GREEDY, Kind.SAMPLE)]
    assert first == [BUCKETS.mixed(2048), BUCKETS.decode(1024), alone[0], *largest, *alone[1:]]

    padded: list[Any] = []
    runner.inputs.pad = padded.append
    runner._sampler = SimpleNamespace(clear=lambda: padded.append(None))  # type: ignore[assignment]
    while runner.capture_next():
        pass
    assert sorted(map(str, captured)) == sorted(map(str, everything))
    assert captured.index(BUCKETS.mixed(256)) < captured.index(BUCKETS.decode(64))
    later = [key if isinstance(key, Shape) else None for key in captured[len(first) :]]
    assert padded == later, "nothing is written"
    assert not runner.capture_next()


def decodes(count: int) -> Any:  # noqa: ANN401
    return SimpleNamespace(
        token_ids=np.zeros(count), query_start=np.arange(count + 1), context_len=np.ones(count)
    )


def test_other_steps_are_captured_once_when_they_pay(runner: Runner, captured: list[Any]) -> None:
    """Until then the next larger serves: one step of 100 among 1,024 costs less than a capture."""
    runner.capture()
    captured.clear()
    loaded: list[Any] = []
    runner.inputs.load = lambda _batch, shape, *_: loaded.append(shape)
    for count in (100, 3, 100, 3, 100):
        runner.layers(decodes(count), np.arange(count, dtype=np.int32))
    largest, own = BUCKETS.decode(1024), BUCKETS.decode(112)
    few = BUCKETS.decode(4)
    assert captured == [own]
    assert loaded == [largest, few, own, few, own]


def test_a_batch_that_shrinks_is_not_held_up_at_every_size(
    runner: Runner, captured: list[Any]
) -> None:
    runner.capture()
    for _ in range(3):
        runner.layers(decodes(256), np.arange(256, dtype=np.int32))
        runner.head(256, Kind.GREEDY)
    captured.clear()
    for count in range(256, 16, -16):
        runner.layers(decodes(count), np.arange(count, dtype=np.int32))
        runner.head(runner.padded_rows(count), Kind.GREEDY)
    assert captured == []
    for _ in range(12):
        runner.layers(decodes(128), np.arange(128, dtype=np.int32))
        runner.head(128, Kind.GREEDY)
    assert captured == [BUCKETS.decode(128)]


def test_heads_cost_less_than_layers_and_are_captured_later(
    runner: Runner, captured: list[Any]
) -> None:
    runner.capture()
    captured.clear()
    for count in range(16, 256, 16):  # rows of steps of prompts, of which more and more go on
        runner.head(runner.padded_rows(count), Kind.SAMPLE)
    assert captured == []
    for _ in range(20):
        runner.head(128, Kind.SAMPLE)
    assert captured == [(128, Kind.SAMPLE)]


def test_prompts_are_served_by_larger_steps_of_prompts(runner: Runner, captured: list[Any]) -> None:
    runner.capture()
    captured.clear()
    loaded: list[Any] = []
    runner.inputs.load = lambda _batch, shape, *_: loaded.append(shape)
    batch = SimpleNamespace(
        token_ids=np.zeros(1300), query_start=np.array([0, 1300]), context_len=np.array([1300])
    )
    for _ in range(3):
        runner.layers(batch, np.arange(1, dtype=np.int32))  # type: ignore[arg-type]
    largest, own = BUCKETS.mixed(2048), BUCKETS.mixed(1536)
    assert captured == [own] and loaded == [largest, largest, own]


def beside_prompt(decodes: int, prompt: int) -> Any:  # noqa: ANN401
    """So many decodes, of contexts from 11 on, and a prompt."""
    return SimpleNamespace(
        token_ids=np.zeros(decodes + prompt),
        query_start=np.array([*range(decodes + 1), decodes + prompt]),
        context_len=np.array([*range(11, 11 + decodes), prompt]),
    )


@pytest.mark.parametrize(
    ("decodes", "prompt", "served"),
    [(0, 700, 0), (3, 700, 64), (64, 300, 64), (65, 700, 256), (300, 400, 256), (20, 44, 0)],
)
def test_decodes_beside_prompts_have_their_kernel(
    runner: Runner, captured: list[Any], decodes: int, prompt: int, served: int
) -> None:
    """As many as the captured step launches it for; the rest are blocks of prompts."""
    loaded: list[Any] = []
    runner.inputs.load = lambda _batch, shape, blocks, _rows: loaded.append((shape, blocks))
    runner.layers(beside_prompt(decodes, prompt), np.arange(1, dtype=np.int32))
    ((shape, blocks),) = loaded
    assert captured == [shape] and shape.decodes == served
    first = min(decodes, served)
    assert blocks.first == first and set(blocks.sequence) == set(range(first, decodes + 1))
    assert len(blocks.sequence) <= shape.blocks
    steps: list[Any] = []
    runner.inputs.step = lambda _shape, decodes, **_: steps.append(decodes)
    runner._device.has_pdl = False
    runner._memory = SimpleNamespace()  # type: ignore[assignment]
    StepRunner._layers_work(runner, shape)
    assert steps == [served]


def test_a_step_of_prompts_serves_for_decodes_until_their_own_pays(
    runner: Runner, captured: list[Any]
) -> None:
    runner.capture()
    captured.clear()
    loaded: list[Any] = []
    runner.inputs.load = lambda _batch, shape, *_: loaded.append(shape)
    for _ in range(6):
        runner.layers(beside_prompt(250, 1700), np.arange(1, dtype=np.int32))
    other, own = BUCKETS.mixed(2048), BUCKETS.mixed(2048, 256)
    assert other != own and captured == [own]
    assert loaded == [other] * 4 + [own] * 2, "256 rows of decodes in vain, four times"


def test_decodes_are_blocks_of_one_query_where_bits_are_not_to_depend_on_chunks(
    runner: Runner, captured: list[Any]
) -> None:
    runner._buckets = replace(BUCKETS, deterministic=True)
    loaded: list[Any] = []
    runner.inputs.load = lambda _batch, shape, blocks, _rows: loaded.append((shape, blocks))
    starts = np.arange(4)
    batch: Any = SimpleNamespace(
        token_ids=np.zeros(3), query_start=starts, context_len=np.array([5, 90, 7])
    )
    runner.layers(batch, np.arange(3, dtype=np.int32))
    ((shape, blocks),) = loaded
    assert shape == Shape(4, 4, blocks=4) and captured == [shape]
    assert blocks.sequence.tolist() == [1, 2, 0] and not blocks.start.any()
    steps: list[Any] = []
    runner.inputs.step = lambda _shape, decodes, **options: steps.append((decodes, options))
    runner._device.has_pdl = False
    runner._memory = SimpleNamespace()  # type: ignore[assignment]
    StepRunner._layers_work(runner, shape)
    assert steps == [(0, {"pdl": False, "query_block": 1})]


def test_all_that_can_be_captured_is_compiled(runner: Runner) -> None:
    found: list[Any] = [work() for work in runner.works()[:-1]]
    shapes = [*map(BUCKETS.decode, BUCKETS.batch_sizes), *BUCKETS.all_mixed]
    assert found == [*shapes, *((n, kind) for n in BUCKETS.batch_sizes for kind in Kind)]


def test_decodes_with_drafts_are_steps_of_their_own(runner: Runner, captured: list[Any]) -> None:
    """By the sequences, the tokens and the longest run; a prompt beside them makes it a mixed
    step."""
    runner._buckets = buckets = replace(BUCKETS, drafts=192)
    starts = np.array([0, 4, 5, 8])
    batch: Any = SimpleNamespace(token_ids=np.zeros(8), query_start=starts, context_len=np.ones(3))
    runner.layers(batch, np.arange(8, dtype=np.int32))
    runner.layers(batch, np.arange(7, dtype=np.int32))
    assert captured == [Shape(8, 4, queries=4), buckets.mixed(16)]
    steps: list[Any] = []
    runner.inputs.step = lambda shape, decodes, **_: steps.append((shape, decodes))
    runner._device.has_pdl = False
    runner._memory = SimpleNamespace()  # type: ignore[assignment]
    StepRunner._layers_work(runner, captured[0])
    assert steps == [(Shape(8, 4, queries=4), 4)]


def test_steps_with_drafts_of_the_first_answers_are_captured_at_the_start_and_timed(
    runner: Runner, captured: list[Any]
) -> None:
    runner._buckets = buckets = replace(BUCKETS, drafts=192)
    runner.capture()
    for sequences in (1, 2, 4, 8, 16):
        for times in (2, 4, 8):
            shape = buckets.verification(sequences * times, sequences, times)
            assert shape in captured and (shape.tokens, Kind.GREEDY) in captured
    assert buckets.verifications[-1] in captured, "the one that takes the most memory"
    runner._device.seconds = lambda work, times: float(bool(work) * times)  # type: ignore[method-assign]
    assert sorted(runner.step_seconds()) == [1, 2, 4, 8, 16, 32, 64, 128, buckets.max_rows]


def test_costs_are_those_of_every_step_of_decodes(
    runner: Runner, captured: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the guesses of a head; each is captured once."""
    runner._buckets = buckets = replace(BUCKETS, drafts=192)
    monkeypatch.setattr(runner, "_step_of", lambda shape: shape)
    monkeypatch.setattr(runner, "_guess_work", lambda shape, _step, count: lambda: (shape, count))
    runner.capture((3,))
    runner.capture_decodes((1, 3))
    assert len(set(captured)) == len(captured)
    decodes = [*map(buckets.decode, buckets.batch_sizes), *buckets.verifications]
    assert {(shape, count) for shape in decodes for count in (0, 1, 3)} <= set(captured)
    runner._device.seconds = lambda work, times: float(bool(work) * times)  # type: ignore[method-assign]
    assert set(runner.step_seconds()) == {shape.tokens for shape in decodes}
    guesses = runner.guess_seconds((1, 3))
    assert set(guesses) == {(size, count) for size in buckets.batch_sizes for count in (0, 1, 3)}
