"""Matrix products of Linear with integer weights for many tokens on a Hopper GPU.

The weight is the left operand, y^T = w x^T, and goes through registers into wgmma: while the tensor
cores multiply what one warpgroup has decoded, the other decodes, and each loads its words a chunk
ahead. A warp of its own keeps a ring of tiles of x full with the bulk copies of that GPU.
SPLIT programs share the K of a tile as in ``dot``.
"""

# ruff: noqa: RUF005 - Triton has no starred tuples

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from slipstream.plugins.gated_mlp.cuda_kernels import gate_up_of


@gluon.constexpr_function
def _base(i, BITS):
    """What ``_number`` adds to code i: the power of two that has the code in its mantissa."""
    if BITS == 8:
        return 32768.0
    return 128.0 if i == 7 or i % 2 == 0 else 2048.0


@gluon.constexpr_function
def _instruction(i, BITS):
    """Moves code i of a word, or of one that ``_number`` has shifted, into that mantissa."""
    if BITS == 8:
        return f"prmt.b32 $0, $1, 0x47000000, {0x7504 + 16 * i:#x};"
    if i == 7 or i % 2 == 0:
        return "lop3.b32 $0, $1, 0xF0000, 0x43000000, 0xEA;"
    return "lop3.b32 $0, $1, 0xF000, 0x45000000, 0xEA;"


@gluon.jit
def _number(words, i: gl.constexpr, BITS: gl.constexpr):
    """Code i of words plus ``_base``, as a float32."""
    place: gl.constexpr = 4 if i == 7 or i % 2 == 0 else 3  # of the code that need not be shifted
    if BITS == 4 and i < place:
        words = words << (4 * (place - i))
    elif BITS == 4 and i > place:
        words = words >> (4 * (i - place))
    bits = gl.inline_asm_elementwise(
        _instruction(i, BITS), "=r,r", [words], dtype=gl.int32, is_pure=True, pack=1
    )
    return bits.to(gl.float32, bitcast=True)


