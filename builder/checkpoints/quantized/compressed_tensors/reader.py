"""compressed-tensors: what llm-compressor writes, and what Slipstream writes.

Formats: https://github.com/vllm-project/compressed-tensors, versions up to 0.20. A module's tensors
say how it is stored; config.json says the bits, the groups and what happens to activations.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from slipstream.builder.checkpoints.quantized.compressed_tensors.config import (
    Config,
    Scheme,
    parse,
)
from slipstream.builder.checkpoints.quantized.compressed_tensors.pack import (
    order_of,
    packed_weight,
    packing_of,
)
from slipstream.builder.checkpoints.quantized.kv_scales import read_kv_scales
from slipstream.builder.checkpoints.quantized.scales import Grid, matrix_shape, scale_grid
from slipstream.builder.checkpoints.quantized.stored import (
    QuantizedWeights,
    Stored,
    dense_linears,
    group_size,
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
from slipstream.weights.tensor import Activation, KVScales, LazyTensor

# Scales that are powers of two: the exponent plus 127.
_POWERS = ("U8", "F8_E8M0")


def read(stored: Stored, quantization: Fields, config: ModelConfig) -> QuantizedWeights:
    """Every weight of the directory, none of them read yet."""
    settings = parse(stored.path, quantization)
    tensors: dict[str, LazyTensor] = {}
    packed = stored.modules("weight_packed")
    for module in packed:
        tensors[f"{module}.weight"] = _packed(_module(stored, settings, module))
    for module in stored.modules("weight_scale"):
        if module not in packed:
            tensors[f"{module}.weight"] = _plain(_module(stored, settings, module))
    kv_scales, notes = _kv_scales(stored, settings, config)
    tensors |= stored.take_dense()
    _note_dense(settings, tensors)
    return QuantizedWeights(tensors, kv_scales, (*settings.notes, *notes))


@dataclass(frozen=True, slots=True)
class _Module:
    """A quantized module: its tensors and its scheme."""

    stored: Stored
    settings: Config
    name: str
    scheme: Scheme

    @property
    def bits(self) -> int:
        """Of a weight's integer."""
        return self.scheme.weights.integer("num_bits", 8, minimum=1)

    def take(self, suffix: str, *dtypes: str, shape: tuple[int, ...] | None = None) -> StoredTensor:
        return self.stored.take(f"{self.name}.{suffix}", *dtypes, shape=shape)

    def optional(
        self, suffix: str, *dtypes: str, shape: tuple[int, ...] | None = None
    ) -> StoredTensor | None:
        return self.stored.take_optional(f"{self.name}.{suffix}", *dtypes, shape=shape)

    def zero(self, *dtypes: str) -> StoredTensor | None:
        """The zero points; None when there are none, or only the zeros of a symmetric scheme."""
        if not self.scheme.weights.flag("symmetric", True):
            return self.take("weight_zero_point", *dtypes)
        zero = self.optional("weight_zero_point", *dtypes)
        if zero is None or not np.any(zero.map().view(np.uint8)):
            return None
        self.settings.note(f"config_groups calls {self.name} symmetric, but it has zero points")
        return zero

    def unsupported(self, what: str) -> CheckpointError:
        return CheckpointError(
            f"{self.stored.path}: {self.name} has {what}, which no kernel of ours multiplies; pass "
            "another quantization of the model, or the unquantized checkpoint with --quantization"
        )

    def grid(self, scale: StoredTensor, shape: tuple[int, ...]) -> Grid:
        """Who shares a scale, by the tensor; a note where the configuration says otherwise."""
        expected = _expected(self.scheme.weights)
        grid = scale_grid(scale, shape, expected)
        if (grid not in expected) if expected else (grid.group != shape[1]):
            weights = self.scheme.weights
            self.settings.note(
                f"config_groups has strategy {weights.optional_text('strategy')} and group_size "
                f"{weights.optional_integer('group_size', minimum=-1)} for {self.name}, but its "
                f"scales are {list(scale.shape)} of a weight {list(shape)}: groups of {grid.group}"
            )
        return grid

    def finish(self) -> None:
        """Take what a scheme stores and our kernels have no use for: how x and y are rounded."""
        for suffix in ("input_scale", "input_zero_point", "input_global_scale"):
            self.optional(suffix)
        if not self.name.endswith(("k_proj", "v_proj")):
            self.optional("output_scale")
            self.optional("output_zero_point")
        if self.settings.ignores(self.name):
            self.settings.note(f"config.json ignores {self.name}, which is quantized; it stays so")


