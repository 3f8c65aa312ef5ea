"""The page at ``/`` that chats through this API.

What a model writes becomes nodes of the page, and were there a way around that, the policy lets no
script run that does not come from here, and nothing be fetched from elsewhere.
"""

from __future__ import annotations

from importlib.resources import files
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from slipstream.server.core.http.respond import service_of
from slipstream.server.core.refusal import Refusal

router = APIRouter(include_in_schema=False)

_TYPES = {"index.html": "text/html", "page.css": "text/css",
          "chat.js": "text/javascript", "markdown.js": "text/javascript"}  # fmt: skip
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'"
)
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
# What the page lets people choose, and shows.
_SAMPLING = ("temperature", "top_p", "min_p", "top_k")


@router.get("/")
def page() -> Response:
    """A page to chat with the model."""
    return _file("index.html")


@router.get("/page/settings")
async def settings(request: Request) -> dict[str, Any]:
    """The model, how many tokens it reads, and how answers are sampled unless the page is told."""
    service = service_of(request)
    defaults = service.llm.interactive_defaults
    return {
        "model": service.names[0],
        "max_seq_len": service.llm.config.max_seq_len,
        "sampling": {name: getattr(defaults, name) for name in _SAMPLING},
    }


@router.get("/page/{name}")
def part(name: str) -> Response:
    """What the page is made of."""
    return _file(name)


def _file(name: str) -> Response:
    if name not in _TYPES:
        raise Refusal("not_found", f"the page has no {name!r:.100}; it is at /")
    text = (files("slipstream.server.openai.page") / name).read_text(encoding="utf-8")
    return Response(text, media_type=_TYPES[name], headers=_HEADERS)
