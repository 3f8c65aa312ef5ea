"""Files that compressed-tensors writes, against its own decompression and a plain decoder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    preset_name_to_scheme,
)
from safetensors.torch import load_file, save_file
from tests.builder.checkpoints.quantized.compressed_tensors.models import (
    MODULE,
    SHAPE,
    Args,
    K,
    N,
    compressed,
    decompressed,
    int_args,
    matrix,
    write_matrix,
    write_model,
)
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from slipstream.builder.checkpoints import open_checkpoint
from slipstream.builder.checkpoints.base import Checkpoint
from slipstream.errors import CheckpointError
from slipstream.weights.tensor import WeightFormat


def quantized(directory: Path) -> Checkpoint:
    """The checkpoint, checked to have the weights of the model and nothing else."""
    checkpoint = open_checkpoint(directory)
    with torch.device("meta"):
        names = set(LlamaForCausalLM(LlamaConfig(**SHAPE)).state_dict())
    assert set(checkpoint.names()) == names
    return checkpoint


SCHEMES: dict[str, tuple[Args, Args | None, WeightFormat]] = {
    "int4 groups": (
        int_args(4, "group"),
        None,
        WeightFormat((320, 192), "int", "float32", 4, 64),
    ),
    "int4 groups with zeros": (
        int_args(4, "group", symmetric=False, group=32),
        None,
        WeightFormat((320, 192), "int", "float32", 4, 32, "zero"),
    ),
    "int4 rows with zeros": (
        int_args(4, "channel", symmetric=False),
        None,
        WeightFormat((320, 192), "int", "float32", 4, 192, "zero"),
    ),
    "int4 tensor": (
        int_args(4, "tensor"),
        None,
        WeightFormat((320, 192), "int", "float32", 4, 192),
    ),
    "int4 tensor with a zero": (
        int_args(4, "tensor", symmetric=False),
        None,
        WeightFormat((320, 192), "int", "float32", 4, 192, "zero"),
    ),
    "int8 groups": (
        int_args(8, "group", symmetric=False),
        None,
        WeightFormat((320, 192), "int", "float32", 8, 64, "zero"),
    ),
    "int3 groups": (int_args(3, "group"), None, WeightFormat((320, 192), "int", "float32", 4, 64)),
    "int6 groups with zeros": (
        int_args(6, "group", symmetric=False),
        None,
        WeightFormat((320, 192), "int", "float32", 8, 64, "zero"),
    ),
    "W8A8": (
        int_args(8, "channel"),
        {"num_bits": 8, "strategy": "token", "dynamic": True},
        WeightFormat((320, 192), "int", "float32", 8, 192, activation="token"),
    ),
    "W8A8 with zeros": (
        int_args(8, "channel", symmetric=False),
        {"num_bits": 8, "strategy": "token", "dynamic": True},
        WeightFormat((320, 192), "int", "float32", 8, 192, "zero", activation="token"),
    ),
    "W8A8 static, asymmetric": (
        int_args(8, "tensor"),
        {"num_bits": 8, "strategy": "tensor", "symmetric": False},
        WeightFormat((320, 192), "int", "float32", 8, 192, activation="token"),
    ),
    "W4A8": (
        int_args(4, "channel"),
        {"num_bits": 8, "strategy": "token", "dynamic": True},
        WeightFormat((320, 192), "int", "float32", 4, 192),
    ),
    "FP8 static": (
        {"num_bits": 8, "type": "float", "strategy": "tensor"},
        {"num_bits": 8, "type": "float", "strategy": "tensor"},
        WeightFormat((320, 192), "float8_e4m3", "float32", 8, 192, activation="static"),
    ),
    "FP8 dynamic": (
        {"num_bits": 8, "type": "float", "strategy": "channel"},
        {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True},
        WeightFormat((320, 192), "float8_e4m3", "float32", 8, 192, activation="token"),
    ),
    "FP8 blocks": (
        {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [128, 128]},
        {"num_bits": 8, "type": "float", "strategy": "group", "group_size": 128, "dynamic": True},
        WeightFormat((320, 192), "float8_e4m3", "float32", 8, 128, rows=128, activation="group"),
    ),
    "FP8 weights only": (
        {"num_bits": 8, "type": "float", "strategy": "channel"},
        None,
        WeightFormat((320, 192), "float8_e4m3", "float32", 8, 192),
    ),
}
PRESETS = {
    "NVFP4": WeightFormat((320, 192), "float4_e2m1", "float8_e4m3fn", 4, 16),
    "NVFP4A16": WeightFormat((320, 192), "float4_e2m1", "float8_e4m3fn", 4, 16),
    "MXFP4A16": WeightFormat((320, 192), "float4_e2m1", "float8_e8m0fnu", 4, 32),
    "MXFP8": WeightFormat((320, 192), "float8_e4m3", "float8_e8m0fnu", 8, 32),
    "MXFP8A16": WeightFormat((320, 192), "float8_e4m3", "float8_e8m0fnu", 8, 32),
}


@pytest.mark.parametrize("name", SCHEMES)
def test_a_model_equals_what_the_library_decompresses(name: str, tmp_path: Path) -> None:
    weights, inputs, form = SCHEMES[name]
    scheme = QuantizationScheme(
        targets=["Linear"],
        weights=QuantizationArgs(**weights),
        input_activations=QuantizationArgs(**inputs) if inputs else None,
    )
    config = QuantizationConfig(config_groups={"group_0": scheme}, ignore=["lm_head"])
    model = write_model(tmp_path, config)
    checkpoint = quantized(tmp_path)
    assert checkpoint.tensor("model.layers.0.mlp.up_proj.weight").format == form
    assert checkpoint.tensor("lm_head.weight").format.kind == "dense"
    _same(checkpoint, decompressed(model))


def _same(checkpoint: Checkpoint, expected: Mapping[str, Tensor]) -> None:
    assert len(expected) >= 6
    for name, values in expected.items():
        tensor = checkpoint.tensor(name).load()
        assert tensor.format == checkpoint.tensor(name).format
        np.testing.assert_array_equal(tensor.dequantize(), values.numpy())


@pytest.mark.parametrize("preset", PRESETS)
def test_a_float4_or_mx_model_equals_what_the_library_decompresses(
    preset: str, tmp_path: Path
) -> None:
    scheme = preset_name_to_scheme(preset, ["Linear"])
    config = QuantizationConfig(config_groups={"group_0": scheme}, ignore=["lm_head"])
    model = write_model(tmp_path, config)
    checkpoint = quantized(tmp_path)
    assert checkpoint.tensor("model.layers.0.mlp.up_proj.weight").format == PRESETS[preset]
    expected = decompressed(model)
    if "NV" not in preset:
        _same(checkpoint, expected)
        return
    for name, values in expected.items():
        tensor = checkpoint.tensor(name).load()
        stored = dict(model.get_submodule(name.removesuffix(".weight")).named_parameters())
        np.testing.assert_array_equal(tensor.codes, stored["weight_packed"].numpy())
        assert tensor.scale is not None and tensor.scale2 is not None
        scale = tensor.scale.astype(np.float32)
        np.testing.assert_array_equal(scale, stored["weight_scale"].float().numpy())
        assert tensor.scale2 == np.float32(1) / stored["weight_global_scale"].numpy()
        # The library divides scales by a number of which we multiply them by the inverse.
        np.testing.assert_allclose(tensor.dequantize(), values.numpy(), rtol=3e-7)


def test_modules_of_one_model_have_formats_of_their_own(tmp_path: Path) -> None:
    groups = {
        "group_0": QuantizationScheme(
            targets=["re:.*self_attn.*"], weights=QuantizationArgs(**int_args(4, "group"))
        ),
        "group_1": QuantizationScheme(
            targets=["model.layers.0.mlp.down_proj"],
            weights=QuantizationArgs(**int_args(8, "channel")),
            input_activations=QuantizationArgs(num_bits=8, strategy="token", dynamic=True),
        ),
        "group_2": preset_name_to_scheme("FP8_DYNAMIC", ["Linear"]),
    }
    config = QuantizationConfig(
        config_groups=groups, ignore=["lm_head", "re:.*layers.0.mlp.gate.*", "up_proj"]
    )
    model = write_model(tmp_path, config)
    assert _quantization(tmp_path)["format"] == "mixed-precision"
    checkpoint = quantized(tmp_path)
    _same(checkpoint, decompressed(model))
    kinds = {
        name: (form.kind, form.bits)
        for name in checkpoint.names()
        for form in [checkpoint.tensor(name).format]
        if len(form.shape) == 2 and "layers.0" in name
    }
    assert kinds == {
        **{f"model.layers.0.self_attn.{p}_proj.weight": ("int", 4) for p in "qkvo"},
        "model.layers.0.mlp.down_proj.weight": ("int", 8),
        "model.layers.0.mlp.gate_proj.weight": ("dense", 0),
        # `ignore` is no substring.
        "model.layers.0.mlp.up_proj.weight": ("float8_e4m3", 8),
    }


def _quantization(directory: Path) -> Args:
    section: Args = json.loads((directory / "config.json").read_text())["quantization_config"]
    return section


def test_float8_blocks_at_the_edges(tmp_path: Path) -> None:
    """200 rows and 576 columns make two and five blocks of 128, the last ones of 72 and 64."""
    args = {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [128, 128]}
    state = compressed(args, "float-quantized", torch.bfloat16)
    tensor = matrix(write_matrix(tmp_path, args, state, format="naive-quantized"))
    assert tensor.scale is not None and tensor.scale.shape == (2, 5)
    codes = state["weight"].float().numpy()
    scale = state["weight_scale"].float().numpy()
    expected = np.array(
        [[codes[n, k] * scale[n // 128, k // 128] for k in range(K)] for n in range(N)]
    )
    np.testing.assert_array_equal(tensor.dequantize(), expected)


# Where the configuration and the tensors disagree.


def test_the_groups_are_those_of_the_scales(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = compressed(int_args(4, "group", group=32), "pack-quantized")
    path = write_matrix(tmp_path, int_args(4, "group", group=64), state, format="pack-quantized")
    assert matrix(path).format.group == 32
    assert "groups of 32" in caplog.text


def test_tensors_of_an_ignored_module_and_of_an_unquantized_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    args = int_args(4, "group")
    state = compressed(args, "pack-quantized")
    path = write_matrix(tmp_path, args, state, format="pack-quantized", ignore=[MODULE])
    dense = {"model.layers.0.mlp.up_proj.weight": torch.ones(320, 192)}
    save_file(load_file(path / "model.safetensors") | dense, path / "model.safetensors")
    checkpoint = open_checkpoint(path)
    assert checkpoint.tensor(f"{MODULE}.weight").format.kind == "int"
    assert checkpoint.tensor("model.layers.0.mlp.up_proj.weight").format.kind == "dense"
    assert f"ignores {MODULE}" in caplog.text
    assert "1 modules that are not quantized" in caplog.text


def test_zero_points_of_a_symmetric_scheme(tmp_path: Path) -> None:
    args = int_args(8, "channel")
    state = compressed(args, "int-quantized")
    zeros = torch.zeros(N, 1, dtype=torch.int8)
    path = write_matrix(tmp_path / "none", args, state | {"weight_zero_point": zeros})
    assert matrix(path).format.zero == "midpoint"
    path = write_matrix(tmp_path / "some", args, state | {"weight_zero_point": zeros + 5})
    expected = (state["weight"].float() - 5) * state["weight_scale"]
    np.testing.assert_array_equal(matrix(path).dequantize(), expected.numpy())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"format": "marlin-24"}, "2:4 sparsity, permuted"),
        ({"format": "mxfp6-pack-quantized"}, "float6"),
        ({"format": "pack-quantised"}, "'pack-quantised'.*not known; pack-quantized, int-quan"),
        ({"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse format"),
        (
            {"transform_config": {"config_groups": {"R4": {"apply": [{"location": "input"}]}}}},
            "rotates activations",
        ),
        ({"config_groups": {"W4A16": ["Linear"]}}, "an object with targets"),
        ({"config_groups": {}}, "no target of config_groups"),
    ],
)
def test_what_cannot_be_read_is_refused(config: Args, message: str, tmp_path: Path) -> None:
    args = int_args(4, "group")
    state = compressed(args, "pack-quantized")
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(write_matrix(tmp_path, args, state, **{"format": None, **config}))


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("weight_scale", None, "lacks the tensor .*weight_scale"),
        ("weight_shape", None, "lacks the tensor .*weight_shape"),
        ("weight_zero_point", None, "lacks the tensor .*weight_zero_point"),
        ("weight_packed", torch.zeros(N, 50, dtype=torch.int32), "needs .200, 72."),
        ("weight_scale", torch.ones(N, 7), "no grouping .*by the configuration"),
        ("weight_zero_point", torch.zeros(8, 8, dtype=torch.int32), "should be .25, 9."),
        ("weight_g_idx", torch.zeros(K, dtype=torch.int32), "64 columns in each group"),
        ("weight_mystery", torch.zeros(3), "holds 1 tensors .*weight_mystery"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(
    name: str, tensor: Tensor | None, message: str, tmp_path: Path
) -> None:
    args = int_args(4, "group", symmetric=False)
    state = compressed(args, "pack-quantized")
    if tensor is None:
        del state[name]
    else:
        state[name] = tensor
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(write_matrix(tmp_path, args, state, format="pack-quantized"))


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.ones(N, K), "before it was compressed"),
        (torch.ones(N, K).to(torch.float8_e5m2), "type F8_E5M2"),
    ],
)
def test_a_weight_of_another_type_is_refused(weight: Tensor, message: str, tmp_path: Path) -> None:
    args = int_args(8, "channel")
    state = {"weight": weight, "weight_scale": torch.ones(N, 1)}
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(write_matrix(tmp_path, args, state, format="int-quantized"))


def test_bytes_that_exceed_their_bits_are_refused(tmp_path: Path) -> None:
    args = int_args(4, "channel")
    weight = torch.full((N, K), 8, dtype=torch.int8)
    state = {"weight": weight, "weight_scale": torch.ones(N, 1)}
    path = write_matrix(tmp_path, args, state, format="int-quantized")
    with pytest.raises(CheckpointError, match="holds 8, which no integer of 4 bits is"):
        matrix(path)
