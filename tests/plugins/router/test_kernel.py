"""The C++ kernel of Router against its NumPy reference."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tests.plugins.router.cases import CASES

from slipstream.plugins import native
from slipstream.plugins.router import SPEC, reference


@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_matches_reference(isa: str, name: str, corrected: bool) -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, (37, 64)).astype(np.float32)
    correction = rng.normal(0, 1, 64).astype(np.float32) if corrected else None
    inputs = {"logits": logits, "correction": correction, **CASES[name]}
    ids, weights = native.call(SPEC, inputs, isa, threads=2)
    want_ids, want_weights = reference.router(**inputs)
    np.testing.assert_array_equal(ids, want_ids)
    np.testing.assert_allclose(weights, want_weights, rtol=1e-5)


def test_the_first_of_equal_experts(isa: str) -> None:
    inputs = {"logits": np.zeros((2, 8), np.float32), "top_k": 3}
    ids, weights = native.call(SPEC, inputs, isa, threads=1)
    np.testing.assert_array_equal(ids, [[0, 1, 2]] * 2)
    np.testing.assert_allclose(weights, 0.125)


def test_every_token_has_experts_whatever_its_logits_are(isa: str) -> None:
    logits = np.random.default_rng(0).normal(size=(4, 8)).astype(np.float32)
    logits[0] = np.nan
    logits[1, 3] = np.nan
    logits[2] = -np.inf
    cases: list[dict[str, Any]] = [{"top_k": 3}, {"top_k": 3, "scoring": 1, "groups": 2}]
    for options in cases:
        ids, weights = native.call(SPEC, {"logits": logits, **options}, isa, threads=1)
        assert all(len(set(row)) == 3 for row in ids.tolist())
        assert (ids >= 0).all() and (ids < 8).all()
        want_ids, want = reference.router(logits[3:], **options)
        np.testing.assert_array_equal(ids[3:], want_ids)
        np.testing.assert_allclose(weights[3:], want, rtol=1e-6)
