"""``POST /api/chat``."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import Response

from slipstream.runtime.request import OutputKind
from slipstream.server.core.http.respond import respond, service_of
from slipstream.server.core.job import Job
from slipstream.server.ollama.conversation import conversation_of
from slipstream.server.ollama.names import served
from slipstream.server.ollama.protocol import OllamaChatRequest
from slipstream.server.ollama.reply import GENERATED, LINES, OllamaReply, Said, as_message, loaded
from slipstream.server.ollama.route import JsonRoute
from slipstream.server.ollama.sampling import FIELDS, params_of

router = APIRouter(route_class=JsonRoute)


@router.post("/api/chat", responses=GENERATED)
async def chat(body: OllamaChatRequest, request: Request) -> Response:
    """Answer a conversation; one of no messages asks whether the model is loaded."""
    service = service_of(request)
    model = served(service, body.model)
    if not body.messages:
        return Response(loaded(model, as_message(Said())), media_type="application/json")
    params = params_of(body, service.defaults)
    conversation = conversation_of(body, service.dialect)
    reply = OllamaReply(model, service.texts, as_message, service.turns(conversation, params))
    kind: OutputKind = "final" if body.stream is False else "delta"
    fields = {"prompt": "messages", **FIELDS}
    return await respond(request, Job([conversation], params, kind, fields=fields), reply, LINES)
