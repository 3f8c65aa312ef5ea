"""What clients that nobody here wrote look for in answers: OpenAI's own, litellm, LangChain, vLLM's
and llama.cpp's tests."""

from __future__ import annotations

import itertools
import json
import socket
from typing import Any, get_type_hints

import httpx
import openai
import pytest
from openai.types import completion_create_params as completion_types
from openai.types.chat import completion_create_params as chat_types
from tests.server.devices import GatedDevice, engine_on
from tests.server.openai.serving import Running, check_aborted, serving

from slipstream.runtime.testing import counting_engine

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
HI: list[Any] = [{"role": "user", "content": "hi"}]


def chat(server: Running, **fields: Any) -> httpx.Response:  # noqa: ANN401 - JSON
    return server.post(CHAT, {"messages": HI, "max_tokens": 2, **fields})


def complete(server: Running, **fields: Any) -> httpx.Response:  # noqa: ANN401 - JSON
    return server.post(COMPLETIONS, {"prompt": "a", "max_tokens": 2, **fields})


@pytest.mark.parametrize("stream", [False, True])
def test_an_overflow_has_the_code_that_clients_look_for(server: Running, stream: bool) -> None:
    long: Any = [{"role": "user", "content": "a" * 300}]
    client = server.client()
    for param, ask in (
        ("messages", lambda: client.chat.completions.create(
            model="counting", messages=long, stream=stream)),
        ("prompt", lambda: client.completions.create(
            model="counting", prompt="a" * 300, stream=stream)),
    ):  # fmt: skip
        with pytest.raises(openai.BadRequestError) as refused:
            ask()
        assert (refused.value.code, refused.value.param) == ("context_length_exceeded", param)
        # LangChain and litellm look into the message.
        assert "prompt is too long" in refused.value.message


def test_a_request_that_no_cache_can_hold_is_an_overflow_too() -> None:
    with serving(counting_engine(4)) as running:  # 16 tokens
        for prompt, max_tokens, param in (("a" * 30, 1, "prompt"), ("a", 90, "max_tokens")):
            error = complete(running, prompt=prompt, max_tokens=max_tokens).json()["error"]
            assert (error["code"], error["param"]) == ("context_length_exceeded", param)
        error = chat(running, max_completion_tokens=90).json()["error"]
        assert error["param"] == "max_completion_tokens"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -1),
        ("top_p", 1.5),
        ("presence_penalty", 3),
        ("frequency_penalty", -3),
        ("repetition_penalty", 0),
        ("min_p", 2),
        ("top_k", -2),
        ("seed", 2**70),
        ("max_tokens", -1),
        ("min_tokens", 9),
        ("stop", [""]),
        ("bad_words", [""]),
        ("stop_token_ids", [-1]),
        ("stop_token_ids", [500]),
        ("allowed_token_ids", []),
        ("logit_bias", {"x": 1}),
        ("logit_bias", {"5": 101}),
        ("logit_bias", {"500": 1}),
        ("n", 200),
    ],
)
def test_a_value_error_names_its_field(server: Running, field: str, value: object) -> None:
    for answer in (complete(server, **{field: value}), chat(server, **{field: value})):
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == field


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (COMPLETIONS, {"prompt": ""}, "prompt"),
        (COMPLETIONS, {"prompt": [-1]}, "prompt"),
        (COMPLETIONS, {"prompt": "\ud800"}, "prompt"),
        (CHAT, {"messages": []}, "messages"),
        (CHAT, {"messages": [{"role": "", "content": "a"}]}, "messages"),
        (CHAT, {"messages": [{"role": "user", "content": "\ud800"}]}, "messages"),
        (CHAT, {"messages": [{"role": "user"}]}, "messages"),
        (CHAT, {"messages": HI, "max_completion_tokens": 0}, "max_completion_tokens"),
        (CHAT, {"messages": HI, "chat_template_kwargs": {"tools": 1}}, "chat_template_kwargs"),
        ("/detokenize", {"tokens": [500]}, "tokens"),
        ("/tokenize", {"prompt": "\ud800"}, "prompt"),
    ],
)
def test_an_error_of_a_prompt_names_its_field(
    server: Running, path: str, body: dict[str, Any], param: str
) -> None:
    content = json.dumps(body)
    headers = {"Content-Type": "application/json"}
    answer = httpx.post(server.url + path, content=content, headers=headers, timeout=60)
    assert answer.status_code == 400 and answer.json()["error"]["param"] == param


