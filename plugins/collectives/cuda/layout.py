"""Where what the ranks exchange lies in the memory of each of them."""

from __future__ import annotations

from dataclasses import dataclass

_WORD, _LINE = 4, 8  # bytes: what is exchanged, and with its turn beside it
SLOTS = 2
_PIECES = 8  # of x that is copied, at most
_ALIGNED = 256
_MOST_ROW = 64 << 10  # bytes of a row of which not every rank has one


@dataclass(frozen=True, slots=True)
class Layout:
    """Bytes of a rank's memory, for ``ranks``: room for x of up to ``small`` bytes with turns
    beside its words, and of up to ``large`` without, both twice, and flags of ``programs`` that
    meet up to ``meetings`` times; room for x of up to ``copied`` bytes that copy engines write,
    twice, and flags of its pieces.

        lines: [slots, ranks, line_stride]   what each rank sends, as lines
        words: [slots, word_room]            what each rank sends; or parts and whole sums
        flags: [slots, meetings, ranks, programs]
        copies: [slots, ranks, copy_stride]
        copy flags: [slots, pieces, ranks]

    ``lines``, ``words`` and ``flags`` are where the first three begin, ``bytes`` is the end.
    """

    ranks: int
    small: int
    large: int
    programs: int
    meetings: int
    copied: int = 0

    @property
    def line_stride(self) -> int:
        """Lines that a sender has in a slot."""
        return _aligned(self.small // _WORD)

    @property
    def line_room(self) -> int:
        """Lines of a slot."""
        return self.ranks * self.line_stride

    @property
    def part_stride(self) -> int:
        """Words of the rows that a sender leaves to another rank to add up."""
        # Rows are dealt out, and the first ranks may have one more.
        return _aligned(self.large // self.ranks // _WORD + _MOST_ROW // _WORD)

    @property
    def whole_room(self) -> int:
        """Words of whole sums."""
        return _aligned(self.large // _WORD)

    @property
    def word_room(self) -> int:
        """Words of a slot."""
        return self.ranks * self.part_stride + self.whole_room

    @property
    def word_stride(self) -> int:
        """Words that a sender has in a slot if there is nothing else in it."""
        return self.word_room // self.ranks // _ALIGNED * _ALIGNED

    @property
    def lines(self) -> int:
        """From where there are lines."""
        return 0

    @property
    def words(self) -> int:
        """From where there are words, and parts."""
        return SLOTS * self.line_room * _LINE

    @property
    def whole(self) -> int:
        """From where there are whole sums."""
        return self.words + self.ranks * self.part_stride * _WORD

    @property
    def flags(self) -> int:
        """From where programs say how far they are."""
        return self.words + SLOTS * self.word_room * _WORD

    @property
    def copy_stride(self) -> int:
        """Words that a sender has in a slot of what is copied."""
        return _aligned(self.copied // _WORD)

    @property
    def pieces(self) -> int:
        """In how many pieces x is copied at most."""
        return _PIECES

    def copies_of(self, slot: int) -> int:
        """From where what is copied stands in a slot."""
        flags = SLOTS * self.meetings * self.ranks * self.programs
        begin = self.flags + _aligned(flags * _WORD)
        return begin + slot * self.ranks * self.copy_stride * _WORD

    def copy_flags_of(self, slot: int) -> int:
        """From where it is said what has come to the slot."""
        return self.copies_of(SLOTS) + slot * _aligned(_PIECES * self.ranks * _WORD)

    @property
    def bytes(self) -> int:
        """The size of it all."""
        return self.copy_flags_of(SLOTS)


def _aligned(count: int) -> int:
    return -(-count // _ALIGNED) * _ALIGNED
