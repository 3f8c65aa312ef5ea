"""FP8 directories: AutoFP8 and vLLM, fbgemm, and the blocks of DeepSeek and Qwen.

``weight_scale`` and ``weight_scale_inv`` are both multipliers, whatever the name says. Sources:
transformers' integrations/finegrained_fp8.py and integrations/fbgemm_fp8.py, vLLM's
layers/quantization/fp8.py.
"""

from __future__ import annotations

from collections.abc import Mapping

from slipstream.builder.checkpoints.quantized.kv_scales import read_kv_scales
from slipstream.builder.checkpoints.quantized.scales import Grid, matrix_shape, scale_grid
from slipstream.builder.checkpoints.quantized.stored import (
    QuantizedWeights,
    Stored,
    dense_linears,
)
from slipstream.builder.checkpoints.quantized.weights import Parts, float8_weight
from slipstream.builder.models.config import ModelConfig
from slipstream.errors import CheckpointError
from slipstream.weights.json import Fields
from slipstream.weights.safetensors import DENSE, StoredTensor
from slipstream.weights.tensor import Activation, LazyTensor

_SCALES = ("weight_scale_inv", "weight_scale")
_INPUT_SCALES = ("input_scale", "activation_scale")
# Scales that are powers of two: the exponent plus 127.
_POWERS = ("U8", "F8_E8M0")
_SCHEMES = ("dynamic", "static")


def read(stored: Stored, quantization: Fields, config: ModelConfig) -> QuantizedWeights:
    """Every weight of the directory, none of them read yet."""
    notes: dict[str, None] = {}
    tensors: dict[str, LazyTensor] = {}
    for module in stored.modules("weight"):
        weight = stored.peek(f"{module}.weight")
        assert weight is not None
        if weight.dtype not in DENSE:
            tensors[weight.name] = _float8(stored, quantization, module, notes)
    kv_scales, kv_notes = read_kv_scales(stored, config)
    tensors |= stored.take_dense()
    _compare(quantization, tensors, notes)
    return QuantizedWeights(tensors, kv_scales, (*notes, *kv_notes))


def _float8(
    stored: Stored, quantization: Fields, module: str, notes: dict[str, None]
) -> LazyTensor:
    weight = _weight(stored, module)
    scale = _scale(stored, module)
    shape = matrix_shape(weight)
    grid = scale_grid(scale, shape, _blocks(quantization))
    input_scale = _input_scale(stored, module)
    activation = _activation(stored, quantization, grid.group != shape[1], input_scale, notes)
    return float8_weight(Parts(weight.name, weight, scale, grid, activation, input_scale))


def _weight(stored: Stored, module: str) -> StoredTensor:
    weight = stored.peek(f"{module}.weight")
    if weight is not None and weight.dtype == "F8_E5M2":
        raise CheckpointError(
            f"{stored.path}: {weight.name} has type F8_E5M2, of two bits of mantissa, which no "
            "kernel of ours multiplies; pass a float8_e4m3fn checkpoint of the model"
        )
    return stored.take(f"{module}.weight", "F8_E4M3")


def _scale(stored: Stored, module: str) -> StoredTensor:
    found = [name for name in _SCALES if f"{module}.{name}" in stored]
    return stored.take(f"{module}.{found[0] if found else 'weight_scale'}", *DENSE, *_POWERS)


def _blocks(quantization: Fields) -> list[Grid]:
    block = quantization.integers("weight_block_size", (), minimum=1)
    if len(block) not in (0, 2):
        raise quantization.refusal("weight_block_size", "rows and columns of a block")
    return [Grid(*block)] if block else []


def _input_scale(stored: Stored, module: str) -> StoredTensor | None:
    """The scale of x; fbgemm's upper bound of it is for its own kernel."""
    stored.take_optional(f"{module}.input_scale_ub")
    taken = [stored.take_optional(f"{module}.{name}", *DENSE) for name in _INPUT_SCALES]
    return next((tensor for tensor in taken if tensor is not None), None)


def _activation(
    stored: Stored,
    quantization: Fields,
    grouped: bool,
    input_scale: StoredTensor | None,
    notes: dict[str, None],
) -> Activation:
    scheme = quantization.text("activation_scheme", "dynamic").lower()
    if scheme not in _SCHEMES:
        raise CheckpointError(
            f"{stored.path}: activation_scheme in config.json is {scheme!r}; it is one of "
            f"{', '.join(_SCHEMES)}: download config.json again"
        )
    if grouped:
        return "group"
    if input_scale is not None:
        if scheme == "dynamic":
            notes["activation_scheme is dynamic, but scales of activations are stored: static"] = (
                None
            )
        return "static"
    if scheme == "static":
        notes["activation_scheme is static, but no scales of activations are stored: dynamic"] = (
            None
        )
    return "token"


def _compare(
    quantization: Fields, tensors: Mapping[str, LazyTensor], notes: dict[str, None]
) -> None:
    """Notes where the list of unquantized modules and the tensors disagree."""
    listed = (
        *quantization.texts("ignored_layers", ()),
        *quantization.texts("modules_to_not_convert", ()),
    )
    dense = [module for module in dense_linears(tensors) if not _is_listed(module, listed)]
    if dense:
        notes[
            f"{len(dense)} modules are not quantized although config.json does not ignore them, "
            f"such as {dense[0]}; they stay as they are"
        ] = None


def _is_listed(module: str, listed: tuple[str, ...]) -> bool:
    """Whether a list names a module or one that holds it; transformers also takes a part of it."""
    return any(f".{name}." in f".{module}." for name in listed)
