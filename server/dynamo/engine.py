"""An engine as Dynamo drives it; needs ``ai-dynamo``."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from dynamo.common.backend.engine import EngineConfig, LLMEngine, LlmRegistration
from dynamo.common.backend.health_check import build_health_check_payload
from dynamo.common.backend.metrics import register_engine_registry
from dynamo.common.backend.publisher import ComponentSnapshot, ZmqSource
from dynamo.common.backend.worker import WorkerConfig
from dynamo.common.constants import DisaggregationMode
from dynamo.common.utils.token_ids import token_ids_to_list
from dynamo.llm.exceptions import EngineShutdown, InvalidArgument
from prometheus_client import CollectorRegistry

from slipstream.errors import CapacityError, ExecutionError, InvalidRequestError
from slipstream.runtime.async_llm import AsyncLLM
from slipstream.runtime.engine.handover import Handover
from slipstream.runtime.handover.exchange import Exchange
from slipstream.runtime.handover.files import FileTransport
from slipstream.runtime.kv_events.config import KvEventsConfig
from slipstream.runtime.loaded_engine import LoadedEngine
from slipstream.runtime.sampling.params import SamplingParams
from slipstream.server.core.metrics import PREFIX, EngineMetrics
from slipstream.server.core.offload_metrics import OffloadMetrics
from slipstream.server.dynamo.handover_metrics import HandoverMetrics
from slipstream.server.dynamo.options import DynamoOptions
from slipstream.server.dynamo.requests import (
    CANCELLED,
    Translator,
    cache_salt,
    counted_at_prefill,
    disaggregated_params,
    kv_transfer_params,
)

_LOG = logging.getLogger(__name__)
_RANK = 0  # one engine has one cache
_SNAPSHOT_SECONDS = 0.1


class SlipstreamEngine(LLMEngine):  # type: ignore[misc]
    """Answers requests of token ids; belongs to Dynamo's event loop.

    Dynamo registers the worker, watches it, cancels requests and lets them end on SIGTERM.
    """

    def __init__(self, engine: LoadedEngine, files: Path, options: DynamoOptions) -> None:
        """``files`` is what frontends read of the model."""
        self._engine = engine
        self._files = str(files)
        self._options = options
        self._events = engine.config.kv_events_config or KvEventsConfig()
        self._llm: AsyncLLM | None = None
        self._exchange: Exchange | None = None
        self._publisher: Any = None
        self._watching: asyncio.Task[None] | None = None
        self._open = 0  # requests
        self._idle = asyncio.Event()
        self._draining = False
        self.unhealthy: str | None = None

    @classmethod
    async def from_args(cls, argv: list[str] | None = None) -> tuple[SlipstreamEngine, Any]:
        """Dynamo's way to read a command line; ours is ``slipstream dynamo-worker``."""
        raise NotImplementedError("slipstream dynamo-worker reads the command line")

    def worker_config(self) -> Any:  # noqa: ANN401 - of Dynamo
        """How Dynamo is to run this engine."""
        options = self._options
        return WorkerConfig(
            namespace=options.namespace,
            component=options.component_name,
            endpoint=options.endpoint,
            model_name=self._files,
            served_model_name=options.served_model_name,
            discovery_backend=options.discovery_backend,
            request_plane=options.request_plane,
            event_plane=options.event_plane,
            tool_call_parser=options.tool_call_parser,
            reasoning_parser=options.reasoning_parser,
            enable_kv_routing=self._events.publishes,
            disaggregation_mode=DisaggregationMode(options.disaggregation_mode),
        )

    async def start(self, worker_id: int) -> Any:  # noqa: ANN401 - of Dynamo
        """Start the engine and say what it is."""
        self._llm = llm = AsyncLLM.from_engine(self._engine)
        self._watching = asyncio.create_task(self._watch(llm))
        name = self._options.served_model_name or ""
        self._metrics = EngineMetrics(name, llm)
        self._offload = OffloadMetrics(name, llm, PREFIX)
        self._translator = Translator(llm.generation_defaults, llm.tokenizer)
        self._exchange = self._opened_exchange(llm)
        config = self._engine.config
        return EngineConfig(
            model=self._files,
            served_model_name=self._options.served_model_name,
            llm=LlmRegistration(
                context_length=config.max_seq_len,
                kv_cache_block_size=config.page_size,
                total_kv_blocks=llm.stats.num_pages,
                max_num_seqs=config.max_batch_size,
                max_num_batched_tokens=config.max_num_tokens,
            ),
        )

    async def generate(
        self,
        request: dict[str, Any],
        context: Any,  # noqa: ANN401 - of Dynamo
    ) -> AsyncGenerator[dict[str, Any], None]:
        """The chunks of one request; raises Dynamo's errors."""
        llm = self._llm
        if llm is None or self._draining:
            raise EngineShutdown("the worker is ending; another one goes on")
        with self._counted():
            try:
                async with aclosing(self._chunks(llm, request, context)) as chunks:
                    async for chunk in chunks:
                        yield chunk
            except (InvalidRequestError, CapacityError) as error:
                raise InvalidArgument(str(error)) from error
            except ExecutionError as error:
                if llm.closed is not None:  # another worker goes on with it
                    raise EngineShutdown(str(error)) from error
                raise

    async def _chunks(
        self,
        llm: AsyncLLM,
        request: dict[str, Any],
        context: Any,  # noqa: ANN401 - of Dynamo
    ) -> AsyncGenerator[dict[str, Any], None]:
        tokens, salt = token_ids_to_list(request["token_ids"]), cache_salt(request)
        ask = partial(self._answer, llm, context, tokens, salt)
        exchange = self._exchange
        if exchange is None:
            async with aclosing(ask(self._translator.params(request), None)) as chunks:
                async for chunk in chunks:
                    yield chunk
        elif self._options.disaggregation_mode == "prefill":
            params = self._translator.prefill_params(request)
            async with (
                exchange.sending(tokens, salt) as sending,
                aclosing(ask(params, sending.handover)) as chunks,
            ):
                async for chunk in chunks:
                    if chunk.get("finish_reason", CANCELLED) != CANCELLED:
                        chunk["disaggregated_params"] = disaggregated_params(await sending.send())
                    yield chunk
        else:
            params, told = self._translator.params(request), kv_transfer_params(request)
            async with (
                exchange.receiving(told, tokens, salt) as handover,
                aclosing(ask(params, handover)) as chunks,
            ):
                async for chunk in chunks:
                    yield counted_at_prefill(chunk, request)

    async def _answer(
        self,
        llm: AsyncLLM,
        context: Any,  # noqa: ANN401 - of Dynamo
        tokens: list[int],
        salt: str,
        params: SamplingParams,
        handover: Handover | None,
    ) -> AsyncGenerator[dict[str, Any], None]:
        if context.is_stopped():  # while slots for its pages were waited for
            return
        watch, told = self._metrics.watch(params.max_tokens), 0
        outputs = llm.generate(
            tokens,
            params,
            context.id(),
            output_kind="delta",
            cache_salt=salt,
            handover=handover,
        )
        try:
            async with aclosing(outputs):
                async for output in outputs:
                    watch.see(output)
                    chunk = self._translator.chunk(output, told)
                    told += len(chunk["token_ids"])
                    yield chunk
        except (asyncio.CancelledError, GeneratorExit):
            watch.close("abort")
            raise
        except ExecutionError:
            watch.close("error")
            raise

    @contextmanager
    def _counted(self) -> Iterator[None]:
        self._open += 1
        try:
            yield
        finally:
            self._open -= 1
            if not self._open:
                self._idle.set()

    async def abort(self, context: Any) -> None:  # noqa: ANN401 - of Dynamo
        """End a request that nobody waits for."""
        if self._llm is not None:
            await self._llm.abort(context.id())

    async def cleanup(self) -> None:
        """Let open requests end, for a while, and free the device; twice does nothing.

        Dynamo has told frontends before that they send no more; those whose requests are still open
        then go on elsewhere.
        """
        self._draining = True
        if self._open and self._llm is not None and self._llm.unhealthy is None:
            self._idle.clear()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._idle.wait(), self._options.drain_timeout)
        llm, self._llm = self._llm, None
        exchange, self._exchange = self._exchange, None
        if exchange is not None:
            await exchange.close()
        if llm is not None:
            self.unhealthy = llm.unhealthy
            await asyncio.to_thread(llm.shutdown)
        if self._watching is not None:
            await self._watching

    async def is_quiescent(self) -> bool | None:
        """Whether nobody is to take pages any more; a worker for prompts waits for that."""
        return self._exchange is None or self._exchange.is_quiescent()

    async def kv_event_sources(self) -> list[Any]:
        """Where the events of the prefix cache are heard."""
        if not self._events.publishes:
            return []
        endpoint = self._events.endpoint.replace("*", "127.0.0.1")
        return [ZmqSource(endpoint=endpoint, topic=self._events.topic, dp_rank=_RANK)]

    async def health_check_payload(self) -> dict[str, Any]:
        """A request that shows whether the engine computes."""
        payload: dict[str, Any] = build_health_check_payload(bos_token_id=0)
        return payload

    async def register_prometheus(self, metrics: Any) -> None:  # noqa: ANN401 - of Dynamo
        """Have the metrics of ``slipstream serve`` told beside Dynamo's."""
        registry = CollectorRegistry(auto_describe=False)
        registry.register(self._metrics)
        registry.register(self._offload)
        if self._exchange is not None:
            name = self._options.served_model_name or ""
            registry.register(HandoverMetrics(name, self._exchange.stats, PREFIX))
        register_engine_registry(metrics, registry, prefix_filters=[PREFIX])

    def component_metrics_dp_ranks(self) -> list[int]:
        """Whose load is told."""
        return [_RANK]

    def attach_snapshot_publisher(self, publisher: Any) -> None:  # noqa: ANN401 - of Dynamo
        """Tell the load from now on."""
        self._publisher = publisher

    def _opened_exchange(self, llm: AsyncLLM) -> Exchange | None:
        """With whom prompts are handed over, where that is asked for."""
        if (staging := llm.staging) is None:
            return None
        timeout = self._options.kv_transfer_timeout
        transport = FileTransport(Path(self._options.kv_transfer_path), staging, timeout)
        return Exchange(staging, transport, llm.fingerprint, timeout)

    async def _watch(self, llm: AsyncLLM) -> None:
        """Tell the load, and end the worker when the engine is given up."""
        told = None
        while self._llm is llm:
            if llm.unhealthy is not None:
                _LOG.error("the engine is unhealthy: %s", llm.unhealthy)
                os.kill(os.getpid(), signal.SIGTERM)  # as Dynamo is told to end
                return
            snapshot = _snapshot(llm)
            if self._publisher is not None and snapshot != told:
                self._publisher.publish(_RANK, snapshot)
                told = snapshot
            await asyncio.sleep(_SNAPSHOT_SECONDS)


def _snapshot(llm: AsyncLLM) -> Any:  # noqa: ANN401 - of Dynamo
    stats = llm.stats
    queries = stats.prefix_cache_queries
    return ComponentSnapshot(
        kv_used_blocks=round(stats.kv_cache_usage * stats.num_pages),
        kv_total_blocks=stats.num_pages,
        gpu_cache_usage=stats.kv_cache_usage,
        kv_cache_hit_rate=stats.prefix_cache_hits / queries if queries else None,
        dp_rank=_RANK,
    )
