"""What a server needs of an engine, wherever that runs."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Sequence
from typing import ParamSpec, Protocol, TypeVar

from slipstream.builder.contract import Pooling
from slipstream.builder.engine import Engine
from slipstream.runtime.chat.composer import Composed, Composer
from slipstream.runtime.chat.conversation import Conversation
from slipstream.runtime.config import RuntimeConfig
from slipstream.runtime.engine.stats import EngineStats
from slipstream.runtime.pooled_prompts import ScoredPairs
from slipstream.runtime.pooling import PoolingParams
from slipstream.runtime.request import OutputKind, RequestOutput
from slipstream.runtime.request_factory import Prompt
from slipstream.runtime.sampling.params import SamplingParams
from slipstream.runtime.text.tokenizer import Tokenizer
from slipstream.runtime.workers import Workers

P = ParamSpec("P")
T = TypeVar("T")


class EngineClient(Protocol):
    """An engine that many requests share; it belongs to one event loop.

    ``AsyncLLM`` runs it in this process; ``RemoteLLM`` asks another process. Both render, encode
    and detokenize here, in ``workers`` where that takes long.
    """

    tokenizer: Tokenizer
    config: RuntimeConfig
    generation_defaults: SamplingParams
    interactive_defaults: SamplingParams
    fingerprint: str
    engine: Engine | None
    pooling: Pooling | None
    workers: Workers

    @property
    def closed(self) -> str | None:
        """Why no request is taken any more; None while they are."""
        ...

    @property
    def unhealthy(self) -> str | None:
        """Why the engine was given up, for good; None while it works."""
        ...

    def check_health(self) -> bool:
        """Whether the engine works; if it is to be given up, end all requests and refuse more."""
        ...

    async def fetch_stats(self) -> EngineStats:
        """What the scheduler is doing and has done."""
        ...

    def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        priority: int = 0,
        output_kind: OutputKind = "cumulative",
        cache_salt: str = "",
    ) -> AsyncGenerator[RequestOutput, None]:
        """Complete one prompt, yielding what is new; closing the iterator aborts the request.

        Raises ``InvalidRequestError`` or ``CapacityError`` for a request that cannot run, and
        ``ExecutionError`` if the device fails.
        """
        ...

    def pool(
        self,
        prompt: Prompt,
        pooling_params: PoolingParams | None = None,
        request_id: str | None = None,
        *,
        priority: int = 0,
        cache_salt: str = "",
    ) -> AsyncGenerator[RequestOutput, None]:
        """Pool one prompt, yielding one output."""
        ...

    def vectors_of(self, pooling_params: PoolingParams) -> Pooling:
        """How vectors are made; raises ``InvalidRequestError`` where none are."""
        ...

    async def score_prompts(
        self,
        queries: Sequence[str],
        documents: Sequence[str],
        pooling_params: PoolingParams | None = None,
        *,
        instruction: str | None = None,
        max_tokens_per_doc: int | None = None,
    ) -> ScoredPairs:
        """What is to be pooled for the scores of documents."""
        ...

    async def compose(
        self,
        composer: Composer,
        conversation: Conversation,
        params: SamplingParams,
        add_special_tokens: bool = False,
    ) -> Composed:
        """What ``composer`` makes of a conversation, in threads; raises what that raises."""
        ...

    async def render(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call what renders a chat template, in a thread that nothing else waits for."""
        ...

    def stop_rendering(self) -> None:
        """Refuse to render chat templates, also for those that wait for it."""
        ...

    async def abort(self, request_id: str) -> None:
        """End a request within one step; its iterator ends with ``finish_reason`` ``"abort"``."""
        ...

    def shutdown(self) -> None:
        """End what is running and free what it used."""
        ...
