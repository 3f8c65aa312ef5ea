"""The contract of a step as data: graphs, their inputs and outputs, and the caches they work on.

The builder writes it into ``engine.json``; the graph builder, the verifier, the batch builder and
every executor read it from there. Only this module spells the names. It imports nothing heavy:
beside ``builder/engine.py`` it is all that the runtime knows of the builder.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

Dim = int | str
CacheKind = Literal["paged", "state"]
# Bytes of an element, by the names that graphs and manifests use.
_ITEM_BYTES = {"float32": 4, "int32": 4, "float16": 2, "bfloat16": 2, "float8_e4m3fn": 1, "int8": 1}


class Source(StrEnum):
    """Where the values of an input come from.

    T tokens, S sequences, L rows of logits and P columns of a page table. All but ``CACHE`` are
    int32: ``TOKEN_IDS [T]``, ``POSITIONS [T]``, ``QUERY_START [S+1]``, ``CONTEXT_LEN [S]``,
    ``LOGITS_ROWS [L]`` and ``SLOTS [S]`` (the row of each sequence in a cache of states) are those
    of the step; ``PAGE_TABLE [S, P]`` and ``SLOT_MAPPING [T]`` those of one paged cache. ``CACHE``
    is an array of a cache, bound once.
    """

    TOKEN_IDS = "token_ids"
    POSITIONS = "positions"
    QUERY_START = "query_start"
    CONTEXT_LEN = "context_len"
    LOGITS_ROWS = "logits_rows"
    SLOTS = "slots"
    PAGE_TABLE = "page_table"
    SLOT_MAPPING = "slot_mapping"
    CACHE = "cache"


STEP_SHAPES: Mapping[Source, tuple[str, ...]] = {
    Source.TOKEN_IDS: ("T",),
    Source.POSITIONS: ("T",),
    Source.QUERY_START: ("S+1",),
    Source.CONTEXT_LEN: ("S",),
    Source.LOGITS_ROWS: ("L",),
    Source.SLOTS: ("S",),
    Source.PAGE_TABLE: ("S", "P"),
    Source.SLOT_MAPPING: ("T",),
}
# The graph that the engine loop runs, and the output that it samples from.
TARGET_GRAPH = "target"
LOGITS = "logits"


@dataclass(frozen=True, slots=True)
class CacheArray:
    """One tensor of a cache: ``[layers, pages or slots, *shape]`` of ``dtype``."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of one page or slot in one layer."""
        return math.prod(self.shape) * _ITEM_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class CacheSpec:
    """What some layers remember of a sequence.

    ``paged``: a page holds ``page_size`` tokens; with a ``window`` a query sees that many tokens,
    itself included, and pages behind it may be given back. ``state``: a slot holds what is left of
    all tokens so far; ``page_size`` is 0. ``layers`` are the model's, in the order of the arrays'
    first axis.
    """

    name: str
    kind: CacheKind
    layers: tuple[int, ...]
    arrays: tuple[CacheArray, ...]
    page_size: int = 0
    window: int = 0

    @property
    def bytes_per_page(self) -> int:
        """Bytes of a page (of a slot, where it holds states) in all layers."""
        return len(self.layers) * sum(array.nbytes for array in self.arrays)


@dataclass(frozen=True, slots=True)
class Port:
    """An input of a graph: its name there, what is put in, and of which cache that speaks."""

    name: str
    source: Source
    dtype: str
    shape: tuple[Dim, ...]
    cache: str | None = None


@dataclass(frozen=True, slots=True)
class Output:
    """An output of a graph; rows are those of ``logits_rows`` (L) or all tokens (T)."""

    name: str
    dtype: str
    shape: tuple[Dim, ...]


@dataclass(frozen=True, slots=True)
class GraphSpec:
    """A graph of an engine.

    ``seam`` names the two values between its halves: what the last layer makes of all tokens, and
    the rows of it whose logits are wanted. A device may run the halves apart.
    """

    file: str
    inputs: tuple[Port, ...]
    outputs: tuple[Output, ...]
    seam: tuple[str, str] | None = None
