"""Engines of checkpoints whose experts are quantized one by one, as AutoAWQ, GPTQModel,
llm-compressor and the makers of Qwen and DeepSeek write them."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray
from tests.builder.checkpoints.quantized.files import (
    Arrays,
    Pack,
    pack_awq,
    pack_bits,
    pack_gptq,
    pack_nf4,
)
from tests.integration.test_architectures import run_in_chunks
from tests.integration.test_cuda_models import logits_in_chunks, uncaptured
from tests.tiny_models import write_tiny_tokenizer

from slipstream.builder.build import build, plan
from slipstream.builder.checkpoints import open_checkpoint
from slipstream.builder.models import load_architecture
from slipstream.builder.models.config import ModelConfig
from slipstream.builder.options import BuildOptions
from slipstream.errors import CheckpointError
from slipstream.plugins.linear import WEIGHT_TYPES
from slipstream.weights.safetensors import write_arrays

SHAPE: dict[str, Any] = {
    "architectures": ["Qwen2MoeForCausalLM"],
    "model_type": "qwen2_moe",
    "vocab_size": 320,
    "hidden_size": 128,
    "intermediate_size": 128,
    "moe_intermediate_size": 128,
    "shared_expert_intermediate_size": 128,
    "num_experts": 3,
    # All of them: rounding x before a router would choose others for some tokens.
    "num_experts_per_tok": 3,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
__all__ = ["uncaptured"]  # a fixture
PROMPTS = np.random.default_rng(0).integers(0, 320, (2, 75))
SPARED = ["lm_head", "model.layers.0.mlp.gate", "model.layers.0.mlp.shared_expert_gate"]
Matrix = NDArray[np.float32]


def compressed(weights: dict[str, Any], **more: Any) -> dict[str, Any]:  # noqa: ANN401
    group = {"targets": ["Linear"], "weights": {"type": "int", "symmetric": True, **weights}}
    return {
        "quant_method": "compressed-tensors",
        "ignore": SPARED,
        "config_groups": {"group_0": {**group, **more}},
    }


def pack_int4(module: str, weight: Matrix) -> Arrays:
    """pack-quantized of compressed-tensors, groups of 32, symmetric."""
    scale = np.abs(weight.reshape(len(weight), -1, 32)).max(-1) / 7
    codes = np.rint(weight / np.repeat(scale, 32, axis=1)).astype(np.int64) + 8
    return {
        f"{module}.weight_packed": np.ascontiguousarray(pack_bits(codes.T, 4).T),
        f"{module}.weight_scale": scale.astype(np.float32),
        f"{module}.weight_shape": np.array(weight.shape, np.int64),
    }


def pack_act_order(module: str, weight: Matrix) -> Arrays:
    """The same with columns in another order: one for all that read one x, as llm-compressor finds
    when every token goes to every expert, and one of its own for each that reads an expert's."""
    own = re.fullmatch(r".*experts\.(\d+)\.down_proj", module)
    order = np.random.default_rng(int(own[1]) if own else 7).permutation(weight.shape[1])
    stored = pack_int4(module, np.ascontiguousarray(weight[:, order]))
    codes = np.empty(weight.shape, np.int64)
    codes[:, order] = unpacked(stored[f"{module}.weight_packed"])
    group_of = np.empty(weight.shape[1], np.int32)
    group_of[order] = np.arange(weight.shape[1]) // 32
    packed = np.ascontiguousarray(pack_bits(codes.T, 4).T)
    return {**stored, f"{module}.weight_packed": packed, f"{module}.weight_g_idx": group_of}


def unpacked(words: NDArray[np.int32]) -> NDArray[np.int64]:
    shifts = np.arange(0, 32, 4, dtype=np.uint32)
    return (words.view(np.uint32)[..., None] >> shifts & 15).reshape(len(words), -1).astype(int)


def pack_channels(dtype: Any, top: int) -> Pack:  # noqa: ANN401
    """A scale a row of int8 or float8."""

    def pack(module: str, weight: Matrix) -> Arrays:
        scale = np.abs(weight).max(-1, keepdims=True) / top
        values = weight / scale if dtype != np.int8 else np.rint(weight / scale)
        return {f"{module}.weight": values.astype(dtype), f"{module}.weight_scale": scale}

    return pack


