"""The CUDA kernel of NormedRouter against its NumPy reference, and against the kernels of its
parts."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from tests.plugins.router.cases import CASES

from slipstream.plugins.linear.cuda.packing import pack
from slipstream.plugins.linear.cuda.tactics import Tactic, Tactics
from slipstream.plugins.linear.cuda.weight import DeviceWeight
from slipstream.plugins.normed_router import cuda
from slipstream.plugins.normed_router.cuda import NormedRouter, Routing, normed_router
from slipstream.plugins.normed_router.reference import normed_router as reference
from slipstream.weights.tensor import QuantTensor, WeightFormat

pytestmark = pytest.mark.kernel

EXPERTS, WIDTH, EPS = 64, 96, 1e-5
FORMAT = WeightFormat((EXPERTS, WIDTH), "dense", "bfloat16")
BLAS = Tactics((9, 0), entries={f"bfloat16 {EXPERTS}x{WIDTH} 4": Tactic("blas")})


def run(
    name: str,
    tokens: int,
    device: str,
    *,
    biased: bool = False,
    corrected: bool = False,
) -> tuple[list[Any], list[Any]]:
    """Norm, experts and weights: what the kernels give, and what the reference does."""
    rng = np.random.default_rng(tokens)

    def vector(*shape: int) -> torch.Tensor:
        return torch.from_numpy(rng.normal(0, 1, shape).astype(np.float32)).to(torch.bfloat16)

    x, gain, bias = vector(tokens, WIDTH), vector(WIDTH), vector(EXPERTS) if biased else None
    correction = rng.normal(0, 1, EXPERTS).astype(np.float32) if corrected else None
    codes = rng.normal(0, 0.2, FORMAT.shape).astype(ml_dtypes.bfloat16)
    weight = QuantTensor("router", FORMAT, codes)
    layer = NormedRouter.of(
        DeviceWeight.from_blob(torch.from_numpy(pack(weight)).to(device), FORMAT),
        gain.to(device),
        EPS,
        None if bias is None else bias.to(device),
        None if correction is None else torch.from_numpy(correction).to(device),
        routing=Routing(**CASES[name]),
    )
    got = [part.float().cpu().numpy() for part in normed_router(x.to(device), layer, BLAS)]
    assert not layer.counters.any(), "as they were for the next"
    given = None if bias is None else bias.float().numpy()
    options = {"norm_eps": EPS, **CASES[name]}
    want = reference(x.float().numpy(), weight, gain.float().numpy(), given, correction, **options)
    return got, list(want)


@pytest.mark.parametrize(("biased", "corrected"), [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("name", CASES)
def test_one_launch_for_few_tokens(name: str, biased: bool, corrected: bool, device: str) -> None:
    got, want = run(name, 2, device, biased=biased, corrected=corrected)
    np.testing.assert_allclose(got[0], want[0], rtol=1e-2, atol=1e-3)
    # The norm is rounded before the product, so two experts that nearly tie may change places.
    same = got[1] == want[1]
    assert same.mean() > 0.9
    np.testing.assert_allclose(got[2][same], want[2][same], rtol=0.1)


def test_many_tokens_choose_as_few_do(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    fused, _ = run("renormalized", 4, device)
    monkeypatch.setattr(cuda, "FUSED_TOKENS", 3)
    apart, _ = run("renormalized", 4, device)
    np.testing.assert_array_equal(apart[0], fused[0])
    np.testing.assert_array_equal(apart[1], fused[1])
    np.testing.assert_allclose(apart[2], fused[2], rtol=1e-4)
