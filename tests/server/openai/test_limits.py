"""Keys, sizes, queues and origins."""

from __future__ import annotations

import http.client
import socket
import threading
import time
from collections.abc import Iterator

import httpx
import openai
import pytest
from tests.server.devices import GatedDevice, engine_on
from tests.server.openai.serving import Running, serving

from slipstream.server.core.options import ServerOptions

ENDLESS = {"prompt": "a", "max_tokens": 250, "ignore_eos": True, "stream": True}
BRIEF = {"prompt": "a", "max_tokens": 1}


@pytest.fixture(scope="module")
def guarded() -> Iterator[Running]:
    """A server that wants a key and knows one origin."""
    with serving(
        api_key=("secret", "schlüssel"), allowed_origins=("https://a.example",)
    ) as running:
        yield running


@pytest.mark.parametrize(
    "header",
    [None, "Bearer wrong", "Bearer", "Basic secret", "secret", "Bearer secret2", "Bearer é"],
)
def test_without_a_known_key_everything_is_401(guarded: Running, header: str | None) -> None:
    headers = {} if header is None else {b"Authorization": header.encode()}
    for path in ("/v1/completions", "/tokenize", "/v1/models", "/nothing"):
        response = httpx.post(guarded.url + path, json={"prompt": "a"}, headers=headers, timeout=60)
        assert response.status_code == 401
        assert response.json()["error"]["code"] == "invalid_api_key"
        assert response.headers["www-authenticate"] == "Bearer"


def test_a_known_key_opens_and_probes_need_none(guarded: Running) -> None:
    for key in ("secret", "schlüssel"):
        headers = {b"Authorization": f"Bearer {key}".encode()}
        body = {"prompt": "a", "max_tokens": 1}
        assert guarded.post("/v1/completions", body, headers=headers).status_code == 200
    with pytest.raises(openai.AuthenticationError):
        guarded.client(api_key="wrong").models.list()
    for path in ("/", "/health", "/metrics", "/version", "/openapi.json"):
        assert httpx.get(guarded.url + path, timeout=60).status_code == 200


def test_cors(guarded: Running) -> None:
    asked = {"Origin": "https://a.example", "Access-Control-Request-Method": "POST"}
    preflight = httpx.options(f"{guarded.url}/v1/completions", headers=asked)
    assert preflight.status_code == 200
    assert preflight.headers["access-control-allow-origin"] == "https://a.example"
    refused = httpx.post(
        f"{guarded.url}/v1/completions", headers={"Origin": "https://a.example"}, timeout=60
    )
    assert refused.status_code == 401, "a page must be able to read why"
    assert refused.headers["access-control-allow-origin"] == "https://a.example"
    other = httpx.get(f"{guarded.url}/health", headers={"Origin": "https://b.example"}, timeout=60)
    assert "access-control-allow-origin" not in other.headers


def test_no_origin_is_allowed_by_default(server: Running) -> None:
    response = httpx.get(
        f"{server.url}/health", headers={"Origin": "https://a.example"}, timeout=60
    )
    assert "access-control-allow-origin" not in response.headers


def test_a_large_body_is_413_whether_its_size_is_told_or_not() -> None:
    def pieces() -> Iterator[bytes]:
        yield b'{"prompt": "'
        for _ in range(20):
            yield b"a" * 1000
        yield b'"}'

    with serving(max_request_bytes=10_000) as running:
        url, headers = f"{running.url}/v1/completions", {"Content-Type": "application/json"}
        for content in (b"".join(pieces()), pieces()):
            response = httpx.post(url, content=content, headers=headers, timeout=60)
            assert response.status_code == 413
            assert "larger than 10000 bytes" in response.json()["error"]["message"]
        assert running.post("/v1/completions", {"prompt": "a", "max_tokens": 1}).status_code == 200


