"""Logits and rows for tests of sampling."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from slipstream.runtime.engine.step import SamplingRow
from slipstream.runtime.sampling.params import SamplingParams
from slipstream.runtime.sampling.sampler import Sampler

Floats = NDArray[np.float32]


def random_logits(*shape: int, seed: int = 0, scale: float = 3.0) -> Floats:
    values = np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)
    return values * np.float32(scale)


def row(
    params: SamplingParams,
    *,
    seed: int = 0,
    prompt: Sequence[int] = (1, 2),
    output: Sequence[int] = (),
    eos_token_ids: frozenset[int] = frozenset(),
    target: int | None = None,
) -> SamplingRow:
    return SamplingRow(params, prompt, output, seed, eos_token_ids, target, len(output))


def sample_one(logits: Floats, sampling_row: SamplingRow) -> int:
    return Sampler(len(logits)).sample(logits[None], [sampling_row]).token_ids[0]
