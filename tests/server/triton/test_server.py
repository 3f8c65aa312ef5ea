"""A real Triton Inference Server with the real clients."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import tritonclient.grpc.aio as grpc_aio
import tritonclient.http as http_client
from tests.server.triton.clients import (
    ENDLESS,
    GENERATE,
    GENERATE_STREAM,
    PROMPT,
    Stream,
    opened,
    post,
    tensors,
    text_of,
)
from tests.server.triton.harness import (
    Server,
    install,
    running,
    running_requests,
    wait_for,
    wait_until_idle,
)
from tritonclient.utils import InferenceServerException

from slipstream.runtime.llm import LLM
from slipstream.runtime.request import CompletionOutput
from slipstream.runtime.sampling.params import SamplingParams
from slipstream.server.core.metrics import FAMILIES
from slipstream.server.triton.repository import Deployment, write_repository

pytestmark = pytest.mark.triton_server


@pytest.fixture(scope="module")
def llm(long_engine: Path) -> Iterator[LLM]:
    """The Python API on the same engine."""
    with LLM(long_engine, kv_cache_bytes=64 << 20) as llm:
        yield llm


def python(llm: LLM, prompt: str = PROMPT, **sampling: Any) -> CompletionOutput:  # noqa: ANN401
    """What the Python API answers."""
    (output,) = llm.generate([prompt], SamplingParams(**sampling))
    return output.outputs[0]


@pytest.mark.parametrize(
    ("sampling", "inputs"),
    [
        ({"temperature": 0.0, "max_tokens": 24}, {"temperature": 0, "max_tokens": 24}),
        (
            {"temperature": 0.7, "seed": 7, "max_tokens": 24, "top_p": 0.9},
            {"temperature": 0.7, "random_seed": 7, "max_tokens": 24, "top_p": 0.9},
        ),
        (
            {"temperature": 0.0, "max_tokens": 60, "stop": ["he"]},
            {"temperature": 0, "max_tokens": 60, "stop_words": ["he", ""], "bad_words": ""},
        ),
        (
            {"temperature": 1.0, "seed": 3, "max_tokens": 9, "logit_bias": {5: 10.0}},
            {"sampling_parameters": '{"seed": "3", "max_tokens": 9, "logit_bias": {"5": 10.0}}'},
        ),
    ],
)
def test_text_is_that_of_the_python_api(
    server: Server, llm: LLM, sampling: dict[str, Any], inputs: dict[str, Any]
) -> None:
    expected = python(llm, **sampling)
    request = {"text_input": PROMPT, **inputs, "return_finish_reason": True}
    request["return_num_output_tokens"] = True
    answer = post(server.http, GENERATE, {**request, "exclude_input_in_output": True})
    assert answer.status == 200, answer.body
    assert answer.json["text_output"] == expected.text
    assert answer.json["finish_reason"] == expected.finish_reason
    assert answer.json["num_output_tokens"] == len(expected.token_ids)
    streamed = post(server.http, GENERATE_STREAM, {**request, "stream": True}).events
    assert "".join(event["text_output"] for event in streamed) == expected.text
    assert {event["finish_reason"] for event in streamed[:-1]} <= {"None"}
    assert streamed[-1]["finish_reason"] == expected.finish_reason
    assert sum(event["num_output_tokens"] for event in streamed) == len(expected.token_ids)


def test_a_single_answer_begins_with_the_prompt_and_a_stream_does_not(
    server: Server, llm: LLM
) -> None:
    text = python(llm, temperature=0.0, max_tokens=8).text
    request = {"text_input": PROMPT, "temperature": 0, "max_tokens": 8}
    assert post(server.http, GENERATE, request).json["text_output"] == PROMPT + text
    events = post(server.http, GENERATE_STREAM, {**request, "stream": True}).events
    assert "".join(event["text_output"] for event in events) == text
    request |= {"stream": True, "exclude_input_in_output": False}
    events = post(server.http, GENERATE_STREAM, request).events
    assert "".join(event["text_output"] for event in events) == PROMPT + text


def test_without_stream_there_is_exactly_one_response_on_every_endpoint(server: Server) -> None:
    request = {"text_input": PROMPT, "max_tokens": 30}
    assert list(post(server.http, GENERATE, request).json) == [
        "model_name",
        "model_version",
        "text_output",
    ]
    assert len(post(server.http, GENERATE_STREAM, request).events) == 1
    with Stream(server.grpc) as stream:
        stream.send("llama", request)
        assert len(stream.rest()) == 1


def test_grpc_streams_every_output(server: Server, llm: LLM) -> None:
    expected = python(llm, temperature=0.0, max_tokens=40, logprobs=2)
    assert expected.logprobs is not None and expected.cumulative_logprob is not None
    flags = [f"return_{name}" for name in ("finish_reason", "cumulative_logprob", "logprobs")]
    flags += ["return_num_input_tokens", "return_num_output_tokens"]
    with Stream(server.grpc) as stream:
        request = {"text_input": PROMPT, "stream": True, "temperature": 0.0, "max_tokens": 40}
        request["sampling_parameters"] = '{"logprobs": 2}'
        stream.send("llama", {**request, **dict.fromkeys(flags, True)}, request_id="mine")
        responses = stream.rest()
    assert text_of(responses) == expected.text
    assert responses[-1]["finish_reason"].tolist() == [b"length"]
    assert responses[-1]["cumulative_logprob"][0] == pytest.approx(expected.cumulative_logprob)
    assert sum(int(outputs["num_output_tokens"][0]) for outputs in responses) == 40
    assert {int(outputs["num_input_tokens"][0]) for outputs in responses} == {
        len(llm.tokenizer.encode(PROMPT))
    }
    told = [entry for outputs in responses for entry in json.loads(outputs["logprobs"][0])]
    assert len(told) == 40
    for entry, logprobs in zip(told, expected.logprobs, strict=True):
        assert entry[str(logprobs.token_id)]["rank"] == logprobs.rank
        assert entry[str(logprobs.token_id)]["logprob"] == pytest.approx(logprobs.logprob)
        assert len(entry) == len({logprobs.token_id, *logprobs.top})


def test_several_completions_are_elements_of_each_output(server: Server, llm: LLM) -> None:
    options = '{"n": 3, "seed": 5, "max_tokens": 12, "temperature": 0.9}'
    with Stream(server.grpc) as stream:
        request = {"text_input": PROMPT, "stream": True, "sampling_parameters": options}
        stream.send("llama", {**request, "return_finish_reason": True})
        responses = stream.rest()
    params = SamplingParams(n=3, seed=5, max_tokens=12, temperature=0.9)
    (expected,) = llm.generate([PROMPT], params)
    joined = [
        b"".join(outputs["text_output"][index] for outputs in responses).decode()
        for index in range(3)
    ]
    assert joined == [completion.text for completion in expected.outputs]
    assert responses[-1]["finish_reason"].tolist() == [b"length"] * 3


def test_32_streams_share_the_batch(server: Server, llm: LLM) -> None:
    prompts = [f"the {'quick ' * (i % 5)}fox {i}" for i in range(32)]
    most = 0.0

    async def stream(client: Any, prompt: str) -> str:  # noqa: ANN401 - Triton's client
        async def requests() -> Any:  # noqa: ANN401
            inputs = {"text_input": prompt, "stream": True, "temperature": 0.0}
            yield {
                "model_name": "llama",
                "inputs": tensors({**inputs, "max_tokens": 300}),
            }

        text = b""
        async for result, error in client.stream_infer(requests()):
            assert error is None, error
            text += result.as_numpy("text_output")[0]
        return text.decode()

    async def watch() -> None:
        nonlocal most
        while True:
            most = max(most, await asyncio.to_thread(running_requests, server))
            await asyncio.sleep(0.02)

    async def everything() -> list[str]:
        async with grpc_aio.InferenceServerClient(f"127.0.0.1:{server.grpc}") as client:
            watcher = asyncio.create_task(watch())
            texts = await asyncio.gather(*(stream(client, prompt) for prompt in prompts))
            watcher.cancel()
        return texts

    texts = asyncio.run(everything())
    expected = llm.generate(prompts, SamplingParams(temperature=0.0, max_tokens=300))
    assert texts == [output.outputs[0].text for output in expected]
    assert most > 8
    wait_until_idle(server)


def test_a_cancelled_grpc_stream_ends_at_once(server: Server) -> None:
    aborted = server.metric("request_success_total", "llama", finished_reason="abort")
    with Stream(server.grpc) as stream:
        stream.send("llama", ENDLESS)
        assert not stream.next().final
        wait_for(lambda: running_requests(server) == 1, "the request runs")
        stream.cancel()
        wait_until_idle(server)
    assert server.metric("request_success_total", "llama", finished_reason="abort") == aborted + 1


def test_an_answer_in_one_piece_is_cancelled_too(server: Server) -> None:
    with Stream(server.grpc) as stream:
        stream.send("llama", {**ENDLESS, "stream": False})
        wait_for(lambda: running_requests(server) == 1, "the request runs")
        stream.cancel()
        wait_until_idle(server)


def test_a_request_that_waits_is_cancelled_too(server: Server) -> None:
    with Stream(server.grpc) as first, Stream(server.grpc) as second:
        for _ in range(40):  # max_batch_size
            first.send("llama", {**ENDLESS, "stream": False})
        wait_for(lambda: running_requests(server) == 40, "the batch is full")
        second.send("llama", ENDLESS)
        waiting = "num_requests_waiting"
        wait_for(lambda: server.metric(waiting, "llama") == 1, "the request waits")
        second.cancel()
        wait_for(lambda: server.metric(waiting, "llama") == 0, "it does not wait")
        assert running_requests(server) == 40
        first.cancel()
        wait_until_idle(server)


def test_a_closed_http_stream_ends_at_once(server: Server) -> None:
    with opened(server.http, GENERATE_STREAM, ENDLESS) as response:
        assert response.read(1) == b"d"
        wait_for(lambda: running_requests(server) == 1, "the request runs")
    wait_until_idle(server)


def test_the_death_of_a_client_frees_its_pages(server: Server) -> None:
    code = (
        "import sys; from tests.server.triton.clients import Stream\n"
        "stream = Stream(int(sys.argv[1]))\n"
        "for _ in range(3): stream.send('llama', eval(sys.argv[2]))\n"
        "print(not stream.next().final, flush=True); stream.next(); input()\n"
    )
    command = [sys.executable, "-c", code, str(server.grpc), repr(ENDLESS)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, cwd=Path(__file__).parents[3]) as child:
        assert child.stdout is not None and child.stdout.readline() == b"True\n"
        wait_for(lambda: running_requests(server) == 3, "its requests run")
        child.send_signal(signal.SIGKILL)
    wait_until_idle(server)


def test_a_client_of_generate_that_has_gone_frees_its_pages_in_the_end(server: Server) -> None:
    # Triton does not tell that it has gone: docs/triton.md.
    body = json.dumps({**ENDLESS, "stream": False, "max_tokens": 1000}).encode()
    head = f"POST {GENERATE} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.http)) as connection:
        connection.sendall(head.encode() + body)
        wait_for(lambda: running_requests(server) == 1, "the request runs")
    wait_until_idle(server)


def test_the_example_streams_an_answer(server: Server, llm: LLM) -> None:
    client = Path(__file__).parents[3] / "examples" / "triton" / "client.py"
    command = [sys.executable, "-W", "error", str(client), "llama", PROMPT]
    done = subprocess.run(
        [*command, f"127.0.0.1:{server.grpc}"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == python(llm, temperature=0.7, seed=1, max_tokens=64).text
    done = subprocess.run(
        [*command[:-2], "lama", PROMPT, f"127.0.0.1:{server.grpc}"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1 and "error: " in done.stderr and "lama" in done.stderr


def test_metrics_have_the_names_of_serve(server: Server) -> None:
    post(server.http, GENERATE, {"text_input": PROMPT, "max_tokens": 2})
    suffixes = {"gauge": "", "counter": "_total", "histogram": "_count"}
    for name, family in FAMILIES.items():
        server.metric(name + suffixes[family.kind], "llama")
    wait_for(
        lambda: server.metric("e2e_request_latency_seconds_count", "llama") > 0,
        "a request was counted",
    )


def processes(server: Server) -> set[int]:
    return {child.pid for child in psutil.Process(server.process.pid).children(recursive=True)}


def test_unload_ends_the_process_and_reload_starts_afresh(
    server: Server, admin: http_client.InferenceServerClient
) -> None:
    with Stream(server.grpc) as stream:
        stream.send("llama", {**ENDLESS, "max_tokens": 300})
        assert not stream.next().final
        before = processes(server)
        admin.unload_model("llama")  # what runs is answered to its end
        assert len(stream.rest()) > 0
    wait_for(lambda: not admin.is_model_ready("llama"), "the model is unloaded")
    wait_for(lambda: not processes(server), "the memory of the model is given back")
    assert not server.metric_lines()
    assert post(server.http, GENERATE, {"text_input": PROMPT}).status == 404
    admin.load_model("llama")
    assert processes(server) and not processes(server) & before
    assert server.metric("kv_cache_usage_perc", "llama") == 0
    answer = post(server.http, GENERATE, {"text_input": PROMPT, "max_tokens": 2})
    assert answer.status == 200


def test_instances_and_versions(
    server: Server, admin: http_client.InferenceServerClient, long_engine: Path
) -> None:
    options = {"kv_cache_bytes": 16 << 20}
    plan = Deployment("several", version_policy="all", instances=2)
    write_repository(server.repository, long_engine, plan, options)
    plan = replace(plan, version=2, copy_engine=True)
    write_repository(server.repository, long_engine, plan, {**options, "max_seq_len": 64})
    admin.load_model("several")
    try:
        for version, status in ((1, 200), (2, 400)):
            path = f"/v2/models/several/versions/{version}/generate"
            request = {"text_input": "fox " * 200, "max_tokens": 2}
            answers = [post(server.http, path, request).status for _ in range(4)]
            assert answers == [status] * 4
        families = [
            line
            for line in server.metric_lines()
            if line.startswith("slipstream:kv_cache_usage_perc") and '"several"' in line
        ]
        assert len(families) == 4
        for engine in "01":
            count = partial(
                server.metric, "prompt_tokens_total", "several", version="1", engine=engine
            )
            wait_for(count, f"instance {engine} answers requests")
    finally:
        admin.unload_model("several")


def test_a_broken_engine_is_one_sentence_and_an_unavailable_model(
    server: Server, admin: http_client.InferenceServerClient, long_engine: Path
) -> None:
    written = write_repository(
        server.repository, long_engine, Deployment("broken", copy_engine=True), {}
    )
    weights = written.model / "1" / "engine" / "weights.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(InferenceServerException, match=r"weights\.safetensors"):
        admin.load_model("broken")
    state = next(m for m in admin.get_model_repository_index() if m["name"] == "broken")
    assert state["state"] == "UNAVAILABLE"
    assert "weights.safetensors" in state["reason"] and "slipstream build" in state["reason"]
    lines = [line for line in server.log.splitlines() if "weights.safetensors" in line]
    assert lines and "Traceback" not in server.log
    assert not admin.is_model_ready("broken")
    assert post(server.http, GENERATE, {"text_input": PROMPT, "max_tokens": 2}).status == 200


@pytest.mark.skipif(np.__version__ < "2", reason="this environment's NumPy is what Triton wants")
def test_a_triton_older_than_numpy_2_says_so(server: Server, tmp_path: Path) -> None:
    for name in ("models", "backends"):
        (tmp_path / name).symlink_to(server.repository / name)
    environment = Path(sys.prefix)
    with (
        running(install(), tmp_path, environment=environment) as other,
        http_client.InferenceServerClient(f"127.0.0.1:{other.http}") as client,
        pytest.raises(InferenceServerException, match="install numpy<2"),
    ):
        client.load_model("llama")
