"""ExpertLinear on an NVIDIA GPU."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
from torch import Tensor

from slipstream.plugins.cuda.launch import interpreting, launch_options
from slipstream.plugins.expert_linear.cuda.kernels import (
    add_products,
    expert_dot_float,
    expert_dot_int,
    expert_gemv_float,
    expert_gemv_int,
    group_pairs,
)
from slipstream.plugins.linear.cuda.linear import scale_kind
from slipstream.plugins.linear.cuda.packing import in_words
from slipstream.plugins.linear.cuda.tactics import Tactic, can_stream, default_tactic, vector_size
from slipstream.plugins.linear.cuda.weight import DeviceWeight, converts_float8
from slipstream.weights.tensor import WeightFormat

# Up to so many tokens every pair reads its expert's weight for itself.
GEMV_TOKENS = 4
_BLOCK = 1024


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


@dataclass(frozen=True, slots=True)
class Grouping:
    """Pairs of tokens and experts by expert, in tiles of ``block`` pairs; int32 on the device."""

    order: Tensor
    ends: Tensor
    tile_experts: Tensor
    tile_firsts: Tensor
    total: Tensor
    block: int

    @property
    def tiles(self) -> int:
        """The most that there can be."""
        return self.tile_experts.shape[0]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What a kernel of tiles is given."""
        return self.order, self.ends, self.tile_experts, self.tile_firsts, self.total


def expert_linear(
    x: Tensor,
    experts: Experts,
    ids: Tensor,
    weights: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    grouping: Grouping | None = None,
    pdl: bool = False,
) -> Tensor:
    """Products of rows with the weights of their experts, in the type of x.

    x bf16 or fp16 ``[T, K]``, or ``[T * top_k, K]`` with ``reduce``; ids int32 ``[T, top_k]``;
    weights float32 ``[T, top_k]`` and residual ``[T, N]`` with ``reduce``. The result is
    ``[T * top_k, width]``, or ``[T, width]``. ``grouping`` is that of the ids, where it is known.
    """
    tokens, top_k = ids.shape
    assert x.is_contiguous() and ids.is_contiguous()
    products = torch.empty(tokens * top_k, experts.width, dtype=x.dtype, device=x.device)
    if tokens and tokens <= GEMV_TOKENS and can_stream(experts.format):
        _gemv(x, experts, ids, products, pdl)
    elif tokens:
        found = grouping or group(ids, experts.number, pdl=pdl)
        _dot(x, experts, top_k, found, products, pdl)
    if not experts.reduce:
        return products
    assert weights is not None
    y = torch.empty(tokens, experts.width, dtype=x.dtype, device=x.device)
    if tokens:
        add_products[(tokens, triton.cdiv(experts.width, _BLOCK))](
            products, weights, residual, y, WIDTH=experts.width, TOP_K=top_k, BLOCK=_BLOCK,
            RESIDUAL=residual is not None, PDL=pdl, **launch_options(num_warps=4, pdl=pdl),
        )  # fmt: skip
    return y


def group(ids: Tensor, experts: int, *, pdl: bool = False) -> Grouping:
    """The pairs of ids ``[T, top_k]`` by expert."""
    pairs = ids.numel()
    block = min(max(triton.next_power_of_2(triton.cdiv(pairs, experts)), 16), 64)
    tiles = min(pairs, experts) + pairs // block

    def empty(count: int) -> Tensor:
        return torch.empty(count, dtype=torch.int32, device=ids.device)

    found = Grouping(empty(pairs), empty(experts), empty(tiles), empty(tiles), empty(1), block)
    group_pairs[(experts,)](
        ids, *found.tensors, pairs, EXPERTS=experts, ALL=triton.next_power_of_2(experts),
        BLOCK=min(_BLOCK, max(triton.next_power_of_2(pairs), 32)), BM=block, PDL=pdl,
        **launch_options(num_warps=4, pdl=pdl),
    )  # fmt: skip
    return found


