"""What asks an engine, for asyncio: prompts are rendered and encoded here, wherever that runs."""

from __future__ import annotations

import asyncio
from abc import abstractmethod
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from functools import partial
from typing import Any, ParamSpec, Self, TypeVar

from slipstream.errors import ExecutionError
from slipstream.runtime.async_pooling import AsyncPooling
from slipstream.runtime.chat.composer import Composed, Composer
from slipstream.runtime.chat.conversation import Conversation
from slipstream.runtime.engine.handover import Handover
from slipstream.runtime.loaded_engine import Model
from slipstream.runtime.request import OutputKind, Request, RequestOutput
from slipstream.runtime.request_factory import Message, Prompt, RequestFactory
from slipstream.runtime.sampling.params import SamplingParams
from slipstream.runtime.structured.output import StructuredOutput
from slipstream.runtime.workers import Workers

P = ParamSpec("P")
T = TypeVar("T")

_NO_RENDERING = "the engine is being shut down and begins no conversation; load it again to go on"


class FrontEnd(AsyncPooling):
    """Prompts and conversations to requests, and the threads that this takes.

    Where requests run is for a subclass to say.
    """

    def _prepare(self, model: Model, factory: RequestFactory) -> None:
        self.tokenizer = model.tokenizer
        self.config = model.config
        self.generation_defaults = model.generation_defaults
        self.interactive_defaults = model.interactive_defaults
        self.fingerprint = model.fingerprint
        self.engine = model.engine
        self.pooling = model.pooling
        self.workers = Workers()
        self._factory = factory
        self._templates = ThreadPoolExecutor(1, "slipstream-template")
        self._renders = True

    @property
    @abstractmethod
    def closed(self) -> str | None:
        """Why no request is taken any more; None while they are."""

    @abstractmethod
    def shutdown(self) -> None:
        """End what is running and free what it used."""

    @abstractmethod
    async def _compile(self, form: StructuredOutput) -> None:
        """Compile a grammar that a request is about to need, where that is done here."""

    @abstractmethod
    def _validate(self, request: Request) -> None:
        """Raise the typed error of a request that can never run, where that is known here."""

    async def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        priority: int = 0,
        output_kind: OutputKind = "cumulative",
        cache_salt: str = "",
        handover: Handover | None = None,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Complete one prompt (a text or token ids), yielding after every token.

        Cached prompts are shared with those of equal ``cache_salt`` only. A consumer that is
        cancelled or closes the iterator aborts the request. Raises ``InvalidRequestError`` or
        ``CapacityError`` for a request that cannot run, and ``ExecutionError`` if the device fails;
        other requests go on. A ``handover`` is of an ``Exchange`` beside an engine of this process.
        """
        self._refuse_if_closed()
        if sampling_params is not None and sampling_params.structured is not None:
            await self._compile(sampling_params.structured)
        request = await self._made(
            self._factory.request,
            prompt,
            sampling_params,
            request_id=request_id,
            priority=priority,
            output_kind=output_kind,
            cache_salt=cache_salt,
            handover=handover,
        )
        async with aclosing(self._outputs(request)) as outputs:
            async for output in outputs:
                yield output

    async def chat(
        self,
        messages: Sequence[Message],
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        output_kind: OutputKind = "cumulative",
        **options: Any,  # noqa: ANN401 - fields of ChatOptions, and templates define their own
    ) -> AsyncGenerator[RequestOutput, None]:
        """Answer a conversation (a list of ``{"role": ..., "content": ...}``); see ``generate``.

        ``options`` are fields of ``ChatOptions``, such as ``tools`` and ``thinking``, and variables
        of the template. Each completion's ``turn`` has its thoughts, text and calls so far.
        """
        made = await self.compose(
            self._factory.composer,
            Conversation.of(messages, options),
            sampling_params or self.generation_defaults,
        )
        turns = made.output_turns(output_kind)
        outputs = self.generate(made.tokens, made.params, request_id, output_kind=output_kind)
        async with aclosing(outputs):
            async for output in outputs:
                turns.add(output)
                yield output

    async def compose(
        self,
        composer: Composer,
        conversation: Conversation,
        params: SamplingParams,
        add_special_tokens: bool = False,
    ) -> Composed:
        """What ``composer`` makes of a conversation, in threads; raises what that raises."""
        text = await self.render(composer.render, conversation)
        return await self.workers.run(
            len(text), composer.hold, conversation, text, params, add_special_tokens
        )

    async def render(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call what renders a chat template, in a thread that nothing else waits for: a template
        may take as long as it is allowed to. Raises what the call raises."""
        if not self._renders:
            raise ExecutionError(_NO_RENDERING)
        rendering = self._templates.submit(partial(function, *args, **kwargs))
        try:
            return await asyncio.wrap_future(rendering)
        except asyncio.CancelledError:
            if self._renders:
                raise
            raise ExecutionError(_NO_RENDERING) from None

    def stop_rendering(self) -> None:
        """Refuse to render chat templates, also for those that wait for it."""
        self._renders = False
        self._templates.shutdown(wait=False, cancel_futures=True)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.to_thread(self.shutdown)

    def _refuse_if_closed(self) -> None:
        if (reason := self.closed) is not None:
            raise ExecutionError(reason)
