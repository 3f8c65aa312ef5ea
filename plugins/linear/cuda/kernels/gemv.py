"""GEMV kernels of Linear: up to four tokens, bound by the bytes of the weight.

A program computes ``RT`` tensors of ``BR`` rows each for all ``T`` tokens. Weights are read as
vectors of 16 bytes, ``[BR, Q, 2]`` int64, which ``tl.split`` takes apart inside a thread; every
other tensor of the loop is ``[BR, Q]``. So a thread reads just the elements of x that meet its
vectors, once for all ``RT`` rows, and no value crosses threads before the sums at the end.
``DEPTH`` vectors a row are in flight ahead of the products; with programmatic dependent launch
they are read before ``gdc_wait``, since no kernel of a step writes a weight.

``SUM`` experts of a token may take the place of one weight: a program then adds up the products of
its rows with all of them. The lanes are shared among the experts, so that the rows of all are on
their way at once.
"""

# ruff: noqa: RUF005 - Triton has no starred tuples

import triton
import triton.language as tl

from slipstream.plugins.gated_mlp.cuda_kernels import gate_up_of
from slipstream.plugins.linear.cuda.kernels.dot import float4, power


@triton.jit
def _begin_products(COMPILED: tl.constexpr):
    """Keeps the compiler from moving the loads before this behind the products after it.

    It would, to let a tile of weights take the registers of the one before; and then nothing would
    be in flight during the products. The interpreter has no instructions.
    """
    if COMPILED:
        tl.inline_asm_elementwise(
            "bar.warp.sync 0xffffffff; // $0", "=r", [], dtype=tl.int32, is_pure=False, pack=1
        )


@triton.jit
def _halves(vectors):
    """int64 [BR, Q, 2] to the int32 words [BR, Q] of its 16 bytes, in order."""
    first, second = tl.split(vectors)
    return (
        first.to(tl.int32),
        (first >> 32).to(tl.int32),
        second.to(tl.int32),
        (second >> 32).to(tl.int32),
    )


