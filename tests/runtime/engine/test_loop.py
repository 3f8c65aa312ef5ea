from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from tests.runtime.engine.driving import drain, expected_output, greedy, tokens_of

from slipstream.errors import CapacityError, ExecutionError, InvalidRequestError
from slipstream.runtime.engine.loop import EngineLoop
from slipstream.runtime.engine.step import StepBatch
from slipstream.runtime.executors.counting import (
    CountingExecutor,
    CountingStep,
    counting_contract,
)
from slipstream.runtime.request import Request, RequestOutput
from slipstream.runtime.sampling.params import SamplingParams
from slipstream.runtime.testing import EOS, VOCAB_SIZE, counting_engine
from slipstream.runtime.text.detokenizer import Detokenizer


@pytest.fixture(params=[False, True], ids=["in_turn", "ahead"])
def runs_ahead(request: pytest.FixtureRequest) -> bool:
    """Whether the next step starts before the last has landed."""
    ahead: bool = request.param
    return ahead


@pytest.fixture(params=[0, 1, 3], ids=["one", "drafts1", "drafts3"])
def device(request: pytest.FixtureRequest, runs_ahead: bool) -> dict[str, Any]:
    """How the device works, as options of ``counting_engine``."""
    return {"runs_ahead": runs_ahead, "draft_tokens": request.param}


def test_outputs_of_a_step_come_back_while_the_next_is_on_its_way(runs_ahead: bool) -> None:
    loop = EngineLoop(counting_engine(runs_ahead=runs_ahead))
    loop.add_request(Request("a", [0, 1], greedy(max_tokens=3)))

    assert loop.step() == [], "the first step has only been started"
    assert [tokens_of(o) for o in loop.step()] == [[2]]
    assert [tokens_of(o) for o in loop.step()] == [[2, 3]]
    last = loop.step()[0]
    assert (tokens_of(last), last.finished, last.outputs[0].finish_reason) == (
        [2, 3, 4],
        True,
        "length",
    )
    assert not loop.has_work


def test_at_most_one_step_is_computed_for_a_request_that_has_ended(runs_ahead: bool) -> None:
    engine = counting_engine(runs_ahead=runs_ahead)
    assert isinstance(engine.executor, CountingExecutor)
    loop = EngineLoop(engine)
    loop.add_request(Request("eos", [EOS - 2], greedy()))
    loop.add_request(Request("string", [0], greedy(max_tokens=9, stop="cd")))
    outputs = drain(loop)

    assert engine.executor.steps == 3 + runs_ahead, "a device that runs ahead cannot know the end"
    assert outputs["eos"].outputs[0].stop_reason is None
    stopped = outputs["string"].outputs[0]
    assert (stopped.text, stopped.finish_reason, stopped.stop_reason) == ("b", "stop", "cd")


def test_a_stop_token_is_reported_and_kept_out_of_the_text(device: dict[str, Any]) -> None:
    loop = EngineLoop(counting_engine(**device))
    loop.add_request(Request("cut", [0], greedy(stop_token_ids=[3])))
    loop.add_request(
        Request("kept", [0], greedy(stop_token_ids=[3], include_stop_str_in_output=True))
    )
    loop.add_request(Request("late", [0], greedy(stop_token_ids=[1, 3], min_tokens=2)))
    outputs = {name: output.outputs[0] for name, output in drain(loop).items()}

    assert (outputs["cut"].text, outputs["cut"].token_ids) == ("bc", [1, 2, 3])
    assert (outputs["cut"].finish_reason, outputs["cut"].stop_reason) == ("stop", 3)
    assert outputs["kept"].text == "bcd"
    assert outputs["late"].token_ids == [1, 2, 3]


