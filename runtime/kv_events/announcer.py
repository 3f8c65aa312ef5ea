"""From an engine's prefix tree to whoever subscribed."""

from __future__ import annotations

from slipstream.runtime.config import RuntimeConfig
from slipstream.runtime.engine.kv_cache import KVCacheManager
from slipstream.runtime.kv_events.events import AllBlocksCleared, EventLog
from slipstream.runtime.kv_events.publisher import Publisher


class Announcer:
    """Tells what happened to the shared pages of an engine, a batch a step; belongs to its thread.

    The first and the last batch say that there are none: an engine that is started again counts
    from 0 with an empty tree.
    """

    def __init__(self, config: RuntimeConfig, kv: KVCacheManager) -> None:
        """Raises ``MissingDependencyError`` and ``InvalidRequestError`` as ``Publisher`` does."""
        self.publisher: Publisher | None = None
        events = config.kv_events_config
        if events is not None and events.publishes:
            self.publisher = Publisher(events)
            self._log = EventLog(config.page_size)
            kv.observe(self._log)
            self.publisher.publish([AllBlocksCleared()])

    def flush(self) -> None:
        """Tell the subscribers, whom ``publisher`` has if there can be any, what happened since the
        last call."""
        assert self.publisher is not None
        if events := self._log.take():
            self.publisher.publish(events)

    def close(self) -> None:
        """Tell the end."""
        publisher, self.publisher = self.publisher, None
        if publisher is not None:
            publisher.publish([AllBlocksCleared()])
            publisher.close()
