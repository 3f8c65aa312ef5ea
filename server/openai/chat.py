"""``POST /v1/chat/completions``, and ``/batch`` below it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fastapi import APIRouter, Request
from fastapi.responses import Response

from slipstream.server.core.http.respond import respond, service_of
from slipstream.server.core.refusal import Refusal
from slipstream.server.openai.chat_reply import ChatReply
from slipstream.server.openai.forms import form_field
from slipstream.server.openai.messages import conversation_of
from slipstream.server.openai.protocol import BatchChatRequest, ChatRequest
from slipstream.server.openai.reply import GENERATED, Frame, check_stream, job_of
from slipstream.server.openai.sampling import chat_params

router = APIRouter()


@router.post("/v1/chat/completions", responses=GENERATED)
async def create_chat_completion(body: ChatRequest, request: Request) -> Response:
    """Answer a conversation."""
    return await _answer(request, body, [body])


@router.post("/v1/chat/completions/batch", responses={200: {"content": {"application/json": {}}}})
async def create_batch(body: BatchChatRequest, request: Request) -> Response:
    """Answer several conversations, each with one choice, by their places."""
    return await _answer(request, body, body.each())


async def _answer(request: Request, body: ChatRequest, chats: Sequence[ChatRequest]) -> Response:
    service = service_of(request)
    kind = "chat.completion.chunk" if body.stream else "chat.completion"
    frame = Frame.of(service, body, kind, "chatcmpl-")
    if body.top_logprobs and not body.logprobs:
        raise Refusal("invalid", "top_logprobs needs logprobs to be true", param="top_logprobs")
    check_stream(body)
    params = chat_params(body, service.defaults, service.llm.tokenizer)
    conversations = [conversation_of(chat) for chat in chats]
    # What answers are held to, beside the schemas of tools, is said there.
    fields = {"prompt": "messages", "structured": form_field(body) or "tools"}
    if body.max_completion_tokens is not None:
        fields["max_tokens"] = "max_completion_tokens"
    reply = ChatReply(
        frame,
        [service.turns(conversation, params) for conversation in conversations],
        [_echoed(body, conversation.messages[-1:]) for conversation in conversations],
        scored=bool(body.logprobs),
        thoughts=body.include_reasoning is not False,
        identified=bool(body.return_token_ids),
    )
    return await respond(request, job_of(body, conversations, params, fields), reply)


def _echoed(body: ChatRequest, last: Sequence[Mapping[str, object]]) -> str:
    """What an answer begins with: the last message, if the assistant said that too."""
    said = body.echo and last and last[0]["role"] == "assistant"
    return str(last[0]["content"]) if said else ""
