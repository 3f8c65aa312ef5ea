"""Products of many rows with the weights of their experts on a Hopper GPU, as Linear's
"wide": weights go through registers into wgmma, and a warp of its own copies x.

Programs stay: each takes one tile after the other, and x of the next is on its way while the sums
of the last are stored. For that x lies in the order of the experts, and a tile is some of its rows
one after the other; those behind the last of an expert, which are another's, are not stored.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from slipstream.plugins.linear.cuda.kernels.dot import float4_instructions
from slipstream.plugins.linear.cuda.kernels.wide import (
    chunk_of,
    copy_tile,
    operand_of,
    products_of,
    row_of,
    scaled,
    slices_of,
)


class Form(NamedTuple):
    """What the kernel is compiled for; its docstring says what they are."""

    N: gl.constexpr
    K: gl.constexpr
    T: gl.constexpr
    WARPGROUPS: gl.constexpr
    STAGES: gl.constexpr
    DEEP: gl.constexpr
    BITS: gl.constexpr
    GROUP: gl.constexpr
    ZERO: gl.constexpr
    GATED: gl.constexpr
    BIAS: gl.constexpr


@triton.jit(do_not_specialize=["pairs"])
def rows_by_expert(order, x, y, pairs, K: tl.constexpr, PER_ROW: tl.constexpr, BLOCK: tl.constexpr):
    """y [pairs, K]: the rows of x in the order of the experts, PER_ROW pairs sharing one. A program
    a row."""
    row = tl.program_id(0).to(tl.int64)
    source = (tl.load(order + row) // PER_ROW).to(tl.int64)
    k = tl.arange(0, BLOCK)
    tl.store(y + row * K + k, tl.load(x + source * K + k, k < K, 0.0), k < K)


@gluon.jit
def _place(tile, grouped, PARTS: gl.constexpr, T: gl.constexpr):
    """Of a tile: its expert, its first row, the one behind the last of the expert, and which part
    of the expert's weight it multiplies. Neighbours read the same part."""
    bounds, tiles, length = grouped
    slot = tile // PARTS
    expert = gl.load(tiles + 4 + slot)
    first = gl.load(tiles + 4 + length + slot)
    start = gl.load(bounds + expert)
    end = gl.load(bounds + expert + 1)
    count = (end - start + T - 1) // T
    place = tile - first * PARTS
    return expert, start + place % count * T, end, place // count


@gluon.jit
def _float4(words, i: gl.constexpr, exponents, DTYPE: gl.constexpr):
    """Weights [64, 32] of code i of a chunk, whose exponents are the bytes of an int64 a row.

    As bfloat16 they are 2**63 too small, by which the sums are multiplied; those below 2**-62 lose
    bits, or are nothing."""
    bits = ((exponents >> (8 * i)) & 255).to(gl.int32) + 63
    if DTYPE == gl.bfloat16:  # noqa: SIM300 - which is no constant
        factor = (bits << 7).to(gl.int16).to(gl.bfloat16, bitcast=True)
        found = gl.inline_asm_elementwise(
            float4_instructions(i, False), "=r,r,r,r", [words, factor[:, None]], dtype=gl.bfloat16,
            is_pure=True, pack=2,
        )  # fmt: skip
    else:
        factor = (bits << 23).to(gl.float32, bitcast=True)
        sign = (words << (28 - 4 * i)) & -2147483648
        moved = words << (22 - 4 * i) if i < 6 else words >> (4 * i - 22)
        value = (sign | (moved & 0x01C00000)).to(gl.float32, bitcast=True)
        found = (value * 2.0**63 * factor[:, None]).to(DTYPE)
    return found


@gluon.jit
def _operand(
    words, i: gl.constexpr, factors, shifts, LAYOUT: gl.constexpr, DTYPE: gl.constexpr,
    BITS: gl.constexpr, GROUP: gl.constexpr, ZERO: gl.constexpr,
):  # fmt: skip
    """Weights [64, 64] of codes i and i + 1 of a chunk."""
    if ZERO == "e2m1":
        low = _float4(words, i, factors[0], DTYPE)
        high = _float4(words, i + 1, factors[0], DTYPE)
        both = gl.join(low, high).permute((0, 2, 1)).reshape([64, 64])
        found = gl.convert_layout(both, LAYOUT, assert_trivial=True)
    else:
        found = operand_of(words, i, factors, shifts, LAYOUT, DTYPE, BITS, GROUP, ZERO)
    return found


