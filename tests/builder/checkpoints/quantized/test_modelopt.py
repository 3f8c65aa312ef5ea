"""Exports of modelopt 0.47 (made by tests/fixtures/make_modelopt.py), against its own decoding."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from slipstream.builder.checkpoints import open_checkpoint
from slipstream.builder.checkpoints.quantized.modelopt import unpack_row_pairs
from slipstream.errors import CheckpointError
from slipstream.weights.tensor import WeightFormat

FIXTURES = Path(__file__).parents[3] / "fixtures" / "modelopt"
DOWN, O_PROJ = "model.layers.0.mlp.down_proj", "model.layers.0.self_attn.o_proj"
SHAPE = (32, 96)
# The format of down_proj, whether it has a pre-scale, and what is said when it is opened.
FORMATS: dict[str, tuple[WeightFormat, bool, str]] = {
    "fp8": (WeightFormat(SHAPE, "float8_e4m3", "float32", 8, 96, activation="static"), False, ""),
    "fp8_channel": (
        WeightFormat(SHAPE, "float8_e4m3", "float32", 8, 96, activation="token"),
        False,
        "",
    ),
    "fp8_blocks": (WeightFormat(SHAPE, "float8_e4m3", "float32", 8, 16, rows=16), False, ""),
    "mxfp8": (WeightFormat(SHAPE, "float8_e4m3", "float8_e8m0fnu", 8, 32), False, "stay 16-bit"),
    "int8_smoothquant": (
        WeightFormat(SHAPE, "int", "float32", 8, 96, activation="token"),
        True,
        "for each token",
    ),
    "int8_weights": (WeightFormat(SHAPE, "int", "float32", 8, 96), False, ""),
    "int4_awq": (WeightFormat(SHAPE, "int", "float32", 4, 16), True, ""),
    "w4a8_awq": (WeightFormat(SHAPE, "int", "float32", 4, 16), True, "stay 16-bit"),
    "nvfp4": (WeightFormat(SHAPE, "float4_e2m1", "float8_e4m3fn", 4, 16), False, "stay 16-bit"),
    "nvfp4_weights": (WeightFormat(SHAPE, "float4_e2m1", "float8_e4m3fn", 4, 16), False, ""),
    "nvfp4_awq": (WeightFormat(SHAPE, "float4_e2m1", "float8_e4m3fn", 4, 16), False, "stay 16-bit"),
    "nvfp4_fp8": (WeightFormat(SHAPE, "float4_e2m1", "float8_e4m3fn", 4, 32), False, "stay 16-bit"),
    "mxfp4_fp8": (
        WeightFormat(SHAPE, "float4_e2m1", "float8_e8m0fnu", 4, 32),
        False,
        "stay 16-bit",
    ),
    "mixed": (WeightFormat(SHAPE, "float4_e2m1", "float8_e4m3fn", 4, 16), False, ""),
}
LINEARS = (
    *(f"model.layers.0.self_attn.{x}_proj" for x in "qkvo"),
    *(f"model.layers.0.mlp.{x}_proj" for x in ("gate", "up", "down")),
)


@pytest.mark.parametrize("name", FORMATS)
def test_an_export_equals_what_modelopt_decodes(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    form, pre_scaled, note = FORMATS[name]
    checkpoint = open_checkpoint(FIXTURES / name)
    lazy = checkpoint.tensor(f"{DOWN}.weight")
    assert lazy.format == form
    assert (lazy.input is not None) == pre_scaled
    assert note in caplog.text if note else not caplog.text
    for module, values in load_file(FIXTURES / name / "expected.safetensors").items():
        tensor = checkpoint.tensor(module).load()
        assert tensor.format == checkpoint.tensor(module).format
        np.testing.assert_array_equal(tensor.dequantize(), values.numpy())
    norms = ("input_layernorm", "post_attention_layernorm")
    assert set(checkpoint.names()) == {
        *(f"{module}.weight" for module in LINEARS),
        *(f"model.layers.0.{norm}.weight" for norm in norms),
        *("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"),
    }


def test_every_linear_of_smoothquant_has_a_pre_scale() -> None:
    checkpoint = open_checkpoint(FIXTURES / "int8_smoothquant")
    stored = _stored("int8_smoothquant")
    for module in LINEARS:
        transform = checkpoint.tensor(f"{module}.weight").input
        assert transform is not None and transform.scale is not None
        scale = stored[f"{module}.pre_quant_scale"].float().numpy()
        np.testing.assert_array_equal(transform.scale, scale)


def test_static_scales_of_fp8() -> None:
    tensor = open_checkpoint(FIXTURES / "fp8").tensor(f"{DOWN}.weight").load()
    assert tensor.input_scale is not None and tensor.input_scale.shape == (1,)
    assert tensor.input_scale[0] == _stored("fp8")[f"{DOWN}.input_scale"]


def test_kv_scales_and_formats_of_a_mixed_export() -> None:
    checkpoint = open_checkpoint(FIXTURES / "mixed")
    stored = _stored("mixed")
    attention = "model.layers.0.self_attn"
    assert checkpoint.kv_scales is not None
    assert checkpoint.kv_scales.k == (float(stored[f"{attention}.k_proj.k_scale"]),)
    assert checkpoint.kv_scales.v == (float(stored[f"{attention}.v_proj.v_scale"]),)
    form = checkpoint.tensor(f"{O_PROJ}.weight").format
    assert (form.kind, form.activation) == ("float8_e4m3", "static")


def test_pairs_of_rows_decode_nibble_by_nibble() -> None:
    codes = np.random.default_rng(0).integers(-8, 8, (38, 576))
    pairs = np.array([[a & 15 | (b & 15) << 4 for a, b in zip(*two, strict=True)]
                      for two in zip(codes[0::2], codes[1::2], strict=True)], np.uint8)  # fmt: skip
    np.testing.assert_array_equal(unpack_row_pairs(pairs).astype(int) - 8, codes)


def _stored(name: str) -> dict[str, Tensor]:
    return load_file(FIXTURES / name / "model.safetensors")


def _copy(name: str, directory: Path) -> Path:
    return Path(shutil.copytree(FIXTURES / name, directory / name))


def test_hf_quant_config_alone_is_enough(tmp_path: Path) -> None:
    path = _copy("mixed", tmp_path)
    config = json.loads((path / "config.json").read_text())
    del config["quantization_config"]
    (path / "config.json").write_text(json.dumps(config))
    form = open_checkpoint(path).tensor(f"{DOWN}.weight").format
    assert form == FORMATS["mixed"][0]


def _change(path: Path, **changes: object) -> None:
    """Change keys of both descriptions of the quantization."""
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] |= changes
    (path / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("algorithm", "message"),
    [
        ("NVFP4_SVD", "low-rank"),
        ("MXINT8", "'MXINT8' of modelopt, which cannot be read; FP8, FP8_PER"),
        (None, "'NONE' of modelopt"),
    ],
)
def test_an_algorithm_that_is_not_read(algorithm: str | None, message: str, tmp_path: Path) -> None:
    path = _copy("fp8", tmp_path)
    (path / "hf_quant_config.json").unlink()
    _change(path, quant_algo=algorithm)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(path)


@pytest.mark.parametrize(
    ("fixture", "name"),
    [
        ("fp8", "weight"),
        ("nvfp4", "weight_scale_2"),
        ("nvfp4", "weight"),
    ],
)
def test_a_missing_tensor_is_named(fixture: str, name: str, tmp_path: Path) -> None:
    path = _copy(fixture, tmp_path)
    _edit(path, {f"{DOWN}.{name}": None})
    with pytest.raises(CheckpointError, match=f"lacks the tensor {DOWN}.{name}"):
        open_checkpoint(path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("weight_scale", "has shape .3, 5., which fits no grouping"),
        ("svdquant_lora_a", "holds 1 tensors that its quantization does not account for"),
    ],
)
def test_a_tensor_that_does_not_fit_is_refused(name: str, message: str, tmp_path: Path) -> None:
    path = _copy("int8_weights", tmp_path)
    _edit(path, {f"{DOWN}.{name}": torch.ones(3, 5)})
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(path)


def _edit(path: Path, changes: dict[str, Tensor | None]) -> None:
    tensors = load_file(path / "model.safetensors")
    for name, value in changes.items():
        tensors.pop(name, None)
        if value is not None:
            tensors[name] = value
    save_file(tensors, path / "model.safetensors")


def test_where_the_lists_and_the_tensors_disagree(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = _copy("int8_weights", tmp_path)
    _edit(
        path,
        {
            f"{O_PROJ}.weight_scale": None,
            f"{O_PROJ}.weight": torch.ones(32, 32),
        },
    )
    _change(path, ignore=["lm_head", "model.layers.0.mlp*"])
    checkpoint = open_checkpoint(path)
    assert checkpoint.tensor(f"{O_PROJ}.weight").format.kind == "dense"
    assert checkpoint.tensor(f"{DOWN}.weight").format.kind == "int"
    assert f"1 modules are not quantized although nothing excludes them, such as {O_PROJ}" in (
        caplog.text
    )
    assert f"{DOWN}: quantized, though config.json excludes it" in caplog.text


def test_an_fp8_cache_of_another_type_has_no_scales_for_ours(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = _copy("mixed", tmp_path)
    (path / "hf_quant_config.json").unlink()
    _change(path, kv_cache_scheme="NVFP4")
    assert open_checkpoint(path).kv_scales is None
    assert "not of fp8" in caplog.text
