"""The CUDA kernel of Router against its NumPy reference."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tests.plugins.router.cases import CASES

from slipstream.plugins.router import reference
from slipstream.plugins.router.cuda import router

pytestmark = pytest.mark.kernel


@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_matches_reference(name: str, corrected: bool, device: str) -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, (5, 64)).astype(np.float32)
    correction = rng.normal(0, 1, 64).astype(np.float32) if corrected else None
    given = None if correction is None else torch.from_numpy(correction).to(device)
    ids, weights = router(torch.from_numpy(logits).to(device), given, **CASES[name])
    want_ids, want_weights = reference.router(logits, correction, **CASES[name])
    np.testing.assert_array_equal(ids.cpu(), want_ids)
    np.testing.assert_allclose(weights.cpu(), want_weights, rtol=1e-5)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the interpreter, about what is no number
def test_every_token_has_experts_whatever_its_logits_are(device: str) -> None:
    logits = torch.randn(4, 8)
    logits[0] = torch.nan
    logits[1, 3] = torch.nan
    logits[2] = -torch.inf
    cases: list[dict[str, Any]] = [{"top_k": 3}, {"top_k": 3, "scoring": 1, "groups": 2}]
    for options in cases:
        ids, _ = router(logits.to(device), **options)
        rows = ids.tolist()
        assert all(len(set(row)) == 3 and min(row) >= 0 and max(row) < 8 for row in rows)
