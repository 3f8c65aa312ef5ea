"""Models and single matrices that compressed-tensors quantizes and saves."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors import BaseCompressor, ModelCompressor
from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    apply_quantization_config,
    initialize_module_for_quantization,
)
from compressed_tensors.quantization.lifecycle.forward import dequantize
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors.torch import save_file
from tests.tiny_models import write_tiny_tokenizer
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from slipstream.builder.checkpoints import open_checkpoint
from slipstream.weights.tensor import QuantTensor

Args = dict[str, Any]
# A matrix of a width that 128 does not divide and a height that is no multiple of anything.
N, K = 200, 576
MODULE = "model.layers.0.mlp.down_proj"
SHAPE: Args = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 320,
    "hidden_size": 192,
    "intermediate_size": 320,
    "num_hidden_layers": 1,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}


def int_args(bits: int, strategy: str, *, symmetric: bool = True, group: int = 64) -> Args:
    """Arguments of an integer weight."""
    grouped = {"group_size": group} if strategy == "group" else {}
    return {"num_bits": bits, "strategy": strategy, "symmetric": symmetric, **grouped}


def fill(module: torch.nn.Module, args: QuantizationArgs) -> None:
    """Scales and zero points as its own observers would find them, by least and largest weight."""
    stored = {name: value.data for name, value in module.named_parameters(recurse=False)}
    weight = stored["weight"]
    blocks = weight.reshape(1, -1)
    if args.strategy in ("group", "tensor_group"):
        blocks = weight.reshape(len(weight), -1, args.group_size)
    elif args.strategy == "channel":
        blocks = weight.unsqueeze(1)
    elif args.strategy == "block":
        rows, columns = args.block_structure or (1, 1)
        padded = torch.nn.functional.pad(
            weight, (0, -weight.shape[1] % columns, 0, -weight.shape[0] % rows)
        )
        down, across = padded.shape[0] // rows, padded.shape[1] // columns
        blocks = padded.reshape(down, rows, across, columns).permute(0, 2, 1, 3).flatten(2)
    second = None
    if args.strategy == "tensor_group":
        second = 448 * 6 / weight.abs().max().reshape(1)
        stored["weight_global_scale"].copy_(second)
    scale, zero = calculate_qparams(blocks.amin(-1), blocks.amax(-1), args, second)
    for name, values in (("weight_scale", scale), ("weight_zero_point", zero)):
        stored[name].copy_(values.reshape(stored[name].shape))


def write_model(directory: Path, config: QuantizationConfig) -> LlamaForCausalLM:
    """A tiny Llama, quantized and saved by the library; gives back the compressed model."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE))
    apply_quantization_config(model, config, show_progress=False)
    for module in model.modules():
        scheme = getattr(module, "quantization_scheme", None)
        if scheme is not None:
            fill(module, scheme.weights)
        for name, parameter in module.named_parameters(recurse=False):
            if name.startswith("input_"):
                parameter.data.fill_(0.25 if name.endswith("scale") else 3)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(directory)
    compressor.update_config(str(directory))
    write_tiny_tokenizer(directory)
    return model


def decompressed(model: LlamaForCausalLM) -> dict[str, Tensor]:
    """What the library makes of its compressed modules, in float32."""
    weights = {}
    for name, module in model.named_modules():
        scheme = getattr(module, "quantization_scheme", None)
        if scheme is None:
            continue
        state = {key: value.data for key, value in module.named_parameters(recurse=False)}
        weights[f"{name}.weight"] = decompress(state, scheme)
    return weights


def decompress(state: Mapping[str, Tensor], scheme: QuantizationScheme) -> Tensor:
    """The library's own, which is float32 where scales are; its float4 is bfloat16 by nature."""
    compressor = BaseCompressor.get_value_from_registry(str(scheme.format.value))
    if "weight_packed" in state and state["weight_packed"].dtype == torch.uint8:
        n, half = state["weight_packed"].shape
        codes = unpack_fp4_from_uint8(state["weight_packed"], n, half * 2, torch.float32)
        scale = compressor._decompress_scale(state["weight_scale"], torch.float32)
        second = state.get("weight_global_scale")
        weight: Tensor = dequantize(codes, scale, args=scheme.weights, global_scale=second)
        return weight
    full = {
        key: value.float() if value.dtype in (torch.bfloat16, torch.float16) else value
        for key, value in state.items()
    }
    restored: dict[str, Tensor] = compressor.decompress(full, scheme)
    return restored["weight"].float()


def write_matrix(
    directory: Path, args: Args, state: Mapping[str, Tensor], **config: object
) -> Path:
    """A directory of a model of two layers whose only quantized weight is ``[N, K]``."""
    names = {f"{MODULE}.{name}": tensor.contiguous() for name, tensor in state.items()}
    directory.mkdir(exist_ok=True)
    save_file(names, directory / "model.safetensors")
    group = {"targets": ["Linear"], "weights": args}
    section = {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}, **config}
    (directory / "config.json").write_text(
        json.dumps(
            {**SHAPE, "num_hidden_layers": 2, "model_type": "llama", "quantization_config": section}
        )
    )
    return directory


def compressed(args: Args, name: str, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """What the library stores of a random ``[N, K]``."""
    generator = torch.Generator().manual_seed(1)
    module = torch.nn.Linear(K, N, bias=False)
    module.weight.data = torch.randn(N, K, generator=generator).to(dtype)
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**args))
    module.quantization_scheme = scheme
    initialize_module_for_quantization(module, scheme)
    fill(module, scheme.weights)
    state = {key: value.data for key, value in module.named_parameters()}
    stored: dict[str, Tensor] = BaseCompressor.get_value_from_registry(name).compress(state, scheme)
    return stored


def matrix(directory: Path) -> QuantTensor:
    """The weight of ``write_matrix``."""
    return open_checkpoint(directory).tensor(f"{MODULE}.weight").load()
