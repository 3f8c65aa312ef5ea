"""How many pages of caches fit."""

from __future__ import annotations

from slipstream.builder.contract import attention_cache
from slipstream.runtime.config import RuntimeConfig
from slipstream.runtime.executors.cuda.pages import CUDAPages


def test_a_cache_with_a_window_leaves_the_rest_to_the_others() -> None:
    """Three pages are all that one sequence can use of it, in three layers."""
    near = attention_cache("bfloat16", [1, 2, 3], 64, 1, 8, name="near", window=64)
    caches = (attention_cache("bfloat16", [0], 64, 1, 8), near)
    config = RuntimeConfig(max_batch_size=1, max_num_tokens=64, max_seq_len=64 * 32, page_size=64)
    pages, page = CUDAPages(caches, config), 2 * 64 * 8 * 2
    assert pages.columns == 32
    assert pages.affordable(1 << 30, (20 + 9) * page) == 20
    assert pages.affordable(1 << 30, (20 + 9) * page - 1) == 19
    assert pages.affordable(1 << 30, 2 * 4 * page) == 2
    assert pages.affordable(1 << 30, None) == 32
    assert pages.affordable((20 + 9) * page, 1 << 30) == 20
