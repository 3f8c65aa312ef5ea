"""What the server says of itself: models, health, metrics, version, and the page at ``/``."""

from __future__ import annotations

from importlib.resources import files
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST

from slipstream import __version__
from slipstream.server.metrics import render
from slipstream.server.openai.errors import ApiError
from slipstream.server.openai.respond import service_of
from slipstream.server.openai.service import Service

router = APIRouter()


@router.get("/v1/models")
async def list_models(request: Request) -> dict[str, Any]:
    """The names under which the model can be asked."""
    service = service_of(request)
    return {"object": "list", "data": [_model(service, name) for name in service.names]}


@router.get("/v1/models/{model:path}")
async def retrieve_model(model: str, request: Request) -> dict[str, Any]:
    """One model."""
    service = service_of(request)
    return _model(service, service.model(model))


def _model(service: Service, name: str) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": service.created,
        "owned_by": "slipstream",
        "root": service.names[0],
        "max_model_len": service.llm.config.max_seq_len,
    }


@router.get("/health")
async def health(request: Request) -> dict[str, str]:
    """200 while requests are taken, 503 when the server drains or its engine has stopped."""
    reason = service_of(request).unavailable
    if reason is not None:
        raise ApiError(503, reason)
    return {"status": "ok"}


@router.get("/metrics")
def metrics(request: Request) -> Response:
    """Metrics in Prometheus' text format."""
    return Response(render(service_of(request).registry), media_type=CONTENT_TYPE_LATEST)


@router.get("/version")
async def version() -> dict[str, str]:
    """The version of the server."""
    return {"version": __version__}


@router.get("/", include_in_schema=False)
def page() -> Response:
    """A page to chat with the model."""
    file = files("slipstream.server.openai") / "page" / "index.html"
    if not file.is_file():
        raise ApiError(404, "this installation has no page; send requests to /v1")
    return HTMLResponse(file.read_text(encoding="utf-8"))
