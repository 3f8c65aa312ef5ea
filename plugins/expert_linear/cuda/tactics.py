"""Which kernel runs an ExpertLinear, and with which tiles: by weight, shape, experts and number of
tokens."""

from __future__ import annotations

from dataclasses import dataclass, replace

from slipstream.plugins.cuda.launch import PDL_TOKENS
from slipstream.plugins.linear.cuda import tactics as linear
from slipstream.plugins.linear.cuda.fixed import weight_is_left
from slipstream.plugins.linear.cuda.packing import FLOAT4, in_words, padded_k
from slipstream.plugins.linear.cuda.tactics import (
    Tactic,
    Tactics,
    can_stream,
    entry_key,
    fit_stages,
    multiplies_in,
    vector_size,
    whole_chunks,
)
from slipstream.plugins.linear.cuda.wide import Tile
from slipstream.weights.tensor import WeightFormat

# Those of 1,024 tokens are as those of 2,048; larger steps fill larger tiles.
BUCKETS = (*(size for size in linear.BUCKETS if size != 1024), 8192)
# Up to so many tokens gemv, in which every pair of a token and an expert reads the weight for
# itself, is worth timing. It is the guess up to so many whose pairs nearly all have experts of
# their own.
GEMV_TOKENS = 8
_GUESS_GEMV_TOKENS, _GUESS_GEMV_ROWS = 4, 1.3
# Rows of x of a tile, each size twice the one before; the pairs of a step are cut into tiles of all
# of them at once. The largest is for wide alone.
TILES = (16, 32, 64, 128, 256)
_DOT_TILES = TILES[:-1]
# Rows from which wide is the guess, and its tile: what was quickest on an H200 for the shapes of
# gpt-oss-20b, Qwen3-30B-A3B and Mixtral-8x7B.
_GUESS_WIDE = ((512, Tile(128, 256)), (48, Tile(128, 128)), (24, Tile(64, 64)))
_SUMS_A_THREAD = 128  # float32 registers of a tile's sums; twice as many spill


@dataclass(frozen=True, slots=True)
class ExpertShape:
    """The ``format`` of one of ``number`` experts, of which each token has ``top_k``."""

    format: WeightFormat
    gated: bool
    number: int
    top_k: int

    @property
    def vectors(self) -> int:
        """Vectors of 16 bytes in a row of the weight."""
        fmt = self.format
        return (padded_k(fmt) if in_words(fmt) else fmt.shape[1]) // vector_size(fmt)

    def key(self, bucket: int) -> str:
        """The key in the table of tactics."""
        return entry_key(self.format, self.gated, bucket, f"{self.top_k}/{self.number}")

    def distinct(self, tokens: int) -> float:
        """The experts that so many tokens choose if each chooses among all alike."""
        return float(self.number * (1 - (1 - self.top_k / self.number) ** tokens))

    def rows(self, tokens: int) -> float:
        """Rows of x of an expert that is chosen."""
        return tokens * self.top_k / self.distinct(tokens)


def find_tactic(table: Tactics, shape: ExpertShape, tokens: int) -> Tactic:
    """The tactic that was timed for this shape and bucket of tokens, or the default."""
    if table.deterministic:
        return fixed_tactic(shape, tokens, table.capability)
    bucket = next((size for size in BUCKETS if size >= tokens), BUCKETS[-1])
    found = table.entries.get(shape.key(bucket))
    if found is None and bucket == BUCKETS[-1]:  # of which fewer are timed
        found = table.entries.get(shape.key(BUCKETS[-2]))
    if found is not None and found.rounds and multiplies_in(shape.format) != "float8":
        found = None  # a key does not say whether x may be rounded
    return found or default_tactic(shape, tokens, table.capability)


def fixed_tactic(shape: ExpertShape, tokens: int, capability: tuple[int, int]) -> Tactic:
    """The tactic of the deterministic mode: a dot whose tile alone depends on ``tokens``; see
    ``linear/cuda/fixed.py``."""
    tile = _tile(shape.rows(tokens))
    if not weight_is_left(capability):
        return _dot(shape, min(tile, 64), 64, 64, 4, 3, False, capability)
    rows, columns, warps = (64, 128, 4) if tile <= 32 else (128, 64, 8)
    columns = 128 if shape.format.rows > 1 else columns
    return _dot(shape, tile, rows, columns, warps, 4, True, capability)


