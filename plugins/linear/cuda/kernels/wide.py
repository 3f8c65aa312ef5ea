"""Matrix products of Linear with integer weights for 64 and more tokens on a Hopper GPU.

The weight is the left operand, y^T = w x^T, and goes from its words through registers into wgmma
without ever lying in shared memory: a warpgroup decodes 64 rows while the tensor cores multiply what
another has decoded. One warp keeps a ring of tiles of x full, by the bulk copies of that GPU.
SPLIT programs share the K of a tile as in ``dot``.
"""

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
def _place_byte(i):
    return f"prmt.b32 $0, $1, 0x47000000, {0x7504 + 16 * i:#x};"


@gluon.jit
def _number(words, i: gl.constexpr, BITS: gl.constexpr):
    """Code i of words plus ``_base(i)``, as a float32: moved into the mantissa of a power of two."""
    if BITS == 8:
        bits = gl.inline_asm_elementwise(
            _place_byte(i), "=r,r", [words], dtype=gl.int32, is_pure=True, pack=1
        )  # fmt: skip
    elif i == 7 or i % 2 == 0:
        moved = words << (4 * (4 - i)) if i < 4 else words >> (4 * (i - 4))
        bits = gl.inline_asm_elementwise(
            "lop3.b32 $0, $1, 0xF0000, 0x43000000, 0xEA;", "=r,r", [moved], dtype=gl.int32,
            is_pure=True, pack=1,
        )  # fmt: skip
    else:
        moved = words << (4 * (3 - i)) if i < 3 else words >> (4 * (i - 3))
        bits = gl.inline_asm_elementwise(
            "lop3.b32 $0, $1, 0xF000, 0x45000000, 0xEA;", "=r,r", [moved], dtype=gl.int32,
            is_pure=True, pack=1,
        )  # fmt: skip
    return bits.to(gl.float32, bitcast=True)


@gluon.constexpr_function
def _base(i, BITS):
    if BITS == 8:
        return 32768.0
    return 128.0 if i == 7 or i % 2 == 0 else 2048.0


