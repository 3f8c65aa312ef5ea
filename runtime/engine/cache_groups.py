"""From the caches of an engine to the groups of pages that the KV manager keeps."""

from __future__ import annotations

from typing import NamedTuple

from slipstream.builder.contract import CacheSpec, paged, states
from slipstream.errors import EngineMismatchError
from slipstream.runtime.config import RuntimeConfig
from slipstream.runtime.engine.host_pages import HostSpace
from slipstream.runtime.engine.kv_cache import KVCacheManager
from slipstream.runtime.engine.window_group import WindowGroup


class PagedGroups(NamedTuple):
    """Names of the caches that share their page numbers: those that remember every token, and those
    of each window, in the order of the manager's groups."""

    full: tuple[str, ...]
    windows: dict[int, tuple[str, ...]]


def group_caches(caches: tuple[CacheSpec, ...]) -> PagedGroups:
    """Put the paged caches that live alike together."""
    windows = sorted({cache.window for cache in paged(caches)} | {0})
    names = {w: tuple(c.name for c in paged(caches) if c.window == w) for w in windows}
    return PagedGroups(names.pop(0), names)


def window_pages(window: int, num_pages: int, config: RuntimeConfig, draft_tokens: int = 0) -> int:
    """How many pages a cache with a ``window`` can use where caches without have ``num_pages``:
    as many as a full batch holds at a time."""
    most = -(-(window + _max_step(config, draft_tokens)) // config.page_size) + 1
    return min(num_pages, config.max_batch_size * most)


def kv_cache_manager(
    config: RuntimeConfig,
    num_pages: int,
    caches: tuple[CacheSpec, ...],
    draft_tokens: int = 0,
    host: HostSpace | None = None,
) -> KVCacheManager:
    """The pages of ``caches``: one group of all that remember every token, one for each window;
    what they have no room for goes to the ``host``.

    Where all caches have a window, the first group has page numbers that no device holds, so that
    the prefix tree has an order and an end. Raises ``EngineMismatchError`` for caches with
    different page sizes.
    """
    _check_page_sizes(config, caches)
    groups = group_caches(caches)
    windows = tuple(
        WindowGroup(
            caches=names,
            window=window,
            max_step=_max_step(config, draft_tokens),
            num_pages=window_pages(window, num_pages, config, draft_tokens),
            page_size=config.page_size,
        )
        for window, names in groups.windows.items()
    )
    columns = -(-config.max_seq_len // config.page_size)
    return KVCacheManager(
        num_pages if groups.full or not windows else config.max_batch_size * columns,
        config.page_size,
        config.enable_prefix_caching,
        caches=groups.full,
        windows=windows,
        has_states=bool(states(caches)),
        host=host,
    )


def _max_step(config: RuntimeConfig, draft_tokens: int) -> int:
    """The most tokens from the first that a step may compute, as far as the host knows, to the
    last: a run on its way may be as long as that of the step itself."""
    return config.max_num_tokens + 2 * draft_tokens


def _check_page_sizes(config: RuntimeConfig, caches: tuple[CacheSpec, ...]) -> None:
    for cache in paged(caches):
        if cache.page_size != config.page_size:
            raise EngineMismatchError(
                f"cache {cache.name!r} has pages of {cache.page_size} tokens and the engine pages"
                f" of {config.page_size}; all caches of an engine share one page size. Build it"
                " again"
            )