@gluon.jit
def _chunk(weights, n, chunk, CHUNKS: gl.constexpr, COUNT: gl.constexpr, ZERO: gl.constexpr):
    """Words [64, 32] of a chunk in rows n, and what scales and shifts its groups; of float4 the
    exponents of all in one int64."""
    if ZERO == "e2m1":
        weight, scale, _ = weights
        j = gl.arange(0, 32, gl.SliceLayout(0, n.type.layout.parent))
        at = n.to(gl.int64)[:, None] * (CHUNKS * 32) + chunk * 32 + j[None, :]
        found = (gl.load(weight + at), (gl.load(scale + n * CHUNKS + chunk),), ())
    else:
        found = chunk_of(weights, n, chunk, CHUNKS, COUNT, ZERO)
    return found


@gluon.jit
def _finish(
    acc, first, at, expert, end, ends, N: gl.constexpr, GATED: gl.constexpr, GROUP: gl.constexpr,
    BIAS: gl.constexpr, SMALL: gl.constexpr,
):  # fmt: skip
    """The epilogue of 64 rows of a weight, gated 32 of the gates and as many ups, and of the rows
    of x from ``at`` on, each of which goes to its pair. SMALL: sums are 2**63 too small."""
    order, scale, bias, y = ends
    if SMALL:
        acc = acc * 2.0**63
    T: gl.constexpr = acc.shape[1]
    width: gl.constexpr = N // 2 if GATED else N
    n = expert * N + row_of(first, width, GATED, gl.SliceLayout(1, acc.type.layout))
    acc = scaled(acc, n, scale, bias, GATED, GROUP, BIAS)
    layout: gl.constexpr = acc.type.layout
    n = first + gl.arange(0, acc.shape[0], gl.SliceLayout(1, layout))
    row = at + gl.arange(0, T, gl.SliceLayout(0, layout))
    pair = gl.load(order + row, mask=row < end, other=0).to(gl.int64)
    inside = (n < width)[:, None] & (row < end)[None, :]
    gl.store(y + pair[None, :] * width + n[:, None], acc.to(y.dtype.element_ty), mask=inside)


@gluon.constexpr_function
def _steps(K, BITS):
    """The whole chunks of a row of K, the steps of 64 elements in the rest, and all steps."""
    whole, codes = K * BITS // 1024, 32 // BITS
    rest = (K - whole * codes * 32 + 63) // 64
    return whole, rest, whole * codes // 2 + rest


