"""Sums and columns of several ranks in Triton, over memory that all of them write.

A launch is a *turn* that every rank takes. Turns count up on the device, in ``turns``, so a replay
of a captured launch is a turn of its own. A rank writes into the others' memory, into one of two
slots in turns, and reads its own. It writes into that slot again two turns later: until then it has
been through a turn in which it heard of every other rank, which each began after it had read.

``peers`` has the addresses of all ranks' memory; what begins at ``inbox``, ``parts``, ``whole`` and
``flags`` bytes of it is said in ``layout.py``. Values are words of 32 bits, which hold two numbers
of 16 bits or one of 32. No kernel may have more programs than run at once: they wait for others.
"""

import triton
import triton.language as tl

# The most programs of a launch: as many counters of turns, and flags of a rank and phase.
PROGRAMS = tl.constexpr(128)
# How often programs of a launch may meet those of the other ranks: as many flags of a program.
MEETINGS = tl.constexpr(16)
_LOW = tl.constexpr(0xFFFF)
# A turn that none is: it stands everywhere when nobody comes any more (``SharedMemory.abandon``).
_ABANDONED = tl.constexpr(-1)


@triton.jit
def _box(peers, rank, offset, dtype: tl.constexpr):
    """Where something begins in the memory of a rank."""
    address = tl.multiple_of(tl.load(peers + rank) + offset, 256)
    return tl.multiple_of(address.to(tl.pointer_type(dtype)), 256)


@triton.jit
def _others(peers, rank, offset, dtype: tl.constexpr, SIZE: tl.constexpr):
    """Where it begins in that of every other rank, from the next one on."""
    boxes = ()
    for step in tl.static_range(1, SIZE):
        box = _box(peers, (rank + step) % SIZE, offset, dtype)
        boxes = boxes + (box,)  # noqa: RUF005 - Triton joins tuples in this way only
    return boxes


@triton.jit
def _begin_turn(turns, room, PDL: tl.constexpr):
    """The turn of this launch, once everything in front of it has ended, and where its slot begins
    among slots of ``room``.

    Turns are odd after even, and neither that of who is gone nor 0, which is where nobody has
    written yet.
    """
    if PDL:
        tl.extra.cuda.gdc_wait()
    turn = tl.load(turns + tl.program_id(0)) + 1
    turn = tl.where(turn == _ABANDONED, 1, turn)
    return turn, (turn & 1).to(tl.int64) * room


@triton.jit
def _end_turn(turns, turn):
    """Counts the turn, for the next launch, which may have more programs than this one: each
    writes the counters of its own and of those that are not here."""
    every = tl.arange(0, PROGRAMS)
    own = every % tl.num_programs(0) == tl.program_id(0)
    tl.store(turns + every, tl.full([PROGRAMS], 0, tl.int32) + turn, own)


@triton.jit
def _low(words, dtype: tl.constexpr):
    """The first number of each word, or the only one."""
    if dtype == tl.float32:
        values = words.to(tl.float32, bitcast=True)
    else:
        values = (words & _LOW).to(tl.int16).to(dtype, bitcast=True).to(tl.float32)
    return values


@triton.jit
def _high(words, dtype: tl.constexpr):
    """The second number of each word; of words that are one, that again."""
    if dtype == tl.float32:
        values = words.to(tl.float32, bitcast=True)
    else:
        values = (words >> 16).to(tl.int16).to(dtype, bitcast=True).to(tl.float32)
    return values


@triton.jit
def _pack(low, high, dtype: tl.constexpr):
    """Words of numbers that are rounded to ``dtype``."""
    if dtype == tl.float32:
        words = low.to(tl.int32, bitcast=True)
    else:
        first = low.to(dtype).to(tl.int16, bitcast=True).to(tl.int32) & _LOW
        words = first | (high.to(dtype).to(tl.int16, bitcast=True).to(tl.int32) << 16)
    return words


