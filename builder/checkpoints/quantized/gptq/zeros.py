"""GPTQ's stored zero points, and which of its two conventions a file follows.

``gptq`` (v1) stores zero - 1, ``gptq_v2`` the zero. What config.json says of it is often wrong, so
a file whose zeros are all the midpoint of one convention is read by that one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from slipstream.builder.checkpoints.quantized.packing import unpack_codes
from slipstream.builder.checkpoints.quantized.stored import Notes
from slipstream.weights.json import Fields
from slipstream.weights.safetensors import StoredTensor

Version = Literal[1, 2]


@dataclass(frozen=True, slots=True)
class StoredZeros:
    """The packed zero points ``[G, N * bits / word]`` of one linear.

    ``low`` and ``high`` are the smallest and the largest code. ``carries``: GPTQModel makes v1 of
    v2 by subtracting from whole words, so that a zero of 0 borrows from its neighbour; adding to
    whole words undoes it.
    """

    tensor: StoredTensor
    n: int
    bits: int
    carries: bool
    low: int
    high: int

    def codes(self) -> NDArray[np.uint8]:
        """As they are stored: u8 ``[G, N]``."""
        return unpack_codes(self.tensor.map(), self.bits)[:, : self.n]

    @property
    def wraps(self) -> bool:
        """Whether there is the largest code, which a v1 zero of 0 is stored as."""
        return self.high == (1 << self.bits) - 1

    def all_are(self, code: int) -> bool:
        """Whether every stored code is this one."""
        return self.low == self.high == code

    def zeros(self, version: Version) -> NDArray[np.uint16]:
        """The zero points: uint16 ``[G, N]``."""
        if version == 2:
            return self.codes().astype(np.uint16)
        if not self.carries:
            return self.codes().astype(np.uint16) + np.uint16(1)
        if self.bits == 3:
            return (self.codes().astype(np.uint16) + np.uint16(1)) & np.uint16(7)
        words = self.tensor.map()
        unsigned: NDArray[Any] = words.view(f"u{words.itemsize}")
        ones = sum(1 << bit for bit in range(0, words.itemsize * 8, self.bits))
        added = unsigned + unsigned.dtype.type(ones)
        return unpack_codes(added, self.bits)[:, : self.n].astype(np.uint16)


def open_zeros(tensor: StoredTensor, n: int, bits: int, *, carries: bool) -> StoredZeros:
    """Reads the zero points, about a hundredth of the weight, for what must be known of them."""
    codes = unpack_codes(tensor.map(), bits)[:, :n]
    low, high = int(codes.min(initial=255)), int(codes.max(initial=0))
    return StoredZeros(tensor, n, bits, carries, low, high)


def written_by_gptqmodel(quantization: Fields) -> bool:
    """Whether ``meta.quantizer`` (a string or a list of ``name:version``) names GPTQModel."""
    meta = quantization.fields("meta", {})
    alone = isinstance(meta.values.get("quantizer"), str)
    names = (meta.text("quantizer"),) if alone else meta.texts("quantizer", ())
    return any(name.lower().startswith("gptqmodel") for name in names)


def version_of(zeros: Mapping[str, StoredZeros], quantization: Fields, notes: Notes) -> Version:
    """The convention of a file, by module name; v1 and v2 differ in what a symmetric zero is."""
    configured = _configured(quantization)
    uniform = [stored for stored in zeros.values() if stored.low == stored.high]
    telling = quantization.flag("sym", True) or len(uniform) == len(zeros)
    found = _by_midpoint(s.low - 2 ** (s.bits - 1) for s in uniform) if telling else None
    if found is None or found == configured:
        return configured
    notes.add(
        f"config.json says checkpoint_format {_NAMES[configured]}, its zero points are "
        f"{_NAMES[found]}'s",
        next(iter(zeros)),
    )
    return found


_NAMES: Mapping[Version, str] = {1: "gptq", 2: "gptq_v2"}


def _configured(quantization: Fields) -> Version:
    return 2 if format_name(quantization) in ("gptq_v2", "gptq_p") else 1


def format_name(quantization: Fields) -> str:
    """The layout that the configuration names, in lower case."""
    name = quantization.optional_text("checkpoint_format") or quantization.optional_text("format")
    return (name or "gptq").lower()


def _by_midpoint(distances: Iterable[int]) -> Version | None:
    """By how far the stored zeros are from the midpoint: all -1, or all 0."""
    versions: Mapping[frozenset[int], Version] = {frozenset({-1}): 1, frozenset({0}): 2}
    return versions.get(frozenset(distances))
