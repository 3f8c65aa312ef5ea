"""``/v1/models``."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

from slipstream.server.core.http.respond import service_of
from slipstream.server.core.service import Service

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
