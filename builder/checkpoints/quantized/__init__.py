"""Quantized directories of other tools: each format decoded, losslessly, into QuantTensors."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

from slipstream.builder.checkpoints.base import read_json
from slipstream.builder.checkpoints.quantized.refused import refusal
from slipstream.builder.checkpoints.quantized.stored import QuantizedWeights, Stored
from slipstream.builder.models.config import ModelConfig
from slipstream.errors import CheckpointError

__all__ = [
    "QUANTIZED_SUFFIXES",
    "QuantizedWeights",
    "Stored",
    "quantization_config",
    "read_quantized",
]

_PACKAGE = "slipstream.builder.checkpoints.quantized"
# Each module has `read(stored, quantization, config)`; it is imported when it is needed.
_READERS: Mapping[str, str] = MappingProxyType(
    {
        "awq": "awq.reader",
        "gptq": "gptq.reader",
        "bitsandbytes": "bitsandbytes",
        "compressed-tensors": "compressed_tensors.reader",
        "fp8": "fp8",
        "fbgemm_fp8": "fp8",
        "modelopt": "modelopt",
        "modelopt_fp4": "modelopt",
        "modelopt_mixed": "modelopt",
    }
)
# Endings of names that only quantized tensors have.
QUANTIZED_SUFFIXES = (
    ".qweight",
    ".qzeros",
    ".weight_packed",
    ".weight_scale",
    ".weight_scale_inv",
    ".SCB",
    ".absmax",
)
# Files beside config.json that describe the quantization, and the method they belong to.
_SIDE_FILES: Mapping[str, str] = MappingProxyType(
    {
        "hf_quant_config.json": "modelopt",
        "quantize_config.json": "gptq",
        "quant_config.json": "awq",
    }
)


def read_quantized(
    stored: Stored, config: ModelConfig, quantization: Mapping[str, Any]
) -> QuantizedWeights:
    """The weights of a directory, decoded as its ``quant_method`` says; reads headers, no weights.

    Raises CheckpointError for a format that cannot be read and for a tensor that is missing or that
    nobody accounts for.
    """
    method = str(quantization.get("quant_method", "")).lower()
    if method not in _READERS:
        raise refusal(stored.path, method, known=sorted(set(_READERS)))
    reader = import_module(f"{_PACKAGE}.{_READERS[method]}")
    weights = cast("QuantizedWeights", reader.read(stored, quantization, config))
    stored.finish()
    return weights


def quantization_config(path: Path, raw: Mapping[str, Any]) -> dict[str, Any] | None:
    """What a directory says of its quantization, ``quant_method`` always set; None when it says
    nothing.

    It stands in config.json (``quantization_config``, or ``compression_config`` in files of 2024)
    or in a file of its own. The keys of modelopt's file, ``producer`` and ``quantization``, are
    added to those of config.json.
    """
    found = _in_config(path, raw)
    for name, method in _SIDE_FILES.items():
        if not (path / name).is_file():
            continue
        if found is None:
            return {"quant_method": method, **read_json(path / name)}
        if method == found["quant_method"] == "modelopt":
            return {**read_json(path / name), **found}
    return found


def _in_config(path: Path, raw: Mapping[str, Any]) -> dict[str, Any] | None:
    section = raw.get("quantization_config") or raw.get("compression_config")
    if not section:
        return None
    if not isinstance(section, dict):
        raise CheckpointError(
            f"{path}: quantization_config in config.json is {section!r}, not an object; download "
            "config.json again"
        )
    nested = section.get("quantization_config")
    section = nested if isinstance(nested, dict) else section
    method = section.get("quant_method") or _guessed_method(section, raw)
    return {**section, "quant_method": method}


def _guessed_method(section: Mapping[str, Any], raw: Mapping[str, Any]) -> str:
    """The method of a section that does not name it, as files before 2024 did not."""
    if "config_groups" in section or "quantization_config" not in raw:
        return "compressed-tensors"
    if "quant_algo" in section:
        return "modelopt"
    if section.get("load_in_4bit") or section.get("load_in_8bit"):
        return "bitsandbytes"
    return ""