def pack_tensor(module: str, weight: Matrix) -> Arrays:
    """float8 with one scale; that of x only where tokens came to calibrate it."""
    scale = np.abs(weight).max() / 448
    stored = {
        f"{module}.weight": (weight / scale).astype(ml_dtypes.float8_e4m3fn),
        f"{module}.weight_scale": np.array(scale, np.float32),
    }
    if "experts.1" not in module:
        stored[f"{module}.input_scale"] = np.array(0.02 + len(module) * 1e-4, np.float32)
    return stored


def pack_blocks(size: int) -> Pack:
    """float8 in blocks, as DeepSeek and Qwen have them."""

    def pack(module: str, weight: Matrix) -> Arrays:
        rows, columns = (-(-n // size) for n in weight.shape)
        padded = np.pad(weight, [(0, -n % size) for n in weight.shape])
        scale = np.abs(padded.reshape(rows, size, columns, size)).max((1, 3)) / 448
        each = np.kron(scale, np.ones((size, size)))[: weight.shape[0], : weight.shape[1]]
        return {
            f"{module}.weight": (weight / each).astype(ml_dtypes.float8_e4m3fn),
            f"{module}.weight_scale_inv": scale.astype(np.float32),
        }

    return pack


def pack_some_zeros(module: str, weight: Matrix) -> Arrays:
    """GPTQ, one of whose experts happens to have its zeros in the middle."""
    stored = pack_gptq(4, 32)(module, weight)
    if "experts.1." in module:
        stored[f"{module}.qzeros"] = np.full_like(stored[f"{module}.qzeros"], 0x77777777)
    return stored


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32}
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "modules_to_not_convert": SPARED}
FORMATS: dict[str, tuple[Pack, dict[str, Any]]] = {
    "awq": (pack_awq(32), {"quant_method": "awq", "group_size": 32, "modules_to_not_convert": []}),
    "gptq": (pack_some_zeros, {**GPTQ, "desc_act": False, "sym": False}),
    "gptq act-order": (pack_gptq(4, 32, act_order=True), {**GPTQ, "desc_act": True}),
    "int4 act-order": (
        pack_act_order,
        compressed({"num_bits": 4, "strategy": "group", "group_size": 32, "actorder": "group"}),
    ),
    "int8 channels": (
        pack_channels(np.int8, 127), compressed({"num_bits": 8, "strategy": "channel"})
    ),
    "float8 channels": (
        pack_channels(ml_dtypes.float8_e4m3fn, 448),
        compressed({"num_bits": 8, "type": "float", "strategy": "channel"}),
    ),
    "float8 tensors": (pack_tensor, {**FP8, "activation_scheme": "static"}),
    "float8 blocks": (pack_blocks(128), {**FP8, "weight_block_size": [128, 128]}),
    "float8 ragged blocks": (pack_blocks(96), {**FP8, "weight_block_size": [96, 96]}),
    "nf4": (pack_nf4, {"quant_method": "bitsandbytes", "load_in_4bit": True}),
}  # fmt: skip


def save(directory: Path, arrays: Arrays, quantization: dict[str, Any] | None = None) -> Path:
    directory.mkdir()
    write_arrays(directory / "model.safetensors", arrays)
    section = {} if quantization is None else {"quantization_config": quantization}
    (directory / "config.json").write_text(json.dumps({**SHAPE, **section}))
    write_tiny_tokenizer(directory)
    return directory


def tensors() -> Arrays:
    config = ModelConfig.from_huggingface(SHAPE)
    rng = np.random.default_rng(0)
    shapes = load_architecture(SHAPE["architectures"][0]).shapes(config)
    return {
        name: rng.normal(1.0 if "norm" in name else 0.0, 0.1, shape).astype(np.float32)
        for name, shape in shapes.items()
    }


def quantized(directory: Path, pack: Pack, quantization: dict[str, Any]) -> Path:
    stored: Arrays = {}
    for name, array in tensors().items():
        module = name.removesuffix(".weight")
        stored |= pack(module, array) if name.endswith("_proj.weight") else {name: array}
    return save(directory, stored, quantization)


def kept(checkpoint: Path, target: str) -> bool:
    """Whether no expert is dense in an engine for a target."""
    dense = {WEIGHT_TYPES[name] for name in ("float32", "bfloat16", "float16")}
    nodes = plan(checkpoint, BuildOptions(target=target)).program.nodes("ExpertLinear")
    types = [node.attributes["weight_type"] for node in nodes if "weight_type" in node.attributes]
    return len(nodes) == 2 and dense.isdisjoint(t.as_int() for t in types)


