"""Linear and Embedding on an NVIDIA GPU."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
import triton
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from slipstream.plugins.cuda.launch import interpreting, launch_options
from slipstream.plugins.linear.cuda.blas import Operands, Rounding, linear_blas, normed, rounded_x
from slipstream.plugins.linear.cuda.kernels.dot import dot_float, dot_int
from slipstream.plugins.linear.cuda.kernels.gemv import gemv_float, gemv_int
from slipstream.plugins.linear.cuda.kernels.rows import embedding_rows
from slipstream.plugins.linear.cuda.kernels.wide import wide_int
from slipstream.plugins.linear.cuda.packing import in_words
from slipstream.plugins.linear.cuda.tactics import (
    GEMV_TOKENS,
    Tactic,
    block_m,
    can_stream,
    vector_size,
)
from slipstream.plugins.linear.cuda.weight import DeviceWeight, converts_float8
from slipstream.plugins.linear.cuda.wide import Tile
from slipstream.weights.tensor import WeightFormat


def linear(  # noqa: PLR0913 - what is fused
    x: Tensor,
    weight: DeviceWeight,
    *,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_eps: float = 0.0,
    gated: bool = False,
    gate: int = 0,
    out_dtype: torch.dtype | None = None,
    tactic: Tactic,
    out: Tensor | None = None,
    pdl: bool = False,
    rounded: Rounding | None = None,
    reader: Rounding | None = None,
) -> Tensor:
    """``act(norm(x) @ weight.T + bias) + residual``.

    x bf16 or fp16 ``[T, K]``, contiguous; a 16-bit weight has its type. norm_weight ``[K]`` of
    x's type asks for an RMS norm; bias ``[N]``; residual and the result ``[T, N]``, or ``[T, N/2]``
    when gated: then act is the gate of kind ``gate`` of the first and second N/2 rows. The result
    is of ``out_dtype`` (x's, or float32), and in ``out`` if that is given.

    Only for the tactic "blas": ``rounded`` has what stands for x, where the weight is multiplied in
    the type of its codes, and ``reader`` is filled with what stands for the result where that is
    read by such a Linear: without a norm its codes are the result itself; one with a norm reads a
    sum with a residual.
    """
    n, _ = weight.format.shape
    width, dtype = n // 2 if gated else n, out_dtype or x.dtype
    y = out
    if reader is not None and reader.norm_weight is None:
        y = reader.codes
    elif y is None:
        y = torch.empty(x.shape[0], width, dtype=dtype, device=x.device)
    assert y.shape == (x.shape[0], width) and y.is_contiguous() and x.is_contiguous()
    inputs = Operands(
        x, bias, residual, norm_weight, norm_eps, gated, gate, dtype, pdl, rounded, reader
    )
    if tactic.kernel == "blas":
        linear_blas(weight, inputs, y)
        return y
    assert can_stream(weight.format), weight.format
    if tactic.rounds:
        inputs = _rounded(weight, inputs)
    elif norm_weight is not None and not tactic.fuse_norm:
        inputs = replace(inputs, x=normed(inputs), norm_weight=None)
    {"gemv": _gemv, "dot": _dot, "wide": _wide}[tactic.kernel](weight, inputs, y, tactic)
    return y


def embedding(
    token_ids: Tensor,
    weight: DeviceWeight,
    dtype: torch.dtype,
    *,
    last_tokens: Tensor | None = None,
    slots: Tensor | None = None,
    first: Tensor | None = None,
    pdl: bool = False,
) -> Tensor:
    """Rows ``[T, K]`` of a weight by token ids int32 ``[T]``.

    An id of -1 stands for ``last_tokens[slots[row]]`` (int32; slots ``[T]``). Ids and slots out of
    range are moved into it. Where the weight is the part of a table from row ``first`` (int32
    ``[1]``) on, rows of other parts are zeros.
    """
    v, k = weight.format.shape
    tokens = token_ids.shape[0]
    y = torch.empty(tokens, k, dtype=dtype, device=token_ids.device)
    kinds = {"dense": "dense", "float8_e4m3": "fp8", "int": "int", "float4_e2m1": "int"}
    block = min(1024, triton.next_power_of_2(k))
    fmt = weight.format
    embedding_rows[(tokens, -(-k // block))](
        token_ids, last_tokens, slots, first, weight.typed_codes, weight.scale, weight.shift, y,
        1 if last_tokens is None else last_tokens.shape[0], v, k, BLOCK=block,
        KIND=kinds[fmt.kind], BITS=fmt.bits, GROUP=fmt.group, ROWS=fmt.rows,
        ZERO=weight.zero_kind,
        LAST=last_tokens is not None and slots is not None, PDL=pdl,
        **launch_options(num_warps=4, pdl=pdl),
    )  # fmt: skip
    return y


def _rounded(weight: DeviceWeight, inputs: Operands) -> Operands:
    """The inputs of a product in float8, after the norm if there is one."""
    codes, scale = rounded_x(weight, inputs, torch.float8_e4m3fn)
    if not converts_float8(codes.device):
        codes = codes.to(inputs.x.dtype)  # which is exact
    return replace(inputs, x=codes, x_scale=scale, norm_weight=None)


def _gemv(weight: DeviceWeight, inputs: Operands, y: Tensor, tactic: Tactic) -> None:
    fmt, x = weight.format, inputs.x
    n, k = fmt.shape
    tokens = x.shape[0]
    assert tokens <= GEMV_TOKENS, tokens
    lanes = tactic.block_k // vector_size(fmt)
    rows = min(max(32 * tactic.num_warps // lanes, 1), tactic.block_n)
    row_tensors = tactic.block_n // rows * (2 if inputs.gated else 1)
    vectors = weight.codes.shape[1] * weight.codes.dtype.itemsize // 16
    padded = in_words(fmt) and k * fmt.bits != vectors * 128
    constants = {
        "K": k,
        "VECTORS": vectors,
        "T": tokens,
        "BR": rows,
        "RT": row_tensors,
        "Q": lanes,
        "DEPTH": tactic.num_stages,
        "BF16": x.dtype == torch.bfloat16,
        "EVEN": vectors % (lanes * tactic.num_stages) == 0 and not padded,
        "COMPILED": not interpreting(),
        **_epilogue(inputs),
        **launch_options(num_warps=tactic.num_warps, pdl=inputs.pdl),
    }
    grid = (-(-y.shape[1] // tactic.block_n),)
    gain = inputs.norm_weight
    quads = x.view(torch.int64)  # four elements each
    gains = None if gain is None else gain.view(torch.int64)
    ends = (inputs.bias, inputs.residual, gains, y, n, inputs.norm_eps)
    if in_words(fmt):
        gemv_int[grid](
            quads, weight.codes.view(torch.int64), weight.chunk_scales, weight.shift, *ends,
            BITS=fmt.bits, GROUP=weight.group, ZERO=weight.zero_kind, **constants,
        )  # fmt: skip
        return
    fp8 = fmt.kind == "float8_e4m3"
    assert fp8 or weight.codes.dtype == x.dtype, (weight.codes.dtype, x.dtype)
    gemv_float[grid](
        quads, weight.codes.view(torch.int64), weight.scale, *ends,
        FP8=fp8, NATIVE=fp8 and converts_float8(x.device), SCALE=scale_kind(fmt), **constants,
    )  # fmt: skip


def _dot(weight: DeviceWeight, inputs: Operands, y: Tensor, tactic: Tactic) -> None:
    fmt, x = weight.format, inputs.x
    n, k = fmt.shape
    tokens = x.shape[0]
    rows = tactic.block_m or block_m(tokens)
    serial, programs = (tactic.split_k, 1) if tactic.serial else (1, tactic.split_k)
    grid = (-(-y.shape[1] // tactic.block_n), -(-tokens // rows), programs)
    # The sum of squares of a row is of its whole K, which no split one sees.
    assert tactic.split_k == 1 or inputs.norm_weight is None
    partial = None
    if programs > 1:
        assert grid[0] * grid[1] <= weight.counters.shape[0]
        partial = _partial(grid, rows * tactic.block_n * (2 if inputs.gated else 1), x)
    constants = {
        "K": k,
        "BM": rows,
        "BN": tactic.block_n,
        "SPLIT": programs,
        "SERIAL": serial,
        "SWAP": tactic.swap,
        "WIDEN": interpreting(),
        **_epilogue(inputs),
        **launch_options(num_warps=tactic.num_warps, num_stages=tactic.num_stages, pdl=inputs.pdl),
    }
    ends = (
        inputs.bias, inputs.residual, inputs.norm_weight, y, weight.counters, partial,
    )  # fmt: skip
    if in_words(fmt):
        chunks = weight.codes.shape[1] // 32
        dot_int[grid](
            x, weight.codes, weight.scale, weight.shift, *ends, tokens, n, inputs.norm_eps,
            BITS=fmt.bits, GROUP=weight.group, ZERO=weight.zero_kind,
            CHUNKS=chunks,
            EVEN=chunks * 1024 == k * fmt.bits and chunks % tactic.split_k == 0, **constants,
        )  # fmt: skip
        return
    assert fmt.rows == 1 or 128 % tactic.block_k == 0, tactic
    dot_float[grid](
        x, weight.typed_codes, weight.scale, *ends, inputs.x_scale, tokens, n, inputs.norm_eps,
        BK=tactic.block_k, SCALE=scale_kind(fmt),
        EVEN=k % (tactic.block_k * tactic.split_k) == 0, **constants,
    )  # fmt: skip


def _wide(weight: DeviceWeight, inputs: Operands, y: Tensor, tactic: Tactic) -> None:
    fmt, x = weight.format, inputs.x
    tokens, width = y.shape
    tile = Tile(tactic.block_n * (2 if inputs.gated else 1), tactic.block_m, tactic.split_k)
    warpgroups, block = tile.rows // 64, [tile.tokens, 64]
    grid = (-(-width // tactic.block_n), -(-tokens // tile.tokens), tile.split)
    partial = None
    if tile.split > 1:
        assert grid[0] * grid[1] * warpgroups <= weight.counters.shape[0]
        partial = _partial(grid, tile.rows * tile.tokens, x)
    kind = gl.float16 if x.dtype == torch.float16 else gl.bfloat16
    layout = gl.NVMMASharedLayout.get_default_for(block, kind)
    wide_int[grid](
        TensorDescriptor.from_tensor(x, block, layout), weight.codes, weight.scale,
        weight.shift, inputs.bias, inputs.residual, y, weight.counters, partial, tokens,
        fmt.shape[0], K=fmt.shape[1], T=tile.tokens, WARPGROUPS=warpgroups, SPLIT=tile.split,
        STAGES=tactic.num_stages, BITS=fmt.bits, GROUP=weight.group, ZERO=weight.zero_kind,
        GATED=inputs.gate_kind, BIAS=inputs.bias is not None,
        RESIDUAL=inputs.residual is not None, PDL=inputs.pdl,
        maxnreg=tile.registers, **launch_options(num_warps=4, pdl=inputs.pdl),
    )  # fmt: skip


def _partial(grid: tuple[int, int, int], size: int, x: Tensor) -> Tensor:
    """Room for the sums, ``size`` each, of the programs that share tiles."""
    return torch.empty(math.prod(grid) * size, dtype=torch.float32, device=x.device)


def _epilogue(inputs: Operands) -> dict[str, object]:
    return {
        "GATED": inputs.gate_kind,
        "BIAS": inputs.bias is not None,
        "RESIDUAL": inputs.residual is not None,
        "NORM": inputs.norm_weight is not None,
        "PDL": inputs.pdl,
    }


def scale_kind(fmt: WeightFormat) -> str:
    """What kernels of 16-bit and float8 weights call SCALE."""
    if fmt.kind == "dense":
        return "none"
    return "row" if fmt.rows == 1 else "block"
