"""Two APIs behind one server, each with errors of its own shape."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from fastapi import APIRouter
from fastapi.testclient import TestClient
from pydantic import BaseModel

from slipstream.errors import ExecutionError, InvalidRequestError
from slipstream.runtime.async_llm import AsyncLLM
from slipstream.runtime.testing import counting_engine
from slipstream.server.core.http.api import Api
from slipstream.server.core.http.app import Counting, create_app
from slipstream.server.core.metrics import EngineMetrics
from slipstream.server.core.options import ServerOptions
from slipstream.server.core.refusal import Refusal
from slipstream.server.core.service import Service


class Body(BaseModel):
    """A body with one field."""

    number: int


def api(name: str) -> Api:
    """An API whose errors begin with its name."""
    router = APIRouter()

    @router.post(f"/{name}/fail")
    async def fail(body: Body) -> None:
        if body.number == 1:
            raise Refusal("busy", "later", retry_after=7)
        if body.number == 2:
            raise ExecutionError("a step failed")
        if body.number == 3:
            raise InvalidRequestError("no")
        raise ZeroDivisionError

    return Api(router, lambda refusal: f"{name}: {refusal.kind}: {refusal}".encode(), {})


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    """A client of a server with the APIs ``one`` and ``other``."""
    llm = AsyncLLM.from_engine(counting_engine())
    metrics = EngineMetrics("counting", llm)
    options = ServerOptions(api_key=["key"], served_model_name=["counting"], max_request_bytes=99)
    app = create_app(Service(llm, options, metrics), Counting(metrics), [api("one"), api("other")])
    headers = {"Authorization": "Bearer key"}
    yield TestClient(app, headers=headers, raise_server_exceptions=False)
    llm.shutdown()


@pytest.mark.parametrize(
    ("number", "status", "text"),
    [
        (1, 429, "busy: later"),
        (2, 503, "failed: a step failed"),
        (3, 400, "invalid: no"),
        (4, 500, "internal: an error inside"),
        ("x", 400, "invalid: number: input should be a valid integer"),
    ],
)
@pytest.mark.parametrize("name", ["one", "other"])
def test_an_error_is_told_by_the_api_that_was_asked(
    client: TestClient, name: str, number: object, status: int, text: str
) -> None:
    answer = client.post(f"/{name}/fail", json={"number": number})
    assert answer.status_code == status and answer.text.startswith(f"{name}: {text}")
    assert answer.headers.get("retry-after") == ("7" if number == 1 else None)


def test_what_stands_around_the_apis_speaks_as_they_do(client: TestClient) -> None:
    refused = client.post("/other/fail", headers={"Authorization": "Bearer no"})
    assert refused.status_code == 401 and refused.text.startswith("other: unauthorized: ")
    assert refused.headers["www-authenticate"] == "Bearer"
    large = client.post("/other/fail", content=b"x" * 100)
    assert large.status_code == 413 and large.text.startswith("other: too_large: ")
    other_method = client.get("/other/fail")
    assert other_method.status_code == 405 and other_method.headers["allow"] == "POST"
    assert other_method.text.startswith("other: wrong_method: ")


def test_the_first_speaks_for_paths_that_are_nobodys(client: TestClient) -> None:
    assert client.get("/nothing").text.startswith("one: not_found: there is no /nothing here")
    assert client.get("/health").json() == {"status": "ok"}


def test_paths_below_a_route_are_answered_by_its_api(client: TestClient) -> None:
    answer = client.get("/other/fail/nothing")
    assert answer.status_code == 404 and answer.text.startswith("other: not_found: there is no ")