@pytest.mark.parametrize("name", FORMATS)
def test_experts_keep_their_format_and_compute_what_their_weights_say(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint = quantized(tmp_path / "checkpoint", *FORMATS[name])
    with caplog.at_level(logging.WARNING):
        assert kept(checkpoint, "cpu")
        assert kept(checkpoint, "cuda") or name in ("float8 ragged blocks", "nf4")
    assert "weights of experts" not in caplog.text
    opened = open_checkpoint(checkpoint)
    effective = {n: opened.tensor(n).load().dequantize() for n in opened.names()}
    logits = []
    for source, directory in ((checkpoint, "engine"), (save(tmp_path / "d", effective), "exact")):
        build(source, tmp_path / directory, BuildOptions(kv_cache_dtype="float32", target="cpu"))
        logits.append(run_in_chunks(tmp_path / directory, PROMPTS))
    got, want = logits
    assert np.linalg.norm(got - want) < 0.03 * np.linalg.norm(want)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("name", "limit"),
    [
        ("gptq", 0.05),
        ("int4 act-order", 0.05),
        ("int8 channels", 0.05),
        ("float8 blocks", 0.2),  # there x has 8 bits, too
    ],
)
@pytest.mark.usefixtures("uncaptured")
def test_the_same_on_a_gpu(name: str, limit: float, tmp_path: Path) -> None:
    checkpoint = quantized(tmp_path / "checkpoint", *FORMATS[name])
    opened = open_checkpoint(checkpoint)
    effective = {n: opened.tensor(n).load().dequantize() for n in opened.names()}
    build(save(tmp_path / "d", effective), tmp_path / "exact", BuildOptions(target="cpu"))
    build(checkpoint, tmp_path / "engine", BuildOptions(target="cuda"))
    want = run_in_chunks(tmp_path / "exact", PROMPTS)
    got = logits_in_chunks(tmp_path / "engine", PROMPTS)
    assert np.linalg.norm(got - want) < limit * np.linalg.norm(want)


def test_experts_that_become_dense_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Each has its columns in an order of its own, as GPTQ finds when each sees its own tokens."""

    def pack(module: str, weight: Matrix) -> Arrays:
        stored = pack_gptq(4, 32, act_order=True)(module, weight)
        group_of = stored[f"{module}.g_idx"]
        return {**stored, f"{module}.g_idx": np.roll(group_of, len(module) + ord(module[-9]))}

    checkpoint = quantized(tmp_path / "checkpoint", pack, FORMATS["gptq act-order"][1])
    with caplog.at_level(logging.WARNING):
        nodes = plan(checkpoint, BuildOptions(target="cpu")).program.nodes("ExpertLinear")
    assert ["bits" in node.attributes for node in nodes] == [False, True]
    assert [m for m in caplog.messages if "experts" in m] == [
        "1 weights of experts (model.layers.0.mlp.experts.gate_proj+up_proj.weight) become dense: "
        "they do not want x ordered or scaled alike (act-order or pre-scale)"
    ]


def without(stored: Arrays, part: str) -> Arrays:
    return {name: array for name, array in stored.items() if part not in name}


def cut(stored: Arrays, name: str) -> Arrays:
    return {**stored, name: np.ascontiguousarray(stored[name][:2])}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda s: without(s, "experts.1.up_proj"), r"no tensor .*experts\.1\.up_proj\.weight"),
        (lambda s: without(s, "experts.1.up_proj.qweight"), r"such as .*experts\.1\.up_proj\.\w+"),
        (lambda s: without(s, "experts.1.up_proj.scales"), r"lacks .*experts\.1\.up_proj\.scales"),
        (lambda s: cut(s, "model.layers.0.mlp.gate.weight"), r"mlp\.gate\.weight has shape \[2, "),
        (
            lambda s: s | {"model.layers.0.mlp.experts.3.up_proj.weight": np.zeros((2, 2), "f")},
            r"does not read, such as .*experts\.3\.up_proj\.weight",
        ),
    ],
)
def test_what_is_missing_or_of_another_model_is_named(
    change: Callable[[Arrays], Arrays], named: str, tmp_path: Path
) -> None:
    stored: Arrays = {}
    for name, array in tensors().items():
        module = name.removesuffix(".weight")
        packed = "experts." in name and name.endswith("_proj.weight")
        stored |= pack_awq(32)(module, array) if packed else {name: array}
    checkpoint = save(tmp_path / "c", change(stored), FORMATS["awq"][1])
    with pytest.raises(CheckpointError, match=named):
        plan(checkpoint, BuildOptions(target="cpu"))
