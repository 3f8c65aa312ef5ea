"""The kernel of TopToken against its reference and itself."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray
from tests.runtime.sampling.rows import random_logits

from slipstream.plugins import native
from slipstream.plugins.top_token import SPEC
from slipstream.plugins.top_token.reference import top_token

Floats = NDArray[np.float32]
# One logit; within a block of 64 and beyond; so many that threads share them.
WIDTHS = (1, 7, 64, 65, 1000, 40_000, 100_001)


def found(logits: Floats, isa: str, threads: int = 1) -> tuple[list[int], Floats]:
    tokens, peaks = native.call(SPEC, {"logits": np.ascontiguousarray(logits)}, isa, threads)
    return tokens.tolist(), peaks


def check(logits: Floats, isa: str) -> None:
    want_tokens, want_peaks = top_token(logits)
    for threads in (1, 3):
        tokens, peaks = found(logits, isa, threads)
        assert tokens == want_tokens.tolist()
        np.testing.assert_array_equal(peaks, want_peaks)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("rows", [1, 2, 33])
def test_equals_the_reference(isa: str, rows: int, width: int) -> None:
    logits = random_logits(rows, width, seed=width)
    check(logits, isa)
    check(np.round(logits), isa)  # of which many are equal
    check(np.minimum(logits, 1.0), isa)  # the largest, too
    check(-np.abs(logits) * np.float32(1e-40), isa)  # some are smaller than normal numbers


@pytest.mark.parametrize("width", WIDTHS[1:])
def test_the_first_of_equal_ones_wherever_they_are(isa: str, width: int) -> None:
    logits = np.zeros((5, width), np.float32)
    logits[1] = -0.0
    logits[2, width // 2] = -0.0
    logits[3, width - 1] = logits[3, width // 3] = 3.0
    logits[4, width - 1] = 1.0
    check(logits, isa)
    assert found(logits, isa, 2)[0] == [0, 0, 0, width // 3, width - 1]


@pytest.mark.parametrize("width", WIDTHS)
def test_what_is_not_finite_has_no_token(isa: str, width: int) -> None:
    logits = random_logits(6, width)
    logits[0, width // 2] = math.nan
    logits[1, width - 1] = math.inf
    logits[2] = -math.inf
    logits[3, : width - 1] = -math.inf
    logits[4] = [math.inf if i % 2 else math.nan for i in range(width)]
    check(logits, isa)
    tokens, peaks = found(logits, isa, 2)
    assert tokens[:5] == [-1, -1, -1, width - 1, -1] and tokens[5] >= 0
    assert math.isnan(peaks[0]) and peaks[1] == math.inf and peaks[2] == -math.inf


def test_a_row_is_the_same_in_any_company(isa: str) -> None:
    logits = random_logits(20, 70_000, seed=3)
    tokens, peaks = found(logits, isa, 2)
    for index in range(20):
        alone = found(logits[index : index + 1], isa)
        assert alone == ([tokens[index]], peaks[index : index + 1])
