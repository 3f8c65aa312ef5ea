"""PagedAttention on CUDA: which kernels run, and in what shape.

Pages are bfloat16, float16, or float8_e4m3fn (from compute capability 8.9 on), and k is row-major
in them (``k_row_major``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from slipstream.plugins.cuda.detect import shared_memory
from slipstream.plugins.cuda.launch import (
    capability_of,
    interpreting,
    launch_options,
    multiprocessors,
)
from slipstream.plugins.paged_attention.cuda.hopper_decode import hopper_decode_kernel, page_layout
from slipstream.plugins.paged_attention.cuda.hopper_plan import make_plan, programs_of
from slipstream.plugins.paged_attention.cuda.hopper_prefill import (
    hopper_prefill_kernel,
    part_of_page,
)
from slipstream.plugins.paged_attention.cuda.kernels import (
    decode_kernel,
    prefill_kernel,
    write_kernel,
)
from slipstream.plugins.paged_attention.reference import Attributes

_MAX_SPLITS = 32  # of a sequence's keys in the decode kernel
_LEAST_SPLIT = 64  # keys
# Queries times heads of a block of the prefill kernel, whose sums are in registers.
_BLOCK_ROWS, _BLOCK_SUMS = 128, 1 << 15
_SINGLE_ROWS = 64  # of a block of a single query: what fills an instruction of Hopper
_DECODE_TILE = 1 << 14  # numbers of k, and as many of v, that a decode holds at a time
_WIDE = 256  # elements of a head, beyond which shared memory holds few keys
_NO_WINDOW = 1 << 30
# Sums that its registers hold beside those of the splits before, and how many leave room for more
# than one program.
_HOPPER_SUMS, _HOPPER_NARROW = 1 << 12, 1 << 11
# Numbers of k and v that a program's copies are ahead, at least two pages, and twice as many where
# a multiprocessor has one program. Of few heads, whose pages soon end, the products behind them
# have the room, and begin at once.
_HOPPER_RING = 1 << 15
# Of the prefill kernel for Hopper, by elements of a head: keys of a tile, and tiles of k and of v
# in shared memory. Over float8 pages: tiles of k, of v, and of codes of v.
_HOPPER_TILES = {64: (128, 4), 128: (128, 2), 256: (64, 2)}
_HOPPER_CODED_TILES = {64: (4, 4, 3), 128: (3, 3, 2)}
# Of each of its 384 threads, or 512 where codes are decoded; those that multiply take from the
# others.
_HOPPER_REGISTERS, _HOPPER_CODED_REGISTERS = 168, 128


@dataclass(frozen=True, slots=True, eq=False)
class StepTensors:
    """One step on the device; all int32.

    query_start ``[S+1]``, context_len ``[S]``, page_table ``[S, P]`` (rows may lie further apart)
    and slot_mapping ``[T]`` are the operator's inputs. The first ``num_decodes`` sequences have one
    query each, token rows 0 to num_decodes - 1; where ``queries`` is more than 1 all sequences are
    decodes, of up to so many tokens. The queries of the others are cut into blocks of
    ``query_block`` tokens: block_sequence ``[NB]`` names a block's sequence, -1 where there is no
    block, and block_start ``[NB]`` its first query, counted from the sequence's first one. The
    ``query_block`` of a layer is at least that of the step; 1 says that every block is one query.

    In the deterministic mode ``num_decodes`` is 0: what a decode computes is then, bit for bit,
    what it would be as part of a chunk. A captured step does not know how many of its sequences are
    decodes: ``num_decodes`` is then how many may be, and decode_len ``[S]`` has the context_len of
    those that are, 0 of the others.

    Padding has a context_len of 0 or a slot of -1; its output is undefined.
    """

    query_start: torch.Tensor
    context_len: torch.Tensor
    page_table: torch.Tensor
    slot_mapping: torch.Tensor
    block_sequence: torch.Tensor
    block_start: torch.Tensor
    num_decodes: int
    query_block: int
    queries: int = 1
    decode_len: torch.Tensor | None = None

    @property
    def sure_decodes(self) -> int:
        """How many of the first sequences are decodes whatever the arrays say."""
        return self.num_decodes if self.decode_len is None else 0

    @property
    def decoded(self) -> torch.Tensor:
        """The tokens that the decode kernel attends to, of each sequence ``[S]``."""
        return self.context_len if self.decode_len is None else self.decode_len


@dataclass(frozen=True, slots=True, eq=False)
class DecodeWorkspace:
    """What the programs of a decode hand to each other; calls on one stream may share it, those
    with fewer or smaller heads, too.

    partials ``[T, num_heads, splits, head_dim]`` and statistics ``[T, num_heads, splits, 2]`` are
    float32: the softmax sums of a split, its largest score and the sum of its weights.
    arrivals, int32 ``[T, num_kv_heads <= num_heads]``, is zero between calls.
    """

    partials: torch.Tensor
    statistics: torch.Tensor
    arrivals: torch.Tensor

    @classmethod
    def allocate(
        cls,
        max_tokens: int,
        num_heads: int,
        head_dim: int,
        max_seq_len: int,
        device: torch.device | str,
    ) -> DecodeWorkspace:
        """Space for steps of decodes of up to ``max_tokens`` tokens.

        A sequence has at most 32 splits, fewer where ``max_seq_len`` is below 2048; longer
        sequences are no error.
        """
        splits = min(triton.cdiv(max_seq_len, _LEAST_SPLIT), _MAX_SPLITS)
        rows = (max_tokens, num_heads, splits)
        return cls(
            torch.empty((*rows, head_dim), dtype=torch.float32, device=device),
            torch.empty((*rows, 2), dtype=torch.float32, device=device),
            torch.zeros((max_tokens, num_heads), dtype=torch.int32, device=device),
        )


@dataclass(frozen=True, slots=True)
class _Scalars:
    """Factors of one layer; scores are in units of log 2."""

    scale: float
    soft_cap: float | None
    window: int
    v_scale: float


def query_block(a: Attributes) -> int:
    """Query tokens of a block of the prefill kernel."""
    return max(_block_rows(a) // (a.num_heads // a.num_kv_heads), 1)


def _block_rows(a: Attributes) -> int:
    return min(_BLOCK_ROWS, _BLOCK_SUMS // _width(a))


def _width(a: Attributes) -> int:
    return max(int(triton.next_power_of_2(a.head_dim)), 16)


def paged_attention(  # noqa: PLR0913 - the operator's inputs
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    kv_cache: torch.Tensor,
    step: StepTensors,
    attributes: Attributes,
    *,
    q_norm: torch.Tensor | None = None,
    k_norm: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    workspace: DecodeWorkspace,
    pdl: bool = False,
    early: bool = False,
    deterministic: bool = False,
    plans: dict[tuple[int, ...], torch.Tensor] | None = None,
) -> torch.Tensor:
    """Attention ``[T, num_heads * head_dim]`` of the dtype of ``qkv``; see the operator's spec.

    Writes k and v, as far as ``qkv`` has them, into ``kv_cache``. The queries of sequences that are
    no decodes are normed and turned in place in ``qkv``. A decode's result depends on nothing but
    its own sequence. ``deterministic``: a token's, on nothing but the tokens up to it, for which
    there must be no decodes and one kernel. ``early``: only qkv may still be written, by the kernel
    in front; pages, angles and ``step`` are there. ``plans`` of its decodes are made once by calls
    of one step that share them.
    """
    a = attributes
    assert not (deterministic and step.num_decodes), step.num_decodes
    assert a.k_row_major and a.scale > 0, "CUDA pages hold row-major keys"
    assert qkv.is_contiguous() and cos.is_contiguous() and sin.is_contiguous()
    pages = kv_cache[a.layer]
    assert pages.is_contiguous()
    output = torch.empty(
        (qkv.shape[0], a.num_heads * a.head_dim), dtype=qkv.dtype, device=qkv.device
    )
    if step.queries > 1:
        _write(qkv, cos, sin, pages, step, a, (q_norm, k_norm), pdl)
    if step.num_decodes:
        inputs = (qkv, cos, sin, pages, step, a, (q_norm, k_norm, sinks), workspace, output, pdl)
        if _suits_hopper_decode(a, pages, step.queries):
            _hopper_decode(*inputs, early, {} if plans is None else plans)
        else:
            _decode(*inputs)
    if step.sure_decodes < qkv.shape[0] and len(step.block_sequence):
        # What the decode kernel has read and stored is turned and stored again where it may be any.
        _write(qkv, cos, sin, pages, step, a, (q_norm, k_norm), pdl)
        if not deterministic and _suits_hopper_prefill(qkv, pages, a):
            _hopper_prefill(qkv, pages, step, a, sinks, output)
        else:
            _prefill(qkv, pages, step, a, sinks, output, pdl)
    return output


def _scalars(a: Attributes, pages: torch.Tensor) -> _Scalars:
    coded = pages.dtype == torch.float8_e4m3fn
    return _Scalars(
        scale=a.scale * (a.k_scale if coded else 1.0) * math.log2(math.e),
        soft_cap=a.soft_cap if a.soft_cap > 0 else None,
        window=a.sliding_window,
        v_scale=a.v_scale if coded else 1.0,
    )


def _shape(a: Attributes) -> dict[str, int]:
    return {
        "NUM_HEADS": a.num_heads,
        "NUM_KV_HEADS": a.num_kv_heads,
        "HEAD_DIM": a.head_dim,
        "PAGE": a.page_size,
        "BLOCK_D": _width(a),
        "KV_PARTS": a.kv_parts,
    }


def _programs(sequences: int, num_kv_heads: int) -> tuple[int, int]:
    """Programs that may share a head of a sequence, and the fewest pages worth one of them.

    A few hundred programs fill a GPU, and those without work are not free: many sequences need
    few programs each, but a long one among them still gets two.
    """
    heads = sequences * num_kv_heads
    return min(max(1024 // heads, 2), _MAX_SPLITS), min(max(heads // 32, 1), 16)


def _decode(  # noqa: PLR0913 - the operator's inputs
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    pages: torch.Tensor,
    step: StepTensors,
    a: Attributes,
    weights: tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None],
    workspace: DecodeWorkspace,
    output: torch.Tensor,
    pdl: bool,
) -> None:
    by = _scalars(a, pages)
    programs, min_pages = _programs(step.num_decodes, a.num_kv_heads)
    rows = max(triton.next_power_of_2(a.num_heads // a.num_kv_heads * step.queries), 16)
    keys = min(a.page_size, _DECODE_TILE // _width(a))
    # Beside queries of many drafts and the widest heads some GPUs have room for half of that: keys
    # as numbers of 16 bits, and as the codes that those are made of.
    if (rows * 2 + keys * 3) * _width(a) > shared_memory(capability_of(pages.device)):
        keys //= 2
    warps = 4 if max(keys, 2 * rows) * _width(a) <= 8192 else 8
    decode_kernel[(a.num_kv_heads, step.num_decodes, programs)](
        qkv,
        cos,
        sin,
        pages,
        step.query_start,
        step.decoded,
        step.page_table,
        step.slot_mapping,
        *weights,
        output,
        workspace.partials,
        workspace.statistics,
        workspace.arrivals,
        step.page_table.stride(0),
        by.window or _NO_WINDOW,
        min_pages,
        by.scale,
        by.soft_cap,
        a.norm_eps,
        a.k_scale,
        by.v_scale,
        **_shape(a),
        V_NORM=a.v_norm,
        ROTARY=cos.shape[1],
        BLOCK_N=keys,
        QUERIES=step.queries,
        ROWS=rows,
        MAX_SPLITS=workspace.partials.shape[2],
        PDL=pdl,
        **launch_options(num_warps=warps, pdl=pdl),
    )


def _suits_hopper_decode(a: Attributes, pages: torch.Tensor, queries: int) -> bool:
    """Whether the kernel for Hopper knows such a layer, and holds the sums of so many queries."""
    return (
        capability_of(pages.device)[0] == 9
        and not interpreting()
        and a.head_dim in (64, 128, 256)
        and a.page_size == 64
        and a.kv_parts != 1
        and not (a.sliding_window or a.soft_cap or a.v_norm)
        and (queries == 1 or _hopper_columns(a, queries) * a.head_dim <= _HOPPER_SUMS)
    )


def _hopper_columns(a: Attributes, queries: int) -> int:
    return max(int(triton.next_power_of_2(a.num_heads // a.num_kv_heads * queries)), 8)


def _hopper_decode(  # noqa: PLR0913 - the operator's inputs
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    pages: torch.Tensor,
    step: StepTensors,
    a: Attributes,
    weights: tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None],
    workspace: DecodeWorkspace,
    output: torch.Tensor,
    pdl: bool,
    early: bool,
    plans: dict[tuple[int, ...], torch.Tensor],
) -> None:
    by = _scalars(a, pages)
    heads, processors = step.num_decodes * a.num_kv_heads, multiprocessors(pages.device)
    # Decoding float8 keeps three programs of a multiprocessor busy, and 16 bits hardly one.
    coded, columns = pages.element_size() == 1, _hopper_columns(a, step.queries)
    together, registers = (3, 80) if coded and a.head_dim <= 128 else (1, 128)
    if step.queries > 1 and columns * a.head_dim > _HOPPER_NARROW:
        together, registers = 1, 224
    few = heads <= processors // 4
    ring = 2 * _HOPPER_RING if together == 1 and not few and heads <= processors else _HOPPER_RING
    tile = [a.page_size, a.head_dim]
    plan, slots, max_splits = None, together * processors, workspace.partials.shape[2]
    joins = step.queries == 1 and a.kv_parts > 0
    # Keys that another kernel of this step has stored are not older than the one in front.
    early = early and joins
    if step.num_decodes > 1:
        key = (a.num_kv_heads, a.page_size, slots, max_splits, joins)
        if key not in plans:
            contexts = step.decoded[: step.num_decodes]
            plans[key] = make_plan(contexts, slots, max_splits, a, joins=joins, pdl=pdl)
            early = False  # what is in front is the plan
        plan = plans[key]
    hopper_decode_kernel[(a.num_kv_heads, programs_of(step.num_decodes, slots, a.num_kv_heads))](
        qkv,
        cos,
        sin,
        TensorDescriptor.from_tensor(
            pages.view(-1, a.head_dim), tile, page_layout(tile, pages.dtype)
        ),
        pages,
        step.query_start,
        step.decoded,
        step.page_table,
        step.slot_mapping,
        *weights,
        output,
        workspace.partials,
        workspace.statistics,
        workspace.arrivals,
        plan,
        step.page_table.stride(0),
        slots,
        by.scale,
        a.norm_eps,
        a.k_scale,
        by.v_scale,
        NUM_HEADS=a.num_heads,
        NUM_KV_HEADS=a.num_kv_heads,
        HEAD_DIM=a.head_dim,
        ROTARY=cos.shape[1],
        PAGE=a.page_size,
        KV_PARTS=a.kv_parts,
        QUERIES=step.queries,
        COLUMNS=columns,
        STAGES=max(ring // (2 * a.page_size * a.head_dim), 2),
        MAX_SPLITS=max_splits,
        PDL=pdl,
        EARLY=early,
        AT_ONCE=few,
        maxnreg=registers,
        **launch_options(num_warps=4, pdl=pdl),
    )


def _write(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    pages: torch.Tensor,
    step: StepTensors,
    a: Attributes,
    norms: tuple[torch.Tensor | None, torch.Tensor | None],
    pdl: bool,
) -> None:
    heads = triton.next_power_of_2(a.num_heads // a.num_kv_heads)
    first = step.sure_decodes if step.queries == 1 else 0
    write_kernel[(qkv.shape[0] - first, a.num_kv_heads)](
        qkv,
        cos,
        sin,
        pages,
        step.slot_mapping,
        *norms,
        first,
        a.norm_eps,
        a.k_scale,
        a.v_scale,
        **_shape(a),
        V_NORM=a.v_norm,
        ROTARY=cos.shape[1],
        PDL=pdl,
        **launch_options(num_warps=1 if heads * _width(a) <= 2048 else 4, pdl=pdl),
    )


def _prefill(
    qkv: torch.Tensor,
    pages: torch.Tensor,
    step: StepTensors,
    a: Attributes,
    sinks: torch.Tensor | None,
    output: torch.Tensor,
    pdl: bool,
) -> None:
    by = _scalars(a, pages)
    keys, warps, stages = _prefill_tile(capability_of(qkv.device), a, pages.element_size())
    group = a.num_heads // a.num_kv_heads
    rows, block = max(_block_rows(a), triton.next_power_of_2(group)), query_block(a)
    if step.query_block == 1 and group <= _SINGLE_ROWS < rows:
        # As many rows a warp, and the same keys a tile: the bits of a row are those of a chunk.
        warps, rows, block = warps * _SINGLE_ROWS // rows, _SINGLE_ROWS, 1
    prefill_kernel[(len(step.block_sequence) * a.num_kv_heads,)](
        qkv,
        pages,
        step.query_start,
        step.context_len,
        step.page_table,
        step.block_sequence,
        step.block_start,
        sinks,
        output,
        step.page_table.stride(0),
        by.scale,
        by.soft_cap,
        by.v_scale,
        **_shape(a),
        BLOCK_Q=block // step.query_block * step.query_block,
        BLOCK_M=rows,
        BLOCK_N=keys,
        WINDOW=by.window,
        PDL=pdl,
        **launch_options(num_warps=warps, num_stages=stages, pdl=pdl),
    )


def _suits_hopper_prefill(qkv: torch.Tensor, pages: torch.Tensor, a: Attributes) -> bool:
    """Whether there is the GPU, and this is a layer, that the prefill kernel for Hopper is for."""
    keys, _ = _HOPPER_TILES.get(a.head_dim, (0, 0))
    coded = pages.dtype == torch.float8_e4m3fn
    return (
        capability_of(qkv.device) == (9, 0)
        and not interpreting()
        and qkv.element_size() == 2
        and (a.head_dim in _HOPPER_CODED_TILES if coded else qkv.dtype == pages.dtype)
        and a.page_size in (32, 64, 128)
        and a.page_size <= keys
        and a.num_heads // a.num_kv_heads <= _BLOCK_ROWS
        and not (a.sliding_window or a.soft_cap)
    )


def _hopper_prefill(
    qkv: torch.Tensor,
    pages: torch.Tensor,
    step: StepTensors,
    a: Attributes,
    sinks: torch.Tensor | None,
    output: torch.Tensor,
) -> None:
    """``_prefill`` by programs that work on one block after the other."""
    by = _scalars(a, pages)
    block, stages = _HOPPER_TILES[a.head_dim]
    coded = pages.dtype == torch.float8_e4m3fn
    keys, values, codes = _HOPPER_CODED_TILES[a.head_dim] if coded else (stages, stages, 0)
    blocks = len(step.block_sequence) * a.num_kv_heads
    part, layout = part_of_page(a.page_size, a.head_dim, pages.dtype)
    hopper_prefill_kernel[(min(blocks, multiprocessors(qkv.device)),)](
        qkv,
        TensorDescriptor.from_tensor(pages.view(-1, a.head_dim), part, layout),
        step.query_start,
        step.context_len,
        step.page_table,
        step.block_sequence,
        step.block_start,
        sinks,
        output,
        blocks,
        step.page_table.stride(0),
        by.scale,
        by.v_scale,
        NUM_HEADS=a.num_heads,
        NUM_KV_HEADS=a.num_kv_heads,
        HEAD_DIM=a.head_dim,
        PAGE=a.page_size,
        KV_PARTS=a.kv_parts,
        BLOCK_Q=query_block(a) // step.query_block * step.query_block,
        BLOCK_N=block,
        KEYS=keys,
        VALUES=values,
        CODES=codes,
        maxnreg=_HOPPER_CODED_REGISTERS if coded else _HOPPER_REGISTERS,
        **launch_options(num_warps=4),
    )


def _prefill_tile(
    capability: tuple[int, int], a: Attributes, bytes_each: int
) -> tuple[int, int, int]:
    """Keys of a tile, warps and stages of the prefill kernel: as many keys as shared memory holds
    for every stage beside the queries, at most two pages, or one without Hopper's registers."""
    key = _width(a) * bytes_each * 2
    stages, most = (3, 128) if capability[0] >= 9 else (2, 64)
    if _width(a) > _WIDE:
        stages = 2
    rows = _block_rows(a) * _width(a) * 2
    if _width(a) > _WIDE and capability[0] >= 10:
        rows *= 2  # such sums are brought to Blackwell's tensor memory by way of shared memory
    space = shared_memory(capability) - rows
    keys = 2 * a.page_size
    while keys > 16 and (keys > most or keys * key * stages > space):
        keys //= 2
    return keys, 8, max(min(stages, space // (keys * key)), 1)
