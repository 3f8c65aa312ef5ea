"""Other groups, wider codes: never another number."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from tests.quantized_models import Scheme, float8, integers

from slipstream.builder.graph.passes.fit_groups import FitGroups, refit
from slipstream.builder.targets.cpu.matmul_nbits import can_lower
from slipstream.plugins.linear.cpu import packing
from slipstream.plugins.linear.cuda import packing as cuda_packing
from slipstream.weights.tensor import QuantTensor, WeightFormat

TARGETS = {
    "cpu": FitGroups((packing.can_pack, can_lower)),
    "matmul_nbits": FitGroups((can_lower,)),
    "cuda": FitGroups((cuda_packing.can_pack,)),
}
# scheme, K, then what holds it: (bits, rows, group, zero) by target; None is nothing.
CASES: dict[str, tuple[Scheme, int, dict[str, tuple[int, int, int, str] | None]]] = {
    "ragged": (integers(4, 128, "zero"), 576, dict.fromkeys(TARGETS, (4, 1, 64, "zero"))),
    "ragged offsets": (
        integers(8, 128, "offset"), 160, dict.fromkeys(TARGETS, (8, 1, 32, "offset")),
    ),
    "wide": (
        integers(4, 256), 512,
        {"cpu": (4, 1, 256, "midpoint"), "matmul_nbits": (4, 1, 256, "midpoint"),
         "cuda": (4, 1, 128, "midpoint")},
    ),
    "int8 rows": (
        integers(8), 576,
        {"cpu": (8, 1, 576, "midpoint"), "matmul_nbits": (8, 1, 64, "midpoint"),
         "cuda": (8, 1, 576, "midpoint")},
    ),
    "int8 rows with zeros": (
        integers(8, 0, "zero"), 576,
        {"cpu": (8, 1, 576, "zero"), "matmul_nbits": (8, 1, 64, "zero"),
         "cuda": (8, 1, 64, "zero")},
    ),
    "int4 rows": (
        integers(4), 576,
        {"cpu": (4, 1, 576, "midpoint"), "matmul_nbits": (4, 1, 64, "midpoint"),
         "cuda": (4, 1, 64, "midpoint")},
    ),
    "16 with zeros": (
        integers(4, 16, "zero", beyond=True), 64,
        {"cpu": (8, 1, 16, "midpoint"), "matmul_nbits": (4, 1, 16, "zero"), "cuda": None},
    ),
    "16": (
        integers(4, 16), 64,
        {"cpu": (8, 1, 16, "midpoint"), "matmul_nbits": (4, 1, 16, "midpoint"), "cuda": None},
    ),
    "16 with offsets": (
        integers(4, 16, "offset"), 64,
        {"cpu": (4, 1, 16, "offset"), "matmul_nbits": (4, 1, 16, "offset"), "cuda": None},
    ),
    "80 columns": (
        integers(4, 0, "zero"), 80,
        {"cpu": (4, 1, 16, "zero"), "matmul_nbits": (4, 1, 16, "zero"),
         "cuda": (8, 1, 80, "midpoint")},
    ),
    "250 columns": (integers(8, 0, "zero"), 250, dict.fromkeys(TARGETS)),
    "large blocks": (
        float8(256, 256, activation="group"), 600,
        {"cpu": None, "matmul_nbits": None, "cuda": (8, 128, 128, "midpoint")},
    ),
    "float8 rows": (
        float8(), 250, {"cpu": None, "matmul_nbits": None, "cuda": (8, 1, 250, "midpoint")},
    ),
    "float8 groups": (
        float8(1, 128, activation="none"), 256, dict.fromkeys(TARGETS),
    ),
}  # fmt: skip


def weight(name: str) -> QuantTensor:
    scheme, k, _ = CASES[name]
    values = np.random.default_rng(k).normal(0, 0.1, (300, k)).astype(np.float32)
    return scheme("w", values)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", CASES)
def test_numbers_stay_as_they_are(name: str, target: str) -> None:
    tensor, expected = weight(name), CASES[name][2][target]
    found = TARGETS[target].fitting(tensor.format)
    if expected is None:
        assert found is None
        return
    assert found is not None
    assert (found.bits, found.rows, found.group, found.zero) == expected
    fitted = refit(tensor, found)
    assert fitted.format == found
    assert fitted.scale is not None
    assert fitted.scale.shape == (-(-300 // found.rows), -(-found.shape[1] // found.group))
    np.testing.assert_array_equal(fitted.dequantize(), tensor.dequantize())


def test_rows_that_share_scales_get_their_own() -> None:
    fmt = WeightFormat((10, 64), "int", "float16", 8, 32, "zero", rows=4)
    rng = np.random.default_rng(0)
    tensor = QuantTensor(
        "w",
        fmt,
        rng.integers(0, 256, (10, 64), dtype=np.uint8),
        rng.uniform(0.1, 1, (3, 2)).astype(np.float16),
        rng.integers(0, 256, (3, 2), dtype=np.uint8),
    )
    for fitting in TARGETS.values():
        found = fitting.fitting(fmt)
        assert found == replace(fmt, rows=1)
        np.testing.assert_array_equal(refit(tensor, found).dequantize(), tensor.dequantize())
