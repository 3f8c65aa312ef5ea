"""Memory of the host for pages: those that an engine's device has no room for, and those that come
from other engines or go there."""

from __future__ import annotations

import logging
from typing import NamedTuple

from slipstream.builder.contract import states
from slipstream.errors import CapacityError, EngineMismatchError, InvalidRequestError
from slipstream.runtime.engine.host_pages import HostSpace
from slipstream.runtime.engine.kv_cache import KVCacheManager
from slipstream.runtime.engine.stats import Traffic
from slipstream.runtime.executors.base import Executor, OffloadingExecutor
from slipstream.runtime.handover.staging import Staging
from slipstream.runtime.loaded_engine import LoadedEngine

_LOG = logging.getLogger(__name__)


class HostMemory(NamedTuple):
    """Where pages are kept, and where they come and go between engines."""

    offload: HostSpace | None = None
    staging: Staging | None = None


def reserve_host(engine: LoadedEngine) -> HostMemory:
    """What the configuration asks for.

    Raises ``InvalidRequestError`` for an engine whose sequences share no pages,
    ``EngineMismatchError`` for a device without such memory or a file of another engine, and
    ``CapacityError``.
    """
    config, executor = engine.config, engine.executor
    if not (config.kv_offload_gib or config.kv_transfer_gib):
        return HostMemory()
    option = "kv_offload_gib" if config.kv_offload_gib else "kv_transfer_gib"
    if remembered := states(engine.caches):
        raise InvalidRequestError(
            f"{option} is {getattr(config, option)}, but cache {remembered[0].name!r} of this"
            " engine holds a state of every sequence, so that sequences share no pages; leave it"
            " out"
        )
    if not isinstance(executor, OffloadingExecutor):
        raise EngineMismatchError(
            f"{type(executor).__name__} keeps no pages on the host; leave {option} out"
        )
    keeps, hands = (int(gib * (1 << 30)) for gib in (config.kv_offload_gib, config.kv_transfer_gib))
    space = executor.reserve_host(keeps + hands, config.kv_offload_path)
    if not config.kv_transfer_gib:
        return HostMemory(space)
    kept = space.num_slots * keeps // (keeps + hands)
    if kept == space.num_slots:
        raise CapacityError(
            f"kv_transfer_gib holds {hands} bytes, less than a page takes; raise it"
        )
    staging = Staging(range(kept, space.num_slots), space.parts, engine.config.page_size)
    return HostMemory(HostSpace(kept) if keeps else None, staging)


def traffic(executor: Executor) -> dict[str, Traffic]:
    """What has gone to the host and come back, by the names of ``EngineStats``."""
    if not isinstance(executor, OffloadingExecutor):
        return {}
    return {"stored": executor.stored, "loaded": executor.loaded}


def spill(engine: LoadedEngine, kv: KVCacheManager) -> None:
    """Bring what the device has cached to a file that survives, before the device is freed."""
    if engine.config.kv_offload_path is None or kv.offload is None:
        return
    kv.spill()
    make_transfers(engine.executor, kv)


def make_transfers(executor: Executor, kv: KVCacheManager) -> None:
    """Make transfers that wait for a step where none comes and none is on its way; those that the
    device fails at are as those of a step that failed."""
    transfers = kv.take_transfers()
    if not transfers.copies:
        return
    assert isinstance(executor, OffloadingExecutor)
    try:
        executor.transfer(transfers.copies)
    except Exception:  # noqa: BLE001 - whatever a device raises ends only this
        _LOG.exception("pages could not be copied")
        kv.failed(transfers)
    else:
        kv.landed(transfers)
