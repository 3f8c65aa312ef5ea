"""The dense Linear and Embedding kernels against their NumPy reference."""

from __future__ import annotations

from typing import TypedDict

import numpy as np
import pytest
from numpy.typing import NDArray
from tests.plugins.linear import native
from tests.plugins.linear.weights import random_weight

from slipstream.plugins.gated_mlp import GATES
from slipstream.plugins.linear import reference
from slipstream.plugins.linear.cpu.packing import pack
from slipstream.weights.tensor import QuantTensor, WeightFormat, numpy_dtype

Floats = NDArray[np.float32]

DTYPES = ("float32", "float16", "bfloat16")
# Around the blocks of every instruction set, and more than a segment.
BATCHES = (1, 2, 3, 4, 5, 6, 7, 8, 13, 14, 15, 29, 130)
# Odd numbers of tiles, rows and columns; more columns than a widened part.
SHAPES = ((1, 1), (50, 63), (34, 576), (98, 301))


class Options(TypedDict, total=False):
    bias: Floats
    residual: Floats
    norm_weight: Floats
    norm_eps: float


def normal(*shape: int, seed: int = 1) -> Floats:
    return np.random.default_rng(seed).normal(0, 1, shape).astype(np.float32)


def packed(weight: QuantTensor, gated: bool = False) -> native.Packed:
    return native.packed_weight(pack(weight, gated), weight.format, gated)


def assert_close(got: Floats, want: Floats) -> None:
    """Within 5e-6 of the size of the outputs: float32 sums against float64 ones."""
    np.testing.assert_allclose(got, want, rtol=0, atol=5e-6 * max(float(np.abs(want).max()), 1e-6))


@pytest.mark.parametrize("dtype", DTYPES)
def test_matches_reference(isa: str, dtype: str) -> None:
    for shape in SHAPES:
        weight = random_weight(WeightFormat(shape, "dense", dtype))
        x, blob = normal(max(BATCHES), shape[1]), packed(weight)
        want = reference.linear(x, weight)
        for rows in BATCHES:
            assert_close(native.linear(x[:rows], blob, isa), want[:rows])


@pytest.mark.parametrize("gate", [None, *GATES])
@pytest.mark.parametrize("names", ["", "bias residual norm"])
def test_prologue_and_epilogues(isa: str, names: str, gate: str | None) -> None:
    gated, kind = gate is not None, GATES[gate or "silu"]
    for n, k in SHAPES[1:]:
        weight = random_weight(WeightFormat((n, k), "dense", "bfloat16"))
        for rows in (1, 5, 40):
            options = Options()
            if names:
                options["bias"] = normal(n)
                options["residual"] = normal(rows, n // 2 if gated else n, seed=2)
                options["norm_weight"], options["norm_eps"] = normal(k, seed=3), 1e-5
            x = 3 * normal(rows, k)
            got = native.linear(x, packed(weight, gated), isa, gate=kind, **options)
            assert_close(got, reference.linear(x, weight, gated=gated, gate=kind, **options))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_does_not_depend_on_its_batch_or_the_threads(isa: str, dtype: str) -> None:
    n, k, rows = 82, 515, 300  # enough tokens for several segments, tasks and parts
    weight = packed(random_weight(WeightFormat((n, k), "dense", dtype)), gated=True)
    x, options = normal(rows, k), Options(bias=normal(n), norm_weight=normal(k), norm_eps=1e-6)
    whole = native.linear(x, weight, isa, **options)
    np.testing.assert_array_equal(whole, native.linear(x, weight, isa, threads=1, **options))
    for count in BATCHES:
        for first in (0, 37, rows - count):
            part = slice(first, first + count)
            few = native.linear(x[part], weight, isa, **options)
            np.testing.assert_array_equal(few, whole[part])


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_number_of_a_type_is_read_as_it_is(isa: str, dtype: str) -> None:
    """All 65,536 of a narrow one: subnormal, infinite and NaN too."""
    if dtype == "float32":
        codes = np.array([1e-45, -1e-38, -0.0, np.inf, -np.inf, np.nan, 3e38, 1.0], np.float32)
        codes = np.resize(codes, (64, 40))
    else:
        codes = np.arange(1 << 16, dtype=np.uint16).view(numpy_dtype(dtype)).reshape(256, 256)
    weight = QuantTensor("w", WeightFormat(codes.shape, "dense", dtype), codes)
    rows, k = codes.shape
    got = native.embedding(np.arange(rows, dtype=np.int32), packed(weight), isa)
    np.testing.assert_array_equal(got, codes.astype(np.float32))
    finite = np.where(np.isfinite(codes.astype(np.float32)), codes, 0).astype(codes.dtype)
    blob = packed(QuantTensor("w", weight.format, finite))
    for tokens in (k, 3):  # widened for many tokens, and read as they are for few
        got = native.linear(np.eye(tokens, k, dtype=np.float32), blob, isa)
        np.testing.assert_array_equal(got, finite.astype(np.float32)[:, :tokens].T)


def test_not_a_number_reaches_its_own_token_and_row_only(isa: str) -> None:
    weight = random_weight(WeightFormat((32, 97), "dense", "bfloat16"))
    x = normal(9, 97)
    clean = native.linear(x, packed(weight), isa)
    x[1, 40] = np.nan
    weight.codes[5, 96] = np.nan
    got = native.linear(x, packed(weight), isa)
    assert np.isnan(got[1]).all() and np.isnan(got[:, 5]).all()
    kept = np.ix_([0, *range(2, 9)], [*range(5), *range(6, 32)])
    np.testing.assert_array_equal(got[kept], clean[kept])


def test_residual_may_be_the_output(isa: str) -> None:
    weight = packed(random_weight(WeightFormat((50, 64), "dense", "float16")))
    x, residual = normal(5, 64), normal(5, 50)
    want = native.linear(x, weight, isa, residual=residual)
    native.linear_into(residual, x, weight, isa, residual)
    np.testing.assert_array_equal(residual, want)
