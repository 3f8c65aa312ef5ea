"""Requests that ask for too much: they are refused for little, and harm nobody else."""

from __future__ import annotations

import gzip
import json
import threading
import time
from collections.abc import Callable
from typing import Any, Self

import httpx
import pytest
from tests.server.devices import GatedDevice, engine_on
from tests.server.openai.serving import Running, check_aborted, serving

from slipstream.runtime.testing import counting_engine
from slipstream.server.core.http import respond
from slipstream.server.core.limits import MAX_VALUES
from slipstream.server.openai.completions import CompletionReply

JSON = {"Content-Type": "application/json"}
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
USER = [{"role": "user", "content": "hi"}]
FEW, MANY = 30_000, 1_300_000


def copies(count: int, before: str, after: str = "}") -> bytes:
    return before.encode() + b"[" + b",".join([b"{}"] * count) + b"]" + after.encode()


# What is refused, and in which words.
REFUSED: dict[str, tuple[str, bytes | dict[str, Any], str]] = {
    "long prompt": (COMPLETIONS, {"prompt": "a" * (4_000_000)}, "at least 800000 tokens"),
    "long prompt, bare": (
        COMPLETIONS, {"prompt": "a" * 2000, "add_special_tokens": False}, "at least 400 tokens"),
    "long message": (CHAT, {"messages": [{"role": "user", "content": "a" * 4_000_000}]},
                     "at least 800000 tokens"),
    "long parts": (CHAT, {"messages": [{"role": "user", "content": [
        {"type": "text", "text": "a" * 1000}, {"type": "text", "text": "b" * 1000}]}]},
        "at least 400 tokens"),
    "objects as prompt": (COMPLETIONS, copies(MANY, '{"prompt":'), "the body holds more than"),
    "objects as messages": (CHAT, copies(MANY, '{"messages":'), "the body holds more than"),
    "objects as tokens": ("/detokenize", copies(MANY, '{"tokens":'), "the body holds more than"),
    "some objects as prompt": (COMPLETIONS, copies(FEW, '{"prompt":'), "prompt"),
    "some objects as messages": (CHAT, copies(FEW, '{"messages":'), "messages"),
    "some objects as parts": (
        CHAT, copies(FEW, '{"messages":[{"role":"user","content":', "}]}"), "messages"),
    "some objects as tokens": ("/detokenize", copies(FEW, '{"tokens":'), "tokens"),
    "some objects as top_logprobs": (
        CHAT, copies(FEW, '{"messages":[],"logprobs":true,"top_logprobs":'), "top_logprobs"),
    "10,000 tools": (CHAT, copies(10_000, '{"messages":[],"tools":', "}").replace(
        b"{}", b'{"type":"function","function":{"name":"f"}}'), "the body holds more than"),
    "an element that is none": (COMPLETIONS, {"prompt": [1] * 200_000 + ["a"]}, "prompt"),
    "allowed tokens": (COMPLETIONS, {"prompt": "a", "allowed_token_ids": [5] * 200_000},
                       "at most 16384"),
    "biases": (COMPLETIONS, {"prompt": "a", "logit_bias": {str(i): 1 for i in range(15_000)}},
               "has 15000 entries, at most 1024"),
    "a long key": (COMPLETIONS, {"prompt": "a", "logit_bias": {"9" * 5000: 1}}, "logit_bias"),
    "unknown fields": (COMPLETIONS, {"prompt": "a", **{f"x{i}": 1 for i in range(15_000)}},
                       "unknown field 'x0'"),
    "unknown stream options": (
        COMPLETIONS, {"prompt": "a", "stream": True,
                      "stream_options": {f"x{i}": 1 for i in range(15_000)}},
        "unknown field 'stream_options.x0'"),
    "log probabilities": (
        COMPLETIONS, {"prompt": "a", "n": 128, "max_tokens": 2000, "logprobs": 20},
        "log probabilities"),
    "deep": (COMPLETIONS, b'{"prompt": ' + b"[" * 20_000, "cannot be read"),
    "deep, closed": (CHAT, b'{"messages": [], "chat_template_kwargs": {"a": ' + b"[" * 990
                     + b"]" * 990 + b"}}", "cannot be read"),
    "a number of 5,000 digits": (COMPLETIONS, b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}",
                                 "at most 4,300 digits"),
    "compressed": (COMPLETIONS, gzip.compress(b'{"prompt": "a"}'), "without Content-Encoding"),
    "a name that is no text": (COMPLETIONS, b'{"\\ud800": 1, "prompt": "a"}', "a field's name"),
    "penalty": (COMPLETIONS, {"prompt": "a", "repetition_penalty": 1e-39}, "repetition_penalty"),
    "priority": (COMPLETIONS, {"prompt": "a", "priority": -1}, "--allow-priority"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_too_much_is_refused_in_a_sentence(server: Running, name: str) -> None:
    path, body, words = REFUSED[name]
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    response = httpx.post(server.url + path, content=content, headers=JSON, timeout=60)
    assert response.status_code == 400, response.text[:300]
    message = response.json()["error"]["message"]
    assert words in message and len(message) < 6000
    server.wait_idle()


def test_what_is_refused_is_neither_rendered_nor_encoded(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(*_: object, **__: object) -> None:
        raise AssertionError("done in vain")

    monkeypatch.setattr(server.llm.tokenizer, "encode", work)
    monkeypatch.setattr(server.llm.tokenizer, "apply_chat_template", work)
    long = "a" * 100_000
    for path, body in (
        (COMPLETIONS, {"prompt": long}),
        (COMPLETIONS, {"prompt": long, "add_special_tokens": False}),
        (CHAT, {"messages": [{"role": "user", "content": long}]}),
    ):
        assert server.post(path, body).status_code == 400
    server.service.draining = True
    try:
        assert server.post(CHAT, {"messages": USER}).status_code == 503
        assert server.post(COMPLETIONS, {"prompt": "a"}).status_code == 503
    finally:
        server.service.draining = False


def test_what_a_template_makes_too_long_is_not_encoded(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of roles, names and variables only the template knows whether they are in the prompt."""

    def work(*_: object, **__: object) -> None:
        raise AssertionError("done in vain")

    monkeypatch.setattr(server.llm.tokenizer, "encode", work)
    monkeypatch.setattr(server.llm.tokenizer, "apply_chat_template", lambda *_, **__: "a" * 100_000)
    error = server.post(CHAT, {"messages": USER}).json()["error"]
    assert error["code"] == "context_length_exceeded" and error["param"] == "messages"
    assert "at least" in error["message"]


def test_admission_counts_completions_before_it_adds_them() -> None:
    with serving(counting_engine(max_batch_size=2), max_queued_requests=2) as running:
        assert running.post(COMPLETIONS, {"prompt": ["a"] * 2, "n": 2}).status_code == 200
        never = running.post(COMPLETIONS, {"prompt": "a", "n": 5})
        assert never.status_code == 400 and never.json()["error"]["param"] == "n"
        running.service.places.take(2, 2)  # as if others ran
        try:
            busy = running.post(COMPLETIONS, {"prompt": "a", "n": 3})
            assert busy.status_code == 429 and running.service.places.own == 2
            assert running.post(COMPLETIONS, {"prompt": "a", "n": 2}).status_code == 200
        finally:
            running.service.places.give_back(2)


def test_an_account_of_log_probabilities_comes_first() -> None:
    with serving(counting_engine(9000, max_seq_len=32_000)) as running:
        for body in (
            {"prompt": "a", "n": 16, "max_tokens": 2000, "logprobs": 20},
            {"prompt": [[1] * 5000] * 6, "max_tokens": 1, "prompt_logprobs": 20},
        ):
            refused = running.post(COMPLETIONS, body)
            assert refused.status_code == 400 and "log probabilities" in refused.text
        assert not running.stats().prefix_cache_queries


def test_tokens_of_prompts_are_counted_as_they_are() -> None:
    """A text of digits has as many tokens as characters, in the counting engine and in many."""
    text, few = "7" * 5000, {"max_tokens": 1, "add_special_tokens": False}
    with serving(counting_engine(9000, max_seq_len=32_000)) as running:
        for path, body, param in (
            (COMPLETIONS, {"prompt": [text] * 6, "prompt_logprobs": 20}, "prompt_logprobs"),
            (COMPLETIONS, {"prompt": [text] * 6, "logprobs": 20, "echo": True}, "logprobs"),
            (CHAT, {"messages": [{"role": "user", "content": text * 6}], "prompt_logprobs": 20},
             "prompt_logprobs"),
        ):  # fmt: skip
            refused = running.post(path, {**body, **few})
            assert refused.status_code == 400, refused.text[:200]
            error = refused.json()["error"]
            assert error["param"] == param and f"Lower {param}" in error["message"]
        assert not running.stats().prefix_cache_queries


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT, "/" + "x" * 5000])
def test_what_a_client_sent_is_quoted_in_part(server: Running, path: str) -> None:
    long = "x" * 5000
    for body in (
        {"logit_bias": {long: 1}},
        {long: 1},
        {"stream_options": {long: 1}, "stream": True},
        {"n": int("9" * 4000)},
        {"seed": int("9" * 4000)},
        {"priority": int("9" * 4000)},
        {"model": long},
        {"messages": [{"role": long, "content": ""}]},
    ):
        answer = server.post(path, {"prompt": "a", "messages": USER, **body})
        assert answer.status_code in (400, 404)
        assert len(answer.text) < 1600, answer.text


def test_a_priority_is_taken_where_the_operator_allows_it() -> None:
    with serving(allow_priority=True) as running:
        assert running.post(COMPLETIONS, {"prompt": "a", "priority": -3}).status_code == 200


def test_a_stream_that_waits_gets_comments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until its turn comes, and events from then on; no comment is among those that come soon."""
    monkeypatch.setattr(respond, "PULSE_SECONDS", 0.05)
    device = GatedDevice()
    engine = engine_on(device, max_batch_size=1)
    with serving(engine) as running, device, httpx.Client(timeout=60) as client:
        device.permits.release()
        url = running.url + COMPLETIONS
        first = {"prompt": "a", "max_tokens": 250, "ignore_eos": True, "stream": True}
        with client.stream("POST", url, json=first) as busy:
            lines = busy.iter_lines()
            assert any(line.startswith("data: ") for line in lines)
            body = {"prompt": "a", "max_tokens": 2, "stream": True}
            with client.stream("POST", url, json=body) as waiting:
                assert waiting.status_code == 200
                events = waiting.iter_lines()
                assert [next(events) for _ in range(4)] == [": waiting", "", ": waiting", ""]
                busy.close()  # aborts it
                device.permits.release(1000)
                rest = [line for line in events if line and not line.startswith(":")]
            assert rest[0].startswith('data: {"id"') and rest[-1] == "data: [DONE]"


def test_a_stream_that_is_left_while_it_waits_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(respond, "PULSE_SECONDS", 0.05)
    device = GatedDevice()
    engine = engine_on(device, max_batch_size=1)
    with serving(engine) as running, device, httpx.Client(timeout=60) as client:
        device.permits.release()
        url = running.url + COMPLETIONS
        first = {"prompt": "a", "max_tokens": 250, "ignore_eos": True, "stream": True}
        with client.stream("POST", url, json=first) as busy:
            lines = busy.iter_lines()
            assert any(line.startswith("data: ") for line in lines)
            with client.stream("POST", url, json=first) as waiting:
                assert next(events := waiting.iter_lines()) == ": waiting"
            assert events
            running.wait(lambda: running.service.places.own == 1)
        check_aborted(running, device)


def cost(work: Callable[[], object]) -> float:
    """Seconds of this thread's own."""
    started = time.thread_time()
    work()
    return time.thread_time() - started


class Beats:
    """The most that the event loop's thread has computed without a pause, in its own time."""

    def __init__(self, running: Running) -> None:
        self.longest = 0.0
        self._loop = running.server.servers[0].get_loop()
        self._last: float | None = None
        self._ended = threading.Event()

    def __enter__(self) -> Self:
        self._loop.call_soon_threadsafe(self._beat)
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()

    def _beat(self) -> None:
        now = time.thread_time()
        if self._last is not None:
            self.longest = max(self.longest, now - self._last)
        self._last = now
        if not self._ended.is_set():
            self._loop.call_soon(self._beat)


@pytest.mark.parametrize("name", [name for name in REFUSED if "deep" not in name])
def test_what_is_too_much_does_not_hold_the_event_loop(server: Running, name: str) -> None:
    """A request holds it no longer than a few readings of the largest body that is read at all: in
    one of several tries, for a machine that does much else can prolong any, and what holds the
    loop holds it in all."""
    values = "[" + "1," * MAX_VALUES + "1]"
    path, body, _ = REFUSED[name]
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    tries = []
    for _ in range(10):
        unit = cost(lambda: json.loads(values))
        with Beats(server) as beats:
            httpx.post(server.url + path, content=content, headers=JSON, timeout=60)
        tries.append(beats.longest / unit)
        if tries[-1] < 8:
            return
    pytest.fail(f"it is held for {tries} readings")


@pytest.mark.parametrize("work", ["encode", "render", "decode", "answer"])
def test_nobody_waits_for_the_work_of_another_request(
    work: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While it is held up the engine goes on, a stream gets its tokens and others are answered."""
    begun, go_on = threading.Event(), threading.Event()

    def held(function: Callable[..., Any]) -> Callable[..., Any]:
        def wait(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
            if "hostile" in repr((args, kwargs)) or work == "decode":
                begun.set()
                assert go_on.wait(60)
            return function(*args, **kwargs)

        return wait

    with serving(counting_engine(4000, delay=0.001)) as running, httpx.Client(timeout=60) as client:
        holder, name = {
            "encode": (running.llm.tokenizer, "encode"),
            "render": (running.llm.tokenizer, "apply_chat_template"),
            "decode": (running.llm.tokenizer, "decode"),
            "answer": (CompletionReply, "body"),
        }[work]
        monkeypatch.setattr(holder, name, held(getattr(holder, name)))
        path, body = {
            "render": (CHAT, {"messages": [{"role": "user", "content": "hostile"}]}),
            "decode": ("/detokenize", {"tokens": [1, 2]}),
        }.get(work, (COMPLETIONS, {"prompt": "hostile", "max_tokens": 1}))
        stream = {"prompt": "a", "max_tokens": 3900, "ignore_eos": True, "stream": True}
        hostile = threading.Thread(target=running.post, args=(path, body))
        try:
            with client.stream("POST", running.url + COMPLETIONS, json=stream) as honest:
                lines = honest.iter_lines()
                hostile.start()
                assert begun.wait(60)
                told = [line for _, line in zip(range(100), lines, strict=False) if line]
                assert len(told) == 50 and "[DONE]" not in told[-1]
                assert client.get(running.url + "/health").status_code == 200
                small = running.post(COMPLETIONS, {"prompt": "b", "max_tokens": 2})
                assert small.status_code == 200
                assert not go_on.is_set()
        finally:
            go_on.set()
            hostile.join(60)
        running.wait_idle()
