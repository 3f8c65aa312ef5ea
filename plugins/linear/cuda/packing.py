"""The blob of a weight in the order in which the CUDA kernels read it.

Sections of one weight, each starting at a multiple of 256 bytes:

* codes. Dense and float8 weights: ``[N, K]`` as they are. Integers and float4: int32 words
  ``[N, W]``, a word holding ``32 / bits`` codes, the lowest bits first. Words come in chunks of 32,
  which cover ``32 * 32 / bits`` elements of K: code i of word j of a chunk is element
  ``32 * i + j`` of the chunk, so that code i of neighbouring words meets neighbouring elements of x
  and 32 of them share a scale. K is padded to whole chunks with zeros.
* scales ``[N/rows, K/group]`` (rounded up), as ``scale_dtype`` says. Those of float4 are exponents,
  u8, the eight of a chunk together: K is padded for them, too.
* integer groups: u8 zero points ``[N, K/group]``, or offsets of the scales' type, or nothing.
* float32 ``input_scale [1]`` with static activations.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from slipstream.errors import CheckpointError
from slipstream.plugins.linear import ACTIVATIONS, WEIGHT_TYPES, ZERO_KINDS
from slipstream.weights.parallel import in_parallel, row_chunks
from slipstream.weights.tensor import Activation, QuantTensor, WeightFormat, numpy_dtype

ALIGNMENT = 256
# Codes packed at once: few enough for the cache of a core, and enough that threads do not mostly
# wait for the interpreter, which each operation asks for.
_CHUNK = 1 << 21
WORDS = 32  # of a chunk
DENSE_DTYPES = ("bfloat16", "float16")
GROUPS = (32, 64, 128)
FLOAT4, EXPONENTS = "float4_e2m1", "float8_e8m0fnu"
_GREATEST_EXPONENT = 191  # kernels make a scale that is 2**63 times as large

Bytes = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Section:
    """A part of a blob: its dtype (a NumPy / ml_dtypes name), shape and first byte."""

    dtype: str
    shape: tuple[int, ...]
    start: int

    @property
    def nbytes(self) -> int:
        """Bytes of the section, without padding."""
        return int(np.prod(self.shape, dtype=np.int64)) * numpy_dtype(self.dtype).itemsize


def can_pack(fmt: WeightFormat) -> bool:
    """Whether the CUDA kernels hold a matrix of this format as it is."""
    if len(fmt.shape) != 2:
        return False
    k = fmt.shape[1]
    if fmt.kind == "dense":
        return fmt.dtype in DENSE_DTYPES
    if fmt.kind == "float8_e4m3":
        channel = fmt.rows == 1 and fmt.group == k and fmt.activation != "group"
        block = fmt.rows == 128 and fmt.group == 128 and fmt.activation in ("none", "group")
        return channel or block
    if fmt.kind == FLOAT4:
        return fmt.rows == 1 and fmt.group == 32 and k % 32 == 0 and fmt.dtype == EXPONENTS
    if fmt.kind != "int" or fmt.rows != 1:
        return False
    whole_rows = fmt.group == k and fmt.bits == 8 and fmt.zero == "midpoint"
    return fmt.bits in (4, 8) and (whole_rows or (fmt.group in GROUPS and k % fmt.group == 0))


def in_words(fmt: WeightFormat) -> bool:
    """Whether the codes of a weight are in words of several."""
    return fmt.kind in ("int", FLOAT4)


def scale_dtype(fmt: WeightFormat) -> str:
    """The type of packed scales and offsets: float16 stays, exponents are bytes, all others become
    float32."""
    if fmt.kind == FLOAT4:
        return "uint8"
    return "float16" if fmt.dtype == "float16" else "float32"


def sections(fmt: WeightFormat) -> dict[str, Section]:
    """The sections of a blob by name: codes, scale, zero or offset, input_scale."""
    n, k = fmt.shape
    parts: dict[str, tuple[str, tuple[int, ...]]] = {}
    groups = -(-k // fmt.group) if fmt.group else 0
    if fmt.kind == "dense":
        parts["codes"] = (fmt.dtype, (n, k))
    elif fmt.kind == "float8_e4m3":
        parts["codes"] = ("float8_e4m3fn", (n, k))
        parts["scale"] = ("float32", (-(-n // fmt.rows), groups))
    else:
        groups = padded_k(fmt) // fmt.group if fmt.kind == FLOAT4 else groups
        parts["codes"] = ("int32", (n, padded_k(fmt) * fmt.bits // 32))
        parts["scale"] = (scale_dtype(fmt), (n, groups))
        if fmt.zero == "zero":
            parts["zero"] = ("uint8", (n, groups))
        elif fmt.zero == "offset":
            parts["offset"] = (scale_dtype(fmt), (n, groups))
    if fmt.activation == "static":
        parts["input_scale"] = ("float32", (1,))
    laid, start = {}, 0
    for name, (dtype, shape) in parts.items():
        laid[name] = Section(dtype, shape, start)
        start += -(-laid[name].nbytes // ALIGNMENT) * ALIGNMENT
    return laid


def padded_k(fmt: WeightFormat) -> int:
    """K of a weight in words, rounded up to whole chunks of 32 words."""
    chunk = WORDS * 32 // fmt.bits
    return -(-fmt.shape[1] // chunk) * chunk


def packed_size(fmt: WeightFormat) -> int:
    """Bytes of the blob of a weight of this format."""
    last = list(sections(fmt).values())[-1]
    return last.start + -(-last.nbytes // ALIGNMENT) * ALIGNMENT


def pack(tensor: QuantTensor) -> Bytes:
    """The blob u8 ``[packed_size]`` of a weight; lossless, see ``unpack``."""
    fmt = tensor.format
    assert can_pack(fmt), fmt
    arrays: dict[str, NDArray[np.generic] | None] = {
        "codes": pack_codes(tensor.codes, fmt) if in_words(fmt) else tensor.codes,
        "scale": _exponents(tensor) if fmt.kind == FLOAT4 else tensor.scale,
        "zero": tensor.zero,
        "offset": tensor.offset,
        "input_scale": tensor.input_scale,
    }
    blob = np.zeros(packed_size(fmt), np.uint8)
    for name, section in sections(fmt).items():
        array = arrays[name]
        assert array is not None, f"{tensor.name} has no {name}"
        values = np.ascontiguousarray(array, dtype=numpy_dtype(section.dtype))
        assert values.shape == section.shape, (name, values.shape, section.shape)
        blob[section.start : section.start + section.nbytes] = values.reshape(-1).view(np.uint8)
    return blob


def unpack(blob: Bytes, fmt: WeightFormat, name: str = "") -> QuantTensor:
    """The weight in a blob; scales and offsets come back in the blob's float16 or float32."""
    parts: dict[str, Any] = {
        key: blob[s.start : s.start + s.nbytes].view(numpy_dtype(s.dtype)).reshape(s.shape)
        for key, s in sections(fmt).items()
    }
    codes = parts.pop("codes")
    if in_words(fmt):
        codes = unpack_codes(codes, fmt)
    if fmt.kind == FLOAT4:
        groups = fmt.shape[1] // fmt.group
        parts["scale"] = np.ascontiguousarray(parts["scale"][:, :groups]).view(
            numpy_dtype(EXPONENTS)
        )
    return QuantTensor(name, fmt, codes, **parts)


