"""The same request is the same answer everywhere: Python, OpenAI's HTTP interface and Triton."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import tritonclient.http as http_client
from tests.server.openai.serving import Running, serving
from tests.server.triton.clients import Stream, post
from tests.server.triton.harness import Server, install, running

from slipstream.errors import InvalidRequestError
from slipstream.runtime.llm import LLM
from slipstream.runtime.loading import load
from slipstream.runtime.sampling.params import SamplingParams
from slipstream.server.triton.repository import Deployment, write_repository

pytestmark = pytest.mark.triton_server

FOX = "the quick brown fox"
LIMITS = {"kv_cache_bytes": 16 << 20}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "greedy": (FOX, {"temperature": 0.0, "max_tokens": 24}),
    "one token": (FOX, {"temperature": 0.0, "max_tokens": 1}),
    "sampled": (FOX, {"temperature": 0.7, "seed": 11, "max_tokens": 24}),
    "sampled from few": (
        FOX,
        {"temperature": 1.3, "seed": 5, "top_p": 0.8, "top_k": 50, "min_p": 0.01, "max_tokens": 24},
    ),
    "penalties": (
        FOX,
        {
            "temperature": 0.0,
            "max_tokens": 32,
            "repetition_penalty": 1.3,
            "presence_penalty": 0.5,
            "frequency_penalty": 0.25,
        },
    ),
    "stop string": (FOX, {"temperature": 0.9, "seed": 1, "stop": ["e", "o"], "max_tokens": 60}),
    "stop string kept": (
        FOX,
        {
            "temperature": 0.9,
            "seed": 1,
            "stop": ["e", "o"],
            "include_stop_str_in_output": True,
            "max_tokens": 60,
        },
    ),
    "stop token": (
        FOX,
        {"temperature": 0.9, "seed": 2, "stop_token_ids": list(range(150)), "max_tokens": 60},
    ),
    "end of sequence": (FOX, {"temperature": 0.0, "logit_bias": {"1": 100.0}, "max_tokens": 9}),
    "past the end": (
        FOX,
        {"temperature": 0.0, "logit_bias": {"1": 100.0}, "ignore_eos": True, "max_tokens": 9},
    ),
    "special tokens shown": (
        FOX,
        {
            "temperature": 0.0,
            "logit_bias": {"1": 100.0},
            "min_tokens": 3,
            "skip_special_tokens": False,
            "ignore_eos": True,
            "max_tokens": 4,
        },
    ),
    "allowed tokens": (
        FOX,
        {"temperature": 1.0, "seed": 3, "allowed_token_ids": [70, 71, 72], "max_tokens": 12},
    ),
    "bad words": (FOX, {"temperature": 0.0, "bad_words": ["o", "!"], "max_tokens": 24}),
    "several": (FOX, {"temperature": 1.0, "seed": 9, "n": 3, "max_tokens": 12}),
    "text of many scripts": ("déjà vu, 狐狸 🦊", {"temperature": 0.0, "max_tokens": 24}),
    "a long prompt": (f"{FOX} jumps. " * 20, {"temperature": 0.0, "max_tokens": 8}),
}
STOPPED = {"stop string", "stop string kept", "stop token", "end of sequence"}


@dataclass(frozen=True)
class Told:
    """What a surface says."""

    texts: list[str]
    reasons: list[str]
    prompt_tokens: int
    completion_tokens: int


@pytest.fixture(scope="module")
def python(tiny_engine: Path) -> Iterator[tuple[LLM, SamplingParams]]:
    """The Python API, and how the model samples by default."""
    engine = load(tiny_engine, LIMITS)
    with LLM.from_engine(engine) as llm:
        yield llm, engine.generation_defaults


@pytest.fixture(scope="module")
def openai(tiny_engine: Path) -> Iterator[Running]:
    """The OpenAI server."""
    with serving(load(tiny_engine, LIMITS)) as server:
        yield server


@pytest.fixture(scope="module")
def triton(tiny_engine: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Triton, with the model loaded."""
    directory = tmp_path_factory.mktemp("surfaces")
    write_repository(directory, tiny_engine, Deployment("tiny"), LIMITS)
    with running(install(), directory) as server:
        with http_client.InferenceServerClient(f"127.0.0.1:{server.http}") as client:
            client.load_model("tiny")
        yield server


def ask_python(python: tuple[LLM, SamplingParams], prompt: str, sampling: dict[str, Any]) -> Told:
    llm, defaults = python
    bias = {int(k): v for k, v in sampling.get("logit_bias", {}).items()} or None
    (output,) = llm.generate([prompt], replace(defaults, **{**sampling, "logit_bias": bias}))
    return Told(
        [completion.text for completion in output.outputs],
        [str(completion.finish_reason) for completion in output.outputs],
        len(output.prompt_token_ids),
        sum(len(completion.token_ids) for completion in output.outputs),
    )


