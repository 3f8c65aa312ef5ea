"""Copies of float8 pages in float16: what is copied, and that a prefill has the same bits."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from tests.plugins.paged_attention.cuda import test_attention as prefills

from slipstream.plugins.paged_attention.cuda import attention, wide_pages
from slipstream.plugins.paged_attention.cuda.attention import DecodeWorkspace
from slipstream.plugins.paged_attention.cuda.wide_pages import OTHERS, WIDE, WidePages

pytestmark = pytest.mark.kernel

PAGE, NUMBERS = 64, 32  # of k and v of a token together
# Queries and tokens in the pages: two decodes, one too short a chunk, one too short a prompt, three
# that are copied, padding.
STEP = ((1, 70), (1, 5000), (255, 2000), (500, 500), (256, 1100), (1024, 1024), (300, 1500), (0, 0))


def fill(room: int, device: str) -> tuple[list[int], list[int], Any, Any, Any]:
    """First pages and counts of STEP with room for so many pages; page table, codes and copies."""
    rng = np.random.default_rng(1)
    counts, contexts = (np.array(column, np.int32) for column in zip(*STEP, strict=True))
    columns = int(contexts.max()) // PAGE + 2
    table = rng.permutation(len(STEP) * columns).astype(np.int32).reshape(len(STEP), columns)
    codes = rng.integers(0, 255, (table.size, 2, NUMBERS // 2 * PAGE), np.uint8)
    codes[codes & 127 == 127] = 0  # which is NaN

    def on_device(array: Any) -> torch.Tensor:  # noqa: ANN401
        return torch.from_numpy(array).to(device)

    wide = WidePages.allocate(len(STEP), room * PAGE, NUMBERS, device)
    wide.numbers.fill_(torch.nan)
    copies = wide.fill(
        on_device(codes).view(torch.float8_e4m3fn),
        on_device(np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)),
        on_device(contexts),
        on_device(np.pad(table, ((0, 0), (0, 3))))[:, :-3],
        2,
        PAGE,
    )
    values = codes.view(ml_dtypes.float8_e4m3fn).astype(np.float16)
    return wide.first.tolist(), wide.found.tolist(), table, values, copies.cpu().numpy()


def test_pages_of_long_prompts_are_copied_one_sequence_after_the_other(device: str) -> None:
    pages = [18, 16, 24]
    first, found, table, values, copies = fill(sum(pages) + 2, device)
    assert first == [-1, -1, -1, -1, 0, 18, 34, -1]
    assert found[WIDE] == 3 and found[OTHERS] == 2
    for sequence, count in zip((4, 5, 6), pages, strict=True):
        got = copies[first[sequence] : first[sequence] + count]
        np.testing.assert_array_equal(got, values[table[sequence, :count]])
    assert np.isnan(copies[sum(pages) :]).all()  # nothing is behind the last


def test_what_there_is_no_room_for_is_decoded_as_it_is_read(device: str) -> None:
    first, found, table, values, copies = fill(40, device)
    assert first == [-1, -1, -1, -1, 0, 18, -1, -1]
    assert found[WIDE] == 2 and found[OTHERS] == 3
    np.testing.assert_array_equal(copies[18:34], values[table[5, :16]])
    assert np.isnan(copies[34:]).all()


def test_there_is_room_for_a_bounded_number_of_tokens() -> None:
    assert WidePages.allocate(1, 1 << 20, 2, "meta").numbers.shape == (2 << 16,)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["float8", "float8_heads_of_64"])
@pytest.mark.parametrize(("room", "copied"), [(3, 0), (12, 1), (100, 3)])
def test_a_prefill_from_copies_has_the_bits_of_one_from_codes(
    name: str, room: int, copied: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With room for none of the prompts, for some, and for all that are long."""
    case = replace(prefills.HOPPER_PREFILLS[name], batch=((1, 33), *prefills.CHUNKS), decodes=1)
    inputs = case.inputs()
    expected, pages = prefills.run(case, deepcopy(inputs), device)
    monkeypatch.setattr(attention, "STEP_TOKENS", 1)
    monkeypatch.setattr(wide_pages, "_QUERIES", 60)
    monkeypatch.setattr(wide_pages, "_CONTEXT", 150)
    allocate, made = DecodeWorkspace.allocate, []

    def with_copies(*arguments: Any) -> DecodeWorkspace:  # noqa: ANN401
        numbers = 2 * case.kv_heads * case.head_dim
        made.append(WidePages.allocate(20, room * PAGE, numbers, device))
        made[-1].numbers.fill_(torch.nan)
        return replace(allocate(*arguments), wide=made[-1])

    monkeypatch.setattr(DecodeWorkspace, "allocate", with_copies)
    output, written = prefills.run(case, deepcopy(inputs), device)
    assert made[0].found.tolist() == [copied, len(prefills.CHUNKS) - copied]
    np.testing.assert_array_equal(output, expected)
    np.testing.assert_array_equal(written.view(np.uint8), pages.view(np.uint8))
