"""Requests in flight on the counting model, with clients that are objects of this process."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from tests.server.devices import Clock, GatedDevice, engine_on

from slipstream.errors import ExecutionError, InvalidRequestError, SlipstreamError
from slipstream.runtime import engine_thread
from slipstream.runtime.async_llm import AsyncLLM
from slipstream.runtime.engine.health import MAX_FAILURES
from slipstream.runtime.executors.counting import CountingExecutor
from slipstream.runtime.llm import LLM
from slipstream.runtime.loaded_engine import LoadedEngine
from slipstream.runtime.request import RequestOutput
from slipstream.runtime.sampling.params import SamplingParams
from slipstream.runtime.testing import ALPHABET, counting_engine
from slipstream.server.core.logprobs import TokenTexts
from slipstream.server.core.refusal import Refusal
from slipstream.server.triton.answers import Answer, Outputs
from slipstream.server.triton.errors import CancelledError, code_of
from slipstream.server.triton.outbox import Call, Outbox
from slipstream.server.triton.parameters import Query
from slipstream.server.triton.serving import Serving

LONG = 200
ENDLESS = 30_000  # tokens: minutes of 10 ms a step


class Client:
    """Takes responses; ``gone`` is what Triton would know, ``unwell`` makes sending fail."""

    def __init__(self) -> None:
        self.responses: queue.SimpleQueue[Outputs | SlipstreamError] = queue.SimpleQueue()
        self.gone = False
        self.unwell = False
        self.ended = False
        self.threads: set[int] = set()

    def send(self, outputs: Outputs, *, final: bool) -> None:
        assert not self.ended, "a response after the last"
        self.threads.add(threading.get_ident())
        if self.unwell:
            raise RuntimeError("shared memory is full")
        self.ended = final
        self.responses.put(outputs)

    def fail(self, error: SlipstreamError) -> None:
        assert not self.ended, "an error after the last response"
        self.threads.add(threading.get_ident())
        self.ended = True
        self.responses.put(error)

    def is_cancelled(self) -> bool:
        assert not self.ended, "asked about a request that has ended"
        self.threads.add(threading.get_ident())
        return self.gone

    def next(self) -> Outputs:
        """The next response, or its error raised."""
        response = self.responses.get(timeout=60)
        if isinstance(response, SlipstreamError):
            raise response
        return response

    def text(self) -> str:
        """The joined text of what comes until the end."""
        text = b""
        while not (self.ended and self.responses.empty()):
            text += self.next()["text_output"][0]
        return text.decode()


class Counts:
    """Counts what observers hear."""

    def __init__(self) -> None:
        self.heard: list[str] = []
        self.published = 0
        self.closed = False
        self.mean_latency = 0.0

    def watch(self, max_tokens: int | None = None) -> Counts:
        return self

    def see(self, output: RequestOutput) -> None:
        if output.finished:
            self.heard.append(str(output.outputs[0].finish_reason))

    def close(self, reason: str | None = None) -> None:
        if reason is None:
            self.closed = True
        else:
            self.heard.append(reason)

    def publish(self) -> None:
        self.published += 1


class Bench:
    """A serving counting model."""

    def __init__(self, engine: LoadedEngine, clock: Callable[[], float] = time.monotonic) -> None:
        assert isinstance(engine.executor, CountingExecutor)
        self.executor = engine.executor
        self.llm = AsyncLLM.from_engine(engine, clock=clock)
        self.counts = Counts()
        self.serving = Serving(self.llm, self.counts)

    def ask(self, prompt: str, *, stream: bool = True, **sampling: Any) -> Client:  # noqa: ANN401
        """Submit a greedy request."""
        client = Client()
        params = SamplingParams(temperature=0, **sampling)
        self.serving.submit(Query(prompt, params, stream, False, frozenset()), client)
        return client

    def wait(self, condition: Callable[[], bool], seconds: float = 60) -> None:
        """Return when it holds."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.002)