def default_tactic(shape: ExpertShape, tokens: int, capability: tuple[int, int]) -> Tactic:
    """A sensible tactic for a shape that nobody timed."""
    rows = shape.rows(tokens)
    alone = tokens <= _GUESS_GEMV_TOKENS and rows <= _GUESS_GEMV_ROWS
    if alone and can_stream(shape.format):
        lanes, stages = _even_steps(shape)[0]
        return _gemv(shape, 4, lanes, 2, stages)
    tile = _tile(rows)
    if capability[0] != 9:
        return _dot(shape, min(tile, 64), 64, 64, 4, 3, False, capability)
    if can_widen(shape, tokens, capability):
        for least, wide in _GUESS_WIDE:
            if rows >= least:
                return linear.wide_tactic(wide, shape.gated)
    if tile <= 32:  # the rows of the weight fill wgmma, which takes few of x as they are
        columns = 64 if shape.format.kind == "dense" else 128
        stages = 3 if in_words(shape.format) else 4  # of which there are then more programs
        return _dot(shape, tile, 64, columns, 4, stages, True, capability)
    # What must be decoded is so in registers, from which wgmma takes its left operand only.
    return _dot(shape, tile, 128, 64, 8, 4, shape.format.kind != "dense", capability)


def candidate_tactics(shape: ExpertShape, tokens: int, capability: tuple[int, int]) -> list[Tactic]:
    """What is worth timing, the default first."""
    found = [default_tactic(shape, tokens, capability)]
    if tokens <= GEMV_TOKENS and can_stream(shape.format):
        found += [
            _gemv(shape, warps, lanes, rows, stages)
            for lanes, stages in _even_steps(shape)
            for warps, rows in ((4, 2), (4, 4), (8, 2), *(() if shape.gated else ((2, 4), (4, 8))))
        ]
    if tokens > 1 or in_words(shape.format):  # whose decoding is quicker there than in gemv
        found += _dot_candidates(shape, tokens, capability)
    if tokens > 1 and capability[0] == 9 and multiplies_in(shape.format) == "float8":
        found += _rounding_candidates(shape, tokens, capability)
    if can_widen(shape, tokens, capability):
        found += [linear.wide_tactic(tile, shape.gated) for tile in _wide_tiles(shape.rows(tokens))]
    return list(dict.fromkeys(found))


def can_widen(shape: ExpertShape, tokens: int, capability: tuple[int, int]) -> bool:
    """Whether wide is for a product: weights in whole chunks of words, on a Hopper GPU, of so many
    tokens that kernels do not overlap."""
    fits = shape.format.kind == FLOAT4 or whole_chunks(shape.format)
    return capability == (9, 0) and tokens > PDL_TOKENS and fits


def wide_tile(tactic: Tactic, gated: bool) -> Tile:
    """The tile of a tactic of wide."""
    return Tile(tactic.block_n * (2 if gated else 1), tactic.block_m)


def runs_deep(tile: Tile, fmt: WeightFormat) -> bool:
    """Whether a warpgroup of wide has registers for the weights of two products, of which the next
    begins before the one is over."""
    if fmt.kind == FLOAT4:  # the exponents of a chunk are one number
        return tile.tokens >= 128 and tile.rows >= 128
    groups = 1024 // fmt.bits // fmt.group  # of a chunk
    return tile.rows == 128 and (tile.tokens == 128 or (tile.tokens == 256 and groups <= 2))


def _wide_tiles(rows: float) -> list[Tile]:
    """Those of which an expert fills a half of one, or at most four."""
    sizes = [size for size in TILES[1:] if min(rows / 4, TILES[-1]) <= size <= max(2 * rows, 32)]
    wider = [Tile(192, 128)] if 128 in sizes else []
    return (
        [Tile(128, size) for size in sizes]
        + wider
        + [Tile(64, size) for size in sizes if size < 256]
    )


def slots_of(top_k: int) -> int:
    """Parts of the lanes of a sum, of which the experts of a token have one each."""
    return 1 << (top_k - 1).bit_length()


