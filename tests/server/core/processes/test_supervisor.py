"""A server of several processes: what it answers, and what the death of any of them does."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from concurrent import futures
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.server.core.processes.servers import Served, served, wait
from tests.server.openai.serving import Running, samples_of, serving

TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
LONG = 200  # tokens of a stream, for a step each
CHARACTERS = LONG - 2  # the alphabet ends twice, in a token without text
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
ASKED: list[tuple[str, dict[str, Any]]] = [
    (COMPLETIONS, {"prompt": "abc", "max_tokens": 8}),
    (COMPLETIONS, {"prompt": ["abc", "xy"], "n": 2, "logprobs": 2, "max_tokens": 4}),
    (COMPLETIONS, {"prompt": "a", "stop": ["fgh"], "max_tokens": 30}),
    (COMPLETIONS, {"prompt": "a", "stop": ["fgh"], "include_stop_str_in_output": True}),
    (COMPLETIONS, {"prompt": "a", "stop": ["de"], "min_tokens": 9, "max_tokens": 12}),
    (COMPLETIONS, {"prompt": "a", "guided_regex": "[a-z]{3}xyz[0-9]", "max_tokens": 30}),
    (COMPLETIONS, {"prompt": "a", "max_tokens": 3, "ignore_eos": True, "seed": 1}),
    (COMPLETIONS, {"prompt": "a", "guided_regex": "("}),
    (COMPLETIONS, {"prompt": "a" * 300}),
    (CHAT, {"messages": [{"role": "user", "content": "hi"}], "logprobs": True, "max_tokens": 5}),
    (CHAT, {"messages": [{"role": "user", "content": "hi"}], "tools": [TOOL]}),
    ("/v1/messages", {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 5}),
    ("/api/generate", {"prompt": "ab", "raw": True, "stream": False}),
    ("/tokenize", {"prompt": "abc"}),
]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    options = ("--max-batch-size", "8", "--max-queued-requests", "0")
    with served(tmp_path_factory.mktemp("device"), 2, *options) as found:
        yield found


@pytest.fixture(scope="module")
def local() -> Iterator[Running]:
    with serving() as running:
        yield running


def known(value: Any) -> Any:  # noqa: ANN401 - JSON
    """Without what is new in every answer."""
    if isinstance(value, dict):
        new = ("id", "created", "request_id", "created_at", "model")
        kept = {k: v for k, v in value.items() if k not in new and not k.endswith("_duration")}
        return {name: known(each) for name, each in kept.items()}
    return [known(each) for each in value] if isinstance(value, list) else value


def test_answers_are_those_of_one_process(server: Served, local: Running) -> None:
    for path, body in ASKED:
        here, there = (
            httpx.post(url + path, json=body, timeout=60) for url in (local.url, server.url)
        )
        assert here.status_code == there.status_code, there.text
        assert known(here.json()) == known(there.json()), body


def events(url: str, path: str, body: dict[str, Any]) -> list[Any]:
    """The events of a stream, of which neighbours that only say more of one choice are one."""
    answer = httpx.post(url + path, json={**body, "stream": True}, timeout=60)
    lines = [line.removeprefix("data: ") for line in answer.text.splitlines() if line]
    told: list[Any] = []
    for line in lines:
        event = known(json.loads(line)) if line != "[DONE]" else line
        if told and _joins(told[-1], event):
            continue
        told.append(event)
    return told


def _joins(before: Any, event: Any) -> bool:  # noqa: ANN401 - JSON
    """Add an event to the one before it, if both are text of one choice."""
    try:
        (one,), (other,) = before["choices"], event["choices"]
    except (TypeError, KeyError, ValueError):
        return False
    if one["index"] != other["index"] or "text" not in one:
        return False
    one["text"] += other.pop("text")
    scores, more = one.pop("logprobs"), other.pop("logprobs")
    one.update(other, logprobs=scores)
    for name in scores or ():
        scores[name] += more[name]
    return True


def test_streams_are_those_of_one_process(server: Served, local: Running) -> None:
    streamed = [(p, b) for p, b in ASKED if p == COMPLETIONS and isinstance(b["prompt"], str)]
    streamed.append((COMPLETIONS, {"prompt": "a", "logprobs": 1, "stop": "g", "max_tokens": 9}))
    for path, body in streamed:
        body = {**body, "stream_options": {"include_usage": True}}
        assert events(local.url, path, body) == events(server.url, path, body), body


def metrics(server: Served) -> dict[str, float]:
    return samples_of(httpx.get(f"{server.url}/metrics", timeout=60).text)


def complete(server: Served, body: dict[str, Any]) -> str:
    answer = httpx.post(server.url + COMPLETIONS, json=body, timeout=60)
    text: str = answer.json()["choices"][0]["text"]
    return text


def test_metrics_are_those_of_all_whoever_is_asked(server: Served) -> None:
    # A request is counted after its answer has gone: of a route that the test before did not use.
    body = {"prompt": "ab", "raw": True, "stream": False, "options": {"num_predict": 3}}
    counted = "slipstream:http_requests_total /api/generate POST 200"
    before = metrics(server)
    for _ in range(8):
        httpx.post(server.url + "/api/generate", json=body, timeout=60).raise_for_status()
    wait(lambda: metrics(server).get(counted, 0) - before.get(counted, 0) == 8)
    for _ in range(6):  # each is asked, but for one time in 32
        samples = metrics(server)
        grown = {name: samples[name] - before.get(name, 0) for name in samples}
        assert grown["slipstream:generation_tokens_total"] == 24
        assert grown["slipstream:prompt_tokens_total"] == 16
        assert grown["slipstream:time_to_first_token_seconds_count"] == 8
        assert grown["slipstream:request_success_total length"] == 8
        assert grown[counted] == 8
        assert samples["slipstream:num_requests_running"] == 0
        assert samples["slipstream:engine_healthy"] == 1


def test_an_answer_is_stored_for_whoever_is_asked(server: Served) -> None:
    for _ in range(4):
        body: dict[str, Any] = {"input": "hi", "max_output_tokens": 3}
        made = httpx.post(f"{server.url}/v1/responses", json=body, timeout=60).json()
        where = f"{server.url}/v1/responses/{made['id']}"
        assert httpx.get(where, timeout=60).json() == made
        more = {"input": "on", "previous_response_id": made["id"], "max_output_tokens": 3}
        assert httpx.post(f"{server.url}/v1/responses", json=more, timeout=60).status_code == 200
        assert httpx.delete(where, timeout=60).status_code == 200
        assert (
            httpx.get(where, timeout=60).status_code
            == httpx.delete(where, timeout=60).status_code
            == 404
        )


def begin(stack: ExitStack, server: Served, tokens: int = LONG) -> httpx.Response:
    """A stream that has had its first token, on a device that is held."""
    body = {"prompt": "a", "max_tokens": tokens, "ignore_eos": True, "stream": True}
    client = stack.enter_context(httpx.Client(timeout=60))
    with futures.ThreadPoolExecutor() as pool:
        opened = pool.submit(
            lambda: stack.enter_context(client.stream("POST", server.url + COMPLETIONS, json=body))
        )
        while not opened.done():
            server.permit()
            futures.wait([opened], timeout=0.2)  # no more steps than it needs
    return opened.result()


def rest(response: httpx.Response) -> str:
    return "".join(
        json.loads(line.removeprefix("data: "))["choices"][0]["text"]
        for line in response.iter_lines()
        if line.startswith("data: {")
    )


def begun_on_both(stack: ExitStack, server: Served) -> list[tuple[httpx.Response, int]]:
    """Streams of both processes, with whose they are."""
    streams: list[tuple[httpx.Response, int]] = []
    while len({pid for _, pid in streams}) < 2:
        response = begin(stack, server)
        streams.append((response, server.owner(response).pid))
        if len(streams) > 5:  # rather than to fill the batch
            streams.pop(0)[0].close()
    return streams


def test_places_are_those_of_the_whole_server(server: Served) -> None:
    with ExitStack() as stack, server.held():
        streams = begun_on_both(stack, server)
        for free in range(8 - len(streams), 0, -1):
            full = httpx.post(
                server.url + COMPLETIONS, json={"prompt": "a", "n": free + 1}, timeout=60
            )
            assert full.status_code == 429, full.text
            assert f"{8 - free} completions run" in full.json()["error"]["message"]
            begin(stack, server)
        assert httpx.get(f"{server.url}/load", timeout=60).json() == {"server_load": 8}
    idle(server)


def idle(server: Served) -> None:
    wait(lambda: httpx.get(f"{server.url}/load", timeout=60).json() == {"server_load": 0})
    wait(lambda: metrics(server)["slipstream:kv_cache_usage_perc"] == 0)


def test_the_death_of_one_ends_its_streams_only_and_another_takes_its_place(server: Served) -> None:
    with ExitStack() as stack:
        with server.held():
            streams = begun_on_both(stack, server)
            victim = streams[0][1]
            before = {member.pid for member in server.members}
            next(m for m in server.members if m.pid == victim).kill()
            wait(lambda: victim not in {member.pid for member in server.members})
        for response, owner in streams:
            if owner == victim:
                with pytest.raises(httpx.TransportError):
                    rest(response)
            else:
                assert len(rest(response)) == CHARACTERS
    for _ in range(8):  # those that the new one is to answer wait for it
        answer = httpx.post(
            server.url + COMPLETIONS, json={"prompt": "a", "max_tokens": 2}, timeout=60
        )
        assert answer.json()["choices"][0]["text"] == "bc"
    assert len({member.pid for member in server.members} - before) == 1
    idle(server)
    assert any(f"api_process_ended pid={victim} status=-9" in line for line in server.log)


def test_sigterm_drains_all(server: Served) -> None:
    members = server.members
    with ExitStack() as stack:
        with server.held():
            streams = begun_on_both(stack, server)
            server.process.send_signal(signal.SIGTERM)
            for _ in range(4):
                wait(lambda: httpx.get(f"{server.url}/health", timeout=60).status_code == 503)
            refused = httpx.post(server.url + COMPLETIONS, json={"prompt": "a"}, timeout=60)
            assert refused.status_code == 503 and "shutting down" in refused.text
        assert {len(rest(response)) for response, _ in streams} == {CHARACTERS}
    assert server.process.wait(60) == 0
    assert not any(member.is_running() for member in members)
    server.reader.join(60)
    assert server.log[-1].endswith(" stopped\n")


def test_the_death_of_the_engine_is_told_and_ends_all(tmp_path: Path) -> None:
    with served(tmp_path, 1) as server, ExitStack() as stack:
        with server.held():
            stream = begin(stack, server)
            (member,) = server.members
            server.process.kill()
            lines = [line for line in stream.iter_lines() if line]
        assert "the engine's process has ended" in lines[-1] and '"error"' in lines[-1]
        assert server.process.wait(60) == -signal.SIGKILL
        wait(lambda: not member.is_running())


def test_a_second_signal_does_not_wait(tmp_path: Path) -> None:
    with served(tmp_path, 1) as server, ExitStack() as stack:
        with server.held():
            begin(stack, server)
            (member,) = server.members
            server.process.send_signal(signal.SIGINT)
            wait(lambda: httpx.get(f"{server.url}/health", timeout=60).status_code == 503)
            server.process.send_signal(signal.SIGINT)
            wait(lambda: not server.members)  # though the stream has not come to its end
        assert server.process.wait(60) == 0 and not member.is_running()
