"""``POST /v1/chat/completions``."""

from __future__ import annotations

from collections.abc import Sequence

from fastapi import APIRouter, Request
from fastapi.responses import Response

from slipstream.server.core.http.respond import respond, service_of
from slipstream.server.core.refusal import Refusal
from slipstream.server.openai.chat_reply import ChatReply
from slipstream.server.openai.forms import form_field
from slipstream.server.openai.messages import conversation_of
from slipstream.server.openai.protocol import ChatRequest
from slipstream.server.openai.reply import GENERATED, Frame, check_stream, job_of
from slipstream.server.openai.sampling import chat_params

router = APIRouter()


@router.post("/v1/chat/completions", responses=GENERATED)
async def create_chat_completion(body: ChatRequest, request: Request) -> Response:
    """Answer a conversation."""
    service = service_of(request)
    kind = "chat.completion.chunk" if body.stream else "chat.completion"
    frame = Frame.of(service, body, kind, "chatcmpl-")
    if body.top_logprobs and not body.logprobs:
        raise Refusal("invalid", "top_logprobs needs logprobs to be true", param="top_logprobs")
    check_stream(body)
    params = chat_params(body, service.defaults, service.llm.tokenizer)
    conversation = conversation_of(body)
    # What answers are held to, beside the schemas of tools, is said there.
    fields = {"prompt": "messages", "structured": form_field(body) or "tools"}
    if body.max_completion_tokens is not None:
        fields["max_tokens"] = "max_completion_tokens"
    reply = ChatReply(
        frame,
        service.turns(conversation, params),
        scored=bool(body.logprobs),
        thoughts=body.include_reasoning is not False,
        echo=_echoed(body, conversation.messages[-1:]),
    )
    return await respond(request, job_of(body, [conversation], params, fields), reply)


def _echoed(body: ChatRequest, last: Sequence[dict[str, object]]) -> str:
    """What an answer begins with: the last message, if the assistant said that too."""
    said = body.echo and last and last[0]["role"] == "assistant"
    return str(last[0]["content"]) if said else ""
