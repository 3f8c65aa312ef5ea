"""Vectors and scores for asyncio: what ``AsyncLLM`` does on an engine that pools."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Callable, Sequence, Sized
from contextlib import aclosing
from typing import Any, ParamSpec, TypeVar

import numpy as np
from numpy.typing import NDArray

from slipstream.builder.contract import Pooling
from slipstream.runtime.pooled_prompts import ScoredPairs, as_batch, as_texts, stacked
from slipstream.runtime.pooling import PoolingParams
from slipstream.runtime.request import Request, RequestOutput
from slipstream.runtime.request_factory import Prompt, RequestFactory
from slipstream.runtime.workers import Workers

P = ParamSpec("P")
T = TypeVar("T")


class AsyncPooling(ABC):
    """Pools prompts beside what else the engine does, in the same steps."""

    workers: Workers
    _factory: RequestFactory

    @abstractmethod
    async def render(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call what renders a chat template."""

    @abstractmethod
    def _outputs(self, request: Request) -> AsyncGenerator[RequestOutput, None]:
        """What the engine tells of a request."""

    @abstractmethod
    def _validate(self, request: Request) -> None:
        """Raise the typed error of a request that can never run."""

    @abstractmethod
    def _refuse_if_closed(self) -> None:
        """Raise ``ExecutionError`` where no request is taken any more."""

    async def pool(
        self,
        prompt: Prompt,
        pooling_params: PoolingParams | None = None,
        request_id: str | None = None,
        *,
        priority: int = 0,
        cache_salt: str = "",
    ) -> AsyncGenerator[RequestOutput, None]:
        """Pool one prompt: yields one output, whose ``pooled`` is the vector, or the score of a
        prompt that ``score_prompts`` made. Ends and raises as ``generate`` does."""
        self._refuse_if_closed()
        request = await self._made(
            self._factory.pooled,
            prompt,
            pooling_params or PoolingParams(),
            request_id=request_id,
            priority=priority,
            cache_salt=cache_salt,
        )
        async with aclosing(self._outputs(request)) as outputs:
            async for output in outputs:
                yield output

    async def embed(
        self, prompts: Prompt | Sequence[Prompt], pooling_params: PoolingParams | None = None
    ) -> NDArray[np.float32]:
        """The vectors of one prompt or many, as of ``LLM.embed``."""
        params = pooling_params or PoolingParams()
        self.vectors_of(params)
        batch = as_batch(prompts)
        return stacked(await self._pool_all(batch, [params] * len(batch)))

    async def score(
        self,
        query: str | Sequence[str],
        documents: str | Sequence[str],
        pooling_params: PoolingParams | None = None,
        **options: Any,  # noqa: ANN401 - those of score_prompts
    ) -> list[float]:
        """How well each document answers the query, as of ``LLM.score``."""
        texts = as_texts(query), as_texts(documents)
        pairs = await self.score_prompts(*texts, pooling_params, **options)
        return pairs.scores(await self._pool_all(pairs.prompts, pairs.params))

    def vectors_of(self, pooling_params: PoolingParams) -> Pooling:
        """How vectors are made; raises ``InvalidRequestError`` for an engine that makes none, or
        none of so many dimensions."""
        return self._factory.vectors_of(pooling_params)

    async def score_prompts(
        self,
        queries: Sequence[str],
        documents: Sequence[str],
        pooling_params: PoolingParams | None = None,
        *,
        instruction: str | None = None,
        max_tokens_per_doc: int | None = None,
    ) -> ScoredPairs:
        """What is to be pooled for the scores of documents; the arguments are those of
        ``LLM.score``."""
        return await self.render(
            self._factory.pooled_prompts.pairs,
            queries,
            documents,
            pooling_params or PoolingParams(),
            instruction=instruction,
            max_tokens_per_doc=max_tokens_per_doc,
        )

    async def _pool_all(
        self, prompts: Sequence[Prompt], params: Sequence[PoolingParams]
    ) -> list[RequestOutput]:
        """The outputs of all prompts; where one fails, the others are aborted."""
        tasks = [
            asyncio.ensure_future(self._pool_one(*each))
            for each in zip(prompts, params, strict=True)
        ]
        try:
            return list(await asyncio.gather(*tasks))
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _pool_one(self, prompt: Prompt, params: PoolingParams) -> RequestOutput:
        async with aclosing(self.pool(prompt, params)) as outputs:
            return await anext(outputs)

    async def _made(
        self,
        make: Callable[..., Request],
        prompt: Prompt,
        *arguments: Any,  # noqa: ANN401 - those of `make`
        **options: Any,  # noqa: ANN401
    ) -> Request:
        """A request that the engine can run. A long text takes milliseconds to encode; the event
        loop must not wait for it."""

        def checked() -> Request:
            request = make(prompt, *arguments, **options)
            self._validate(request)
            return request

        size = len(prompt) if isinstance(prompt, Sized) else 0  # what else it is, is told there
        return await self.workers.run(size, checked)
