"""GPTQ's layout: words along K, ``qzeros`` along N, scales and zeros ``[groups, N]``.

Version 1 stores zero points minus 1, so it cannot hold a zero point of 0: where every weight is
symmetric it is used, and elsewhere version 2, which stores them as they are (``gptq_v2``).
Source: https://github.com/ModelCloud/GPTQModel.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from slipstream.builder.checkpoints.quantized.layout import (
    FUSED,
    HEAD,
    Encoded,
    Settings,
    cannot_store,
    exact_cast,
    unlike_siblings,
)
from slipstream.builder.checkpoints.quantized.packing import pack_words
from slipstream.weights.tensor import InputTransform, QuantTensor, WeightFormat

_NAME = "gptq"
_WORD = 32
# What `dynamic` can say of a module that differs from the rest.
_OVERRIDES = ("bits", "group_size", "sym", "desc_act")


def create(formats: Iterable[WeightFormat], _: frozenset[str]) -> GPTQ:
    """The layout, in the version that can hold weights of these formats."""
    return GPTQ(1 if all(form.zero == "midpoint" for form in formats) else 2)


@dataclass(frozen=True, slots=True)
class GPTQ:
    """Integer groups of 4 and 8 bits, with act-order."""

    version: Literal[1, 2] = 1
    name: str = _NAME
    holds_kv_scales: bool = False

    def refusal(self, form: WeightFormat, transform: InputTransform | None) -> str | None:
        """Why a weight cannot be stored."""
        if form.kind != "int":
            return f"it is {form.kind}, and GPTQ holds integers"
        if form.activation != "none":
            return "its inputs are rounded, and GPTQ quantizes weights alone"
        if form.zero == "offset" or form.rows > 1:
            return "its groups have float offsets" if form.rows == 1 else "its blocks span rows"
        if transform is not None and transform.scale is not None:
            return "the inputs of its codes are scaled, which GPTQ has no place for"
        n, k = form.shape
        per_word = _WORD // form.bits
        if n % per_word or k % per_word:
            return f"its shape {n} x {k} does not fill words of {per_word} codes"
        return None

    def encode(self, tensor: QuantTensor) -> Encoded:
        """A quantized weight as its tensors and its settings."""
        form, zero = tensor.format, tensor.zero
        reason = self.refusal(form, tensor.input)
        if reason:
            raise cannot_store(_NAME, tensor.name, reason)
        assert tensor.scale is not None
        order = None if tensor.input is None else tensor.input.perm
        codes = tensor.unpacked_codes()
        group_of = np.arange(form.shape[1], dtype=np.int32) // form.group
        if order is not None:
            codes, group_of = _in_order(codes, order), _in_order(group_of[None], order)[0]
        scales = exact_cast(tensor.scale, np.float16, _NAME, tensor.name)
        if zero is None:
            zero = np.full(scales.shape, 2 ** (form.bits - 1), np.uint8)
        elif self.version == 1 and not zero.all():
            raise cannot_store(_NAME, tensor.name, "version 1 has no zero points of 0")
        stored = zero - np.uint8(1) if self.version == 1 else zero
        arrays = {
            "qweight": np.ascontiguousarray(pack_words(codes, form.bits).T),
            "qzeros": pack_words(np.ascontiguousarray(stored.T), form.bits),
            "scales": np.ascontiguousarray(scales.T),
            "g_idx": group_of,
        }
        return Encoded(arrays, _settings(form, order))

    def config(
        self, modules: Mapping[str, Settings], dense: Sequence[str], kv_scales: bool
    ) -> dict[str, Any]:
        """The ``quantization_config``; modules unlike the most are listed in ``dynamic``."""
        assert not kv_scales, "a layout without a place for KV scales was checked for them"
        usual = Counter(map(_frozen, modules.values()))
        common = dict(usual.most_common(1)[0][0])
        dynamic: dict[str, Settings] = {f"-:{_pattern(module)}": {} for module in dense}
        for module, settings in modules.items():
            if settings != common:
                dynamic[f"+:{_pattern(module)}"] = {key: settings[key] for key in _OVERRIDES}
        return {
            "quant_method": _NAME,
            "checkpoint_format": _NAME if self.version == 1 else f"{_NAME}_v2",
            **common,
            "lm_head": HEAD in modules,
            "pack_dtype": "int32",
            **({"dynamic": dynamic} if dynamic else {}),
        }

    def loaders(self, modules: Mapping[str, Settings]) -> Mapping[str, str]:
        """transformers, and vLLM, which looks for rules of ``dynamic`` by the names of its own."""
        ((common, _),) = Counter(map(_frozen, modules.values())).most_common(1)
        fused = {name for names in FUSED for name in names}
        unusual = (m for m, settings in modules.items() if _frozen(settings) != common)
        ruled = next((m for m in unusual if m.rpartition(".")[2] in fused), None)
        lost = f"it does not find the rule for {ruled}" if ruled else unlike_siblings(modules)
        return {"transformers": "it needs optimum and gptqmodel", "vLLM": lost}


def _settings(form: WeightFormat, order: NDArray[np.int32] | None) -> Settings:
    return {
        "bits": form.bits,
        "group_size": -1 if form.group >= form.shape[1] else form.group,
        "sym": form.zero == "midpoint",
        "desc_act": order is not None,
    }


def _frozen(settings: Settings) -> tuple[tuple[str, Any], ...]:
    return tuple(settings.items())


def _in_order(columns: NDArray[Any], order: NDArray[np.int32]) -> NDArray[Any]:
    """Sorted columns where they belong: column j goes to ``order[j]``."""
    placed = np.empty_like(columns)
    placed[:, order] = columns
    return placed


def _pattern(module: str) -> str:
    return f"^{re.escape(module)}$"
