"""Weights that several formats store alike: int8, float8 and float4 elements beside their
scales."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from slipstream.builder.checkpoints.quantized.scales import (
    Grid,
    matrix_shape,
    one_number,
    scale_type,
    scale_values,
    spread,
)
from slipstream.errors import CheckpointError
from slipstream.weights.safetensors import StoredTensor
from slipstream.weights.tensor import (
    Activation,
    InputTransform,
    LazyTensor,
    QuantTensor,
    WeightFormat,
    pack_nibbles,
)


@dataclass(frozen=True, slots=True)
class Parts:
    """The tensors of a quantized weight and how they belong together.

    ``name`` is that of the weight; ``zero`` is int8 and as many as the scales. ``bits`` is the size
    of our code: 4 for integers that fit it, 8 for all others.
    """

    name: str
    weight: StoredTensor
    scale: StoredTensor
    grid: Grid
    activation: Activation = "none"
    input_scale: StoredTensor | None = None
    zero: StoredTensor | None = None
    bits: int = 8
    input: InputTransform | None = None

    def format(self) -> WeightFormat:
        """That of an integer weight."""
        return WeightFormat(
            matrix_shape(self.weight),
            "int",
            scale_type(self.scale),
            self.bits,
            self.grid.group,
            "midpoint" if self.zero is None else "zero",
            self.grid.rows,
            self.activation,
        )

    def spread_scale(self, shape: tuple[int, ...]) -> NDArray[np.generic]:
        """``[ceil(N/rows), ceil(K/group)]`` multipliers in their stored type."""
        return spread(scale_values(self.scale), self.grid, shape)

    def static_scale(self) -> NDArray[np.float32] | None:
        """float32 ``[1]``, if x is rounded by it."""
        if self.input_scale is None or self.activation != "static":
            return None
        return one_number(self.input_scale)


def float8_weight(parts: Parts) -> LazyTensor:
    """A float8 (e4m3) weight ``[N, K]``; ``w * scale``."""
    form = replace(parts.format(), kind="float8_e4m3")

    def load() -> QuantTensor:
        return QuantTensor(
            parts.name,
            form,
            parts.weight.map(),
            parts.spread_scale(form.shape),
            input_scale=parts.static_scale(),
            input=parts.input,
        )

    return LazyTensor(parts.name, form, load, parts.input)


def int8_weight(parts: Parts) -> LazyTensor:
    """A weight of signed bytes ``[N, K]``, each an integer of ``parts.bits`` bits or fewer."""
    form = parts.format()

    def load() -> QuantTensor:
        return QuantTensor(
            parts.name,
            form,
            _unsigned(parts.weight, parts.bits),
            parts.spread_scale(form.shape),
            signed_zeros(parts, form) if parts.zero is not None else None,
            input_scale=parts.static_scale(),
            input=parts.input,
        )

    return LazyTensor(parts.name, form, load, parts.input)


def signed_zeros(parts: Parts, form: WeightFormat) -> NDArray[np.uint8]:
    """u8 ``[N, ceil(K/group)]`` in our codes, of int8 zero points."""
    assert parts.zero is not None
    signed = spread(parts.zero.map(), parts.grid, form.shape).astype(np.int16)
    return np.asarray(signed + 2 ** (form.bits - 1), np.uint8)


def _unsigned(weight: StoredTensor, bits: int) -> NDArray[np.uint8]:
    signed = weight.map()
    if bits == 8:
        return np.asarray(signed.view(np.uint8) ^ np.uint8(128), np.uint8)
    codes = signed.view(np.uint8) + np.uint8(8)
    if codes.max(initial=0) > 15:
        raise CheckpointError(
            f"{weight.path}: tensor {weight.name} holds {int(np.abs(signed).max())}, which no "
            "integer of 4 bits is, as which config.json describes it; download both again"
        )
    return pack_nibbles(codes)


def float4_weight(
    parts: Parts, scale2: StoredTensor | None = None, *, divides: bool = False
) -> LazyTensor:
    """A weight of float4 (e2m1) pairs, u8 ``[N, K/2]`` with the even column in the low nibble.

    ``scale2`` multiplies all scales, or ``divides`` them.
    """
    n, half = matrix_shape(parts.weight)
    form = replace(parts.format(), shape=(n, half * 2), kind="float4_e2m1", bits=4)

    def load() -> QuantTensor:
        second = None if scale2 is None else one_number(scale2)
        return QuantTensor(
            parts.name,
            form,
            parts.weight.map(),
            parts.spread_scale(form.shape),
            scale2=np.float32(1) / second if divides and second is not None else second,
            input=parts.input,
        )

    return LazyTensor(parts.name, form, load, parts.input)
