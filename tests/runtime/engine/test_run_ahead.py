"""The loop with a device that runs ahead, against the same loop without."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from slipstream.builder.contract import CacheArray, CacheSpec, GraphSpec, ports_of
from slipstream.errors import CapacityError
from slipstream.runtime.engine.loop import EngineLoop
from slipstream.runtime.engine.step import StepBatch
from slipstream.runtime.executors.counting import CountingExecutor, CountingStep, counting_contract
from slipstream.runtime.request import CompletionOutput, Request, RequestOutput
from slipstream.runtime.sampling.params import SamplingParams
from slipstream.runtime.testing import EOS, VOCAB_SIZE, counting_engine


def greedy(**params: Any) -> SamplingParams:  # noqa: ANN401
    return SamplingParams(**{"temperature": 0, "max_tokens": 4, **params})


class Recorder(CountingExecutor):
    """Notes when steps are started and landed, and at which positions each sequence samples."""

    def __init__(
        self,
        num_pages: int,
        graphs: Mapping[str, GraphSpec],
        caches: tuple[CacheSpec, ...],
        *,
        runs_ahead: bool,
        draft_tokens: int,
    ) -> None:
        super().__init__(
            num_pages, graphs, caches, runs_ahead=runs_ahead, draft_tokens=draft_tokens
        )
        self.events: list[str] = []
        self.order: list[str] = []  # the events, and when rows are sampled
        self.refuse_next = self.refuse_head = False
        # The live output of a sequence, and the positions of its rows.
        self.sampled: dict[int, tuple[Sequence[int], list[int]]] = {}

    def submit(self, batch: StepBatch) -> CountingStep:
        if self.refuse_next:
            self.refuse_next = False
            raise RuntimeError("refused")
        self._note("start")
        for row in batch.sampling:
            if row.target is None:
                self.sampled.setdefault(id(row.output), (row.output, []))[1].append(row.position)
        return super().submit(batch)

    def check_head(self, step: CountingStep) -> None:
        if self.refuse_head:
            self.refuse_head = False
            raise RuntimeError("refused")
        self.order.append("sample")
        super().check_head(step)

    def land(self, step: CountingStep) -> None:
        self._note("land")
        super().land(step)

    def _note(self, event: str) -> None:
        self.events.append(event)
        self.order.append(event)


def recorded(
    num_pages: int = 64,
    *,
    runs_ahead: bool = True,
    draft_tokens: int = 0,
    more: tuple[CacheSpec, ...] = (),
    **options: Any,  # noqa: ANN401 - fields of RuntimeConfig
) -> tuple[EngineLoop, Recorder]:
    """A loop whose model has ``more`` caches beside the usual one, and its device."""
    engine = counting_engine(num_pages, **options)
    graphs, caches = counting_contract(engine.config.page_size, VOCAB_SIZE)
    caches += more
    graphs = {name: replace(spec, inputs=tuple(ports_of(caches))) for name, spec in graphs.items()}
    executor = Recorder(num_pages, graphs, caches, runs_ahead=runs_ahead, draft_tokens=draft_tokens)
    return EngineLoop(replace(engine, executor=executor, caches=caches)), executor


def drain(loop: EngineLoop) -> dict[str, RequestOutput]:
    outputs: dict[str, RequestOutput] = {}
    while loop.has_work:
        outputs.update((output.request_id, output) for output in loop.step())
    assert loop.scheduler.kv.num_available == loop.scheduler.kv.num_pages
    return outputs


def test_the_next_step_starts_before_the_last_has_landed() -> None:
    loop, executor = recorded()
    loop.add_request(Request("a", [0], greedy()))
    drain(loop)
    assert executor.events == ["start", *["start", "land"] * 3, "land"]


def test_every_step_tells_what_it_waited_for() -> None:
    loop, _ = recorded()
    loop.add_request(Request("a", [0], greedy(max_tokens=9)))
    loop.add_request(Request("b", [7], greedy(max_tokens=3)))
    assert loop.step() == []
    told = [{o.request_id: len(o.outputs[0].token_ids) for o in loop.step()} for _ in range(9)]
    assert told == [{"a": i, "b": i} if i <= 3 else {"a": i} for i in range(1, 10)]
    assert not loop.has_work


def test_the_place_of_a_sequence_that_ends_is_taken_in_the_step_after() -> None:
    loop, executor = recorded(max_batch_size=1)
    for name in ("a", "b"):
        loop.add_request(Request(name, [0], greedy(max_tokens=2)))
    outputs = drain(loop)
    assert {name: o.outputs[0].token_ids for name, o in outputs.items()} == {
        "a": [1, 2],
        "b": [1, 2],
    }
    # The device waits where only the end of one sequence lets the next begin.
    turn = ["start", "start", "land", "land"]
    assert executor.events == turn * 2


def test_what_was_computed_after_the_end_is_ignored() -> None:
    loop, executor = recorded(page_size=2)
    loop.add_request(Request("a", [EOS - 3], greedy(max_tokens=9, logprobs=0)))
    output = drain(loop)["a"].outputs[0]
    assert output.token_ids == [EOS - 2, EOS - 1, EOS]
    assert len(output.logprobs or ()) == 3
    assert executor.steps == 4
    cached = loop.scheduler.kv.match([EOS - 3, EOS - 2, EOS - 1, EOS, 0, 0, 0])
    assert cached.depth == 1, "the end was computed, but only after it had ended"


@pytest.mark.parametrize(
    "params",
    [{"bad_words_token_ids": [[5, 6]]}, {"prompt_logprobs": 0}, {"logit_bias": {3: 1.0}}],
    ids=str,
)
def test_no_request_holds_up_the_device(params: dict[str, Any]) -> None:
    loop, executor = recorded()
    for index in range(3):
        loop.add_request(Request(f"free {index}", [index], greedy(max_tokens=8)))
    loop.step()
    loop.add_request(Request("special", [9, 9, 9], greedy(max_tokens=5, **params)))
    outputs = drain(loop)
    assert executor.events == ["start", *["start", "land"] * 7, "land"]
    assert outputs["special"].outputs[0].token_ids == [10, 11, 12, 13, 14]


def test_rows_are_sampled_when_the_host_knows_what_their_edits_need() -> None:
    loop, executor = recorded()
    loop.add_request(Request("free", [0], greedy(max_tokens=6)))
    loop.step()
    loop.add_request(Request("bad words", [0], greedy(max_tokens=2, bad_words_token_ids=[[5, 6]])))
    drain(loop)
    ahead = ["start", "sample", "land"]
    behind = ["start", "land", "sample"]
    assert executor.order == ["start", "sample", *behind * 3, *ahead * 2, "land"]


@pytest.mark.parametrize(
    "params", [{"prompt_logprobs": 0}, {"bad_words_token_ids": [[5, 6]]}], ids=str
)
def test_a_request_that_was_aborted_leaves_the_device_ahead(params: dict[str, Any]) -> None:
    loop, executor = recorded()
    loop.add_request(Request("other", [0], greedy()))
    loop.add_request(Request("gone", [1, 2, 3], greedy(**params)))
    loop.step()
    loop.abort("gone")
    loop.step()
    assert executor.events == ["start", "start", "land"]
    assert drain(loop)["other"].outputs[0].token_ids == [1, 2, 3, 4]


def test_a_head_that_is_refused_ends_its_step_alone() -> None:
    loop, executor = recorded()
    loop.add_request(Request("stopped", [EOS - 1], greedy(bad_words_token_ids=[[5, 6]])))
    loop.add_request(Request("struck", [0], greedy()))
    loop.step()
    executor.refuse_head = True
    outputs = drain(loop)
    assert outputs["stopped"].error is None
    assert "refused" in str(outputs["struck"].error)


def test_a_failure_spares_what_is_only_in_the_step_ahead() -> None:
    loop, executor = recorded(page_size=2)
    loop.add_request(Request("struck", [0], greedy(n=2)))
    executor.fail_next = True
    loop.step()
    loop.add_request(Request("spared", [5], greedy()))
    assert [output.request_id for output in loop.step()] == ["struck"]
    assert executor.steps == 2, "the step with both was on its way"
    outputs = drain(loop)
    assert outputs["spared"].error is None
    assert outputs["spared"].outputs[0].token_ids == [6, 7, 8, 9]


def test_the_step_before_a_failed_one_still_counts() -> None:
    loop, executor = recorded()
    loop.add_request(Request("short", [0], greedy(max_tokens=1)))
    loop.add_request(Request("stopped", [EOS - 1], greedy()))
    loop.add_request(Request("struck", [0], greedy()))
    loop.step()
    executor.fail_next = True
    outputs = drain(loop)
    assert [outputs[name].error is None for name in ("short", "stopped", "struck")] == [
        True,
        True,
        False,
    ]
    assert outputs["stopped"].outputs[0].token_ids == [EOS]
    assert outputs["struck"].outputs[0].token_ids == [1]


def test_the_step_before_a_refused_one_still_counts() -> None:
    loop, executor = recorded()
    loop.add_request(Request("stopped", [EOS - 1], greedy()))
    loop.add_request(Request("struck", [0], greedy()))
    loop.step()
    executor.refuse_next = True
    outputs = drain(loop)
    assert outputs["stopped"].error is None
    assert "refused" in str(outputs["struck"].error)
    assert executor.events == ["start", "land"]


def test_shutdown_waits_for_the_step_on_its_way() -> None:
    loop, executor = recorded()
    loop.add_request(Request("a", [0], greedy()))
    loop.step()
    loop.step()
    loop.shutdown()
    assert executor.events.count("start") == executor.events.count("land") == 2
    assert executor.closed


@dataclass(frozen=True)
class Arrival:
    after_steps: int
    prompt: list[int]
    params: SamplingParams
    priority: int
    abort_after: int | None


PARAMS = st.builds(
    SamplingParams,
    n=st.integers(1, 3),
    temperature=st.sampled_from([0.0, 1.0]),
    seed=st.integers(0, 3),
    max_tokens=st.integers(4, 10),
    min_tokens=st.integers(0, 4),
    ignore_eos=st.booleans(),
    stop=st.sampled_from([(), (), ["de"], ["g"]]),
    stop_token_ids=st.lists(st.integers(0, 12), max_size=2),
    logprobs=st.none() | st.just(0),
    prompt_logprobs=st.sampled_from([None, None, None, 0]),
    bad_words_token_ids=st.sampled_from([(), (), (), [[3]], [[1, 2]]]),
)
WORKLOADS = st.lists(
    st.builds(
        Arrival,
        after_steps=st.integers(0, 4),
        prompt=st.lists(st.sampled_from([0, 1, EOS - 5]), min_size=1, max_size=12),
        params=PARAMS,
        priority=st.integers(0, 1),
        abort_after=st.sampled_from([None, None, None, 0, 3, 7]),
    ),
    min_size=1,
    max_size=6,
)


def run(loop: EngineLoop, workload: list[Arrival]) -> dict[str, RequestOutput]:
    """The last output of every request."""
    outputs: dict[str, RequestOutput] = {}
    aborts: dict[int, str] = {}
    steps = 0

    def step() -> None:
        nonlocal steps
        if request_id := aborts.pop(steps, None):
            loop.abort(request_id)
        outputs.update((output.request_id, output) for output in loop.step())
        running = loop.scheduler.running
        loop.scheduler.kv.check_invariants([s.allocation for s in running if s.allocation])
        steps += 1

    for index, arrival in enumerate(workload):
        request = Request(str(index), arrival.prompt, arrival.params, priority=arrival.priority)
        try:
            loop.add_request(request)
        except CapacityError:
            continue
        if arrival.abort_after is not None:
            aborts[steps + arrival.abort_after] = request.request_id
        for _ in range(arrival.after_steps):
            step()
    while loop.has_work:
        step()
        assert steps < 1000
    assert loop.scheduler.kv.num_available == loop.scheduler.kv.num_pages
    return outputs


def check_waste(executor: Recorder, outputs: dict[str, RequestOutput]) -> None:
    """Positions go up one by one, and at most one is sampled in vain, none if the end was known."""
    wasted = []
    for output, positions in executor.sampled.values():
        assert positions == list(range(len(positions)))
        wasted.append(len(positions) - len(output))
    assert set(wasted) <= {0, 1}
    reasons = [each.finish_reason for o in outputs.values() for each in o.outputs]
    assert sum(wasted) <= len(reasons) - reasons.count("length")


def same(ours: CompletionOutput, theirs: CompletionOutput) -> bool:
    """Whether two completions are equal, or, if one was aborted, begin in the same way."""
    if "abort" not in (ours.finish_reason, theirs.finish_reason):
        return ours == theirs
    size = min(len(ours.token_ids), len(theirs.token_ids))
    return ours.token_ids[:size] == theirs.token_ids[:size]


def windowed(name: str, window: int) -> CacheSpec:
    return CacheSpec(name, "paged", (1,), (CacheArray(name, "int32", (3,)),), 3, window)


STATES = CacheSpec("states", "state", (2,), (CacheArray("states", "int32", (1,)),))
MORE_CACHES = [(windowed("near", 4),), (windowed("near", 2), windowed("far", 11)), (STATES,)]


@given(
    workload=WORKLOADS,
    more=st.sampled_from(MORE_CACHES),
    policy=st.sampled_from(["max_utilization", "guaranteed_no_evict"]),
    caching=st.booleans(),
    runs_ahead=st.booleans(),
    draft_tokens=st.sampled_from([0, 1, 3]),
)
@settings(max_examples=200, deadline=None)
def test_more_caches_change_no_answer(
    workload: list[Arrival],
    more: tuple[CacheSpec, ...],
    policy: str,
    caching: bool,
    runs_ahead: bool,
    draft_tokens: int,
) -> None:
    results = []
    for caches in ((), more):
        loop, _ = recorded(
            12,
            more=caches,
            runs_ahead=runs_ahead,
            draft_tokens=0 if STATES in more else draft_tokens,  # states cannot be taken back
            page_size=3,
            max_seq_len=24,
            max_batch_size=3,
            max_num_tokens=8,
            scheduler_policy=policy,
            enable_prefix_caching=caching,
        )
        results.append(run(loop, workload))
    plain, other = results
    assert plain.keys() == other.keys()
    for request_id, output in other.items():
        assert output.error is None and output.finished
        assert all(map(same, output.outputs, plain[request_id].outputs))


@given(
    workload=WORKLOADS,
    num_pages=st.integers(3, 12),
    budget=st.integers(3, 12),
    policy=st.sampled_from(["max_utilization", "guaranteed_no_evict"]),
    caching=st.booleans(),
    draft_tokens=st.sampled_from([0, 1, 3]),
)
@settings(max_examples=200, deadline=None)
def test_running_ahead_and_guessing_change_no_answer(
    workload: list[Arrival],
    num_pages: int,
    budget: int,
    policy: str,
    caching: bool,
    draft_tokens: int,
) -> None:
    results = []
    for runs_ahead, drafts in ((False, 0), (False, draft_tokens), (True, draft_tokens)):
        loop, executor = recorded(
            num_pages,
            runs_ahead=runs_ahead,
            draft_tokens=drafts,
            page_size=3,
            max_seq_len=24,
            max_batch_size=3,
            max_num_tokens=budget,
            scheduler_policy=policy,
            enable_prefix_caching=caching,
        )
        results.append(run(loop, workload))
        if not drafts:
            check_waste(executor, results[-1])
    plain, *others = results
    for other in others:
        assert plain.keys() == other.keys()
        for request_id, output in other.items():
            assert output.error is None and output.finished
            theirs = plain[request_id]
            assert all(map(same, output.outputs, theirs.outputs))
            if output.prompt_logprobs and theirs.prompt_logprobs:
                assert output.prompt_logprobs == theirs.prompt_logprobs
