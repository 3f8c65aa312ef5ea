"""The contract of a step as data: graphs, their inputs and outputs, and the caches they work on.

The builder writes it into ``engine.json``; the graph builder, the verifier, the batch builder and
every executor read it from there. Only this module spells the names. It imports nothing heavy:
beside ``engine.py`` and ``check_contract.py`` it is all that the runtime knows of the builder.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Literal

Dim = int | str
CacheKind = Literal["paged", "state"]
PoolingMode = Literal["last", "mean"]
Similarity = Literal["cosine", "dot"]
# Bytes of an element, by the names that graphs and manifests use.
ITEM_BYTES = {
    "float32": 4,
    "int32": 4,
    "float16": 2,
    "bfloat16": 2,
    "float8_e4m3fn": 1,
    "int8": 1,
    "uint8": 1,
}


class Source(StrEnum):
    """Where the values of an input come from.

    T tokens, S sequences, L rows of logits and P columns of a page table. All but the last two are
    int32: ``TOKEN_IDS [T]``, ``POSITIONS [T]``, ``QUERY_START [S+1]``, ``CONTEXT_LEN [S]``,
    ``LOGITS_ROWS [L]``, ``SLOTS [S]`` (the row of each sequence in a cache of states) and
    ``LONGEST_CONTEXT [1]`` (no less than any of ``CONTEXT_LEN``, and in the host's memory) are
    those of the step; ``PAGE_TABLE [S, P]`` and ``SLOT_MAPPING [T]`` those of one paged cache.
    ``CACHE`` is an array of a cache, bound once; ``LAYER`` what one layer has of it. ``HIDDEN``,
    float ``[T, width]``, is what a head takes of each token beside the next one.
    """

    TOKEN_IDS = "token_ids"
    POSITIONS = "positions"
    QUERY_START = "query_start"
    CONTEXT_LEN = "context_len"
    LOGITS_ROWS = "logits_rows"
    SLOTS = "slots"
    LONGEST_CONTEXT = "longest_context"
    PAGE_TABLE = "page_table"
    SLOT_MAPPING = "slot_mapping"
    CACHE = "cache"
    LAYER = "layer"
    HIDDEN = "hidden"


STEP_SHAPES: Mapping[Source, tuple[Dim, ...]] = {
    Source.TOKEN_IDS: ("T",),
    Source.POSITIONS: ("T",),
    Source.QUERY_START: ("S+1",),
    Source.CONTEXT_LEN: ("S",),
    Source.LOGITS_ROWS: ("L",),
    Source.SLOTS: ("S",),
    Source.LONGEST_CONTEXT: (1,),
    Source.PAGE_TABLE: ("S", "P"),
    Source.SLOT_MAPPING: ("T",),
}
PAGED_SOURCES = (Source.PAGE_TABLE, Source.SLOT_MAPPING)
# What is bound once, whatever the step.
BOUND_SOURCES = (Source.CACHE, Source.LAYER)
# The graph that the engine loop runs; the output that it samples from, or in its place the one that
# is pooled.
TARGET_GRAPH = "target"
LOGITS = "logits"
STATES = "states"
# Beside logits, where a graph gives them: the best token of each row, and its logit.
TOP_TOKEN = "top_token"
TOP_LOGIT = "top_logit"
# What tokens are made of.
SAMPLED = (LOGITS, TOP_TOKEN, TOP_LOGIT)
# What asks such a head, by the name of ``--speculative``.
EAGLE3 = "eagle3"
# The graph of a head that guesses tokens, the output of the target graph that it takes, and what it
# gives for each of ``logits_rows``: its likeliest token, and what it takes with that one.
HEAD_GRAPH = "head"
HIDDEN = "hidden"
DRAFTS = "drafts"
NEXT_HIDDEN = "next_hidden"
# The cache of an engine that has one; names of what belongs to another carry that one's name.
KV = "kv"
# What people call pages of 16-bit keys and 8-bit values, which are arrays of bytes.
K16V8 = "k16v8"


@dataclass(frozen=True, slots=True)
class CacheArray:
    """One tensor of a cache: ``[layers, pages or slots, *shape]`` of ``dtype``; its name is its
    own in the engine."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of one page or slot in one layer."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class CacheSpec:
    """What some layers remember of a sequence.

    ``paged``: a page holds ``page_size`` tokens; with a ``window`` a query sees that many tokens,
    itself included, and pages behind it may be given back. ``state``: a slot holds what is left of
    all tokens so far, and what a graph finds there before the first token means nothing;
    ``page_size`` is 0. ``layers`` are the model's, in the order of the arrays' first axis.
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
    """An input of a graph: its name there, what is put in, and of which cache that speaks.

    A port of an array of a cache has the array's name, and one of a layer of it the array's name, a
    point and the place of the layer on the array's first axis.
    """

    name: str
    source: Source
    dtype: str
    shape: tuple[Dim, ...]
    cache: str | None = None


@dataclass(frozen=True, slots=True)
class Output:
    """An output of a graph; rows are those of ``logits_rows`` (L) or all tokens (T).

    ``updates`` names the port of an array of a cache, or of a layer of one, that the output is the
    next content of: whole, in the same memory. Whatever reads the port must come before what makes
    the output.
    """

    name: str
    dtype: str
    shape: tuple[Dim, ...]
    updates: str | None = None


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

    def output(self, name: str) -> Output | None:
        """The output of that name, None if there is none."""
        return next((output for output in self.outputs if output.name == name), None)


@dataclass(frozen=True, slots=True)
class Pooling:
    """What is made of the rows of ``states`` of an engine that does not generate.

    task        ``embed``: rows are hidden states after the last norm, and become a vector.
                ``score``: rows are the logits of the answer that a document fits a query and, if
                the model has one, of the answer that it does not; they become a number.
    mode        which tokens' rows: the ``last`` one's, or the ``mean`` of all.
    normalize   a vector is brought to length 1; a number to between 0 and 1 (a softmax of two
                logits, the sigmoid of one).
    dimensions  of a vector; 1 for a score.
    vocab_size  tokens that the model has.
    similarity  of two vectors, for scores.
    prompts     texts to be put before an input, or the instructions of a score, by name;
                ``default_prompt`` is the one that is used when nobody names any.
    """

    task: Literal["embed", "score"]
    mode: PoolingMode
    normalize: bool
    dimensions: int
    vocab_size: int
    similarity: Similarity
    prompts: dict[str, str]
    default_prompt: str | None


@dataclass(frozen=True, slots=True)
class Head:
    """What guesses tokens in the graph ``head``, whose cache has the same name.

    kind        ``eagle3``: a token by each run of the graph, which takes what the last one gave;
                ``p-eagle``: several by one run, with ``mask_token`` for those not yet known.
    layers      how many layers of the target the hidden states have gone through that it takes.
    vocab_size  tokens that it knows, of those of the target.
    source      the checkpoint that it is of.
    """

    kind: Literal["eagle3", "p-eagle"]
    layers: tuple[int, ...]
    vocab_size: int
    mask_token: int | None
    source: str


def attention_cache(
    dtype: str,
    layers: Sequence[int],
    page_size: int,
    num_kv_heads: int,
    head_dim: int,
    *,
    name: str = KV,
    window: int = 0,
) -> CacheSpec:
    """The pages of PagedAttention; dtype is float32, float16, bfloat16, float8_e4m3fn, int8, or
    k16v8 for bytes of 16-bit keys and 8-bit values. Scales of integers are an array beside."""
    planes, stored = (3, "uint8") if dtype == K16V8 else (2, dtype)
    page = (planes, num_kv_heads, page_size * head_dim)
    arrays = [CacheArray(_scoped("kv_cache", name), stored, page)]
    if dtype in ("int8", K16V8):
        scales = (2, num_kv_heads, page_size)
        arrays.append(CacheArray(_scoped("kv_scales", name), "float32", scales))
    return CacheSpec(name, "paged", tuple(layers), tuple(arrays), page_size, window)


def key_value_cache(cache: CacheSpec, dtype: str, page: tuple[int, ...]) -> CacheSpec:
    """What the layers of a cache of attention keep as two arrays, keys and values, each of ``page``
    a page."""
    names = (_scoped(name, cache.name) for name in ("key_cache", "value_cache"))
    return replace(cache, arrays=tuple(CacheArray(name, dtype, page) for name in names))


def step_port(source: Source) -> Port:
    """The input that takes an array of the step."""
    return Port(source.value, source, "int32", STEP_SHAPES[source])


def hidden_port(width: int, dtype: str = "float32") -> Port:
    """The input that takes ``width`` numbers of each token."""
    return Port(Source.HIDDEN.value, Source.HIDDEN, dtype, ("T", width))


def paged_port(source: Source, cache: CacheSpec) -> Port:
    """The input that takes a step's page table or slot mapping of a paged cache."""
    shape = tuple(_scoped(dim, cache.name) if dim == "P" else dim for dim in STEP_SHAPES[source])
    return Port(_scoped(source.value, cache.name), source, "int32", shape, cache.name)


def array_port(array: CacheArray, cache: CacheSpec) -> Port:
    """The input that is an array of a cache."""
    count = _scoped("pages" if cache.kind == "paged" else "slots", cache.name)
    shape: tuple[Dim, ...] = (len(cache.layers), count, *array.shape)
    return Port(array.name, Source.CACHE, array.dtype, shape, cache.name)


def layer_port(array: CacheArray, cache: CacheSpec, layer: int) -> Port:
    """The input that is what the layer at this place of a paged cache has of an array."""
    shape: tuple[Dim, ...] = (_scoped("pages", cache.name), *array.shape)
    return Port(f"{array.name}.{layer}", Source.LAYER, array.dtype, shape, cache.name)


def ports_of(caches: Sequence[CacheSpec]) -> Iterator[Port]:
    """Every input that a graph on these caches can have, their arrays whole."""
    for source in STEP_SHAPES:
        if source not in (*PAGED_SOURCES, Source.LONGEST_CONTEXT):
            yield step_port(source)
    for cache in caches:
        if cache.kind == "paged":
            yield from (paged_port(source, cache) for source in PAGED_SOURCES)
        yield from (array_port(array, cache) for array in cache.arrays)


def layer_ports_of(caches: Sequence[CacheSpec]) -> Iterator[Port]:
    """Every further input of a graph that takes the arrays of these caches a layer at a time."""
    yield step_port(Source.LONGEST_CONTEXT)
    for cache in paged(caches):
        for array in cache.arrays:
            for layer in range(len(cache.layers)):
                yield layer_port(array, cache, layer)


def paged(caches: Iterable[CacheSpec]) -> tuple[CacheSpec, ...]:
    """The caches whose content lies in pages."""
    return tuple(cache for cache in caches if cache.kind == "paged")


def states(caches: Iterable[CacheSpec]) -> tuple[CacheSpec, ...]:
    """The caches that hold a state a sequence."""
    return tuple(cache for cache in caches if cache.kind == "state")


def page_size_of(caches: Sequence[CacheSpec]) -> int:
    """Tokens of a page, the same in all paged caches."""
    return paged(caches)[0].page_size


def bytes_per_token(caches: Sequence[CacheSpec]) -> int:
    """Bytes that one token takes in the pages of all layers, scales included."""
    return sum(cache.bytes_per_page // cache.page_size for cache in paged(caches))


def kv_dtype_of(caches: Sequence[CacheSpec]) -> str:
    """The dtype of pages, for people: that of the first paged cache."""
    dtype = paged(caches)[0].arrays[0].dtype
    return K16V8 if dtype == "uint8" else dtype


def _scoped(name: str, cache: str) -> str:
    return name if cache == KV else f"{name}.{cache}"
