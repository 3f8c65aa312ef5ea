"""Rotary frequencies of each scaling method, as float32 like the models were trained with."""

from __future__ import annotations

import math
from dataclasses import asdict, replace

import numpy as np
from numpy.typing import NDArray

from slipstream.builder.models.config import LONGEST, Rope, RopeScaling
from slipstream.builder.models.module import Extent
from slipstream.errors import CheckpointError

Frequencies = NDArray[np.float32]


def rotary_frequencies(rope: Rope, length: int = 0) -> tuple[Frequencies, float]:
    """Inverse frequencies ``[dim / 2]`` and the factor of cosines and sines (1 except for YaRN and
    LongRoPE) for sequences of up to ``length`` tokens, which LongRoPE alone asks for.

    Methods by the names of transformers: ``default`` (Su et al., 2021), ``linear`` (position
    interpolation), ``llama3`` (Llama 3.1), ``yarn`` (Peng et al., 2023), ``longrope`` (Ding et al.,
    2024), ``proportional`` (Gemma 4: the pairs of low frequency stand still). Raises
    CheckpointError for numbers whose angles are not finite.
    """
    try:
        with np.errstate(all="ignore"):
            frequencies, factor = _scaled(rope, length)
            angles = [*(frequencies * np.float32(LONGEST)), np.float32(factor)]
    except (ArithmeticError, ValueError) as error:
        raise _no_angles(rope) from error
    if not np.all(np.isfinite(angles)):
        raise _no_angles(rope)
    return frequencies, factor


def unrotated(rope: Rope) -> Rope:
    """Angles of 0 for as many elements: positions stretched without end."""
    return replace(rope, scaling=RopeScaling("linear", math.inf))


def halves_of_neighbours(heads: Extent, rotary_dim: int) -> NDArray[np.intp]:
    """The order of rows in which elements i and i + rotary_dim / 2 of every head are those that
    stood at 2i and 2i + 1; elements that are not rotated stay."""
    first = np.arange(rotary_dim).reshape(-1, 2).T.reshape(-1)
    one = np.concatenate([first, np.arange(rotary_dim, heads.size)])
    order: NDArray[np.intp] = np.arange(heads.units)[:, None] * heads.size + one
    return order.reshape(-1)


def _no_angles(rope: Rope) -> CheckpointError:
    given = {name: value for name, value in asdict(rope.scaling).items() if value is not None}
    return CheckpointError(
        f"config.json: rope_theta {rope.theta} with {given} gives rotary angles that are not "
        "finite; correct its rope parameters or download the checkpoint again"
    )


def _scaled(rope: Rope, length: int) -> tuple[Frequencies, float]:
    scaling, dim = rope.scaling, rope.dim
    exponents = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    powers = np.power(np.float32(rope.theta), exponents, dtype=np.float32)
    plain = np.asarray(np.float32(1) / powers, np.float32)
    if scaling.kind == "default":
        return plain, 1.0
    if scaling.kind == "linear":
        return np.asarray(plain / np.float32(scaling.factor), np.float32), 1.0
    if scaling.kind == "proportional":
        return _proportional(plain, scaling), 1.0
    if scaling.kind == "llama3":
        return _llama3(plain, scaling), 1.0
    if scaling.kind == "longrope":
        return _longrope(powers, scaling, length), _longrope_attention_factor(scaling)
    return _yarn(plain, scaling, dim, rope.theta), _yarn_attention_factor(scaling)


def _llama3(plain: Frequencies, scaling: RopeScaling) -> Frequencies:
    """Long wavelengths divided by the factor, short ones kept, a linear blend between."""
    wavelength = 2 * math.pi / plain
    original, low, high = (
        scaling.original_max_position_embeddings,
        scaling.low_freq_factor,
        scaling.high_freq_factor,
    )
    smooth = np.clip((original / wavelength - low) / (high - low), 0, 1)
    return np.asarray((1 - smooth) * plain / scaling.factor + smooth * plain, np.float32)


def _proportional(plain: Frequencies, scaling: RopeScaling) -> Frequencies:
    """The leading ones; a frequency of 0 turns nothing."""
    turning = int(scaling.partial_rotary_factor * len(plain))
    turns = np.arange(len(plain)) < turning
    return np.asarray(np.where(turns, plain / np.float32(scaling.factor), 0), np.float32)


def _yarn(plain: Frequencies, scaling: RopeScaling, dim: int, theta: float) -> Frequencies:
    """Interpolated frequencies below, extrapolated above, a ramp over the dimensions between."""

    def dimension(rotations: float) -> float:
        turns = scaling.original_max_position_embeddings / (rotations * 2 * math.pi)
        return dim * math.log(turns) / (2 * math.log(theta))

    low, high = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    width = high - low if high != low else 0.001
    ramp = np.clip((np.arange(dim // 2, dtype=np.float32) - low) / width, 0, 1)
    return np.asarray(plain / scaling.factor * ramp + plain * (1 - ramp), np.float32)


def _longrope(powers: Frequencies, scaling: RopeScaling, length: int) -> Frequencies:
    """Of all positions alike, by whether sequences may be longer than those of training."""
    long = length > scaling.original_max_position_embeddings
    factors = np.array(scaling.long_factor if long else scaling.short_factor, np.float32)
    return np.asarray(np.float32(1) / (factors * powers), np.float32)


def _longrope_attention_factor(scaling: RopeScaling) -> float:
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.factor <= 1:
        return 1.0
    original = scaling.original_max_position_embeddings
    return math.sqrt(1 + math.log(scaling.factor) / math.log(original))


def _yarn_attention_factor(scaling: RopeScaling) -> float:
    def mscale(weight: float) -> float:
        return 1.0 if scaling.factor <= 1 else 0.1 * weight * math.log(scaling.factor) + 1.0

    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.mscale and scaling.mscale_all_dim:
        return mscale(scaling.mscale) / mscale(scaling.mscale_all_dim)
    return mscale(1.0)