@gluon.jit
def _multiply(number: gl.constexpr, work, form):
    """What the warpgroup of a number does."""
    rings, grouped, weights, ends = work
    N: gl.constexpr = form.N
    K: gl.constexpr = form.K
    T: gl.constexpr = form.T
    WARPGROUPS: gl.constexpr = form.WARPGROUPS
    STAGES: gl.constexpr = form.STAGES
    DEEP: gl.constexpr = form.DEEP
    BITS: gl.constexpr = form.BITS
    GROUP: gl.constexpr = form.GROUP
    ZERO: gl.constexpr = form.ZERO
    GATED: gl.constexpr = form.GATED
    BIAS: gl.constexpr = form.BIAS
    CODES: gl.constexpr = 32 // BITS
    WHOLE: gl.constexpr = _steps(K, BITS)[0]
    REST: gl.constexpr = _steps(K, BITS)[1]
    CHUNKS: gl.constexpr = WHOLE + (REST > 0)
    COUNT: gl.constexpr = CODES * 32 // GROUP if GROUP else 0
    ROWS: gl.constexpr = 32 if GATED else 64  # of the result, a warpgroup
    width: gl.constexpr = N // 2 if GATED else N
    PARTS: gl.constexpr = (width + ROWS * WARPGROUPS - 1) // (ROWS * WARPGROUPS)
    SMALL: gl.constexpr = ZERO == "e2m1" and rings[0].dtype == gl.bfloat16
    sums: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, T, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, sums, 2)
    _, tiles, _ = grouped
    before = 0  # tiles of x that came for the tiles before
    for tile in range(gl.program_id(0), gl.load(tiles) * PARTS, gl.num_programs(0)):
        expert, at, end, part = _place(tile, grouped, PARTS, T)
        first = (part * WARPGROUPS + number) * ROWS
        n = expert * N + row_of(first, width, GATED, gl.SliceLayout(1, operand))
        codes = _chunk(weights, n, 0, CHUNKS, COUNT, ZERO)
        acc = gl.zeros([64, T], gl.float32, sums)
        for chunk in range(0, WHOLE):
            following = gl.minimum(chunk + 1, CHUNKS - 1)
            next_codes = _chunk(weights, n, following, CHUNKS, COUNT, ZERO)
            acc = products_of(
                acc, codes, rings, before, _operand, CODES // 2, STAGES, DEEP, operand, BITS, GROUP,
                ZERO,
            )  # fmt: skip
            before += CODES // 2
            codes = next_codes
        if REST > 0:
            acc = products_of(
                acc, codes, rings, before, _operand, REST, STAGES, DEEP, operand, BITS, GROUP, ZERO
            )
            before += REST
        slices = slices_of(acc)
        for i in gl.static_range(T // 32):
            _finish(slices[i], first, at + i * 32, expert, end, ends, N, GATED, GROUP, BIAS, SMALL)


@gluon.jit
def _first(work, form):
    _multiply(0, work, form)


@gluon.jit
def _second(work, form):
    _multiply(1, work, form)


@gluon.jit
def _third(work, form):
    _multiply(2, work, form)


@gluon.jit
def _copy(x, rings, grouped, PARTS: gl.constexpr, form):
    """What the warp does that copies x."""
    T: gl.constexpr = form.T
    STEPS: gl.constexpr = _steps(form.K, form.BITS)[2]
    _, tiles, _ = grouped
    before = 0
    for tile in range(gl.program_id(0), gl.load(tiles) * PARTS, gl.num_programs(0)):
        _, at, _, _ = _place(tile, grouped, PARTS, T)
        for step in range(STEPS):
            copy_tile(x, rings, before + step, at, step * 64, T, form.STAGES)
        before += STEPS


@gluon.jit(do_not_specialize=["length"])
def expert_wide(
    order, bounds, tiles, length, x, weight, scale, shift, bias, y,
    N: gl.constexpr, K: gl.constexpr, T: gl.constexpr, WARPGROUPS: gl.constexpr,
    STAGES: gl.constexpr, DEEP: gl.constexpr, BITS: gl.constexpr, GROUP: gl.constexpr,
    ZERO: gl.constexpr, GATED: gl.constexpr, BIAS: gl.constexpr,
):  # fmt: skip
    """Weights [experts * N, chunks * 32 words] times x, a descriptor of tiles [T, 64] of rows in
    the order of ``order``; y [pairs, N] or, GATED, [pairs, N / 2] by pair.

    ``order`` to ``length`` as in ``group_pairs``, of tiles of T. A tile of a program has 64 rows
    of the weight for each of one to three WARPGROUPS. GROUP 0 is a scale a row; ZERO as in
    ``gemv_int``; STAGES tiles of x are in flight. DEEP: a product begins before the last is over.
    """
    ring = gl.allocate_shared_memory(x.dtype, [STAGES, T, 64], x.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for s in gl.static_range(STAGES):
        mbarrier.init(ready.index(s), count=1)
        mbarrier.init(free.index(s), count=WARPGROUPS)
    width: gl.constexpr = N // 2 if GATED else N
    ROWS: gl.constexpr = (32 if GATED else 64) * WARPGROUPS
    PARTS: gl.constexpr = (width + ROWS - 1) // ROWS
    rings = (ring, ready, free)
    grouped = (bounds, tiles, length)
    form: gl.constexpr = Form(N, K, T, WARPGROUPS, STAGES, DEEP, BITS, GROUP, ZERO, GATED, BIAS)
    work = (rings, grouped, (weight, scale, shift), (order, scale, bias, y))
    copies = (x, rings, grouped, PARTS, form)
    if WARPGROUPS == 1:
        gl.warp_specialize([(_first, (work, form)), (_copy, copies)], [1], [24])
    elif WARPGROUPS == 2:
        gl.warp_specialize(
            [(_first, (work, form)), (_second, (work, form)), (_copy, copies)], [4, 1], [240, 24]
        )
    else:
        gl.warp_specialize(
            [
                (_first, (work, form)),
                (_second, (work, form)),
                (_third, (work, form)),
                (_copy, copies),
            ],
            [4, 4, 1],
            [160, 160, 24],
        )
