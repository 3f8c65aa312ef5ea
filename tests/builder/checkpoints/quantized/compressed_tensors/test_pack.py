"""Integers packed into words, of every width and order."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tests.builder.checkpoints.quantized.compressed_tensors.models import (
    MODULE,
    K,
    N,
    compressed,
    int_args,
    matrix,
    write_matrix,
)
from torch import Tensor

from slipstream.builder.checkpoints import open_checkpoint


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize(
    ("strategy", "dtype"), [("group", torch.bfloat16), ("channel", torch.float16)]
)
def test_integers_of_every_width(
    bits: int, strategy: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    args = int_args(bits, strategy, symmetric=bits % 2 == 1)
    state = compressed(args, "pack-quantized", dtype)
    tensor = matrix(write_matrix(tmp_path, args, state, format="pack-quantized"))
    assert tensor.format.dtype == str(dtype).removeprefix("torch.")
    assert tensor.format.bits == (4 if bits <= 4 else 8)
    codes, scale, zero = plain_numbers(state, bits)
    group = np.arange(K) // (K // scale.shape[1])
    np.testing.assert_array_equal(tensor.dequantize(), (codes - zero[:, group]) * scale[:, group])


def plain_numbers(
    state: Mapping[str, Tensor], bits: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes, scales and zeros in float32, taken from integers of any size bit by bit."""

    def numbers(words: np.ndarray, count: int) -> list[int]:
        whole = sum(int(word) % 2**32 << 32 * i for i, word in enumerate(words))
        return [(whole >> bits * i) % 2**bits - 2 ** (bits - 1) for i in range(count)]

    codes = np.array([numbers(row, K) for row in state["weight_packed"].numpy()], np.float32)
    scale = state["weight_scale"].float().numpy()
    zero = np.zeros_like(scale)
    if "weight_zero_point" in state:
        columns = state["weight_zero_point"].numpy().T
        zero = np.array([numbers(column, N) for column in columns], np.float32).T
    return codes, scale, zero


@pytest.mark.parametrize("bits", [2, 3, 5, 6, 7])
def test_words_that_hold_whole_codes_only(bits: int, tmp_path: Path) -> None:
    """Codes of older versions did not straddle words."""
    args = int_args(bits, "group", symmetric=False)
    dense = compressed(args, "pack-quantized")
    codes = np.random.default_rng(0).integers(0, 2**bits, (N, K))
    zeros = np.random.default_rng(1).integers(0, 2**bits, (N, K // 64))
    state = dense | {
        "weight_packed": torch.from_numpy(_padded_words(codes, bits)),
        "weight_zero_point": torch.from_numpy(_padded_words(zeros.T, bits).T.copy()),
    }
    tensor = matrix(write_matrix(tmp_path, args, state, format="pack-quantized"))
    scale = np.repeat(dense["weight_scale"].numpy(), 64, axis=1)
    expected = (codes - np.repeat(zeros, 64, axis=1)).astype(np.float32) * scale
    np.testing.assert_array_equal(tensor.dequantize(), expected)


def _padded_words(codes: np.ndarray, bits: int) -> np.ndarray:
    per = 32 // bits
    padded = np.pad(codes, ((0, 0), (0, -codes.shape[1] % per))).reshape(len(codes), -1, per)
    words = (padded.astype(np.uint64) << (np.arange(per, dtype=np.uint64) * bits)).sum(axis=2)
    return np.asarray(words.astype(np.uint32).view(np.int32))


@pytest.mark.parametrize("name", ["int3_act_order", "int4_act_order"])
def test_files_of_an_older_version_equal_what_it_decompressed(name: str) -> None:
    """Made by tests/fixtures/make_compressed_tensors.py."""
    directory = Path(__file__).parents[4] / "fixtures" / "compressed_tensors" / name
    tensor = open_checkpoint(directory).tensor(f"{MODULE}.weight").load()
    expected = load_file(directory / "expected.safetensors")[f"{MODULE}.weight"]
    np.testing.assert_array_equal(tensor.dequantize(), expected.numpy())
    assert tensor.input is not None and tensor.input.perm is not None


@pytest.mark.parametrize("bits", [4, 8])
def test_act_order_becomes_a_permutation_of_x(bits: int, tmp_path: Path) -> None:
    """weight_g_idx, which versions before 0.20 wrote: column k has the scale of group g_idx[k]."""
    args = int_args(bits, "group", symmetric=False)
    state = compressed(args, "pack-quantized")
    g_idx = torch.randperm(K, generator=torch.Generator().manual_seed(2)).int() // 64
    stored = state | {"weight_g_idx": g_idx}
    path = write_matrix(tmp_path, args | {"actorder": "group"}, stored, format="pack-quantized")
    lazy = open_checkpoint(path).tensor(f"{MODULE}.weight")
    tensor = lazy.load()
    assert lazy.input is not None and lazy.input.equals(tensor.input)
    assert lazy.input.perm is not None
    np.testing.assert_array_equal(g_idx.numpy()[lazy.input.perm], np.arange(K) // 64)
    codes, scale, zero = plain_numbers(state, bits)
    expected = (codes - zero[:, g_idx.numpy()]) * scale[:, g_idx.numpy()]
    np.testing.assert_array_equal(tensor.dequantize(), expected)


@pytest.mark.parametrize("g_idx", [torch.full((K,), -1), torch.arange(K) // 64])
def test_columns_in_order_need_no_permutation(g_idx: Tensor, tmp_path: Path) -> None:
    args = int_args(4, "group")
    state = compressed(args, "pack-quantized") | {"weight_g_idx": g_idx.int()}
    path = write_matrix(tmp_path, args, state, format="pack-quantized")
    assert open_checkpoint(path).tensor(f"{MODULE}.weight").input is None
