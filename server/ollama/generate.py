"""``POST /api/generate``."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import Response

from slipstream.runtime.chat.conversation import Conversation
from slipstream.runtime.request import OutputKind
from slipstream.runtime.request_factory import Prompt
from slipstream.server.core.http.respond import respond, service_of
from slipstream.server.core.job import Job
from slipstream.server.core.refusal import Refusal
from slipstream.server.core.service import Service
from slipstream.server.ollama.conversation import question_of
from slipstream.server.ollama.names import served
from slipstream.server.ollama.protocol import GenerateRequest
from slipstream.server.ollama.reply import (
    GENERATED,
    LINES,
    OllamaReply,
    Said,
    as_response,
    loaded,
)
from slipstream.server.ollama.route import JsonRoute
from slipstream.server.ollama.sampling import FIELDS, params_of

router = APIRouter(route_class=JsonRoute)


@router.post("/api/generate", responses=GENERATED)
async def generate(body: GenerateRequest, request: Request) -> Response:
    """Answer a prompt; an empty one asks whether the model is loaded."""
    service = service_of(request)
    model = served(service, body.model)
    if not body.prompt:
        return Response(loaded(model, as_response(Said())), media_type="application/json")
    params = params_of(body, service.defaults)
    prompt = _prompt(body, body.prompt, service)
    turns = service.turns(prompt, params) if isinstance(prompt, Conversation) else None
    context: list[int] | None = None if body.raw else []
    reply = OllamaReply(model, service.texts, as_response, turns, context)
    kind: OutputKind = "final" if body.stream is False else "delta"
    fields = {"messages": "prompt", **FIELDS}
    if body.context:
        fields["prompt"] = "context"
    return await respond(request, Job([prompt], params, kind, fields=fields), reply, LINES)


def _prompt(body: GenerateRequest, text: str, service: Service) -> Prompt | Conversation:
    """As it is, if it is raw or the model has no template, and nothing else is said."""
    name = next((n for n in ("system", "think", "context") if getattr(body, n)), None)
    if body.raw and name is not None:
        raise Refusal(
            "invalid",
            f"a raw prompt is given to the model as it is, without {name}; leave one of them out",
            param=name,
        )
    if body.context and body.system:
        raise Refusal(
            "invalid",
            "context begins with its system message already; leave out system, or context",
            param="system",
        )
    shaped = service.llm.tokenizer.has_chat_template or body.system or body.context
    plain = body.raw or not shaped
    return text if plain else question_of(body, service.dialect)
