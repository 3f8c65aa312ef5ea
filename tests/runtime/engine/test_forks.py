"""Siblings share their prompt's pages, with the prefix cache or without; namespaces never do."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from slipstream.runtime.engine.loop import EngineLoop
from slipstream.runtime.engine.sequence import child_seed
from slipstream.runtime.engine.step import StepBatch
from slipstream.runtime.executors.counting import CountingExecutor, CountingStep
from slipstream.runtime.request import Request, RequestOutput
from slipstream.runtime.sampling.params import SamplingParams
from slipstream.runtime.testing import counting_engine


def loop_of(**options: Any) -> tuple[EngineLoop, list[StepBatch]]:  # noqa: ANN401
    """A loop, and the steps that its device was given."""
    engine = counting_engine(**options)
    executor, batches = engine.executor, list[StepBatch]()
    assert isinstance(executor, CountingExecutor)
    submit = executor.submit

    def record(batch: StepBatch) -> CountingStep:
        batches.append(replace(batch, positions=batch.positions.copy()))
        return submit(batch)

    executor.submit = record  # type: ignore[method-assign]
    return EngineLoop(engine), batches


def drain(loop: EngineLoop) -> dict[str, RequestOutput]:
    outputs: dict[str, RequestOutput] = {}
    while loop.has_work:
        outputs.update((output.request_id, output) for output in loop.step())
    assert loop.scheduler.kv.num_available == loop.scheduler.kv.num_pages
    return outputs


def tokens_of(output: RequestOutput) -> list[list[int]]:
    return [each.token_ids for each in output.outputs]


def seeds_of(params: SamplingParams) -> list[int]:
    return [child_seed(params.seed or 0, index) for index in range(params.n)]


def counted(prompt: list[int], strides: list[int], count: int) -> list[list[int]]:
    vocab = counting_engine().vocab_size
    return [[(prompt[-1] + (1 + s) * (i + 1)) % vocab for i in range(count)] for s in strides]


@pytest.mark.parametrize("caching", [False, True])
@pytest.mark.parametrize("draft_tokens", [0, 3])
@pytest.mark.parametrize("runs_ahead", [False, True])
def test_siblings_compute_one_token_of_the_prompt(
    caching: bool, draft_tokens: int, runs_ahead: bool
) -> None:
    loop, batches = loop_of(
        enable_prefix_caching=caching, draft_tokens=draft_tokens, runs_ahead=runs_ahead
    )
    prompt = [5, 6, 7, 8, 9, 10, 11]
    params = SamplingParams(n=3, seed=10, max_tokens=5, ignore_eos=True)
    loop.add_request(Request("n", prompt, params))
    output = drain(loop)["n"]

    assert tokens_of(output) == counted(prompt, seeds_of(params), 5)
    moves = [move for batch in batches for move in batch.moves]
    assert len(moves) == 2 and len({move.destination for move in moves}) == 2
    assert len({move.source for move in moves}) == 1, "the leader's last page of the prompt"
    prefilled = [
        int(count)
        for batch in batches
        for position, count in zip(
            batch.positions[batch.query_start[:-1]], batch.query_start[1:], strict=False
        )
        if position < len(prompt) - 1
    ]
    assert prefilled == [7], "only the leader computed more than the last token"


def test_a_prompt_that_ends_with_its_page_is_shared_up_to_that() -> None:
    loop, batches = loop_of(enable_prefix_caching=False)
    loop.add_request(Request("n", [5] * 8, SamplingParams(n=2, seed=0, max_tokens=2)))
    drain(loop)
    assert not any(batch.moves for batch in batches)
    assert sorted(len(batch.token_ids) for batch in batches)[-2:] == [5, 8]


def test_without_a_prefix_cache_nobody_else_profits() -> None:
    loop, batches = loop_of(enable_prefix_caching=False)
    for name in ("a", "b"):
        loop.add_request(Request(name, [5] * 9, SamplingParams(n=2, seed=0, max_tokens=2)))
        drain(loop)
    assert sum(len(batch.token_ids) == 9 for batch in batches) == 2
    assert loop.stats.prefix_cache_hits == 2 * 8, "those of siblings"


@pytest.mark.parametrize("caching", [False, True])
def test_siblings_whose_leader_ends_before_they_start(caching: bool) -> None:
    loop, batches = loop_of(enable_prefix_caching=caching, max_batch_size=1)
    prompt = [5, 6, 7, 8, 9, 10, 11]
    params = SamplingParams(n=3, seed=10, max_tokens=3, ignore_eos=True)
    loop.add_request(Request("n", prompt, params))
    assert tokens_of(drain(loop)["n"]) == counted(prompt, seeds_of(params), 3)
    assert not any(batch.moves for batch in batches), "there was nothing left to copy from"


def test_siblings_of_a_scored_prompt_are_forked_too() -> None:
    loop, batches = loop_of(enable_prefix_caching=False)
    params = SamplingParams(n=2, seed=1, max_tokens=2, prompt_logprobs=0, ignore_eos=True)
    loop.add_request(Request("n", [5] * 7, params))
    output = drain(loop)["n"]
    assert [each.token_id for each in output.prompt_logprobs or () if each] == [5] * 6
    assert tokens_of(output) == counted([5], seeds_of(params), 2)
    assert sum(len(batch.moves) for batch in batches) == 1


def test_neighbouring_seeds_share_no_continuation() -> None:
    loop, batches = loop_of()
    for seed in (*range(20), 2**64 - 1):
        params = SamplingParams(n=8, seed=seed, max_tokens=1)
        loop.add_request(Request(str(seed), [5] * 7, params))
    drain(loop)
    used = [row.seed for batch in batches for row in batch.sampling]
    assert len(used) == len(set(used)) == 21 * 8
    assert {*range(20), 2**64 - 1} < set(used), "the first of n is what n = 1 is"


REQUESTS = st.lists(
    st.builds(
        Request,
        request_id=st.just(""),
        prompt_token_ids=st.lists(st.integers(0, 1), min_size=1, max_size=14),
        params=st.builds(
            SamplingParams,
            n=st.integers(1, 4),
            seed=st.integers(0, 3),
            max_tokens=st.integers(1, 6),
            ignore_eos=st.just(True),
            prompt_logprobs=st.sampled_from([None, None, 0]),
        ),
        priority=st.integers(0, 1),
        cache_namespace=st.sampled_from(["", "a", "b"]),
    ),
    min_size=1,
    max_size=8,
)


@given(
    requests=REQUESTS,
    num_pages=st.integers(7, 20),
    caching=st.booleans(),
    runs_ahead=st.booleans(),
    draft_tokens=st.sampled_from([0, 1, 3]),
)
@settings(max_examples=200, deadline=None)
def test_namespaces_never_share_a_page_and_siblings_stay_themselves(
    requests: list[Request], num_pages: int, caching: bool, runs_ahead: bool, draft_tokens: int
) -> None:
    loop, _ = loop_of(
        num_pages=num_pages,
        page_size=3,
        max_seq_len=24,
        max_batch_size=4,
        max_num_tokens=8,
        enable_prefix_caching=caching,
        runs_ahead=runs_ahead,
        draft_tokens=draft_tokens,
    )
    requests = [replace(each, request_id=str(i)) for i, each in enumerate(requests)]
    for request in requests:
        loop.add_request(request)
    outputs: dict[str, RequestOutput] = {}
    while loop.has_work:
        outputs.update((output.request_id, output) for output in loop.step())
        held: dict[int, set[tuple[str, int]]] = {}
        for each in loop.scheduler.running:
            assert each.allocation is not None
            whose = (each.request.cache_namespace, 0 if caching else each.order[1])
            for page in each.allocation.pages:
                held.setdefault(page, set()).add(whose)
        assert all(len(owners) == 1 for owners in held.values()), "a page of two namespaces"
    for request in requests:
        count = request.params.max_tokens or 0
        expected = counted(request.prompt_token_ids, seeds_of(request.params), count)
        assert tokens_of(outputs[request.request_id]) == expected
