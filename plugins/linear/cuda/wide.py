"""The tiles of wide, the product of integer weights and many tokens on a Hopper GPU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

LEAST_TOKENS = 48
MOST_TOKENS = 2048  # of more, the library makes up for the time of writing a dense weight
_PROCESSORS = 132  # of an H100
_ENOUGH = 0.7  # times as many tiles as processors
_SHARED_BYTES = 227 << 10  # of an SM
_SPARE_BYTES = 3 << 10  # of a program, for what Triton adds and what it takes for itself


@dataclass(frozen=True, slots=True)
class Tile:
    """Rows of the weight and of x that a program multiplies, and how many share their K."""

    rows: int
    tokens: int
    split: int = 1

    @property
    def programs(self) -> int:
        """Programs that an SM holds: those of one warpgroup are to take turns with others."""
        if self.rows > 64:
            return 1
        return 3 if self.tokens <= 64 else 2

    @property
    def stages(self) -> int:
        """Tiles of x, of 64 elements of K, in flight: as many as shared memory holds."""
        room = _SHARED_BYTES // self.programs - _SPARE_BYTES
        return min(room // (self.tokens * 128), 8)

    @property
    def registers(self) -> int:
        """Registers of a thread: a warpgroup for every 64 rows, and one with the warp of x."""
        threads = 128 * (self.rows // 64 + 1) * self.programs
        return (1 << 16) // threads // 8 * 8

    def count(self, n: int, tokens: int) -> int:
        """Tiles of a product of n rows."""
        return -(-n // self.rows) * -(-tokens // self.tokens)

    def can_split(self, n: int, tokens: int) -> bool:
        """Whether a weight of n rows has a counter for every 64 of each tile."""
        return self.count(n, tokens) * self.rows // 64 <= n // 8


# The larger first: they decode and read x less often.
_TILES = (Tile(128, 256), Tile(128, 128), Tile(64, 128), Tile(128, 64), Tile(64, 64))


def usual_tile(n: int, tokens: int) -> Tile:
    """The largest tile of which there are enough; a split of K pays for few tokens."""
    fitting = [tile for tile in _TILES if tile.tokens <= max(tokens, 64)]
    enough = (tile for tile in fitting if tile.count(n, tokens) >= _ENOUGH * _PROCESSORS)
    tile, split = next(enough, fitting[-1]), 1
    if tile.tokens == 64 and tile.can_split(n, tokens):
        while split < 4 and tile.count(n, tokens) * split < 1.2 * _PROCESSORS:
            split *= 2
    return replace(tile, split=split)


def tiles_to_time(n: int, tokens: int) -> Iterator[Tile]:
    """Those worth timing: not one whose programs would be far too many."""
    for tile in (*_TILES, Tile(192, 128)):
        if not tile.tokens <= max(tokens, 64) <= 16 * tile.tokens:
            continue
        yield tile
        for split in (2, 4) if tile.can_split(n, tokens) else ():
            if tile.count(n, tokens) * split <= 2 * _PROCESSORS * tile.programs:
                yield replace(tile, split=split)