def _gemv(x: Tensor, experts: Experts, ids: Tensor, y: Tensor, pdl: bool) -> None:
    fmt, weight = experts.format, experts.weight
    n, k = fmt.shape
    tactic = _gemv_tactic(experts, x.device)
    lanes = tactic.block_k // vector_size(fmt)
    rows = min(max(32 * tactic.num_warps // lanes, 1), tactic.block_n)
    vectors = weight.codes.shape[1] * weight.codes.dtype.itemsize // 16
    padded = in_words(fmt) and k * fmt.bits != vectors * 128
    constants = {
        "K": k, "VECTORS": vectors, "PER_ROW": 1 if experts.reduce else ids.shape[1], "BR": rows,
        "RT": tactic.block_n // rows * (2 if experts.gated else 1), "Q": lanes,
        "DEPTH": tactic.num_stages, "BF16": x.dtype == torch.bfloat16,
        "GATED": 1 + experts.gate if experts.gated else 0, "BIAS": experts.bias is not None,
        "EVEN": vectors % (lanes * tactic.num_stages) == 0 and not padded,
        "COMPILED": not interpreting(), "PDL": pdl,
        **launch_options(num_warps=tactic.num_warps, pdl=pdl),
    }  # fmt: skip
    grid = (triton.cdiv(experts.width, tactic.block_n), ids.numel())
    quads, codes = x.view(torch.int64), weight.codes.view(torch.int64)
    if in_words(fmt):
        expert_gemv_int[grid](
            ids, quads, codes, weight.chunk_scales, weight.shift, experts.bias, y, n,
            BITS=fmt.bits, GROUP=weight.group, ZERO=weight.zero_kind, **constants,
        )  # fmt: skip
        return
    fp8 = fmt.kind == "float8_e4m3"
    expert_gemv_float[grid](
        ids, quads, codes, weight.scale, experts.bias, y, n, FP8=fp8,
        NATIVE=fp8 and converts_float8(x.device), SCALE=scale_kind(fmt), **constants,
    )  # fmt: skip


def _gemv_tactic(experts: Experts, device: torch.device) -> Tactic:
    capability = (9, 0) if interpreting() else torch.cuda.get_device_capability(device)
    tactic = default_tactic(experts.format, experts.gated, 1, capability)
    assert tactic.kernel == "gemv", tactic
    return tactic


def _dot(x: Tensor, experts: Experts, top_k: int, grouping: Grouping, y: Tensor, pdl: bool) -> None:
    fmt, weight = experts.format, experts.weight
    n, k = fmt.shape
    block_n = 64
    constants = {
        "K": k, "PER_ROW": 1 if experts.reduce else top_k, "BM": grouping.block, "BN": block_n,
        "SWAP": grouping.block < 64, "GATED": 1 + experts.gate if experts.gated else 0,
        "BIAS": experts.bias is not None, "WIDEN": interpreting(), "PDL": pdl,
        **launch_options(num_warps=4, num_stages=3, pdl=pdl),
    }  # fmt: skip
    grid = (triton.cdiv(experts.width, block_n), grouping.tiles)
    if in_words(fmt):
        chunks = weight.codes.shape[1] // 32
        expert_dot_int[grid](
            *grouping.tensors, x, weight.codes, weight.scale, weight.shift, experts.bias, y,
            y.shape[0], n, CHUNKS=chunks, BITS=fmt.bits, GROUP=weight.group,
            ZERO=weight.zero_kind, EVEN=chunks * 1024 == k * fmt.bits, **constants,
        )  # fmt: skip
        return
    block_k = 64
    expert_dot_float[grid](
        *grouping.tensors, x, weight.typed_codes, weight.scale, experts.bias, y, y.shape[0], n,
        BK=block_k, SCALE=scale_kind(fmt), EVEN=k % block_k == 0, **constants,
    )  # fmt: skip