def _exponents(tensor: QuantTensor) -> NDArray[np.uint8]:
    """The scales of float4 groups as bytes, those of whole chunks."""
    assert tensor.scale is not None
    n, groups = tensor.scale.shape
    exponents = np.zeros((n, padded_k(tensor.format) // tensor.format.group), np.uint8)
    exponents[:, :groups] = tensor.scale.view(np.uint8)
    if exponents.max(initial=0) > _GREATEST_EXPONENT or tensor.scale2 is not None:
        raise CheckpointError(
            f"tensor {tensor.name} has scales of MXFP4 that are beyond 2**64 or are multiplied by "
            "another one; build with --target cpu, or download the checkpoint again"
        )
    return exponents


def pack_codes(codes: NDArray[np.generic], fmt: WeightFormat) -> NDArray[np.int32]:
    """Codes as in ``QuantTensor`` to words ``[N, padded K * bits / 32]``."""
    n, width = fmt.shape[0], padded_k(fmt)
    words = np.empty((n, width * fmt.bits // 32), np.uint32)
    bytes_in = codes.astype(np.uint8, copy=False)

    def pack_rows(rows: slice) -> None:
        words[rows] = _words(bytes_in[rows], fmt)

    in_parallel(pack_rows, row_chunks(n, width, _CHUNK))
    return words.view(np.int32)


def _words(codes: Bytes, fmt: WeightFormat) -> NDArray[np.uint32]:
    n, k = len(codes), fmt.shape[1]
    per_word = 32 // fmt.bits
    single = np.zeros((n, padded_k(fmt)), np.uint8)
    if fmt.bits == 8:
        single[:, :k] = codes
    else:
        single[:, 0:k:2] = codes & 15
        single[:, 1:k:2] = codes[:, : k // 2] >> 4
    chunks = single.reshape(n, -1, per_word, WORDS)
    words = np.zeros((n, chunks.shape[1], WORDS), np.uint32)
    for i in range(per_word):
        part = chunks[:, :, i].astype(np.uint32)
        part <<= np.uint32(i * fmt.bits)
        words |= part
    return words.reshape(n, -1)


def unpack_codes(words: NDArray[np.generic], fmt: WeightFormat) -> NDArray[np.uint8]:
    """The inverse of ``pack_codes``."""
    n, k = fmt.shape
    per_word, mask = 32 // fmt.bits, np.uint32(2**fmt.bits - 1)
    chunks = np.ascontiguousarray(words).view(np.uint32).reshape(n, -1, 1, WORDS)
    shifts = (np.arange(per_word, dtype=np.uint32) * fmt.bits)[:, None]
    single = ((chunks >> shifts) & mask).astype(np.uint8).reshape(n, -1)[:, :k]
    if fmt.bits == 8:
        return np.ascontiguousarray(single)
    return np.asarray(single[:, 0::2] | (single[:, 1::2] << 4), np.uint8)


def format_attributes(fmt: WeightFormat) -> dict[str, int]:
    """The attributes by which a node says what its blob holds."""
    kind = fmt.dtype if fmt.kind == "dense" else fmt.kind
    attributes = {
        "weight_type": WEIGHT_TYPES[kind],
        "bits": fmt.bits,
        "group_size": fmt.group,
        "group_rows": fmt.rows,
        "activation": ACTIVATIONS[fmt.activation],
    }
    if fmt.kind == "int":
        attributes["zero_kind"] = ZERO_KINDS[fmt.zero]
        attributes["scale_bytes"] = 2 if scale_dtype(fmt) == "float16" else 4
    return attributes


def format_of(attributes: Mapping[str, int]) -> WeightFormat:
    """The format that ``format_attributes`` and the sizes of a node describe."""
    shape = (attributes["out_features"], attributes["in_features"])
    kind = _name(WEIGHT_TYPES, attributes["weight_type"])
    if kind in DENSE_DTYPES:
        return WeightFormat(shape, "dense", kind)
    activation = _name(ACTIVATIONS, attributes["activation"])
    assert activation in get_args(Activation)
    narrow = kind == "int" and attributes["scale_bytes"] == 2
    return WeightFormat(
        shape,
        kind,  # type: ignore[arg-type]
        EXPONENTS if kind == FLOAT4 else "float16" if narrow else "float32",
        attributes["bits"],
        attributes["group_size"],
        _name(ZERO_KINDS, attributes["zero_kind"]),  # type: ignore[arg-type]
        attributes["group_rows"],
        activation,  # type: ignore[arg-type]
    )


def _name(table: Mapping[str, int], value: int) -> str:
    return {number: name for name, number in table.items()}[value]
