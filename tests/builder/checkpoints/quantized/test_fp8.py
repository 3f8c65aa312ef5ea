"""FP8 directories as AutoFP8, vLLM, fbgemm and transformers store them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.tiny_models import LLAMA, llama_tensors, write_tiny_tokenizer
from torch import Tensor
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

from slipstream.builder.checkpoints import open_checkpoint
from slipstream.builder.checkpoints.base import Checkpoint
from slipstream.errors import CheckpointError
from slipstream.weights.tensor import KVScales, WeightFormat

# Widths and heights that 128 does not divide: 200 x 576 among them.
SHAPE = {"hidden_size": 576, "intermediate_size": 200, "num_hidden_layers": 1} | {
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
}
UP = "model.layers.0.mlp.up_proj"
Tensors = dict[str, Tensor]


def quantized(weight: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Codes and scales, which are shared by ``rows`` times ``columns`` elements."""
    n, k = weight.shape
    scale = torch.zeros(-(-n // rows), -(-k // columns))
    codes = torch.zeros(n, k).to(torch.float8_e4m3fn)
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            part = slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns)
            scale[i, j] = weight[part].abs().max() / 448
            codes[part] = (weight[part] / scale[i, j]).to(torch.float8_e4m3fn)
    return codes, scale


def decoded(codes: Tensor, scale: Tensor, rows: int, columns: int) -> np.ndarray:
    """Element by element as ``quantized`` made them."""
    n, k = codes.shape
    spread = scale.float()[torch.arange(n) // rows][:, torch.arange(k) // columns]
    return np.asarray((codes.float() * spread).numpy())


def write_model(
    directory: Path, quantize: Callable[[str, Tensor], Tensors], **quantization: object
) -> Tensors:
    """A tiny Llama whose linears ``quantize`` replaces, by module; gives back its tensors."""
    tensors: Tensors = {}
    for name, array in llama_tensors(**SHAPE).items():
        module, _, kind = name.rpartition(".")
        weight = torch.from_numpy(array)
        if module.endswith("_proj") and kind == "weight":
            tensors |= {f"{module}.{key}": value for key, value in quantize(module, weight).items()}
        else:
            tensors[name] = weight.bfloat16()
    directory.mkdir(exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()},
              directory / "model.safetensors")  # fmt: skip
    section = {"quant_method": "fp8", **quantization}
    config: dict[str, Any] = {**LLAMA, **SHAPE, "quantization_config": section}
    (directory / "config.json").write_text(json.dumps(config))
    write_tiny_tokenizer(directory)
    return tensors


def change(directory: Path, changes: Mapping[str, Tensor | None]) -> None:
    """Set tensors of a directory, or drop those that are None."""
    tensors = {**load_file(directory / "model.safetensors"), **changes}
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, directory / "model.safetensors")


def opened(directory: Path) -> Checkpoint:
    """The checkpoint, checked to have the weights of the model and nothing else."""
    checkpoint = open_checkpoint(directory)
    assert set(checkpoint.names()) == set(llama_tensors(**SHAPE))
    return checkpoint


def tensor_wise(_: str, weight: Tensor) -> Tensors:
    """AutoFP8, static."""
    codes, scale = quantized(weight, *weight.shape)
    return {
        "weight": codes,
        "weight_scale": scale.reshape(()),
        "input_scale": torch.tensor(0.25),
    }


def row_wise(_: str, weight: Tensor) -> Tensors:
    """One scale a row, ``[N, 1]``."""
    codes, scale = quantized(weight, 1, weight.shape[1])
    return {"weight": codes, "weight_scale": scale}


def block_wise(_: str, weight: Tensor) -> Tensors:
    """DeepSeek's blocks."""
    codes, scale = quantized(weight, 128, 128)
    return {"weight": codes, "weight_scale_inv": scale}


