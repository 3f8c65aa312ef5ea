"""What PagedAttention computes, in NumPy: clear and slow, float64 inside."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Wide = NDArray[np.float64]
Ints = NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Attributes:
    """The operator's attributes; see its spec."""

    layer: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    page_size: int
    scale: float
    sliding_window: int = 0
    soft_cap: float = 0.0
    norm_eps: float = 1e-6
    kv_parts: int = 2
    v_norm: int = 0
    k_row_major: int = 0
    k_scale: float = 1.0
    v_scale: float = 1.0

    def unit(self, which: int) -> float:
        """What a code of k (``which`` 0) or v (1) in a float8 page is multiplied by."""
        return self.v_scale if which else self.k_scale

    def transposed(self, which: int) -> bool:
        """Whether a head of a page is ``[head_dim, page_size]``."""
        return which == 0 and not self.k_row_major


@dataclass(frozen=True, slots=True, eq=False)
class Inputs:
    """The operator's inputs; see its spec. ``kv_cache`` and ``kv_scales`` are written in place."""

    qkv: Floats
    cos: Floats
    sin: Floats
    kv_cache: NDArray[np.generic]
    query_start: Ints
    context_len: Ints
    page_table: Ints
    slot_mapping: Ints
    kv_scales: Floats | None = None
    q_norm: Floats | None = None
    k_norm: Floats | None = None
    sinks: Floats | None = None

    @property
    def integers(self) -> bool:
        """Whether pages hold integers in units of their scales."""
        return self.kv_cache.dtype in (np.int8, np.uint8)

    @property
    def key_dtype(self) -> np.dtype[np.signedinteger]:
        """That of k in pages of integers."""
        return np.dtype(np.int16 if self.kv_cache.dtype == np.uint8 else np.int8)


def rotate_half(x: Wide, cos: Floats, sin: Floats) -> Wide:
    """Rotary embedding (Su et al., 2021) of heads ``[T, H, D]`` by angles ``[T, R]``.

    Dimension i < R turns with i + R, the "rotate half" order of transformers; from 2 R on none do.
    """
    half = cos.shape[1]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    c, s = cos[:, None].astype(np.float64), sin[:, None].astype(np.float64)
    return np.concatenate([first * c - second * s, second * c + first * s, rest], axis=-1)