def test_negative_seeds_are_seeds_and_minus_one_is_none(server: Running) -> None:
    def text(seed: int) -> str:
        answer = complete(server, seed=seed, temperature=1.0, max_tokens=8)
        return str(answer.json()["choices"][0]["text"])

    assert text(-5) == text(-5) == text(2**64 - 5)
    assert len({text(-1) for _ in range(10)}) > 1
    assert complete(server, seed=-(2**63)).status_code == 200


def test_top_p_0_takes_the_likeliest_token(server: Running) -> None:
    answer = complete(server, top_p=0, temperature=1.0, seed=3, max_tokens=4)
    assert answer.json()["choices"][0]["text"] == "bcde"


def documented(module: Any) -> set[str]:  # noqa: ANN401 - a module of types
    return set(get_type_hints(module.CompletionCreateParamsBase)) | {"stream"}


def test_null_is_taken_for_every_documented_field(server: Running) -> None:
    with httpx.Client(base_url=server.url, timeout=60) as client:
        for name in documented(completion_types):
            body = {"prompt": "a", "max_tokens": 2, name: None}
            assert client.post(COMPLETIONS, json=body).status_code == 200, name
        for name in documented(chat_types) - {"messages"}:
            body = {"messages": HI, "max_tokens": 2, name: None}
            assert client.post(CHAT, json=body).status_code == 200, name
    null_prompt = complete(server, prompt=None, echo=True).json()
    assert null_prompt["choices"][0]["text"] == "<eos>ab", "it begins a document"


def test_a_documented_field_is_taken_or_not_supported_but_never_unknown(server: Running) -> None:
    values: tuple[Any, ...] = (1, "low", [], {}, {"type": "x"})
    names = documented(chat_types) - {"stream", "stream_options", "model", "messages"}
    with httpx.Client(base_url=server.url, timeout=60) as client:
        for name, value in itertools.product(names, values):
            body = {"messages": HI, "max_tokens": 2, name: value}
            assert "unknown" not in client.post(CHAT, json=body).text, (name, value)
    for taken in (
        {"reasoning_effort": "none"},
        {"reasoning_effort": "high"},
        {"verbosity": "medium"},
        {"prediction": {"type": "content", "content": "x"}},
        {"prompt_cache_options": {"mode": "implicit"}},
    ):
        assert chat(server, **taken).status_code == 200, taken
    for name, value in (
        ("verbosity", "low"),
        ("web_search_options", {}),
        ("moderation", {"model": "x"}),
    ):
        error = chat(server, **{name: value}).json()["error"]
        assert "not supported" in error["message"] and error["param"] == name


@pytest.mark.parametrize(
    ("message", "prompt"),
    [
        ({"content": "ok", "tool_calls": [], "function_call": {}, "audio": None}, "a:ok;a:"),
        ({"content": "ok", "refusal": None, "annotations": [], "tool_call_id": ""}, "a:ok;a:"),
        ({"content": None, "refusal": "no"}, "a:no;a:"),
        ({"content": [{"type": "refusal", "refusal": "no"}]}, "a:no;a:"),
        ({"content": None}, "a:;a:"),
    ],
)
def test_past_turns_come_as_clients_keep_them(
    server: Running, message: dict[str, Any], prompt: str
) -> None:
    messages = [{"role": "assistant", **message}]
    tokens = server.post("/tokenize", {"messages": messages}).json()["tokens"]
    assert server.llm.tokenizer.decode(tokens) == prompt


def chunks_of(server: Running, path: str, **fields: Any) -> list[dict[str, Any]]:  # noqa: ANN401
    options = {"include_usage": True, "continuous_usage_stats": True}
    body = {"max_tokens": 4, **fields, "stream": True, "stream_options": options}
    lines = server.post(path, body).text.split("\n\n")
    return [
        json.loads(line.removeprefix("data: ")) for line in lines if line and line != "data: [DONE]"
    ]