def endless(**options: Any) -> Bench:  # noqa: ANN401 - of RuntimeConfig
    """One that answers for minutes, unless it is stopped."""
    return Bench(counting_engine(2**13, delay=0.01, max_seq_len=2**15, **options))


@pytest.fixture
def fast() -> Iterator[Bench]:
    """As fast as it goes."""
    bench = Bench(counting_engine())
    yield bench
    bench.serving.close()


def test_streams_and_single_answers_are_the_same_text(fast: Bench) -> None:
    clients = [fast.ask("abc", stream=stream, max_tokens=20) for stream in (True, False)]
    assert [client.text() for client in clients] == ["defghijklmnopqrstuvw"] * 2
    assert fast.counts.heard == ["length"] * 2


def test_what_piles_up_is_sent_as_one_response(fast: Bench) -> None:
    client = fast.ask("abc", max_tokens=50)
    fast.wait(lambda: client.ended)
    count = client.responses.qsize()
    assert 1 <= count <= 50 and len(client.text()) == 50


def test_one_thread_talks_to_triton(fast: Bench) -> None:
    clients = [fast.ask(letter, max_tokens=5) for letter in "abcd"]
    assert [client.text() for client in clients] == ["bcdef", "cdefg", "defgh", "efghi"]
    (thread,) = set().union(*(client.threads for client in clients))
    assert thread != threading.get_ident()


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_ends_its_request_within_a_few_steps(stream: bool) -> None:
    with GatedDevice() as device:
        bench = Bench(engine_on(device))
        device.permits.release()
        client = bench.ask("a", stream=stream, max_tokens=LONG, ignore_eos=True)
        bench.wait(lambda: device.asked == 2)  # the device is held there, and the engine with it
        client.gone = True
        bench.wait(lambda: bool(bench.llm._thread._commands.qsize()))  # to end it
        device.permits.release(1000)
        bench.wait(lambda: bench.llm.stats.num_running == 0)
        assert device.steps <= 3
        assert bench.llm.stats.kv_cache_usage == 0
        bench.wait(lambda: client.ended)
        with pytest.raises(CancelledError):
            client.text()
        assert bench.counts.heard == ["abort"]
        bench.serving.close()


def test_a_client_that_goes_while_its_request_waits() -> None:
    bench = endless(max_batch_size=2)
    running = [bench.ask(letter, max_tokens=ENDLESS, ignore_eos=True) for letter in "ab"]
    bench.wait(lambda: bench.llm.stats.num_running == 2)
    waiting = bench.ask("c", max_tokens=5)
    bench.wait(lambda: bench.llm.stats.num_waiting == 1)
    waiting.gone = True
    bench.wait(lambda: bench.llm.stats.num_waiting == 0)
    assert bench.llm.stats.num_running == 2
    for client in running:
        client.gone = True
    bench.wait(lambda: bench.llm.stats.num_running == 0)
    bench.serving.close()


def test_a_bad_request_ends_with_its_error_and_the_others_go_on(fast: Bench) -> None:
    good = fast.ask("abc", max_tokens=30)
    with pytest.raises(InvalidRequestError, match="Shorten the prompt"):
        fast.ask("a" * 300).next()
    with pytest.raises(InvalidRequestError, match="stop_token_ids holds token 999"):
        fast.ask("a", stop_token_ids=[999]).next()
    assert len(good.text()) == 30
    assert fast.counts.heard == ["length"]


def test_a_failed_step_ends_its_requests_and_the_next_is_answered(fast: Bench) -> None:
    fast.executor.fail_next = True
    with pytest.raises(ExecutionError, match="a step failed"):
        fast.ask("abc").text()
    assert fast.ask("abc", max_tokens=2).text() == "de"
    assert fast.counts.heard == ["error", "length"]


def test_a_row_that_fails_ends_its_request_alone(fast: Bench) -> None:
    fast.executor.broken_token = ALPHABET.index("z")
    neighbour = fast.ask("A", max_tokens=40)
    for stream, sent in ((True, b"y"), (False, b"")):
        broken, text = fast.ask("x", stream=stream), b""
        with pytest.raises(ExecutionError, match="broke this token") as caught:
            while True:
                text += broken.next()["text_output"][0]
        assert (code_of(caught.value), text) == ("INTERNAL", sent)
    assert len(neighbour.text()) == 40
    assert fast.serving.unavailable is None