@triton.jit
def _pair(word, BF16: tl.constexpr):
    """The two 16-bit floats of an int32 word."""
    if BF16:
        low = (word << 16).to(tl.float32, bitcast=True)
        high = (word & -65536).to(tl.float32, bitcast=True)
    else:
        low = word.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        high = (word >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return (low, high)


@triton.jit
def _float8(word, NATIVE: tl.constexpr):
    """The four float8_e4m3 of an int32 word."""
    if NATIVE:
        floats = tl.inline_asm_elementwise(
            "{ .reg .b16 l, h, a, b, c, d; .reg .b32 p, q; mov.b32 {l, h}, $4;"
            "cvt.rn.f16x2.e4m3x2 p, l; cvt.rn.f16x2.e4m3x2 q, h;"
            "mov.b32 {a, b}, p; mov.b32 {c, d}, q;"
            "cvt.f32.f16 $0, a; cvt.f32.f16 $1, b; cvt.f32.f16 $2, c; cvt.f32.f16 $3, d; }",
            "=f,=f,=f,=f,r",
            [word],
            dtype=(tl.float32, tl.float32, tl.float32, tl.float32),
            is_pure=True,
            pack=1,
        )
    else:
        # A float16 with the same bits behind one more bit of exponent is 2**8 too small.
        up = word << 8
        even = _pair((up & -2147450880) | ((up >> 1) & 0x3F803F80), False)
        odd = _pair((word & -2147450880) | ((word >> 1) & 0x3F803F80), False)
        floats = (even[0] * 256.0, odd[0] * 256.0, even[1] * 256.0, odd[1] * 256.0)
    return floats


@triton.jit
def _weights(word, FP8: tl.constexpr, BF16: tl.constexpr, NATIVE: tl.constexpr):
    return _float8(word, NATIVE) if FP8 else _pair(word, BF16)


@triton.jit
def _row_numbers(BR: tl.constexpr, RT: tl.constexpr, GATED: tl.constexpr, N):
    """The rows [BR, 1] of each of a program's RT tensors: with GATED, gates and then ups."""
    R: tl.constexpr = RT // 2 if GATED else RT
    start = tl.program_id(0) * (BR * R) + tl.arange(0, BR)[:, None]
    rows = ()
    for r in tl.static_range(RT):
        if GATED:
            row = tl.minimum(start + (r % R) * BR, N // 2 - 1) + (r // R) * (N // 2)
        else:
            row = tl.minimum(start + r * BR, N - 1)
        rows = rows + (row,)
    return rows


@triton.jit
def _zeros(COUNT: tl.constexpr, BR: tl.constexpr, Q: tl.constexpr):
    out = ()
    for _ in tl.static_range(COUNT):
        out = out + (tl.zeros([BR, Q], tl.float32),)
    return out


@triton.jit
def _read_vectors(
    pointer, rows, first, lanes, VECTORS: tl.constexpr, RT: tl.constexpr, EVEN: tl.constexpr
):
    """Vectors ``first + lanes`` of each row tensor, int64 [BR, Q, 2]; zeros behind a row's end."""
    at = ((first + lanes) * 2)[:, :, None] + tl.arange(0, 2)[None, None, :]
    inside = first < VECTORS
    if not EVEN:
        inside = (first + lanes < VECTORS)[:, :, None]
    vectors = ()
    for r in tl.static_range(RT):
        begin = (rows[r].to(tl.int64) * (VECTORS * 2))[:, :, None]
        vectors = vectors + (tl.load(pointer + begin + at, mask=inside, other=0),)
    return vectors


@triton.jit
def _read_floats(
    pointer, row, first, lanes, VECTORS: tl.constexpr, COUNT: tl.constexpr, BF16: tl.constexpr,
    EVEN: tl.constexpr,
):  # fmt: skip
    """``8 * COUNT`` 16-bit floats of a row per lane, as float32 [BR, Q] each."""
    floats = ()
    for c in tl.static_range(COUNT):
        vector = row * VECTORS * COUNT + (first + lanes) * COUNT + c
        at = (vector * 2)[:, :, None] + tl.arange(0, 2)[None, None, :]
        if EVEN:
            words = _halves(tl.load(pointer + at))
        else:
            inside = (first + lanes < VECTORS)[:, :, None]
            words = _halves(tl.load(pointer + at, mask=inside, other=0))
        for i in tl.static_range(4):
            floats = floats + _pair(words[i], BF16)
    return floats


@triton.jit
def _read_x(
    x, gain, row, first, lanes, VECTORS: tl.constexpr, squares, T: tl.constexpr,
    COUNT: tl.constexpr, NORM: tl.constexpr, BF16: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """x of all tokens from a row on, times the norm's weight, in order (token, element); and sums
    of squares."""
    xs = ()
    if NORM:
        gains = _read_floats(gain, 0, first, lanes, VECTORS, COUNT, BF16, EVEN)
    more = ()
    for t in tl.static_range(T):
        floats = _read_floats(x, row + t, first, lanes, VECTORS, COUNT, BF16, EVEN)
        if NORM:
            square = squares[t]
            for v in tl.static_range(8 * COUNT):
                square += floats[v] * floats[v]
                xs = xs + (floats[v] * gains[v],)
            more = more + (square,)
        else:
            xs = xs + floats
    if NORM:
        squares = more
    return xs, squares


@triton.jit
def _read_ends(
    row_scale, bias, N, BR: tl.constexpr, RT: tl.constexpr, GATED: tl.constexpr,
    ROW_SCALE: tl.constexpr, BIAS: tl.constexpr, ids, factors, SUM: tl.constexpr,
):  # fmt: skip
    """Scales and biases of a program's rows, float32 [BR] for each of its tensors: with SUM one
    bias, of all experts.

    No cache has them: fetched when the sums are there, they would take as long as a short product.
    """
    R: tl.constexpr = RT // 2 if GATED else RT
    width = N // 2 if GATED else N
    scales = ()
    biases = ()
    for r in tl.static_range(RT):
        n = tl.program_id(0) * (BR * R) + (r % R) * BR + tl.arange(0, BR)
        inside = n < width
        n += (r // R) * width
        if ROW_SCALE:
            scales = scales + (tl.load(row_scale + n, mask=inside, other=0.0).to(tl.float32),)
        if BIAS and SUM:
            total = tl.zeros([BR], tl.float32)
            for k in tl.static_range(SUM):
                own = tl.load(bias + tl.load(ids + k) * N + n, mask=inside, other=0.0)
                total += own.to(tl.float32) * tl.load(factors + k)
            biases = biases + (total,)
        elif BIAS:
            biases = biases + (tl.load(bias + n, mask=inside, other=0.0).to(tl.float32),)
    return scales, biases


@triton.jit
def _read_residual(
    residual, N, T: tl.constexpr, BR: tl.constexpr, RT: tl.constexpr, GATED: tl.constexpr,
    RESIDUAL: tl.constexpr,
):  # fmt: skip
    """The residual of a program's rows [BR] for each token and tensor, or nothing."""
    R: tl.constexpr = RT // 2 if GATED else RT
    width = N // 2 if GATED else N
    found = ()
    if RESIDUAL:
        for t in tl.static_range(T):
            for r in tl.static_range(R):
                n = tl.program_id(0) * (BR * R) + r * BR + tl.arange(0, BR)
                found = found + (tl.load(residual + t * width + n, mask=n < width, other=0.0),)
    return found


@triton.jit
def _finish(
    sums, squares, y, ends, residuals, N, K: tl.constexpr, eps,
    T: tl.constexpr, BR: tl.constexpr, RT: tl.constexpr, GATED: tl.constexpr,
    ROW_SCALE: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, NORM: tl.constexpr,
    FACTOR: tl.constexpr,
):  # fmt: skip
    """Stores ``act(sums * FACTOR * rsqrt(mean square) * row scale + bias) + residual``."""
    R: tl.constexpr = RT // 2 if GATED else RT
    width = N // 2 if GATED else N
    scales, biases = ends
    for t in tl.static_range(T):
        inverse = FACTOR
        if NORM:
            inverse = FACTOR * tl.rsqrt(tl.sum(squares[t], axis=1) / K + eps)
        for r in tl.static_range(R):
            n = tl.program_id(0) * (BR * R) + r * BR + tl.arange(0, BR)
            value = tl.sum(sums[r * T + t], axis=1) * inverse
            if ROW_SCALE:
                value *= scales[r]
            if BIAS:
                value += biases[r]
            if GATED:
                up = tl.sum(sums[(r + R) * T + t], axis=1) * inverse
                if ROW_SCALE:
                    up *= scales[r + R]
                if BIAS:
                    up += biases[r + R]
                value = gate_up_of(value, up, GATED)
            if RESIDUAL:
                value += residuals[t * R + r].to(tl.float32)
            tl.store(y + t * width + n, value.to(y.dtype.element_ty), mask=n < width)


@triton.jit
def _of_experts(
    ids, factors, rows, lanes, N, LANES: tl.constexpr, RT: tl.constexpr, SUM: tl.constexpr
):
    """Of each lane: which of the SUM experts it multiplies, that one's rows in the weight, the lane
    among those of the expert, and the expert's factor, which is 0 for one that is none."""
    slots = lanes // LANES
    start = tl.load(ids + tl.minimum(slots, SUM - 1)) * N
    own = ()
    for r in tl.static_range(RT):
        own = own + (start + rows[r],)
    share = tl.load(factors + slots, mask=slots < SUM, other=0.0)
    return tl.minimum(slots, SUM - 1), own, lanes % LANES, share


@triton.jit
def _read_scales(scale, rows, first, lanes, K: tl.constexpr, RT: tl.constexpr):
    """The scale of the block of each lane's vector, float32 [BR, Q], for each row tensor."""
    blocks = (K + 127) >> 7
    block = tl.minimum((first + lanes) >> 3, blocks - 1)
    scales = ()
    for r in tl.static_range(RT):
        scales = scales + (tl.load(scale + (rows[r] >> 7) * blocks + block),)
    return scales


@triton.jit
def _read_shares(scale, rows, share, RT: tl.constexpr, SCALED: tl.constexpr):
    """What the sums of each lane are multiplied by: the factor of its expert, and if SCALED the
    scale of its row."""
    found = ()
    for r in tl.static_range(RT):
        if SCALED:
            found = found + (share * tl.load(scale + rows[r]).to(tl.float32),)
        else:
            found = found + (share,)
    return found


@triton.jit
def _shared(sums, shares, RT: tl.constexpr):
    """The sums of each lane times its share."""
    found = ()
    for r in tl.static_range(RT):
        found = found + (sums[r] * shares[r],)
    return found


@triton.jit
def gemv_float(
    x, weight, scale, bias, residual, gain, y, N, eps,
    K: tl.constexpr, VECTORS: tl.constexpr, T: tl.constexpr, BR: tl.constexpr, RT: tl.constexpr,
    Q: tl.constexpr, DEPTH: tl.constexpr,
    FP8: tl.constexpr, NATIVE: tl.constexpr, BF16: tl.constexpr, GATED: tl.constexpr,
    SCALE: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, NORM: tl.constexpr,
    EVEN: tl.constexpr, COMPILED: tl.constexpr, PDL: tl.constexpr, ids=None, factors=None,
    SUM: tl.constexpr = 0, SLOTS: tl.constexpr = 1,
):  # fmt: skip
    """A 16-bit or float8 weight [N, K]; SCALE is "none", "row" or "block" (of 128 x 128).

    x, gain and weight are read as int64; VECTORS is the number of 16-byte vectors in a row of the
    weight, EVEN that they are a multiple of DEPTH * Q, and BF16 the type of x (and of a 16-bit
    weight). NATIVE: the GPU converts float8. With SUM the products with the experts ids [SUM] of a
    weight [experts, N, K] are multiplied by factors float32 [SUM] and added up: x is [SUM, K], and
    T one; of the Q lanes each of SLOTS, SUM or more, has its share.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    V: tl.constexpr = 16 if FP8 else 8
    LANES: tl.constexpr = Q // SLOTS
    MORE: tl.constexpr = DEPTH * LANES < VECTORS  # than are in flight at the start
    BLOCKS: tl.constexpr = SCALE == "block"
    rows = _row_numbers(BR, RT, GATED, N)
    lanes = tl.zeros([BR, 1], tl.int32) + tl.arange(0, Q)[None, :]
    x_row = 0
    if SUM:
        x_row, rows, lanes, share = _of_experts(ids, factors, rows, lanes, N, LANES, RT, SUM)
    ahead = ()
    scales = ()
    for d in tl.static_range(DEPTH):
        ahead = ahead + _read_vectors(weight, rows, d * LANES, lanes, VECTORS, RT, EVEN)
        if BLOCKS:
            scales = scales + _read_scales(scale, rows, d * LANES, lanes, K, RT)
    if SUM:
        shares = _read_shares(scale, rows, share, RT, SCALE == "row")
    ends = _read_ends(
        scale, bias, N, BR, RT, GATED, SCALE == "row" and SUM == 0, BIAS, ids, factors, SUM
    )
    sums = _zeros(RT * T, BR, Q)
    squares = _zeros(T, BR, Q)
    if PDL:
        tl.extra.cuda.gdc_wait()
    residuals = _read_residual(residual, N, T, BR, RT, GATED, RESIDUAL)
    for base in range(0, VECTORS, DEPTH * LANES):
        next_ahead = ()
        next_scales = ()
        for d in tl.static_range(DEPTH):
            first = base + d * LANES
            later = first + DEPTH * LANES
            if MORE:
                next_ahead += _read_vectors(weight, rows, later, lanes, VECTORS, RT, EVEN)
            if MORE and BLOCKS:
                next_scales += _read_scales(scale, rows, later, lanes, K, RT)
            _begin_products(COMPILED)
            xs, squares = _read_x(
                x, gain, x_row, first, lanes, VECTORS, squares, T, V // 8, NORM, BF16, EVEN
            )
            added = ()
            for r in tl.static_range(RT):
                words = _halves(ahead[d * RT + r])
                floats = ()
                for i in tl.static_range(4):
                    floats = floats + _weights(words[i], FP8, BF16, NATIVE)
                for t in tl.static_range(T):
                    if BLOCKS:
                        part = floats[0] * xs[t * V]
                        for v in tl.static_range(1, V):
                            part += floats[v] * xs[t * V + v]
                        added = added + (sums[r * T + t] + part * scales[d * RT + r],)
                    else:
                        total = sums[r * T + t]
                        for v in tl.static_range(V):
                            total += floats[v] * xs[t * V + v]
                        added = added + (total,)
            sums = added
        if MORE:
            ahead = next_ahead
            scales = next_scales
    if SUM:
        sums = _shared(sums, shares, RT)
    _finish(
        sums, squares, y, ends, residuals, N, K, eps, T, BR, RT, GATED,
        SCALE == "row" and SUM == 0, BIAS, RESIDUAL, NORM, 1.0,
    )  # fmt: skip


# Codes of integers stay where they are in a word: read as a float32 they are denormal, and exact.
# So x is multiplied by powers of two that bring the products of every place to one size.
@triton.jit
def _code(word, i: tl.constexpr, BITS: tl.constexpr):
    """Code i of an unsigned word as a float32: times 2**-149 and 2**(its place)."""
    WHOLE: tl.constexpr = 20 // BITS  # codes that fit a mantissa
    if i >= WHOLE:
        word = word >> (WHOLE * BITS)
    PLACE: tl.constexpr = (i % WHOLE) * BITS
    return (word & (((1 << BITS) - 1) << PLACE)).to(tl.float32, bitcast=True)


@triton.jit
def _power(i: tl.constexpr, BITS: tl.constexpr, ZERO: tl.constexpr):
    """What x is multiplied by to meet code i: the products are then times 2**-64, or 2**-63 for
    float4, as whose scales the other 2**63 are."""
    if ZERO == "e2m1":
        return 2.0**63
    return 2.0 ** (85 - (i % (20 // BITS)) * BITS)


@triton.jit
def _read_four(pointer, i: tl.constexpr, inside, BF16: tl.constexpr, EVEN: tl.constexpr):
    """The four elements of x that meet code i of a lane's words, float32 [BR, Q] each."""
    if EVEN:
        both = tl.load(pointer + 8 * i)
    else:
        both = tl.load(pointer + 8 * i, mask=inside > 32 * i, other=0)
    return _pair(both.to(tl.int32), BF16) + _pair((both >> 32).to(tl.int32), BF16)


@triton.jit
def _read_groups(
    scale, shift, rows, first, lanes, K: tl.constexpr, RT: tl.constexpr,
    GROUP: tl.constexpr, COUNT: tl.constexpr, ZERO: tl.constexpr,
):  # fmt: skip
    """Scales, and zeros or offsets, of the COUNT groups of a lane's words, as they are stored: of
    float4, all in one int64."""
    scales = ()
    shifts = ()
    if ZERO == "e2m1":
        chunks = tl.cdiv(K, 256)
        chunk = tl.minimum((first + lanes) >> 3, chunks - 1)
        for r in tl.static_range(RT):
            scales = scales + (tl.load(scale + rows[r] * chunks + chunk),)
    elif GROUP:
        groups = K // GROUP
        for g in tl.static_range(COUNT):
            group = tl.minimum(((first + lanes) >> 3) * COUNT + g, groups - 1)
            for r in tl.static_range(RT):
                at = rows[r] * groups + group
                scales = scales + (tl.load(scale + at),)
                if ZERO != "midpoint":
                    shifts = shifts + (tl.load(shift + at),)
    return scales, shifts


@triton.jit
def gemv_int(
    x, weight, scale, shift, bias, residual, gain, y, N, eps,
    K: tl.constexpr, VECTORS: tl.constexpr, T: tl.constexpr, BR: tl.constexpr, RT: tl.constexpr,
    Q: tl.constexpr, DEPTH: tl.constexpr,
    BITS: tl.constexpr, GROUP: tl.constexpr, ZERO: tl.constexpr, BF16: tl.constexpr,
    GATED: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, NORM: tl.constexpr,
    EVEN: tl.constexpr, COMPILED: tl.constexpr, PDL: tl.constexpr, ids=None, factors=None,
    SUM: tl.constexpr = 0, SLOTS: tl.constexpr = 1,
):  # fmt: skip
    """A weight of groups [N, words]; GROUP 0 is a scale a row.

    ZERO "midpoint", "zero" (shift u8 [N, K/GROUP]) or "offset" (shift of the scales' type) for
    integers; "e2m1" for float4, whose scales are int64 [N, chunks], the exponents of a chunk in
    each. x, gain and weight are read as int64; VECTORS is the number of 16-byte vectors in a row,
    EVEN that they are a multiple of DEPTH * Q without padding. BF16 is the type of x. SUM is as in
    ``gemv_float``.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    CODES: tl.constexpr = 32 // BITS  # of a word
    CHUNK: tl.constexpr = 32 * CODES  # elements that eight lanes share
    PER_GROUP: tl.constexpr = GROUP // 32 if GROUP else CODES  # codes of a word in one group
    COUNT: tl.constexpr = CODES // PER_GROUP
    LANES: tl.constexpr = Q // SLOTS
    MORE: tl.constexpr = DEPTH * LANES < VECTORS  # than are in flight at the start
    rows = _row_numbers(BR, RT, GATED, N)
    lanes = tl.zeros([BR, 1], tl.int32) + tl.arange(0, Q)[None, :]
    x_row = 0
    if SUM:
        x_row, rows, lanes, share = _of_experts(ids, factors, rows, lanes, N, LANES, RT, SUM)
    ahead = ()
    scales = ()
    shifts = ()
    for d in tl.static_range(DEPTH):
        ahead = ahead + _read_vectors(weight, rows, d * LANES, lanes, VECTORS, RT, EVEN)
        new_scales, new_shifts = _read_groups(
            scale, shift, rows, d * LANES, lanes, K, RT, GROUP, COUNT, ZERO
        )
        scales = scales + new_scales
        shifts = shifts + new_shifts
    if SUM:
        shares = _read_shares(scale, rows, share, RT, GROUP == 0)
    ends = _read_ends(
        scale, bias, N, BR, RT, GATED, GROUP == 0 and SUM == 0, BIAS, ids, factors, SUM
    )
    sums = _zeros(RT * T, BR, Q)
    squares = _zeros(T, BR, Q)
    if PDL:
        tl.extra.cuda.gdc_wait()
    residuals = _read_residual(residual, N, T, BR, RT, GATED, RESIDUAL)
    for base in range(0, VECTORS, DEPTH * LANES):
        next_ahead = ()
        next_scales = ()
        next_shifts = ()
        for d in tl.static_range(DEPTH):
            first = base + d * LANES
            later = first + DEPTH * LANES
            if MORE:
                next_ahead += _read_vectors(weight, rows, later, lanes, VECTORS, RT, EVEN)
                new_scales, new_shifts = _read_groups(
                    scale, shift, rows, later, lanes, K, RT, GROUP, COUNT, ZERO
                )
                next_scales = next_scales + new_scales
                next_shifts = next_shifts + new_shifts
            _begin_products(COMPILED)
            words = ()
            for r in tl.static_range(RT):
                words = words + _halves(ahead[d * RT + r])
            vector = first + lanes
            at = (vector >> 3) * (CHUNK // 4) + (vector & 7)
            inside = K - at * 4  # elements of the row from a lane's first on
            for g in tl.static_range(COUNT):
                parts = _zeros(RT * T, BR, Q)
                totals = _zeros(T, BR, Q)  # of x, for zero points and offsets
                for j in tl.static_range(PER_GROUP):
                    if NORM:
                        gains = _read_four(gain + at, g * PER_GROUP + j, inside, BF16, EVEN)
                    xs = ()
                    newer_totals = ()
                    newer_squares = ()
                    for t in tl.static_range(T):
                        floats = _read_four(
                            x + (x_row + t) * (K // 4) + at, g * PER_GROUP + j, inside, BF16, EVEN
                        )
                        square = squares[t]
                        total = totals[t]
                        for v in tl.static_range(4):
                            value = floats[v]
                            if NORM:
                                square += value * value
                                value = value * gains[v]
                            total += value
                            xs = xs + (value * _power(g * PER_GROUP + j, BITS, ZERO),)
                        newer_totals = newer_totals + (total,)
                        newer_squares = newer_squares + (square,)
                    totals = newer_totals
                    squares = newer_squares
                    newer = ()
                    for r in tl.static_range(RT):
                        codes = ()
                        for v in tl.static_range(4):
                            word = words[r * 4 + v].to(tl.uint32, bitcast=True)
                            if ZERO == "e2m1":
                                codes = codes + (float4(words[r * 4 + v], g * PER_GROUP + j),)
                            else:
                                codes = codes + (_code(word, g * PER_GROUP + j, BITS),)
                        for t in tl.static_range(T):
                            part = parts[r * T + t]
                            for v in tl.static_range(4):
                                part += codes[v] * xs[t * 4 + v]
                            newer = newer + (part,)
                    parts = newer
                added = ()
                for r in tl.static_range(RT):
                    zero = 2.0 ** (BITS - 1)
                    if ZERO == "e2m1":
                        factor = power((scales[d * RT + r] >> (8 * g)).to(tl.int32))
                    elif GROUP:
                        factor = scales[(d * COUNT + g) * RT + r].to(tl.float32)
                    if ZERO == "zero" or ZERO == "offset":
                        zero = shifts[(d * COUNT + g) * RT + r].to(tl.float32)
                    for t in tl.static_range(T):
                        value = parts[r * T + t]
                        if ZERO == "midpoint" or ZERO == "zero":
                            value -= (totals[t] * 2.0**-64) * zero
                        if GROUP:
                            value = value * factor
                        if ZERO == "offset":
                            value += (totals[t] * 2.0**-64) * zero
                        added = added + (sums[r * T + t] + value,)
                sums = added
        if MORE:
            ahead = next_ahead
            scales = next_scales
            shifts = next_shifts
    if SUM:
        sums = _shared(sums, shares, RT)
    _finish(
        sums, squares, y, ends, residuals, N, K, eps, T, BR, RT, GATED,
        GROUP == 0 and not SUM, BIAS, RESIDUAL, NORM, 1.0 if ZERO == "e2m1" else 2.0**64,
    )  # fmt: skip
