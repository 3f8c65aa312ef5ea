"""The kernels of sampling. Rows are logits rows; a row whose slot is -1 is skipped by all of them.

Logits are compared as int32 keys that order like them (``_key``), so that a threshold is found
exactly by bisection. A row of V logits is cut into blocks of BLOCK, and those into groups of GROUP
whose maxima tell where the large logits are without reading the others again.

    greedy   argmax_kernel                  block maxima
             argmax_combine_kernel          token
    in parts argmax_kernel                  block maxima of a part of the vocabulary
             argmax_part_kernel             the best of the part
             argmax_combine_kernel          token, from those of all parts
    sample   scan_kernel                    block and group maxima, group sums of exp
             bound_kernel                   a bound that no survivor is below
             collect_kernel                 the tokens above it, or noisy block maxima
             select_kernel                  exact threshold, draw, token
    full     mask_kernel, edit_kernel       edited logits; then the four of "sample"
             rank_kernel, logprobs_kernel   of the model's own logits
"""

import triton
import triton.language as tl

from slipstream.plugins import sampling
from slipstream.plugins.cuda.kernels import begin

SLOT = tl.constexpr(int(sampling.Field.SLOT))
POSITION = tl.constexpr(int(sampling.Field.POSITION))
SEED_LOW = tl.constexpr(int(sampling.Field.SEED_LOW))
SEED_HIGH = tl.constexpr(int(sampling.Field.SEED_HIGH))
TEMPERATURE = tl.constexpr(int(sampling.Field.TEMPERATURE))
TOP_K = tl.constexpr(int(sampling.Field.TOP_K))
TOP_P = tl.constexpr(int(sampling.Field.TOP_P))
MIN_P = tl.constexpr(int(sampling.Field.MIN_P))
FLAGS = tl.constexpr(int(sampling.Field.FLAGS))
NUM_BIASES = tl.constexpr(int(sampling.Field.NUM_BIASES))
NUM_LOGPROBS = tl.constexpr(int(sampling.Field.NUM_LOGPROBS))
MASK = tl.constexpr(int(sampling.Field.MASK))
PROMPT_LEN = tl.constexpr(int(sampling.Field.PROMPT_LEN))
REPETITION_PENALTY = tl.constexpr(int(sampling.Field.REPETITION_PENALTY))
PRESENCE_PENALTY = tl.constexpr(int(sampling.Field.PRESENCE_PENALTY))
FREQUENCY_PENALTY = tl.constexpr(int(sampling.Field.FREQUENCY_PENALTY))
MASKED = tl.constexpr(sampling.MASKED)
PENALIZES = tl.constexpr(sampling.PENALIZES)
LOGPROBS = tl.constexpr(sampling.LOGPROBS)
BROKEN = tl.constexpr(sampling.BROKEN)
RANK_COLUMN = tl.constexpr(sampling.RANK_COLUMN)
LOGPROB_COLUMN = tl.constexpr(sampling.LOGPROB_COLUMN)
TOP_IDS_COLUMN = tl.constexpr(sampling.TOP_IDS_COLUMN)
TOP_VALUES_COLUMN = tl.constexpr(sampling.TOP_VALUES_COLUMN)
LOGPROB_COLUMNS = tl.constexpr(sampling.LOGPROB_COLUMNS)

INF = tl.constexpr(float("inf"))
# Keys of +inf, of -inf, and of the least finite number.
KEY_INF = tl.constexpr(0x7F800000)
KEY_MINUS_INF = tl.constexpr(-0x7F800001)
KEY_LEAST = tl.constexpr(-0x7F800000)
NO_ID = tl.constexpr(0x7FFFFFFF)
# Below (key << 32 | id) of every token.
NOTHING = tl.constexpr(-(1 << 63))

# What bound_kernel leaves of a row. Integers: the least key to collect and to draw from directly
# (KEY_INF: none), and how many were collected. Floats: peak, sum of exp, least logit for min-p.
COLLECT = tl.constexpr(0)
DIRECT = tl.constexpr(1)
COUNT = tl.constexpr(2)
PEAK = tl.constexpr(0)
TOTAL = tl.constexpr(1)
FLOOR = tl.constexpr(2)
STATE = tl.constexpr(4)

# Weights of tokens are summed as integers, which no order of summing changes.
MASS_ONE = tl.constexpr(float(2**44))
# In a count of a token: it occurs in the prompt. The bits below count it in the output.
IN_PROMPT = tl.constexpr(1 << 30)
# The power of two that no list of the likeliest tokens is longer than.
PLACES = tl.constexpr(32)


@triton.jit
def _int(settings, settings_stride, FIELD: tl.constexpr, row):
    return tl.load(settings + FIELD * settings_stride + row)


