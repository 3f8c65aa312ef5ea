"""Quantized directories for tests: linears that other tools packed, and whole tiny models."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from tests.tiny_models import LLAMA, llama_tensors, write_tiny_tokenizer

from slipstream.builder.checkpoints.quantized import QuantizedWeights, Stored, read_quantized
from slipstream.builder.models.config import ModelConfig
from slipstream.weights.json import Fields, Origin
from slipstream.weights.safetensors import read_header

Arrays = dict[str, NDArray[Any]]
Pack = Callable[[str, NDArray[np.float32]], Arrays]
FILES = Path(__file__).parents[3] / "fixtures" / "quantized"
MODULE = "model.layers.0.mlp.down_proj"


def packed(file: str, case: str) -> tuple[Arrays, Arrays]:
    """What a tool stored of a linear, and what was expected of it, without their common name."""
    mine = {
        name.removeprefix(f"{case}."): array
        for name, array in load_file(FILES / f"{file}.safetensors").items()
        if name.startswith(f"{case}.")
    }
    expected = {key: mine.pop(key) for key in list(mine) if key.startswith("expected.")}
    return mine, {key.removeprefix("expected."): array for key, array in expected.items()}


def read_linear(
    directory: Path,
    arrays: Mapping[str, NDArray[Any]],
    **quantization: Any,  # noqa: ANN401
) -> QuantizedWeights:
    """A directory with one linear, ``MODULE``, read as this quantization_config says."""
    return read_arrays(
        directory, {f"{MODULE}.{key}": array for key, array in arrays.items()}, **quantization
    )


def read_arrays(
    directory: Path,
    arrays: Mapping[str, NDArray[Any]],
    **quantization: Any,  # noqa: ANN401
) -> QuantizedWeights:
    """A directory with these tensors, read as this quantization_config says."""
    file = directory / "model.safetensors"
    save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, file)
    config = ModelConfig.from_huggingface(LLAMA)
    section = Fields(quantization, Origin("config.json", "download config.json again"))
    return read_quantized(Stored(directory, read_header(file)), config, section)


def save_quantized_llama(
    directory: Path, pack: Pack, quantization: Mapping[str, Any] | None
) -> Arrays:
    """A tiny Llama with every linear of its layers packed; gives the original weights."""
    original = llama_tensors()
    stored: Arrays = {}
    for name, array in original.items():
        linear = name.endswith("_proj.weight")
        module = name.removesuffix(".weight")
        stored |= pack(module, array) if linear else {name: array.astype(np.float16)}
    directory.mkdir(exist_ok=True)
    save_file(stored, directory / "model.safetensors")
    config = LLAMA if quantization is None else {**LLAMA, "quantization_config": quantization}
    (directory / "config.json").write_text(json.dumps(config))
    write_tiny_tokenizer(directory)
    return original


def quantize_groups(
    weight: NDArray[np.float32], group: int, top: int
) -> tuple[NDArray[np.int64], NDArray[np.float16], NDArray[np.int64]]:
    """Codes ``[N, K]`` of 0..top, scales and zeros ``[N, ceil(K/group)]``, rounded to nearest."""
    n, k = weight.shape
    groups = np.pad(weight, ((0, 0), (0, -k % group))).reshape(n, -1, group)
    low, high = np.minimum(groups.min(-1), 0), np.maximum(groups.max(-1), 0)
    scales = ((high - low) / top).astype(np.float16)
    zeros = np.clip(np.rint(-low / scales), 1, top)
    codes = np.clip(np.rint(groups / scales[..., None]) + zeros[..., None], 0, top)
    return codes.reshape(n, -1)[:, :k].astype(np.int64), scales, zeros.astype(np.int64)


def pack_bits(codes: NDArray[np.int64], bits: int) -> NDArray[np.int32]:
    """Codes along the first axis into words of 32 bits, one bit at a time."""
    count = -(-len(codes) * bits // 32)
    words = np.zeros((count, codes.shape[1]), np.uint64)
    for index, row in enumerate(codes.astype(np.uint64)):
        for bit in range(bits):
            word, place = divmod(index * bits + bit, 32)
            words[word] |= ((row >> np.uint64(bit)) & np.uint64(1)) << np.uint64(place)
    return words.astype(np.uint32).view(np.int32)


def unpack_bits(words: NDArray[np.int32], bits: int, count: int) -> NDArray[np.uint8]:
    """``pack_bits`` undone by plain arithmetic on Python integers: ``[count, columns]``."""
    rows, columns = words.shape
    out = np.zeros((count, columns), np.uint8)
    for column in range(columns):
        stream = 0
        for row in range(rows):
            stream |= (int(words[row, column]) & 0xFFFFFFFF) << (32 * row)
        for index in range(count):
            out[index, column] = (stream >> (index * bits)) & (2**bits - 1)
    return out


def pack_gptq(bits: int, group: int, *, version: int = 1, act_order: bool = False) -> Pack:
    """GPTQ v1 or v2; with act-order the groups are of columns from everywhere."""

    def pack(module: str, weight: NDArray[np.float32]) -> Arrays:
        k = weight.shape[1]
        order = np.random.default_rng(0).permutation(k) if act_order else np.arange(k)
        ordered, scales, zeros = quantize_groups(weight[:, order], group, 2**bits - 1)
        codes, group_of = np.empty_like(ordered), np.empty(k, np.int32)
        codes[:, order], group_of[order] = ordered, np.arange(k) // group
        return {
            f"{module}.qweight": pack_bits(codes.T, bits),
            f"{module}.qzeros": np.ascontiguousarray(pack_bits(zeros - (version == 1), bits).T),
            f"{module}.scales": np.ascontiguousarray(scales.T),
            f"{module}.g_idx": group_of,
        }

    return pack


def pack_awq(group: int) -> Pack:
    """AutoAWQ's gemm."""
    order = [0, 2, 4, 6, 1, 3, 5, 7]

    def interleave(codes: NDArray[np.int64]) -> NDArray[np.int32]:
        rows, columns = codes.shape
        dealt = codes.reshape(rows, columns // 8, 8)[:, :, order].reshape(rows, columns)
        return np.ascontiguousarray(pack_bits(dealt.T, 4).T)

    def pack(module: str, weight: NDArray[np.float32]) -> Arrays:
        codes, scales, zeros = quantize_groups(weight, group, 15)
        return {
            f"{module}.qweight": interleave(codes.T),
            f"{module}.qzeros": interleave(zeros.T),
            f"{module}.scales": np.ascontiguousarray(scales.T),
        }

    return pack


def pack_nf4(module: str, weight: NDArray[np.float32]) -> Arrays:
    """bitsandbytes' nf4 without double quantization."""
    table = packed("bitsandbytes", "nf4")[0]["weight.quant_map"]
    blocks = weight.reshape(-1, 64)
    absmax = np.abs(blocks).max(axis=-1)
    codes = np.abs(blocks[..., None] / absmax[:, None, None] - table).argmin(-1).ravel()
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "float16", "shape": weight.shape}
    return {
        f"{module}.weight": ((codes[0::2] << 4) | codes[1::2]).astype(np.uint8)[:, None],
        f"{module}.weight.absmax": absmax,
        f"{module}.weight.quant_map": table,
        f"{module}.weight.quant_state.bitsandbytes__nf4": np.frombuffer(
            json.dumps(state).encode(), np.uint8
        ),
    }


def pack_int8(module: str, weight: NDArray[np.float32]) -> Arrays:
    """bitsandbytes' LLM.int8."""
    largest = np.abs(weight).max(axis=1)
    return {
        f"{module}.weight": np.rint(weight / largest[:, None] * 127).astype(np.int8),
        f"{module}.SCB": largest,
        f"{module}.weight_format": np.array(0, np.uint8),
    }
