"""Anthropic's Messages API."""

from __future__ import annotations

from slipstream.server.anthropic.errors import ANTHROPIC_STATUSES, RESPONSES, error_body
from slipstream.server.anthropic.messages import router
from slipstream.server.core.http.api import Api

ANTHROPIC = Api(router, error_body, RESPONSES, ANTHROPIC_STATUSES)