def test_a_device_that_fails_step_after_step_is_unavailable_and_says_why(fast: Bench) -> None:
    for _ in range(MAX_FAILURES):
        assert fast.serving.unavailable is None
        fast.executor.fail_next = True
        with pytest.raises(ExecutionError, match="a step failed"):
            fast.ask("abc").text()
    must_refuse(fast, f"the device failed {MAX_FAILURES} steps in a row")
    assert fast.counts.heard == ["error"] * MAX_FAILURES


def test_a_device_that_hangs_is_unavailable_and_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_thread, "_PATIENCE", 0.02)
    device, clock = GatedDevice(), Clock()
    bench = Bench(engine_on(device), clock)
    with device:
        client = bench.ask("abc")
        assert device.waiting.wait(60)
        assert bench.serving.unavailable is None
        clock.now = bench.llm.config.step_timeout + 1
        with pytest.raises(ExecutionError, match="has not answered for 601 seconds") as caught:
            client.text()
        assert code_of(caught.value) == "INTERNAL"
        must_refuse(bench, "the device has not answered")
        bench.serving.close()
        assert not device.closed


def must_refuse(bench: Bench, reason: str) -> None:
    assert str(bench.serving.unavailable).startswith(reason)
    with pytest.raises(Refusal, match=reason) as caught:
        bench.ask("abc").next()
    assert code_of(caught.value) == "UNAVAILABLE"


def test_a_response_that_cannot_be_sent_ends_only_its_request() -> None:
    with GatedDevice() as device:
        bench = Bench(engine_on(device))
        device.permits.release()
        client, other = (bench.ask(letter, max_tokens=30) for letter in "ab")
        client.next()
        client.unwell = True
        device.permits.release(1000)
        with pytest.raises(ExecutionError, match="shared memory is full"):
            client.text()
        assert len(other.text()) == 30
        bench.wait(lambda: bench.llm.stats.num_running == 0)
        bench.serving.close()


def test_a_request_that_ends_while_it_is_cancelled_has_a_last_response(fast: Bench) -> None:
    published = threading.Event()

    def publish() -> None:
        published.set()
        raise RuntimeError("no metrics")  # requests go on without

    client, cancelled = Client(), threading.Event()
    client.gone = True
    outbox = Outbox(publish)
    query = Query("abc", SamplingParams(), True, False, frozenset())
    call = Call(client, Answer(query, TokenTexts(fast.llm.tokenizer)), cancelled.set)
    outbox.open(call)
    assert cancelled.wait(60)
    with LLM.from_engine(counting_engine()) as llm:
        (output,) = llm.generate(["abc"], SamplingParams(temperature=0, max_tokens=2))
    outbox.put(call, output)
    fast.wait(lambda: client.ended)
    assert client.text() == "de"
    assert published.wait(60)
    outbox.close()


def test_closing_ends_what_runs_with_an_error() -> None:
    before = set(threading.enumerate())
    bench = endless()
    client = bench.ask("a", max_tokens=ENDLESS, ignore_eos=True)
    client.next()
    bench.serving.close()
    with pytest.raises(ExecutionError, match="shut down"):
        client.text()
    assert client.ended and bench.executor.closed and bench.counts.closed
    assert bench.counts.published >= 1
    for thread in set(threading.enumerate()) - before:  # what ends by itself may take its time
        thread.join(60)
        assert not thread.is_alive(), thread


def test_a_text_that_cannot_fit_is_refused_by_its_length(
    fast: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def encode(*_: object, **__: object) -> None:
        raise AssertionError("it was encoded")

    monkeypatch.setattr(type(fast.llm.tokenizer), "encode", encode)
    with pytest.raises(InvalidRequestError, match=r"has at least .* Shorten the prompt"):
        fast.ask("a" * (8 << 20)).next()
