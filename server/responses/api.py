"""OpenAI's Responses API."""

from __future__ import annotations

from slipstream.server.core.http import error_object
from slipstream.server.core.http.api import Api
from slipstream.server.responses.routes import router

RESPONSES = Api(router, error_object.error_body, error_object.RESPONSES)
