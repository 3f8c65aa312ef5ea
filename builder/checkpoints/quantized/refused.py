"""Formats that are recognized and not read: what they are, and what to do instead."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from slipstream.errors import CheckpointError

REMEDY = "pass the unquantized checkpoint it was made from, with --quantization or `quantize`"
_TILES = (
    "weights permuted into the tiles of one GPU kernel, which only that kernel reads: pass the "
    "model's plain GPTQ or AWQ files, or the unquantized checkpoint"
)
_LATTICE = f"vectors of a codebook that our kernels cannot hold: {REMEDY}"

# What a quant_method is and what to do, as the end of "... is <format>: ".
_REFUSED: Mapping[str, str] = MappingProxyType(
    {
        "marlin": f"Marlin: {_TILES}",
        "gptq_marlin": f"Marlin: {_TILES}",
        "gptq_marlin_24": f"Marlin with 2:4 sparsity: {_TILES}",
        "awq_marlin": f"Marlin: {_TILES}",
        "bitblas": f"BitBLAS: {_TILES}",
        "exl2": f"ExLlamaV2 (EXL2), columns of mixed widths for its own kernels: {REMEDY}",
        "exl3": f"ExLlamaV3 (EXL3), trellis codes for its own kernels: {REMEDY}",
        "aqlm": f"AQLM, {_LATTICE}",
        "quip": f"QuIP#, {_LATTICE}",
        "quip#": f"QuIP#, {_LATTICE}",
        "vptq": f"VPTQ, {_LATTICE}",
        "higgs": f"HIGGS, {_LATTICE}",
        "spqr": f"SpQR, which keeps single weights apart from their groups: {REMEDY}",
        "squeezellm": f"SqueezeLLM, which has a codebook a row: {REMEDY}",
        "hqq": f"HQQ, whose zero points and axes are those of its own library: {REMEDY}",
        "eetq": f"EETQ, int8 permuted for its own kernels: {REMEDY}",
        "quanto": f"Quanto, whose tensors are those of its own library: {REMEDY}",
        "torchao": f"torchao, whose tensors are pickled subclasses of its own library: {REMEDY}",
        "quark": f"AMD Quark: {REMEDY}",
        "bitnet": f"BitNet, ternary weights: {REMEDY}",
        "fp_quant": f"FP-Quant, whose weights are rotated: {REMEDY}",
        "sinq": f"SINQ, which scales rows and columns: {REMEDY}",
        "auto-round": (
            "AutoRound's own layout; export it again with --format auto_gptq, auto_awq or "
            "llm_compressor, or take such files of the model"
        ),
        "intel/auto-round": (
            "AutoRound's own layout; export it again with --format auto_gptq, auto_awq or "
            "llm_compressor, or take such files of the model"
        ),
    }
)


def refusal(path: Path, method: str, known: Sequence[str]) -> CheckpointError:
    """The error for a ``quant_method`` that is not read; ``known`` are those that are."""
    if method in _REFUSED:
        return CheckpointError(f"{path} is quantized with {_REFUSED[method]}")
    named = f"quant_method {method!r}" if method else "a quantization that names no quant_method"
    return CheckpointError(
        f"{path} has {named}, which cannot be read; {', '.join(known)} can. {REMEDY.capitalize()}"
    )
