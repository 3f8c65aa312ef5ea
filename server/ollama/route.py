"""Routes whose bodies are JSON, whatever their ``Content-Type`` says, as in Ollama's examples."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute
from starlette.types import Scope

_TYPE, _ORIGIN = b"content-type", b"origin"
_JSON = (_TYPE, b"application/json")


class JsonRoute(APIRoute):
    """Takes what ``curl -d`` sends, which calls JSON a form.

    What a web page sends, which an ``Origin`` tells, is taken as it is: a browser asks nobody's
    leave to send a form to another site.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """The handler of requests that are JSON."""
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            _call_json(request.scope)
            return await handler(Request(request.scope, request.receive))

        return handle


def _call_json(scope: Scope) -> None:
    headers = scope["headers"]
    if not any(name == _ORIGIN for name, _ in headers):
        scope["headers"] = [*(h for h in headers if h[0] != _TYPE), _JSON]
