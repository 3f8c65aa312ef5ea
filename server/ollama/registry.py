"""What Ollama does with its store of models, and a server of one model does not."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import Response

from slipstream.server.core.dump import dump
from slipstream.server.core.http.respond import service_of
from slipstream.server.core.refusal import Refusal
from slipstream.server.ollama.names import served
from slipstream.server.ollama.protocol import NamedRequest
from slipstream.server.ollama.reply import LINES
from slipstream.server.ollama.route import JsonRoute

router = APIRouter(route_class=JsonRoute, include_in_schema=False)
_SUCCESS = dump({"status": "success"})


@router.post("/api/pull")
async def pull(body: NamedRequest, request: Request) -> Response:
    """There at once, if it is the model that is served."""
    service = service_of(request)
    name = body.model or body.name
    try:
        served(service, name)
    except Refusal as refusal:
        raise Refusal(
            "not_found",
            f"{refusal.message}, and pulls no other; start one with: slipstream serve MODEL",
            param="model",
        ) from None
    if body.stream is False:
        return Response(_SUCCESS, media_type="application/json")
    return Response(_SUCCESS + b"\n", media_type=LINES.media_type)


@router.post("/api/create")
@router.post("/api/copy")
@router.delete("/api/delete")
@router.post("/api/push")
@router.post("/api/blobs/{digest}")
async def change() -> None:
    """Refuse."""
    raise Refusal(
        "invalid",
        "this server has the one model that it was started with, and makes, copies, deletes and "
        "pushes none; see slipstream build, and start another with: slipstream serve MODEL",
    )