def largest_code(head_dim: int) -> int:
    """What 16-bit codes of keys, and of queries beside integer pages, are at most: so many that a
    sum of ``head_dim`` of their products fits 32 bits."""
    return math.isqrt((2**31 - 1) // head_dim)


def head_blocks(inputs: Inputs, a: Attributes, which: int) -> NDArray[np.generic]:
    """The k (``which`` 0) or v (1) of a layer in every page, as a view
    ``[num_pages, num_kv_heads, page_size, D]``, of integers ``[..., page_size, D // 2, 2]`` for k
    and ``[..., page_size // 2, 2, D]`` for v: their pairs along the axis that is added up lie
    together."""
    layer = inputs.kv_cache[a.layer]
    lead = (len(layer), a.num_kv_heads)
    size = a.page_size * a.head_dim
    heads: NDArray[np.generic]
    if inputs.integers:
        pages = layer.reshape(len(layer), -1).view(np.int8)
        values = pages[:, -a.num_kv_heads * size :]
        keys = pages[:, : -values.shape[1]].view(inputs.key_dtype)
        if which == 0:
            pairs = keys.reshape(*lead, a.head_dim // 2, a.page_size, 2)
            heads = pairs.transpose(0, 1, 3, 2, 4)
        else:
            heads = values.reshape(*lead, a.page_size // 2, a.head_dim, 2).transpose(0, 1, 2, 4, 3)
    elif a.transposed(which):
        columns = layer[:, which].reshape(*lead, a.head_dim, a.page_size)
        heads = columns.transpose(0, 1, 3, 2)
    else:
        heads = layer[:, which].reshape(*lead, a.page_size, a.head_dim)
    return heads


def write_page(inputs: Inputs, a: Attributes, which: int, slot: int, heads: Wide) -> None:
    """Store one token's k (``which`` 0) or v (1) heads ``[num_kv_heads, D]`` at ``slot``.

    Values round to the dtype of the pages. Integers are symmetric per token and head:
    ``scale = max|x| / 127``, or ``/ largest_code(D)`` for keys of 16 bits. float8_e4m3fn pages hold
    ``x / a.unit(which)``, saturated to ±448.
    """
    page, offset = divmod(slot, a.page_size)
    block = head_blocks(inputs, a, which)[page]
    if inputs.integers:
        assert inputs.kv_scales is not None, "integer pages need kv_scales"
        wide = which == 0 and inputs.key_dtype == np.int16
        scale = np.abs(heads).max(axis=-1) / (largest_code(a.head_dim) if wide else 127)
        inputs.kv_scales[a.layer, page, which, :, offset] = scale
        codes = np.rint(heads / np.where(scale > 0, scale, 1)[:, None]).astype(block.dtype)
        if which == 0:
            block[:, offset] = codes.reshape(a.num_kv_heads, -1, 2)
        else:
            block[:, offset // 2, offset % 2] = codes
        return
    if inputs.kv_cache.dtype == ml_dtypes.float8_e4m3fn:
        heads = np.clip(heads / a.unit(which), -448, 448)
    block[:, offset] = heads.astype(inputs.kv_cache.dtype)


def read_pages(inputs: Inputs, a: Attributes, which: int, sequence: int) -> Wide:
    """The k or v ``[num_kv_heads, context_len, D]`` of one sequence, from its pages."""
    context = int(inputs.context_len[sequence])
    pages = inputs.page_table[sequence, : -(-context // a.page_size)]
    blocks = head_blocks(inputs, a, which)[pages].astype(np.float64)
    tokens = blocks.reshape(-1, a.num_kv_heads, a.page_size, a.head_dim).transpose(1, 0, 2, 3)
    if inputs.integers:
        assert inputs.kv_scales is not None, "integer pages need kv_scales"
        tokens = tokens * inputs.kv_scales[a.layer, pages, which].transpose(1, 0, 2)[..., None]
    if inputs.kv_cache.dtype == ml_dtypes.float8_e4m3fn:
        tokens = tokens * a.unit(which)
    heads: Wide = tokens.reshape(a.num_kv_heads, -1, a.head_dim)[:, :context]
    return heads


def attend(q: Wide, k: Wide, v: Wide, a: Attributes, sinks: Floats | None) -> Wide:
    """Causal attention ``[n, Hq, D]`` of a context's last n tokens; k, v ``[Hkv, context, D]``."""
    n, context = q.shape[0], k.shape[1]
    k, v = (np.repeat(x, a.num_heads // a.num_kv_heads, axis=0) for x in (k, v))
    scores = np.einsum("nhd,hcd->hnc", q, k) * a.scale
    if a.soft_cap > 0:
        scores = a.soft_cap * np.tanh(scores / a.soft_cap)
    query = np.arange(context - n, context)[:, None]
    key = np.arange(context)[None]
    visible = key <= query
    if a.sliding_window > 0:
        visible &= key > query - a.sliding_window
    scores = np.where(visible, scores, -np.inf)
    if sinks is not None:
        column = np.broadcast_to(sinks.astype(np.float64)[:, None, None], (*scores.shape[:2], 1))
        scores = np.concatenate([scores, column], axis=-1)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    output: Wide = np.einsum("hnc,hcd->nhd", weights[..., :context], v)
    return output


def _norm(x: Wide, weight: Floats | None, eps: float) -> Wide:
    if weight is None:
        return x
    normed: Wide = x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps) * weight
    return normed


def write_pages(inputs: Inputs, attributes: Attributes) -> Wide:
    """The first phase: store the k and v that the step is given, and return its rotated queries
    ``[T, Hq, D]``, which beside pages of integers are rounded as 16-bit keys are."""
    a = attributes
    heads = inputs.qkv.astype(np.float64).reshape(inputs.qkv.shape[0], -1, a.head_dim)
    q, given = heads[:, : a.num_heads], heads[:, a.num_heads :]
    if a.kv_parts:
        k, v = given[:, : a.num_kv_heads], given[:, -a.num_kv_heads :]
        k = rotate_half(_norm(k, inputs.k_norm, a.norm_eps), inputs.cos, inputs.sin)
        v = _norm(v, np.ones(a.head_dim, np.float32) if a.v_norm else None, a.norm_eps)
        for token, slot in enumerate(inputs.slot_mapping):
            write_page(inputs, a, 0, int(slot), k[token])
            write_page(inputs, a, 1, int(slot), v[token])
    queries = rotate_half(_norm(q, inputs.q_norm, a.norm_eps), inputs.cos, inputs.sin)
    if not inputs.integers:
        return queries
    unit = np.abs(queries).max(axis=-1, keepdims=True) / largest_code(a.head_dim)
    rounded: Wide = np.rint(queries / np.where(unit > 0, unit, 1)) * unit
    return rounded


def attend_pages(inputs: Inputs, attributes: Attributes, queries: Wide) -> Floats:
    """The second phase: float32 ``[T, num_heads * head_dim]`` from the pages alone."""
    output = np.empty(queries.shape)
    for s, (begin, end) in enumerate(itertools.pairwise(inputs.query_start)):
        keys, values = (read_pages(inputs, attributes, which, s) for which in (0, 1))
        output[begin:end] = attend(queries[begin:end], keys, values, attributes, inputs.sinks)
    return np.asarray(output.reshape(len(queries), -1), np.float32)


def paged_attention(inputs: Inputs, attributes: Attributes) -> Floats:
    """Attention over a paged KV cache (Kwon et al., 2023) for prefill chunks and decodes together.

    Returns float32 ``[T, num_heads * head_dim]`` and writes the k and v of ``inputs.qkv`` into
    ``inputs.kv_cache`` (and, for pages of integers, their scales into ``inputs.kv_scales``). The
    queries of a sequence are the last tokens of its context.
    """
    return attend_pages(inputs, attributes, write_pages(inputs, attributes))
