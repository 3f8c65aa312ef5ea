"""Memory of the host for pages that an engine's device has no room for: where it is asked for, and
what becomes of it at the end."""

from __future__ import annotations

from slipstream.builder.contract import states
from slipstream.errors import EngineMismatchError, InvalidRequestError
from slipstream.runtime.engine.host_pages import HostSpace
from slipstream.runtime.engine.kv_cache import KVCacheManager
from slipstream.runtime.engine.stats import Traffic
from slipstream.runtime.executors.base import Executor, OffloadingExecutor
from slipstream.runtime.loaded_engine import LoadedEngine


def reserve_host(engine: LoadedEngine) -> HostSpace | None:
    """What the configuration asks for, None where that is nothing.

    Raises ``InvalidRequestError`` for an engine whose sequences share no pages,
    ``EngineMismatchError`` for a device without such memory or a file of another engine, and
    ``CapacityError``.
    """
    size, executor = engine.config.kv_offload_gib, engine.executor
    if not size:
        return None
    if remembered := states(engine.caches):
        raise InvalidRequestError(
            f"kv_offload_gib is {size}, but cache {remembered[0].name!r} of this engine holds a"
            " state of every sequence, so that sequences share no pages; leave it out"
        )
    if not isinstance(executor, OffloadingExecutor):
        raise EngineMismatchError(
            f"{type(executor).__name__} keeps no pages on the host; leave kv_offload_gib out"
        )
    return executor.reserve_host(int(size * (1 << 30)), engine.config.kv_offload_path)


def traffic(executor: Executor) -> dict[str, Traffic]:
    """What has gone to the host and come back, by the names of ``EngineStats``."""
    if not isinstance(executor, OffloadingExecutor):
        return {}
    return {"stored": executor.stored, "loaded": executor.loaded}


def spill(engine: LoadedEngine, kv: KVCacheManager) -> None:
    """Bring what the device has cached to a file that survives, before the device is freed."""
    if engine.config.kv_offload_path is None or kv.offload is None:
        return
    assert isinstance(engine.executor, OffloadingExecutor)
    kv.spill()
    transfers, stored = kv.take_transfers()
    engine.executor.transfer(transfers)
    kv.landed(stored)
