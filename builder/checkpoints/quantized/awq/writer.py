"""AutoAWQ's gemm layout: words along N with their columns interleaved, scales ``[groups, N]``.

Source: https://github.com/casper-hansen/AutoAWQ, awq/modules/linear/gemm.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slipstream.builder.checkpoints.quantized.layout import (
    Encoded,
    Settings,
    cannot_store,
    even_group,
    even_groups,
    exact_cast,
    left_alone,
    unlike_siblings,
)
from slipstream.builder.checkpoints.quantized.packing import pack_words
from slipstream.weights.tensor import InputTransform, QuantTensor, WeightFormat

_NAME = "awq"
_BITS = 4
_PER_WORD = 8
# The column, of eight neighbours, that each nibble of a word holds.
_COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)


def create(formats: Iterable[WeightFormat], _: frozenset[str]) -> AWQ:
    """The layout, with the group that all weights of these formats can be stored in."""
    groups = [even_group(form) or 0 for form in formats if form.shape[1] > form.group]
    return AWQ(min(groups, default=None))


@dataclass(frozen=True, slots=True)
class AWQ:
    """4-bit integer groups, all of one size: ``group``, None being whole rows."""

    group: int | None
    name: str = _NAME
    holds_kv_scales: bool = False

    def refusal(self, form: WeightFormat, transform: InputTransform | None) -> str | None:
        """Why a weight cannot be stored."""
        if form.kind != "int" or form.bits != _BITS or form.activation != "none":
            return f"it is {form.bits}-bit {form.kind}, and AWQ holds 4-bit integers"
        if form.zero == "offset" or form.rows > 1:
            return "its groups have float offsets" if form.rows == 1 else "its blocks span rows"
        if transform is not None:
            return "the inputs of its codes are sorted or scaled, which AWQ has no place for"
        n, k = form.shape
        if n % _PER_WORD or even_group(form) is None:
            return f"AWQ needs rows in eights and whole groups, and its shape is {n} x {k}"
        if (self.group or k) > form.group or form.group % (self.group or k):
            return f"its groups are of {form.group}, and AWQ has one size for all: {self.group}"
        return None

    def encode(self, tensor: QuantTensor) -> Encoded:
        """A quantized weight as its tensors and its settings."""
        reason = self.refusal(tensor.format, tensor.input)
        if reason:
            raise cannot_store(_NAME, tensor.name, reason)
        tensor = even_groups(tensor, self.group)
        assert tensor.scale is not None
        scales = exact_cast(tensor.scale, np.float16, _NAME, tensor.name)
        midpoint = np.full(scales.shape, 2 ** (_BITS - 1), np.uint8)
        arrays = {
            "qweight": _interleaved(tensor.unpacked_codes()),
            "qzeros": _interleaved(midpoint if tensor.zero is None else tensor.zero),
            "scales": np.ascontiguousarray(scales.T),
        }
        return Encoded(arrays, {"zero_point": tensor.zero is not None})

    def config(
        self, modules: Mapping[str, Settings], dense: Sequence[str], kv_scales: bool
    ) -> dict[str, Any]:
        """The ``quantization_config``."""
        assert not kv_scales, "a layout without a place for KV scales was checked for them"
        return {
            "quant_method": _NAME,
            "version": "gemm",
            "bits": _BITS,
            "group_size": self.group or -1,
            "zero_point": any(settings["zero_point"] for settings in modules.values()),
            "modules_to_not_convert": left_alone(modules, dense),
        }

    def loaders(self, modules: Mapping[str, Settings]) -> Mapping[str, str]:
        """transformers, and vLLM."""
        return {"transformers": "it needs gptqmodel", "vLLM": unlike_siblings(modules)}


def _interleaved(codes: NDArray[np.uint8]) -> NDArray[np.int32]:
    """u8 ``[N, C]`` to int32 ``[C, N/8]``."""
    n, columns = codes.shape
    eights = codes.T.reshape(columns, n // _PER_WORD, _PER_WORD)[:, :, _COLUMNS]
    return pack_words(np.ascontiguousarray(eights).reshape(columns, n), _BITS)
