"""OpenAI's API, with vLLM's extra fields and endpoints."""

from __future__ import annotations

from fastapi import APIRouter

from slipstream.server.core.http.api import Api
from slipstream.server.core.http.error_object import RESPONSES, error_body
from slipstream.server.openai import (
    chat,
    completions,
    embeddings,
    invocations,
    models,
    rerank,
    tokens,
)
from slipstream.server.openai.page import routes as page

_router = APIRouter()
for _part in (chat, completions, embeddings, rerank, invocations, tokens, models, page):
    _router.include_router(_part.router)

OPENAI = Api(_router, error_body, RESPONSES)
