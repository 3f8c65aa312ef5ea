"""Blobs of the CUDA kernels hold exactly the weight that went in, in the order they say."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from tests.plugins.linear.weights import random_weight

from slipstream.plugins.linear.cuda.packing import (
    ALIGNMENT,
    can_pack,
    format_attributes,
    format_of,
    pack,
    packed_size,
    sections,
    unpack,
)
from slipstream.weights.tensor import WeightFormat

FORMATS = [
    WeightFormat((24, 576), "dense", "bfloat16"),
    WeightFormat((24, 576), "dense", "float16"),
    WeightFormat((24, 576), "float8_e4m3", "float32", 8, 576, activation="token"),
    WeightFormat((24, 576), "float8_e4m3", "float32", 8, 576, activation="static"),
    WeightFormat((200, 576), "float8_e4m3", "float32", 8, 128, rows=128, activation="group"),
    WeightFormat((24, 576), "int", "float16", 4, 64, "zero"),
    WeightFormat((24, 576), "int", "float16", 4, 32, "offset"),
    WeightFormat((24, 512), "int", "float32", 4, 128, "midpoint"),
    WeightFormat((24, 576), "float4_e2m1", "float8_e8m0fnu", 4, 32),
    WeightFormat((24, 576), "int", "float16", 8, 64, "zero"),
    WeightFormat((24, 576), "int", "float32", 8, 576, "midpoint", activation="token"),
]


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_a_blob_holds_its_weight(fmt: WeightFormat) -> None:
    weight = random_weight(fmt, seed=3)
    blob = pack(weight)
    assert blob.shape == (packed_size(fmt),) and blob.nbytes % ALIGNMENT == 0
    back = unpack(blob, fmt)
    np.testing.assert_array_equal(back.codes.view(np.uint8), weight.codes.view(np.uint8))
    np.testing.assert_array_equal(back.dequantize(), weight.dequantize())
    if weight.input_scale is not None:
        np.testing.assert_array_equal(back.input_scale, weight.input_scale)


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_a_node_says_what_its_blob_holds(fmt: WeightFormat) -> None:
    n, k = fmt.shape
    defaults = {"zero_kind": 0, "scale_bytes": 2}
    sizes = {"out_features": n, "in_features": k}
    assert format_of({**defaults, **format_attributes(fmt), **sizes}) == fmt


@pytest.mark.parametrize("bits", [4, 8])
def test_code_i_of_word_j_is_element_32i_plus_j(bits: int) -> None:
    fmt = WeightFormat((2, 1024 // bits * 2), "int", "float16", bits, 32)
    weight = random_weight(fmt)
    words = pack(weight)[: sections(fmt)["codes"].nbytes].view(np.uint32).reshape(2, -1)
    codes = weight.unpacked_codes()
    for chunk, i, j in [(0, 0, 0), (0, 1, 0), (0, 0, 1), (1, 32 // bits - 1, 31)]:
        element = chunk * 1024 // bits + 32 * i + j
        word = int(words[1, chunk * 32 + j])
        assert word >> (bits * i) & (2**bits - 1) == codes[1, element]


@pytest.mark.parametrize(
    "fmt",
    [
        WeightFormat((24, 576)),
        WeightFormat((24,), "dense", "bfloat16"),
        WeightFormat((24, 576), "int", "float16", 4, 48),
        WeightFormat((24, 576), "int", "float16", 4, 128),
        WeightFormat((24, 576), "int", "float16", 4, 576),
        WeightFormat((24, 576), "float8_e4m3", "float32", 8, 64, activation="token"),
        WeightFormat((24, 576), "float4_e2m1", "float8_e4m3fn", 4, 16),
        WeightFormat((24, 576), "float4_e2m1", "float8_e8m0fnu", 4, 64),
    ],
    ids=str,
)
def test_what_the_kernels_do_not_hold_is_told(fmt: WeightFormat) -> None:
    assert not can_pack(fmt)


def test_float8_codes_are_stored_as_they_are() -> None:
    fmt = FORMATS[2]
    weight = random_weight(fmt)
    stored = pack(weight)[: 24 * 576].view(ml_dtypes.float8_e4m3fn).reshape(24, 576)
    np.testing.assert_array_equal(stored.view(np.uint8), weight.codes.view(np.uint8))
