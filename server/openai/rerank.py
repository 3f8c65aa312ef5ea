"""``/v1/score`` and ``/v1/rerank``, in the shapes of vLLM, Jina and Cohere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import Field

from slipstream.runtime.pooled_prompts import ScoredPairs
from slipstream.runtime.pooling import PoolingParams
from slipstream.runtime.request import RequestOutput
from slipstream.server.core.dump import dump
from slipstream.server.core.fields import Flag
from slipstream.server.core.http.respond import respond_whole, service_of
from slipstream.server.core.refusal import Refusal, naming
from slipstream.server.core.usage import Usage
from slipstream.server.openai.pooling import Answer, PoolingRequest, job_of
from slipstream.server.openai.protocol import ContentPart

router = APIRouter()
_Texts = str | Annotated[list[str], Field(fail_fast=True, min_length=1)]
_Count = Annotated[int, Field(strict=True, ge=1)] | None
_JSON: dict[int | str, dict[str, Any]] = {200: {"content": {"application/json": {}}}}


class _PairRequest(PoolingRequest):
    instruction: str | None = Field(None, description="What a reranker is told to seek.")
    max_tokens_per_doc: _Count = None

    def params(self) -> PoolingParams:
        """How every prompt is pooled."""
        return PoolingParams(
            normalize=self.normalize, truncate_prompt_tokens=self.truncate_prompt_tokens
        )


class ScoreRequest(_PairRequest):
    """The body of ``/v1/score``: ``queries`` and ``documents``, or ``text_1`` and ``text_2``."""

    queries: _Texts | None = Field(None, examples=["Why is the sky blue?"])
    documents: _Texts | None = Field(None, examples=[["Air scatters blue light.", "It rains."]])
    text_1: _Texts | None = None
    text_2: _Texts | None = None


class RerankDocument(ContentPart):
    """A document as an object; only its text is read."""

    type: str = "text"
    text: str


class RerankRequest(_PairRequest):
    """The body of ``/v1/rerank``."""

    query: str = Field(examples=["Why is the sky blue?"])
    documents: Annotated[
        list[str | RerankDocument],
        Field(fail_fast=True, min_length=1, examples=[["Air scatters blue light.", "It rains."]]),
    ]
    top_n: Annotated[int, Field(strict=True, ge=0)] | None = None
    return_documents: Flag = None


@router.post("/v1/score", responses=_JSON)
@router.post("/score", responses=_JSON, include_in_schema=False)
async def score(body: ScoreRequest, request: Request) -> Response:
    """How well each document answers the query, or the query at its place."""
    model = service_of(request).model(body.model)
    queries, documents = _sides(body)
    pairs = await _pairs(body, request, queries, documents)
    reply = ScoreReply(Answer("score-", model), pairs)
    job = job_of(body, pairs.prompts, pairs.params, "documents")
    return await respond_whole(request, job, reply)


@router.post("/v1/rerank", responses=_JSON)
@router.post("/rerank", responses=_JSON, include_in_schema=False)
@router.post("/v2/rerank", responses=_JSON, include_in_schema=False)
async def rerank(body: RerankRequest, request: Request) -> Response:
    """The documents in the order of how well they answer a query."""
    model = service_of(request).model(body.model)
    documents = [each if isinstance(each, str) else each.text for each in body.documents]
    pairs = await _pairs(body, request, [body.query], documents)
    told = documents if body.return_documents is not False else None
    reply = RerankReply(Answer("rerank-", model), pairs, body.top_n or len(documents), told)
    job = job_of(body, pairs.prompts, pairs.params, "documents")
    return await respond_whole(request, job, reply)


def _sides(request: ScoreRequest) -> tuple[list[str], list[str]]:
    """Queries and documents, by whichever names they came."""
    named = {"queries": request.queries, "documents": request.documents}
    plain = {"text_1": request.text_1, "text_2": request.text_2}
    given = plain if request.text_1 is not None or request.text_2 is not None else named
    both = named if given is plain else plain
    if any(text is not None for text in both.values()):
        raise Refusal("invalid", "give queries and documents, or text_1 and text_2", param="text_1")
    for name, texts in given.items():
        if texts is None:
            raise Refusal("invalid", f"{name} is missing; give a text or several", param=name)
    query, document = given.values()
    return _listed(query), _listed(document)


def _listed(texts: str | list[str] | None) -> list[str]:
    return [texts] if isinstance(texts, str) else list(texts or ())


async def _pairs(
    body: _PairRequest, request: Request, queries: Sequence[str], documents: Sequence[str]
) -> ScoredPairs:
    """What is pooled for a request."""
    service = service_of(request)
    service.check_count(len(documents), "documents")
    with naming({"prompt": "documents"}):
        return await service.llm.score_prompts(
            queries,
            documents,
            body.params(),
            instruction=body.instruction,
            max_tokens_per_doc=body.max_tokens_per_doc,
        )


@dataclass(slots=True)
class ScoreReply:
    """The answer to ``/v1/score``."""

    answer: Answer
    pairs: ScoredPairs

    @property
    def usage(self) -> Usage:
        """Tokens so far."""
        return self.answer.usage

    def body(self, outputs: Sequence[RequestOutput]) -> bytes:
        """The list of ``score`` objects."""
        scores = enumerate(self.pairs.scores(outputs))
        data = [{"index": index, "object": "score", "score": number} for index, number in scores]
        head = {**self.answer.head(), "object": "list"}
        return dump({**head, "data": data, "usage": self.answer.count(outputs)})


@dataclass(slots=True)
class RerankReply:
    """The answer to ``/v1/rerank``: the ``most`` best, with their ``documents`` if those are to be
    told."""

    answer: Answer
    pairs: ScoredPairs
    most: int
    documents: Sequence[str] | None

    @property
    def usage(self) -> Usage:
        """Tokens so far."""
        return self.answer.usage

    def body(self, outputs: Sequence[RequestOutput]) -> bytes:
        """The results, the best first; of equal ones, the earlier."""
        scores = self.pairs.scores(outputs)
        order = sorted(range(len(scores)), key=lambda index: -scores[index])[: self.most]
        results = [self._result(index, scores[index]) for index in order]
        head = self.answer.head()
        return dump({**head, "results": results, "usage": self.answer.count(outputs)})

    def _result(self, index: int, score: float) -> dict[str, object]:
        told = {} if self.documents is None else {"document": {"text": self.documents[index]}}
        return {"index": index, **told, "relevance_score": score}
