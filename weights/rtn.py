"""Round-to-nearest quantization: needs no data, only the range of each group of weights."""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from slipstream.errors import BuildError, CheckpointError
from slipstream.weights.parallel import in_parallel, row_chunks
from slipstream.weights.tensor import LazyTensor, QuantTensor, WeightFormat, pack_nibbles

Bits = Literal[4, 8]
ScaleDtype = Literal["float16", "float32"]
Floats = NDArray[np.float32]

GROUP_SIZES = (128, 64, 32)
# Elements worked on at once: the temporaries are small beside the weight. In less the threads of
# many cores would mostly wait for the interpreter, which each operation asks for.
_CHUNK = 1 << 20


def largest_group(k: int, requested: int) -> int | None:
    """``requested`` if it divides ``k``, else the largest of 128, 64, 32 below it that does, or
    None."""
    candidates = (requested, *(size for size in GROUP_SIZES if size < requested))
    return next((size for size in candidates if k % size == 0), None)


def quantize_rtn(
    weight: LazyTensor | NDArray[np.generic],
    *,
    bits: Bits,
    group_size: int,
    symmetric: bool,
    scale_dtype: ScaleDtype = "float16",
    name: str = "weight",
) -> QuantTensor:
    """Quantizes a weight ``[N, K]`` to integers in groups of ``group_size`` along K.

    Symmetric is zero kind ``midpoint`` with the full range: the element of largest magnitude gets
    the lowest code, so a scale can be negative (the convention of ggml's Q4_0 and ONNX Runtime;
    about a tenth less error at 4 bits than a scale of max/7). Asymmetric is zero kind ``zero``:
    the range from min to max, widened to contain 0, which stays exact. Codes are rounded against
    the scale as it is stored, in ``scale_dtype``.

    ``name`` is for an array; a LazyTensor brings its own. Raises BuildError for bits, a group size
    or a shape that does not fit, CheckpointError for weights that are not finite or too large for
    ``scale_dtype``.
    """
    values, name = _values(weight, name)
    _check(values, name, bits, group_size)
    n, k = values.shape
    groups = k // group_size
    low, high = np.empty((2, n, groups), np.float32)

    def measure(rows: slice) -> None:
        chunk = values[rows].astype(np.float32).reshape(-1, groups, group_size)
        chunk.min(axis=-1, out=low[rows])
        chunk.max(axis=-1, out=high[rows])

    in_parallel(measure, row_chunks(n, k, _CHUNK))
    if not (np.isfinite(low).all() and np.isfinite(high).all()):
        raise CheckpointError(
            f"tensor {name} holds infinite or undefined numbers; the checkpoint is damaged: "
            "download it again"
        )
    scale, zero = _symmetric(low, high, bits) if symmetric else _asymmetric(low, high, bits)
    scales = _stored(scale, scale_dtype, name)
    inverse = _inverse(scales.astype(np.float32))
    codes = np.empty((n, k * bits // 8), np.uint8)

    def quantize(rows: slice) -> None:
        chunk = values[rows].astype(np.float32).reshape(-1, groups, group_size)
        packed = _codes(chunk, inverse[rows], zero[rows], bits).reshape(-1, k)
        codes[rows] = pack_nibbles(packed) if bits == 4 else packed

    in_parallel(quantize, row_chunks(n, k, _CHUNK))
    kind: Literal["midpoint", "zero"] = "midpoint" if symmetric else "zero"
    form = WeightFormat((n, k), "int", scale_dtype, bits, group_size, kind)
    return QuantTensor(name, form, codes, scales, None if symmetric else zero.astype(np.uint8))


def _values(weight: LazyTensor | NDArray[np.generic], name: str) -> tuple[NDArray[np.generic], str]:
    if not isinstance(weight, LazyTensor):
        return weight, name
    tensor = weight.load()
    dense = tensor.format.kind == "dense"
    return (tensor.codes if dense else tensor.dequantize()), weight.name


def _check(values: NDArray[np.generic], name: str, bits: int, group_size: int) -> None:
    if bits not in get_args(Bits):
        raise BuildError(f"bits is {bits}; round-to-nearest makes 4 or 8")
    if values.ndim != 2:
        raise BuildError(
            f"tensor {name} has shape {list(values.shape)}; only a matrix can be quantized"
        )
    k = values.shape[1]
    if group_size < 1 or k % group_size or (bits == 4 and group_size % 2):
        raise BuildError(
            f"group size {group_size} does not divide the {k} columns of tensor {name}; use "
            f"{largest_group(k, GROUP_SIZES[0]) or 'no quantization for it'}"
        )


def _symmetric(low: Floats, high: Floats, bits: int) -> tuple[Floats, Floats]:
    """Scale and zero code per group, the zero code being the midpoint."""
    half = np.float32(2 ** (bits - 1))
    largest = np.where(-low >= high, low, high)
    return np.asarray(largest / -half, np.float32), np.full_like(low, half)


def _asymmetric(low: Floats, high: Floats, bits: int) -> tuple[Floats, Floats]:
    top = np.float32(2**bits - 1)
    low, high = np.minimum(low, 0), np.maximum(high, 0)
    # Divided first: the difference of two finite numbers can overflow.
    scale = high / top - low / top
    zero = np.rint(np.divide(-low, scale, out=np.zeros_like(low), where=scale > 0))
    return scale, np.clip(zero, 0, top)


def _stored(scale: Floats, dtype: ScaleDtype, name: str) -> NDArray[np.generic]:
    largest = np.abs(scale).max(initial=0)
    if largest > np.finfo(dtype).max:
        raise CheckpointError(
            f"tensor {name} needs a scale of {largest:.3g}, which {dtype} cannot hold; leave it "
            f"unquantized: slipstream quantize --exclude {name.removesuffix('.weight')}"
        )
    return scale.astype(dtype)


def _inverse(scale: Floats) -> Floats:
    """1 / scale; 0 for a group that is zero, or too small for that, whose codes become zero."""
    usable = np.abs(scale) >= np.finfo(np.float32).tiny
    return np.divide(1, scale, out=np.zeros_like(scale), where=usable)


def _codes(chunk: Floats, inverse: Floats, zero: Floats, bits: int) -> NDArray[np.uint8]:
    """Nearest codes of ``chunk`` [rows, groups, group], which is overwritten."""
    chunk *= inverse[..., None]
    np.rint(chunk, out=chunk)
    chunk += zero[..., None]
    np.clip(chunk, 0, 2**bits - 1, out=chunk)
    return chunk.astype(np.uint8)
