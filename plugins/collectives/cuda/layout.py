"""Where what the ranks exchange lies in the memory of each of them."""

from __future__ import annotations

from dataclasses import dataclass

_WORD, _LINE = 4, 8  # bytes: what is exchanged, and with its turn beside it
_PHASES = 2
_ALIGNED = 256
_MOST_ROW = 64 << 10  # bytes of a row that no other rank has as many as


@dataclass(frozen=True, slots=True)
class Layout:
    """Bytes of a rank's memory, for ``ranks``: room for x of up to ``small`` bytes with turns
    beside its words, and of up to ``large`` without, both twice, and flags.

    ``inbox``, ``parts``, ``whole`` and ``flags`` are where the four begin, ``bytes`` is the end.
    """

    ranks: int
    small: int
    large: int
    programs: int

    @property
    def line_stride(self) -> int:
        """Lines that a sender has in a slot of the inbox."""
        return _aligned(self.small // _WORD)

    @property
    def part_stride(self) -> int:
        """Words that a sender has in a slot of the parts."""
        # Rows are dealt out, and the first ranks may have one more.
        return _aligned(self.large // self.ranks // _WORD + _MOST_ROW // _WORD)

    @property
    def whole_room(self) -> int:
        """Words of a slot of whole sums."""
        return _aligned(self.large // _WORD)

    @property
    def inbox(self) -> int:
        """From where ranks put lines, ``[2, ranks, line_stride]``."""
        return 0

    @property
    def parts(self) -> int:
        """From where ranks put the rows that this one adds up, ``[2, ranks, part_stride]``."""
        return 2 * self.ranks * self.line_stride * _LINE

    @property
    def whole(self) -> int:
        """From where ranks put the rows that they have added up, ``[2, whole_room]``."""
        return self.parts + 2 * self.ranks * self.part_stride * _WORD

    @property
    def flags(self) -> int:
        """From where programs say how far they are, ``[phases, ranks, programs]`` words."""
        return self.whole + 2 * self.whole_room * _WORD

    @property
    def bytes(self) -> int:
        """The size of it all."""
        return self.flags + _aligned(_PHASES * self.ranks * self.programs * _WORD)


def _aligned(count: int) -> int:
    return -(-count // _ALIGNED) * _ALIGNED
