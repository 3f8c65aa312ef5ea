"""compressed-tensors, which transformers, vLLM and SGLang load.

Formats and keys: https://github.com/vllm-project/compressed-tensors, version 0.20.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from slipstream.builder.checkpoints.quantized.layout import (
    Encoded,
    Settings,
    cannot_store,
    even_group,
    even_groups,
    left_alone,
    unlike_siblings,
)
from slipstream.builder.checkpoints.quantized.packing import pack_words
from slipstream.weights.tensor import InputTransform, QuantTensor, WeightFormat

_NAME = "compressed-tensors"
_VERSION = "0.20.0"
_NVFP4_GROUP = 16
_Format = Literal["pack-quantized", "int-quantized", "float-quantized", "nvfp4-pack-quantized"]
_Arrays = dict[str, NDArray[np.generic]]


def create(_: Iterable[WeightFormat], float8_inputs: frozenset[str]) -> CompressedTensors:
    """The layout; ``float8_inputs`` as in ``create_layout``."""
    return CompressedTensors(float8_inputs)


@dataclass(frozen=True, slots=True)
class CompressedTensors:
    """Every format of ours but codebooks, float offsets, act-order and pre-scales."""

    float8_inputs: frozenset[str] = frozenset()
    name: str = _NAME
    holds_kv_scales: bool = True

    def refusal(self, form: WeightFormat, transform: InputTransform | None) -> str | None:
        """Why a weight cannot be stored."""
        if transform is not None:
            what = "sorted by importance (act-order)" if transform.perm is not None else "scaled"
            return f"the inputs of its codes are {what}, which it has no place for"
        if form.kind == "codebook":
            return "its codes are of a codebook (nf4)"
        if form.kind == "float4_e2m1":
            nvfp4 = form.group == _NVFP4_GROUP and form.dtype == "float8_e4m3fn"
            return None if nvfp4 else "its float4 scales are not those of NVFP4"
        if form.zero == "offset":
            return "its groups have float offsets, which codes with integer zero points cannot say"
        if form.kind == "int" and form.rows > 1:
            return f"a scale is shared by {form.rows} rows"
        if form.rows == 1 and even_group(form) is None:
            return f"no usable group divides its {form.shape[1]} columns"
        return None

    def encode(self, tensor: QuantTensor) -> Encoded:
        """A quantized weight as its tensors and its part of a config group."""
        reason = self.refusal(tensor.format, tensor.input)
        if reason:
            raise cannot_store(_NAME, tensor.name, reason)
        if tensor.format.rows == 1:
            tensor = even_groups(tensor)
        style = _style(tensor.format)
        module = tensor.name.removesuffix(".weight")
        inputs = _FLOAT8_A_TOKEN if module in self.float8_inputs else _inputs(tensor.format)
        settings = {"weights": _weights(tensor), "input_activations": inputs, "format": style}
        return Encoded(_ENCODERS[style](tensor), settings)

    def config(
        self, modules: Mapping[str, Settings], dense: Sequence[str], kv_scales: bool
    ) -> dict[str, Any]:
        """The ``quantization_config``: a config group for each kind of module."""
        groups: dict[str, list[str]] = {}
        for module, settings in modules.items():
            groups.setdefault(json.dumps(settings), []).append(module)
        # Names where there are several groups: vLLM prefers the class of a fused module to them.
        targets = [["Linear"]] if len(groups) == 1 else list(groups.values())
        formats = {json.loads(group)["format"] for group in groups}
        return {
            "quant_method": _NAME,
            "version": _VERSION,
            "format": formats.pop() if len(formats) == 1 else "mixed-precision",
            "quantization_status": "compressed",
            "global_compression_ratio": None,
            "config_groups": {
                f"group_{index}": {
                    "targets": target,
                    "output_activations": None,
                    **json.loads(group),
                }
                for index, (group, target) in enumerate(zip(groups, targets, strict=True))
            },
            "ignore": left_alone(modules, dense),
            "kv_cache_scheme": _args(8, "float", "tensor") if kv_scales else None,
        }

    def loaders(self, modules: Mapping[str, Settings]) -> Mapping[str, str]:
        """transformers in both of its ways, and vLLM."""
        schemes = {json.dumps(settings) for settings in modules.values()}
        packed = [s["weights"] for s in modules.values() if s["format"] == "pack-quantized"]
        zeros = "it does not unpack zero points"
        first = f"of {len(schemes)} schemes it takes the first for all"
        several = "" if len(schemes) == 1 else first
        stacked = any(".experts." in module for module in modules)
        experts = _unread_experts(modules)
        plain = "" if all(args["symmetric"] for args in packed) else zeros
        return {
            "transformers": plain or experts or (several if stacked else ""),
            "transformers, dequantize=True": several or experts,
            "vLLM": unlike_siblings(modules),
        }


def _unread_experts(modules: Mapping[str, Settings]) -> str:
    """Why transformers, which stacks what it reads of experts, does not read these; or nothing."""
    for module, settings in modules.items():
        args = settings["weights"]
        stacked = settings["format"] == "pack-quantized" and args["symmetric"]
        scaled = settings["format"] == "float-quantized" and args["strategy"] != "block"
        if ".experts." in module and not (stacked or scaled):
            return "it does not stack experts that are stored so"
    return ""


def _style(form: WeightFormat) -> _Format:
    if form.kind == "float8_e4m3":
        return "float-quantized"
    if form.kind == "float4_e2m1":
        return "nvfp4-pack-quantized"
    return "pack-quantized" if form.activation == "none" or form.bits == 4 else "int-quantized"


def _pack_quantized(tensor: QuantTensor) -> _Arrays:
    form = tensor.format
    assert tensor.scale is not None
    arrays: _Arrays = {
        "weight_packed": pack_words(tensor.unpacked_codes(), form.bits),
        "weight_scale": tensor.scale,
        "weight_shape": np.array(form.shape, np.int64),
    }
    if tensor.zero is not None:  # packed along N
        packed = pack_words(np.ascontiguousarray(tensor.zero.T), form.bits)
        arrays["weight_zero_point"] = np.ascontiguousarray(packed.T)
    return arrays


def _int_quantized(tensor: QuantTensor) -> _Arrays:
    assert tensor.scale is not None
    arrays: _Arrays = {"weight": _signed(tensor.unpacked_codes()), "weight_scale": tensor.scale}
    if tensor.zero is not None:
        arrays["weight_zero_point"] = _signed(tensor.zero)
    return arrays


def _float_quantized(tensor: QuantTensor) -> _Arrays:
    assert tensor.scale is not None
    scale = tensor.scale[:1, 0] if _one_scale(tensor) else tensor.scale
    arrays: _Arrays = {"weight": tensor.codes, "weight_scale": scale}
    if tensor.input_scale is not None:
        arrays["input_scale"] = tensor.input_scale
    return arrays


def _nvfp4(tensor: QuantTensor) -> _Arrays:
    assert tensor.scale is not None
    multiplier = np.ones(1, np.float32) if tensor.scale2 is None else tensor.scale2
    return {
        "weight_packed": tensor.codes,
        "weight_scale": tensor.scale,
        # The format divides by it.
        "weight_global_scale": np.float32(1) / multiplier,
    }


_ENCODERS: Mapping[_Format, Callable[[QuantTensor], _Arrays]] = MappingProxyType(
    {
        "pack-quantized": _pack_quantized,
        "int-quantized": _int_quantized,
        "float-quantized": _float_quantized,
        "nvfp4-pack-quantized": _nvfp4,
    }
)


def _signed(codes: NDArray[np.uint8]) -> NDArray[np.int8]:
    return (codes ^ 0x80).view(np.int8)


def _one_scale(tensor: QuantTensor) -> bool:
    """Whether a static float8 weight has one scale, repeated for each row."""
    form, scale = tensor.format, tensor.scale
    rows = form.rows == 1 and form.group >= form.shape[1]
    return form.activation == "static" and rows and scale is not None and bool(np.ptp(scale) == 0)


def _weights(tensor: QuantTensor) -> Settings:
    form = tensor.format
    if form.kind == "float4_e2m1":
        dtype = {"scale_dtype": "torch.float8_e4m3fn", "zp_dtype": "torch.float8_e4m3fn"}
        return {**_args(4, "float", "tensor_group", group_size=_NVFP4_GROUP), **dtype}
    kind = "int" if form.kind == "int" else "float"
    symmetric = form.zero == "midpoint"
    if form.rows > 1:
        return _args(8, kind, "block", block_structure=[form.rows, form.group])
    if _one_scale(tensor):
        return _args(8, kind, "tensor")
    if form.group >= form.shape[1]:
        return _args(form.bits, kind, "channel", symmetric=symmetric)
    return _args(form.bits, kind, "group", symmetric=symmetric, group_size=form.group)


def _inputs(form: WeightFormat) -> Settings | None:
    kind = "int" if form.kind == "int" else "float"
    if form.activation == "none":
        return None
    if form.activation == "static":
        return _args(8, kind, "tensor")
    if form.activation == "token":
        return _args(8, kind, "token", dynamic=True)
    return _args(8, kind, "group", dynamic=True, group_size=form.group)


def _args(
    bits: int,
    kind: str,
    strategy: str,
    *,
    symmetric: bool = True,
    dynamic: bool = False,
    **more: object,
) -> Settings:
    return {
        "num_bits": bits,
        "type": kind,
        "strategy": strategy,
        "symmetric": symmetric,
        "dynamic": dynamic,
        **more,
    }


# Preset W4AFP8: 4-bit integers, inputs in float8 with a scale a token.
_FLOAT8_A_TOKEN = _args(8, "float", "token", dynamic=True)
