"""Structured log lines: an event, the id of its request, and fields; as text or as JSON."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any, Literal, TextIO

from slipstream.server.text import printable

LogFormat = Literal["text", "json"]

# The request in whose task a line is written.
request_id: ContextVar[str | None] = ContextVar("request_id", default=None)

_PLAIN = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_./:+@")


def log_event(
    logger: logging.Logger,
    event: str,
    fields: Mapping[str, Any],
    level: int = logging.INFO,
) -> None:
    """Write a line with fields; those that are None are left out."""
    given = {name: value for name, value in fields.items() if value is not None}
    logger.log(level, "%s", event, extra={"fields": given})


class JsonFormatter(logging.Formatter):
    """One JSON object a line; ASCII, so that no text can break a line or an encoding."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        line = _common(record)
        line["logger"] = record.name
        line |= getattr(record, "fields", {})
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


class TextFormatter(logging.Formatter):
    """``time level message name=value ...``; values with other than plain characters are quoted."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, and a traceback below it if there is one."""
        line = _common(record)
        head = [line.pop("time"), line.pop("level"), printable(line.pop("message"))]
        line |= getattr(record, "fields", {})
        text = " ".join([*head, *(f"{name}={_quoted(value)}" for name, value in line.items())])
        if not record.exc_info:
            return text
        traceback = printable(self.formatException(record.exc_info), keep="\n")
        return f"{text}\n{traceback}"


_FORMATTERS: Mapping[LogFormat, type[logging.Formatter]] = {
    "text": TextFormatter,
    "json": JsonFormatter,
}


@contextmanager
def structured_logs(form: LogFormat, stream: TextIO | None = None) -> Iterator[None]:
    """Send the lines of this package and of uvicorn to ``stream`` (None: stderr) while inside.

    The server's own lines are written from INFO on; the level of the rest stays as it is.
    """
    handler = logging.StreamHandler(stream)
    handler.setFormatter(_FORMATTERS[form]())
    loggers = [logging.getLogger(name) for name in ("slipstream", "uvicorn")]
    server = logging.getLogger("slipstream.server")
    before = [(logger.handlers, logger.propagate) for logger in loggers], server.level
    for logger in loggers:
        logger.handlers, logger.propagate = [handler], False
    server.setLevel(logging.INFO)
    try:
        yield
    finally:
        for logger, (handlers, propagate) in zip(loggers, before[0], strict=True):
            logger.handlers, logger.propagate = handlers, propagate
        server.setLevel(before[1])


def _common(record: logging.LogRecord) -> dict[str, Any]:
    time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
    line = {"time": time, "level": record.levelname, "message": record.getMessage()}
    current = request_id.get()
    return line if current is None else {**line, "request_id": current}


def _quoted(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    plain = not isinstance(value, str) or (text and _PLAIN.issuperset(text))
    return text if plain else json.dumps(text)
