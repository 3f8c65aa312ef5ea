"""``/v1/responses``."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Sequence
from typing import Annotated, Any, Literal, cast

from fastapi import APIRouter, Query, Request
from fastapi.responses import Response

from slipstream.runtime.request import OutputKind
from slipstream.runtime.sampling.params import SamplingParams
from slipstream.server.core.http.respond import respond, service_of
from slipstream.server.core.job import Job
from slipstream.server.core.refusal import Refusal
from slipstream.server.responses.conversation import (
    NAMES,
    conversation_of,
    messages_of,
    params_of,
)
from slipstream.server.responses.items import SILENCE, input_items
from slipstream.server.responses.output import Fields
from slipstream.server.responses.protocol import FunctionTool, Item, ResponseRequest
from slipstream.server.responses.reply import ResponseReply
from slipstream.server.responses.store import Answers, LocalStore, Store, Stored

router = APIRouter()
_ANSWERS: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The `response` object, or with `stream` events that end with it.",
        "content": {"application/json": {}, "text/event-stream": {}},
    }
}


@router.post("/v1/responses", responses=_ANSWERS)
async def create_response(body: ResponseRequest, request: Request) -> Response:
    """Answer an input, or go on with an answer."""
    service, store = service_of(request), _store_of(request)
    model = service.model(body.model)
    params = params_of(body, service.defaults)
    past = await _past(store, body.previous_response_id)
    messages = [
        *messages_of([Item.model_validate(item) for item in past]),
        *messages_of(body.input),
    ]
    if not messages:
        raise Refusal("invalid", "input is missing; give a text or items", param="input")
    conversation = conversation_of(body, messages)
    frame = _frame(body, model, params)

    def keep(whole: bytes) -> None:
        if body.store is not False:
            store.put(frame["id"], Stored(whole, [*past, *input_items(body.input)]))

    form = body.text and body.text.format and body.text.format.type != "text"
    fields = {**NAMES, "structured": "text" if form else "tools"}
    kind: OutputKind = "delta" if body.stream else "final"
    job = Job([conversation], params, kind, body.priority or 0, fields=fields)
    turns = service.turns(conversation, params)
    return await respond(request, job, ResponseReply(frame, turns, service.texts, keep))


@router.get("/v1/responses/{response_id}", responses={200: {"content": {"application/json": {}}}})
async def get_response(response_id: str, request: Request, stream: bool = False) -> Response:
    """An answer that was stored."""
    if stream:
        raise Refusal("invalid", "what is stored is not streamed; leave out stream", param="stream")
    return Response((await _stored(request, response_id)).body, media_type="application/json")


@router.get("/v1/responses/{response_id}/input_items")
async def list_input_items(
    response_id: str,
    request: Request,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    order: Literal["asc", "desc"] = "desc",
    after: str | None = None,
) -> dict[str, Any]:
    """The items that a stored answer answers, those of earlier requests included."""
    items = list((await _stored(request, response_id)).items)
    if order == "desc":
        items.reverse()
    if after is not None:
        place = next((i for i, item in enumerate(items) if item["id"] == after), None)
        if place is None:
            raise Refusal("invalid", f"after is {after!r:.100}, which is no item of this response; "
                          "give the id of one", param="after")  # fmt: skip
        items = items[place + 1 :]
    told = items[:limit]
    first, last = (told[0]["id"], told[-1]["id"]) if told else (None, None)
    more = len(items) > limit
    return {"object": "list", "data": told, "first_id": first, "last_id": last, "has_more": more}


@router.delete("/v1/responses/{response_id}")
async def delete_response(response_id: str, request: Request) -> dict[str, Any]:
    """Forget an answer; those that went on with it stay."""
    if not await _store_of(request).pop(response_id):
        raise _unknown(response_id)
    return {"id": response_id, "object": "response", "deleted": True}


def _store_of(request: Request) -> Answers:
    """The store of the application that a request came to."""
    state = request.app.state
    if not hasattr(state, "responses"):
        options = service_of(request).options
        store = Store(options.max_stored_responses, options.max_stored_bytes)
        state.responses = LocalStore(store)
    return cast(Answers, state.responses)


async def _stored(request: Request, response_id: str) -> Stored:
    """A stored answer; raises ``Refusal``."""
    found = await _store_of(request).get(response_id)
    if found is None:
        raise _unknown(response_id)
    return found


def _unknown(response_id: str) -> Refusal:
    return Refusal(
        "not_found",
        f"there is no response {response_id!r:.100}; it was deleted, never stored, or has made "
        "room for newer ones",
        param="response_id",
    )


async def _past(store: Answers, response_id: str | None) -> Sequence[Fields]:
    """The items of the conversation that a request goes on with."""
    if response_id is None:
        return ()
    found = await store.get(response_id)
    if found is None:
        raise Refusal(
            "invalid",
            f"there is no response {response_id!r:.100} to go on with; it was deleted, never "
            "stored, or has made room for newer ones. Send the items of the conversation as input",
            param="previous_response_id",
            code="previous_response_not_found",
        )
    return [*found.items, *(json.loads(found.body)["output"] or [SILENCE])]


def _frame(request: ResponseRequest, model: str, params: SamplingParams) -> Fields:
    """What is known of an answer before there is one, with what was asked for."""
    text = request.text and request.text.format
    form = {"type": "text"} if text is None else text.model_dump(by_alias=True, exclude_none=True)
    choice = request.tool_choice or "auto"
    return {
        "id": "resp_" + uuid.uuid4().hex,
        "object": "response",
        "created_at": int(time.time()),
        "status": "in_progress",
        "background": False,
        "completed_at": None,
        "error": None,
        "incomplete_details": None,
        "instructions": request.instructions,
        "max_output_tokens": request.max_output_tokens,
        "metadata": request.metadata or {},
        "model": model,
        "output": [],
        "parallel_tool_calls": request.parallel_tool_calls is not False,
        "previous_response_id": request.previous_response_id,
        "reasoning": {"effort": request.reasoning and request.reasoning.effort, "summary": None},
        "store": request.store is not False,
        "temperature": params.temperature,
        "top_logprobs": request.top_logprobs or 0,
        "text": {"format": form},
        "tool_choice": choice if isinstance(choice, str) else choice.model_dump(exclude_none=True),
        "tools": [_tool(tool) for tool in request.tools or ()],
        "top_p": params.top_p,
        "truncation": "disabled",
        "usage": None,
    }


def _tool(tool: FunctionTool) -> Fields:
    return {**tool.model_dump(), "strict": bool(tool.strict)}
