"""The blob of a weight, laid out in the order in which the CPU kernels read it.

The blob is a sequence of tiles of 16 rows (the last one padded with rows of zeros), each a
multiple of 64 bytes:

* codes. For every 32 elements along K, 8 bits: byte ``[quad 8, row 16, 4]`` is the code of
  ``k = 4*quad + i``; 4 bits: byte ``[pair 4, row 16, 4]`` holds the code of ``k = 8*pair + i`` in
  its low and of ``k = 8*pair + 4 + i`` in its high nibble. So a load of 64 bytes gives 16 rows four
  consecutive elements each (eight when they are nibbles).
* scales ``[K/group, 16]``: float16 when the format's dtype is float16, else float32. Those of
  float4 are float32 and halved: the kernels look up twice its numbers, which are whole.
* u8 zero points ``[K/group, 16]``, or offsets ``[K/group, 16]`` of the scales' type, or nothing.

The tiles of a dense weight have no scales, and a column of zeros where K is odd: float32 and
float16 ``[K, 16]``, bfloat16 ``[K/2, 16, 2]``, so that a load of words gives rows two consecutive
elements.

A gated weight (gate rows first, then as many up rows) alternates between tiles of gate rows and
tiles of up rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slipstream.weights.parallel import in_parallel
from slipstream.weights.tensor import QuantTensor, WeightFormat, numpy_dtype

TILE = 16
BLOCK = 32
HALF = 16  # the one narrower group, of 8-bit codes around their midpoint
FLOAT4 = "float4_e2m1"
_LINE = 64
_CHUNK_BYTES = 1 << 20  # of codes handled at once, so that intermediate arrays stay in the cache

# What tiles of a dense weight are put together of: bfloat16 in pairs.
_WORDS = {"float32": np.uint32, "float16": np.uint16, "bfloat16": np.uint32}

Bytes = NDArray[np.uint8]


def can_pack(fmt: WeightFormat) -> bool:
    """Whether the CPU kernels can hold a weight of this format."""
    if fmt.kind == "dense":
        return len(fmt.shape) == 2 and fmt.dtype in _WORDS
    if fmt.kind not in ("int", FLOAT4) or len(fmt.shape) != 2 or fmt.rows != 1:
        return False
    k = fmt.shape[1]
    if fmt.bits not in (4, 8):
        return False
    if fmt.group == HALF:
        return fmt.bits == 8 and fmt.zero == "midpoint" and k % BLOCK == 0
    return fmt.group >= BLOCK and fmt.group % BLOCK == 0 and k % fmt.group == 0


def scale_bytes(fmt: WeightFormat) -> int:
    """Bytes of a packed scale or offset: 2 for float16, 4 for all others, which float32 holds."""
    return 2 if fmt.dtype == "float16" else 4


@dataclass(frozen=True, slots=True)
class _Layout:
    """Sizes of one tile in bytes, and their number."""

    tiles: int
    codes: int
    scales: int
    zeros: int
    stride: int


def _layout(fmt: WeightFormat, gated: bool) -> _Layout:
    assert can_pack(fmt), fmt
    n, k = fmt.shape
    parts = 2 if gated else 1
    assert n % parts == 0, f"a gated weight has as many gate rows as up rows, not {n} rows together"
    tiles = parts * -(-(n // parts) // TILE)
    if fmt.kind == "dense":
        values = -(-k // 2) * 2 * TILE * numpy_dtype(fmt.dtype).itemsize
        return _Layout(tiles, values, 0, 0, values)
    codes = k * TILE * fmt.bits // 8
    scales = k // fmt.group * TILE * scale_bytes(fmt)
    zeros = {"midpoint": 0, "zero": k // fmt.group * TILE, "offset": scales}[fmt.zero]
    stride = -(-(codes + scales + zeros) // _LINE) * _LINE
    return _Layout(tiles, codes, scales, zeros, stride)


def packed_size(fmt: WeightFormat, gated: bool = False) -> int:
    """Bytes of the blob of a weight of this format."""
    layout = _layout(fmt, gated)
    return layout.tiles * layout.stride


def pack(tensor: QuantTensor, gated: bool = False) -> Bytes:
    """The blob u8 ``[packed_size]`` of a weight; lossless, see ``unpack``."""
    fmt = tensor.format
    if fmt.kind == "dense":
        return _pack_dense(tensor, gated)
    layout = _layout(fmt, gated)
    multipliers = _scales(tensor)
    number = np.float16 if scale_bytes(fmt) == 2 else np.float32
    zeros = tensor.zero if fmt.zero == "zero" else tensor.offset if fmt.zero == "offset" else None
    out = np.zeros((layout.tiles, layout.stride), np.uint8)

    def pack_tiles(tiles: slice) -> None:
        _pack_codes(_rows_of(tensor.codes, gated, tiles), fmt.bits, out[tiles, : layout.codes])
        scales = _tile_numbers(multipliers, layout, gated, tiles, np.dtype(number))
        out[tiles, layout.codes : layout.codes + layout.scales] = scales
        if zeros is not None:
            kind = np.dtype(np.uint8 if fmt.zero == "zero" else number)
            end = layout.codes + layout.scales + layout.zeros
            out[tiles, end - layout.zeros : end] = _tile_numbers(zeros, layout, gated, tiles, kind)

    in_parallel(pack_tiles, _chunks(layout))
    return out.reshape(-1)


def unpack(blob: Bytes, fmt: WeightFormat, gated: bool = False, name: str = "") -> QuantTensor:
    """The weight in a blob; scales and offsets come back in the blob's float16 or float32."""
    layout = _layout(fmt, gated)
    tiles = blob.reshape(layout.tiles, layout.stride)
    if fmt.kind == "dense":
        return QuantTensor(name, fmt, _unpack_dense(tiles, fmt, gated))
    number = np.dtype(np.float16 if scale_bytes(fmt) == 2 else np.float32)
    bounds = np.cumsum([0, layout.codes, layout.scales, layout.zeros])
    codes, scales, zeros = (tiles[:, a:b] for a, b in pairwise(bounds))

    def numbers(part: Bytes, dtype: np.dtype[np.generic]) -> NDArray[np.generic]:
        rows = (
            np.ascontiguousarray(part)
            .view(dtype)
            .reshape(layout.tiles, -1, TILE)
            .transpose(0, 2, 1)
        )
        return _untile(rows, fmt.shape[0], gated)

    multipliers: NDArray[Any] = numbers(scales, number)
    return QuantTensor(
        name,
        fmt,
        _untile(_unpack_codes(codes, fmt.bits), fmt.shape[0], gated),
        multipliers * np.float32(2) if fmt.kind == FLOAT4 else multipliers,
        numbers(zeros, np.dtype(np.uint8)).astype(np.uint8) if fmt.zero == "zero" else None,
        numbers(zeros, number) if fmt.zero == "offset" else None,
    )


