from __future__ import annotations

import io
import json
import logging

import pytest

from slipstream.server.core.logs import LogFormat, log_event, request_id, structured_logs

LOG = logging.getLogger("slipstream.server.test")


def lines(form: LogFormat) -> list[str]:
    stream = io.StringIO()
    with structured_logs(form, stream):
        log_event(LOG, "served", {"status": 200, "path": "/a b\n", "seconds": 0.5, "client": None})
        token = request_id.set("r-1")
        log_event(LOG, "again", {"text": "é"})
        request_id.reset(token)
        logging.getLogger("uvicorn.error").warning("one\ntwo")
        log_event(LOG, "quiet", {}, logging.DEBUG)
        logging.getLogger("slipstream.builder").info("not the server's")
    log_event(LOG, "after the end", {})
    return stream.getvalue().splitlines()


def test_json_lines() -> None:
    first, second, third = (json.loads(line) for line in lines("json"))
    assert first.pop("time").endswith("+00:00")
    assert first == {
        "level": "INFO",
        "message": "served",
        "logger": "slipstream.server.test",
        "status": 200,
        "path": "/a b\n",
        "seconds": 0.5,
    }
    assert (second["request_id"], second["text"]) == ("r-1", "é")
    assert third["message"] == "one\ntwo" and "request_id" not in third


def test_text_lines() -> None:
    first, second, third = (line.partition(" ")[2] for line in lines("text"))
    assert first == 'INFO served status=200 path="/a b\\n" seconds=0.5'
    assert second == 'INFO again request_id=r-1 text="\\u00e9"'
    assert third == "WARNING one\\ntwo"


@pytest.mark.parametrize("form", ["text", "json"])
def test_a_traceback_is_kept(form: LogFormat) -> None:
    stream = io.StringIO()
    with structured_logs(form, stream):
        try:
            raise ValueError("no")
        except ValueError:
            LOG.exception("failed")
    assert "ValueError: no" in stream.getvalue() and "failed" in stream.getvalue()
    if form == "json":
        assert "Traceback" in json.loads(stream.getvalue())["exception"]
