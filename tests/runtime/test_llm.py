from __future__ import annotations

from typing import Any

import pytest

from slipstream.errors import CapacityError, ExecutionError, InvalidRequestError
from slipstream.runtime.executors.counting import CountingExecutor
from slipstream.runtime.llm import LLM
from slipstream.runtime.request_factory import Prompt
from slipstream.runtime.sampling.params import SamplingParams
from slipstream.runtime.testing import EOS, counting_engine


def open_llm(
    num_pages: int = 64,
    **options: Any,  # noqa: ANN401
) -> tuple[LLM, CountingExecutor]:
    engine = counting_engine(num_pages, **options)
    assert isinstance(engine.executor, CountingExecutor)
    return LLM.from_engine(engine), engine.executor


def greedy(**params: Any) -> SamplingParams:  # noqa: ANN401
    return SamplingParams(**{"temperature": 0, "max_tokens": 4, **params})


def assert_idle(llm: LLM) -> None:
    stats = llm.stats
    assert (stats.num_running, stats.num_waiting, stats.kv_cache_usage) == (0, 0, 0)


def test_prompts_may_be_one_or_many_texts_or_token_ids() -> None:
    llm, _ = open_llm()
    assert [o.outputs[0].text for o in llm.generate("abc", greedy())] == ["defg"]
    assert [o.outputs[0].text for o in llm.generate([0, 1, 2], greedy())] == ["defg"]
    prompts: list[Prompt] = ["abc", [4], "x"]
    mixed = llm.generate(prompts, [greedy(), greedy(max_tokens=1), greedy(n=2)])
    assert [[c.text for c in o.outputs] for o in mixed] == [["defg"], ["f"], ["yzAB", "yzAB"]]
    assert [o.prompt for o in mixed] == ["abc", None, "x"]
    assert all(o.finished for o in mixed)
    assert llm.generate([]) == []


def test_without_parameters_the_models_defaults_hold() -> None:
    llm, _ = open_llm()
    assert len(llm.generate("a")[0].outputs[0].token_ids) == 16


def test_more_prompts_than_fit_at_once_all_finish() -> None:
    llm, _ = open_llm(num_pages=5, max_batch_size=3)
    prompts = [[token] * (1 + token % 7) for token in range(40)]
    outputs = llm.generate(prompts, greedy())
    assert [o.outputs[0].token_ids for o in outputs] == [
        [token + 1 + i for i in range(4)] for token in range(40)
    ]
    assert_idle(llm)


def test_a_conversation_goes_through_the_chat_template() -> None:
    llm, _ = open_llm()
    messages = [{"role": "user", "content": "hi"}]
    (answer,) = llm.chat(messages, greedy())
    assert llm.tokenizer.decode(answer.prompt_token_ids) == "u:hi;a:"
    assert answer.outputs[0].text == ";!?-"
    assert len(llm.chat([messages, messages], greedy())) == 2
    assert [o.outputs[0].text for o in llm.stream(messages, greedy())][-1] == ";!?-"


def test_a_stream_yields_after_every_token() -> None:
    llm, _ = open_llm()
    assert [o.outputs[0].text for o in llm.stream("a", greedy())] == ["b", "bc", "bcd", "bcde"]
    deltas = llm.stream("a", greedy(), output_kind="delta")
    assert [o.outputs[0].text for o in deltas] == ["b", "c", "d", "e"]


def test_streams_and_batches_share_steps() -> None:
    llm, executor = open_llm()
    streams = [llm.stream("a", greedy()), llm.stream("k", greedy())]
    interleaved = [(x.outputs[0].text, y.outputs[0].text) for x, y in zip(*streams, strict=True)]
    assert interleaved[-1] == ("bcde", "lmno")
    assert executor.steps == 6, "four each, and the second began two later"
    first = llm.stream("a", greedy())
    next(first)
    assert llm.generate("k", greedy())[0].outputs[0].text == "lmno"
    assert [o.outputs[0].text for o in first][-1] == "bcde"


def test_closing_a_stream_aborts_its_request() -> None:
    llm, executor = open_llm()
    stream = llm.stream("a", greedy(max_tokens=50))
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert_idle(llm)
    llm.generate("b", greedy(max_tokens=1))
    assert executor.steps <= 3


def test_one_bad_prompt_stops_the_call_before_anything_runs() -> None:
    llm, executor = open_llm(num_pages=4)
    bad: list[tuple[Any, type[Exception], str]] = [
        (["a", []], InvalidRequestError, "has 0 tokens"),
        (["a", "a" * 20], CapacityError, "do not fit"),
        (["a", [EOS + 1]], InvalidRequestError, "another tokenizer"),
        (["a", [1.5]], InvalidRequestError, "expected a text or a list of token ids"),
        (["a", None], InvalidRequestError, "the prompt is None"),
    ]
    for prompts, error, complaint in bad:
        with pytest.raises(error, match=complaint):
            llm.generate(prompts, greedy())
    with pytest.raises(InvalidRequestError, match="2 sampling_params for 1 prompts"):
        llm.generate(["a"], [greedy(), greedy()])
    with pytest.raises(InvalidRequestError, match="stop_token_ids"):
        llm.generate(["a"], greedy(stop_token_ids=[9999]))
    with pytest.raises(InvalidRequestError, match=r"cache_salt .* remove lone surrogates"):
        llm.generate(["a"], greedy(), cache_salt="\ud800")
    assert executor.steps == 0
    assert_idle(llm)


def test_a_device_failure_is_raised_and_the_next_call_works() -> None:
    llm, executor = open_llm(max_batch_size=1)
    executor.fail_next = True
    with pytest.raises(ExecutionError, match="a step failed on the device"):
        llm.generate(["a", "b", "c"], greedy())
    assert_idle(llm)
    assert llm.generate("a", greedy())[0].outputs[0].text == "bcde"
    executor.fail_next = True
    with pytest.raises(ExecutionError):
        list(llm.stream("a", greedy()))


def test_a_repeated_prompt_hits_the_prefix_cache() -> None:
    llm, _ = open_llm()
    llm.generate("abcdefghij", greedy())
    (again,) = llm.generate("abcdefghijk", greedy())
    assert again.num_cached_tokens == 8
    assert llm.stats.prefix_cache_hits == 8
    cold, _ = open_llm(enable_prefix_caching=False)
    cold.generate("abcdefghij", greedy())
    assert cold.generate("abcdefghij", greedy())[0].num_cached_tokens == 0


def test_the_device_is_freed_on_leaving() -> None:
    engine = counting_engine()
    assert isinstance(engine.executor, CountingExecutor)
    with LLM.from_engine(engine) as llm:
        stream = llm.stream("a", greedy())
        next(stream)
    assert engine.executor.closed


def test_the_developer_instructs_as_the_system_does() -> None:
    with LLM.from_engine(counting_engine()) as llm:
        ends = [
            llm.chat([{"role": role, "content": "x"}])[0].prompt_token_ids
            for role in ("developer", "system")
        ]
    assert ends[0] == ends[1]


def test_the_last_message_is_gone_on_with() -> None:
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "abc"}]
    with LLM.from_engine(counting_engine()) as llm:
        (output,) = llm.chat(chat, continue_final_message=True)
        assert llm.tokenizer.decode(output.prompt_token_ids) == "u:hi;a:abc"
        assert output.outputs[0].text.startswith("def")
