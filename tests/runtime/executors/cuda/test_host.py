"""Pages of a GPU on the host: what is copied in the interpreter, and in which order on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny_models import TINY_SHAPE, save_tiny
from transformers import LlamaConfig

from slipstream import LLM, SamplingParams
from slipstream.builder.build import build
from slipstream.builder.contract import CacheSpec, attention_cache
from slipstream.builder.options import BuildOptions
from slipstream.errors import CapacityError
from slipstream.runtime.engine.host_pages import Transfer
from slipstream.runtime.engine.stats import Traffic
from slipstream.runtime.executors.cuda import host as cuda_host
from slipstream.runtime.executors.cuda.device import Device
from slipstream.runtime.executors.cuda.host import CUDAHost

pytestmark = pytest.mark.kernel
FULL = attention_cache("bfloat16", [0, 1], 4, 2, 8)
NEAR = attention_cache("float8_e4m3fn", [2], 4, 1, 8, name="near", window=4)
SLOT = FULL.bytes_per_page + NEAR.bytes_per_page


def pages_of(caches: tuple[CacheSpec, ...], device: Device) -> dict[str, torch.Tensor]:
    types = {"bfloat16": torch.bfloat16, "float8_e4m3fn": torch.float8_e4m3fn}
    pages = {}
    for cache in caches:
        (array,) = cache.arrays
        shape = (len(cache.layers), 5, *array.shape)
        values = torch.randint(0, 100, shape, dtype=torch.uint8).to(torch.float32)
        pages[cache.name] = values.to(types[array.dtype]).to(device.torch)
    return pages


def content(pages: dict[str, torch.Tensor], cache: CacheSpec, page: int) -> torch.Tensor:
    return pages[cache.name][:, page].float().cpu()


def test_pages_go_and_come_back_in_order() -> None:
    device, caches = Device(), (FULL, NEAR)
    host, pages = CUDAHost(device, caches, 2 * SLOT + 1), pages_of((FULL, NEAR), Device())
    assert host.space.num_slots == 2
    was = {cache.name: [content(pages, cache, page) for page in range(5)] for cache in caches}
    for cache in caches:
        name = cache.name
        host.transfer([Transfer(name, 3, 1, True)], pages)
        # The slot is read, then written, then read.
        moves = [(4, 1, False), (0, 1, True), (2, 1, False), (1, 0, True)]
        host.transfer([Transfer(name, *move) for move in moves], pages)
    device.synchronize()
    for cache in caches:
        first, second, _, third, _ = was[cache.name]
        now = [content(pages, cache, page) for page in range(5)]
        for page, expected in enumerate([first, second, first, third, third]):
            assert torch.equal(now[page], expected), (cache.name, page)
    host.transfer([], pages)
    assert (host.stored.num_bytes, host.loaded.num_bytes) == (3 * SLOT, 2 * SLOT)
    assert host.stored.seconds > 0
    host.close()


class Notes:
    """A stream that notes what is asked of it."""

    def __init__(self, device: Device) -> None:
        self.told: list[str] = []

    @contextmanager
    def work(self) -> Iterator[None]:
        self.told.append("copy")
        yield

    def wait_for_work(self) -> None:
        self.told.append("wait")

    def let_work_wait(self) -> None:
        self.told.append("hold")


@pytest.mark.parametrize(
    ("stores", "told"),
    [
        ([True, True], ["copy", "hold"]),
        ([True, False], ["wait", "copy", "hold"]),
        ([False], ["wait", "copy", "hold"]),
        ([], []),
    ],
)
def test_only_what_writes_to_the_device_waits_for_the_step_before(
    stores: list[bool], told: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_host, "CopyStream", Notes)
    host, pages = CUDAHost(Device(), (FULL,), 4 * SLOT), pages_of((FULL,), Device())
    host.transfer([Transfer(FULL.name, 0, i, way) for i, way in enumerate(stores)], pages)
    stream: Any = host._stream
    assert stream.told == told
    host.close()


def test_no_room_is_an_error() -> None:
    with pytest.raises(CapacityError, match="raise --kv-offload-gib"):
        CUDAHost(Device(), (FULL, NEAR), SLOT - 1)
    with pytest.raises(CapacityError, match="lower --kv-offload-gib"):
        CUDAHost(Device(), (FULL, NEAR), 1 << 60)


@pytest.mark.gpu
def test_copies_and_work_wait_for_each_other() -> None:
    device = Device()
    host, pages = CUDAHost(device, (FULL,), 4 * FULL.bytes_per_page), pages_of((FULL,), device)
    page = pages[FULL.name]
    was = page[:, 0].clone()
    host.transfer([Transfer(FULL.name, 0, 0, True)], pages)
    with device.work():
        page[:, 0] = 0  # not before it is stored
        torch.cuda._sleep(100_000_000)
        page[:, 1] = 7  # by the step before: not after it is loaded
    host.transfer([Transfer(FULL.name, 1, 0, False)], pages)
    with device.work():
        read = page[:, 1].clone()
    device.synchronize()
    assert torch.equal(read, was)
    host.transfer([], pages)
    assert host.loaded == Traffic(FULL.bytes_per_page, host.loaded.seconds)
    assert 0 < host.loaded.seconds < 0.01, "the wait is no copy"
    host.close()


@pytest.mark.gpu
def test_answers_are_those_of_a_cache_with_room(tmp_path: Path) -> None:
    checkpoint = save_tiny(LlamaConfig(**TINY_SHAPE), tmp_path / "tiny")
    build(checkpoint, tmp_path / "engine", BuildOptions(target="cuda", max_seq_len=512))
    prompts = [[first + i % 9 for i in range(300)] for first in (2, 20, 40)] * 3
    greedy = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    told = []
    for size, options in ((64 << 20, {}), (200_000, {"kv_offload_gib": 0.25})):
        limits = {"max_batch_size": 2, "max_num_tokens": 256, "kv_cache_bytes": size}
        with LLM(tmp_path / "engine", **limits, **options) as llm:
            outputs = [llm.generate([prompt], greedy)[0] for prompt in prompts]
            told.append([output.outputs[0].token_ids for output in outputs])
            stats = llm.stats
    assert told[0] == told[1]
    assert stats.host_hits and stats.loaded.num_bytes
