"""``POST /invocations``, where SageMaker sends whatever it is given."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from fastapi import APIRouter, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from pydantic import ValidationError

from slipstream.server.core.refusal import Refusal
from slipstream.server.openai.chat import create_chat_completion
from slipstream.server.openai.completions import create_completion
from slipstream.server.openai.embeddings import EmbeddingRequest, create_embeddings
from slipstream.server.openai.protocol import ChatRequest, CompletionRequest, ModelRequest
from slipstream.server.openai.reply import GENERATED

router = APIRouter()
# By the field that only this kind of request has.
_KINDS: Mapping[str, tuple[type[ModelRequest], Callable[[Any, Request], Awaitable[Response]]]] = {
    "messages": (ChatRequest, create_chat_completion),
    "prompt": (CompletionRequest, create_completion),
    "input": (EmbeddingRequest, create_embeddings),
}


@router.post("/invocations", responses=GENERATED)
async def invoke(body: dict[str, Any], request: Request) -> Response:
    """Answer a chat, a completion or embeddings, whichever the body asks for."""
    field = next((name for name in _KINDS if name in body), None)
    if field is None:
        raise Refusal(
            "invalid",
            f"the body has none of {', '.join(_KINDS)}; send that of /v1/chat/completions, "
            "/v1/completions or /v1/embeddings",
        )
    kind, answer = _KINDS[field]
    try:
        read = kind.model_validate(body)
    except ValidationError as error:
        raise RequestValidationError(error.errors()) from error
    return await answer(read, request)
