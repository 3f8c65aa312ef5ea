"""Blocks of every type, against the reference decoder."""

from __future__ import annotations

import gguf
import ml_dtypes
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from tests.builder.checkpoints.gguf.models import (
    random_blocks,
)

from slipstream.builder.checkpoints.gguf import blocks as gguf_blocks
from slipstream.builder.checkpoints.gguf.blocks import decode


@pytest.mark.parametrize(
    ("kind", "bits", "group", "zero", "dtype"),
    [
        (Type.Q4_0, 4, 32, "midpoint", np.float16),
        (Type.Q4_1, 4, 32, "offset", np.float16),
        (Type.Q5_0, 8, 32, "midpoint", np.float16),
        (Type.Q5_1, 8, 32, "offset", np.float16),
        (Type.Q8_0, 8, 32, "midpoint", np.float16),
        (Type.Q2_K, 4, 16, "offset", np.float32),
        (Type.Q3_K, 4, 16, "midpoint", np.float32),
        (Type.Q4_K, 4, 32, "offset", np.float32),
        (Type.Q5_K, 8, 32, "offset", np.float32),
        (Type.Q6_K, 8, 16, "midpoint", np.float32),
        (Type.IQ4_NL, 8, 32, "midpoint", np.float16),
        (Type.IQ4_XS, 8, 32, "midpoint", np.float32),
        (Type.MXFP4, 4, 32, "midpoint", ml_dtypes.float8_e8m0fnu),
    ],
)
@pytest.mark.parametrize("chunk", [1 << 22, 700])
def test_blocks_stay_quantized_and_decode_like_the_reference(
    kind: Type,
    bits: int,
    group: int,
    zero: str,
    dtype: type[np.generic],
    chunk: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gguf_blocks, "_CHUNK", chunk)
    data = random_blocks(kind, 47, 768)

    tensor = decode("w", kind, (47, 768), data.reshape(-1))

    form = tensor.format
    assert form.kind == ("float4_e2m1" if kind == Type.MXFP4 else "int")
    assert (form.bits, form.group, form.zero) == (bits, group, zero)
    assert form == gguf_blocks.weight_format("w", kind, (47, 768))
    assert tensor.scale is not None and tensor.scale.shape == (47, 768 // group)
    assert tensor.scale.dtype == np.dtype(form.dtype) == dtype
    assert tensor.codes.shape == (47, 768 * bits // 8)
    np.testing.assert_array_equal(tensor.dequantize(), gguf.quants.dequantize(data, kind))


@pytest.mark.parametrize("kind", [Type.TQ1_0, Type.IQ2_XXS, Type.IQ3_S, Type.IQ1_M])
def test_other_blocks_become_float32_of_the_same_numbers(kind: Type) -> None:
    data = random_blocks(kind, 4, 512)

    tensor = decode("w", kind, (4, 512), data.reshape(-1))

    assert (tensor.format.kind, tensor.format.dtype) == ("dense", "float32")
    np.testing.assert_array_equal(tensor.dequantize(), gguf.quants.dequantize(data, kind))
