"""What the server says of itself: health, load, metrics and version."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter, Request
from fastapi.responses import Response
from prometheus_client import CONTENT_TYPE_LATEST

from slipstream import __version__
from slipstream.server.core.http.respond import service_of
from slipstream.server.core.metrics import Gathered
from slipstream.server.core.refusal import Refusal

router = APIRouter()
_TEXT = {"schema": {"type": "string"}}


@router.get("/health")
@router.get("/ping")
@router.post("/ping")  # as SageMaker asks
async def health(request: Request) -> dict[str, str]:
    """200 while requests are taken, 503 when the server drains or its engine is unhealthy."""
    reason = service_of(request).unavailable
    if reason is not None:
        raise Refusal("unavailable", reason)
    return {"status": "ok"}


@router.get("/load")
async def load(request: Request) -> dict[str, int]:
    """How many requests run or wait."""
    return {"server_load": service_of(request).places.requests}


@router.get(
    "/metrics", response_class=Response, responses={200: {"content": {"text/plain": _TEXT}}}
)
async def metrics(request: Request) -> Response:
    """Metrics of all processes of the server in Prometheus' text format."""
    gathered: Gathered = await request.app.state.gather()
    text = await asyncio.to_thread(gathered.text, service_of(request).names[0])
    return Response(text, media_type=CONTENT_TYPE_LATEST)


@router.get("/version")
async def version() -> dict[str, str]:
    """The version of the server."""
    return {"version": __version__}
