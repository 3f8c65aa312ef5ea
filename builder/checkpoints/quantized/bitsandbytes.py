"""bitsandbytes: 4-bit codes of a table (nf4, fp4) in blocks, and LLM.int8 rows.

Layout: bitsandbytes 0.50, functional.py (QuantState.as_dict) and nn/modules.py (Linear8bitLt).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slipstream.builder.checkpoints.quantized.stored import (
    Notes,
    QuantizedWeights,
    Stored,
    dense_linears,
)
from slipstream.builder.models.config import ModelConfig
from slipstream.errors import CheckpointError
from slipstream.weights.json import Fields, Origin, parse_fields, shortened
from slipstream.weights.safetensors import StoredTensor
from slipstream.weights.tensor import LazyTensor, QuantTensor, WeightFormat, pack_nibbles

_STATE = "quant_state.bitsandbytes__"
_TYPES = ("nf4", "fp4")
# The library writes blocks of at most 4096.
_LARGEST_BLOCK = 1 << 20
# Smaller groups than this gain nothing over a dense weight.
_SMALLEST_GROUP = 32
# LLM.int8 scales a row by its largest magnitude / 127.
_INT8_TOP = np.float32(127)


@dataclass(frozen=True, slots=True)
class _Blocks:
    """The tensors of a 4-bit weight ``[N, K]``: a scale for every ``size`` elements of the weight
    read row after row. ``nested`` are the tensors that the u8 scales are decoded with."""

    name: str
    shape: tuple[int, int]
    size: int
    codes: StoredTensor
    absmax: StoredTensor
    table: StoredTensor
    nested: tuple[StoredTensor, StoredTensor] | None
    nested_size: int
    nested_offset: float

    def scales(self) -> NDArray[np.float32]:
        """One a block: float32 ``[ceil(N * K / size)]``."""
        stored: NDArray[Any] = self.absmax.map().ravel()
        if self.nested is None:
            return stored.astype(np.float32)
        absmax, table = (tensor.map().astype(np.float32).ravel() for tensor in self.nested)
        outer = np.repeat(absmax, self.nested_size)[: stored.size]
        return np.asarray(table[stored] * outer + np.float32(self.nested_offset), np.float32)

    def flat_codes(self) -> NDArray[np.uint8]:
        """u8 ``[N * K]``; the first of a pair is in the high nibble."""
        stored: NDArray[np.uint8] = self.codes.map().ravel().view(np.uint8)
        return np.stack([stored >> 4, stored & 15], axis=-1).ravel()[: math.prod(self.shape)]

    def codebook(self) -> NDArray[np.float32]:
        """float32 ``[16]``."""
        return np.asarray(self.table.map(), np.float32).ravel()


def read(stored: Stored, quantization: Fields, config: ModelConfig) -> QuantizedWeights:
    """The weights of a bitsandbytes directory; ``quantization`` is its ``quantization_config``.

    Blocks of 4-bit codes that do not end with a row become smaller groups, or a dense weight where
    those would be smaller than 32. LLM.int8 weights are weight-only: x is not rounded, so columns
    of outliers need no path of their own. Raises CheckpointError for tensors that do not belong
    together.
    """
    notes = Notes()
    eights = stored.modules("SCB")
    tensors = {f"{name}.weight": _int8(stored, name) for name in eights}
    for kind in _TYPES:
        for name in stored.modules(f"{_STATE}{kind}"):
            tensors[name] = _four_bits(stored, name, kind, notes)
    if not tensors:
        raise CheckpointError(
            f"{stored.path} has quant_method 'bitsandbytes' and neither .SCB nor .quant_state "
            "tensors, so its weights were not saved quantized; remove quantization_config from "
            "config.json if they are dense"
        )
    if eights:
        notes.add(
            f"llm_int8_threshold {quantization.number('llm_int8_threshold', 6.0)} is not used: "
            "weights stay int8, activations are not rounded",
            eights[0],
        )
    dense = stored.take_dense()
    _note_exceptions(dense, quantization, notes)
    return QuantizedWeights({**tensors, **dense}, notes=notes.sentences())


def _int8(stored: Stored, name: str) -> LazyTensor:
    codes = stored.take(f"{name}.weight", "I8")
    if len(codes.shape) != 2:
        raise _contradiction(stored, codes.name, f"has shape {list(codes.shape)}, not [N, K]")
    n, k = codes.shape
    largest = stored.take(f"{name}.SCB", "F32", shape=(n,))
    order = stored.take_optional(f"{name}.weight_format", "U8", "I8", "I32", "I64")
    if order is not None and np.any(order.map()):
        raise CheckpointError(
            f"{stored.path}: {name} is stored in the tiles of one GPU generation (weight_format "
            f"{int(order.map().flat[0])}); save the model again with a bitsandbytes of 2024 or "
            "later, or pass the unquantized checkpoint"
        )
    form = WeightFormat((n, k), "int", "float32", 8, k)

    def load() -> QuantTensor:
        unsigned = codes.map().view(np.uint8) ^ np.uint8(128)
        scale = largest.map().astype(np.float32)[:, None] / _INT8_TOP
        return QuantTensor(codes.name, form, unsigned, scale)

    return LazyTensor(codes.name, form, load)


def _four_bits(stored: Stored, name: str, kind: str, notes: Notes) -> LazyTensor:
    blocks = _blocks(stored, name, kind)
    k = blocks.shape[1]
    group = math.gcd(k, blocks.size)
    if group < _SMALLEST_GROUP:
        notes.add(
            f"blocks of {blocks.size} do not end with rows of {k}; it becomes dense float32", name
        )
        return _dense(blocks)
    form = WeightFormat(blocks.shape, "codebook", "float32", 4, group)

    def load() -> QuantTensor:
        codes = pack_nibbles(blocks.flat_codes().reshape(blocks.shape))
        scales = np.repeat(blocks.scales(), blocks.size // group)
        scale = scales[: blocks.shape[0] * (k // group)].reshape(blocks.shape[0], -1)
        return QuantTensor(name, form, codes, scale, codebook=blocks.codebook())

    return LazyTensor(name, form, load)


def _dense(blocks: _Blocks) -> LazyTensor:
    form = WeightFormat(blocks.shape, "dense", "float32")

    def load() -> QuantTensor:
        scales = np.repeat(blocks.scales(), blocks.size)[: math.prod(blocks.shape)]
        values = blocks.codebook()[blocks.flat_codes()] * scales
        return QuantTensor(blocks.name, form, values.reshape(blocks.shape))

    return LazyTensor(blocks.name, form, load)


def _blocks(stored: Stored, name: str, kind: str) -> _Blocks:
    """The tensors of the weight ``name``, checked against its quant_state."""
    state = _state(stored, f"{name}.{_STATE}{kind}")
    shape = state.integers("shape", (), minimum=1)
    if len(shape) != 2 or not state.has("blocksize"):
        raise _contradiction(
            stored,
            name,
            f"has the quant_state {shortened(state.values)}, without a shape [N, K] or a blocksize",
        )
    n, k = shape
    size = state.integer("blocksize", minimum=1, maximum=_LARGEST_BLOCK)
    nested_size = state.integer("nested_blocksize", 1, minimum=1, maximum=_LARGEST_BLOCK)
    offset = state.number("nested_offset", 0)
    codes = stored.take(name, "U8", "I8", "F16", "BF16", "F32")
    if codes.size != (n * k + 1) // 2:
        raise _contradiction(
            stored, name, f"has {codes.size} bytes, but its quant_state says [{n}, {k}] at 4 bits"
        )
    count = -(-n * k // size)
    double = f"{name}.nested_absmax" in stored
    absmax = stored.take(f"{name}.absmax", "U8" if double else "F32", shape=(count,))
    table = stored.take(f"{name}.quant_map", "F32", shape=(16,))
    nested = None
    if double:
        outer = (-(-count // nested_size),)
        nested = (
            stored.take(f"{name}.nested_absmax", "F32", shape=outer),
            stored.take(f"{name}.nested_quant_map", "F32", shape=(256,)),
        )
    return _Blocks(name, (n, k), size, codes, absmax, table, nested, nested_size, offset)


def _state(stored: Stored, name: str) -> Fields:
    """The JSON object that a tensor of bytes spells."""
    origin = Origin(f"{stored.path}: tensor {name}", "download the checkpoint again")
    return parse_fields(stored.take(name, "U8").map().tobytes(), origin)


def _contradiction(stored: Stored, name: str, what: str) -> CheckpointError:
    return CheckpointError(f"{stored.path}: tensor {name} {what}; download the checkpoint again")


def _note_exceptions(dense: Mapping[str, LazyTensor], quantization: Fields, notes: Notes) -> None:
    skipped = quantization.texts("llm_int8_skip_modules", ())
    for module in dense_linears(dense):
        if not any(part in module for part in skipped):
            notes.add("not quantized, though llm_int8_skip_modules does not list it", module)