def _pack_dense(tensor: QuantTensor, gated: bool) -> Bytes:
    layout, word = _layout(tensor.format, gated), _WORDS[tensor.format.dtype]
    values = tensor.codes
    if values.shape[1] % 2:
        values = np.pad(values, ((0, 0), (0, 1)))
    out = np.empty((layout.tiles, layout.stride), np.uint8)

    def pack_tiles(tiles: slice) -> None:
        words = _rows_of(values, gated, tiles).view(word)
        packed = out[tiles].view(word)
        packed.reshape(len(packed), -1, TILE)[:] = words.transpose(0, 2, 1)

    in_parallel(pack_tiles, _chunks(layout))
    return out.reshape(-1)


def _unpack_dense(tiles: Bytes, fmt: WeightFormat, gated: bool) -> NDArray[np.generic]:
    words = tiles.view(_WORDS[fmt.dtype]).reshape(tiles.shape[0], -1, TILE).transpose(0, 2, 1)
    rows = np.ascontiguousarray(words).view(numpy_dtype(fmt.dtype))
    return np.ascontiguousarray(_untile(rows, fmt.shape[0], gated)[:, : fmt.shape[1]])


def _scales(tensor: QuantTensor) -> NDArray[np.generic]:
    """The numbers that a tile has of each group and row."""
    assert tensor.scale is not None
    if tensor.format.kind != FLOAT4:
        return tensor.scale
    return np.asarray(tensor.multipliers() * np.float32(0.5), np.float32)


