"""Matrix products of Linear with integer weights for many tokens on a Hopper GPU.

The weight is the left operand, y^T = w x^T, and goes through registers into wgmma: while the tensor
cores multiply what one warpgroup has decoded, the other decodes, and each loads its words a chunk
ahead. A warp of its own keeps a ring of tiles of x full with the bulk copies of that GPU.
SPLIT programs share the K of a tile as in ``dot``.
"""

# ruff: noqa: RUF005 - Triton has no starred tuples

from typing import NamedTuple

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


class Form(NamedTuple):
    """What the kernel is compiled for; its docstring says what they are."""

    K: gl.constexpr
    T: gl.constexpr
    WARPGROUPS: gl.constexpr
    SPLIT: gl.constexpr
    STAGES: gl.constexpr
    BITS: gl.constexpr
    GROUP: gl.constexpr
    ZERO: gl.constexpr
    GATED: gl.constexpr
    BIAS: gl.constexpr
    RESIDUAL: gl.constexpr
    PDL: gl.constexpr


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
def operand_of(
    words, i: gl.constexpr, factors, shifts, LAYOUT: gl.constexpr, DTYPE: gl.constexpr,
    BITS: gl.constexpr, GROUP: gl.constexpr, ZERO: gl.constexpr,
):  # fmt: skip
    """Weights [64, 64] of codes i and i + 1 of a chunk."""
    low = _decoded(words, i, factors, shifts, DTYPE, BITS, GROUP, ZERO)
    high = _decoded(words, i + 1, factors, shifts, DTYPE, BITS, GROUP, ZERO)
    both = gl.join(low, high).permute((0, 2, 1)).reshape([64, 64])
    return gl.convert_layout(both, LAYOUT, assert_trivial=True)


@gluon.jit
def row_of(first, width, GATED: gl.constexpr, LAYOUT: gl.constexpr):
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
def chunk_of(weights, n, chunk, CHUNKS: gl.constexpr, COUNT: gl.constexpr, ZERO: gl.constexpr):
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
def scaled(acc, n, scale, bias, GATED: gl.constexpr, GROUP: gl.constexpr, BIAS: gl.constexpr):
    """Sums of 64 rows n of the weight with their scales and biases; gated, 32 of the result."""
    T: gl.constexpr = acc.shape[1]
    if GROUP == 0:
        acc = acc * gl.load(scale + n).to(gl.float32)[:, None]
    if BIAS:
        acc += gl.load(bias + n).to(gl.float32)[:, None]
    if GATED:
        gate, up = gl.split(acc.reshape([4, 2, 8, T]).permute((0, 2, 3, 1)))
        acc = gate_up_of(gate, up, GATED).reshape([32, T])
    return acc


