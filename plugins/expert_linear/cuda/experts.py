"""ExpertLinear on an NVIDIA GPU."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from slipstream.plugins.cuda.launch import interpreting, launch_options
from slipstream.plugins.expert_linear.cuda.kernels import (
    add_products,
    expert_dot_float,
    expert_dot_int,
    expert_gemv_float,
    expert_gemv_int,
    group_pairs,
)
from slipstream.plugins.expert_linear.cuda.tactics import (
    GEMV_TOKENS,
    TILES,
    ExpertShape,
    runs_deep,
    slots_of,
    wide_tile,
)
from slipstream.plugins.expert_linear.cuda.wide_kernels import expert_wide, rows_by_expert
from slipstream.plugins.linear.cuda.linear import scale_kind
from slipstream.plugins.linear.cuda.packing import FLOAT4, in_words
from slipstream.plugins.linear.cuda.tactics import (
    PROCESSORS,
    Tactic,
    can_stream,
    vector_size,
    whole_chunks,
)
from slipstream.plugins.linear.cuda.weight import DeviceWeight, converts_float8
from slipstream.plugins.rms_norm.cuda import quantize_rows
from slipstream.weights.tensor import WeightFormat

_BLOCK = 1024  # columns of a sum
_GROUP_BLOCK = 4096  # pairs that are counted at once


@dataclass(frozen=True, slots=True)
class Experts:
    """Weights ``[number * N, K]`` of the experts of a layer, and what is done with their products;
    see ``plugins/expert_linear``. bias ``[number * N]``."""

    weight: DeviceWeight
    number: int
    bias: Tensor | None = None
    reduce: bool = False
    gated: bool = False
    gate: int = 0

    @property
    def format(self) -> WeightFormat:
        """That of one expert."""
        n, k = self.weight.format.shape
        return replace(self.weight.format, shape=(n // self.number, k))

    @property
    def width(self) -> int:
        """Columns of a product."""
        return self.format.shape[0] // (2 if self.gated else 1)

    def shape(self, top_k: int) -> ExpertShape:
        """What the choice of a tactic depends on."""
        return ExpertShape(self.format, self.gated, self.number, top_k)


@dataclass(frozen=True, slots=True)
class Grouping:
    """Pairs of tokens and experts by expert, int32 on the device; see ``group_pairs``."""

    order: Tensor
    bounds: Tensor
    tiles: Tensor

    def of(self, block: int) -> tuple[Tensor, Tensor, Tensor, int]:
        """What a kernel of tiles of ``block`` pairs is given."""
        tiles = self.tiles[TILES.index(block)]
        return self.order, self.bounds, tiles, (len(tiles) - 4) // 2


@dataclass(frozen=True, slots=True)
class _Operands:
    """The inputs of a call."""

    x: Tensor
    ids: Tensor
    weights: Tensor | None
    residual: Tensor | None
    pdl: bool
    early: bool

    def empty(self, rows: int, width: int) -> Tensor:
        return torch.empty(rows, width, dtype=self.x.dtype, device=self.x.device)


def expert_linear(  # noqa: PLR0913 - what is fused
    x: Tensor,
    experts: Experts,
    ids: Tensor,
    weights: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    tactic: Tactic,
    grouping: Grouping | None = None,
    pdl: bool = False,
    early: bool = False,
) -> Tensor:
    """Products of rows with the weights of their experts, in the type of x.

    x bf16 or fp16 ``[T, K]``, or ``[T * top_k, K]`` with ``reduce``; ids int32 ``[T, top_k]``;
    weights float32 ``[T, top_k]`` and residual ``[T, N]`` with ``reduce``. The result is
    ``[T * top_k, width]``, or ``[T, width]``. ``grouping`` is that of the ids, where it is known.
    ``early`` says that no kernel still writes ids and weights when the one in front has begun.
    """
    tokens, top_k = ids.shape
    assert x.is_contiguous() and ids.is_contiguous() and experts.reduce == (weights is not None)
    inputs = _Operands(x, ids, weights, residual, pdl, early)
    adds = experts.reduce and tactic.kernel == "gemv" and not experts.gated
    y = inputs.empty(tokens if adds else tokens * top_k, experts.width)
    if tokens and tactic.kernel == "gemv":
        _gemv(experts, inputs, tactic, y, adds)
    elif tokens and not needs_grouping(tactic, tokens):
        _dot(experts, inputs, tactic, None, y)
    elif tokens:
        multiply = _wide if tactic.kernel == "wide" else _dot
        multiply(experts, inputs, tactic, grouping or group(ids, experts.number, pdl=pdl), y)
    return _sum(inputs, y) if experts.reduce and not adds else y


def group(ids: Tensor, experts: int, *, pdl: bool = False) -> Grouping:
    """The pairs of ids ``[T, top_k]`` by expert, in tiles of every size."""
    pairs = ids.numel()

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int32, device=ids.device)

    length = (
        -(-most_tiles(pairs, experts, TILES[0]) // 2) * 2
    )  # rows start at multiples of 16 bytes
    found = Grouping(empty(pairs), empty(experts + 1), empty(len(TILES), 4 + 2 * length))
    block = min(_GROUP_BLOCK, max(triton.next_power_of_2(pairs), 32))
    group_pairs[(experts,)](
        ids, found.order, found.bounds, found.tiles, pairs, length, EXPERTS=experts,
        ALL=triton.next_power_of_2(experts), BLOCK=block, LEAST=TILES[0], SIZES=len(TILES), PDL=pdl,
        **launch_options(num_warps=4 if block <= _BLOCK else 8, pdl=pdl),
    )  # fmt: skip
    return found


def needs_grouping(tactic: Tactic, tokens: int) -> bool:
    """Whether a kernel wants pairs by expert: those of one token have an expert each."""
    return tactic.kernel == "wide" or (tactic.kernel == "dot" and tokens > 1)


def most_tiles(pairs: int, experts: int, block: int) -> int:
    """The most tiles of ``block`` pairs that there can be."""
    return min(pairs, experts) + pairs // block


def _sum(inputs: _Operands, products: Tensor) -> Tensor:
    """The products of each token times their weights, added up."""
    tokens, top_k = inputs.ids.shape
    width = products.shape[1]
    y = inputs.empty(tokens, width)
    if tokens:
        add_products[(tokens, triton.cdiv(width, _BLOCK))](
            products, inputs.weights, inputs.residual, y, WIDTH=width, TOP_K=top_k,
            BLOCK=_BLOCK, RESIDUAL=inputs.residual is not None, PDL=inputs.pdl,
            **launch_options(num_warps=4, pdl=inputs.pdl),
        )  # fmt: skip
    return y


def _gemv(experts: Experts, inputs: _Operands, tactic: Tactic, y: Tensor, adds: bool) -> None:
    """Products of pairs of a token and an expert, or if it ``adds`` sums of tokens."""
    fmt, weight, x = experts.format, experts.weight, inputs.x
    n, k = fmt.shape
    tokens, top_k = inputs.ids.shape
    assert tokens <= GEMV_TOKENS and can_stream(fmt), (tokens, fmt)
    lanes, slots = tactic.block_k // vector_size(fmt), slots_of(top_k) if adds else 1
    rows = min(max(32 * tactic.num_warps // (lanes * slots), 1), tactic.block_n)
    vectors = weight.codes.shape[1] * weight.codes.dtype.itemsize // 16
    padded = in_words(fmt) and k * fmt.bits != vectors * 128
    even = vectors % (lanes * tactic.num_stages) == 0
    constants = {
        "N": n, "K": k, "VECTORS": vectors, "PER_ROW": 1 if experts.reduce else top_k,
        "SUM": top_k if adds else 0, "RESIDUAL": adds and inputs.residual is not None, "BR": rows,
        "RT": tactic.block_n // rows * (2 if experts.gated else 1), "Q": lanes * slots,
        "DEPTH": tactic.num_stages, "BF16": x.dtype == torch.bfloat16,
        "GATED": 1 + experts.gate if experts.gated else 0, "BIAS": experts.bias is not None,
        "EVEN": even and not padded, "COMPILED": not interpreting(),
        "EARLY": adds and inputs.early, "PDL": inputs.pdl, "SLOTS": slots,
        **launch_options(num_warps=tactic.num_warps, pdl=inputs.pdl),
    }  # fmt: skip
    grid = (triton.cdiv(experts.width, tactic.block_n), len(y))
    quads, codes = x.view(torch.int64), weight.codes.view(torch.int64)
    ends = (experts.bias, inputs.weights, inputs.residual, y)
    if in_words(fmt):
        expert_gemv_int[grid](
            inputs.ids, quads, codes, weight.chunk_scales, weight.shift, *ends,
            BITS=fmt.bits, GROUP=weight.group, ZERO=weight.zero_kind, **constants,
        )  # fmt: skip
        return
    fp8 = fmt.kind == "float8_e4m3"
    expert_gemv_float[grid](
        inputs.ids, quads, codes, weight.scale, *ends, FP8=fp8,
        NATIVE=fp8 and converts_float8(x.device), SCALE=scale_kind(fmt), **constants,
    )  # fmt: skip


def _dot(
    experts: Experts, inputs: _Operands, tactic: Tactic, grouping: Grouping | None, y: Tensor
) -> None:
    """Products of tiles of pairs; without a grouping every pair is one."""
    fmt, weight = experts.format, experts.weight
    n, k = fmt.shape
    constants = {
        "N": n, "K": k, "PER_ROW": 1 if experts.reduce else inputs.ids.shape[1],
        "BM": tactic.block_m, "BN": tactic.block_n, "SWAP": tactic.swap,
        "GATED": 1 + experts.gate if experts.gated else 0, "BIAS": experts.bias is not None,
        "WIDEN": interpreting(), "PDL": inputs.pdl, "ALONE": grouping is None,
        **launch_options(num_warps=tactic.num_warps, num_stages=tactic.num_stages, pdl=inputs.pdl),
    }  # fmt: skip
    tiles, grouped = len(y), (inputs.ids, inputs.ids, inputs.ids, 0)
    if grouping is not None:
        tiles, grouped = (
            most_tiles(tiles, experts.number, tactic.block_m),
            grouping.of(tactic.block_m),
        )
    grid = (triton.cdiv(experts.width, tactic.block_n) * tiles,)
    if in_words(fmt):
        chunks = weight.codes.shape[1] // 32
        scales, packed = _packed_scales(weight)
        expert_dot_int[grid](
            *grouped, inputs.x, weight.codes, scales, weight.shift, experts.bias, y, len(y),
            PACKED=packed, CHUNKS=chunks, BITS=fmt.bits, GROUP=weight.group, ZERO=weight.zero_kind,
            EVEN=chunks * 1024 == k * fmt.bits, **constants,
        )  # fmt: skip
        return
    assert fmt.rows == 1 or 128 % tactic.block_k == 0, tactic
    x, x_scale = inputs.x, None
    if tactic.rounds:
        x, x_scale = quantize_rows(x, torch.float8_e4m3fn, weight.input_scale, pdl=inputs.pdl)
        if not converts_float8(x.device):
            x = x.to(inputs.x.dtype)  # which is exact
    expert_dot_float[grid](
        *grouped, x, weight.typed_codes, weight.scale, experts.bias, y, x_scale, len(y),
        BK=tactic.block_k, SCALE=scale_kind(fmt), EVEN=k % tactic.block_k == 0, **constants,
    )  # fmt: skip


def _packed_scales(weight: DeviceWeight) -> tuple[Tensor | None, bool]:
    """The scales of a weight, those of a chunk of words in one integer where there is such a type,
    and whether that is so."""
    scale, fmt = weight.scale, weight.format
    if fmt.kind == FLOAT4:
        return weight.chunk_scales, True
    count = 1024 // fmt.bits // fmt.group
    packed = scale is not None and scale.dtype == torch.float16 and count in (2, 4)
    if scale is None or not packed or not whole_chunks(fmt):
        return scale, False
    return scale.view(torch.int32 if count == 2 else torch.int64), True


def _wide(
    experts: Experts, inputs: _Operands, tactic: Tactic, grouping: Grouping, y: Tensor
) -> None:
    fmt, weight = experts.format, experts.weight
    n, k = fmt.shape
    pairs, tile = len(y), wide_tile(tactic, experts.gated)
    order, bounds, tiles, length = grouping.of(tile.tokens)
    x = torch.empty(pairs, k, dtype=inputs.x.dtype, device=y.device)
    rows_by_expert[(pairs,)](
        order, inputs.x, x, pairs, K=k, PER_ROW=1 if experts.reduce else inputs.ids.shape[1],
        BLOCK=triton.next_power_of_2(k), **launch_options(num_warps=4),
    )  # fmt: skip
    block = [tile.tokens, 64]
    kind = gl.float16 if x.dtype == torch.float16 else gl.bfloat16
    layout = gl.NVMMASharedLayout.get_default_for(block, kind)
    most = most_tiles(pairs, experts.number, tile.tokens)
    programs = min(triton.cdiv(experts.width, tactic.block_n) * most, PROCESSORS * tile.programs)
    expert_wide[(programs,)](
        order, bounds, tiles, length, TensorDescriptor.from_tensor(x, block, layout), weight.codes,
        weight.chunk_scales, weight.shift, experts.bias, y, N=n, K=k, T=tile.tokens,
        WARPGROUPS=tile.rows // 64, STAGES=tactic.num_stages, DEEP=runs_deep(tile, fmt),
        BITS=fmt.bits, GROUP=weight.group, ZERO=weight.zero_kind,
        GATED=1 + experts.gate if experts.gated else 0, BIAS=experts.bias is not None,
        maxnreg=tile.registers, **launch_options(num_warps=4),
    )  # fmt: skip
