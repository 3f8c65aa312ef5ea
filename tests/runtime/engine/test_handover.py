"""Prompts that one loop computes and another goes on with, on the counting model, which reads every
context back from its pages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings
from tests.runtime.engine.driving import drain, expected_output, greedy, tokens_of
from tests.runtime.engine.recording import Recorder, recorded

from slipstream.builder.contract import CacheArray, CacheSpec
from slipstream.errors import CapacityError, InvalidRequestError
from slipstream.runtime.engine.handover import Handover
from slipstream.runtime.engine.host_pages import Transfer
from slipstream.runtime.engine.loop import EngineLoop
from slipstream.runtime.handover.staging import Staging
from slipstream.runtime.request import Request

PAGE = 4
SLOTS = 12
ONE = 1 / (1 << 30)  # GiB: the counting model's pages have a byte


@dataclass
class Settled:
    """A handover, and what was heard of it."""

    count: int
    stores: bool
    first: int = 0
    heard: list[bool] = field(default_factory=list)

    def __post_init__(self) -> None:
        slots = range(self.first, self.first + -(-self.count // PAGE))
        self.handover = Handover(slots, self.count, self.stores, self.heard.append)


def loop_of(*more: CacheSpec, pages: int = 16, **options: Any) -> tuple[EngineLoop, Recorder]:  # noqa: ANN401
    limits = {"max_batch_size": 3, "max_num_tokens": 16, "max_seq_len": 48}
    return recorded(
        pages,
        more=more,
        **{"kv_transfer_gib": SLOTS * ONE, "runs_ahead": False, **limits, **options},
    )


def window(size: int) -> CacheSpec:
    return CacheSpec("near", "paged", (0,), (CacheArray("near", "int32", (PAGE,)),), PAGE, size)


def staging(loop: EngineLoop) -> Staging:
    assert loop.staging is not None
    return loop.staging


def hand(source: EngineLoop, target: EngineLoop, slots: Sequence[int]) -> None:
    """What a transport does."""
    rows = zip(staging(source).rows(slots), staging(target).rows(slots), strict=True)
    for theirs, ours in rows:
        ours[:] = theirs


def prompt_of(length: int, first: int = 0) -> list[int]:
    return [first + i % 3 for i in range(length)]


def prefill(loop: EngineLoop, prompt: list[int], **request: Any) -> Settled:  # noqa: ANN401
    going = Settled(len(prompt) - 1, stores=True)
    params = greedy(max_tokens=1)
    loop.add_request(Request("p", prompt, params, handover=going.handover, **request))
    assert len(tokens_of(drain(loop)["p"])) == 1
    return going


def decode(loop: EngineLoop, prompt: list[int], count: int = 6) -> tuple[list[int], Settled]:
    coming = Settled(len(prompt) - 1, stores=False)
    request = Request("d", prompt, greedy(max_tokens=count), handover=coming.handover)
    loop.add_request(request)
    told = tokens_of(drain(loop)["d"])
    assert told == expected_output(replace(request, handover=None), 0)[0]
    return told, coming


@pytest.mark.parametrize("runs_ahead", [False, True])
@pytest.mark.parametrize("caches", [(), (window(3),), (window(6),)])
@pytest.mark.parametrize("length", [2, PAGE, PAGE + 1, 2 * PAGE + 3, 33])
def test_nothing_of_a_prompt_is_computed_but_the_last_token(
    length: int, caches: tuple[CacheSpec, ...], runs_ahead: bool
) -> None:
    (first, device), (second, _) = (loop_of(*caches, runs_ahead=runs_ahead) for _ in range(2))
    prompt = prompt_of(length)
    going = prefill(first, prompt)
    assert going.heard == [True] and device.stored.num_bytes
    hand(first, second, going.handover.slots)
    _, coming = decode(second, prompt)
    assert coming.heard == [True]
    stats = second.stats
    assert stats.handed == length - 1
    assert stats.step_tokens.sum == 1 + 5, "the last token of the prompt, and the answer's"
    # What came is shared like what was computed; of windows there came only what is read again.
    second.add_request(Request("again", prompt, greedy()))
    drain(second)
    assert caches or second.stats.prefix_cache_hits == (length - 1) // PAGE * PAGE


def test_what_the_tree_has_is_not_brought_again() -> None:
    (first, _), (second, device) = loop_of(), loop_of()
    prompt = prompt_of(3 * PAGE + 2)
    prefill(second, prompt[: 2 * PAGE + 1])
    loaded = device.loaded.num_bytes
    hand(first, second, prefill(first, prompt).handover.slots)
    decode(second, prompt)
    assert device.loaded.num_bytes - loaded == 2  # the third page, and the last
    assert second.stats.handed == PAGE + 1
    _, coming = decode(second, prompt[: 3 * PAGE + 1])
    assert coming.heard == [False], "there is nothing that it could bring"


def test_a_request_that_ends_before_it_runs_gives_its_slots_back() -> None:
    loop, device = loop_of()
    for stores in (True, False):
        each = Settled(8, stores)
        loop.add_request(Request("x", prompt_of(9), greedy(), handover=each.handover))
        loop.abort("x")
        drain(loop)
        assert each.heard == [False]
    assert not device.stored.num_bytes + device.loaded.num_bytes


@pytest.mark.parametrize("runs_ahead", [False, True])
def test_slots_are_in_use_until_the_step_has_landed(runs_ahead: bool) -> None:
    loop, _ = loop_of(runs_ahead=runs_ahead)
    coming, prompt = Settled(8, stores=False), prompt_of(9)
    other, _ = loop_of()
    hand(other, loop, prefill(other, prompt).handover.slots)
    loop.add_request(Request("x", prompt, greedy(), handover=coming.handover))
    loop.step()
    loop.abort("x")  # its step is on its way
    assert coming.heard == []
    drain(loop)
    assert coming.heard == [True]


def test_a_step_that_fails_brings_nothing() -> None:
    loop, device = loop_of()
    coming = Settled(8, stores=False)
    other, _ = loop_of()
    hand(other, loop, prefill(other, prompt_of(9)).handover.slots)
    device.fail_next = True
    loop.add_request(Request("x", prompt_of(9), greedy(), handover=coming.handover))
    assert drain(loop)["x"].error is not None
    assert coming.heard == [False]
    going = Settled(8, stores=True)
    device.fail_next = True
    loop.add_request(Request("y", prompt_of(9), greedy(), handover=going.handover))
    assert drain(loop)["y"].error is not None
    assert going.heard == [False]


def test_a_copy_that_fails_between_steps_ends_no_request(monkeypatch: pytest.MonkeyPatch) -> None:
    loop, device = loop_of()

    def broken(transfers: list[Transfer]) -> None:
        if transfers:
            raise RuntimeError("no copies")

    monkeypatch.setattr(device, "transfer", broken)
    assert prefill(loop, prompt_of(9)).heard == [False]


def test_a_broken_row_is_handed_to_nobody() -> None:
    loop, device = loop_of()
    device.broken_token = 3
    going = Settled(8, stores=True)
    loop.add_request(Request("x", prompt_of(9), greedy(), handover=going.handover))
    drain(loop)
    assert going.heard == [False]


def test_a_prompt_that_is_scored_is_computed() -> None:
    loop, device = loop_of()
    coming = Settled(8, stores=False)
    request = Request("x", prompt_of(9), greedy(prompt_logprobs=0), handover=coming.handover)
    loop.add_request(request)
    assert tokens_of(drain(loop)["x"]) == expected_output(replace(request, handover=None), 0)[0]
    assert coming.heard == [False] and not device.loaded.num_bytes


def test_slots_of_handovers_are_none_of_the_offload() -> None:
    loop, _ = loop_of(pages=4, kv_offload_gib=6 * ONE)
    assert staging(loop).slots == range(6, 6 + SLOTS)
    assert loop.scheduler.kv.offload is not None
    assert loop.scheduler.kv.offload.host.num_slots == 6


def test_options_that_cannot_be_are_refused() -> None:
    with pytest.raises(InvalidRequestError, match="in no file"):
        loop_of(kv_offload_gib=ONE, kv_offload_path="x")
    with pytest.raises(InvalidRequestError, match="kv_transfer_gib is -1"):
        loop_of(kv_transfer_gib=-1.0)
    with pytest.raises(CapacityError, match="less than a page"):
        loop_of(kv_offload_gib=6 * ONE, kv_transfer_gib=ONE / 2 + ONE / 4)


@dataclass(frozen=True)
class Arrival:
    length: int
    kind: int
    max_tokens: int
    steps: int
    aborted: bool


ARRIVALS = st.lists(
    st.builds(
        Arrival,
        st.integers(2, 30),
        st.integers(0, 2),
        st.integers(1, 9),
        st.integers(0, 4),
        st.booleans(),
    ),
    min_size=1,
    max_size=6,
)


@settings(max_examples=60, deadline=None)
@given(ARRIVALS, st.booleans(), st.sampled_from([(), (window(3),)]), st.integers(0, 5))
def test_every_handover_is_settled_once_and_every_answer_right(
    arrivals: list[Arrival], runs_ahead: bool, caches: tuple[CacheSpec, ...], offload: int
) -> None:
    other, _ = loop_of(*caches)
    loop, _ = loop_of(
        *caches,
        pages=12,
        runs_ahead=runs_ahead,
        kv_offload_gib=offload * ONE,
        kv_transfer_gib=8 * len(arrivals) * ONE,
    )
    pool = staging(loop).slots
    requests, settled, outputs = {}, {}, {}
    for number, each in enumerate(arrivals):
        name, prompt = str(number), prompt_of(each.length, 10 * (number % 3))
        slots = pool[8 * number : 8 * number + 8]
        if each.kind < 2:
            made = Settled(each.length - 1, stores=each.kind == 0, first=slots[0])
            settled[name] = made
            if each.kind == 1:
                going = prefill(other, prompt)
                rows = zip(
                    staging(other).rows(going.handover.slots),
                    staging(loop).rows(made.handover.slots),
                    strict=True,
                )
                for theirs, ours in rows:
                    ours[:] = theirs
        request = Request(name, prompt, greedy(max_tokens=each.max_tokens, ignore_eos=True))
        requests[name] = request
        handover = settled[name].handover if name in settled else None
        loop.add_request(replace(request, handover=handover))
        for _ in range(each.steps):
            outputs.update({output.request_id: output for output in loop.step()})
        if each.aborted:
            loop.abort(name)
    outputs.update(drain(loop))
    for name, request in requests.items():
        told = tokens_of(outputs[name])
        assert told == expected_output(request, 0)[0][: len(told)]
        assert outputs[name].outputs[0].finish_reason in ("length", "abort")
    assert all(len(each.heard) == 1 for each in settled.values())