def _chunks(layout: _Layout) -> list[slice]:
    step = max(2, _CHUNK_BYTES // layout.codes // 2 * 2)  # even: gated tiles come in pairs
    return [slice(i, min(i + step, layout.tiles)) for i in range(0, layout.tiles, step)]


def _rows_of(array: NDArray[np.generic], gated: bool, tiles: slice) -> NDArray[np.generic]:
    """The rows ``[tiles, 16, ...]`` of some tiles, padded with zeros."""
    n = array.shape[0]
    parts = 2 if gated else 1
    half = n // parts
    out = np.zeros((tiles.stop - tiles.start, TILE, array.shape[1]), array.dtype)
    first = tiles.start // parts * TILE
    for part in range(parts):
        rows = array[part * half + first : part * half + min(half, tiles.stop // parts * TILE)]
        view = out[part::parts]
        whole = rows.shape[0] // TILE
        view[:whole] = rows[: whole * TILE].reshape(whole, TILE, array.shape[1])
        if rows.shape[0] % TILE:
            view[whole, : rows.shape[0] % TILE] = rows[whole * TILE :]
    return out


def _untile(tiles: NDArray[np.generic], n: int, gated: bool) -> NDArray[np.generic]:
    """The inverse of ``_rows_of`` for all tiles ``[tiles, 16, ...]``: ``[n, ...]``."""
    parts = 2 if gated else 1
    rows = [tiles[p::parts].reshape(-1, tiles.shape[2])[: n // parts] for p in range(parts)]
    return np.ascontiguousarray(np.concatenate(rows))


def _tile_numbers(
    array: NDArray[np.generic],
    layout: _Layout,
    gated: bool,
    tiles: slice,
    dtype: np.dtype[np.generic],
) -> Bytes:
    rows = _rows_of(array, gated, tiles).astype(dtype)
    return np.ascontiguousarray(rows.transpose(0, 2, 1)).reshape(rows.shape[0], -1).view(np.uint8)


def _swap(words: NDArray[np.uint32], distance: int, mask: int) -> None:
    """Exchanges, in place, the bits of ``mask`` with those ``distance`` places above them."""
    changed = words >> distance
    changed ^= words
    changed &= mask
    words ^= changed
    changed <<= distance
    words ^= changed


def _pack_codes(rows: NDArray[np.generic], bits: int, out: Bytes) -> None:
    """Codes ``[tiles, 16, K * bits / 8]`` of consecutive elements (lost) into their tiles."""
    words = rows.view(np.uint32)
    if bits == 4:  # nibbles 0 1 2 3 4 5 6 7 of a word become 0 4 1 5 2 6 3 7
        _swap(words, 8, 0x0000FF00)
        _swap(words, 4, 0x00F000F0)
    out.view(np.uint32).reshape(words.shape[0], -1, TILE)[:] = words.transpose(0, 2, 1)


def _unpack_codes(codes: Bytes, bits: int) -> Bytes:
    """The inverse of ``_pack_codes``."""
    tiles = np.ascontiguousarray(codes).view(np.uint32).reshape(codes.shape[0], -1, TILE)
    words = np.ascontiguousarray(tiles.transpose(0, 2, 1))
    if bits == 4:
        _swap(words, 4, 0x00F000F0)
        _swap(words, 8, 0x0000FF00)
    return words.view(np.uint8)
