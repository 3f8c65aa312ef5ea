"""NVIDIA Model Optimizer's Hugging Face exports: FP8, NVFP4, AWQ and SmoothQuant.

A module's tensors say how it is stored; ``quant_algo`` says what happens to activations. Layouts:
modelopt 0.47, torch/export/quant_utils.py and torch/quantization/qtensor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from slipstream.builder.checkpoints.quantized.kv_scales import read_kv_scales
from slipstream.builder.checkpoints.quantized.refused import REMEDY
from slipstream.builder.checkpoints.quantized.scales import Grid, matrix_shape, scale_grid
from slipstream.builder.checkpoints.quantized.stored import (
    Notes,
    QuantizedWeights,
    Stored,
    dense_linears,
)
from slipstream.builder.checkpoints.quantized.weights import (
    Parts,
    float4_weight,
    float8_weight,
    int8_weight,
)
from slipstream.builder.models.config import ModelConfig
from slipstream.errors import CheckpointError
from slipstream.weights.json import Fields
from slipstream.weights.safetensors import DENSE, StoredTensor
from slipstream.weights.tensor import (
    Activation,
    InputTransform,
    LazyTensor,
    QuantTensor,
    WeightFormat,
    pack_nibbles,
)

_DYNAMIC = (
    "static int8 activations are quantized anew for each token instead, which is more accurate"
)
_STAY = "activations of {algorithm} stay 16-bit, where it rounds them"
# What our kernels do to x, and what is to be said of it.
_ALGORITHMS: Mapping[str, tuple[Activation, str | None]] = MappingProxyType(
    {
        "FP8": ("static", None),
        "FP8_PER_CHANNEL_PER_TOKEN": ("token", None),
        "FP8_PB_WO": ("none", None),
        "MXFP8": ("none", _STAY),
        "W8A16": ("none", None),
        "W8A8_SQ_PER_CHANNEL": ("token", _DYNAMIC),
        "W4A16_AWQ": ("none", None),
        "W4A8_AWQ": ("none", _STAY),
        "W4A16_NVFP4": ("none", None),
        "NVFP4": ("none", _STAY),
        "NVFP4_AWQ": ("none", _STAY),
        "W4A8_NVFP4_FP8": ("none", _STAY),
        "MXFP4": ("none", _STAY),
        "W4A8_MXFP4_FP8": ("none", _STAY),
    }
)
_REFUSED: Mapping[str, str] = MappingProxyType(
    {"NVFP4_SVD": "float4 beside a low-rank matrix in 16 bits, which no kernel of ours adds"}
)
# Scales that are powers of two: the exponent plus 127.
_POWERS = ("U8",)


def read(stored: Stored, quantization: Fields, config: ModelConfig) -> QuantizedWeights:
    """Every weight of the directory, none of them read yet."""
    settings = _settings(quantization)
    tensors: dict[str, LazyTensor] = {}
    notes = Notes()
    for module in stored.modules("weight_scale"):
        tensors[f"{module}.weight"] = _weight(stored, settings, module)
        if settings.excludes(module):
            notes.add("quantized, though config.json excludes it; it stays so", module)
    kv_scales, kv_notes = read_kv_scales(stored, config, fp8=settings.kv_cache in (None, "FP8"))
    tensors |= stored.take_dense()
    dense = [module for module in dense_linears(tensors) if not settings.excludes(module)]
    if dense and settings.algorithm is not None:
        settings.notes[
            f"{len(dense)} modules are not quantized although nothing excludes them, such as "
            f"{dense[0]}; they stay as they are"
        ] = None
    return QuantizedWeights(tensors, kv_scales, (*settings.notes, *notes.sentences(), *kv_notes))


@dataclass(frozen=True, slots=True)
class _Settings:
    """What the configuration says: one algorithm, or one a layer, and the modules without."""

    algorithm: str | None
    layers: Mapping[str, Fields]
    exclude: tuple[str, ...]
    kv_cache: str | None
    notes: dict[str, None] = field(default_factory=dict)

    def excludes(self, module: str) -> bool:
        """Whether a wildcard of the list matches, or no entry of a list of layers is its."""
        if self.layers:
            return module not in self.layers
        return any(fnmatchcase(module, pattern) for pattern in self.exclude)

    def algorithm_of(self, module: str) -> str:
        """The algorithm of a module that has quantized tensors."""
        entry = self.layers.get(module)
        # Some are written in lower case, as modelopt names them inside.
        return str(entry.text("quant_algo") if entry else self.algorithm).upper()


def _settings(quantization: Fields) -> _Settings:
    """From hf_quant_config.json, whose settings are one level down, or from config.json."""
    nested = quantization.fields("quantization", {})
    merged = replace(quantization, values={**nested.values, **quantization.values})
    return _Settings(
        merged.optional_text("quant_algo"),
        merged.fields_by_name("quantized_layers"),
        (*merged.texts("exclude_modules", ()), *merged.texts("ignore", ())),
        _kv_cache(merged),
    )


def _kv_cache(settings: Fields) -> str | None:
    """The type of the cache: an algorithm, or a scheme as compressed-tensors has it."""
    algorithm = settings.optional_text("kv_cache_quant_algo")
    if algorithm or not isinstance(settings.values.get("kv_cache_scheme"), dict):
        return algorithm or settings.optional_text("kv_cache_scheme")
    scheme = settings.fields("kv_cache_scheme")
    return "FP8" if scheme.text("type", "float") == "float" else "INT8"


@dataclass(frozen=True, slots=True)
class _Module:
    """The tensors of a quantized module, and what is done to its x."""

    stored: Stored
    name: str
    weight: StoredTensor
    scale: StoredTensor
    activation: Activation
    input_scale: StoredTensor | None
    input: InputTransform | None

    def parts(
        self, shape: tuple[int, ...], expected: tuple[Grid, ...] = (), bits: int = 8
    ) -> Parts:
        """For a weight ``[N, K]``."""
        return Parts(
            self.weight.name,
            self.weight,
            self.scale,
            scale_grid(self.scale, shape, expected),
            self.activation,
            self.input_scale,
            bits=bits,
            input=self.input,
        )


def _weight(stored: Stored, settings: _Settings, name: str) -> LazyTensor:
    algorithm = settings.algorithm_of(name)
    _check(stored, name, algorithm)
    activation, note = _ALGORITHMS[algorithm]
    input_scale = stored.take_optional(f"{name}.input_scale", *DENSE)
    if activation == "static" and input_scale is None:
        activation, note = "token", f"{algorithm} has no input_scale; activations are dynamic"
    if note is not None:
        settings.notes[note.format(algorithm=algorithm)] = None
    weight = stored.take(f"{name}.weight", *_READERS)
    module = _Module(
        stored,
        name,
        weight,
        stored.take(f"{name}.weight_scale", *DENSE, "F8_E4M3", *_POWERS),
        activation,
        input_scale,
        _pre_quant_scale(stored, name),
    )
    return _READERS[weight.dtype](module)


def _check(stored: Stored, name: str, algorithm: str) -> None:
    if algorithm in _ALGORITHMS:
        return
    if algorithm in _REFUSED:
        raise CheckpointError(f"{stored.path}: {name} is {_REFUSED[algorithm]}; {REMEDY}")
    raise CheckpointError(
        f"{stored.path}: {name} has quant_algo {algorithm!r} of modelopt, which cannot be read; "
        f"{', '.join(_ALGORITHMS)} can. {REMEDY.capitalize()}"
    )


def _pre_quant_scale(stored: Stored, name: str) -> InputTransform | None:
    """What multiplies x, of AWQ and SmoothQuant."""
    tensor = stored.take_optional(f"{name}.pre_quant_scale", *DENSE)
    if tensor is None:
        return None
    return InputTransform(scale=tensor.map().astype(np.float32).reshape(-1))


def _float8(module: _Module) -> LazyTensor:
    n, k = matrix_shape(module.weight)
    cells = module.scale.shape[::2] if len(module.scale.shape) == 4 else module.scale.shape
    expected: tuple[Grid, ...] = ()
    if len(cells) == 2 and cells[0] != n and 0 < cells[0] <= n and 0 < cells[1] <= k:
        expected = (Grid(128, 128), Grid(n // cells[0], k // cells[1]))
    return float8_weight(module.parts((n, k), expected))


def _int8(module: _Module) -> LazyTensor:
    return int8_weight(module.parts(matrix_shape(module.weight)))


def _pairs(module: _Module) -> LazyTensor:
    """Bytes of two 4-bit codes: floats along K, whose scales are bytes too, or integers along N."""
    second = module.stored.take_optional(f"{module.name}.weight_scale_2", *DENSE)
    if module.scale.dtype in DENSE:
        # The second scale of W4A8 is that of the products in float8, not of the weight.
        return _int4(module)
    if module.scale.dtype == "F8_E4M3":
        second = module.stored.take(f"{module.name}.weight_scale_2", *DENSE)
    n, half = matrix_shape(module.weight)
    return float4_weight(module.parts((n, half * 2), bits=4), second)


def _int4(module: _Module) -> LazyTensor:
    half, k = matrix_shape(module.weight)
    parts = module.parts((half * 2, k), bits=4)
    form: WeightFormat = replace(parts.format(), shape=(half * 2, k))

    def load() -> QuantTensor:
        codes = unpack_row_pairs(module.weight.map())
        scale = parts.spread_scale(form.shape)
        return QuantTensor(parts.name, form, pack_nibbles(codes), scale, input=parts.input)

    return LazyTensor(parts.name, form, load, parts.input)


def unpack_row_pairs(pairs: NDArray[np.generic]) -> NDArray[np.uint8]:
    """Signed nibbles u8 ``[N/2, K]``, of rows 2n (low) and 2n + 1, to u8 ``[N, K]`` of 0..15."""
    half, k = pairs.shape
    codes = np.empty((half * 2, k), np.uint8)
    codes[0::2] = (pairs.view(np.uint8) & 15) ^ 8
    codes[1::2] = (pairs.view(np.uint8) >> 4) ^ 8
    return codes


_READERS: Mapping[str, Callable[[_Module], LazyTensor]] = MappingProxyType(
    {"F8_E4M3": _float8, "I8": _int8, "U8": _pairs}
)
