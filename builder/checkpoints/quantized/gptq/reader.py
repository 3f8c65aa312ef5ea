"""GPTQ as AutoGPTQ and GPTQModel write it: codes of 2, 3, 4 and 8 bits packed along K.

Layout: AutoGPTQ 0.7, auto_gptq/nn_modules/qlinear/qlinear_cuda_old.py; overrides of single modules
(``dynamic``): GPTQModel 7.7, gptqmodel/quantization/config.py.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from slipstream.builder.checkpoints.quantized.gptq.module import (
    GPTQModule,
    open_module,
    override_of,
)
from slipstream.builder.checkpoints.quantized.gptq.zeros import (
    Version,
    format_name,
    version_of,
)
from slipstream.builder.checkpoints.quantized.packing import unpack_codes
from slipstream.builder.checkpoints.quantized.refused import refusal
from slipstream.builder.checkpoints.quantized.stored import (
    Notes,
    QuantizedWeights,
    Stored,
    dense_linears,
    drop_empty_biases,
)
from slipstream.builder.models.config import ModelConfig
from slipstream.errors import CheckpointError
from slipstream.weights.json import Fields, shortened
from slipstream.weights.tensor import (
    InputTransform,
    LazyTensor,
    QuantTensor,
    WeightFormat,
    ZeroKind,
    pack_nibbles,
)


def read(stored: Stored, quantization: Fields, config: ModelConfig) -> QuantizedWeights:
    """The weights of a GPTQ directory; ``quantization`` is its ``quantization_config``.

    Columns are sorted by their group where act-order mixed them, and the order is the weight's
    input transform. Codes of 2 and 3 bits are held in 4. Raises CheckpointError for the layouts of
    single kernels (Marlin, BitBLAS) and for tensors that do not belong together.
    """
    _check_format(stored, quantization)
    names = stored.modules("qweight")
    if not names:
        raise CheckpointError(
            f"{stored.path} has quant_method 'gptq' and no tensor that ends in .qweight; "
            "config.json and weights are of different formats: download both again"
        )
    notes = Notes()
    modules = [open_module(stored, name, quantization, config, notes) for name in names]
    version = version_of({m.name: m.zeros for m in modules}, quantization, notes)
    tensors = {f"{m.name}.weight": _linear(m, version, notes) for m in modules}
    drop_empty_biases(stored, names, config)
    dense = stored.take_dense()
    for module in dense_linears(dense):
        if override_of(quantization, module) is not None and not _unlisted(quantization, module):
            notes.add("not quantized, though config.json does not leave it out", module)
    return QuantizedWeights({**tensors, **dense}, notes=notes.sentences())


def _check_format(stored: Stored, quantization: Fields) -> None:
    marlin = quantization.flag("is_marlin_format", False)
    name = "marlin" if marlin else format_name(quantization)
    if name not in ("gptq", "gptq_v2", "gptq_p"):
        raise refusal(stored.path, name, known=("gptq", "gptq_v2"))
    bits = quantization.integer("bits", 4, minimum=1)
    if name == "gptq_p" and bits not in (2, 4, 8):
        raise CheckpointError(
            f"{stored.path} has checkpoint_format gptq_p, which splits codes of "
            f"{bits} bits into planes; only 2, 4 and 8 bits can be read of it: "
            "pass files of checkpoint_format gptq, or the unquantized checkpoint"
        )
    rotation = quantization.values.get("rotation")
    if rotation:
        raise CheckpointError(
            f"{stored.path} was quantized with rotation {shortened(rotation)}, whose "
            "activations must be rotated at run time; pass files that were quantized without it"
        )


def _unlisted(quantization: Fields, module: str) -> bool:
    """Whether a list of the modules to be quantized exists and leaves this one out."""
    key = "modules_in_block_to_quantize"
    chosen = quantization.sequence(key, ())
    flat = [part for entry in chosen for part in (entry if isinstance(entry, list) else [entry])]
    parts = [part for part in flat if isinstance(part, str)]
    if len(parts) < len(flat):
        raise quantization.refusal(key, "names of modules, or lists of them")
    return bool(parts) and not any(module.endswith(part) for part in parts)


def _linear(module: GPTQModule, version: Version, notes: Notes) -> LazyTensor:
    order = _order(module)
    regular = module.group > 0 and (
        module.group_of is None
        or np.array_equal(
            module.group_of if order is None else module.group_of[order],
            np.arange(module.k) // module.group,
        )
    )
    if not regular:
        notes.add("its g_idx has groups of several sizes; it becomes dense float32", module.name)
        return _dense(module, version)
    return _quantized(module, version, order, notes)


def _order(module: GPTQModule) -> NDArray[np.int32] | None:
    """Columns sorted by group, None when they are."""
    group_of = module.group_of
    if group_of is None or np.all(group_of[1:] >= group_of[:-1]):
        return None
    return np.argsort(group_of, kind="stable").astype(np.int32)


def _quantized(
    module: GPTQModule, version: Version, order: NDArray[np.int32] | None, notes: Notes
) -> LazyTensor:
    container = 8 if module.bits == 8 else 4
    zero = _zero_kind(module, version, notes)
    dtype = module.scales.numpy_dtype().name
    form = WeightFormat((module.n, module.k), "int", dtype, container, module.group, zero)
    weight = f"{module.name}.weight"
    transform = None if order is None else InputTransform(perm=order)

    def load() -> QuantTensor:
        packed = _packed_codes(module, order, container)
        scale = np.ascontiguousarray(module.scales.map().T)
        tensor = QuantTensor(weight, form, packed, scale, input=transform)
        return _with_zeros(tensor, module, version)

    return LazyTensor(weight, form, load, transform)


def _zero_kind(module: GPTQModule, version: Version, notes: Notes) -> ZeroKind:
    """How zeros are kept: as a midpoint, in a byte, or as floats where no code is so large."""
    container = 8 if module.bits == 8 else 4
    wraps = version == 1 and module.zeros.wraps
    if wraps and not module.zeros.carries:
        top = 2**module.bits
        notes.add(
            f"has zero points of -1, which its format turns into {top}; they are read as {top}, as "
            "every tool does, and the weights are as wrong as there",
            module.name,
        )
        if top > 2**container - 1:
            return "offset"
    midpoint = 2 ** (container - 1) - (version == 1)
    exact = container == module.bits and not wraps and module.zeros.all_are(midpoint)
    return "midpoint" if exact else "zero"


def _with_zeros(tensor: QuantTensor, module: GPTQModule, version: Version) -> QuantTensor:
    if tensor.format.zero == "midpoint":
        return tensor
    zeros = np.ascontiguousarray(module.zeros.zeros(version).T)
    if tensor.format.zero == "zero":
        return replace(tensor, zero=zeros.astype(np.uint8))
    assert tensor.scale is not None
    return replace(tensor, offset=-(zeros * tensor.scale.astype(np.float32)))


def _packed_codes(
    module: GPTQModule, order: NDArray[np.int32] | None, container: int
) -> NDArray[np.uint8]:
    if order is None and module.bits == container:
        # A column of the file is a row of ours, bit by bit.
        rows: NDArray[np.uint8] = np.ascontiguousarray(module.codes.map().T).view(np.uint8)
        return np.ascontiguousarray(rows[:, : -(-module.k * module.bits // 8)])
    codes = _codes(module)
    codes = codes if order is None else codes[:, order]
    return codes if container == 8 else pack_nibbles(codes)


def _codes(module: GPTQModule) -> NDArray[np.uint8]:
    """u8 ``[N, K]``, in the order of the file."""
    words = np.ascontiguousarray(module.codes.map().T)
    return unpack_codes(words, module.bits)[:, : module.k]


def _dense(module: GPTQModule, version: Version) -> LazyTensor:
    form = WeightFormat((module.n, module.k), "dense", "float32")
    weight = f"{module.name}.weight"

    def load() -> QuantTensor:
        assert module.group_of is not None
        scales = module.scales.map().astype(np.float32)[module.group_of].T
        zeros = module.zeros.zeros(version).astype(np.float32)[module.group_of].T
        return QuantTensor(weight, form, (_codes(module) - zeros) * scales)

    return LazyTensor(weight, form, load)
