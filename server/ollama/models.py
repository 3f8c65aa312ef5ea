"""What the server says of its model: ``/api/tags``, ``show``, ``ps`` and ``version``."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from fastapi import APIRouter, Request

from slipstream import __version__
from slipstream.builder.engine import Engine
from slipstream.server.core.http.respond import service_of
from slipstream.server.core.service import Service
from slipstream.server.engine_summary import parameters_of
from slipstream.server.ollama.conversation import knows_tools
from slipstream.server.ollama.names import served, tagged
from slipstream.server.ollama.protocol import NamedRequest
from slipstream.server.ollama.route import JsonRoute
from slipstream.server.text import format_count

router = APIRouter(route_class=JsonRoute)
_NEVER = "9999-12-31T23:59:59Z"  # a served model stays


@router.get("/api/tags")
async def list_models(request: Request) -> dict[str, Any]:
    """The names under which the model can be asked."""
    service = service_of(request)
    return {"models": [_listed(service, name) for name in service.names]}


@router.get("/api/ps")
async def list_running(request: Request) -> dict[str, Any]:
    """The same: what is served is loaded, and stays."""
    service = service_of(request)
    engine = service.llm.engine
    on_gpu = engine is not None and engine.manifest.on_gpu
    running = {"expires_at": _NEVER, "context_length": service.llm.config.max_seq_len}
    listed = [_listed(service, name) for name in service.names]
    return {"models": [{**m, **running, "size_vram": m["size"] * on_gpu} for m in listed]}


@router.get("/api/version")
async def version() -> dict[str, str]:
    """The version of Slipstream."""
    return {"version": __version__}


@router.post("/api/show")
async def show(body: NamedRequest, request: Request) -> dict[str, Any]:
    """What the model is and can do."""
    service = service_of(request)
    served(service, body.model or body.name)
    tokenizer = service.llm.tokenizer
    return {
        "modified_at": _time(service),
        "template": tokenizer.chat_template or "",
        "details": _details(service.llm.engine),
        "model_info": _model_info(service),
        "capabilities": _capabilities(service),
    }


def _listed(service: Service, name: str) -> dict[str, Any]:
    engine = service.llm.engine
    return {
        "name": tagged(name),
        "model": tagged(name),
        "modified_at": _time(service),
        "size": 0 if engine is None else _size(engine),
        "digest": service.llm.fingerprint,
        "details": _details(engine),
    }


def _time(service: Service) -> str:
    """When the server was started with the model."""
    return datetime.fromtimestamp(service.created, UTC).isoformat().replace("+00:00", "Z")


def _size(engine: Engine) -> int:
    """Bytes of the engine's files."""
    files = [engine.path / name for name in engine.manifest.files]
    return sum(file.stat().st_size for file in files if file.is_file())


def _details(engine: Engine | None) -> dict[str, Any]:
    details: dict[str, Any] = {"parent_model": "", "format": "slipstream"}
    if engine is None:
        return details
    family, parameters = str(engine.manifest.model["architecture"]), parameters_of(engine)
    return {
        **details,
        "family": family,
        "families": [family],
        "parameter_size": format_count(parameters.total) if parameters else "",
        "quantization_level": engine.manifest.quantization,
    }


def _model_info(service: Service) -> dict[str, Any]:
    engine, length = service.llm.engine, service.llm.config.max_seq_len
    if engine is None:
        return {"general.context_length": length}
    model, parameters = engine.manifest.model, parameters_of(engine)
    family = str(model["architecture"])
    info = {
        "general.architecture": family,
        f"{family}.context_length": length,
        f"{family}.embedding_length": model["hidden_size"],
        f"{family}.block_count": model["num_layers"],
        f"{family}.attention.head_count": model["num_heads"],
        f"{family}.attention.head_count_kv": model["num_kv_heads"],
        f"{family}.vocab_size": model["vocab_size"],
    }
    return {**info, "general.parameter_count": parameters.total} if parameters else info


def _capabilities(service: Service) -> list[str]:
    if service.llm.pooling is not None:
        return ["embedding"] if service.llm.pooling.task == "embed" else []
    able = {"tools": knows_tools(service.dialect), "thinking": service.dialect.thinks}
    return ["completion", *(name for name, found in able.items() if found)]
