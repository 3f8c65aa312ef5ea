"""FP8 (e4m3) weights, which need no data: each row is scaled to the range of the format."""

from __future__ import annotations

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from slipstream.errors import CheckpointError
from slipstream.weights.parallel import in_parallel, row_chunks
from slipstream.weights.tensor import LazyTensor, QuantTensor, WeightFormat

Floats = NDArray[np.float32]
FP8_MAX = 448.0  # the largest e4m3fn number
# Elements worked on at once: in more the temporaries leave the cache, in less the threads of many
# cores would mostly wait for the interpreter, which each operation asks for.
_CHUNK = 1 << 19
_LEAST_NORMAL, _LAST_BITS = np.array([2.0**-6, 2.0**14], np.float32).view(np.uint32)
# Half of the last bit that stays is added, less one unit where the result must be even.
# Exponents of float32 are 120 greater.
_TO_ROUND = np.uint32((0x7FFFF - (120 << 23)) % 2**32)
# Scales that are tried, as multiples of max|row| / 448: after an octave the grid is the same again.
_OCTAVE = np.exp2(np.arange(8, dtype=np.float32) / 8)


def fp8_format(shape: tuple[int, ...]) -> WeightFormat:
    """One float32 scale a row; activations are rounded with one scale a token."""
    return WeightFormat(shape, "float8_e4m3", "float32", bits=8, group=shape[1], activation="token")


def quantize_fp8(weight: LazyTensor, *, search: bool = False) -> QuantTensor:
    """Rounds a weight ``[N, K]`` to float8_e4m3fn with ``scale = max|row| / 448``.

    With ``search`` the scale of a row is that of least squared error between this and twice it: a
    tenth less error, for several times the work. Raises CheckpointError for a weight that holds
    numbers that are not finite.
    """
    values = weight.load().codes
    n, k = weight.format.shape
    codes = np.empty((n, k), ml_dtypes.float8_e4m3fn)
    scales = np.empty((n, 1), np.float32)

    def quantize(rows: slice) -> None:
        chunk = values[rows].astype(np.float32)
        largest = np.abs(chunk).max(axis=1, keepdims=True)
        if not np.isfinite(largest).all():
            raise CheckpointError(
                f"tensor {weight.name} holds infinite or undefined numbers; the checkpoint is "
                "damaged: download it again"
            )
        scale = np.maximum(largest / np.float32(FP8_MAX), np.finfo(np.float32).tiny)
        scales[rows] = _best_scales(chunk, scale) if search else scale
        codes[rows] = _nearest(chunk / scales[rows])

    in_parallel(quantize, row_chunks(n, k, _CHUNK))
    return QuantTensor(weight.name, fp8_format((n, k)), codes, scales)


def _best_scales(chunk: Floats, scale: Floats) -> Floats:
    """Of the multiples of ``scale`` ``[rows, 1]``, those of least squared error."""
    scaled = chunk / scale
    errors = [multiple**2 * _squared_error(scaled / multiple) for multiple in _OCTAVE]
    return np.asarray(scale * _OCTAVE[np.argmin(errors, axis=0)][:, None], np.float32)


def _squared_error(values: Floats) -> Floats:
    """What rounding to four significant bits costs each row; that the least numbers of e4m3 have
    fewer is left out."""
    bits = values.view(np.int32)
    # Half of the last bit that stays is added, less one unit where the result must be even.
    rounded = (bits + (0x7FFFF + ((bits >> 20) & 1))) & ~0xFFFFF
    error = values - rounded.view(np.float32)
    return np.asarray(np.einsum("nk,nk->n", error, error), np.float32)


def quantize_fp8_block(weight: LazyTensor, block: int = 128) -> QuantTensor:
    """Rounds a weight ``[N, K]`` with one scale a block of ``block`` by ``block``; x is rounded in
    groups of ``block``.

    Raises CheckpointError for a weight that holds numbers that are not finite.
    """
    values = weight.load().dequantize()
    n, k = weight.format.shape
    form = WeightFormat(
        (n, k), "float8_e4m3", "float32", bits=8, group=block, rows=block, activation="group"
    )
    codes = np.empty((n, k), ml_dtypes.float8_e4m3fn)
    scales = np.empty((-(-n // block), -(-k // block)), np.float32)
    for row, column in np.ndindex(scales.shape):
        part = np.s_[row * block : (row + 1) * block, column * block : (column + 1) * block]
        largest = np.abs(values[part]).max()
        if not np.isfinite(largest):
            raise CheckpointError(
                f"tensor {weight.name} holds infinite or undefined numbers; the checkpoint is "
                "damaged: download it again"
            )
        scale = np.maximum(largest / np.float32(FP8_MAX), np.finfo(np.float32).tiny)
        scales[row, column] = scale
        codes[part] = _nearest(values[part] / scale)
    return QuantTensor(weight.name, form, codes, scales)


def _nearest(values: Floats) -> NDArray[np.generic]:
    """The nearest numbers of e4m3fn, ties to even, of values that no rounding takes beyond 448; as
    ml_dtypes rounds, in half of its time."""
    size = values.view(np.uint32) & np.uint32(0x7FFFFFFF)
    codes = size >> np.uint32(20)
    codes &= np.uint32(1)
    codes += size
    codes += _TO_ROUND
    codes >>= np.uint32(20)
    # Below the least normal number they are multiples of 2**-9, the last bit of 2**14 as float32.
    small = size < _LEAST_NORMAL
    size.view(np.float32)[...] += np.float32(2**14)
    size -= _LAST_BITS
    np.copyto(codes, size, where=small)
    np.right_shift(values.view(np.uint32), np.uint32(24), out=size)  # the sign
    size &= np.uint32(0x80)
    codes |= size
    return codes.astype(np.uint8).view(ml_dtypes.float8_e4m3fn)