def test_deltas_join_to_the_cumulative_output(device: dict[str, Any]) -> None:
    params = greedy(max_tokens=8, logprobs=0, stop=["hix"])
    loop = EngineLoop(counting_engine(**device))
    loop.add_request(Request("whole", [0], params, output_kind="final"))
    loop.add_request(Request("parts", [0], params, output_kind="delta"))
    outputs: dict[str, list[RequestOutput]] = {"whole": [], "parts": []}
    while loop.has_work:
        for output in loop.step():
            outputs[output.request_id].append(output)

    (whole,) = outputs["whole"]
    parts = [output.outputs[0] for output in outputs["parts"]]
    assert len(parts) == 8 or device["draft_tokens"]
    assert "".join(part.text for part in parts) == whole.outputs[0].text == "bcdefghi"
    assert [t for part in parts for t in part.token_ids] == whole.outputs[0].token_ids
    assert [x for part in parts for x in part.logprobs or ()] == whole.outputs[0].logprobs
    assert parts[-1].cumulative_logprob == whole.outputs[0].cumulative_logprob


def test_text_that_is_told_at_the_end_is_made_on_the_way(
    device: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []
    append = Detokenizer.append

    def counted(detokenizer: Detokenizer, token_ids: Sequence[int]) -> str:
        made.append(len(token_ids))
        return append(detokenizer, token_ids)

    monkeypatch.setattr(Detokenizer, "append", counted)
    engine = counting_engine(**device)
    loop = EngineLoop(engine)
    loop.add_request(
        Request("whole", [0], greedy(max_tokens=100, ignore_eos=True), output_kind="final")
    )
    outputs = []
    while loop.has_work:
        outputs += loop.step()
    (whole,) = (output.outputs[0] for output in outputs)
    assert whole.text == engine.tokenizer.decode(whole.token_ids) and len(whole.token_ids) == 100
    assert sum(made) == 100 and max(made) < 50


@pytest.mark.parametrize("max_num_tokens", [4, 64])
def test_prompt_logprobs_cover_every_token_under_any_chunking_and_a_warm_cache(
    max_num_tokens: int, device: dict[str, Any]
) -> None:
    loop = EngineLoop(counting_engine(**device, max_batch_size=4, max_num_tokens=max_num_tokens))
    prompt = list(range(10, 24))
    for name in ("cold", "warm"):
        loop.add_request(Request(name, prompt, greedy(prompt_logprobs=0, n=2)))
        output = drain(loop)[name]
        scored = output.prompt_logprobs or []
        assert scored[0] is None
        assert [each.token_id for each in scored[1:] if each] == prompt[1:]
        assert [each.token_ids for each in output.outputs] == [[24, 25, 26, 27]] * 2


def test_prompt_logprobs_are_reported_once_though_the_prompt_was_computed_twice(
    device: dict[str, Any],
) -> None:
    loop = EngineLoop(counting_engine(**device, num_pages=6, max_batch_size=4, max_num_tokens=4))
    loop.add_request(Request("first", [1] * 4, greedy(max_tokens=12)))
    loop.add_request(Request("scored", list(range(16)), greedy(prompt_logprobs=0)))
    output = drain(loop)["scored"]

    # With three drafts a step the first request ends before the pages run out.
    assert loop.stats.num_preemptions > 0 or device["draft_tokens"] == 3
    scored = [each.token_id for each in output.prompt_logprobs or () if each]
    assert scored == list(range(1, 16))
    assert tokens_of(output) == [16, 17, 18, 19]


def test_n_completions_share_the_prompt_and_differ_by_seed(device: dict[str, Any]) -> None:
    loop = EngineLoop(counting_engine(**device))
    request = Request("n", [5] * 9, SamplingParams(n=3, seed=10, max_tokens=3))
    loop.add_request(request)
    output = drain(loop)["n"]

    assert [each.token_ids for each in output.outputs] == [
        expected_output(request, i)[0] for i in range(3)
    ]
    assert loop.stats.prefix_cache_hits == 2 * 8


def test_cached_tokens_and_times_are_reported(device: dict[str, Any]) -> None:
    clock = iter(range(100))
    loop = EngineLoop(counting_engine(**device), clock=lambda: float(next(clock)))
    loop.add_request(Request("first", [5] * 9, greedy()))
    drain(loop)
    loop.add_request(Request("again", [5] * 9, greedy()))
    output = drain(loop)["again"]

    times = output.metrics
    assert output.num_cached_tokens == 8
    assert times.first_scheduled_time and times.first_token_time and times.finished_time
    assert (
        times.arrival_time
        < times.first_scheduled_time
        < times.first_token_time
        < times.finished_time
    )


def test_a_failing_step_ends_its_own_requests_only(device: dict[str, Any]) -> None:
    engine = counting_engine(**device, max_batch_size=1)
    assert isinstance(engine.executor, CountingExecutor)
    loop = EngineLoop(engine)
    loop.add_request(Request("struck", [0] * 6, greedy(n=2)))
    loop.add_request(Request("spared", [0] * 6, greedy()))
    loop.step()
    engine.executor.fail_next = True
    outputs = drain(loop)

    struck = outputs["struck"]
    assert [each.finish_reason for each in struck.outputs] == ["error", "error"]
    assert isinstance(struck.error, ExecutionError) and "send them again" in str(struck.error)
    assert outputs["spared"].error is None
    assert tokens_of(outputs["spared"]) == [1, 2, 3, 4]


def test_a_device_that_refuses_a_step_ends_only_that_step(device: dict[str, Any]) -> None:
    class Refusing(CountingExecutor):
        def submit(self, batch: StepBatch) -> CountingStep:
            if self.fail_next:
                self.fail_next = False
                raise RuntimeError("no")
            return super().submit(batch)

    executor = Refusing(8, *counting_contract(4, VOCAB_SIZE), **device)
    loop = EngineLoop(replace(counting_engine(**device), executor=executor))
    executor.fail_next = True
    loop.add_request(Request("a", [0], greedy()))
    error = drain(loop)["a"].error
    assert isinstance(error, ExecutionError) and isinstance(error.__cause__, RuntimeError)
    loop.add_request(Request("b", [0], greedy()))
    assert tokens_of(drain(loop)["b"]) == [1, 2, 3, 4]


def test_a_row_that_fails_ends_its_own_request_only(device: dict[str, Any]) -> None:
    engine = counting_engine(**device)
    assert isinstance(engine.executor, CountingExecutor)
    loop = EngineLoop(engine)
    loop.add_request(Request("struck", [20] * 9, greedy(n=2, max_tokens=8)))
    loop.add_request(Request("spared", [0] * 9, greedy(max_tokens=8)))
    engine.executor.broken_token = 23
    outputs = drain(loop)

    struck = outputs["struck"]
    assert [each.finish_reason for each in struck.outputs] == ["error", "error"]
    assert isinstance(struck.error, ExecutionError) and "broke this token" in str(struck.error)
    assert tokens_of(struck) == [21, 22][: len(tokens_of(struck))]
    assert outputs["spared"].error is None
    assert tokens_of(outputs["spared"]) == list(range(1, 9))
    assert loop.scheduler.kv.match([20] * 10).depth == 0, "nobody reads what it computed"
    assert loop.scheduler.kv.match([0] * 10).depth == 2
    assert loop.unhealthy is None


def test_a_row_that_fails_leaves_what_others_read(device: dict[str, Any]) -> None:
    engine = counting_engine(**device)
    assert isinstance(engine.executor, CountingExecutor)
    loop = EngineLoop(engine)
    loop.add_request(Request("same", [20] * 9, greedy(max_tokens=2)))
    drain(loop)
    loop.add_request(Request("reader", [*[20] * 8, 0], greedy(max_tokens=9)))
    loop.add_request(Request("struck", [20] * 9, greedy(max_tokens=9)))
    loop.step()
    engine.executor.broken_token = 22
    outputs = drain(loop)
    assert outputs["struck"].error and not outputs["reader"].error
    assert tokens_of(outputs["reader"]) == list(range(1, 10))
    assert loop.scheduler.kv.match([20] * 10).depth == 2


@pytest.mark.parametrize("steps", range(6))
def test_abort_at_every_stage_returns_the_pages_at_once(steps: int, device: dict[str, Any]) -> None:
    loop = EngineLoop(counting_engine(**device, max_num_tokens=4, max_batch_size=4))
    loop.add_request(Request("a", [0] * 9, greedy(n=2, max_tokens=20)))
    for _ in range(steps):
        loop.step()
    loop.abort("a")
    loop.abort("unknown")
    assert loop.scheduler.kv.usage == 0
    output = drain(loop)["a"]
    assert output.finished
    assert {each.finish_reason for each in output.outputs} == {"abort"}


def test_an_aborted_id_can_be_used_again_at_once(device: dict[str, Any]) -> None:
    loop = EngineLoop(counting_engine(**device))
    loop.add_request(Request("a", [0], greedy()))
    loop.step()
    loop.abort("a")
    loop.add_request(Request("a", [7], greedy()))
    assert tokens_of(drain(loop)["a"]) == [8, 9, 10, 11]


@pytest.mark.parametrize(
    ("request_", "error", "complaint"),
    [
        (Request("a", [], greedy()), InvalidRequestError, "has 0 tokens"),
        (Request("a", [1] * 256, greedy()), InvalidRequestError, "Shorten the prompt"),
        (Request("a", [VOCAB_SIZE], greedy()), InvalidRequestError, "the vocabulary has 0 to"),
        (Request("a", [-1], greedy()), InvalidRequestError, "range from -1"),
        (Request("a", [1] * 13, greedy()), CapacityError, "raise kv_cache_bytes"),
        (Request("busy", [1], greedy()), InvalidRequestError, "'busy' is in use"),
    ],
)
def test_a_bad_request_never_gets_in(
    request_: Request, error: type[Exception], complaint: str
) -> None:
    loop = EngineLoop(counting_engine(num_pages=3))
    loop.add_request(Request("busy", [0], greedy()))
    with pytest.raises(error, match=complaint):
        loop.add_request(request_)
    assert list(drain(loop)) == ["busy"]


def test_an_engine_without_pages_is_refused() -> None:
    with pytest.raises(CapacityError, match="holds no KV page"):
        EngineLoop(counting_engine(num_pages=0, kv_cache_bytes=10))


def test_an_end_token_without_logits_ends_nothing_and_harms_nobody() -> None:
    engine = counting_engine()
    engine.tokenizer.eos_token_ids |= {VOCAB_SIZE, VOCAB_SIZE + 7}
    loop = EngineLoop(engine)
    loop.add_request(Request("short", [0], greedy(max_tokens=4, min_tokens=2)))
    loop.add_request(Request("neighbour", [5], greedy(max_tokens=8)))

    outputs = drain(loop)

    assert [len(tokens_of(outputs[name])) for name in ("short", "neighbour")] == [4, 8]
    assert all(
        sequence.eos_token_ids <= {EOS} for sequence in loop._sequences(Request("x", [0], greedy()))
    )


def test_what_another_computes_alone_is_not_awaited() -> None:
    """Whoever has only its beginning in common with a long prompt waits for that."""
    loop = EngineLoop(counting_engine(512, runs_ahead=True, max_num_tokens=256, max_seq_len=4096))
    alike = [7] * 520
    for name, prompt in (("long", [*alike, *[9] * 1400]), ("short", [*alike, 2])):
        params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
        loop.add_request(Request(name, prompt, params, output_kind="final"))
    ended: dict[str, RequestOutput] = {}
    while loop.has_work:
        ended |= {output.request_id: output for output in loop.step()}

    assert list(ended) == ["short", "long"]
    assert ended["short"].num_cached_tokens > 520 - 256


def test_what_another_computes_is_awaited_and_others_pass() -> None:
    """Of twins, one computes what both begin with; whoever comes after them does not wait."""
    engine = counting_engine(512, runs_ahead=True, max_num_tokens=256, max_seq_len=2048)
    loop, alike = EngineLoop(engine), [7] * 600
    prompts = {"first": [*alike, 1], "twin": [*alike, 2], "other": [9] * 300}
    for name, prompt in prompts.items():
        params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
        loop.add_request(Request(name, prompt, params, output_kind="final"))
    ended: dict[str, RequestOutput] = {}
    while loop.has_work:
        ended |= {output.request_id: output for output in loop.step()}

    assert list(ended) == ["first", "other", "twin"]
    assert ended["twin"].num_cached_tokens > 600 - 256
    assert [ended[name].outputs[0].token_ids for name in prompts] == [
        [(prompt[-1] + 1 + i) for i in range(4)] for prompt in prompts.values()
    ]
