"""``kv_events_config``: whether and where events of the prefix cache are told."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from slipstream.errors import InvalidRequestError
from slipstream.weights.json import Fields, Origin, option_fields

NAME = "kv_events_config"
_ORIGIN = Origin(NAME, "see docs/distributed.md", InvalidRequestError)


@dataclass(frozen=True, slots=True)
class KvEventsConfig:
    """How the events of one engine are told, with vLLM's names.

    enable_kv_cache_events  whether there are any.
    publisher               ``zmq``, or ``null`` for none; None: as ``enable_kv_cache_events`` says.
    endpoint                the ZMQ address of the PUB socket, bound where it names all addresses
                            (``*`` or ``::``) or is no ``tcp``, and connected to otherwise.
    replay_endpoint         the address of a ROUTER socket, which is bound and sends past batches
                            again; None: there is none.
    buffer_steps            batches that are kept for it.
    hwm                     batches that wait for a subscriber before it misses some.
    max_queue_size          batches that wait to be sent before the engine does.
    topic                   the first frame of every batch.
    """

    enable_kv_cache_events: bool = False
    publisher: Literal["zmq", "null"] | None = None
    endpoint: str = "tcp://*:5557"
    replay_endpoint: str | None = None
    buffer_steps: int = 10_000
    hwm: int = 100_000
    max_queue_size: int = 100_000
    topic: str = ""

    @property
    def publishes(self) -> bool:
        """Whether events leave the engine."""
        return self.enable_kv_cache_events and self.publisher != "null"

    @property
    def binds(self) -> bool:
        """Whether the endpoint is this engine's own, and not that of whoever gathers events."""
        endpoint = self.endpoint
        return "*" in endpoint or "::" in endpoint or not endpoint.startswith("tcp://")


def with_kv_events(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options with ``kv_events_config``, which may be an object or its JSON, read.

    Raises ``InvalidRequestError`` for keys that mean nothing here and values of another type.
    """
    given = options.get(NAME)
    if given is None or isinstance(given, KvEventsConfig):
        return dict(options)
    return {**options, NAME: _read(option_fields(given, NAME, _ORIGIN))}


def _read(config: Fields) -> KvEventsConfig:
    known = [field.name for field in fields(KvEventsConfig)]
    unknown = sorted(set(config.values) - set(known))
    if unknown:
        raise _ORIGIN.refusal(f"has {unknown[0]!r}; known keys are {', '.join(known)}")
    readers: dict[str, Callable[[str], Any]] = {
        "enable_kv_cache_events": config.flag,
        "publisher": lambda key: config.choice(key, ("zmq", "null")),
        **dict.fromkeys(("endpoint", "replay_endpoint", "topic"), config.text),
        **dict.fromkeys(
            ("buffer_steps", "hwm", "max_queue_size"), lambda key: config.integer(key, minimum=1)
        ),
    }
    return KvEventsConfig(**{key: readers[key](key) for key in known if config.has(key)})
