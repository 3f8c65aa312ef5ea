"""The process of a worker; needs ``ai-dynamo``."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import uvloop
from dynamo.common.backend.worker import Worker

from slipstream.runtime.kv_events.config import KvEventsConfig
from slipstream.runtime.loaded_engine import LoadedEngine
from slipstream.server.dynamo.engine import SlipstreamEngine
from slipstream.server.dynamo.options import DynamoOptions


def run(
    load: Callable[[KvEventsConfig], LoadedEngine],
    options: DynamoOptions,
    events: KvEventsConfig | None,
) -> str | None:
    """Work until SIGTERM or Ctrl-C and let running requests end; see ``SlipstreamEngine``. Returns
    what ails the engine, None if nothing does."""
    engine = SlipstreamEngine(load, options, events)
    with _signals_for_dynamo():
        uvloop.run(Worker(engine, engine.worker_config()).run())
    return engine.unhealthy


@contextmanager
def _signals_for_dynamo() -> Iterator[None]:
    """Dynamo hears signals itself, and then calls the handlers that were there before: they would
    end the process at once."""
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = {each: signal.signal(each, lambda *_: None) for each in numbers}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