@pytest.mark.parametrize("fields", [{}, {"n": 2}, {"logprobs": True}, {"stop": ["?-"]}])
def test_a_chat_stream_has_a_role_then_content_then_an_empty_end(
    server: Running, fields: dict[str, Any]
) -> None:
    *chunks, last = chunks_of(server, CHAT, messages=HI, **fields)
    assert last["choices"] == []
    usages = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert usages[0] == 0, "nothing was told before the role"
    if "n" not in fields:  # vLLM's own test
        told = [usage for usage in usages if usage]
        assert told == sorted(set(told)) and told[-1] == last["usage"]["completion_tokens"]
    for index in range(fields.get("n", 1)):
        mine = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == index]
        assert mine[0]["delta"] == {"role": "assistant", "content": ""}
        assert mine[-1]["delta"] == {} and mine[-1]["finish_reason"]
        assert all(choice["finish_reason"] is None for choice in mine[:-1])
        for choice in mine[1:-1]:
            assert choice["delta"]["content"] or choice["logprobs"]


@pytest.mark.parametrize("fields", [{"n": 3}, {"n": 2, "logprobs": 1}, {"prompt": ["a", "b"]}])
def test_no_choice_has_an_empty_chunk(server: Running, fields: dict[str, Any]) -> None:
    *chunks, _ = chunks_of(server, COMPLETIONS, **{"prompt": "a", **fields})
    for chunk in chunks:
        (choice,) = chunk["choices"]
        assert choice["text"] and chunk["usage"]["completion_tokens"] > 0


def test_prompt_logprobs_are_null_where_not_asked(server: Running) -> None:
    assert chat(server).json()["prompt_logprobs"] is None
    for fields in ({}, {"echo": True, "logprobs": 1}):
        assert complete(server, **fields).json()["choices"][0]["prompt_logprobs"] is None


def test_every_object_has_the_fingerprint_of_the_engine(server: Running) -> None:
    fingerprint = server.llm.fingerprint
    assert chat(server).json()["system_fingerprint"] == fingerprint
    for path, body in ((CHAT, {"messages": HI}), (COMPLETIONS, {"prompt": "a"})):
        chunks = chunks_of(server, path, **body)
        assert {chunk["system_fingerprint"] for chunk in chunks} == {fingerprint}


@pytest.mark.parametrize("path", ["/health", "/metrics", "/v1/models", "/version", "/"])
def test_head_is_get_without_a_body(server: Running, path: str) -> None:
    head, get = httpx.head(server.url + path, timeout=60), httpx.get(server.url + path, timeout=60)
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-type"] == get.headers["content-type"]


def sent(server: Running, path: str, body: bytes) -> socket.socket:
    """A connection whose client has sent a request and closed its side."""
    host, port = server.url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=60)
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
    connection.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + body)
    connection.shutdown(socket.SHUT_WR)
    return connection


@pytest.mark.parametrize("stream", [b"false", b"true"])
def test_a_half_closed_connection_gets_its_answer(stream: bytes) -> None:
    body = b'{"prompt": "a", "max_tokens": 20, "ignore_eos": true, "stream": %s}' % stream
    with (
        serving(counting_engine(delay=0.01)) as running,
        sent(running, COMPLETIONS, body) as connection,
    ):
        answer = b"".join(iter(lambda: connection.recv(4096), b""))
    assert answer.startswith(b"HTTP/1.1 200 OK\r\n") and answer.count(b"HTTP/1.1") == 1
    assert b'"finish_reason":"length"' in answer


def test_who_is_gone_after_closing_a_side_is_aborted() -> None:
    device = GatedDevice()
    body = b'{"prompt": "a", "max_tokens": 250, "ignore_eos": true}'
    with serving(engine_on(device)) as running, device:
        connection = sent(running, COMPLETIONS, body)
        assert device.waiting.wait(60)
        connection.close()
        check_aborted(running, device)