def _even_steps(shape: ExpertShape) -> list[tuple[int, int]]:
    """Lanes along K and vectors in flight a row whose steps fill the rows: the widest two."""
    for widest in (64, 32, 16, 8):
        found = [
            (lanes, stages)
            for lanes in (widest // 2, widest)
            for stages in (2, 3, 1, 4)
            if shape.vectors % (lanes * stages) == 0
        ]
        if len(found) > 1:
            return found
    return [(32, 1), (32, 2)]


def _gemv(shape: ExpertShape, warps: int, lanes: int, vectors: int, stages: int) -> Tactic:
    """``vectors`` rows of the weight a thread, of which a gated row of the result takes two. Where
    a token's experts are added up, without a gate, each has so many lanes."""
    if not shape.gated:
        rows = max(32 * warps // (lanes * slots_of(shape.top_k)), 1) * vectors
    else:
        rows = 32 * warps // lanes * vectors
    return Tactic(
        "gemv",
        block_n=rows // 2 if shape.gated else rows,
        block_k=lanes * vector_size(shape.format),
        num_warps=warps,
        num_stages=stages,
    )


def _dot(
    shape: ExpertShape,
    tile: int,
    rows: int,
    columns: int,
    warps: int,
    stages: int,
    swap: bool,
    capability: tuple[int, int],
) -> Tactic:
    fmt = shape.format
    columns = 1024 // fmt.bits if in_words(fmt) else columns
    found = Tactic("dot", rows, columns, warps, stages, swap=swap, block_m=tile)
    return fit_stages(found, fmt, shape.gated, tile, capability)


def _dot_candidates(shape: ExpertShape, tokens: int, capability: tuple[int, int]) -> list[Tactic]:
    """Rows of the weight, elements of K, warps, stages, and whether the weight is on the left."""
    choices = [
        (64, 64, 4, 4, False), (64, 128, 4, 3, False), (32, 128, 4, 4, False),
        (128, 64, 8, 4, False), (128, 64, 4, 3, False),
    ]  # fmt: skip
    if capability[0] == 9:
        choices += [
            (64, 64, 4, 4, True), (64, 128, 4, 3, True), (64, 128, 4, 5, True),
            (128, 64, 8, 4, True), (128, 128, 8, 3, True), (128, 64, 4, 3, True),
        ]  # fmt: skip
    if capability[0] == 9 and shape.gated and in_words(shape.format):  # ups beside their gates
        choices += [(32, 128, 4, 3, True), (32, 128, 4, 5, True)]
    sums = 2 if shape.gated else 1
    return [
        _dot(shape, tile, rows, columns, warps, stages, swap, capability)
        for tile in _tiles(shape.rows(tokens))
        for rows, columns, warps, stages, swap in choices
        if tile * rows * sums <= _SUMS_A_THREAD * 32 * warps
    ]


def _rounding_candidates(
    shape: ExpertShape, tokens: int, capability: tuple[int, int]
) -> list[Tactic]:
    """Products of float8 with float8: as ``_dot_candidates``."""
    choices = [
        (64, 128, 4, 6, True), (64, 128, 4, 3, True), (64, 256, 4, 4, True), (128, 128, 8, 4, True),
        (128, 128, 4, 4, True), (128, 128, 8, 4, False), (64, 128, 4, 4, False),
    ]  # fmt: skip
    sums = 2 if shape.gated else 1
    return [
        replace(_dot(shape, tile, rows, columns, warps, stages, swap, capability), rounds=True)
        for tile in _tiles(shape.rows(tokens))
        for rows, columns, warps, stages, swap in choices
        if tile * rows * sums <= _SUMS_A_THREAD * 32 * warps
    ]


def _tile(rows: float) -> int:
    """Counts of rows differ: a tile that holds one and a half of the mean holds most experts."""
    return next((size for size in _DOT_TILES if 1.5 * rows <= size), _DOT_TILES[-1])


def _tiles(rows: float) -> list[int]:
    """Sizes of which an expert fills a half of one, or at most two."""
    least = min(rows / 2, _DOT_TILES[-1])
    return [size for size in _DOT_TILES if least <= size <= max(2 * rows, TILES[0])]
