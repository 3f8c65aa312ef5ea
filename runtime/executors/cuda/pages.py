"""Pages of an engine's caches on the GPU: how many there can be, their arrays, and their copies."""

from __future__ import annotations

import logging
from bisect import bisect_right
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from slipstream.builder.contract import CacheSpec, page_size_of
from slipstream.errors import CapacityError
from slipstream.runtime.config import RuntimeConfig
from slipstream.runtime.engine.cache_groups import window_pages
from slipstream.runtime.engine.kv_cache import Move

log = logging.getLogger(__name__)
_TYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float8_e4m3fn": torch.float8_e4m3fn,
}


class CUDAPages:
    """What an engine's caches take; a number of ``pages`` is that of those that remember every
    token. ``page_size`` is in tokens, ``columns`` are the pages of the longest sequence."""

    def __init__(self, caches: Sequence[CacheSpec], config: RuntimeConfig) -> None:
        self._caches, self._config = caches, config
        self.page_size = page_size_of(caches)
        self.columns = -(-config.max_seq_len // self.page_size)

    def affordable(self, free: int, num_bytes: int | None) -> int:
        """How many fit into so many ``free`` bytes, at most ``num_bytes``, or the configured share
        and what the limits can use; raises CapacityError where that is none."""
        if num_bytes is None:
            usable = int(free * self._config.kv_cache_free_gpu_memory_fraction)
            most = self.columns * self._config.max_batch_size
        else:
            usable = min(num_bytes, free)
            most = usable // min(cache.bytes_per_page for cache in self._caches)
        pages = bisect_right(range(1, most + 1), usable, key=self.bytes_of)
        if num_bytes is not None and num_bytes > free:
            log.warning(
                "the KV cache takes %d MiB, not the %d MiB asked for: the GPU has no more free",
                usable >> 20,
                num_bytes >> 20,
            )
        if pages < 1:
            raise CapacityError(
                f"{usable} bytes of KV cache hold no page; one page takes {self.bytes_of(1)} "
                "bytes: raise --kv-cache-bytes, lower --max-num-tokens, or free memory on the GPU"
            )
        return pages

    def bytes_of(self, pages: int) -> int:
        """Bytes of so many pages of all caches."""
        return sum(cache.bytes_per_page * self._count(cache, pages) for cache in self._caches)

    def allocate(self, pages: int, device: torch.device) -> dict[str, Tensor]:
        """Arrays of zeros ``[layers, pages, ...]`` by name."""
        return {
            array.name: torch.zeros(
                (len(cache.layers), self._count(cache, pages), *array.shape),
                dtype=_TYPES[array.dtype],
                device=device,
            )
            for cache in self._caches
            for array in cache.arrays
        }

    def by_cache(self, arrays: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The array of each cache."""
        return {cache.name: arrays[cache.arrays[0].name] for cache in self._caches}

    def move(self, moves: Sequence[Move], arrays: Mapping[str, Tensor]) -> None:
        """Enqueue copies of pages, which the layers of a step may read, without memory beside."""
        of = self.by_cache(arrays) if moves else {}
        for move in moves:
            if move.cache not in of:  # that of a head which nobody asks
                continue
            pages = of[move.cache].view(torch.uint8)  # no copies of 8-bit floats
            pages[:, move.destination] = pages[:, move.source]

    def _count(self, cache: CacheSpec, pages: int) -> int:
        """How many pages a cache has where those that remember every token have ``pages``."""
        return window_pages(cache.window, pages, self._config) if cache.window else pages