@pytest.mark.parametrize("told", [True, False])
def test_a_client_that_sends_all_before_it_reads_sees_why_it_is_refused(told: bool) -> None:
    """Python's: a connection closed with megabytes on their way would be reset."""
    size = 32 << 20
    body = b"x" * size if told else iter([b"x" * (1 << 20)] * 32)
    with serving(max_request_bytes=1000, api_key=("secret",)) as running:
        host, port = running.url.removeprefix("http://").split(":")
        for key, status in (("secret", 413), ("wrong", 401)):
            connection = http.client.HTTPConnection(host, int(port), timeout=60)
            headers = {"Authorization": f"Bearer {key}", "Connection": "close"}
            connection.request("POST", "/v1/completions", body=body, headers=headers)
            response = connection.getresponse()
            assert response.status == status and b"error" in response.read()
            connection.close()


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:8000", 200),
        ("[::1]:8000", 200),
        ("192.168.1.5", 200),
        ("localhost:99", 200),
        ("chat.localhost", 200),
        ("workstation:8000", 200),
        ("llm.example:8000", 200),
        ("evil.example", 403),
        ("evil.example.:8000", 403),
        ("127.0.0.1.evil.example", 403),
        ("localhost.evil.example", 403),
        ("127.0.0.1.nip.io:8000", 403),
    ],
)
def test_a_server_on_a_loopback_address_answers_to_its_own_names(
    local: Running, host: str, status: int
) -> None:
    for path in ("/health", "/", "/v1/models"):
        response = httpx.get(local.url + path, headers={"Host": host}, timeout=60)
        assert response.status_code == status
    if status == 403:
        assert response.json()["error"]["code"] == "unknown_host"


@pytest.fixture(scope="module")
def local() -> Iterator[Running]:
    """A server that is asked by one further name."""
    with serving(allowed_hosts=("LLM.example",)) as running:
        yield running


def test_every_name_may_be_allowed_and_others_bind_where_many_may_ask() -> None:
    with serving(allowed_hosts=("*",)) as running:
        response = httpx.get(f"{running.url}/health", headers={"Host": "evil.example"}, timeout=60)
        assert response.status_code == 200
    for host, is_local in (
        ("127.0.0.1", True),
        ("127.9.9.9", True),
        ("localhost", True),
        ("::1", True),
        ("0.0.0.0", False),
        ("::", False),
    ):
        assert ServerOptions(host=host).is_local is is_local


def test_a_size_told_in_the_header_is_refused_before_the_body_comes() -> None:
    with serving(max_request_bytes=1000) as running:
        host, port = running.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=60) as connection:
            connection.sendall(
                b"POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Length: 99999\r\n\r\n"
            )
            assert connection.recv(100).startswith(b"HTTP/1.1 413")


def test_a_full_queue_is_429_with_retry_after() -> None:
    device = GatedDevice()
    engine = engine_on(device, max_batch_size=2)
    with serving(engine, max_queued_requests=1) as running, device:
        device.permits.release()
        url, two = f"{running.url}/v1/completions", {**ENDLESS, "prompt": ["a", "b"]}
        with httpx.Client(timeout=60) as client, client.stream("POST", url, json=two):
            waiting = threading.Thread(target=running.post, args=("/v1/completions", BRIEF))
            waiting.start()
            wait_until_open(running, 3)
            refused = client.post(url, json=BRIEF)
            assert refused.status_code == 429
            assert refused.json()["error"]["code"] == "queue_full"
            assert int(refused.headers["retry-after"]) >= 1
            with pytest.raises(openai.RateLimitError):
                running.client().completions.create(model="counting", prompt="a")
        device.permits.release(1000)
        waiting.join()
        running.wait_idle()
        answer = running.client().completions.create(model="counting", prompt="a", max_tokens=1)
        assert answer.choices[0].text == "b"


def wait_until_open(running: Running, count: int) -> None:
    deadline = time.monotonic() + 60
    while running.service.places.own != count:
        assert time.monotonic() < deadline, f"{running.service.places.own} open, expected {count}"
        time.sleep(0.002)


def test_a_request_id_is_honoured_and_returned(server: Running) -> None:
    def returned(given: dict[str, str]) -> str:
        body = {"prompt": "a", "max_tokens": 1}
        return server.post("/v1/completions", body, headers=given).headers["x-request-id"]

    assert returned({"X-Request-Id": "abc-123"}) == "abc-123"
    assert returned({"X-Request-Id": "a" * 200}) != "a" * 200
    assert returned({"X-Request-Id": "a b"}) != "a b"
    assert len({returned({}) for _ in range(3)}) == 3
    same = {"X-Request-Id": "twice"}
    assert [returned(same), returned(same)] == ["twice", "twice"]
    missing = httpx.get(f"{server.url}/nothing", headers=same, timeout=60)
    assert missing.headers["x-request-id"] == "twice"
