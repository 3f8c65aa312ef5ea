"""Quantized directories of other tools: each format read into QuantTensors, and some written.

Nothing is lost either way.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import MappingProxyType
from typing import cast

from slipstream.builder.checkpoints.quantized.layout import Layout, cannot_store
from slipstream.builder.checkpoints.quantized.refused import refusal
from slipstream.builder.checkpoints.quantized.stored import QuantizedWeights, Stored
from slipstream.builder.models.config import ModelConfig
from slipstream.builder.options import OutputFormat
from slipstream.weights.json import Fields, Origin, read_fields
from slipstream.weights.tensor import InputTransform, WeightFormat

__all__ = [
    "QUANTIZED_SUFFIXES",
    "SIDE_FILES",
    "QuantizedWeights",
    "Stored",
    "create_layout",
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
        "mxfp4": "mxfp4",
    }
)
# Each module has `create(formats, float8_inputs)`, which makes its layout.
_WRITERS: Mapping[OutputFormat, str] = MappingProxyType(
    {
        "compressed-tensors": "compressed_tensors.writer",
        "gptq": "gptq.writer",
        "awq": "awq.writer",
    }
)
# Endings of names that only quantized tensors have.
QUANTIZED_SUFFIXES = (
    ".qweight",
    ".qzeros",
    ".weight_packed",
    ".blocks",
    ".weight_scale",
    ".weight_scale_inv",
    ".SCB",
    ".absmax",
)
# Where config.json describes the quantization: today, and in files of 2024.
_KEYS = ("quantization_config", "compression_config")
# Files beside config.json that describe the quantization, and the method they belong to.
SIDE_FILES: Mapping[str, str] = MappingProxyType(
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


def create_layout(
    name: OutputFormat,
    weights: Mapping[str, tuple[WeightFormat, InputTransform | None]],
    float8_inputs: Collection[str] = (),
) -> Layout:
    """The layout of this name, for a checkpoint of these quantized weights (by tensor name).

    ``float8_inputs`` are the modules of integer weights whose inputs a runtime should round to
    float8 a token, which their format does not say. Raises BuildError naming the first weight that
    the layout cannot hold, and why.
    """
    formats = [form for form, _ in weights.values()]
    writer = import_module(f"{_PACKAGE}.{_WRITERS[name]}")
    layout = cast("Layout", writer.create(formats, frozenset(float8_inputs)))
    for tensor, (form, transform) in weights.items():
        reason = layout.refusal(form, transform)
        if tensor.endswith("embed_tokens.weight"):
            reason = "it is the embedding, for which only a dense form is known"
        if reason:
            raise cannot_store(name, tensor, reason)
    return layout


def quantization_config(path: Path, raw: Fields) -> Fields | None:
    """What a directory says of its quantization, ``quant_method`` always set; None when it says
    nothing.

    It stands in config.json, which is ``raw`` (``quantization_config``, or ``compression_config``
    in files of 2024), or in a file of its own. The keys of modelopt's file, ``producer`` and
    ``quantization``, are added to those of config.json.
    """
    found = _in_config(raw)
    for name, method in SIDE_FILES.items():
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
