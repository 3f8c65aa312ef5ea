"""AutoAWQ: 4-bit codes with zero points, in three layouts that the tensors' shapes tell apart.

Layouts: AutoAWQ 0.2.9, awq/modules/linear/{gemm,gemv,gemv_fast}.py; llm-awq, whose zeros are called
``scaled_zeros``, has the last of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slipstream.builder.checkpoints.quantized.packing import unpack_codes
from slipstream.builder.checkpoints.quantized.refused import refusal
from slipstream.builder.checkpoints.quantized.stored import (
    Notes,
    QuantizedWeights,
    Stored,
    dense_linears,
    drop_empty_biases,
    group_size,
)
from slipstream.builder.models.config import ModelConfig
from slipstream.errors import CheckpointError
from slipstream.weights.json import Fields
from slipstream.weights.parallel import in_parallel, row_chunks
from slipstream.weights.safetensors import StoredTensor
from slipstream.weights.tensor import LazyTensor, QuantTensor, WeightFormat, ZeroKind, pack_nibbles

Codes = NDArray[np.uint8]
_CHUNK = 1 << 18  # words decoded at once: they stay in the cache of a core
Decoded = tuple[Codes, NDArray[np.generic], NDArray[np.generic] | None]

# Which of eight neighbouring columns each nibble of a gemm word is of.
_GEMM_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_SCALES = ("F16", "BF16", "F32")


@dataclass(frozen=True, slots=True)
class _Module:
    """The tensors of one linear; ``zeros`` None is a midpoint of 8."""

    name: str
    codes: StoredTensor
    scales: StoredTensor
    zeros: StoredTensor | None
    n: int
    k: int
    group: int

    @property
    def groups(self) -> int:
        return self.k // self.group


def read(stored: Stored, quantization: Fields, config: ModelConfig) -> QuantizedWeights:
    """The weights of an AutoAWQ directory; ``quantization`` is its ``quantization_config``.

    gemm and gemv weights get integer zero points, gemv_fast ones the float offsets that they store.
    Raises CheckpointError for other layouts and for tensors that do not belong together.
    """
    version = quantization.text("version", "gemm").lower()
    if version == "marlin":
        raise refusal(stored.path, "awq_marlin", known=())
    modules = stored.modules("qweight")
    _check_modules(stored, modules)
    notes = Notes()
    tensors = {f"{m}.weight": _linear(stored, m, quantization, notes) for m in modules}
    drop_empty_biases(stored, modules, config)
    dense = stored.take_dense()
    _note_exceptions(dense, modules, quantization, notes)
    return QuantizedWeights({**tensors, **dense}, notes=notes.sentences())


def _check_modules(stored: Stored, modules: tuple[str, ...]) -> None:
    if not modules:
        raise CheckpointError(
            f"{stored.path} has quant_method 'awq' and no tensor that ends in .qweight; "
            "config.json and weights are of different formats: download both again"
        )
    scaled = [m for m in stored.modules("scales") if m.endswith(".act") and m not in modules]
    if scaled:
        raise CheckpointError(
            f"{stored.path} divides activations by {scaled[0]}.scales, AutoAWQ's ScaledActivation, "
            "which no supported architecture has; pass the unquantized checkpoint"
        )


def _linear(stored: Stored, name: str, quantization: Fields, notes: Notes) -> LazyTensor:
    key = "group_size" if quantization.has("group_size") else "q_group_size"
    group = group_size(quantization, key, 128)
    layout, module = _module(stored, name, group)
    version = quantization.text("version", layout).lower()
    if version not in _SPELLINGS[layout] and quantization.optional_text("backend") != "llm-awq":
        notes.add(f"config.json says version {version}, its tensors are {layout}", name)
    if group != module.group and not (group == -1 and module.groups == 1):
        notes.add(f"config.json says group_size {group}, its tensors {module.group}", name)
    zero = _zero_kind(layout, module, quantization, notes)
    form = WeightFormat(
        (module.n, module.k), "int", module.scales.numpy_dtype().name, 4, module.group, zero
    )
    weight = f"{name}.weight"

    def load() -> QuantTensor:
        codes, scale, zeros = _DECODERS[layout](module)
        if zero == "offset":
            return QuantTensor(weight, form, codes, scale, offset=zeros)
        kept = zeros.astype(np.uint8) if zero == "zero" and zeros is not None else None
        return QuantTensor(weight, form, codes, scale, kept)

    return LazyTensor(weight, form, load)


def _zero_kind(layout: str, module: _Module, quantization: Fields, notes: Notes) -> ZeroKind:
    """``midpoint`` where ``zero_point`` is false and the stored zeros, if any, are 8."""
    if layout == "gemv_fast":
        return "offset"
    if module.zeros is None:
        return "midpoint"
    if quantization.flag("zero_point", True):
        return "zero"
    zeros = _DECODERS[layout](module)[2] if layout == "gemv" else _gemm_zeros(module)
    if zeros is not None and np.all(zeros == 8):
        return "midpoint"
    notes.add("config.json says zero_point false, its tensors have zero points", module.name)
    return "zero"


def _module(stored: Stored, name: str, group: int) -> tuple[str, _Module]:
    """The layout of a linear and its tensors, checked against each other."""
    codes = stored.take(f"{name}.qweight", "I32", "I16")
    scales = stored.take(f"{name}.scales", *_SCALES)
    if len(codes.shape) != 2 or len(scales.shape) != 2:
        raise _unknown(stored, name, codes, scales)
    if codes.dtype == "I16":
        return "gemv_fast", _gemv_fast_module(stored, name, codes, scales, group)
    if codes.shape[1] * 8 == scales.shape[1]:
        return "gemm", _gemm_module(stored, name, codes, scales)
    if codes.shape[0] == scales.shape[0]:
        return "gemv", _gemv_module(stored, name, codes, scales, group)
    raise _unknown(stored, name, codes, scales)


def _unknown(
    stored: Stored, name: str, codes: StoredTensor, scales: StoredTensor
) -> CheckpointError:
    found = f"qweight {list(codes.shape)} beside scales {list(scales.shape)}"
    if len(codes.shape) == 2 and codes.shape[1] == scales.shape[-1]:
        return CheckpointError(
            f"{stored.path}: {name} has {found}, which is GPTQ's layout, but config.json says "
            "quant_method 'awq'; use the config.json that belongs to these weights"
        )
    if len(codes.shape) == 2 and codes.shape[1] == 2 * scales.shape[-1]:
        return refusal(stored.path, "awq_marlin", known=())
    return CheckpointError(
        f"{stored.path}: {name} has {found}, which is none of AutoAWQ's layouts of 4-bit codes "
        "(gemm, gemv, gemv_fast); download weights and config.json again, or pass the unquantized "
        "checkpoint"
    )


def _gemm_module(stored: Stored, name: str, codes: StoredTensor, scales: StoredTensor) -> _Module:
    (k, words), (groups, n) = codes.shape, scales.shape
    if groups == 0 or k % groups or k % 2:
        raise _unknown(stored, name, codes, scales)
    zeros = stored.take_optional(f"{name}.qzeros", "I32", shape=(groups, words))
    return _Module(name, codes, scales, zeros, n, k, k // groups)


def _gemv_module(
    stored: Stored, name: str, codes: StoredTensor, scales: StoredTensor, group: int
) -> _Module:
    n, k = codes.shape[0], codes.shape[1] * 8
    group = _padded_group(stored, name, k, group, scales.shape[1])
    zeros = stored.take_optional(f"{name}.qzeros", "I32", shape=(n, scales.shape[1] // 8))
    return _Module(name, codes, scales, zeros, n, k, group)


def _gemv_fast_module(
    stored: Stored, name: str, codes: StoredTensor, scales: StoredTensor, group: int
) -> _Module:
    n, k = codes.shape[0] * 4, codes.shape[1]
    if scales.shape[1] != n or k % 64:
        raise _unknown(stored, name, codes, scales)
    group = _padded_group(stored, name, k, group, scales.shape[0])
    spelled = "scaled_zeros" if f"{name}.scaled_zeros" in stored else "qzeros"
    zeros = stored.take(f"{name}.{spelled}", *_SCALES, shape=scales.shape)
    return _Module(name, codes, scales, zeros, n, k, group)


def _padded_group(stored: Stored, name: str, k: int, group: int, width: int) -> int:
    """The group size, by config.json if the padded number of groups agrees, else the one that
    does."""
    candidates = [k if g == -1 else g for g in (group, 128, 64, 32, -1)]
    fitting = [g for g in candidates if k % g == 0 and _padded_groups(k // g, g) == width]
    if not fitting:
        raise CheckpointError(
            f"{stored.path}: {name}.scales has room for {width} groups, which no group size gives "
            f"for {k} input features; config.json says {group}: download both again"
        )
    return fitting[0]


def _padded_groups(groups: int, group: int) -> int:
    """Groups in whole words of 8, and for small groups in whole pairs or fours of words."""
    multiple = 8 * {64: 2, 32: 4}.get(group, 1)
    return -(-groups // multiple) * multiple


def _gemm(module: _Module) -> Decoded:
    words: NDArray[Any] = module.codes.map()
    codes = np.empty((module.n, len(words) // 2), np.uint8)

    def decode(part: slice) -> None:
        block = codes[part.start * 8 : part.stop * 8]
        # Their lowest bytes are copied first, because a column of words is far from the next.
        stored = np.ascontiguousarray(words[:, part].T)
        for place, column in enumerate(_GEMM_ORDER):
            nibbles = ((stored >> (4 * place)) & 15).astype(np.uint8)
            block[column::8] = nibbles[:, 0::2] | (nibbles[:, 1::2] << 4)

    in_parallel(decode, row_chunks(words.shape[1], len(words), _CHUNK))
    return codes, _transposed(module.scales), _gemm_zeros(module)


def _gemm_zeros(module: _Module) -> Codes | None:
    if module.zeros is None:
        return None
    stored = unpack_codes(module.zeros.map(), 4)
    zeros = np.empty((module.n, module.groups), np.uint8)
    for place, column in enumerate(_GEMM_ORDER):
        zeros[column::8] = stored[:, place::8].T
    return zeros


def _transposed(tensor: StoredTensor) -> NDArray[np.generic]:
    return np.ascontiguousarray(tensor.map().T)


def _gemv(module: _Module) -> Decoded:
    # Plain order, eight to a little-endian word, is our own packing.
    codes: Codes = module.codes.map().view(np.uint8)
    scales = np.ascontiguousarray(module.scales.map()[:, : module.groups])
    if module.zeros is None:
        return codes, scales, None
    return codes, scales, unpack_codes(module.zeros.map(), 4)[:, : module.groups]


def _gemv_fast(module: _Module) -> Decoded:
    n, k = module.n, module.k
    # Words hold 4 codes; 64 words after another are 64 columns of each of 4 rows.
    codes = unpack_codes(module.codes.map(), 4).reshape(n // 4, k // 64, 4, 64)
    rows = codes.swapaxes(1, 2).reshape(n, k // 32, 4, 2, 4)
    # Of 32 columns, pairs are first dealt to four eighths, then the even of each eighth put first.
    pairs = rows.swapaxes(3, 4).reshape(n, k // 32, 4, 4, 2)
    ordered = pairs.swapaxes(2, 3).reshape(n, k)
    assert module.zeros is not None
    scale, offset = _transposed(module.scales), _transposed(module.zeros)
    return pack_nibbles(ordered), scale[:, : module.groups], offset[:, : module.groups]


_DECODERS: Mapping[str, Callable[[_Module], Decoded]] = MappingProxyType(
    {"gemm": _gemm, "gemv": _gemv, "gemv_fast": _gemv_fast}
)
# What config.json may call each layout.
_SPELLINGS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "gemm": ("gemm", "exllama", "exllamav2", "exllama_v2", "ipex"),
        "gemv": ("gemv", "llm-awq"),
        "gemv_fast": ("gemv_fast", "llm-awq"),
    }
)


def _note_exceptions(
    dense: Mapping[str, LazyTensor],
    modules: tuple[str, ...],
    quantization: Fields,
    notes: Notes,
) -> None:
    """Notes linears that are quantized, or are not, unlike ``modules_to_not_convert`` says."""
    left_out = quantization.texts("modules_to_not_convert", ())
    for module in dense_linears(dense):
        if not any(part in module for part in left_out):
            notes.add("not quantized, though modules_to_not_convert does not list it", module)
    for module in modules:
        if any(part in module for part in left_out):
            notes.add("quantized, though modules_to_not_convert lists it", module)