def test_a_scale_a_tensor_and_static_activations(tmp_path: Path) -> None:
    stored = write_model(
        tmp_path, tensor_wise, activation_scheme="static", ignored_layers=["lm_head"]
    )
    checkpoint = opened(tmp_path)
    for name in _linears(checkpoint):
        tensor = checkpoint.tensor(name).load()
        n, k = tensor.format.shape
        assert tensor.format == checkpoint.tensor(name).format
        assert tensor.format == WeightFormat(
            (n, k), "float8_e4m3", "float32", 8, k, activation="static"
        )
        assert tensor.scale is not None and tensor.scale.shape == (n, 1)
        assert tensor.input_scale is not None and tensor.input_scale.tolist() == [0.25]
        scale = stored[f"{name}_scale"].reshape(1, 1)
        np.testing.assert_array_equal(tensor.dequantize(), decoded(stored[name], scale, n, k))


def _linears(checkpoint: Checkpoint) -> list[str]:
    names = [name for name in checkpoint.names() if name.endswith("_proj.weight")]
    assert len(names) == 7
    return names


@pytest.mark.parametrize("shape", [(-1, 1), (-1,)])
@pytest.mark.parametrize("method", ["fp8", "fbgemm_fp8"])
def test_a_scale_a_row(method: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    def quantize(module: str, weight: Tensor) -> Tensors:
        parts = row_wise(module, weight)
        parts["weight_scale"] = parts["weight_scale"].reshape(shape)
        extra = {"input_scale_ub": torch.tensor([1200.0])} if method == "fbgemm_fp8" else {}
        return parts | extra

    stored = write_model(tmp_path, quantize, quant_method=method)
    checkpoint = opened(tmp_path)
    for name in _linears(checkpoint):
        tensor = checkpoint.tensor(name).load()
        n, k = tensor.format.shape
        assert (tensor.format.rows, tensor.format.group) == (1, k)
        assert tensor.format.activation == "token"
        scale = stored[f"{name}_scale"].reshape(n, 1)
        np.testing.assert_array_equal(tensor.dequantize(), decoded(stored[name], scale, 1, k))


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "float8_e8m0fnu", "uint8"])
def test_blocks_with_partial_edges(kind: str, tmp_path: Path) -> None:
    """Scales of float8_e8m0fnu, or of bytes, are powers of two."""

    def quantize(module: str, weight: Tensor) -> Tensors:
        parts = block_wise(module, weight)
        scale = parts["weight_scale_inv"]
        if kind in ("float8_e8m0fnu", "uint8"):
            scale = torch.exp2(torch.log2(scale).ceil()).to(torch.float8_e8m0fnu)
        parts["weight_scale_inv"] = scale.view(torch.uint8) if kind == "uint8" else (
            scale.to(getattr(torch, kind))
        )  # fmt: skip
        return parts

    stored = write_model(
        tmp_path, quantize, activation_scheme="dynamic", weight_block_size=[128, 128]
    )
    checkpoint = opened(tmp_path)
    dtype = "float8_e8m0fnu" if kind == "uint8" else kind
    for name in _linears(checkpoint):
        tensor = checkpoint.tensor(name).load()
        shape = tensor.format.shape
        assert tensor.format == WeightFormat(
            shape, "float8_e4m3", dtype, 8, 128, rows=128, activation="group"
        )
        scale = stored[f"{name}_scale_inv"]
        scale = scale.view(torch.float8_e8m0fnu) if kind == "uint8" else scale
        np.testing.assert_array_equal(tensor.dequantize(), decoded(stored[name], scale, 128, 128))
    assert checkpoint.tensor(f"{UP}.weight").load().codes.shape == (200, 576)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float8_e8m0fnu])
def test_blocks_equal_what_transformers_makes_of_them(dtype: torch.dtype, tmp_path: Path) -> None:
    """Its decoder wants whole blocks, which 64 makes of attention's shapes."""

    def quantize(module: str, weight: Tensor) -> Tensors:
        if "mlp" in module:
            return {"weight": weight}
        codes, scale = quantized(weight, 64, 64)
        return {"weight": codes, "weight_scale_inv": scale.to(dtype)}

    stored = write_model(tmp_path, quantize, weight_block_size=[64, 64])
    checkpoint = opened(tmp_path)
    for name in (name for name in _linears(checkpoint) if "attn" in name):
        tensor = checkpoint.tensor(name).load()
        assert (tensor.format.rows, tensor.format.group) == (64, 64)
        decode = Fp8Dequantize(None)._dequantize_one
        expected = decode(stored[name], stored[f"{name}_scale_inv"], output_dtype=torch.float32)
        np.testing.assert_array_equal(tensor.dequantize(), expected.numpy())