@triton.jit
def _float(settings, settings_stride, FIELD: tl.constexpr, row):
    return tl.load(settings + FIELD * settings_stride + row).to(tl.float32, bitcast=True)


@triton.jit
def _load(source, offsets, vocab):
    """Logits, with -inf behind the vocabulary and +inf for NaN, which must not go unnoticed."""
    values = tl.load(source + offsets, mask=offsets < vocab, other=-INF)
    return tl.where(values != values, INF, values)


@triton.jit
def _key(values):
    bits = tl.where(values == 0, 0.0, values).to(tl.int32, bitcast=True)  # -0 equals 0
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _value(key):
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _is_finite(value):
    return (value < INF) & (value > -INF)


@triton.jit
def _edits(flags, num_biases):
    return ((flags & (MASKED | PENALIZES)) != 0) | (num_biases > 0)


@triton.jit
def _source(logits, stride, edited, vocab, settings, settings_stride, row, FULL: tl.constexpr):
    """The row's logits: the edited copy if there are edits."""
    source = logits + row.to(tl.int64) * stride
    if FULL:
        flags = _int(settings, settings_stride, FLAGS, row)
        if _edits(flags, _int(settings, settings_stride, NUM_BIASES, row)):
            source = edited + row.to(tl.int64) * vocab
    return source


@triton.jit
def _random_words(blocks, position, seed_low, seed_high):
    """Philox4x32-10 at counter (block, position, 0, 0): four words for each of ``blocks``."""
    c0 = blocks.to(tl.uint32)
    c1 = tl.zeros_like(c0) + position.to(tl.uint32)
    c2 = tl.zeros_like(c0)
    c3 = tl.zeros_like(c0)
    k0 = tl.zeros_like(c0) + seed_low.to(tl.uint32)
    k1 = tl.zeros_like(c0) + seed_high.to(tl.uint32)
    for _ in tl.static_range(10):
        first = c0.to(tl.uint64) * 0xD2511F53
        second = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (second >> 32).to(tl.uint32) ^ c1 ^ k0
        c1 = second.to(tl.uint32)
        c2 = (first >> 32).to(tl.uint32) ^ c3 ^ k1
        c3 = first.to(tl.uint32)
        k0 += 0x9E3779B9
        k1 += 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def _log_exponential(words):
    """log(E) of exponential numbers E = -log(1 - v), v = (word + 1/2) / 2**32.

    The smallest E decide, so they are computed from v without the loss of 1 - v.
    """
    v = (words.to(tl.float32) + 0.5) * 2.3283064365386963e-10
    rest = ((words ^ 0xFFFFFFFF).to(tl.float32) + 0.5) * 2.3283064365386963e-10
    small = v * (1 + v * (0.5 + v * (0.3333333333 + v * 0.25)))
    return tl.log(tl.where(v < 0.01, small, -tl.log(rest)))


@triton.jit
def _log_noise_of_tile(start, position, seed_low, seed_high, SIZE: tl.constexpr):
    """Noise of the tokens from ``start`` (a multiple of 4), four from one block of words."""
    blocks = start // 4 + tl.arange(0, SIZE // 4)
    w0, w1, w2, w3 = _random_words(blocks, position, seed_low, seed_high)
    words = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), [SIZE])
    return _log_exponential(words)


@triton.jit
def _log_noise_of(ids, position, seed_low, seed_high):
    """Noise of tokens in any order."""
    w0, w1, w2, w3 = _random_words(ids >> 2, position, seed_low, seed_high)
    lane = ids & 3
    words = tl.where(lane < 2, tl.where(lane == 0, w0, w1), tl.where(lane == 2, w2, w3))
    return _log_exponential(words)


@triton.jit
def _best(values, ids):
    """Largest value and the smallest id that has it."""
    best = tl.max(values)
    return best, tl.min(tl.where(values == best, ids, NO_ID))


@triton.jit
def _kth_largest(keys, k, low, high):
    """The largest key in [low, high] that k of ``keys`` reach; ``low`` if fewer reach any."""
    while low < high:
        middle = (low | high) - ((low ^ high) >> 1)  # the mean, rounded up, without overflow
        enough = tl.sum((keys >= middle).to(tl.int32)) >= k
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle - 1)
    return low


@triton.jit
def _write_token(token, broken, row, slot, tokens, last_tokens):
    tl.store(tokens + row, tl.where(broken, BROKEN, token))
    tl.store(last_tokens + slot, tl.where(broken, 0, token))


