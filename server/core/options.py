"""How a server is set up: every default is written here and nowhere else."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Sequence
from dataclasses import dataclass

from slipstream.errors import InvalidRequestError
from slipstream.server.core.logs import LogFormat

MAX_PROCESSES = 64


@dataclass(frozen=True, slots=True)
class ServerOptions:
    """The options of one server.

    host, port            where to listen; port 0 takes a free one.
    api_processes         processes that answer requests, before the one that has the engine; 0:
                          that one does. None: as many as help.
    api_key               keys of which every request must carry one as ``Authorization: Bearer``
                          or ``x-api-key``; none: everybody may ask.
    served_model_name     names that requests may give; the first is the one that is answered with.
                          None: the name of the model's file or directory.
    max_queued_requests   completions that may wait beyond the running batch; more are refused with
                          429.
    allow_priority        take the ``priority`` of requests, by which one can overtake all others.
    max_request_bytes     size of a request's body; larger ones are refused with 413.
    allowed_origins       web pages of which origins may ask (CORS); ``*`` allows all.
    allowed_hosts         names by which a server on a loopback address may be asked, beside
                          addresses, names without a dot and those below ``localhost``; ``*`` allows
                          all.
    log_format            ``text`` or ``json``.
    log_prompts           write prompts into the log.
    drain_timeout         seconds for running requests to end in after SIGTERM.
    default_max_tokens    tokens of an answer whose request does not say how many; None: the
                          model's own, and where it has none, what fits.
    max_stored_responses  answers of ``/v1/responses`` to keep for later requests; 0 keeps none.
    max_stored_bytes      their size in all, with the conversations that led to them. The ones that
                          were not asked for the longest make room.
    tool_call_parser      how the model writes calls of tools; None: told by its chat template.
    reasoning_parser      how it writes thoughts; None: told by its chat template.

    Raises ``InvalidRequestError`` for a value that makes no sense.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_processes: int | None = None
    api_key: Sequence[str] = ()
    served_model_name: Sequence[str] = ()
    max_queued_requests: int = 1024
    allow_priority: bool = False
    max_request_bytes: int = 4 << 20
    allowed_origins: Sequence[str] = ()
    allowed_hosts: Sequence[str] = ()
    log_format: LogFormat = "text"
    log_prompts: bool = False
    drain_timeout: float = 60.0
    default_max_tokens: int | None = None
    max_stored_responses: int = 1024
    max_stored_bytes: int = 256 << 20
    tool_call_parser: str | None = None
    reasoning_parser: str | None = None

    def __post_init__(self) -> None:
        least = {
            "port": 0,
            "max_queued_requests": 0,
            "max_request_bytes": 1,
            "drain_timeout": 0,
            "max_stored_responses": 0,
            "max_stored_bytes": 0,
        }
        for name, value in least.items():
            if not getattr(self, name) >= value:
                raise InvalidRequestError(
                    f"{name} is {getattr(self, name)}; it must be at least {value}"
                )
        if self.default_max_tokens is not None and self.default_max_tokens < 1:
            raise InvalidRequestError(
                f"default_max_tokens is {self.default_max_tokens}; it must be at least 1"
            )
        if self.api_processes is not None and not 0 <= self.api_processes <= MAX_PROCESSES:
            raise InvalidRequestError(
                f"api_processes is {self.api_processes}; it must be from 0 to {MAX_PROCESSES}"
            )
        if self.port > 65535:
            raise InvalidRequestError(f"port is {self.port}; it must be at most 65535")
        for name in ("api_key", "served_model_name", "allowed_origins", "allowed_hosts"):
            if not all(value.strip() for value in getattr(self, name)):
                raise InvalidRequestError(f"{name} is empty; leave it out, or give a text")

    @property
    def is_local(self) -> bool:
        """Whether ``host`` is a loopback address, or a name of one: only this machine may ask."""
        try:
            found = socket.getaddrinfo(self.host, None, type=socket.SOCK_STREAM)
        except OSError:  # nothing will listen there
            return False
        return ipaddress.ip_address(found[0][4][0]).is_loopback
