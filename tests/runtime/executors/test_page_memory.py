"""Memory for KV pages costs what was written, and becomes huge pages where it is full."""

from __future__ import annotations

import mmap
import re
from pathlib import Path

import numpy as np
import pytest

from slipstream.runtime.executors import page_memory
from slipstream.runtime.executors.page_memory import PageMemory, give_back, whole_regions

HUGE = 2 << 20
LAYERS, PAGES, PAGE = 6, 1000, (2, 3, 1024)  # of float32: 24,576 bytes a page
PAGE_BYTES = 4 * 2 * 3 * 1024

linux = pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="Linux tells of memory")


def resident(memory: PageMemory) -> tuple[int, int]:
    """Bytes that are in memory, and how many of them in huge pages."""
    first = memory.array.ctypes.data
    inside, totals = False, {"Rss": 0, "AnonHugePages": 0}
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if place := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            start, end = (int(each, 16) for each in place.groups())
            inside = first < end and start < first + memory.array.nbytes
        elif inside and (name := line.partition(":")[0]) in totals:
            totals[name] += int(line.split()[1]) * 1024
    return totals["Rss"], totals["AnonHugePages"]


def test_zeros_of_a_shape_and_type_start_where_a_huge_page_may() -> None:
    memory = PageMemory((2, 5, 3, 7), "float16")
    assert memory.array.shape == (2, 5, 3, 7)
    assert memory.array.dtype == np.float16
    assert memory.array.ctypes.data % HUGE == 0
    assert memory.array.flags.c_contiguous
    assert memory.array.flags.writeable
    assert not memory.array.any()


def test_the_array_outlives_what_made_it() -> None:
    array = PageMemory((2, 5, 64), "float32").array
    array[:] = 3.0
    assert array.sum() == 3.0 * array.size


def test_what_no_address_space_holds_is_told() -> None:
    with pytest.raises((MemoryError, OverflowError, ValueError)):
        PageMemory((1, 1 << 40, 1 << 20), "float32")


@pytest.mark.parametrize("page_bytes", [PAGE_BYTES, 3 * 3 * 2048, 4096, 5 * HUGE, 72])
@pytest.mark.parametrize("pages", [1, 255, 256, 257, 1000, 30_000])
def test_layers_of_whole_regions_begin_where_a_huge_page_may(pages: int, page_bytes: int) -> None:
    count = whole_regions(pages, page_bytes)
    whole = (more for more in range(pages, 2 * pages) if more * page_bytes % HUGE == 0)
    assert count == next(whole, pages)


@linux
def test_memory_costs_what_was_written_not_a_huge_page_a_layer() -> None:
    memory = PageMemory((LAYERS, PAGES, *PAGE), "float32")
    memory.array[:, :33] = 1.0
    memory.use(33)
    written = LAYERS * 33 * PAGE_BYTES
    size, _ = resident(memory)
    assert written <= size <= written + 2 * LAYERS * mmap.PAGESIZE


def test_only_full_huge_pages_are_asked_for_once_and_few_a_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(page_memory, "_wanted", lambda: True)
    memory = PageMemory((LAYERS, PAGES, *PAGE), "float32")
    asked: list[tuple[int, int]] = []

    def advise(_map: mmap.mmap, advice: int, start: int, length: int) -> None:
        if advice == page_memory._COLLAPSE:
            asked.append((start, start + length))

    monkeypatch.setattr(page_memory, "_advise", advise)
    base, region = memory.array.ctypes.data - memory._start, PAGES * PAGE_BYTES
    for used in (1, 33, 85, 86, 300, 301, 7):
        before = len(asked)
        memory.use(used)
        assert len(asked) - before <= page_memory._MOST_A_STEP
    while len(asked) > before:
        before = len(asked)
        memory.use(7)
    for start, end in asked:
        assert (memory._start + start) % HUGE == 0
        first = base + (start - base) // region * region
        assert first <= start < end <= first + 301 * PAGE_BYTES
    assert len(set(asked)) == len(asked)
    # Of each layer's 7.4 MB there are two whole ones wherever they begin, or three.
    per_layer = np.bincount([(start - base) // region for start, _ in asked], minlength=LAYERS)
    assert set(per_layer.tolist()) <= {2, 3}


@linux
def test_full_ones_become_huge_and_keep_what_they_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    choice = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not choice.exists() or "[never]" in choice.read_text():
        pytest.skip("this system makes no huge pages")
    memory = PageMemory((LAYERS, PAGES, *PAGE), "float32")
    refused: list[int] = []
    advise = memory._map.madvise

    class Watched:
        """Notes which advice the kernel does not know."""

        def madvise(self, advice: int, start: int, length: int) -> None:
            try:
                advise(advice, start, length)
            except OSError:
                refused.append(advice)
                raise

    monkeypatch.setattr(memory, "_map", Watched())
    memory.array[:, :301] = np.arange(301, dtype=np.float32)[:, None, None, None]
    for _ in range(4):
        memory.use(301)
    _, huge = resident(memory)
    if refused:
        pytest.skip("this kernel, or what memory it has left, makes none on request")
    assert huge >= LAYERS * 2 * HUGE
    assert (memory.array[:, :301] == np.arange(301)[:, None, None, None]).all()
    assert not memory.array[:, 301:304].any()


def test_a_system_that_makes_none_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_memory, "_wanted", lambda: False)
    memory = PageMemory((LAYERS, PAGES, *PAGE), "float32")
    monkeypatch.setattr(page_memory, "_advise", lambda *_: pytest.fail("was asked"))
    memory.use(PAGES)


def test_memory_is_given_back_without_harm() -> None:
    texts = [bytes(10_000) for _ in range(100)]
    del texts[::2]
    give_back()
    assert all(text == bytes(10_000) for text in texts)
