"""The process of a worker; needs ``ai-dynamo``."""

from __future__ import annotations

import math
import os
import signal
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import uvloop
from dynamo.common.backend.worker import Worker

from slipstream.runtime.kv_events.config import KvEventsConfig
from slipstream.runtime.loaded_engine import LoadedEngine
from slipstream.server.dynamo.engine import SlipstreamEngine
from slipstream.server.dynamo.model_files import write_model_files
from slipstream.server.dynamo.options import DynamoOptions

_FREEING_SECONDS = 30  # for a step that the device is in


def run(load: Callable[[KvEventsConfig], LoadedEngine], options: DynamoOptions) -> str | None:
    """Work until SIGTERM or Ctrl-C and let running requests end; see ``SlipstreamEngine``. Returns
    what ails the engine, None if nothing does.

    ``load`` is given where events of the cache are found by this process alone.
    """
    # After which Dynamo kills a process that it has told to end.
    patience = math.ceil(options.drain_timeout) + _FREEING_SECONDS
    os.environ.setdefault("DYN_WORKER_GRACEFUL_SHUTDOWN_TIMEOUT", str(patience))
    # A socket's path must be short, whatever TMPDIR is.
    with tempfile.TemporaryDirectory(prefix="slipstream-", dir="/tmp") as directory:
        loaded = load(
            KvEventsConfig(enable_kv_cache_events=True, endpoint=f"ipc://{directory}/events")
        )
        engine = SlipstreamEngine(loaded, write_model_files(loaded, _cache()), options)
        with _signals_for_dynamo():
            uvloop.run(Worker(engine, engine.worker_config()).run())
        return engine.unhealthy


def _cache() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "slipstream" / "dynamo"


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