def _module(stored: Stored, settings: Config, name: str) -> _Module:
    return _Module(stored, settings, name, settings.scheme_of_quantized(name))


def _expected(weights: Fields) -> list[Grid]:
    if weights.has("block_structure"):
        return [Grid(*_block(weights))]
    group = group_size(weights, "group_size")
    return [Grid(1, group)] if group > 0 else []


def _block(weights: Fields) -> tuple[int, int]:
    """Rows and columns of a block, written ``128x128`` or ``[128, 128]``."""
    key = "block_structure"
    spelled = isinstance(weights.values.get(key), str)
    found = re.fullmatch(r"(\d{1,9})x(\d{1,9})", weights.text(key)) if spelled else None
    sizes = [int(n) for n in found.groups()] if found else () if spelled else weights.integers(key)
    if len(sizes) != 2 or min(sizes) < 1:
        raise weights.refusal(key, "rows and columns of a block")
    return sizes[0], sizes[1]


def _packed(module: _Module) -> LazyTensor:
    """A module with ``weight_packed``: integers in words, or pairs of float4."""
    weight = module.take("weight_packed", "I32", "U8")
    return _packed_int(module, weight) if weight.dtype == "I32" else _float4(module, weight)


def _plain(module: _Module) -> LazyTensor:
    """A module whose ``weight`` has one element a number."""
    weight = module.take("weight")
    if weight.dtype in DENSE:
        raise CheckpointError(
            f"{module.stored.path}: {module.name} has scales beside a weight that is still "
            f"{weight.dtype}; the model was saved before it was compressed: save it with "
            "save_compressed=True, or pass the unquantized checkpoint"
        )
    reader = _PLAIN.get(weight.dtype)
    if reader is None:
        raise CheckpointError(
            f"{module.stored.path}: {module.name}.weight has type {weight.dtype}, which "
            f"cannot be read; {', '.join(_PLAIN)} can: pass another quantization of the model"
        )
    return reader(module, weight)


def _int8(module: _Module, weight: StoredTensor) -> LazyTensor:
    scale = module.take("weight_scale", *DENSE)
    grid = module.grid(scale, matrix_shape(weight))
    bits = _container(module)
    zero = module.zero("I8")
    if zero is not None:
        module.take("weight_zero_point", shape=scale.shape)
        if grid.rows > 1:
            raise module.unsupported("zero points a block")
    activation = _activation(module, bits)
    module.finish()
    name = f"{module.name}.weight"
    return int8_weight(Parts(name, weight, scale, grid, activation, zero=zero, bits=bits))


def _float8(module: _Module, weight: StoredTensor) -> LazyTensor:
    scale = module.take("weight_scale", *DENSE, *_POWERS)
    grid = module.grid(scale, matrix_shape(weight))
    if module.zero("F8_E4M3", "U8") is not None:
        raise module.unsupported("floating-point codes with zero points")
    # Kernels that round x to float8 scale it by any number, not by powers of two.
    activation = _activation(module, 8 if scale.dtype in DENSE else 0)
    input_scale = module.take("input_scale", *DENSE) if activation == "static" else None
    module.finish()
    return float8_weight(
        Parts(f"{module.name}.weight", weight, scale, grid, activation, input_scale)
    )


