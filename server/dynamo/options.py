"""How a worker finds its frontends: every default is written here and nowhere else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from slipstream.errors import InvalidRequestError
from slipstream.server.option_tables import Option
from slipstream.server.options import all_of


@dataclass(frozen=True, slots=True)
class DynamoOptions:
    """The options of one worker.

    namespace, component, endpoint  what the worker is called in Dynamo; those with equal ones are
                                    replicas.
    served_model_name               the name that requests give.
    discovery_backend               where workers and frontends find each other.
    request_plane, event_plane      how requests and events travel.
    tool_call_parser                how the model writes calls, by Dynamo's names.
    reasoning_parser                how it writes thoughts, likewise.
    drain_timeout                   seconds for running requests to end in after SIGTERM.

    Raises ``InvalidRequestError`` for a value that makes no sense.
    """

    namespace: str = "dynamo"
    component: str = "backend"
    endpoint: str = "generate"
    served_model_name: str | None = None
    discovery_backend: Literal["etcd", "kubernetes", "file", "mem"] = "etcd"
    request_plane: Literal["tcp", "nats"] = "tcp"
    event_plane: Literal["zmq", "nats"] = "zmq"
    tool_call_parser: str | None = None
    reasoning_parser: str | None = None
    drain_timeout: float = 60.0

    def __post_init__(self) -> None:
        for name in ("namespace", "component", "endpoint", "served_model_name"):
            if getattr(self, name) == "":
                raise InvalidRequestError(f"{name} is empty; leave it out, or give a text")
        if not self.drain_timeout >= 0:
            raise InvalidRequestError(
                f"drain_timeout is {self.drain_timeout}; it must be at least 0"
            )


_OPTIONS = {
    "namespace": Option("Namespace of the frontends.", envvar="DYN_NAMESPACE"),
    "component": Option("Name of the workers; those with the same are replicas."),
    "endpoint": Option("Name of what they answer."),
    "served_model_name": Option("Name of the model in requests.", "the model's file or directory"),
    "discovery_backend": Option(
        "Where workers and frontends find each other; file is the directory in DYN_FILE_KV.",
        envvar="DYN_DISCOVERY_BACKEND",
    ),
    "request_plane": Option("How requests travel.", envvar="DYN_REQUEST_PLANE"),
    "event_plane": Option("How events of the cache travel.", envvar="DYN_EVENT_PLANE"),
    "tool_call_parser": Option("How the model writes calls, by Dynamo's names.", "unknown"),
    "reasoning_parser": Option("How it writes thoughts, by Dynamo's names.", "unknown"),
    "drain_timeout": Option(
        "Seconds that running requests have to end in after SIGTERM or Ctrl-C."
    ),
}


def dynamo_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add every field of ``DynamoOptions``; the command gets ``dynamo: DynamoOptions``."""
    return all_of(DynamoOptions, _OPTIONS, "dynamo")(function)
