"""The sizes to which steps are padded, so that a few captured graphs serve them all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from slipstream.runtime.executors.cuda.inputs import Shape

# Steps of mixed prefill chunks and decodes up to the last of these are captured. Beyond, a step
# takes the GPU longer than it takes Python to launch its kernels one by one.
MIXED_TOKENS = (16, 32, 64, 128, 256, 512, 640, 768, 896, 1024, 1280, 1536, 2048)

# For how many decodes the kernel for decodes is launched in those, if there are any: the one for
# prompts takes a whole block for the single query of each, and reads a long context by itself. Only
# such as are at most half of the tokens.
MIXED_DECODES = (64, 256, 1024)

# Tokens of a sequence of which the last are drafts: what kernels are compiled for.
QUERIES = (4, 8)
# Guesses of a head after a step, where load decides on their number.
_GUESSES = (1, 3, 7)
# How many times as many tokens up to so many sequences verify, and more of them.
_COARSE = 16
# Programs for a sequence that is no decode, end at once: so many are about a row.
_EMPTY = 16
_TIMES, _MORE_TIMES = (2, *QUERIES), (2, 3, *QUERIES)


def decode_buckets(limit: int) -> list[int]:
    """Batch sizes of captured decode steps: powers of two to 16, then steps of 8 to 64."""
    sizes = [1, 2, 4, 8, 16, *range(24, 64, 8), *range(64, 128, 16), *range(128, 256, 32)]
    sizes += range(256, limit + 64, 64)
    return [*(size for size in sizes if size < limit), limit]


def counts_of(asked: int | str) -> tuple[int, ...]:
    """How many guesses of a head are captured, where so many are asked for, or ``auto``."""
    return _GUESSES if isinstance(asked, str) else (asked,)


def with_none(counts: Sequence[int]) -> tuple[int, ...]:
    """After how many guesses a head is captured: where load decides, it may only read."""
    return (0, *counts) if len(counts) > 1 else tuple(counts)


def turn(key: Shape | tuple[int, object]) -> float:
    """When layers of a shape, or a head of so many rows, are captured among others: few rows first,
    and prompts are long before batches are large."""
    if not isinstance(key, Shape):
        return key[0]
    return key.tokens / 8 if key.rows else key.tokens


def mixed_sizes(limit: int) -> list[int]:
    """Tokens of captured steps that are more than decodes, of up to ``limit``."""
    largest = max(limit, MIXED_TOKENS[0])
    return [tokens for tokens in MIXED_TOKENS if tokens <= largest]


def bucket(count: int, sizes: Sequence[int]) -> int:
    """The smallest of ``sizes`` that holds ``count``."""
    return next(size for size in sizes if size >= count)


@dataclass(frozen=True)
class Buckets:
    """Shapes of padded steps within the limits of an engine.

    ``query_block`` is the number of query tokens of a block of the prefill kernel, which takes
    decodes too where ``deterministic``, each as a block. ``drafts`` is how many tokens of a step
    may be drafts.
    """

    max_batch_size: int
    max_num_tokens: int
    query_block: int
    deterministic: bool = False
    drafts: int = 0

    @property
    def max_rows(self) -> int:
        """Rows of logits that a step samples, at most."""
        return self.max_batch_size + self.drafts

    @cached_property
    def batch_sizes(self) -> list[int]:
        """Sequences of decode steps."""
        return decode_buckets(self.max_batch_size)

    @cached_property
    def row_sizes(self) -> list[int]:
        """Rows of logits."""
        return decode_buckets(self.max_rows)

    @cached_property
    def mixed_tokens(self) -> list[int]:
        """Tokens of captured steps that are more than decodes."""
        return mixed_sizes(self.max_num_tokens)

    def decode(self, sequences: int) -> Shape:
        """A step of one token a sequence, whose rows are all wanted."""
        return Shape(sequences, sequences, blocks=sequences if self.deterministic else 0)

    def verification(self, tokens: int, sequences: int, longest: int) -> Shape:
        """A step of decodes with drafts, of up to ``longest`` tokens each, whose rows are all
        wanted."""
        count = self._count(sequences)
        size = bucket(tokens, self._verified(count))
        if self.deterministic:
            return Shape(size, count, blocks=size)
        return Shape(size, count, queries=bucket(longest, QUERIES))

    def _count(self, sequences: int) -> int:
        """To how many sequences a step with drafts is padded: few graphs, whose padding ends at
        once."""
        return min(1 << (sequences - 1).bit_length(), self.max_batch_size)

    def _verified(self, count: int) -> list[int]:
        """To how many tokens."""
        times = _TIMES if count <= _COARSE else _MORE_TIMES
        return [min(count * each, self.max_rows) for each in times]

    @cached_property
    def verifications(self) -> list[Shape]:
        """Steps of decodes with drafts: of few sequences those of equally many, of more all."""
        if not self.drafts:
            return []
        counts = dict.fromkeys(self._count(size) for size in self.batch_sizes)
        shapes = [
            self.verification(tokens, count, longest)
            for count in counts
            for tokens in self._verified(count)
            for longest in (QUERIES if count > _COARSE else (tokens // count,))
        ]
        return list(dict.fromkeys(shapes))

    def mixed(self, tokens: int, decodes: int = 0) -> Shape:
        """A step of up to ``tokens`` tokens, of as many sequences as can be in it, the first of
        which are so many decodes; some of them may have to be blocks as well."""
        sequences = min(tokens, self.max_batch_size)
        # Every sequence may end in a block that is not full.
        blocks = tokens // self.query_block + sequences
        counts = self._mixed_decodes(tokens)
        served = next((count for count in counts if count >= decodes), counts[-1])
        return Shape(tokens, sequences, blocks, min(tokens, self.max_rows), decodes=served)

    def _mixed_decodes(self, tokens: int) -> list[int]:
        # Where the device may have to lengthen contexts that the host guessed, all are blocks.
        if self.deterministic or self.drafts:
            return [0]
        most = min(tokens // 2, self.max_batch_size)
        counts = [min(count, self.max_batch_size) for count in MIXED_DECODES]
        return [0, *dict.fromkeys(n for n in counts if MIXED_DECODES[0] <= n <= most)]

    @cached_property
    def all_mixed(self) -> list[Shape]:
        """Captured steps that are more than decodes."""
        return [
            self.mixed(tokens, decodes)
            for tokens in self.mixed_tokens
            for decodes in self._mixed_decodes(tokens)
        ]

    def rows_of(self, one: Shape, other: Shape) -> int:
        """About as many rows as the ``other`` computes where it serves for ``one``: decodes that
        are blocks of prompts count as rows more, and programs for what is no decode a little."""
        short = one.decodes - other.decodes
        return other.tokens + (short if short > 0 else -short // _EMPTY)

    def alike(self, one: Shape, other: Shape) -> bool:
        """Whether the ``other`` serves for ``one``: both are steps of one token a sequence, or both
        mixed, or both have drafts, and it has room for all that is in the one."""
        if other.tokens < one.tokens:
            return False
        if one.rows or other.rows:
            return bool(one.rows and other.rows)
        plain = [shape == self.decode(shape.sequences) for shape in (one, other)]
        if any(plain):
            return all(plain)
        return other.sequences >= one.sequences and other.queries >= one.queries

    @property
    def largest(self) -> Shape:
        """The largest step there can be."""
        tokens = max(self.max_num_tokens, MIXED_TOKENS[0], self.max_rows)
        blocks = tokens // self.query_block + self.max_rows
        return Shape(tokens, self.max_batch_size, blocks, self.max_rows)
