"""The loop under random arrivals, aborts and failures."""

from __future__ import annotations

from dataclasses import replace

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from tests.runtime.engine.driving import check, compiled, expected_output
from tests.runtime.speculation.hostile import NAME, hostile

from slipstream.errors import CapacityError
from slipstream.runtime.engine.loop import EngineLoop
from slipstream.runtime.executors.counting import CountingExecutor
from slipstream.runtime.loaded_engine import LoadedEngine
from slipstream.runtime.request import Request, RequestOutput
from slipstream.runtime.sampling.params import SamplingParams
from slipstream.runtime.structured.output import StructuredOutput
from slipstream.runtime.testing import EOS, counting_engine

pytestmark = pytest.mark.usefixtures("one_page_is_awaited")

# Most leave no choice for a while; some may never end by themselves, one is over at once.
FORMS = [
    StructuredOutput(regex="[a-f]{2,7}"),
    StructuredOutput(choice=["bold fox", "box", "even"]),
    StructuredOutput(grammar='start: (/[a-z]/ "hop")+'),
    StructuredOutput(regex="(ab)*"),
    StructuredOutput(regex="[b-d]"),
]
REQUESTS = st.builds(
    Request,
    request_id=st.just(""),
    prompt_token_ids=st.lists(st.sampled_from([0, 1, EOS - 5]), min_size=1, max_size=14),
    params=st.builds(
        SamplingParams,
        n=st.integers(1, 3),
        temperature=st.sampled_from([0.0, 1.0]),
        seed=st.integers(0, 3),
        max_tokens=st.integers(1, 9),
        ignore_eos=st.booleans(),
        logprobs=st.sampled_from([None, None, None, 0]),
        prompt_logprobs=st.sampled_from([None, None, None, 0]),
        bad_words_token_ids=st.sampled_from([(), (), (), [[3]], [[1, 2]]]),
        structured=st.sampled_from([None] * len(FORMS) + FORMS),
    ),
    priority=st.integers(0, 1),
    output_kind=st.sampled_from(["cumulative", "delta", "final"]),
)


class EngineLoopMachine(RuleBasedStateMachine):
    """Random arrivals, held to a form or not, aborts and device failures in a cache of a few
    pages."""

    @initialize(
        num_pages=st.integers(3, 10),
        policy=st.sampled_from(["max_utilization", "guaranteed_no_evict"]),
        budget=st.integers(3, 12),
        runs_ahead=st.booleans(),
        draft_tokens=st.sampled_from([0, 1, 3]),
        jumps=st.booleans(),
        guesses=st.booleans(),
        host_pages=st.sampled_from([None, 0, 1, 4]),
    )
    def open(
        self,
        num_pages: int,
        policy: str,
        budget: int,
        runs_ahead: bool,
        draft_tokens: int,
        jumps: bool,
        guesses: bool,
        host_pages: int | None,
    ) -> None:
        caching = host_pages is not None
        self.engine: LoadedEngine = counting_engine(
            num_pages,
            runs_ahead=runs_ahead,
            draft_tokens=0 if guesses else draft_tokens,
            page_size=3,
            max_seq_len=24,
            max_batch_size=3,
            max_num_tokens=budget,
            scheduler_policy=policy,
            enable_prefix_caching=caching,
            kv_offload_gib=(host_pages or 0) / (1 << 30),
            enable_jump_decoding=jumps,
            speculative=NAME if guesses else "off",
            num_speculative_tokens=3,
        )
        with hostile():
            self.loop = EngineLoop(self.engine)
        self.requests: dict[str, Request] = {}
        self.aborted: set[str] = set()
        self.failures = 0
        self.outputs: dict[str, list[RequestOutput]] = {}

    @rule(request=REQUESTS)
    def add(self, request: Request) -> None:
        request = compiled(replace(request, request_id=str(len(self.outputs))))
        try:
            self.loop.add_request(request)
        except CapacityError:
            needed = len(request.prompt_token_ids) + (request.params.max_tokens or 0) - 1
            assert needed > self.loop.scheduler.kv.num_pages * 3
        else:
            self.requests[request.request_id] = request
            self.outputs[request.request_id] = []

    @rule()
    def step(self) -> None:
        for output in self.loop.step():
            seen = self.outputs[output.request_id]
            assert not (seen and seen[-1].finished), "an output after the last"
            seen.append(output)

    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        if self.requests:
            request_id = data.draw(st.sampled_from(sorted(self.requests)))
            self.loop.abort(request_id)
            self.aborted.add(request_id)

    @rule()
    def fail(self) -> None:
        assert isinstance(self.engine.executor, CountingExecutor)
        self.engine.executor.fail_next = True
        self.failures += 1

    @rule(token=st.sampled_from([None, 3, EOS - 2]))
    def break_token(self, token: int | None) -> None:
        assert isinstance(self.engine.executor, CountingExecutor)
        self.engine.executor.broken_token = token
        self.failures += 1

    @invariant()
    def pages_add_up(self) -> None:
        check(self.loop)
        scheduler = self.loop.scheduler
        assert len(scheduler.running) <= 3
        assert (scheduler.stats.num_running, scheduler.stats.num_waiting) == (
            len(scheduler.running),
            len(scheduler.waiting),
        )

    def teardown(self) -> None:
        if not hasattr(self, "loop"):
            return
        for _ in range(3000):
            if not self.loop.has_work:
                break
            self.step()
        assert not self.loop.has_work
        assert self.loop.scheduler.kv.num_available == self.loop.scheduler.kv.num_pages
        for request_id, request in self.requests.items():
            self.judge(request, self.outputs[request_id])

    def judge(self, request: Request, outputs: list[RequestOutput]) -> None:
        assert [each.finished for each in outputs].count(True) == 1
        last = outputs[-1]
        told = outputs if request.output_kind == "delta" else [last]
        for index, completion in enumerate(last.outputs):
            tokens = [token for each in told for token in each.outputs[index].token_ids]
            expected, reason = expected_output(request, index)
            if completion.finish_reason == "error":
                assert self.failures and last.error is not None
                assert "told to fail" in str(last.error) or "broke" in str(last.error)
            if completion.finish_reason in ("error", "abort"):
                assert tokens == expected[: len(tokens)]
                assert completion.finish_reason == "error" or request.request_id in self.aborted
            else:
                assert tokens == expected
                assert completion.finish_reason == reason
        if last.prompt_logprobs is not None:
            scored = [each.token_id for each in last.prompt_logprobs if each is not None]
            assert scored == request.prompt_token_ids[1:]


TestEngineLoopMachine = EngineLoopMachine.TestCase
TestEngineLoopMachine.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
