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
                                    replicas. A component of None is Dynamo's own name: prefill for
                                    such a worker, and backend.
    disaggregation_mode             what of a request the worker does: ``prefill`` computes prompts
                                    and hands them over, ``decode`` goes on with them, ``agg`` does
                                    both.
    kv_transfer_path                directory for pages on their way, which workers of one host see.
    kv_transfer_gib                 GiB of memory for those that come and go.
    kv_transfer_timeout             seconds after which pages that nobody took are freed.
    served_model_name               the name that requests give.
    discovery_backend               where workers and frontends find each other.
    request_plane, event_plane      how requests and events travel.
    tool_call_parser                how the model writes calls, by Dynamo's names.
    reasoning_parser                how it writes thoughts, likewise.
    drain_timeout                   seconds for running requests to end in after SIGTERM.

    Raises ``InvalidRequestError`` for a value that makes no sense.
    """

    namespace: str = "dynamo"
    component: str | None = None
    endpoint: str = "generate"
    served_model_name: str | None = None
    discovery_backend: Literal["etcd", "kubernetes", "file", "mem"] = "etcd"
    request_plane: Literal["tcp", "nats"] = "tcp"
    event_plane: Literal["zmq", "nats"] = "zmq"
    tool_call_parser: str | None = None
    reasoning_parser: str | None = None
    drain_timeout: float = 60.0
    disaggregation_mode: Literal["agg", "prefill", "decode"] = "agg"
    kv_transfer_path: str = "/dev/shm"
    kv_transfer_gib: float = 1.0
    kv_transfer_timeout: float = 60.0

    @property
    def hands_over(self) -> bool:
        """Whether prompts go to other workers or come from there."""
        return self.disaggregation_mode != "agg"

    @property
    def component_name(self) -> str:
        """What the worker is called."""
        return self.component or ("prefill" if self.disaggregation_mode == "prefill" else "backend")

    def __post_init__(self) -> None:
        for name in ("namespace", "component", "endpoint", "served_model_name"):
            if getattr(self, name) == "":
                raise InvalidRequestError(f"{name} is empty; leave it out, or give a text")
        for name in ("kv_transfer_gib", "kv_transfer_timeout"):
            if not 0 < getattr(self, name) < float("inf"):
                raise InvalidRequestError(f"{name} is {getattr(self, name)}; it must be above 0")
        if not self.drain_timeout >= 0:
            raise InvalidRequestError(
                f"drain_timeout is {self.drain_timeout}; it must be at least 0"
            )


_OPTIONS = {
    "namespace": Option("Namespace of the frontends.", envvar="DYN_NAMESPACE"),
    "component": Option(
        "Name of the workers; those with the same are replicas.", "prefill for those, or backend"
    ),
    "disaggregation_mode": Option(
        "What the worker does: prefill computes prompts and hands their pages over, decode goes on "
        "with them, agg does both."
    ),
    "kv_transfer_path": Option("Directory for pages on their way, seen by workers of one host."),
    "kv_transfer_gib": Option("GiB of memory for pages that come and go, beside the KV cache."),
    "kv_transfer_timeout": Option("Seconds after which pages that nobody took are freed."),
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