def test_a_scalar_inverse_scale_and_an_activation_scale(tmp_path: Path) -> None:
    """transformers without weight_block_size, as Mistral's files are."""

    def quantize(module: str, weight: Tensor) -> Tensors:
        parts = tensor_wise(module, weight)
        return {
            "weight": parts["weight"],
            "weight_scale_inv": parts["weight_scale"].bfloat16(),
            "activation_scale": torch.tensor(0.5, dtype=torch.bfloat16),
        }

    stored = write_model(tmp_path, quantize, activation_scheme="static", weight_block_size=None)
    tensor = opened(tmp_path).tensor(f"{UP}.weight").load()
    assert tensor.format.activation == "static" and tensor.format.dtype == "bfloat16"
    assert tensor.input_scale is not None and tensor.input_scale.tolist() == [0.5]
    scale = stored[f"{UP}.weight_scale_inv"].reshape(1, 1)
    expected = decoded(stored[f"{UP}.weight"], scale, 200, 576)
    np.testing.assert_array_equal(tensor.dequantize(), expected)


def test_kv_scales(tmp_path: Path) -> None:
    write_model(tmp_path, row_wise)
    change(tmp_path, {"model.layers.0.self_attn.kv_scale": torch.tensor(0.125)})
    assert opened(tmp_path).kv_scales == KVScales((0.125,), (0.125,))


@pytest.mark.parametrize(
    ("quantize", "scheme", "activation", "message"),
    [
        (tensor_wise, "dynamic", "static", "scales of activations are stored: static"),
        (row_wise, "static", "token", "no scales of activations are stored: dynamic"),
    ],
)
def test_the_activations_are_what_the_tensors_say(
    quantize: Callable[[str, Tensor], Tensors],
    scheme: str,
    activation: str,
    message: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    write_model(tmp_path, quantize, activation_scheme=scheme)
    assert opened(tmp_path).tensor(f"{UP}.weight").format.activation == activation
    assert message in caplog.text


def test_a_module_that_is_not_quantized(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def quantize(module: str, weight: Tensor) -> Tensors:
        skipped = module == UP or module.endswith("o_proj")
        return {"weight": weight.bfloat16()} if skipped else row_wise(module, weight)

    write_model(tmp_path, quantize, modules_to_not_convert=["o_proj"])
    assert opened(tmp_path).tensor(f"{UP}.weight").format.kind == "dense"
    assert (
        f"1 modules are not quantized although config.json does not ignore them, such as {UP}"
        in (caplog.text)
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight": torch.zeros(200, 576).to(torch.float8_e5m2)}, "F8_E5M2.*float8_e4m3fn"),
        ({"weight": torch.zeros(200, 576, dtype=torch.int8)}, "type I8, but .* F8_E4M3"),
        ({"weight_scale": None}, f"lacks the tensor {UP}.weight_scale"),
        ({"weight_scale": torch.ones(7)}, "fits no grouping of a weight .200, 576."),
        ({"weight_scale_2": torch.ones(1)}, "holds 1 tensors .*weight_scale_2"),
        ({"input_scale": torch.ones(2)}, "shape .2. where one number belongs"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(
    changes: Mapping[str, Tensor | None], message: str, tmp_path: Path
) -> None:
    write_model(tmp_path, row_wise, activation_scheme="static")
    change(tmp_path, {f"{UP}.{name}": tensor for name, tensor in changes.items()})
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path).tensor(f"{UP}.weight").load()


def test_an_unknown_activation_scheme_is_refused(tmp_path: Path) -> None:
    write_model(tmp_path, row_wise, activation_scheme="sometimes")
    with pytest.raises(CheckpointError, match="'sometimes'; it is one of dynamic, static"):
        open_checkpoint(tmp_path)
