"""``POST /v1/embeddings``."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, cast

import numpy as np
from fastapi import APIRouter, Request
from fastapi.responses import Response
from numpy.typing import NDArray
from pydantic import Field

from slipstream.runtime.pooling import PoolingParams
from slipstream.runtime.request import RequestOutput
from slipstream.runtime.request_factory import Prompt
from slipstream.server.core.dump import dump
from slipstream.server.core.fields import Flag, Int
from slipstream.server.core.http.respond import respond_whole, service_of
from slipstream.server.core.limits import MAX_NUMBERS
from slipstream.server.core.refusal import Refusal
from slipstream.server.core.usage import Usage
from slipstream.server.openai.pooling import Answer, PoolingRequest, job_of

router = APIRouter()
_Ids = Annotated[list[Annotated[Int, Field(ge=0)]], Field(fail_fast=True, min_length=1)]
_Texts = Annotated[list[str], Field(fail_fast=True, min_length=1)]
_Lists = Annotated[list[_Ids], Field(fail_fast=True, min_length=1)]


class EmbeddingRequest(PoolingRequest):
    """The body of ``/v1/embeddings``."""

    input: str | _Texts | _Ids | _Lists = Field(
        description="A text or token ids, or a list of either.", examples=["Why is the sky blue?"]
    )
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Field(strict=True, ge=1)] | None = None
    add_special_tokens: Flag = None
    prompt_name: str | None = Field(
        None, description="Which of the model's prompts stands before each text."
    )


@router.post("/v1/embeddings", responses={200: {"content": {"application/json": {}}}})
async def create_embeddings(body: EmbeddingRequest, request: Request) -> Response:
    """The vector of every input."""
    service = service_of(request)
    reply = EmbeddingReply(Answer("embd-", service.model(body.model)), body.encoding_format)
    params = PoolingParams(
        dimensions=body.dimensions,
        normalize=body.normalize,
        truncate_prompt_tokens=body.truncate_prompt_tokens,
        add_special_tokens=body.add_special_tokens is not False,
        prompt_name=body.prompt_name,
    )
    pooling, prompts = service.llm.vectors_of(params), _prompts(body)
    numbers = len(prompts) * (body.dimensions or pooling.dimensions)
    if numbers > MAX_NUMBERS:
        raise Refusal(
            "invalid",
            f"the answer would hold {numbers} numbers; one request takes {MAX_NUMBERS}. Lower "
            "dimensions, or send several requests",
            param="input",
        )
    return await respond_whole(
        request, job_of(body, prompts, [params] * len(prompts), "input"), reply
    )


def _prompts(request: EmbeddingRequest) -> list[Prompt]:
    given = request.input
    if isinstance(given, str) or isinstance(given[0], int):
        return [cast(Prompt, given)]
    return list(cast(list[Prompt], given))


@dataclass(slots=True)
class EmbeddingReply:
    """The answer to ``/v1/embeddings``."""

    answer: Answer
    encoding: Literal["float", "base64"] | None

    @property
    def usage(self) -> Usage:
        """Tokens so far."""
        return self.answer.usage

    def body(self, outputs: Sequence[RequestOutput]) -> bytes:
        """The list of ``embedding`` objects."""
        write = _base64 if self.encoding == "base64" else _numbers
        vectors = enumerate(write(cast(Any, output.pooled)) for output in outputs)
        entries = (f'{{"object":"embedding","index":{i},"embedding":{v}}}' for i, v in vectors)
        data = ",".join(entries)
        head = {"object": "list", **self.answer.head(), "usage": self.answer.count(outputs)}
        return f'{{"data":[{data}],'.encode() + dump(head).removeprefix(b"{")


def _numbers(vector: NDArray[np.float32]) -> str:
    """A list with as many digits as tell one float32 from its neighbours."""
    return f"[{','.join(map('{:.9g}'.format, vector.tolist()))}]"


def _base64(vector: NDArray[np.float32]) -> str:
    """The numbers one after the other, little-endian, as OpenAI's client reads them."""
    return f'"{base64.b64encode(vector.astype("<f4").tobytes()).decode()}"'
