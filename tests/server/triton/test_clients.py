"""What clients of vLLM's and TensorRT-LLM's backends send, to a real Triton Inference Server."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.http as http_client
from numpy.typing import NDArray
from tests.server.triton.clients import GENERATE, PROMPT, Stream, post, text_of
from tests.server.triton.harness import Server
from tritonclient.grpc import InferInput
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from slipstream.runtime.llm import LLM
from slipstream.runtime.sampling.params import SamplingParams
from slipstream.server.core.sampling import DEFAULT_COMPLETION_TOKENS

pytestmark = pytest.mark.triton_server

# As vLLM's sample client and its tests write numbers.
VLLM: dict[str, Any] = {"temperature": "0", "top_p": "1"}


@pytest.fixture(scope="module")
def ensemble(server: Server, admin: http_client.InferenceServerClient) -> Iterator[Server]:
    """The server, with the ensemble loaded."""
    admin.load_model("ensemble")
    yield server
    admin.unload_model("ensemble")
    admin.load_model("llama")  # the models of an ensemble are unloaded with it


@pytest.fixture(scope="module")
def greedy(long_engine: Any) -> str:  # noqa: ANN401 - a path
    """What the model says to the prompt, of the length that is the default."""
    params = SamplingParams(temperature=0, max_tokens=DEFAULT_COMPLETION_TOKENS)
    with LLM(long_engine, kv_cache_bytes=64 << 20) as llm:
        (output,) = llm.generate([PROMPT], params)
    return output.outputs[0].text


@pytest.mark.parametrize("as_tensor", [True, False])
@pytest.mark.parametrize("stream", [True, False])
def test_vllms_clients_send_parameters_twice(
    server: Server, greedy: str, as_tensor: bool, stream: bool
) -> None:
    inputs: dict[str, Any] = {"text_input": PROMPT, "stream": stream}
    if as_tensor:
        inputs["sampling_parameters"] = json.dumps(VLLM)
    with Stream(server.grpc) as calls:
        calls.send("llama", inputs, request_id="7", parameters=VLLM)
        assert text_of(calls.rest()) == (greedy if stream else PROMPT + greedy)


@pytest.mark.parametrize("cumulative", [True, False])
def test_log_probabilities_that_nobody_counted_are_null(server: Server, cumulative: bool) -> None:
    request = {"text_input": PROMPT, "max_tokens": 2, "return_logprobs": True}
    request["return_cumulative_logprob"] = cumulative
    answer = post(server.http, GENERATE, request).json
    assert answer["logprobs"] == "null"
    assert answer.get("cumulative_logprob", -1) < 0
    answer = post(server.http, GENERATE, {**request, "logprobs": 0}).json
    assert [len(entry) for entry in json.loads(answer["logprobs"])] == [1, 1]


def test_a_conversation_is_answered_in_the_models_template(
    server: Server, long_engine: Path
) -> None:
    messages = [{"role": "user", "content": PROMPT}]
    with LLM(long_engine, kv_cache_bytes=64 << 20) as llm:
        (output,) = llm.chat(messages, SamplingParams(temperature=0, max_tokens=9))
    request = {"messages": json.dumps(messages), "max_tokens": 9, "temperature": 0}
    answer = post(server.http, GENERATE, {**request, "return_num_input_tokens": True})
    assert answer.status == 200, answer.body
    assert answer.json["text_output"] == output.outputs[0].text
    assert answer.json["num_input_tokens"] == len(output.prompt_token_ids)
    assert (answer.json["reasoning_output"], answer.json["tool_calls"]) == ("", "[]")
    answer = post(server.http, GENERATE, {**request, "messages": "{}"})
    assert answer.status == 400 and answer.json["error"].startswith("messages={} is not a list")


def test_the_ensemble_holds_answers_to_guides(ensemble: Server) -> None:
    guide = {"guided_decoding_guide_type": "regex", "guided_decoding_guide": "(yes|no)"}
    (outputs,) = send(ensemble, text_input=PROMPT, exclude_input_in_output=True, **guide)
    assert text_of([outputs]) in ("yes", "no")


def batch_of_one(**inputs: Any) -> list[Any]:  # noqa: ANN401 - elements of many types
    """Tensors with a batch dimension, as clients of TensorRT-LLM send them."""
    types: dict[str, Any] = {"seed": np.uint64, "end_id": np.int32, "pad_id": np.int32}
    tensors = []
    for name, value in inputs.items():
        items = value if isinstance(value, list) else [value]
        kind = {str: np.object_, bool: np.bool_, int: np.int32, float: np.float32}[type(items[0])]
        array: NDArray[Any] = np.array([items], types.get(name, kind))
        tensor = InferInput(name, array.shape, np_to_triton_dtype(array.dtype))
        tensor.set_data_from_numpy(array)
        tensors.append(tensor)
    return tensors


def test_tensorrt_llms_clients_find_their_ensemble(ensemble: Server, greedy: str) -> None:
    request = {"text_input": PROMPT, "max_tokens": DEFAULT_COMPLETION_TOKENS, "beam_width": 1}
    request |= {"temperature": 0.0, "repetition_penalty": 1.0, "length_penalty": 1.0, "pad_id": 0}
    request |= {"stop_words": [""], "bad_words": [""], "seed": 3, "num_return_sequences": 1}
    for stream, exclude in ((True, False), (True, True), (False, False), (False, True)):
        whole = {**request, "stream": stream, "exclude_input_in_output": exclude}
        responses = send(ensemble, **whole)
        assert all(outputs["text_output"].shape == (1,) for outputs in responses)
        assert text_of(responses) == (greedy if stream or exclude else PROMPT + greedy)
    with pytest.raises(InferenceServerException, match="beam_width=4: there is no beam search"):
        send(ensemble, **{**request, "beam_width": 4})
    with pytest.raises(InferenceServerException, match="unexpected inference input 'lora_task_id'"):
        send(ensemble, **request, lora_task_id=1)


def test_the_ensemble_gives_what_tensorrt_llms_clients_ask_for(ensemble: Server) -> None:
    flags = dict.fromkeys(("return_log_probs", "return_num_input_tokens"), True)
    request = {"text_input": PROMPT, "max_tokens": 5, "end_id": 2, "num_return_sequences": 2}
    (outputs,) = send(ensemble, **request, **flags, return_num_output_tokens=True)
    assert outputs["text_output"].shape == (2,)
    assert outputs["num_input_tokens"].shape == (1, 1)
    assert outputs["cum_log_probs"].shape == outputs["num_output_tokens"].shape == (1, 2)
    lengths = outputs["num_output_tokens"][0]
    assert outputs["output_log_probs"].shape == (1, 2, max(lengths))
    for row, total in zip(outputs["output_log_probs"][0], outputs["cum_log_probs"][0], strict=True):
        assert sum(row) == pytest.approx(total, rel=1e-4)


def test_the_ensemble_answers_over_http(ensemble: Server, greedy: str) -> None:
    request = {"text_input": PROMPT, "max_tokens": 5, "bad_words": "", "stop_words": ""}
    request |= {"pad_id": 2, "end_id": 2, "parameters": {"temperature": 0}}
    answer = post(ensemble.http, GENERATE.replace("llama", "ensemble"), request)
    assert answer.status == 200, answer.body
    assert (PROMPT + greedy).startswith(answer.json["text_output"])
    answer = post(ensemble.http, GENERATE.replace("llama", "ensemble"), {"max_tokens": 5})
    assert (answer.status, "text_input is missing" in answer.json["error"]) == (400, True)


def send(server: Server, **inputs: Any) -> list[dict[str, NDArray[Any]]]:  # noqa: ANN401
    with Stream(server.grpc) as stream:
        stream._client.async_stream_infer("ensemble", batch_of_one(**inputs))
        return stream.rest()
