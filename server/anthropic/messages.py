"""``POST /v1/messages`` and ``/v1/messages/count_tokens``."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from slipstream.errors import InvalidRequestError
from slipstream.runtime.sampling.params import SamplingParams
from slipstream.runtime.structured.output import StructuredOutput
from slipstream.server.anthropic.conversation import conversation_of
from slipstream.server.anthropic.protocol import CountRequest, MessagesRequest
from slipstream.server.anthropic.reply import MessageReply, Thoughts
from slipstream.server.core.http.respond import respond, service_of
from slipstream.server.core.job import Job
from slipstream.server.core.sampling import sampling_params

router = APIRouter()
_GENERATED: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The message, or with `stream` events from `message_start` to "
        "`message_stop`.",
        "content": {"application/json": {}, "text/event-stream": {}},
    }
}
_FIELDS = {
    "prompt": "messages",
    "stop": "stop_sequences",
    "structured": "output_config",
    "continue_final_message": "messages",
}


@router.post("/v1/messages", responses=_GENERATED)
async def create_message(body: MessagesRequest, request: Request) -> Response:
    """Answer a conversation."""
    service = service_of(request)
    model = service.model(body.model)
    conversation = conversation_of(body)
    params = _params(body, service.defaults)
    reply = MessageReply(model, service.turns(conversation, params), _thoughts(body))
    job = Job([conversation], params, "delta" if body.stream else "final", fields=_FIELDS)
    return await respond(request, job, reply)


def _thoughts(body: MessagesRequest) -> Thoughts:
    """Clients that do not ask for thoughts look for text in the first block."""
    if body.thinking is None or body.thinking.type == "disabled":
        return "hidden"
    return "omitted" if body.thinking.display == "omitted" else "told"


@router.post("/v1/messages/count_tokens")
async def count_tokens(body: CountRequest, request: Request) -> dict[str, int]:
    """The tokens of a conversation in the model's chat template."""
    service = service_of(request)
    service.model(body.model)
    return {"input_tokens": len(await service.encode(conversation_of(body)))}


def _params(body: MessagesRequest, defaults: SamplingParams) -> SamplingParams:
    """Raises ``InvalidRequestError``."""
    if body.output_format is not None and body.output_config and body.output_config.format:
        raise InvalidRequestError("output_format and output_config.format are one; leave one out")
    given = {
        "max_tokens": body.max_tokens,
        "stop": body.stop_sequences,
        "temperature": body.temperature,
        "top_p": body.top_p,
        "top_k": body.top_k,
        "structured": body.form and StructuredOutput(json=body.form.schema_),
    }
    told = {name: value for name, value in given.items() if value is not None}
    return sampling_params(defaults, told)