@triton.jit
def normalizer_kernel(logits, stride, vocab, normalizers, BLOCK: tl.constexpr):
    """The log of the sum of the exponentials of a row, NaN if the largest is not finite; grid
    (rows)."""
    source = logits + tl.program_id(0).to(tl.int64) * stride
    ids = tl.arange(0, BLOCK)
    largest = tl.full([BLOCK], -INF, tl.float32)
    for start in range(0, vocab, BLOCK):
        largest = tl.maximum(largest, _load(source, start + ids, vocab))
    peak = tl.max(largest)
    finite = _is_finite(peak)
    peak = tl.where(finite, peak, 0.0)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, vocab, BLOCK):
        total += tl.exp(_load(source, start + ids, vocab) - peak)
    total = tl.where(finite, tl.sum(total), 1.0)
    normalizer = tl.where(finite, peak + tl.log(total), float("nan"))
    tl.store(normalizers + tl.program_id(0), normalizer)


@triton.jit
def argmax_kernel(
    logits,
    stride,
    vocab,
    settings,
    settings_stride,
    block_max,
    block_id,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Largest logit and its id of every block; grid (blocks, rows). Without settings, of padding
    too."""
    begin(PDL)
    block = tl.program_id(0)
    row = tl.program_id(1)
    if settings is not None:  # noqa: SIM102 - decided when it is compiled
        if _int(settings, settings_stride, SLOT, row) < 0:
            return
    ids = block * BLOCK + tl.arange(0, BLOCK)
    best, best_id = _best(_load(logits + row.to(tl.int64) * stride, ids, vocab), ids)
    tl.store(block_max + row * tl.num_programs(0) + block, best)
    tl.store(block_id + row * tl.num_programs(0) + block, best_id)


@triton.jit
def _best_of_many(values, ids, row, count, STEP: tl.constexpr, MANY: tl.constexpr):
    """The best of ``count`` values of a row and its id, each STEP numbers behind the one before."""
    index = tl.arange(0, MANY)
    inside = index < count
    at = (row * count + index) * STEP
    found = tl.load(values + at, mask=inside, other=-INF)
    return _best(found, tl.load(ids + at, mask=inside, other=NO_ID))


@triton.jit
def argmax_combine_kernel(
    settings,
    settings_stride,
    values,
    ids,
    count,
    tokens,
    last_tokens,
    STEP: tl.constexpr,
    MANY: tl.constexpr,
    PDL: tl.constexpr,
):
    """The token of a greedy row from its blocks, or from the best of all parts; grid (rows)."""
    begin(PDL)
    row = tl.program_id(0)
    slot = _int(settings, settings_stride, SLOT, row)
    if slot < 0:
        return
    best, best_id = _best_of_many(values, ids, row, count, STEP, MANY)
    _write_token(best_id, not _is_finite(best), row, slot, tokens, last_tokens)


@triton.jit(do_not_specialize=["first"])
def argmax_part_kernel(
    values, ids, count, first, best_values, best_ids, MANY: tl.constexpr, PDL: tl.constexpr
):
    """The best of a part of the vocabulary, which begins at token ``first``, from its blocks; grid
    (rows)."""
    begin(PDL)
    row = tl.program_id(0)
    best, best_id = _best_of_many(values, ids, row, count, 1, MANY)
    tl.store(best_values + row * 2, best)
    tl.store(best_ids + row * 2, best_id + first)


@triton.jit
def scan_kernel(
    logits,
    stride,
    vocab,
    settings,
    settings_stride,
    edited,
    counts,
    block_max,
    block_id,
    group_max,
    group_sum,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    FULL: tl.constexpr,
    PDL: tl.constexpr,
):
    """Penalties, then maxima of blocks and groups and sums of exp of groups; grid (blocks, rows).

    The sum of a group is relative to its maximum, and computed only for rows with top-p alone.
    """
    begin(PDL)
    block = tl.program_id(0)
    row = tl.program_id(1)
    if _int(settings, settings_stride, SLOT, row) < 0:
        return
    groups = tl.arange(0, BLOCK // GROUP)
    ids = block * BLOCK + groups[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    source = _source(logits, stride, edited, vocab, settings, settings_stride, row, FULL)
    x = _load(source, ids, vocab)
    if FULL:  # noqa: SIM102 - decided when it is compiled
        if (_int(settings, settings_stride, FLAGS, row) & PENALIZES) != 0:
            inside = ids < vocab
            start = row.to(tl.int64) * vocab
            count = tl.load(counts + start + ids, mask=inside, other=0)
            x = _penalize(x, count, settings, settings_stride, row)
            tl.store(edited + start + ids, x, mask=inside)
    peaks = tl.max(x, 1)
    best = tl.max(peaks)
    at = row * tl.num_programs(0) + block
    tl.store(block_max + at, best)
    tl.store(block_id + at, tl.min(tl.min(tl.where(x == best, ids, NO_ID), 1)))
    tl.store(group_max + at * (BLOCK // GROUP) + groups, peaks)
    temperature = _float(settings, settings_stride, TEMPERATURE, row)
    nucleus = _float(settings, settings_stride, TOP_P, row) < 1
    if (temperature > 0) & nucleus & (_int(settings, settings_stride, TOP_K, row) == 0):
        base = tl.where(_is_finite(peaks), peaks, 0.0)  # the peak, where it can be subtracted
        powers = tl.exp((x - base[:, None]) * (1 / temperature))
        tl.store(group_sum + at * (BLOCK // GROUP) + groups, tl.sum(powers, 1))


@triton.jit
def _penalize(x, count, settings, settings_stride, row):
    repetition = _float(settings, settings_stride, REPETITION_PENALTY, row)
    presence = _float(settings, settings_stride, PRESENCE_PENALTY, row)
    frequency = _float(settings, settings_stride, FREQUENCY_PENALTY, row)
    repeated = tl.where(x > 0, tl.div_rn(x, tl.zeros_like(x) + repetition), x * repetition)
    x = tl.where(count != 0, repeated, x)
    spoken = count & (IN_PROMPT - 1)
    return tl.where(spoken != 0, x - (frequency * spoken.to(tl.float32) + presence), x)


@triton.jit
def bound_kernel(
    settings,
    settings_stride,
    group_max,
    group_sum,
    num_groups,
    state_int,
    state_float,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    PDL: tl.constexpr,
):
    """Where the survivors of a row begin at the lowest; grid (rows).

    With top-k, the k-th largest group maximum. With top-p alone, a logit that the tokens below
    have at most a share of 1 - p. Otherwise min-p says it exactly, and the row is drawn directly.
    """
    begin(PDL)
    row = tl.program_id(0)
    if _int(settings, settings_stride, SLOT, row) < 0:
        return
    index = tl.arange(0, GROUPS)
    inside = index < num_groups
    start = row * num_groups
    peaks = tl.load(group_max + start + index, mask=inside, other=-INF)
    peak = tl.max(peaks)
    temperature = _float(settings, settings_stride, TEMPERATURE, row)
    top_k = _int(settings, settings_stride, TOP_K, row)
    top_p = _float(settings, settings_stride, TOP_P, row)
    min_p = _float(settings, settings_stride, MIN_P, row)
    floor = tl.where(min_p > 0, peak + temperature * tl.log(tl.maximum(min_p, 1e-30)), -INF)
    floor_key = tl.maximum(_key(floor), KEY_LEAST)
    collect = tl.full((), KEY_INF, tl.int32)
    direct = tl.full((), KEY_INF, tl.int32)
    total = tl.full((), 0.0, tl.float32)
    if (temperature > 0) & _is_finite(peak):
        if top_k > 0:
            collect = _kth_largest(_key(peaks), top_k, collect * 0 + KEY_LEAST, _key(peak))
            collect = tl.where(top_p < 1, collect, tl.maximum(collect, floor_key))
        elif top_p < 1:
            distance = (peaks - peak) * (1 / temperature)
            sums = tl.load(group_sum + start + index, mask=inside, other=0.0)
            total, edge = _nucleus_bound(distance, sums, top_p, GROUP)
            lowest = tl.where(edge == -INF, -INF, peak + edge * temperature)
            collect = tl.maximum(tl.maximum(_key(lowest), KEY_LEAST), floor_key)
        else:
            direct = floor_key
    tl.store(state_int + row * STATE + COLLECT, collect)
    tl.store(state_int + row * STATE + DIRECT, direct)
    tl.store(state_int + row * STATE + COUNT, 0)
    tl.store(state_float + row * STATE + PEAK, peak)
    tl.store(state_float + row * STATE + TOTAL, total)
    tl.store(state_float + row * STATE + FLOOR, floor)


@triton.jit
def _nucleus_bound(distance, sums, top_p, GROUP: tl.constexpr):
    """Sum of exp of the row, and a scaled distance from the peak below which at most the share
    1 - p of it lies (-inf if none was found).

    Below ``edge``, a group holds at most its sum without its maximum (if that is above), and at
    most GROUP tokens at the edge.
    """
    heads = tl.exp(distance)
    masses = sums * heads
    total = tl.sum(masses)
    budget = (1 - top_p) * total - 1e-5 * total  # less what rounding may have added
    low = total * 0 - 64.0
    high = total * 0
    for _ in range(14):
        edge = 0.5 * (low + high)
        rest = tl.where(distance >= edge, masses - heads, masses)
        spare = tl.sum(tl.minimum(rest, GROUP * tl.exp(edge))) <= budget
        low = tl.where(spare, edge, low)
        high = tl.where(spare, high, edge)
    return total, tl.where(low > -64.0, low - 0.01, -INF)


@triton.jit
def collect_kernel(
    logits,
    stride,
    vocab,
    settings,
    settings_stride,
    edited,
    block_max,
    block_id,
    group_max,
    state_int,
    state_float,
    candidate_values,
    candidate_ids,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    CANDIDATES: tl.constexpr,
    FULL: tl.constexpr,
    PDL: tl.constexpr,
):
    """List the tokens from the bound on, or replace the maxima of blocks by noisy ones; grid
    (blocks, rows).

    The list is in no order. A row with more than CANDIDATES has their number only.
    """
    begin(PDL)
    block = tl.program_id(0)
    row = tl.program_id(1)
    if _int(settings, settings_stride, SLOT, row) < 0:
        return
    collect = tl.load(state_int + row * STATE + COLLECT)
    direct = tl.load(state_int + row * STATE + DIRECT)
    lowest = tl.minimum(collect, direct)
    if lowest == KEY_INF:
        return
    groups = tl.arange(0, BLOCK // GROUP)
    at = row * tl.num_programs(0) + block
    # Groups that lie below the bound are not read again.
    peaks = tl.load(group_max + at * (BLOCK // GROUP) + groups)
    source = _source(logits, stride, edited, vocab, settings, settings_stride, row, FULL)
    offsets = block * BLOCK + groups[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    inside = (offsets < vocab) & (_key(peaks) >= lowest)[:, None]
    x = tl.reshape(tl.load(source + offsets, mask=inside, other=-INF), [BLOCK])
    ids = block * BLOCK + tl.arange(0, BLOCK)
    wanted = _key(x) >= lowest
    if direct < KEY_INF:
        scale = 1 / _float(settings, settings_stride, TEMPERATURE, row)
        peak = tl.load(state_float + row * STATE + PEAK)
        position = _int(settings, settings_stride, POSITION, row)
        seed_low = _int(settings, settings_stride, SEED_LOW, row)
        seed_high = _int(settings, settings_stride, SEED_HIGH, row)
        noise = _log_noise_of_tile(block * BLOCK, position, seed_low, seed_high, BLOCK)
        best, best_id = _best(tl.where(wanted, (x - peak) * scale - noise, -INF), ids)
        tl.store(block_max + at, best)
        tl.store(block_id + at, best_id)
    else:
        found = tl.sum(wanted.to(tl.int32))
        if found > 0:
            first = tl.atomic_add(state_int + row * STATE + COUNT, found, sem="relaxed")
            place = first + tl.cumsum(wanted.to(tl.int32), 0) - 1
            listed = wanted & (place < CANDIDATES)
            tl.store(candidate_values + row * CANDIDATES + place, x, mask=listed)
            tl.store(candidate_ids + row * CANDIDATES + place, ids, mask=listed)


@triton.jit
def select_kernel(
    logits,
    stride,
    vocab,
    settings,
    settings_stride,
    edited,
    block_max,
    block_id,
    num_blocks,
    state_int,
    state_float,
    candidate_values,
    candidate_ids,
    tokens,
    last_tokens,
    thresholds,
    history,
    history_stride,
    BLOCKS: tl.constexpr,
    CANDIDATES: tl.constexpr,
    TILE: tl.constexpr,
    FULL: tl.constexpr,
    PDL: tl.constexpr,
):
    """The exact threshold of a row and its token; grid (rows)."""
    begin(PDL)
    row = tl.program_id(0)
    slot = _int(settings, settings_stride, SLOT, row)
    if slot < 0:
        return
    collect = tl.load(state_int + row * STATE + COLLECT)
    count = tl.load(state_int + row * STATE + COUNT)
    peak = tl.load(state_float + row * STATE + PEAK)
    total = tl.load(state_float + row * STATE + TOTAL)
    floor = tl.load(state_float + row * STATE + FLOOR)
    top_k = _int(settings, settings_stride, TOP_K, row)
    top_p = _float(settings, settings_stride, TOP_P, row)
    position = _int(settings, settings_stride, POSITION, row)
    seed_low = _int(settings, settings_stride, SEED_LOW, row)
    seed_high = _int(settings, settings_stride, SEED_HIGH, row)
    threshold = tl.maximum(_key(floor), KEY_LEAST)
    if collect == KEY_INF:  # the blocks have it
        index = tl.arange(0, BLOCKS)
        inside = index < num_blocks
        values = tl.load(block_max + row * num_blocks + index, mask=inside, other=-INF)
        ids = tl.load(block_id + row * num_blocks + index, mask=inside, other=NO_ID)
        _, token = _best(values, ids)
    elif count <= CANDIDATES:
        scale = 1 / _float(settings, settings_stride, TEMPERATURE, row)
        index = tl.arange(0, CANDIDATES)
        inside = index < count
        x = tl.load(candidate_values + row * CANDIDATES + index, mask=inside, other=-INF)
        ids = tl.load(candidate_ids + row * CANDIDATES + index, mask=inside, other=NO_ID)
        exact = _threshold_of_list(x, peak, scale, total, collect, top_k, top_p)
        threshold = tl.maximum(threshold, exact)
        score = (x - peak) * scale - _log_noise_of(ids, position, seed_low, seed_high)
        _, token = _best(tl.where(_key(x) >= threshold, score, -INF), ids)
    else:
        scale = 1 / _float(settings, settings_stride, TEMPERATURE, row)
        source = _source(logits, stride, edited, vocab, settings, settings_stride, row, FULL)
        exact = _threshold_of_row(source, vocab, peak, scale, total, collect, top_k, top_p, TILE)
        threshold = tl.maximum(threshold, exact)
        token = _draw_from_row(
            source, vocab, peak, scale, threshold, position, seed_low, seed_high, TILE
        )
    _write_token(token, not _is_finite(peak), row, slot, tokens, last_tokens)
    tl.store(thresholds + row, _value(threshold))
    if FULL:  # noqa: SIM102 - decided when it is compiled
        if (_int(settings, settings_stride, FLAGS, row) & PENALIZES) != 0:
            known = _int(settings, settings_stride, PROMPT_LEN, row) + position
            place = history + slot.to(tl.int64) * history_stride + known
            tl.store(place, token, mask=(known < history_stride) & _is_finite(peak))


@triton.jit
def _threshold_of_list(x, peak, scale, total, low, top_k, top_p):
    """The least key that survives top-k and top-p, from all logits ``x`` whose key reaches
    ``low``; ``total`` is the sum of exp of the whole row, needed without top-k."""
    keys = _key(x)
    high = _key(peak)
    if top_k > 0:
        low = _kth_largest(keys, top_k, low, high)
    if top_p < 1:
        mass = (tl.exp((x - peak) * scale) * MASS_ONE).to(tl.int64)
        mass = tl.where(keys >= low, mass, 0)
        whole = tl.where(top_k > 0, tl.sum(mass).to(tl.float32), total * MASS_ONE)
        target = (whole * top_p).to(tl.int64)
        while low < high:
            middle = (low | high) - ((low ^ high) >> 1)
            enough = tl.sum(tl.where(keys >= middle, mass, 0)) >= target
            low = tl.where(enough, middle, low)
            high = tl.where(enough, high, middle - 1)
    return low


@triton.jit
def _threshold_of_row(source, vocab, peak, scale, total, low, top_k, top_p, TILE: tl.constexpr):
    """As ``_threshold_of_list`` for a row with too many candidates to list, from memory."""
    high = _key(peak)
    if top_k > 0:
        low = _bisect_row(source, vocab, peak, scale, low, high, top_k.to(tl.float32), True, TILE)
    if top_p < 1:
        whole = total
        if top_k > 0:
            pivots = tl.zeros((8,), tl.int32) + low
            whole = tl.max(_reach(source, vocab, peak, scale, pivots, False, TILE))
        low = _bisect_row(source, vocab, peak, scale, low, high, whole * top_p, False, TILE)
    return low


@triton.jit
def _bisect_row(
    source, vocab, peak, scale, low, high, target, COUNT_TOKENS: tl.constexpr, TILE: tl.constexpr
):
    """The largest key in [low, high] such that the tokens which reach it have at least ``target``
    (tokens, or sum of exp); ``low`` if there is none. Every pass over the row tries eight."""
    order = tl.arange(0, 8)
    while low < high:
        step = (high.to(tl.int64) - low.to(tl.int64)) // 8 + 1
        pivots = low.to(tl.int64) + step * (order + 1)
        tried = tl.minimum(pivots, high.to(tl.int64)).to(tl.int32)
        reach = _reach(source, vocab, peak, scale, tried, COUNT_TOKENS, TILE)
        enough = (reach >= target) & (pivots <= high.to(tl.int64))
        passed = tl.sum(enough.to(tl.int32)).to(tl.int64)
        last = low.to(tl.int64) + step * (passed + 1) - 1
        high = tl.minimum(high.to(tl.int64), last).to(tl.int32)
        low = (low.to(tl.int64) + step * passed).to(tl.int32)
    return low


@triton.jit
def _reach(source, vocab, peak, scale, pivots, COUNT_TOKENS: tl.constexpr, TILE: tl.constexpr):
    """How many tokens reach each of 8 ``pivots``, or their sum of exp."""
    sums = tl.zeros((8, TILE), tl.float32)
    start = vocab * 0
    while start < vocab:
        x = _load(source, start + tl.arange(0, TILE), vocab)
        weight = tl.zeros_like(x) + 1 if COUNT_TOKENS else tl.exp((x - peak) * scale)
        sums += tl.where(_key(x)[None, :] >= pivots[:, None], weight[None, :], 0.0)
        start += TILE
    return tl.sum(sums, 1)


@triton.jit
def _draw_from_row(
    source, vocab, peak, scale, threshold, position, seed_low, seed_high, TILE: tl.constexpr
):
    best = tl.full((TILE,), -INF, tl.float32)
    best_ids = tl.full((TILE,), NO_ID, tl.int32)
    start = vocab * 0
    while start < vocab:
        ids = start + tl.arange(0, TILE)
        x = _load(source, ids, vocab)
        noise = _log_noise_of_tile(start, position, seed_low, seed_high, TILE)
        score = tl.where(_key(x) >= threshold, (x - peak) * scale - noise, -INF)
        best_ids = tl.where(score > best, ids, best_ids)
        best = tl.maximum(best, score)
        start += TILE
    _, token = _best(best, best_ids)
    return token


@triton.jit
def mask_kernel(
    logits,
    stride,
    vocab,
    settings,
    settings_stride,
    bitmask,
    bitmask_stride,
    edited,
    counts,
    raw_block_max,
    raw_block_sum,
    raw_group_max,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    PDL: tl.constexpr,
):
    """Of rows with edits, a copy of the allowed logits and no counts yet; of rows with logprobs,
    maxima and sums of exp of the model's own logits; grid (blocks, rows)."""
    begin(PDL)
    block = tl.program_id(0)
    row = tl.program_id(1)
    slot = _int(settings, settings_stride, SLOT, row)
    if slot < 0:
        return
    flags = _int(settings, settings_stride, FLAGS, row)
    edits = _edits(flags, _int(settings, settings_stride, NUM_BIASES, row))
    if (not edits) & ((flags & LOGPROBS) == 0):
        return
    groups = tl.arange(0, BLOCK // GROUP)
    ids = block * BLOCK + groups[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    inside = ids < vocab
    x = _load(logits + row.to(tl.int64) * stride, ids, vocab)
    if (flags & LOGPROBS) != 0:
        at = row * tl.num_programs(0) + block
        peaks = tl.max(x, 1)
        best = tl.max(peaks)
        tl.store(raw_group_max + at * (BLOCK // GROUP) + groups, peaks)
        tl.store(raw_block_max + at, best)
        powers = tl.exp(x - tl.where(_is_finite(best), best, 0.0))
        tl.store(raw_block_sum + at, tl.sum(tl.sum(powers, 1)))
    if edits:
        start = row.to(tl.int64) * vocab
        if (flags & MASKED) != 0:
            mask = _int(settings, settings_stride, MASK, row).to(tl.int64)
            word = bitmask + mask * bitmask_stride + (ids >> 5)
            bits = tl.load(word, mask=inside, other=0)
            x = tl.where(((bits >> (ids & 31)) & 1) != 0, x, -INF)
        tl.store(edited + start + ids, x, mask=inside)
        if (flags & PENALIZES) != 0:
            tl.store(counts + start + ids, tl.zeros_like(ids), mask=inside)


@triton.jit
def edit_kernel(
    vocab,
    settings,
    settings_stride,
    biases,
    history,
    history_stride,
    edited,
    counts,
    CHUNK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Add the logit bias, and count the tokens of rows that penalize; grid (programs a row, rows).

    The ids of a row's bias are distinct.
    """
    begin(PDL)
    part = tl.program_id(0)
    row = tl.program_id(1)
    slot = _int(settings, settings_stride, SLOT, row).to(tl.int64)
    if slot < 0:
        return
    start = row.to(tl.int64) * vocab
    num_biases = _int(settings, settings_stride, NUM_BIASES, row)
    if num_biases > 0:
        bias = tl.load(biases + slot).to(tl.pointer_type(tl.int32))
        first = part * CHUNK
        while first < num_biases:
            index = first + tl.arange(0, CHUNK)
            inside = index < num_biases
            token = tl.load(bias + index, mask=inside, other=0)
            value = tl.load(bias + num_biases + index, mask=inside, other=0)
            x = tl.load(edited + start + token, mask=inside, other=0.0)
            x += value.to(tl.float32, bitcast=True)
            tl.store(edited + start + token, x, mask=inside)
            first += tl.num_programs(0) * CHUNK
    if (_int(settings, settings_stride, FLAGS, row) & PENALIZES) != 0:
        prompt_len = _int(settings, settings_stride, PROMPT_LEN, row)
        known = prompt_len + _int(settings, settings_stride, POSITION, row)
        first = part * CHUNK
        while first < known:
            index = first + tl.arange(0, CHUNK)
            inside = index < known
            token = tl.load(history + slot * history_stride + index, mask=inside, other=0)
            count = counts + start + token
            tl.atomic_or(count, IN_PROMPT, mask=index < prompt_len, sem="relaxed")
            tl.atomic_add(count, 1, mask=inside & (index >= prompt_len), sem="relaxed")
            first += tl.num_programs(0) * CHUNK


@triton.jit
def rank_kernel(
    logits,
    stride,
    vocab,
    settings,
    settings_stride,
    raw_group_max,
    tokens,
    block_above,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    PDL: tl.constexpr,
):
    """How many tokens of every block are likelier than the one that was taken; grid (blocks, rows).

    Groups whose maximum is below it are not read.
    """
    begin(PDL)
    block = tl.program_id(0)
    row = tl.program_id(1)
    if _int(settings, settings_stride, SLOT, row) < 0:
        return
    token = tl.load(tokens + row)
    if ((_int(settings, settings_stride, FLAGS, row) & LOGPROBS) == 0) | (token < 0):
        return
    source = logits + row.to(tl.int64) * stride
    own = _key(tl.load(source + token))
    at = row * tl.num_programs(0) + block
    groups = tl.arange(0, BLOCK // GROUP)
    reach = _key(tl.load(raw_group_max + at * (BLOCK // GROUP) + groups)) >= own
    ids = block * BLOCK + groups[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    inside = reach[:, None] & (ids < vocab)
    key = _key(tl.load(source + ids, mask=inside, other=-INF))
    above = inside & ((key > own) | ((key == own) & (ids < token)))
    tl.store(block_above + at, tl.sum(tl.sum(above.to(tl.int32), 1)))


@triton.jit
def logprobs_kernel(
    logits,
    stride,
    vocab,
    settings,
    settings_stride,
    raw_block_max,
    raw_block_sum,
    raw_group_max,
    block_above,
    num_blocks,
    num_groups,
    tokens,
    last_tokens,
    logprobs,
    BLOCKS: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    PDL: tl.constexpr,
):
    """Rank and log probability of the token, and the likeliest tokens with theirs; grid (rows).

    The k likeliest tokens lie in the k groups of the largest maxima (of equal ones the first).
    """
    begin(PDL)
    row = tl.program_id(0)
    slot = _int(settings, settings_stride, SLOT, row)
    if slot < 0:
        return
    token = tl.load(tokens + row)
    if ((_int(settings, settings_stride, FLAGS, row) & LOGPROBS) == 0) | (token < 0):
        return
    index = tl.arange(0, BLOCKS)
    inside = index < num_blocks
    block_max = tl.load(raw_block_max + row * num_blocks + index, mask=inside, other=-INF)
    block_sum = tl.load(raw_block_sum + row * num_blocks + index, mask=inside, other=0.0)
    above = tl.load(block_above + row * num_blocks + index, mask=inside, other=0)
    peak = tl.max(block_max)
    if not _is_finite(peak):
        _write_token(token, True, row, slot, tokens, last_tokens)
        return
    normalizer = peak + tl.log(tl.sum(block_sum * tl.exp(block_max - peak)))
    source = logits + row.to(tl.int64) * stride
    out = logprobs + row * LOGPROB_COLUMNS
    tl.store(out + RANK_COLUMN, tl.sum(above) + 1)
    tl.store(
        out + LOGPROB_COLUMN, (tl.load(source + token) - normalizer).to(tl.int32, bitcast=True)
    )
    count = _int(settings, settings_stride, NUM_LOGPROBS, row)
    group = tl.arange(0, GROUPS)
    peaks = tl.load(raw_group_max + row * num_groups + group, mask=group < num_groups, other=-INF)
    order = _ordered(peaks, group, group < num_groups)
    places = tl.arange(0, PLACES)
    chosen = tl.full((PLACES,), -1, tl.int32)
    for place in range(count):
        best = tl.max(order)
        order = tl.where(order == best, NOTHING, order)
        chosen = tl.where(places == place, _id_of(best), chosen)
    ids = chosen[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    inside = (chosen >= 0)[:, None] & (ids < vocab)
    tokens_of_groups = _ordered(tl.load(source + ids, mask=inside, other=-INF), ids, inside)
    candidates = tl.reshape(tokens_of_groups, [PLACES * GROUP])
    for place in range(count):
        best = tl.max(candidates)
        candidates = tl.where(candidates == best, NOTHING, candidates)
        value = _value((best >> 32).to(tl.int32)) - normalizer
        tl.store(out + TOP_IDS_COLUMN + place, _id_of(best))
        tl.store(out + TOP_VALUES_COLUMN + place, value.to(tl.int32, bitcast=True))


@triton.jit
def _ordered(values, ids, inside):
    """Integers in the order of the values, equal ones in the reverse order of ids; ``NOTHING``
    outside and for -inf."""
    key = _key(values)
    order = (key.to(tl.int64) << 32) | (NO_ID - ids.to(tl.int64))
    return tl.where(inside & (key > KEY_MINUS_INF), order, NOTHING)


@triton.jit
def _id_of(order):
    """The id in what ``_ordered`` made; -1 of ``NOTHING``."""
    return tl.where(order > NOTHING, NO_ID - (order & 0x7FFFFFFF).to(tl.int32), -1)
