"""What a real Triton Inference Server refuses, and that it goes on serving."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import tritonclient.grpc as grpc_client
import tritonclient.http as http_client
from tests.server.triton.clients import ENDLESS, GENERATE, PROMPT, Stream, post
from tests.server.triton.harness import Server, wait_until_idle
from tritonclient.utils import InferenceServerException

from slipstream.server.triton.repository import Deployment, write_repository

pytestmark = pytest.mark.triton_server


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_tokenz": 4}, "unknown parameter 'max_tokenz'"),
        ({"parameters": {"max_tokenz": 4}}, "unknown parameter 'max_tokenz'"),
        ({"top_q": 0.5, "text_input": ""}, "unknown parameter 'top_q'"),
        ({"max_tokens": 0}, "max_tokens=0 is not an integer of at least 1"),
        ({"temperature": -1}, "temperature=-1.0 is not a number in [0, 1000]"),
        ({"top_p": 1.5}, "top_p=1.5 is not a number in [0, 1]"),
        ({"top_k": -2}, "top_k=-2 is not an integer of at least -1"),
        ({"min_tokens": 9, "max_tokens": 8}, "min_tokens=9 is more than max_tokens=8"),
        ({"parameters": {"min_p": "high"}}, "min_p='high' is not a number in [0, 1]"),
        ({"min_p": True}, "min_p=True is not a number in [0, 1]"),
        (
            {"random_seed": 1, "sampling_parameters": '{"seed": 2}'},
            "are the same parameter; give one of them",
        ),
        ({"sampling_parameters": "{"}, "sampling_parameters='{' is not a JSON object"),
        ({"sampling_parameters": "[1]"}, "sampling_parameters='[1]' is not a JSON object"),
        ({"sampling_parameters": '{"a": 1}'}, "unknown parameter 'a'"),
        ({"sampling_parameters": '{"stop": 5}'}, "stop=5 is not a string or a list of strings"),
        ({"sampling_parameters": '{"temperature": NaN}'}, "temperature=nan is not a number"),
        ({"sampling_parameters": '{"max_tokens": 1e400}'}, "max_tokens=inf is not an integer"),
        ({"sampling_parameters": "[" * 100_000}, "is not a JSON object"),
        (
            {"sampling_parameters": '{"stop_token_ids": [99999]}'},
            "stop_token_ids holds token 99999",
        ),
        ({"sampling_parameters": '{"stream": 1}'}, "stream=1 is not a boolean"),
        ({"text_input": ""}, "the prompt has 0 tokens"),
        ({"text_input": "fox " * 20000}, "Shorten the prompt"),
    ],
)
def test_a_bad_request_names_what_is_wrong(
    server: Server, change: dict[str, Any], message: str
) -> None:
    answer = post(server.http, GENERATE, {"text_input": PROMPT, **change})
    assert answer.status == 400
    assert message in answer.json["error"]
    again = post(server.http, GENERATE, {"text_input": PROMPT, "max_tokens": 2})
    assert again.status == 200, again.body


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"not json",
        b"\xff\xfe",
        b"[]",
        b"{}",
        {"text_input": 5},
        {"text_input": None},
        {"text_input": ["a", "b"]},
        {"text_input": PROMPT, "temperature": "hot"},
        {"text_input": PROMPT, "max_tokens": 1.5},
        {"text_input": PROMPT, "stream": "yes"},
        {"text_input": PROMPT, "random_seed": -1},
        {"text_input": PROMPT, "sampling_parameters": {"temperature": 1}},
        {"text_input": PROMPT, "parameters": {"logit_bias": {"5": 1}}},
    ],
)
def test_what_triton_itself_refuses_leaves_the_model_serving(server: Server, body: object) -> None:
    answer = post(server.http, GENERATE, body)
    assert answer.status >= 400 and answer.json["error"]
    again = post(server.http, GENERATE, {"text_input": PROMPT, "max_tokens": 2})
    assert again.status == 200, again.body


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"\x03\x00\x00\x00\xff\xfe\xfd", "text_input is not UTF-8"),
        (b"\xff\xff\xff\xff", ""),
        (b"\x01", ""),
        (b"", ""),
    ],
)
def test_malformed_tensors_leave_the_model_serving(
    server: Server, raw: bytes, message: str
) -> None:
    tensor = grpc_client.InferInput("text_input", [1], "BYTES")
    tensor._raw_content = raw
    with Stream(server.grpc) as stream:
        stream._client.async_stream_infer("llama", [tensor])
        with pytest.raises(InferenceServerException, match=message or None):
            stream.next()
    again = post(server.http, GENERATE, {"text_input": PROMPT, "max_tokens": 2})
    assert again.status == 200, again.body


def test_grpc_request_parameters_are_checked_and_tritons_own_are_left_to_it(
    server: Server,
) -> None:
    request = {"text_input": PROMPT, "max_tokens": 3}
    with Stream(server.grpc) as stream:
        stream.send("llama", request, parameters={"seed": 3, "min_p": 0.1, "logprobs": "1"})
        assert len(stream.rest()) == 1
        stream.send("llama", request, request_id="7", priority=1, timeout=10**8)
        assert len(stream.rest()) == 1
        stream.send("llama", request, parameters={"sead": 3})
        with pytest.raises(InferenceServerException, match="unknown parameter 'sead'"):
            stream.rest()


def test_a_request_without_a_prompt_is_a_sentence_and_no_traceback(server: Server) -> None:
    answer = post(server.http, GENERATE, {"max_tokens": 3})
    assert answer.status == 400
    assert answer.json["error"] == "text_input is missing; send the prompt as one text, or messages"
    assert "Traceback" not in server.log


@pytest.mark.parametrize(
    ("line", "other", "message"),
    [
        ("max_batch_size: 0", "max_batch_size: 8", "max_batch_size: 8, but Slipstream batches"),
        ("decoupled: true", "decoupled: false", "decoupled: false }, but a stream has many"),
        (
            "max_batch_size: 0",
            'input { name: "lora" data_type: TYPE_STRING dims: [ 1 ] }',
            "declares the input 'lora', which Slipstream never reads; take it out",
        ),
    ],
)
def test_a_configuration_that_cannot_be_is_a_sentence(
    server: Server,
    admin: http_client.InferenceServerClient,
    long_engine: Path,
    line: str,
    other: str,
    message: str,
) -> None:
    written = write_repository(server.repository, long_engine, Deployment("wrong"), {})
    file = written.model / "config.pbtxt"
    file.write_text(file.read_text().replace(line, other))
    with pytest.raises(InferenceServerException, match=re.escape(message)):
        admin.load_model("wrong")
    assert "Traceback" not in server.log


def test_a_stream_asked_of_generate_is_refused_by_triton_and_ends(server: Server) -> None:
    answer = post(server.http, GENERATE, {**ENDLESS, "max_tokens": 200})
    assert "generate expects model to produce exactly 1 response" in answer.json["error"]
    wait_until_idle(server)
