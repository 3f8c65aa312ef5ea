"""From a job to an HTTP answer, in one piece or as a stream of events."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Protocol, cast

from fastapi import Request
from fastapi.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from slipstream.errors import SlipstreamError
from slipstream.runtime.request import RequestOutput
from slipstream.runtime.request_factory import Prompt
from slipstream.runtime.sampling.params import SamplingParams
from slipstream.server.core.http.api import STATUSES
from slipstream.server.core.http.middleware import direct_send, log_fields
from slipstream.server.core.http.presence import ClientGone, while_present
from slipstream.server.core.logs import log_event
from slipstream.server.core.refusal import Refusal, internal_refusal, refusal_of
from slipstream.server.core.service import Item, Job, Service
from slipstream.server.core.usage import Usage

_LOG = logging.getLogger(__name__)
_EVENT_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
CLIENT_GONE = 499  # what nginx logs for it; nobody reads this answer


class Reply(Protocol):
    """Turns the outputs of a request into what the client of an API reads."""

    @property
    def usage(self) -> Usage:
        """Tokens so far."""
        ...

    def events(self, position: int, output: RequestOutput) -> bytes:
        """Server-sent events for an output of kind ``delta``, maybe none."""
        ...

    def end(self) -> bytes:
        """The events after the last output."""
        ...

    def error(self, refusal: Refusal) -> bytes:
        """The event that ends a stream in their place."""
        ...

    def body(self, outputs: Sequence[RequestOutput]) -> bytes:
        """The JSON of the whole answer, from outputs of kind ``final``."""
        ...


def service_of(request: Request) -> Service:
    """The service of the application that a request came to."""
    return cast(Service, request.app.state.service)


def log_prompts(service: Service, prompts: Sequence[Prompt], params: SamplingParams) -> None:
    """Write prompts into the log, if that was asked for."""
    if service.options.log_prompts:
        log_event(_LOG, "prompts", {"prompts": list(prompts), "params": repr(params)})


async def respond(request: Request, job: Job, reply: Reply) -> Response:
    """Run a job for as long as its client is there.

    A stream begins with the first token, so that what goes wrong before has a status of its own.
    """
    items = service_of(request).run(job)
    try:
        if job.kind == "delta":
            first = await while_present(request.receive, _next(items))
            return EventStream(first, items, reply)
        outputs = await while_present(request.receive, _collect(items, len(job.prompts)))
    except ClientGone:
        return Response(status_code=CLIENT_GONE)
    body = reply.body
    if job.params.logprobs is None and job.params.prompt_logprobs is None:
        content = body(outputs)
    else:  # many numbers to write
        content = await asyncio.to_thread(body, outputs)
    log_fields(request.scope).update(_usage_fields(reply))
    return Response(content, media_type="application/json")


async def _next(items: AsyncGenerator[Item, None]) -> Item:
    return await anext(items)


async def _collect(items: AsyncGenerator[Item, None], count: int) -> list[RequestOutput]:
    async with aclosing(items):
        outputs = {position: output async for position, output in items}
    return [outputs[position] for position in range(count)]


def _usage_fields(reply: Reply) -> dict[str, int]:
    tokens = reply.usage.tokens()
    del tokens["total_tokens"]
    return tokens


class EventStream(StreamingResponse):
    """Server-sent events; an error is the last of them.

    Ends, and with it the generator of outputs, when the client is gone.
    """

    def __init__(self, first: Item, items: AsyncGenerator[Item, None], reply: Reply) -> None:
        super().__init__((), headers=_EVENT_HEADERS, media_type="text/event-stream")
        self._first = first
        self._items = items
        self._reply = reply

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
        try:
            await self._send_items(send)
            end = self._reply.end()
        except SlipstreamError as error:
            end = self._error(refusal_of(error), scope)
        except Exception:  # noqa: BLE001 - the stream is open: the client must be told here
            _LOG.exception("a stream failed")
            end = self._error(internal_refusal(), scope)
        await send({"type": "http.response.body", "body": end, "more_body": False})

    def _error(self, refusal: Refusal, scope: Scope) -> bytes:
        log_fields(scope)["error"] = STATUSES[refusal.kind]
        return self._reply.error(refusal)

    async def _send_items(self, send: Send) -> None:
        events_of = self._reply.events
        async with aclosing(self._items):
            first = events_of(*self._first)
            await send({"type": "http.response.body", "body": first, "more_body": True})
            async for position, output in self._items:
                if events := events_of(position, output):
                    await send({"type": "http.response.body", "body": events, "more_body": True})