def ask_openai(server: Running, prompt: str, sampling: dict[str, Any]) -> Told:
    answer = server.post("/v1/completions", {"prompt": prompt, **sampling})
    assert answer.status_code == 200, answer.text
    choices, usage = answer.json()["choices"], answer.json()["usage"]
    return Told(
        [choice["text"] for choice in choices],
        [choice["finish_reason"] for choice in choices],
        usage["prompt_tokens"],
        usage["completion_tokens"],
    )


def stream_openai(server: Running, prompt: str, sampling: dict[str, Any]) -> Told:
    body = {**sampling, "prompt": prompt, "stream": True}
    answer = server.post("/v1/completions", {**body, "stream_options": {"include_usage": True}})
    assert answer.status_code == 200, answer.text
    lines = [line.removeprefix("data: ") for line in answer.text.splitlines() if line]
    assert lines.pop() == "[DONE]"
    chunks = [json.loads(line) for line in lines]
    count = sampling.get("n", 1)
    texts, reasons = [""] * count, [""] * count
    for choice in (choice for chunk in chunks for choice in chunk["choices"]):
        texts[choice["index"]] += choice["text"]
        reasons[choice["index"]] = choice["finish_reason"] or reasons[choice["index"]]
    usage = chunks[-1]["usage"]
    return Told(texts, reasons, usage["prompt_tokens"], usage["completion_tokens"])


FLAGS = {
    "exclude_input_in_output": True,
    "return_finish_reason": True,
    "return_num_input_tokens": True,
    "return_num_output_tokens": True,
}


def ask_triton(server: Server, prompt: str, sampling: dict[str, Any]) -> Told:
    body = {"text_input": prompt, "sampling_parameters": json.dumps(sampling), **FLAGS}
    answer = post(server.http, "/v2/models/tiny/generate", body)
    assert answer.status == 200, answer.body
    several = sampling.get("n", 1) > 1
    values = {
        name: answer.json[name] if several else [answer.json[name]]
        for name in ("text_output", "finish_reason", "num_output_tokens")
    }
    return Told(
        values["text_output"],
        values["finish_reason"],
        answer.json["num_input_tokens"],
        sum(values["num_output_tokens"]),
    )


def stream_triton(server: Server, prompt: str, sampling: dict[str, Any]) -> Told:
    request = {"text_input": prompt, "stream": True, "sampling_parameters": json.dumps(sampling)}
    with Stream(server.grpc) as stream:
        stream.send("tiny", {**request, **FLAGS})
        responses = stream.rest()
    count = sampling.get("n", 1)
    texts = [b"".join(r["text_output"][index] for r in responses) for index in range(count)]
    return Told(
        [text.decode() for text in texts],
        [reason.decode() for reason in responses[-1]["finish_reason"]],
        int(responses[-1]["num_input_tokens"][0]),
        sum(int(r["num_output_tokens"].sum()) for r in responses),
    )


@pytest.mark.parametrize("case", CASES)
def test_text_finish_reason_and_usage_are_the_same_everywhere(
    case: str, python: tuple[LLM, SamplingParams], openai: Running, triton: Server
) -> None:
    prompt, sampling = CASES[case]
    expected = ask_python(python, prompt, sampling)
    assert set(expected.reasons) == {"stop" if case in STOPPED else "length"}
    assert ask_openai(openai, prompt, sampling) == expected
    assert stream_openai(openai, prompt, sampling) == expected
    assert ask_triton(triton, prompt, sampling) == expected
    assert stream_triton(triton, prompt, sampling) == expected


@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": -1.0},
        {"top_p": -0.5},
        {"min_tokens": -1},
        {"min_tokens": 5, "max_tokens": 4},
        {"repetition_penalty": 0.0},
        {"stop_token_ids": [100_000]},
        {"allowed_token_ids": []},
    ],
    ids=str,
)
def test_a_mistake_is_explained_in_the_same_words_everywhere(
    sampling: dict[str, Any],
    python: tuple[LLM, SamplingParams],
    openai: Running,
    triton: Server,
) -> None:
    with pytest.raises(InvalidRequestError) as error:
        ask_python(python, FOX, sampling)
    answer = openai.post("/v1/completions", {"prompt": FOX, **sampling})
    assert (answer.status_code, answer.json()["error"]["message"]) == (400, str(error.value))
    body = {"text_input": FOX, "sampling_parameters": json.dumps(sampling)}
    refused = post(triton.http, "/v2/models/tiny/generate", body)
    assert (refused.status, refused.json["error"]) == (400, str(error.value))
