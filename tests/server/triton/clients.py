"""Clients of a server: HTTP as curl would do it, and Triton's own gRPC client."""

from __future__ import annotations

import http.client
import json
import queue
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import tritonclient.grpc as grpc_client
from numpy.typing import NDArray
from tritonclient.utils import InferenceServerException

PROMPT = "the quick brown fox"
# Runs until it is cancelled: 16000 steps of a millisecond.
ENDLESS: dict[str, Any] = {
    "text_input": PROMPT,
    "stream": True,
    "max_tokens": 16000,
    "sampling_parameters": '{"ignore_eos": true}',
}
GENERATE = "/v2/models/llama/generate"
GENERATE_STREAM = "/v2/models/llama/generate_stream"
_TYPES = {bool: "BOOL", str: "BYTES", list: "BYTES"}
_NAMED_TYPES = {"temperature": "FP32", "top_p": "FP32", "max_tokens": "INT32", "top_k": "INT32"}
_NAMED_TYPES |= {"random_seed": "UINT64", "repetition_penalty": "FP32", "min_tokens": "INT32"}
_DTYPES = {"BOOL": np.bool_, "BYTES": np.object_, "FP32": np.float32, "INT32": np.int32}
_DTYPES["UINT64"] = np.uint64


@dataclass(frozen=True)
class Reply:
    """An answer over HTTP."""

    status: int
    body: bytes

    @property
    def json(self) -> dict[str, Any]:
        """The body of /generate."""
        decoded: dict[str, Any] = json.loads(self.body)
        return decoded

    @property
    def events(self) -> list[dict[str, Any]]:
        """The events of /generate_stream."""
        lines = self.body.decode().splitlines()
        return [json.loads(line.removeprefix("data: ")) for line in lines if line]


def post(port: int, path: str, body: object) -> Reply:
    """POST JSON, or bytes as they are, and read everything."""
    with opened(port, path, body) as response:
        return Reply(response.status, response.read())


@contextmanager
def opened(port: int, path: str, body: object) -> Iterator[http.client.HTTPResponse]:
    """POST and read the head of the response only; the connection is closed at the end."""
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=30)) as connection:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        connection.request("POST", path, content, {"Content-Type": "application/json"})
        with connection.getresponse() as response:
            yield response


def tensors(values: dict[str, Any]) -> list[grpc_client.InferInput]:
    """Inputs of a request; a text is one element, a list of texts several."""
    inputs = []
    for name, value in values.items():
        kind = _NAMED_TYPES.get(name) or _TYPES[type(value)]
        items = value if isinstance(value, list) else [value]
        array: NDArray[Any] = np.array(items, _DTYPES[kind])
        tensor = grpc_client.InferInput(name, [len(items)], kind)
        tensor.set_data_from_numpy(array)
        inputs.append(tensor)
    return inputs


@dataclass(frozen=True)
class Response:
    """One response over gRPC."""

    outputs: dict[str, NDArray[Any]]
    final: bool


class Stream:
    """A gRPC stream with one or more requests in flight."""

    def __init__(self, port: int) -> None:
        self._client = grpc_client.InferenceServerClient(f"127.0.0.1:{port}")
        self._events: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._client.start_stream(lambda result, error: self._events.put(error or result))

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def send(self, model: str, values: dict[str, Any], **options: Any) -> None:  # noqa: ANN401
        """Send a request; ``options`` are those of ``async_stream_infer``."""
        self._client.async_stream_infer(model, tensors(values), **options)

    def next(self) -> Response:
        """The next response; raises its error."""
        event = self._events.get(timeout=30)
        if isinstance(event, InferenceServerException):
            raise event
        message = event.get_response()
        outputs = {output.name: event.as_numpy(output.name) for output in message.outputs}
        return Response(outputs, message.parameters["triton_final_response"].bool_param)

    def rest(self) -> list[dict[str, NDArray[Any]]]:
        """The outputs of all responses to the one request in flight, up to the final one."""
        responses = []
        final = False
        while not final:
            response = self.next()
            responses.append(response.outputs)
            final = response.final
        return responses

    def cancel(self) -> None:
        """Cancel what is in flight."""
        self._client.stop_stream(cancel_requests=True)


def text_of(responses: list[dict[str, NDArray[Any]]]) -> str:
    """The joined text of the first completion."""
    return b"".join(outputs["text_output"][0] for outputs in responses).decode()