@gluon.jit
def _decoded(
    words, i: gl.constexpr, factors, shifts, DTYPE: gl.constexpr, BITS: gl.constexpr,
    GROUP: gl.constexpr, ZERO: gl.constexpr,
):  # fmt: skip
    """Weights [64, 32] of code i of a chunk, whose groups have ``factors`` and ``shifts``."""
    middle: gl.constexpr = 2.0 ** (BITS - 1) if ZERO == "midpoint" else 0.0
    zero: gl.constexpr = _base(i, BITS) + middle
    values = _number(words, i, BITS)
    if GROUP:
        factor = factors[i * 32 // GROUP].to(gl.float32)
        begin = -zero * factor
        if ZERO == "zero":
            begin -= shifts[i * 32 // GROUP].to(gl.float32) * factor
        elif ZERO == "offset":
            begin += shifts[i * 32 // GROUP].to(gl.float32)
        values = values * factor[:, None] + begin[:, None]
    else:
        values = values - zero
    return values.to(DTYPE)


@gluon.jit
def _operand(
    words, i: gl.constexpr, factors, shifts, LAYOUT: gl.constexpr, DTYPE: gl.constexpr,
    BITS: gl.constexpr, GROUP: gl.constexpr, ZERO: gl.constexpr,
):  # fmt: skip
    """Weights [64, 64] of codes i and i + 1 of a chunk."""
    low = _decoded(words, i, factors, shifts, DTYPE, BITS, GROUP, ZERO)
    high = _decoded(words, i + 1, factors, shifts, DTYPE, BITS, GROUP, ZERO)
    both = gl.join(low, high).permute((0, 2, 1)).reshape([64, 64])
    return gl.convert_layout(both, LAYOUT, assert_trivial=True)


@gluon.jit
def _row(first, width, GATED: gl.constexpr, LAYOUT: gl.constexpr):
    """Which rows of the weight 64 of a tile are; behind the last, that one again.

    Gated, a warp's rows 8 to 15 are the ups of its rows 0 to 7: the same threads have their sums.
    """
    r = gl.arange(0, 64, LAYOUT)
    if GATED:
        n = gl.minimum(first + r // 16 * 8 + r % 8, width - 1) + r // 8 % 2 * width
    else:
        n = gl.minimum(first + r, width - 1)
    return n


@gluon.jit
def _loaded(pointers, COUNT: gl.constexpr):
    """What is stored at pointers, and behind them: COUNT in all."""
    found = ()
    for i in gl.static_range(COUNT):
        found = found + (gl.load(pointers + i),)
    return found


@gluon.jit
def _chunk(weights, n, chunk, CHUNKS: gl.constexpr, COUNT: gl.constexpr, ZERO: gl.constexpr):
    """Words [64, 32] of a chunk in rows n; scales, and zero points or offsets, of its groups."""
    weight, scale, shift = weights
    j = gl.arange(0, 32, gl.SliceLayout(0, n.type.layout.parent))
    at = n.to(gl.int64)[:, None] * (CHUNKS * 32) + chunk * 32 + j[None, :]
    place = n * (CHUNKS * COUNT) + chunk * COUNT
    shifts = ()
    if ZERO != "midpoint":
        shifts = _loaded(shift + place, COUNT)
    return gl.load(weight + at), _loaded(scale + place, COUNT), shifts


@gluon.jit
def _outputs(first, first_token, ends, ROWS: gl.constexpr, LAYOUT: gl.constexpr):
    """Where 32 tokens of some rows are in the result, from its beginning, and which are in it."""
    tokens, width = ends[4], ends[5]
    n = first + gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT))
    t = gl.arange(0, 32, gl.SliceLayout(0, LAYOUT))
    inside = (n < width)[:, None] & (t < tokens - first_token)[None, :]
    return first_token.to(gl.int64) * width, t[None, :] * width + n[:, None], inside


@gluon.jit
def _residual(first, first_token, ends, ROWS: gl.constexpr, LAYOUT: gl.constexpr):
    """What is added to 32 tokens of some rows."""
    start, at, inside = _outputs(first, first_token, ends, ROWS, LAYOUT)
    return gl.load(ends[2] + start + at, mask=inside, other=0.0)


@gluon.jit
def _finish(
    acc, residual, first, first_token, ends, GATED: gl.constexpr, GROUP: gl.constexpr,
    BIAS: gl.constexpr, RESIDUAL: gl.constexpr,
):  # fmt: skip
    """The epilogue of 64 rows and 32 tokens; gated, of 32 of the gates and as many ups, whose
    ``residual`` has not been loaded."""
    scale, bias, _, y, _, width = ends
    n = _row(first, width, GATED, gl.SliceLayout(1, acc.type.layout))
    if GROUP == 0:
        acc = acc * gl.load(scale + n).to(gl.float32)[:, None]
    if BIAS:
        acc += gl.load(bias + n).to(gl.float32)[:, None]
    if GATED:
        gate, up = gl.split(acc.reshape([4, 2, 8, 32]).permute((0, 2, 3, 1)))
        acc = gate_up_of(gate, up, GATED).reshape([32, 32])
    layout: gl.constexpr = acc.type.layout
    if GATED and RESIDUAL:
        residual = _residual(first, first_token, ends, 32, layout)
    if RESIDUAL:
        acc += residual.to(gl.float32)
    start, at, inside = _outputs(first, first_token, ends, acc.shape[0], layout)
    gl.store(y + start + at, acc.to(y.dtype.element_ty), mask=inside)


@gluon.jit
def _finish_all(
    slices, first, first_token, ends, GATED: gl.constexpr, GROUP: gl.constexpr, BIAS: gl.constexpr,
    RESIDUAL: gl.constexpr,
):  # fmt: skip
    """The epilogue of slices of tokens that follow each other; what is added to some of them is
    loaded before any of those is stored, so that it comes at once."""
    AT_ONCE: gl.constexpr = min(len(slices), 4)
    layout: gl.constexpr = slices[0].type.layout
    for begin in gl.static_range(0, len(slices), AT_ONCE):
        residuals = slices
        if RESIDUAL and not GATED:
            residuals = ()
            for i in gl.static_range(AT_ONCE):
                at = first_token + (begin + i) * 32
                residuals = residuals + (_residual(first, at, ends, 64, layout),)
        for i in gl.static_range(AT_ONCE):
            at = first_token + (begin + i) * 32
            some = slices[begin + i]
            _finish(some, residuals[i], first, at, ends, GATED, GROUP, BIAS, RESIDUAL)


@gluon.jit
def _slices(acc):
    """The sums of 32 tokens each: an epilogue of all at once would need too many registers."""
    T: gl.constexpr = acc.shape[1]
    if T == 32:
        layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 32, 16])
        found = (gl.convert_layout(acc, layout, assert_trivial=True),)
    else:
        low, high = gl.split(acc.reshape([64, 2, T // 2]).permute((0, 2, 1)))
        found = _slices(low) + _slices(high)
    return found


@gluon.jit
def _end(
    acc, number: gl.constexpr, place, ends, common, WARPGROUPS: gl.constexpr, SPLIT: gl.constexpr,
    MIXED: gl.constexpr, GATED: gl.constexpr, GROUP: gl.constexpr, BIAS: gl.constexpr,
    RESIDUAL: gl.constexpr,
):  # fmt: skip
    """Finishes 64 rows, if this program is the last of those that share their K."""
    across, along, part, tile = place
    whole = common[2]
    T: gl.constexpr = acc.shape[1]
    first = (across * WARPGROUPS + number) * (32 if GATED else 64)
    slices = _slices(acc)
    if SPLIT == 1:
        _finish_all(slices, first, along * T, ends, GATED, GROUP, BIAS, RESIDUAL)
    elif MIXED:
        if tile < whole:
            _finish_all(slices, first, along * T, ends, GATED, GROUP, BIAS, RESIDUAL)
        else:
            shared = (tile - whole) * WARPGROUPS + number
            _add(slices, first, along * T, part, shared, ends, common, WARPGROUPS, SPLIT, GATED,
                 GROUP, BIAS, RESIDUAL)  # fmt: skip
    else:
        shared = tile * WARPGROUPS + number
        _add(slices, first, along * T, part, shared, ends, common, WARPGROUPS, SPLIT, GATED, GROUP,
             BIAS, RESIDUAL)  # fmt: skip


@gluon.jit
def _add(
    slices, first, first_token, part, shared, ends, common, WARPGROUPS: gl.constexpr,
    SPLIT: gl.constexpr, GATED: gl.constexpr, GROUP: gl.constexpr, BIAS: gl.constexpr,
    RESIDUAL: gl.constexpr,
):  # fmt: skip
    """Leaves the sums of a part of K, or adds up those of all parts and finishes them; ``shared``
    counts the 64 rows of which there are parts."""
    counters, partial, whole, tiles_across, tiles_along = common
    T: gl.constexpr = len(slices) * 32
    AT_ONCE: gl.constexpr = min(len(slices), 4)  # slices of a total, which registers hold
    layout: gl.constexpr = slices[0].type.layout
    r = gl.arange(0, 64, gl.SliceLayout(1, layout))
    t = gl.arange(0, 32, gl.SliceLayout(0, layout))
    local = r[:, None] * 32 + t[None, :]
    size = (tiles_across * tiles_along - whole) * (WARPGROUPS * 64 * T)
    sums = partial + shared * (64 * T)
    for i in gl.static_range(len(slices)):
        gl.store(sums + part * size + i * 2048 + local, slices[i])
    gl.thread_barrier()
    if gl.atomic_add(counters + shared, 1, sem="acq_rel") == SPLIT - 1:
        gl.store(counters + shared, 0)
        for piece in range(0, T // 32, AT_ONCE):
            totals = ()
            for i in gl.static_range(AT_ONCE):
                at = sums + (piece + i) * 2048 + local
                total = gl.zeros([64, 32], gl.float32, layout)
                for s in gl.static_range(SPLIT):
                    total += gl.load(at + s * size, cache_modifier=".cg")
                totals = totals + (total,)
            at = first_token + piece * 32
            _finish_all(totals, first, at, ends, GATED, GROUP, BIAS, RESIDUAL)


@gluon.jit
def _place(index, common, SPLIT: gl.constexpr):
    """Which tile of N and of tokens, which part of K and which of all tiles the work of an index
    is. Those of the same rows follow each other, since their words are then in the cache, and of no
    more tokens than are there, too."""
    BESIDE: gl.constexpr = 8
    _, _, whole, tiles_across, tiles_along = common
    rest = tiles_across * tiles_along - whole
    tile, part = index, index * 0
    if SPLIT > 1:
        shared = gl.maximum(index - whole, 0)
        tile = gl.where(index < whole, index, whole + shared % rest)
        part = shared // rest
    first = tile // (tiles_across * BESIDE) * BESIDE
    inside = tile - first * tiles_across
    beside = gl.minimum(tiles_along - first, BESIDE)
    return inside // beside, first + inside % beside, part, tile


@gluon.jit
def _shares(common, SPLIT: gl.constexpr):
    """What there is to do: tiles, or parts of them."""
    _, _, whole, tiles_across, tiles_along = common
    return whole + (tiles_across * tiles_along - whole) * SPLIT


@gluon.jit
def _chunks(place, common, CHUNKS: gl.constexpr, SPLIT: gl.constexpr):
    """The first chunk of a share, and how many there are."""
    STEPS: gl.constexpr = (CHUNKS + SPLIT - 1) // SPLIT
    first = place[2] * STEPS
    count = gl.maximum(gl.minimum(STEPS, CHUNKS - first), 0)
    if SPLIT > 1:
        count = gl.where(place[3] < common[2], CHUNKS, count)
    return first, count


@gluon.jit
def _multiply(
    number: gl.constexpr, ring, ready, free, weights, width, ends, common, K: gl.constexpr,
    T: gl.constexpr, WARPGROUPS: gl.constexpr, SPLIT: gl.constexpr, MIXED: gl.constexpr,
    STAGES: gl.constexpr, BITS: gl.constexpr, GROUP: gl.constexpr, ZERO: gl.constexpr,
    GATED: gl.constexpr, BIAS: gl.constexpr, RESIDUAL: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """What the warpgroup of a number does."""
    CODES: gl.constexpr = 32 // BITS
    done = 0  # tiles of x
    for index in range(gl.program_id(0), _shares(common, SPLIT), gl.num_programs(0)):
        place = _place(index, common, SPLIT)
        first, count = _chunks(place, common, K // (CODES * 32), SPLIT)
        acc = _tile(
            number, done, ring, ready, free, weights, place[0], first, count, width, K, T,
            WARPGROUPS, STAGES, BITS, GROUP, ZERO, GATED,
        )  # fmt: skip
        if PDL:
            tl.extra.cuda.gdc_wait()
        _end(acc, number, place, ends, common, WARPGROUPS, SPLIT, MIXED, GATED, GROUP, BIAS,
             RESIDUAL)  # fmt: skip
        done += count * (CODES // 2)


@gluon.jit
def _tile(
    number: gl.constexpr, done, ring, ready, free, weights, across, chunk, chunks, width,
    K: gl.constexpr, T: gl.constexpr, WARPGROUPS: gl.constexpr, STAGES: gl.constexpr,
    BITS: gl.constexpr, GROUP: gl.constexpr, ZERO: gl.constexpr, GATED: gl.constexpr,
):  # fmt: skip
    """A warpgroup's sums of some chunks of a tile; ``done`` tiles of x were before it."""
    CODES: gl.constexpr = 32 // BITS
    CHUNKS: gl.constexpr = K // (CODES * 32)
    COUNT: gl.constexpr = CODES * 32 // GROUP if GROUP else 0
    # The next weights are decoded while these are multiplied, which needs registers for both.
    DEEP: gl.constexpr = T >= 128 and WARPGROUPS < 3 and (T < 256 or COUNT <= 2)
    sums: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, T, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, sums, 2)
    first = (across * WARPGROUPS + number) * (32 if GATED else 64)
    n = _row(first, width, GATED, gl.SliceLayout(1, operand))
    last = chunk + chunks - 1
    words, factors, shifts = _chunk(weights, n, gl.minimum(chunk, CHUNKS - 1), CHUNKS, COUNT, ZERO)
    acc = gl.zeros([64, T], gl.float32, sums)
    for step in range(0, chunks):
        following = gl.minimum(chunk + step + 1, last)
        next_words, next_factors, next_shifts = _chunk(
            weights, n, following, CHUNKS, COUNT, ZERO
        )  # fmt: skip
        for i in gl.static_range(0, CODES, 2):
            count = done + (step * CODES + i) // 2
            slot = count % STAGES
            w = _operand(words, i, factors, shifts, operand, ring.dtype, BITS, GROUP, ZERO)
            mbarrier.wait(ready.index(slot), count // STAGES & 1)
            if i > 0 and not DEEP:
                acc = warpgroup_mma_wait(0, [acc])
                mbarrier.arrive(free.index((count + STAGES - 1) % STAGES), count=1)
            acc = warpgroup_mma(w, ring.index(slot).permute((1, 0)), acc, is_async=True)
            if i > 0 and DEEP:
                acc = warpgroup_mma_wait(1, [acc])
                mbarrier.arrive(free.index((count + STAGES - 1) % STAGES), count=1)
        acc = warpgroup_mma_wait(0, [acc])
        mbarrier.arrive(free.index((done + (step + 1) * CODES // 2 - 1) % STAGES), count=1)
        words = next_words
        factors = next_factors
        shifts = next_shifts
    return acc


@gluon.jit
def _copy(
    x, ring, ready, free, common, K: gl.constexpr, T: gl.constexpr, SPLIT: gl.constexpr,
    STAGES: gl.constexpr, BITS: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """What the warp does that copies x."""
    if PDL:
        tl.extra.cuda.gdc_wait()
    done = 0
    for index in range(gl.program_id(0), _shares(common, SPLIT), gl.num_programs(0)):
        place = _place(index, common, SPLIT)
        first, chunks = _chunks(place, common, K * BITS // 1024, SPLIT)
        first, steps = first * (16 // BITS), chunks * (16 // BITS)
        for step in range(steps):
            count = done + step
            slot = count % STAGES
            mbarrier.wait(free.index(slot), (count // STAGES & 1) ^ 1)
            mbarrier.expect(ready.index(slot), T * 128)
            tma.async_copy_global_to_shared(
                x, [place[1] * T, (first + step) * 64], ready.index(slot), ring.index(slot)
            )
        done += steps


@gluon.jit(do_not_specialize=["tokens", "tiles_across", "tiles_along", "whole"])
def wide_int(
    x, weight, scale, shift, bias, residual, y, counters, partial, tokens, N, tiles_across,
    tiles_along, whole,
    K: gl.constexpr, T: gl.constexpr, WARPGROUPS: gl.constexpr, SPLIT: gl.constexpr,
    MIXED: gl.constexpr, STAGES: gl.constexpr, BITS: gl.constexpr, GROUP: gl.constexpr,
    ZERO: gl.constexpr, GATED: gl.constexpr, BIAS: gl.constexpr, RESIDUAL: gl.constexpr,
    PDL: gl.constexpr,
):  # fmt: skip
    """A weight [N, chunks * 32 words] of whole chunks, times x, a descriptor of tiles [T, 64].

    Grid: at most tiles of N times tiles of tokens times SPLIT, best as many as run at a time; a
    program works on one tile after the other, of 64 rows for each of one to three WARPGROUPS.
    SPLIT programs share the K of every tile, or, MIXED, of those from the one numbered ``whole``
    on. GROUP 0 is a scale a row; ZERO as in ``gemv_int``; STAGES tiles of x are in flight. Unless
    SPLIT is 1: counters int32, a zero for 64 rows of a shared tile, and left so; partial float32
    [SPLIT, shared tiles, rows, T].
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    ring = gl.allocate_shared_memory(x.dtype, [STAGES, T, 64], x.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for s in gl.static_range(STAGES):
        mbarrier.init(ready.index(s), count=1)
        mbarrier.init(free.index(s), count=WARPGROUPS)
    width = N // 2 if GATED else N
    weights = (weight, scale, shift)
    ends = (scale, bias, residual, y, tokens, width)
    common = (counters, partial, whole, tiles_across, tiles_along)
    if WARPGROUPS == 1:
        gl.warp_specialize(
            [
                (_multiply, (
                    0, ring, ready, free, weights, width, ends, common, K, T, 1, SPLIT,
                    MIXED, STAGES, BITS, GROUP, ZERO, GATED, BIAS, RESIDUAL, PDL,
                )),
                (_copy, (x, ring, ready, free, common, K, T, SPLIT, STAGES, BITS, PDL)),
            ],
            [1],
            [24],
        )  # fmt: skip
    elif WARPGROUPS == 2:
        gl.warp_specialize(
            [
                (_multiply, (
                    0, ring, ready, free, weights, width, ends, common, K, T, 2, SPLIT,
                    MIXED, STAGES, BITS, GROUP, ZERO, GATED, BIAS, RESIDUAL, PDL,
                )),
                (_multiply, (
                    1, ring, ready, free, weights, width, ends, common, K, T, 2, SPLIT,
                    MIXED, STAGES, BITS, GROUP, ZERO, GATED, BIAS, RESIDUAL, PDL,
                )),
                (_copy, (x, ring, ready, free, common, K, T, SPLIT, STAGES, BITS, PDL)),
            ],
            [4, 1],
            [240, 24],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_multiply, (
                    0, ring, ready, free, weights, width, ends, common, K, T, 3, SPLIT,
                    MIXED, STAGES, BITS, GROUP, ZERO, GATED, BIAS, RESIDUAL, PDL,
                )),
                (_multiply, (
                    1, ring, ready, free, weights, width, ends, common, K, T, 3, SPLIT,
                    MIXED, STAGES, BITS, GROUP, ZERO, GATED, BIAS, RESIDUAL, PDL,
                )),
                (_multiply, (
                    2, ring, ready, free, weights, width, ends, common, K, T, 3, SPLIT,
                    MIXED, STAGES, BITS, GROUP, ZERO, GATED, BIAS, RESIDUAL, PDL,
                )),
                (_copy, (x, ring, ready, free, common, K, T, SPLIT, STAGES, BITS, PDL)),
            ],
            [4, 4, 1],
            [160, 160, 24],
        )  # fmt: skip