@gluon.jit
def products_of(
    acc, codes, rings, before, operand, STEPS: gl.constexpr, STAGES: gl.constexpr,
    DEEP: gl.constexpr, LAYOUT: gl.constexpr, BITS: gl.constexpr, GROUP: gl.constexpr,
    ZERO: gl.constexpr,
):  # fmt: skip
    """The sums and the products of a chunk's first STEPS times two codes, for which ``before``
    tiles of x came before; ``operand`` is ``operand_of`` or one like it.

    The next weights are decoded while these are multiplied, or, with so many sums that registers
    are short, only while another warpgroup's are; DEEP, where there are registers for the weights
    of two, the next product is on its way before this one is over.
    """
    words, factors, shifts = codes
    ring, ready, free = rings
    LATE: gl.constexpr = acc.shape[1] < 256
    for step in gl.static_range(STEPS):
        count = before + step
        slot = count % STAGES
        w = operand(words, 2 * step, factors, shifts, LAYOUT, ring.dtype, BITS, GROUP, ZERO)
        mbarrier.wait(ready.index(slot), count // STAGES & 1)
        if LATE and not DEEP and step > 0:
            acc = warpgroup_mma_wait(0, [acc])
            mbarrier.arrive(free.index((count + STAGES - 1) % STAGES), count=1)
        acc = warpgroup_mma(w, ring.index(slot).permute((1, 0)), acc, is_async=True)
        if DEEP and step > 0:
            acc = warpgroup_mma_wait(1, [acc])
            mbarrier.arrive(free.index((count + STAGES - 1) % STAGES), count=1)
        if step == STEPS - 1 or not (LATE or DEEP):
            acc = warpgroup_mma_wait(0, [acc])
            mbarrier.arrive(free.index(slot), count=1)
    return acc


@gluon.jit
def copy_tile(x, rings, count, row, column, T: gl.constexpr, STAGES: gl.constexpr):
    """Asks for T rows and 64 columns of x, tile ``count`` of the ring, when there is room."""
    ring, ready, free = rings
    slot = count % STAGES
    mbarrier.wait(free.index(slot), (count // STAGES & 1) ^ 1)
    mbarrier.expect(ready.index(slot), T * 128)
    tma.async_copy_global_to_shared(x, [row, column], ready.index(slot), ring.index(slot))


@gluon.jit
def _finish(
    acc, first, first_token, ends, GATED: gl.constexpr, GROUP: gl.constexpr, BIAS: gl.constexpr,
    RESIDUAL: gl.constexpr,
):  # fmt: skip
    """The epilogue of 64 rows and some tokens; gated, of 32 of the gates and as many ups."""
    scale, bias, residual, y, tokens, width = ends
    T: gl.constexpr = acc.shape[1]
    n = row_of(first, width, GATED, gl.SliceLayout(1, acc.type.layout))
    acc = scaled(acc, n, scale, bias, GATED, GROUP, BIAS)
    layout: gl.constexpr = acc.type.layout
    n = first + gl.arange(0, acc.shape[0], gl.SliceLayout(1, layout))
    t = gl.arange(0, T, gl.SliceLayout(0, layout))
    inside = (n < width)[:, None] & (t < tokens - first_token)[None, :]
    start = first_token.to(gl.int64) * width
    at = t[None, :] * width + n[:, None]
    if RESIDUAL:
        acc += gl.load(residual + start + at, mask=inside, other=0.0).to(gl.float32)
    gl.store(y + start + at, acc.to(y.dtype.element_ty), mask=inside)


@gluon.jit
def slices_of(acc):
    """The sums of 32 tokens each: an epilogue of all at once would need too many registers."""
    T: gl.constexpr = acc.shape[1]
    if T == 32:
        layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 32, 16])
        found = (gl.convert_layout(acc, layout, assert_trivial=True),)
    else:
        low, high = gl.split(acc.reshape([64, 2, T // 2]).permute((0, 2, 1)))
        found = slices_of(low) + slices_of(high)
    return found


@gluon.jit
def _end(acc, tile, place, ends, common, form):
    """Finishes 64 rows, if this program is the last of those that share their K."""
    _, along, part = place
    counters, partial = common
    T: gl.constexpr = form.T
    SPLIT: gl.constexpr = form.SPLIT
    GATED: gl.constexpr = form.GATED
    GROUP: gl.constexpr = form.GROUP
    BIAS: gl.constexpr = form.BIAS
    RESIDUAL: gl.constexpr = form.RESIDUAL
    first = tile * (32 if GATED else 64)
    slices = slices_of(acc)
    if SPLIT == 1:
        for i in gl.static_range(T // 32):
            _finish(slices[i], first, along * T + i * 32, ends, GATED, GROUP, BIAS, RESIDUAL)
    else:
        layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 32, 16])
        r = gl.arange(0, 64, gl.SliceLayout(1, layout))
        t = gl.arange(0, 32, gl.SliceLayout(0, layout))
        local = r[:, None] * 32 + t[None, :]
        line = gl.num_programs(0) * form.WARPGROUPS
        number = along * line + tile
        size = gl.num_programs(1) * line * (64 * T)
        sums = partial + number * (64 * T)
        for i in gl.static_range(T // 32):
            gl.store(sums + part * size + i * 2048 + local, slices[i])
        gl.thread_barrier()
        if gl.atomic_add(counters + number, 1, sem="acq_rel") == SPLIT - 1:
            gl.store(counters + number, 0)
            for piece in range(T // 32):
                total = gl.zeros([64, 32], gl.float32, layout)
                for s in gl.static_range(SPLIT):
                    total += gl.load(sums + s * size + piece * 2048 + local, cache_modifier=".cg")
                _finish(total, first, along * T + piece * 32, ends, GATED, GROUP, BIAS, RESIDUAL)


@gluon.jit
def _multiply(number: gl.constexpr, work, form):
    """What the warpgroup of a number does."""
    rings, weights, place, width, ends, common = work
    T: gl.constexpr = form.T
    WARPGROUPS: gl.constexpr = form.WARPGROUPS
    STAGES: gl.constexpr = form.STAGES
    BITS: gl.constexpr = form.BITS
    GROUP: gl.constexpr = form.GROUP
    ZERO: gl.constexpr = form.ZERO
    GATED: gl.constexpr = form.GATED
    CODES: gl.constexpr = 32 // BITS
    CHUNKS: gl.constexpr = form.K // (CODES * 32)
    COUNT: gl.constexpr = CODES * 32 // GROUP if GROUP else 0
    STEPS: gl.constexpr = (CHUNKS + form.SPLIT - 1) // form.SPLIT
    DEEP: gl.constexpr = T >= 128 and WARPGROUPS < 3 and (T < 256 or COUNT <= 2)
    sums: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, T, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, sums, 2)
    across, _, part = place
    tile = across * WARPGROUPS + number
    n = row_of(tile * (32 if GATED else 64), width, GATED, gl.SliceLayout(1, operand))
    chunk = part * STEPS
    last = gl.minimum(chunk + STEPS, CHUNKS) - 1
    codes = chunk_of(weights, n, gl.minimum(chunk, last), CHUNKS, COUNT, ZERO)
    acc = gl.zeros([64, T], gl.float32, sums)
    for step in range(0, last - chunk + 1):
        following = gl.minimum(chunk + step + 1, last)
        next_codes = chunk_of(weights, n, following, CHUNKS, COUNT, ZERO)
        acc = products_of(
            acc, codes, rings, step * (CODES // 2), operand_of, CODES // 2, STAGES, DEEP, operand,
            BITS, GROUP, ZERO,
        )  # fmt: skip
        codes = next_codes
    if form.PDL:
        tl.extra.cuda.gdc_wait()
    _end(acc, tile, place, ends, common, form)


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
def _copy(x, rings, place, form):
    """What the warp does that copies x."""
    T: gl.constexpr = form.T
    BITS: gl.constexpr = form.BITS
    CHUNKS: gl.constexpr = form.K * BITS // 1024
    STEPS: gl.constexpr = (CHUNKS + form.SPLIT - 1) // form.SPLIT
    _, along, part = place
    first = part * STEPS * (16 // BITS)
    if form.PDL:
        tl.extra.cuda.gdc_wait()
    for count in range(gl.minimum(STEPS, CHUNKS - part * STEPS) * (16 // BITS)):
        copy_tile(x, rings, count, along * T, (first + count) * 64, T, form.STAGES)


@gluon.jit(do_not_specialize=["tokens"])
def wide_int(
    x, weight, scale, shift, bias, residual, y, counters, partial, tokens, N,
    K: gl.constexpr, T: gl.constexpr, WARPGROUPS: gl.constexpr, SPLIT: gl.constexpr,
    STAGES: gl.constexpr, BITS: gl.constexpr, GROUP: gl.constexpr, ZERO: gl.constexpr,
    GATED: gl.constexpr, BIAS: gl.constexpr, RESIDUAL: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """A weight [N, chunks * 32 words] of whole chunks, times x, a descriptor of tiles [T, 64].

    Grid (tiles of N, tiles of tokens, SPLIT); a tile has 64 rows for each of one to three
    WARPGROUPS. GROUP 0 is a scale a row; ZERO as in ``gemv_int``; STAGES tiles of x are in flight.
    Unless SPLIT is 1: counters int32, a zero for 64 rows of a tile, and left so; partial float32
    [SPLIT, tiles, rows, T].
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    ring = gl.allocate_shared_memory(x.dtype, [STAGES, T, 64], x.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for s in gl.static_range(STAGES):
        mbarrier.init(ready.index(s), count=1)
        mbarrier.init(free.index(s), count=WARPGROUPS)
    place = (gl.program_id(0), gl.program_id(1), gl.program_id(2))
    width = N // 2 if GATED else N
    weights = (weight, scale, shift)
    ends = (scale, bias, residual, y, tokens, width)
    common = (counters, partial)
    form: gl.constexpr = Form(
        K, T, WARPGROUPS, SPLIT, STAGES, BITS, GROUP, ZERO, GATED, BIAS, RESIDUAL, PDL
    )
    rings = (ring, ready, free)
    work = (rings, weights, place, width, ends, common)
    copies = (x, rings, place, form)
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
