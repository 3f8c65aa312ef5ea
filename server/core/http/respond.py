"""From a job to an HTTP answer, in one piece or as a stream of events."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Protocol, cast

from fastapi import Request
from fastapi.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from slipstream.errors import SlipstreamError
from slipstream.runtime.engine.step import TokenLogprobs
from slipstream.runtime.request import RequestOutput
from slipstream.server.core.http.api import STATUSES
from slipstream.server.core.http.middleware import direct_send, log_fields
from slipstream.server.core.http.presence import ClientGone, while_present
from slipstream.server.core.job import Job
from slipstream.server.core.refusal import Refusal, internal_refusal, refusal_of
from slipstream.server.core.service import Item, Service
from slipstream.server.core.usage import Usage

_LOG = logging.getLogger(__name__)
_EVENT_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
PULSE_SECONDS = 5.0
_SCORE_SIZE = 50  # characters of a log probability, about
_NUMBER_SIZE = 12  # of a number of a vector
CLIENT_GONE = 499  # what nginx logs for it; nobody reads this answer


@dataclass(frozen=True, slots=True)
class StreamForm:
    """How a stream is told; ``pulse`` says nothing to a client, and nothing is a form without."""

    media_type: str
    pulse: bytes = b""


EVENTS = StreamForm("text/event-stream", b": waiting\n\n")


class Whole(Protocol):
    """Turns the outputs of a request into what the client of an API reads, in one piece."""

    @property
    def usage(self) -> Usage:
        """Tokens so far."""
        ...

    def body(self, outputs: Sequence[RequestOutput]) -> bytes:
        """The JSON of the whole answer, from outputs of kind ``final``."""
        ...


class Reply(Whole, Protocol):
    """The same, also as a stream of events."""

    def events(self, position: int, output: RequestOutput) -> bytes:
        """Events for an output of kind ``delta``, maybe none."""
        ...

    def end(self) -> bytes:
        """The events after the last output."""
        ...

    def error(self, refusal: Refusal) -> bytes:
        """The event that ends a stream in their place."""
        ...


def service_of(request: Request) -> Service:
    """The service of the application that a request came to."""
    return cast(Service, request.app.state.service)


async def respond(request: Request, job: Job, reply: Reply, form: StreamForm = EVENTS) -> Response:
    """Run a job for as long as its client is there.

    A stream begins with the first token, so that what goes wrong before has a status of its own, or
    when there was none for some seconds.
    """
    if job.kind != "delta":
        return await respond_whole(request, job, reply)
    items = service_of(request).run(job)
    first = asyncio.create_task(_next(items))
    try:
        await while_present(request.receive, _within(first, PULSE_SECONDS))
    except ClientGone:
        await _cancel(first)
        return Response(status_code=CLIENT_GONE)
    except BaseException:
        await _cancel(first)
        raise
    return EventStream(first, items, reply, form)


async def respond_whole(request: Request, job: Job, reply: Whole) -> Response:
    """Run a job whose outputs are of kind ``final``, for as long as its client is there."""
    service = service_of(request)
    outputs = _collect(service.run(job), len(job.prompts))
    try:
        found = await while_present(request.receive, outputs)
    except ClientGone:
        return Response(status_code=CLIENT_GONE)
    content = await service.llm.workers.run(_size(found), reply.body, found)
    log_fields(request.scope).update(_usage_fields(reply))
    return Response(content, media_type="application/json")


async def _next(items: AsyncGenerator[Item, None]) -> Item:
    return await anext(items)


async def _within(task: asyncio.Task[Item], seconds: float) -> None:
    """Wait for a task, so long; raise if it has failed."""
    done, _ = await asyncio.wait((task,), timeout=seconds)
    if done:
        task.result()


async def _cancel(task: asyncio.Task[Any]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


def _size(outputs: Sequence[RequestOutput]) -> int:
    """What an answer takes to write, in characters."""
    size = 0
    for output in outputs:
        size += _scores_size(output.prompt_logprobs or ())
        size += 0 if output.pooled is None else _NUMBER_SIZE * len(output.pooled)
        for completion in output.outputs:
            size += len(completion.text) + _scores_size(completion.logprobs or ())
    return size


def _scores_size(entries: Sequence[TokenLogprobs | None]) -> int:
    return _SCORE_SIZE * sum(1 + len(entry.top) for entry in entries if entry is not None)


async def _collect(items: AsyncGenerator[Item, None], count: int) -> list[RequestOutput]:
    async with aclosing(items):
        outputs = {position: output async for position, output in items}
    return [outputs[position] for position in range(count)]


def _usage_fields(reply: Whole) -> dict[str, int]:
    tokens = reply.usage.tokens()
    del tokens["total_tokens"]
    return tokens


class EventStream(StreamingResponse):
    """Events in their form; an error is the last of them.

    Where nothing is to be told for some seconds, the pulse is, lest a proxy takes the connection
    for dead. Ends, and with it the generator of outputs, when the client is gone.
    """

    def __init__(
        self,
        first: asyncio.Task[Item],
        items: AsyncGenerator[Item, None],
        reply: Reply,
        form: StreamForm,
    ) -> None:
        super().__init__((), headers=_EVENT_HEADERS, media_type=form.media_type)
        self._first = first
        self._items = items
        self._reply = reply
        self._pulse_bytes = form.pulse
        self._quiet = not first.done()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events."""
        fields = log_fields(scope)
        try:
            await while_present(receive, self._send(scope, send))
        except ClientGone:
            fields["client_gone"] = True
        finally:
            fields.update(_usage_fields(self._reply))

    async def _send(self, scope: Scope, send: Send) -> None:
        headers = self.raw_headers
        await send({"type": "http.response.start", "status": self.status_code, "headers": headers})
        send = direct_send(scope)
        pulse = asyncio.create_task(self._pulse(send))
        try:
            await self._send_items(send)
            end = self._reply.end()
        except SlipstreamError as error:
            end = self._error(refusal_of(error), scope)
        except Exception:  # noqa: BLE001 - the stream is open: the client must be told here
            _LOG.exception("a stream failed")
            end = self._error(internal_refusal(), scope)
        finally:
            await _cancel(pulse)
        await send({"type": "http.response.body", "body": end, "more_body": False})

    def _error(self, refusal: Refusal, scope: Scope) -> bytes:
        log_fields(scope)["error"] = STATUSES[refusal.kind]
        return self._reply.error(refusal)

    async def _pulse(self, send: Send) -> None:
        while self._pulse_bytes:
            if self._quiet:
                body = self._pulse_bytes
                await send({"type": "http.response.body", "body": body, "more_body": True})
            self._quiet = True
            await asyncio.sleep(PULSE_SECONDS)

    async def _send_items(self, send: Send) -> None:
        events_of = self._reply.events
        try:
            first = events_of(*await self._first)
        except BaseException:
            await _cancel(self._first)
            raise
        async with aclosing(self._items):
            self._quiet = False
            await send({"type": "http.response.body", "body": first, "more_body": True})
            async for position, output in self._items:
                if events := events_of(position, output):
                    self._quiet = False
                    await send({"type": "http.response.body", "body": events, "more_body": True})