@triton.jit
def _finish(
    words, other, at, inside, weight_low, weight_high, y, total, eps,
    WORDS: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Stores rows of the sum; with ``total`` its sum with ``other`` rows, and the norm of it in
    y."""
    if total is None:
        tl.store(y + at, words, inside)
    else:
        both = _pack(
            _low(words, DTYPE) + _low(other, DTYPE),
            _high(words, DTYPE) + _high(other, DTYPE),
            DTYPE,
        )
        tl.store(total + at, both, inside)
        low, high = _low(both, DTYPE), _high(both, DTYPE)
        squares = tl.sum(low * low + high * high, axis=1, keep_dims=True)
        scale = tl.rsqrt(squares / (2 * WORDS) + eps)
        normed = _pack(low * scale * weight_low, high * scale * weight_high, DTYPE)
        tl.store(y + at, normed, inside)


@triton.jit
def _push(words, turn, boxes, place, inside, SIZE: tl.constexpr, LINES: tl.constexpr):
    """Sends words to every other rank; as lines, each beside the turn in one store of 64 bits, so
    that whoever finds the turn there has the word."""
    line = words
    if LINES:
        line = (words.to(tl.int64) & 0xFFFFFFFF) | (turn.to(tl.int64) << 32)
    for step in tl.static_range(SIZE - 1):
        tl.store(boxes[step] + place, line, inside)


@triton.jit
def _has_come(seen, turn):
    """Whether what was to come in this turn is there, or never will be."""
    return (seen == turn) | (seen == _ABANDONED)


@triton.jit
def _await_one(box, turn, inside):
    """The words of one rank, once they are there."""
    lines = tl.load(box, inside, 0, volatile=True)
    while tl.min((_has_come((lines >> 32).to(tl.int32), turn) | ~inside).to(tl.int32)) == 0:
        lines = tl.load(box, inside, 0, volatile=True)
    return lines.to(tl.int32)


@triton.jit
def _await_all(box, stride, turn, rank, inside, SIZE: tl.constexpr):
    """Waits until the words of all other ranks are there."""
    ready = 0
    while ready == 0:
        here = inside | ~inside
        for sender in tl.static_range(SIZE):
            wanted = inside & (sender != rank)
            lines = tl.load(box + sender * stride, wanted, 0, volatile=True)
            here = here & (_has_come((lines >> 32).to(tl.int32), turn) | ~wanted)
        ready = tl.min(here.to(tl.int32))


@triton.jit
def _sum_sent(own, box, stride, rank, inside, SIZE: tl.constexpr, DTYPE: tl.constexpr):
    """The sum of own words and those that lie in the box, in the order of the ranks."""
    low = _low(tl.zeros_like(own), DTYPE)
    high = low
    for sender in tl.static_range(SIZE):
        sent = tl.load(box + sender * stride, inside & (sender != rank), 0, volatile=True)
        words = tl.where(sender == rank, own, sent.to(tl.int32))
        low += _low(words, DTYPE)
        high += _high(words, DTYPE)
    return _pack(low, high, DTYPE)


@triton.jit
def _weights(weight, columns, within, DTYPE: tl.constexpr):
    """The factors of a norm; zeros where there is none."""
    low = _low(tl.zeros_like(columns), DTYPE)
    high = low
    if weight is not None:
        factors = tl.load(weight + columns, within, 0)
        low, high = _low(factors, DTYPE), _high(factors, DTYPE)
    return low, high


@triton.jit
def _inside(at, within, row, end, count, weight):
    """Which of the words of rows before ``end`` are there: with a norm, all of a row or none."""
    if weight is None:  # noqa: SIM108 - where a branch is compiled only if it is taken
        inside = within & (row < end) & (at < count)
    else:
        inside = within & (row < end)
    return inside


@triton.jit
def _own(x, residual, at, inside):
    """Words of x, and those that the sum is added to, or x again where there is no residual."""
    own = tl.load(x + at, inside, 0)
    other = own
    if residual is not None:
        other = tl.load(residual + at, inside, 0)
    return own, other


@triton.jit
def _flag(meeting, turn, sender, SIZE: tl.constexpr):
    """Where a program of the sender, the same here as there, says that it is at a meeting."""
    # Of two turns in a row, the later may be told before the earlier has been looked for.
    meeting += (turn & 1) * MEETINGS
    return (meeting * SIZE + sender) * PROGRAMS + tl.program_id(0)


@triton.jit
def _tell(peers, flags, meeting, turn, rank, SIZE: tl.constexpr):
    """Tells every other rank that it can see what this program has written anywhere."""
    every = tl.arange(0, SIZE)
    there = (tl.load(peers + every) + flags).to(tl.pointer_type(tl.int32))
    turns = tl.zeros_like(every) + turn
    tl.debug_barrier()
    place = _flag(meeting, turn, rank, SIZE)
    tl.atomic_xchg(there + place, turns, every != rank, sem="release", scope="sys")


@triton.jit
def _await_flags(flags, turn, wanted):
    """Waits until those flags that are wanted tell of this turn."""
    nothing = tl.where(wanted, 0, 0)
    ready = 0
    while ready == 0:
        seen = tl.atomic_add(flags, nothing, wanted, sem="acquire", scope="sys")
        ready = tl.min((_has_come(seen, turn) | ~wanted).to(tl.int32))
    tl.debug_barrier()


@triton.jit
def _hear(peers, flags, meeting, turn, rank, SIZE: tl.constexpr):
    """Waits until the same program of every other rank has told so."""
    every = tl.arange(0, SIZE)
    other = every != rank
    here = _box(peers, rank, flags, tl.int32)
    _await_flags(here + _flag(meeting, turn, every, SIZE), turn, other)


@triton.jit
def _meet(peers, flags, meeting, turn, rank, SIZE: tl.constexpr):
    """What this program has written anywhere is seen by that of the same number of every other
    rank, which is as far as this one is; likewise theirs here."""
    _tell(peers, flags, meeting, turn, rank, SIZE)
    _hear(peers, flags, meeting, turn, rank, SIZE)


@triton.jit(do_not_specialize=["rank", "rows", "piece"])
def one_shot_kernel(
    x, residual, weight, y, total, peers, turns, rank, rows, count, stride, room, inbox, flags,
    piece, eps,
    SIZE: tl.constexpr, WORDS: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    DTYPE: tl.constexpr, LINES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Every rank sends its x to all others and adds up all. Grid: (programs,).

    x of ``rows`` of WORDS, ``count`` in all; a program has ROWS of them at a time. With a residual,
    y is the norm of ``total``, the sum of all x and the residual. In the ``inbox``, ``stride`` is
    the room of a sender and ``room`` that of a slot. As LINES, words are there with their turn,
    which is quick; without, half as much is sent, and programs meet, after every ``piece`` rows of
    one, a multiple of ROWS.
    """
    columns = tl.arange(0, BLOCK)[None, :]
    within = columns < WORDS
    kind: tl.constexpr = tl.int64 if LINES else tl.int32
    # What no kernel writes is read before everything in front has ended.
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    weight_low, weight_high = _weights(weight, columns, within, DTYPE)
    others = _others(peers, rank, inbox, kind, SIZE)
    box = _box(peers, rank, inbox, kind)
    turn, slot = _begin_turn(turns, room, PDL)
    box += slot
    first, programs = tl.program_id(0), tl.num_programs(0)
    every = tl.arange(0, ROWS)[:, None] * programs
    sent_to = slot + rank.to(tl.int64) * stride
    step = programs * piece
    pieces = tl.cdiv(rows - first, step)
    for which in range(0, pieces + 1):
        # What is sent crosses NVLink while the piece before is added up.
        begin = first + which * step
        end = tl.minimum(rows, begin + step)
        for top in range(begin, end, programs * ROWS):
            row = top + every
            at = row * WORDS + columns
            inside = _inside(at, within, row, end, count, weight)
            words = tl.load(x + at, inside, 0)
            _push(words, turn, others, sent_to + at, inside, SIZE, LINES)
        if which > 0:
            if not LINES:
                _hear(peers, flags, which - 1, turn, rank, SIZE)
            end = tl.minimum(rows, begin)
            for top in range(begin - step, end, programs * ROWS):
                row = top + every
                at = row * WORDS + columns
                inside = _inside(at, within, row, end, count, weight)
                own, other = _own(x, residual, at, inside)
                if LINES and SIZE == 2:  # a + b is b + a
                    sent = _await_one(box + (1 - rank).to(tl.int64) * stride + at, turn, inside)
                    low = _low(own, DTYPE) + _low(sent, DTYPE)
                    words = _pack(low, _high(own, DTYPE) + _high(sent, DTYPE), DTYPE)
                else:
                    if LINES:
                        _await_all(box + at, stride, turn, rank, inside, SIZE)
                    words = _sum_sent(own, box + at, stride, rank, inside, SIZE, DTYPE)
                _finish(
                    words, other, at, inside, weight_low, weight_high, y, total, eps, WORDS, DTYPE
                )
        if not LINES and which < pieces:
            _tell(peers, flags, which, turn, rank, SIZE)
    _end_turn(turns, turn)


@triton.jit(do_not_specialize=["rank", "rows", "piece"])
def two_shot_kernel(
    x, residual, weight, y, total, peers, turns, rank, rows, count, stride, room, parts, whole,
    flags, piece, eps,
    SIZE: tl.constexpr, WORDS: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    DTYPE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """As ``one_shot_kernel``, where a rank adds up every SIZE-th row and sends the sum to all
    others. Grid: (programs,).

    ``stride`` words is the room for the rows of a sender in ``parts``; sums are in ``whole``. Slots
    of both are ``room`` words from each other. SIZE rows, one of each rank, are a group, of which a
    program has ROWS at a time; it meets the others after every ``piece`` groups, a multiple of it.
    """
    columns = tl.arange(0, BLOCK)[None, :]
    within = columns < WORDS
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    weight_low, weight_high = _weights(weight, columns, within, DTYPE)
    other_parts = _others(peers, rank, parts, tl.int32, SIZE)
    other_sums = _others(peers, rank, whole, tl.int32, SIZE)
    sums = _box(peers, rank, whole, tl.int32)
    box = _box(peers, rank, parts, tl.int32)
    turn, slot = _begin_turn(turns, room, PDL)
    box += slot
    sums += slot
    first, programs, groups = tl.program_id(0), tl.num_programs(0), tl.cdiv(rows, SIZE)
    every = tl.arange(0, ROWS)[:, None] * programs
    own_part = slot + rank.to(tl.int64) * stride
    step = programs * piece
    pieces = tl.cdiv(groups - first, step)
    for which in range(0, pieces + 2):
        # A piece is sent while that before is added up, and the sums of that before it are used.
        begin = first + which * step
        end = tl.minimum(groups, begin + step)
        for top in range(begin, end, programs * ROWS):
            group = top + every
            place = own_part + group * WORDS + columns
            for ahead in tl.static_range(1, SIZE):
                owner = (rank + ahead) % SIZE
                row = group * SIZE + owner
                at = row * WORDS + columns
                inside = _inside(at, within & (group < end), row, rows, count, weight)
                words = tl.load(x + at, inside, 0)
                tl.store(other_parts[ahead - 1] + place, words, inside)
        if which > 0:
            _hear(peers, flags, which - 1, turn, rank, SIZE)
            end = tl.minimum(groups, begin)
            for top in range(begin - step, end, programs * ROWS):
                group = top + every
                row = group * SIZE + rank
                at = row * WORDS + columns
                inside = _inside(at, within & (group < end), row, rows, count, weight)
                own = tl.load(x + at, inside, 0)
                sent = box + group * WORDS + columns
                words = _sum_sent(own, sent, stride, rank, inside, SIZE, DTYPE)
                for ahead in tl.static_range(SIZE - 1):
                    tl.store(other_sums[ahead] + slot + at, words, inside)
                tl.store(sums + at, words, inside)
        if which > 1:
            end = tl.minimum(groups, begin - step)
            for top in range(begin - 2 * step, end, programs * ROWS):
                group = top + every
                for owner in tl.static_range(SIZE):
                    row = group * SIZE + owner
                    at = row * WORDS + columns
                    inside = _inside(at, within & (group < end), row, rows, count, weight)
                    words = tl.load(sums + at, inside, 0, volatile=True)
                    other = words
                    if residual is not None:
                        other = tl.load(residual + at, inside, 0)
                    _finish(
                        words, other, at, inside, weight_low, weight_high, y, total, eps, WORDS,
                        DTYPE,
                    )  # fmt: skip
        if which <= pieces:
            _tell(peers, flags, which, turn, rank, SIZE)
    _end_turn(turns, turn)


@triton.jit(do_not_specialize=["turn", "rank", "rows", "piece"])
def copied_kernel(
    x, residual, weight, y, total, peers, turn, rank, rows, count, stride, inbox, flags, piece,
    eps,
    SIZE: tl.constexpr, WORDS: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """As ``one_shot_kernel``, of x that is copied into the ``inbox`` meanwhile, ``piece`` rows at a
    time; those that have come are told of by the ``turn``, which the host counts. Grid:
    (programs,)."""
    columns = tl.arange(0, BLOCK)[None, :]
    within = columns < WORDS
    weight_low, weight_high = _weights(weight, columns, within, DTYPE)
    box = _box(peers, rank, inbox, tl.int32)
    here = _box(peers, rank, flags, tl.int32)
    first, programs = tl.program_id(0), tl.num_programs(0)
    every = tl.arange(0, ROWS)[:, None] * programs
    senders = tl.arange(0, SIZE)
    for which in range(0, tl.cdiv(rows, piece)):
        _await_flags(here + which * SIZE + senders, turn, senders != rank)
        end = tl.minimum(rows, (which + 1) * piece)
        for top in range(which * piece + first, end, programs * ROWS):
            row = top + every
            at = row * WORDS + columns
            inside = _inside(at, within, row, end, count, weight)
            own, other = _own(x, residual, at, inside)
            words = _sum_sent(own, box + at, stride.to(tl.int64), rank, inside, SIZE, DTYPE)
            _finish(words, other, at, inside, weight_low, weight_high, y, total, eps, WORDS, DTYPE)


@triton.jit(do_not_specialize=["rank", "rows"])
def gather_kernel(
    x, y, peers, turns, rank, rows, width, stride, room, inbox, flags,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, LINES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """y ``[rows, SIZE * width]`` words of x ``[rows, width]`` of every rank, through an inbox as
    that of ``one_shot_kernel``. Grid: (programs,)."""
    kind: tl.constexpr = tl.int64 if LINES else tl.int32
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    others = _others(peers, rank, inbox, kind, SIZE)
    box = _box(peers, rank, inbox, kind)
    turn, slot = _begin_turn(turns, room, PDL)
    box += slot
    first, programs, count = tl.program_id(0), tl.num_programs(0), rows * width
    own = slot + rank.to(tl.int64) * stride
    for block in range(first, tl.cdiv(count, BLOCK), programs):
        at = block * BLOCK + tl.arange(0, BLOCK)
        words = tl.load(x + at, at < count, 0)
        _push(words, turn, others, own + at, at < count, SIZE, LINES)
        tl.store(y + (at // width * SIZE + rank) * width + at % width, words, at < count)
    if not LINES:
        _meet(peers, flags, 0, turn, rank, SIZE)
    for block in range(first, tl.cdiv(count, BLOCK), programs):
        at = block * BLOCK + tl.arange(0, BLOCK)
        for step in tl.static_range(1, SIZE):
            sender = (rank + step) % SIZE
            sent = box + sender.to(tl.int64) * stride + at
            if LINES:
                words = _await_one(sent, turn, at < count)
            else:
                words = tl.load(sent, at < count, 0, volatile=True)
            tl.store(y + (at // width * SIZE + sender) * width + at % width, words, at < count)
    _end_turn(turns, turn)
