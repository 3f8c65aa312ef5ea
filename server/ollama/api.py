"""Ollama's API."""

from __future__ import annotations

from fastapi import APIRouter

from slipstream.server.core.http.api import Api
from slipstream.server.ollama import chat, embed, generate, models, registry
from slipstream.server.ollama.errors import RESPONSES, error_body

_router = APIRouter()
for _part in (generate, chat, embed, models, registry):
    _router.include_router(_part.router)

OLLAMA = Api(_router, error_body, RESPONSES)
