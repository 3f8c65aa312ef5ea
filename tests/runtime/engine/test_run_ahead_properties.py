"""The loop with a device that runs ahead, that guesses or that has more caches, against the same
loop without."""

from __future__ import annotations

from dataclasses import dataclass

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings
from tests.runtime.engine.driving import check
from tests.runtime.engine.recording import Recorder, recorded
from tests.runtime.speculation.hostile import NAME

from slipstream.builder.contract import CacheArray, CacheSpec
from slipstream.errors import CapacityError
from slipstream.runtime.engine.loop import EngineLoop
from slipstream.runtime.request import CompletionOutput, Request, RequestOutput
from slipstream.runtime.sampling.params import SamplingParams
from slipstream.runtime.structured.compiler import GrammarCompiler
from slipstream.runtime.testing import EOS

pytestmark = pytest.mark.usefixtures("one_page_is_awaited")


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


def run(
    loop: EngineLoop, workload: list[Arrival], grammars: GrammarCompiler | None = None
) -> dict[str, RequestOutput]:
    """The last output of every request; those with a form need its ``grammars``."""
    outputs: dict[str, RequestOutput] = {}
    aborts: dict[int, str] = {}
    steps = 0

    def step() -> None:
        nonlocal steps
        if request_id := aborts.pop(steps, None):
            loop.abort(request_id)
        outputs.update((output.request_id, output) for output in loop.step())
        check(loop)
        steps += 1

    for index, arrival in enumerate(workload):
        form = arrival.params.structured
        grammar = grammars.compile(form) if grammars and form else None
        request = Request(
            str(index), arrival.prompt, arrival.params, priority=arrival.priority, grammar=grammar
        )
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
    guesses=st.booleans(),
)
@settings(max_examples=100, deadline=None)
def test_more_caches_change_no_answer(
    workload: list[Arrival],
    more: tuple[CacheSpec, ...],
    policy: str,
    caching: bool,
    runs_ahead: bool,
    draft_tokens: int,
    guesses: bool,
) -> None:
    results = []
    host = guesses and STATES not in more  # which cannot be taken back
    if host:
        runs_ahead, draft_tokens = False, 0
    for caches in ((), more):
        loop, _ = recorded(
            12,
            more=caches,
            runs_ahead=runs_ahead,
            draft_tokens=0 if STATES in more else draft_tokens,
            page_size=3,
            max_seq_len=24,
            max_batch_size=3,
            max_num_tokens=8,
            scheduler_policy=policy,
            enable_prefix_caching=caching,
            speculative=NAME if host and caches else "off",
            num_speculative_tokens=4,
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
@settings(max_examples=100, deadline=None)
def test_running_ahead_and_guessing_change_no_answer(
    workload: list[Arrival],
    num_pages: int,
    budget: int,
    policy: str,
    caching: bool,
    draft_tokens: int,
) -> None:
    results = []
    kinds = ((False, 0, "off"), (False, draft_tokens, "off"), (True, draft_tokens, "off"))
    for runs_ahead, drafts, speculative in (*kinds, (False, 0, NAME)):
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
            speculative=speculative,
            num_speculative_tokens=4,
        )
        results.append(run(loop, workload))
        if not drafts and speculative == "off":
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
