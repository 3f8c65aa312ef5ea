"""From the caches of an engine to the groups of pages that the KV manager keeps."""

from __future__ import annotations

from slipstream.builder.contract import CacheSpec
from slipstream.errors import EngineMismatchError
from slipstream.runtime.config import RuntimeConfig
from slipstream.runtime.engine.kv_cache import KVCacheManager
from slipstream.runtime.engine.window_group import WindowGroup

# The cache of an engine that does not say which it has.
_ONE_CACHE = (CacheSpec("kv", "paged", layers=(), arrays=()),)


def window_pages(window: int, num_pages: int, config: RuntimeConfig, draft_tokens: int = 0) -> int:
    """How many pages a cache with a ``window`` can use where caches without have ``num_pages``:
    as many as a full batch holds at a time."""
    most = -(-(window + _max_step(config, draft_tokens)) // config.page_size) + 1
    return min(num_pages, config.max_batch_size * most)


def kv_cache_manager(
    config: RuntimeConfig,
    num_pages: int,
    caches: tuple[CacheSpec, ...] = (),
    draft_tokens: int = 0,
) -> KVCacheManager:
    """The pages of ``caches``: one group of all that remember every token, one for each window.

    An engine without a cache of the first sort has a group of page numbers that no device holds, so
    that the prefix tree has an order and an end. Raises ``EngineMismatchError`` for caches with
    different page sizes.
    """
    paged = [cache for cache in caches or _ONE_CACHE if cache.kind == "paged"]
    _check_page_sizes(config, paged)
    full = tuple(cache.name for cache in paged if not cache.window)
    windows = tuple(
        WindowGroup(
            caches=tuple(cache.name for cache in paged if cache.window == window),
            window=window,
            max_step=_max_step(config, draft_tokens),
            num_pages=window_pages(window, num_pages, config, draft_tokens),
            page_size=config.page_size,
        )
        for window in sorted({cache.window for cache in paged if cache.window})
    )
    columns = -(-config.max_seq_len // config.page_size)
    return KVCacheManager(
        num_pages if full else config.max_batch_size * columns,
        config.page_size,
        config.enable_prefix_caching,
        caches=full,
        windows=windows,
        has_states=any(cache.kind == "state" for cache in caches),
    )


def _max_step(config: RuntimeConfig, draft_tokens: int) -> int:
    """The most tokens from the first that a step may compute, as far as the host knows, to the
    last: a run on its way may be as long as that of the step itself."""
    return config.max_num_tokens + 2 * draft_tokens


def _check_page_sizes(config: RuntimeConfig, paged: list[CacheSpec]) -> None:
    for cache in paged:
        if cache.page_size not in (0, config.page_size):
            raise EngineMismatchError(
                f"cache {cache.name!r} has pages of {cache.page_size} tokens and the engine pages"
                f" of {config.page_size}; all caches of an engine share one page size. Build it"
                " again"
            )
