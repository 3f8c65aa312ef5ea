"""``POST /api/embed``, and ``/api/embeddings``, its older form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from fastapi import APIRouter, Request
from fastapi.responses import Response

from slipstream.runtime.pooling import PoolingParams
from slipstream.runtime.request import RequestOutput
from slipstream.runtime.sampling.params import SamplingParams
from slipstream.server.core.dump import dump
from slipstream.server.core.http.respond import respond_whole, service_of
from slipstream.server.core.job import Job
from slipstream.server.core.usage import Usage
from slipstream.server.core.vectors import check_numbers, vector_json
from slipstream.server.ollama.names import served
from slipstream.server.ollama.protocol import EmbeddingsRequest, EmbedRequest
from slipstream.server.ollama.reply import durations
from slipstream.server.ollama.route import JsonRoute

router = APIRouter(route_class=JsonRoute)
_NO_OUTPUT = SamplingParams(max_tokens=1)  # an engine that pools reads none of it


@dataclass(slots=True)
class EmbedReply:
    """The answer to ``/api/embed``."""

    model: str
    usage: Usage = field(default_factory=Usage)

    def body(self, outputs: Sequence[RequestOutput]) -> bytes:
        """The vectors of all inputs."""
        for position, output in enumerate(outputs):
            self.usage.add(output, position)
        vectors = ",".join(vector_json(cast(Any, output.pooled)) for output in outputs)
        times = durations(self.usage.metrics) if outputs else {}
        rest = {
            "model": self.model,
            "total_duration": times.get("total_duration", 0),
            "load_duration": times.get("load_duration", 0),
            "prompt_eval_count": self.usage.prompt,
        }
        return f'{{"embeddings":[{vectors}],'.encode() + dump(rest).removeprefix(b"{")


@router.post("/api/embed", responses={200: {"content": {"application/json": {}}}})
async def embed(body: EmbedRequest, request: Request) -> Response:
    """The vector, of length 1, of every input."""
    service = service_of(request)
    reply = EmbedReply(served(service, body.model))
    params = PoolingParams(
        dimensions=body.dimensions,
        normalize=True,
        truncate_prompt_tokens=None if body.truncate is False else -1,
    )
    texts = [body.input] if isinstance(body.input, str) else body.input
    check_numbers(len(texts) * (body.dimensions or service.llm.vectors_of(params).dimensions))
    if not texts:
        return Response(reply.body([]), media_type="application/json")
    fields = {"prompt": "input"}
    job = Job(texts, _NO_OUTPUT, "final", fields=fields, pooling=[params] * len(texts))
    return await respond_whole(request, job, reply)


@dataclass(slots=True)
class EmbeddingReply:
    """The answer to ``/api/embeddings``."""

    usage: Usage = field(default_factory=Usage)

    def body(self, outputs: Sequence[RequestOutput]) -> bytes:
        """The one vector."""
        (output,) = outputs
        self.usage.add(output)
        return f'{{"embedding":{vector_json(cast(Any, output.pooled))}}}'.encode()


@router.post("/api/embeddings", responses={200: {"content": {"application/json": {}}}})
async def embeddings(body: EmbeddingsRequest, request: Request) -> Response:
    """The vector of a prompt as the model leaves it, whatever its length; none asks whether the
    model is loaded."""
    service = service_of(request)
    served(service, body.model)
    params = PoolingParams(normalize=False, truncate_prompt_tokens=-1)
    service.llm.vectors_of(params)
    if not body.prompt:
        return Response(dump({"embedding": []}), media_type="application/json")
    job = Job([body.prompt], _NO_OUTPUT, "final", pooling=[params])
    return await respond_whole(request, job, EmbeddingReply())