@gluon.jit
def _decoded(
    words, i: gl.constexpr, factors, shifts, BITS: gl.constexpr, GROUP: gl.constexpr,
    ZERO: gl.constexpr, DTYPE: gl.constexpr,
):  # fmt: skip
    """Weights [64, 32] of code i of a chunk, whose groups have ``factors`` and ``shifts``."""
    middle: gl.constexpr = 2.0 ** (BITS - 1) if ZERO == "midpoint" else 0.0
    zero: gl.constexpr = _base(i, BITS) + middle
    number = _number(words, i, BITS)
    if GROUP:
        factor = factors[i * 32 // GROUP].to(gl.float32)
        begin = -zero * factor
        if ZERO == "zero":
            begin -= shifts[i * 32 // GROUP].to(gl.float32) * factor
        elif ZERO == "offset":
            begin += shifts[i * 32 // GROUP].to(gl.float32)
        values = number * factor[:, None] + begin[:, None]
    else:
        values = number - zero
    return values.to(DTYPE)


@gluon.jit
def _of_groups(values, COUNT: gl.constexpr):
    """What the COUNT groups of a chunk have at pointers, one after the other."""
    found = ()
    for i in gl.static_range(COUNT):
        found = found + (gl.load(values + i),)
    return found


@gluon.jit
def _groups(scale, shift, place, COUNT: gl.constexpr, ZERO: gl.constexpr):
    """Scales, and zero points or offsets, of a chunk."""
    factors = _of_groups(scale + place, COUNT)
    shifts = ()
    if ZERO != "midpoint":
        shifts = _of_groups(shift + place, COUNT)
    return factors, shifts


@gluon.jit
def _finish(
    acc, scale, bias, residual, y, first, width, first_token, tokens,
    GATED: gl.constexpr, GROUP: gl.constexpr, BIAS: gl.constexpr, RESIDUAL: gl.constexpr,
):  # fmt: skip
    """The epilogue of 64 rows from ``first`` on; gated, of 32 of the gates and as many ups."""
    T: gl.constexpr = acc.shape[1]
    n = _row(first, width, GATED, gl.SliceLayout(1, acc.type.layout))
    if GROUP == 0:
        acc = acc * gl.load(scale + n).to(gl.float32)[:, None]
    if BIAS:
        acc += gl.load(bias + n).to(gl.float32)[:, None]
    if GATED:
        pairs = acc.reshape([4, 2, 8, T]).permute((0, 2, 3, 1))
        gate, up = gl.split(pairs)
        acc = gate_up_of(gate, up, GATED).reshape([32, T])
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
def _slices(acc):
    """The sums of 32 tokens each: an epilogue of all at once would need too many registers."""
    T: gl.constexpr = acc.shape[1]
    if T == 32:
        slices: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 32, 16])
        found = (gl.convert_layout(acc, slices, assert_trivial=True),)
    else:
        low, high = gl.split(acc.reshape([64, 2, T // 2]).permute((0, 2, 1)))
        found = _slices(low) + _slices(high)
    return found


@gluon.jit
def _row(first, width, GATED: gl.constexpr, LAYOUT: gl.constexpr):
    """The rows of the weight that the 64 of a warpgroup are, those of the last one again behind it.

    Gated, a warp's rows 8 to 15 are the ups of its rows 0 to 7: the same threads have their sums.
    """
    r = gl.arange(0, 64, LAYOUT)
    if GATED:
        n = gl.minimum(first + r // 16 * 8 + r % 8, width - 1) + r // 8 % 2 * width
    else:
        n = gl.minimum(first + r, width - 1)
    return n


@gluon.jit
def _chunk_of(weight, scale, shift, n, j, chunk, CHUNKS: gl.constexpr, COUNT: gl.constexpr, ZERO: gl.constexpr):
    """Words [64, 32] of a chunk, and the scales and shifts of its groups, for each of the rows n."""
    words = ()
    factors = ()
    shifts = ()
    for m in gl.static_range(len(n)):
        words = words + (gl.load(weight + n[m].to(gl.int64)[:, None] * (CHUNKS * 32) + j[None, :] + chunk * 32),)
        f, z = _groups(scale, shift, n[m] * (CHUNKS * COUNT) + chunk * COUNT, COUNT, ZERO)
        factors = factors + (f,)
        shifts = shifts + (z,)
    return words, factors, shifts


@gluon.jit
def _multiply(
    half: gl.constexpr, ring, ready, free, weight, scale, shift, bias, residual, y, counters,
    partial, place, tokens, N, K: gl.constexpr, T: gl.constexpr, WARPGROUPS: gl.constexpr,
    SPLIT: gl.constexpr, STAGES: gl.constexpr, BITS: gl.constexpr, GROUP: gl.constexpr,
    ZERO: gl.constexpr, GATED: gl.constexpr, BIAS: gl.constexpr, RESIDUAL: gl.constexpr,
    TILES: gl.constexpr, MODE: gl.constexpr,
):  # fmt: skip
    """What one of the warpgroups does."""
    CODES: gl.constexpr = 32 // BITS
    CHUNKS: gl.constexpr = K // (CODES * 32)
    COUNT: gl.constexpr = CODES * 32 // GROUP if GROUP else 0
    STEPS: gl.constexpr = (CHUNKS + SPLIT - 1) // SPLIT
    DTYPE: gl.constexpr = ring.dtype
    sums: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, T, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, sums, 2)
    across, along, part = place
    ROWS: gl.constexpr = 32 if GATED else 64
    width = N // 2 if GATED else N
    first = (across * WARPGROUPS + half) * TILES
    j = gl.arange(0, 32, gl.SliceLayout(0, operand))
    n = ()
    acc = ()
    for m in gl.static_range(TILES):
        n = n + (_row((first + m) * ROWS, width, GATED, gl.SliceLayout(1, operand)),)
        acc = acc + (gl.zeros([64, T], gl.float32, sums),)
    chunk = part * STEPS
    last = gl.minimum(chunk + STEPS, CHUNKS)
    words, factors, shifts = _chunk_of(weight, scale, shift, n, j, chunk, CHUNKS, COUNT, ZERO)
    for step in range(0, last - chunk):
        next_words, next_factors, next_shifts = _chunk_of(
            weight, scale, shift, n, j, gl.minimum(chunk + step + 1, last - 1), CHUNKS, COUNT, ZERO
        )
        for i in gl.static_range(0, CODES, 2):
            count = (step * CODES + i) // 2
            slot = count % STAGES
            found = ()
            for m in gl.static_range(TILES):
                low = _decoded(words[m], i, factors[m], shifts[m], BITS, GROUP, ZERO, DTYPE)
                high = _decoded(words[m], i + 1, factors[m], shifts[m], BITS, GROUP, ZERO, DTYPE)
                w = gl.join(low, high).permute((0, 2, 1)).reshape([64, 64])
                w = gl.convert_layout(w, operand, assert_trivial=True)
                if m == 0:
                    mbarrier.wait(ready.index(slot), count // STAGES & 1)
                    if MODE == 1 and i > 0:
                        acc = _waited(acc)
                        mbarrier.arrive(free.index((count + STAGES - 1) % STAGES), count=1)
                found = found + (warpgroup_mma(w, ring.index(slot).permute((1, 0)), acc[m], is_async=True),)
            acc = found
            if MODE == 0:
                acc = _waited(acc)
                mbarrier.arrive(free.index(slot), count=1)
        if MODE == 1:
            acc = _waited(acc)
            mbarrier.arrive(free.index(((step + 1) * (CODES // 2) - 1) % STAGES), count=1)
        words = next_words
        factors = next_factors
        shifts = next_shifts
    for m in gl.static_range(TILES):
        _end(
            acc[m], scale, bias, residual, y, counters, partial, first + m, place, tokens, width,
            WARPGROUPS * TILES, SPLIT, GATED, GROUP, BIAS, RESIDUAL,
        )  # fmt: skip


@gluon.jit
def _waited(acc):
    """Sums when nothing is being added to them."""
    if len(acc) == 1:
        found = (warpgroup_mma_wait(0, [acc[0]]),)
    else:
        found = warpgroup_mma_wait(0, [acc[0], acc[1]])
    return found


@gluon.jit
def _end(
    acc, scale, bias, residual, y, counters, partial, tile, place, tokens, width,
    TILES: gl.constexpr, SPLIT: gl.constexpr, GATED: gl.constexpr, GROUP: gl.constexpr,
    BIAS: gl.constexpr, RESIDUAL: gl.constexpr,
):  # fmt: skip
    """Finishes a tile of 64 rows, if this program is the last of those that share its K."""
    across, along, part = place
    T: gl.constexpr = acc.shape[1]
    first = tile * (32 if GATED else 64)
    parts = _slices(acc)
    if SPLIT == 1:
        for i in gl.static_range(T // 32):
            _finish(
                parts[i], scale, bias, residual, y, first, width, along * T + i * 32, tokens, GATED,
                GROUP, BIAS, RESIDUAL,
            )  # fmt: skip
    else:
        slices: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 32, 16])
        line = gl.num_programs(0) * TILES
        number = along * line + tile
        r = gl.arange(0, 64, gl.SliceLayout(1, slices))
        t = gl.arange(0, 32, gl.SliceLayout(0, slices))
        local = r[:, None] * 32 + t[None, :]
        size = gl.num_programs(1) * line * (64 * T)
        sums = partial + number * (64 * T)
        for i in gl.static_range(T // 32):
            gl.store(sums + part * size + i * 2048 + local, parts[i])
        gl.thread_barrier()
        if gl.atomic_add(counters + number, 1, sem="acq_rel") == SPLIT - 1:
            gl.store(counters + number, 0)
            for piece in range(T // 32):
                total = gl.zeros([64, 32], gl.float32, slices)
                for s in gl.static_range(SPLIT):
                    total += gl.load(sums + s * size + piece * 2048 + local, cache_modifier=".cg")
                _finish(
                    total, scale, bias, residual, y, first, width, along * T + piece * 32, tokens,
                    GATED, GROUP, BIAS, RESIDUAL,
                )  # fmt: skip


@gluon.jit
def _copy(
    x, ring, ready, free, place, K: gl.constexpr, T: gl.constexpr, SPLIT: gl.constexpr,
    STAGES: gl.constexpr, BITS: gl.constexpr,
):  # fmt: skip
    """What the warp does that copies x."""
    CHUNKS: gl.constexpr = K * BITS // 1024
    STEPS: gl.constexpr = (CHUNKS + SPLIT - 1) // SPLIT
    across, along, part = place
    first = part * STEPS * (16 // BITS)
    for count in range(gl.minimum(STEPS, CHUNKS - part * STEPS) * (16 // BITS)):
        slot = count % STAGES
        mbarrier.wait(free.index(slot), (count // STAGES & 1) ^ 1)
        mbarrier.expect(ready.index(slot), T * 128)
        tma.async_copy_global_to_shared(
            x, [along * T, (first + count) * 64], ready.index(slot), ring.index(slot)
        )


@gluon.jit(do_not_specialize=["tokens"])
def wide_int(
    x, weight, scale, shift, bias, residual, y, counters, partial, tokens, N,
    K: gl.constexpr, T: gl.constexpr, WARPGROUPS: gl.constexpr, SPLIT: gl.constexpr,
    STAGES: gl.constexpr, REGISTERS: gl.constexpr, BITS: gl.constexpr, GROUP: gl.constexpr,
    ZERO: gl.constexpr, GATED: gl.constexpr, BIAS: gl.constexpr, RESIDUAL: gl.constexpr,
    PDL: gl.constexpr, TILES: gl.constexpr = 1, MODE: gl.constexpr = 1,
):  # fmt: skip
    """A weight [N, chunks * 32 words] of whole chunks, times x, a descriptor of tiles [T, 64].

    Grid (tiles of N, tiles of tokens, SPLIT); a tile has WARPGROUPS times 64 rows, or gated 32
    pairs. GROUP 0 is a scale a row; ZERO as in ``gemv_int``. Unless SPLIT is 1: counters int32, a
    zero a warpgroup of a tile, and left so; partial float32 [SPLIT, tiles, WARPGROUPS, 64, T].
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    ring = gl.allocate_shared_memory(x.dtype, [STAGES, T, 64], x.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for s in gl.static_range(STAGES):
        mbarrier.init(ready.index(s), count=1)
        mbarrier.init(free.index(s), count=WARPGROUPS)
    place = (gl.program_id(0), gl.program_id(1), gl.program_id(2))
    if WARPGROUPS == 1:
        gl.warp_specialize([
            (_multiply, (0, ring, ready, free, weight, scale, shift, bias, residual, y, counters, partial, place, tokens, N, K, T, WARPGROUPS, SPLIT, STAGES, BITS, GROUP, ZERO, GATED, BIAS, RESIDUAL, TILES, MODE)),
            (_copy, (x, ring, ready, free, place, K, T, SPLIT, STAGES, BITS)),
        ], [1], [24])
    elif WARPGROUPS == 2:
        gl.warp_specialize([
            (_multiply, (0, ring, ready, free, weight, scale, shift, bias, residual, y, counters, partial, place, tokens, N, K, T, WARPGROUPS, SPLIT, STAGES, BITS, GROUP, ZERO, GATED, BIAS, RESIDUAL, TILES, MODE)),
            (_multiply, (1, ring, ready, free, weight, scale, shift, bias, residual, y, counters, partial, place, tokens, N, K, T, WARPGROUPS, SPLIT, STAGES, BITS, GROUP, ZERO, GATED, BIAS, RESIDUAL, TILES, MODE)),
            (_copy, (x, ring, ready, free, place, K, T, SPLIT, STAGES, BITS)),
        ], [4, 1], [REGISTERS, 24])
    else:
        gl.warp_specialize([
            (_multiply, (0, ring, ready, free, weight, scale, shift, bias, residual, y, counters, partial, place, tokens, N, K, T, WARPGROUPS, SPLIT, STAGES, BITS, GROUP, ZERO, GATED, BIAS, RESIDUAL, TILES, MODE)),
            (_multiply, (1, ring, ready, free, weight, scale, shift, bias, residual, y, counters, partial, place, tokens, N, K, T, WARPGROUPS, SPLIT, STAGES, BITS, GROUP, ZERO, GATED, BIAS, RESIDUAL, TILES, MODE)),
            (_multiply, (2, ring, ready, free, weight, scale, shift, bias, residual, y, counters, partial, place, tokens, N, K, T, WARPGROUPS, SPLIT, STAGES, BITS, GROUP, ZERO, GATED, BIAS, RESIDUAL, TILES, MODE)),
            (_multiply, (3, ring, ready, free, weight, scale, shift, bias, residual, y, counters, partial, place, tokens, N, K, T, WARPGROUPS, SPLIT, STAGES, BITS, GROUP, ZERO, GATED, BIAS, RESIDUAL, TILES, MODE)),
            (_copy, (x, ring, ready, free, place, K, T, SPLIT, STAGES, BITS)),
        ], [4, 4, 4, 1], [REGISTERS, REGISTERS, REGISTERS, 24])
