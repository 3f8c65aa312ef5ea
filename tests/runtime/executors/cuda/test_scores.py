"""Scores on the device against the CPU's sampler."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from slipstream.runtime.executors.cuda.scores import rows_at_once, score
from slipstream.runtime.sampling.sampler import token_logprobs

pytestmark = pytest.mark.kernel


@pytest.mark.parametrize("count", [0, 1, 25, -1])
def test_equal_the_cpus(count: int, device: str) -> None:
    rng = np.random.default_rng(count + 1)
    logits = rng.standard_normal((5, 300), dtype=np.float32)
    logits[1] = np.round(logits[1])
    logits[2] = 0
    logits[3, 40:] = -np.inf
    tokens = np.array([7, 299, 150, 3, 0])
    on_device = score(
        torch.tensor(logits, device=device), torch.tensor(tokens, device=device), count
    )
    if device == "cuda":
        torch.cuda.synchronize()
    for row, token, got in zip(logits, tokens, on_device.result(), strict=True):
        want = token_logprobs(row, int(token), count)
        assert got is not None
        assert (got.token_id, got.rank) == (want.token_id, want.rank)
        assert got.logprob == pytest.approx(want.logprob, abs=1e-5)
        assert list(got.top) == list(want.top)
        for (value, rank), (expected, expected_rank) in zip(
            got.top.values(), want.top.values(), strict=True
        ):
            assert value == pytest.approx(expected, abs=1e-5) and rank == expected_rank


def test_listed_tokens_equal_the_cpus(device: str) -> None:
    logits = np.random.default_rng(0).standard_normal((2, 300), dtype=np.float32)
    logits[1] = np.round(logits[1])
    listed = [[4, 299, 17], [8, 0, 5]]
    pending = score(
        torch.tensor(logits, device=device),
        torch.tensor([7, 9], device=device),
        0,
        torch.tensor(listed, device=device),
    )
    if device == "cuda":
        torch.cuda.synchronize()
    for row, token, ids, got in zip(logits, (7, 9), listed, pending.result(), strict=True):
        want = token_logprobs(row, token, 0, ids)
        assert got is not None and got.rank == want.rank and list(got.top) == ids
        assert [rank for _, rank in got.top.values()] == [rank for _, rank in want.top.values()]
        values = [value for value, _ in got.top.values()]
        assert values == pytest.approx([value for value, _ in want.top.values()], abs=1e-5)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_broken_row_has_none(value: float, device: str) -> None:
    logits = torch.zeros(2, 10, device=device)
    logits[0, 3] = value
    pending = score(logits, torch.tensor([3, 3], device=device), 2)
    if device == "cuda":
        torch.cuda.synchronize()
    broken, whole = pending.result()
    assert broken is None and whole is not None and whole.logprob == pytest.approx(-math.log(10))


def test_a_chunk_of_rows_is_bounded() -> None:
    assert rows_at_once(128_256) == 65
    assert rows_at_once(1 << 40) == 1