def _float4(module: _Module, weight: StoredTensor) -> LazyTensor:
    """NVFP4, whose float8 scales are divided by one number, or MXFP4 with powers of two."""
    scale = module.take("weight_scale", "F8_E4M3", *_POWERS)
    n, half = matrix_shape(weight)
    grid = module.grid(scale, (n, half * 2))
    if module.zero("F8_E4M3", "U8") is not None:
        raise module.unsupported("floating-point codes with zero points")
    divisor = module.take("weight_global_scale", "F32") if scale.dtype == "F8_E4M3" else None
    activation = _activation(module, 4)
    module.finish()
    parts = Parts(f"{module.name}.weight", weight, scale, grid, activation, bits=4)
    return float4_weight(parts, divisor, divides=True)


def _packed_int(module: _Module, weight: StoredTensor) -> LazyTensor:
    scale = module.take("weight_scale", *DENSE)
    n, k = _shape(module.take("weight_shape", "I64", "I32", shape=(2,)))
    packing = packing_of(weight, (n, k), module.bits)
    grid = module.grid(scale, (n, k))
    zero = module.zero("I32", "I8")
    if zero is not None:
        groups = grid.cells((n, k))[1]
        expected = packing.zeros_shape(groups) if zero.dtype == "I32" else scale.shape
        module.take("weight_zero_point", shape=expected)
    order = order_of(module.optional("weight_g_idx", "I32", shape=(k,)), k, grid.group)
    bits = _container(module)
    activation = _activation(module, bits)
    module.finish()
    name = f"{module.name}.weight"
    parts = Parts(name, weight, scale, grid, activation, zero=zero, bits=bits, input=order)
    return packed_weight(parts, packing)


def _shape(stored: StoredTensor) -> tuple[int, int]:
    n, k = (int(size) for size in stored.map())
    if min(n, k) < 1:
        raise CheckpointError(
            f"{stored.path}: tensor {stored.name} says that its weight is {n} x {k}; download the "
            "checkpoint again"
        )
    return n, k


_PLAIN: Mapping[str, Callable[[_Module, StoredTensor], LazyTensor]] = MappingProxyType(
    {"I8": _int8, "F8_E4M3": _float8}
)


def _container(module: _Module) -> int:
    """Bits of our code for an integer of ``num_bits``."""
    return 4 if module.bits <= 4 else 8


def _activation(module: _Module, bits: int) -> Activation:
    """What our kernels do to x, and a note where that is not what the configuration asks for.

    They multiply in the type of codes of 8 ``bits``.
    """
    inputs, weights = module.scheme.inputs, module.scheme.weights
    if not inputs:
        return "none"
    kind, stored = inputs.text("type", "int"), weights.text("type", "int")
    rounded = inputs.integer("num_bits", 8, minimum=1)
    if bits != 8 or rounded != 8 or kind != stored:
        module.settings.note(
            f"activations of {rounded} bits ({kind}) stay 16-bit beside weights of "
            f"{module.bits} bits ({stored}, {weights.optional_text('strategy')})"
        )
        return "none"
    # True, or "local" for scales that are dynamic beside one that is not.
    if inputs.values.get("dynamic"):
        groups = group_size(inputs, "group_size") > 0
        grouped = inputs.optional_text("strategy") == "group" and groups
        return "group" if grouped else "token"
    if kind == "float":
        return "static"
    module.settings.note(
        "static int8 activations are quantized anew for each token instead, symmetrically, which "
        "is more accurate; their stored scales are not used"
    )
    return "token"


def _kv_scales(
    stored: Stored, settings: Config, config: ModelConfig
) -> tuple[KVScales | None, tuple[str, ...]]:
    scheme = settings.kv_cache
    fp8 = scheme is None or (
        scheme.text("type", "float") == "float" and scheme.integer("num_bits", 8) == 8
    )
    return read_kv_scales(stored, config, fp8=fp8)


def _note_dense(settings: Config, tensors: Mapping[str, LazyTensor]) -> None:
    """A module that should be quantized and is not: nothing is lost, but it is worth knowing."""
    dense = [
        module
        for module in dense_linears(tensors)
        if settings.scheme(module) is not None and not settings.ignores(module)
    ]
    if dense:
        settings.note(
            f"config_groups targets {len(dense)} modules that are not quantized, such as "
            f"{dense[0]}; they stay as they are"
        )
