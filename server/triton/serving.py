"""Requests in flight, each a task of one event loop."""

from __future__ import annotations

import asyncio
import logging
import sys
import threading
from contextlib import aclosing
from typing import Protocol

from slipstream.errors import ExecutionError, InvalidRequestError, SlipstreamError
from slipstream.runtime.chat.conversation import Conversation
from slipstream.runtime.engine_client import EngineClient
from slipstream.runtime.request import OutputKind
from slipstream.server.core.job import Job
from slipstream.server.core.options import ServerOptions
from slipstream.server.core.service import Metrics as ServiceMetrics
from slipstream.server.core.service import Service
from slipstream.server.triton.answers import Answer
from slipstream.server.triton.errors import CancelledError
from slipstream.server.triton.interface import CHAT
from slipstream.server.triton.outbox import Call, Outbox, Reply
from slipstream.server.triton.parameters import Query

_LOG = logging.getLogger(__name__)
# How many requests may wait is for Triton to say.
_OPTIONS = ServerOptions(max_queued_requests=sys.maxsize)


class Metrics(ServiceMetrics, Protocol):
    """Who counts, and tells Triton."""

    def publish(self) -> None:
        """Tell what has changed; called a few times a second by another thread."""
        ...

    def close(self) -> None:
        """Forget everything."""
        ...


class Serving:
    """Answers any number of requests at a time with one engine, which it owns."""

    def __init__(self, llm: EngineClient, metrics: Metrics) -> None:
        self._service = Service(llm, _OPTIONS, metrics)
        self._metrics = metrics
        self._outbox = Outbox(metrics.publish)
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(
            target=self._loop.run_forever, name="slipstream-requests", daemon=True
        )
        self._thread.start()

    @property
    def unavailable(self) -> str | None:
        """Why no request is taken now."""
        return self._service.unavailable

    def submit(self, query: Query, reply: Reply) -> None:
        """Begin to answer, and return at once; from any thread."""
        self._loop.call_soon_threadsafe(self._begin, query, reply)

    def close(self) -> None:
        """End what is running with an error, free the engine and stop the threads."""
        self._service.llm.shutdown()
        asyncio.run_coroutine_threadsafe(self._finish(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self._outbox.close()
        self._metrics.close()

    def _begin(self, query: Query, reply: Reply) -> None:
        task: asyncio.Task[None]

        def cancel() -> None:
            self._loop.call_soon_threadsafe(task.cancel)

        turns = None
        if isinstance(query.prompt, Conversation):
            turns = self._service.turns(query.prompt, query.params)
        call = Call(reply, Answer(query, self._service.texts, turns), cancel)
        task = self._loop.create_task(self._answer(query, call))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        self._outbox.open(call)

    async def _finish(self) -> None:
        await asyncio.gather(*self._tasks)
        await self._loop.shutdown_default_executor()

    async def _answer(self, query: Query, call: Call) -> None:
        kind: OutputKind = "delta" if query.stream else "final"
        job = Job([query.prompt], query.params, kind, fields=query.fields)
        try:
            async with aclosing(self._service.run(job)) as items:
                async for _, output in items:
                    self._outbox.put(call, output)
        except asyncio.CancelledError:
            self._outbox.put(call, CancelledError("the request was cancelled"))
        except InvalidRequestError as error:
            self._outbox.put(call, _named(error, query))
        except SlipstreamError as error:
            self._outbox.put(call, error)
        except BaseException as error:  # noqa: BLE001 - a client must never wait for ever
            _LOG.exception("a request failed")
            self._outbox.put(call, ExecutionError(f"the request failed: {error!r}"))


def _named(error: InvalidRequestError, query: Query) -> InvalidRequestError:
    """An error in whose text the input stands that it is about."""
    name = error.param
    if name is None or name in str(error) or name not in {*query.fields.values(), *CHAT}:
        return error
    return InvalidRequestError(f"{name}: {error}", param=name)
