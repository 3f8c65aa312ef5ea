"""Quantized directories of other tools: each format decoded, losslessly, into QuantTensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import MappingProxyType
from typing import cast

from slipstream.builder.checkpoints.quantized.refused import refusal
from slipstream.builder.checkpoints.quantized.stored import QuantizedWeights, Stored
from slipstream.builder.models.config import ModelConfig
from slipstream.weights.json import Fields, Origin, read_fields

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
# Where config.json describes the quantization: today, and in files of 2024.
_KEYS = ("quantization_config", "compression_config")
# Files beside config.json that describe the quantization, and the method they belong to.
_SIDE_FILES: Mapping[str, str] = MappingProxyType(
    {
        "hf_quant_config.json": "modelopt",
        "quantize_config.json": "gptq",
        "quant_config.json": "awq",
    }
)


def read_quantized(stored: Stored, config: ModelConfig, quantization: Fields) -> QuantizedWeights:
    """The weights of a directory, decoded as its ``quant_method`` says; reads headers, no weights.

    Raises CheckpointError for a format that cannot be read and for a tensor that is missing or that
    nobody accounts for.
    """
    method = quantization.text("quant_method", "").lower()
    if method not in _READERS:
        raise refusal(stored.path, method, known=sorted(set(_READERS)))
    reader = import_module(f"{_PACKAGE}.{_READERS[method]}")
    weights = cast("QuantizedWeights", reader.read(stored, quantization, config))
    stored.finish()
    return weights


def quantization_config(path: Path, raw: Fields) -> Fields | None:
    """What a directory says of its quantization, ``quant_method`` always set; None when it says
    nothing.

    It stands in config.json, which is ``raw`` (``quantization_config``, or ``compression_config``
    in files of 2024), or in a file of its own. The keys of modelopt's file, ``producer`` and
    ``quantization``, are added to those of config.json.
    """
    found = _in_config(raw)
    for name, method in _SIDE_FILES.items():
        if not (path / name).is_file():
            continue
        if found is None:
            own = _read(path / name)
            return replace(own, values={"quant_method": method, **own.values})
        if method == found.values["quant_method"] == "modelopt":
            return replace(found, values={**_read(path / name).values, **found.values})
    return found


def _read(file: Path) -> Fields:
    return read_fields(file, Origin(file, f"download {file.name} again"))


def _in_config(raw: Fields) -> Fields | None:
    key = next((key for key in _KEYS if raw.values.get(key)), None)
    if key is None:
        return None
    section = raw.fields(key)
    if isinstance(section.values.get("quantization_config"), dict):
        section = section.fields("quantization_config")
    method = section.optional_text("quant_method") or _guessed_method(section, key)
    return replace(section, values={**section.values, "quant_method": method})


def _guessed_method(section: Fields, key: str) -> str:
    """The method of a section that does not name it, as files before 2024 did not."""
    if section.has("config_groups") or key != _KEYS[0]:
        return "compressed-tensors"
    if section.has("quant_algo"):
        return "modelopt"
    if section.values.get("load_in_4bit") or section.values.get("load_in_8bit"):
        return "bitsandbytes"
    return ""
