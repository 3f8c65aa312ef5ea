"""Scales of KV caches in the spellings of every quantizer, and what is made of missing ones."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from safetensors.torch import load_file, save_file
from tests.builder.checkpoints.quantized.compressed_tensors.models import (
    Args,
    compressed,
    int_args,
    write_matrix,
)
from torch import Tensor

from slipstream.builder.checkpoints import open_checkpoint
from slipstream.weights.tensor import KVScales

FP8_KV = QuantizationArgs(num_bits=8, type="float", strategy="tensor", symmetric=True)


def write_kv(directory: Path, scheme: Args | None, tensors: Mapping[str, Tensor]) -> Path:
    """A matrix and two layers' KV scales."""
    args = int_args(8, "channel")
    config = {"format": "pack-quantized", "kv_cache_scheme": scheme}
    write_matrix(directory, args, compressed(args, "pack-quantized"), **config)
    stored = load_file(directory / "model.safetensors")
    save_file(stored | dict(tensors), directory / "model.safetensors")
    return directory


def kv_tensors(k: str, v: str) -> dict[str, Tensor]:
    """Scales of two layers in a spelling."""
    return {
        f"model.layers.{i}.self_attn.{name}": torch.tensor([value + i], dtype=torch.bfloat16)
        for i in (0, 1)
        for name, value in ((k, 0.5), (v, 0.25))
    }


@pytest.mark.parametrize(
    ("k", "v"),
    [
        ("k_scale", "v_scale"),
        ("attn.k_scale", "attn.v_scale"),
        ("qkv_proj.k_scale", "qkv_proj.v_scale"),
        ("k_proj.k_scale", "v_proj.v_scale"),
        ("k_proj.output_scale", "v_proj.output_scale"),
        ("k_cache.scale", "v_cache.scale"),
        ("attn.k_cache.scale", "attn.v_cache.scale"),
    ],
)
def test_kv_scales_in_every_spelling(k: str, v: str, tmp_path: Path) -> None:
    path = write_kv(tmp_path, FP8_KV.model_dump(), kv_tensors(k, v))
    assert open_checkpoint(path).kv_scales == KVScales((0.5, 1.5), (0.25, 1.25))


def test_one_kv_scale_serves_keys_and_values(tmp_path: Path) -> None:
    tensors = {
        f"model.layers.{i}.self_attn.kv_scale": torch.tensor(0.5 + i, dtype=torch.float32)
        for i in (0, 1)
    }
    path = write_kv(tmp_path, None, tensors)
    assert open_checkpoint(path).kv_scales == KVScales((0.5, 1.5), (0.5, 1.5))


def test_kv_scales_a_head_become_the_largest(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tensors = kv_tensors("k_scale", "v_scale")
    tensors["model.layers.0.self_attn.k_scale"] = torch.tensor([0.25, 0.75]).reshape(2, 1, 1)
    tensors["model.layers.0.self_attn.q_scale"] = torch.ones(6, 1, 1)
    tensors["model.layers.0.self_attn.k_zero_point"] = torch.zeros(2, 1, 1, dtype=torch.int8)
    path = write_kv(tmp_path, FP8_KV.model_dump(), tensors)
    assert open_checkpoint(path).kv_scales == KVScales((0.75, 1.5), (0.25, 1.25))
    assert "each layer uses its largest" in caplog.text and "queries" in caplog.text


@pytest.mark.parametrize("value", [None, 0.0, -1.0, float("nan")])
def test_a_layer_without_a_kv_scale_uses_1_and_says_so(
    value: float | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tensors = kv_tensors("k_scale", "v_scale")
    del tensors["model.layers.1.self_attn.v_scale"]
    if value is not None:
        tensors["model.layers.1.self_attn.v_scale"] = torch.tensor([value])
    path = write_kv(tmp_path, FP8_KV.model_dump(), tensors)
    assert open_checkpoint(path).kv_scales == KVScales((0.5, 1.5), (0.25, 1.0))
    assert "1 of 2 layers have no usable scale of v, such as layer 1" in caplog.text


def test_scales_of_an_int8_cache_are_not_those_of_fp8(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    scheme = FP8_KV.model_dump() | {"type": "int"}
    path = write_kv(tmp_path, scheme, kv_tensors("k_scale", "v_scale"))
    assert open_checkpoint(path).kv_scales is None
    assert "not of fp8" in caplog.text
