"""What the quantized Linear and Embedding compute, in NumPy."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from slipstream.plugins.gated_mlp.reference import gated as gated_activation
from slipstream.weights.fp8 import FP8_MAX
from slipstream.weights.tensor import Activation, QuantTensor

Floats = NDArray[np.float32]

BLOCK = 32
_NARROWEST = np.float32(2.0**-100)  # blocks of a narrower range are taken as their minimum


def rms_norm(x: Floats, weight: Floats, eps: float) -> Floats:
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last axis; the mean is taken in float64."""
    mean = np.mean(np.square(x, dtype=np.float64), axis=-1, keepdims=True)
    inverse = (1.0 / np.sqrt(mean + float(np.float32(eps)))).astype(np.float32)
    return np.asarray(x * inverse * weight, np.float32)


def quantize_activations(x: Floats) -> tuple[NDArray[np.int8], Floats, Floats]:
    """Int8 codes ``[T, K]``, scales and centres ``[T, K/32]``: x is about code * scale + centre.

    Codes -128..127 span the range of their block of 32. Equal values have codes and scale of zero
    and are their own centre, exactly. A block that holds an infinity or a NaN, or whose range is
    beyond float32, has a centre of NaN, so that every output of its token becomes NaN.
    """
    blocks = x.reshape(x.shape[0], -1, BLOCK)
    low = blocks.min(axis=-1)
    with np.errstate(invalid="ignore", over="ignore"):
        width = blocks.max(axis=-1) - low
    usable = (width >= _NARROWEST) & np.isfinite(width)
    scale = np.where(usable, width / np.float32(255), np.float32(0))
    inverse = np.float32(255) / np.where(usable, width, np.float32(1))
    with np.errstate(invalid="ignore", over="ignore"):
        steps = np.rint((blocks - low[..., None]) * inverse[..., None])
        centre = low + np.float32(128) * scale
    codes = np.where(usable[..., None], steps - 128, 0)
    centre = np.where(np.isfinite(width), centre, np.float32(np.nan))
    return codes.astype(np.int8).reshape(x.shape), scale, centre


def linear(  # noqa: PLR0913 - what is fused
    x: Floats,
    weight: QuantTensor,
    *,
    bias: Floats | None = None,
    residual: Floats | None = None,
    norm_weight: Floats | None = None,
    norm_eps: float = 0.0,
    gated: bool = False,
    gate: int = 0,
    activation: Activation | None = None,
) -> Floats:
    """``act(norm(x) @ weight.T + bias) + residual``, x being rounded as ``activation`` says.

    x ``[T, K]``; bias ``[N]``; residual and the result ``[T, N]``, or ``[T, N/2]`` when gated: then
    the first N/2 rows of the weight are the gate and the rest up, and act is their gated
    activation, by default ``silu(gate) * up``. ``norm_weight`` ``[K]`` asks for an RMS norm of x
    first. ``activation`` is by default that of the weight's format. Sums are taken in float64.
    """
    if norm_weight is not None:
        x = rms_norm(x, norm_weight, norm_eps)
    rounded = round_activations(x, weight, activation or weight.format.activation)
    y: NDArray[np.float64] = rounded @ weight.dequantize().astype(np.float64).T
    if bias is not None:
        y += bias
    if gated:
        gates, ups = np.split(y, 2, axis=1)
        y = gated_activation(gates, ups, gate)
    if residual is not None:
        y = y + residual
    return y.astype(np.float32)


def round_activations(
    x: Floats, weight: QuantTensor, activation: Activation
) -> NDArray[np.float64]:
    """x ``[T, K]`` as numbers of the type of the weight's codes.

    ``block`` is to int8 in blocks of 32, each by its own range. The others have no centre: a scale
    a token, one a token and group of K, or the weight's ``input_scale``, by which x saturates.
    """
    if activation == "none":
        return x.astype(np.float64)
    if activation == "block":
        codes, scales, centres = (a.astype(np.float64) for a in quantize_activations(x))
        return codes * np.repeat(scales, BLOCK, axis=1) + np.repeat(centres, BLOCK, axis=1)
    float8 = weight.format.kind == "float8_e4m3"
    top = np.float32(FP8_MAX if float8 else 127)
    if activation == "static":
        assert weight.input_scale is not None
        scale: NDArray[Any] = np.full(x.shape, weight.input_scale, np.float32)
    else:
        width = weight.format.group if activation == "group" else x.shape[1]
        starts = np.arange(0, x.shape[1], width)
        largest = np.maximum.reduceat(np.abs(x), starts, axis=1)
        scale = np.repeat(largest / top, width, axis=1)[:, : x.shape[1]]
    steps = np.clip(np.divide(x, scale, out=np.zeros_like(x), where=scale > 0), -top, top)
    whole = steps.astype(ml_dtypes.float8_e4m3fn) if float8 else np.rint(steps)
    return np.asarray(whole.astype(np.float64) * scale, np.float64)


def embedding(ids: NDArray[np.int32], weight: QuantTensor) -> Floats:
    """Rows ``[T, K]`` of a weight."""
    return weight.dequantize()[ids]


def embedding_shard(
    ids: NDArray[np.int32], weight: QuantTensor, first: NDArray[np.int32]
) -> Floats:
    """Rows ``[T, K]`` of a weight ``[V, K]`` that begins with row ``first [1]`` of a table, zeros
    for those of other parts."""
    own = ids - first
    rows = weight.dequantize()[np.clip(own, 0, weight.format.shape[0] - 1)]
    here = (own >= 0) & (own < weight.format.shape[0])
    return np.where(here[:, None], rows, np.float32(0))
