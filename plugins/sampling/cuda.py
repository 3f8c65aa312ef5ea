"""Sampling on a GPU: the buffers that live there, and the kernels of one step."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton

from slipstream.plugins.cuda.launch import launch_options
from slipstream.plugins.sampling import LOGPROB_COLUMNS, Field, Kind
from slipstream.plugins.sampling import cuda_kernels as kernels

BLOCK = 2048
GROUP = 32
# Tokens above the bound that one program can hold; with more, it reads the row again and again.
CANDIDATES = 4096
_TILE = 2048
_EDIT_PROGRAMS = 8
_EDIT_CHUNK = 1024


@dataclass(frozen=True, slots=True)
class FullBuffers:
    """What only steps of kind ``FULL`` use. R rows, S slots, V tokens in the vocabulary.

    Kept from step to step, by slot: ``history`` [S, max_seq_len] int32, the tokens of sequences
    with penalties; ``bitmask`` [max(R, S), ceil(V / 32)] int32, bit ``id % 32`` of word
    ``id // 32`` set for an allowed token, those of slots before those of rows after drafts;
    ``biases`` [S] int64, the address of each row's logit bias: int32 [2, n], distinct token ids
    over the bits of float32 values. ``logprobs`` [R, LOGPROB_COLUMNS] int32 is a result. The others
    are scratch.
    """

    history: torch.Tensor
    bitmask: torch.Tensor
    biases: torch.Tensor
    logprobs: torch.Tensor
    edited: torch.Tensor
    counts: torch.Tensor
    raw_block_max: torch.Tensor
    raw_block_sum: torch.Tensor
    raw_group_max: torch.Tensor
    block_above: torch.Tensor


@dataclass(slots=True)
class SamplerBuffers:
    """Device memory of fixed addresses, so that CUDA graphs can hold it.

    ``params`` [len(Field), R] int32: what ``Field`` says, set before every step.
    ``last_tokens`` [S] int32: the token sampled last for each slot, which the next step embeds.
    ``tokens`` [R] int32: the result; ``BROKEN`` where a row's largest logit is not finite.
    ``thresholds`` [R] float32: the least (edited) logit that could be drawn, where the temperature
    is not 0. The others are scratch; ``full`` is None before ``enable_full``.
    """

    max_seq_len: int
    vocab_size: int
    params: torch.Tensor
    last_tokens: torch.Tensor
    tokens: torch.Tensor
    thresholds: torch.Tensor
    best: torch.Tensor
    block_max: torch.Tensor
    block_id: torch.Tensor
    group_max: torch.Tensor
    group_sum: torch.Tensor
    state_int: torch.Tensor
    state_float: torch.Tensor
    candidate_values: torch.Tensor
    candidate_ids: torch.Tensor
    full: FullBuffers | None = None

    @classmethod
    def allocate(
        cls,
        max_rows: int,
        num_slots: int,
        vocab_size: int,
        max_seq_len: int,
        device: torch.device | str,
    ) -> SamplerBuffers:
        """Buffers for steps of at most ``max_rows`` rows of ``vocab_size`` logits."""

        def new(dtype: torch.dtype, *shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        blocks = triton.cdiv(vocab_size, BLOCK)
        groups = blocks * (BLOCK // GROUP)
        params = new(torch.int32, len(Field), max_rows)
        params[Field.SLOT] = -1
        return cls(
            max_seq_len=max_seq_len,
            vocab_size=vocab_size,
            params=params,
            last_tokens=new(torch.int32, num_slots),
            tokens=new(torch.int32, max_rows),
            thresholds=new(torch.float32, max_rows),
            best=new(torch.int32, max_rows, 2),
            block_max=new(torch.float32, max_rows, blocks),
            block_id=new(torch.int32, max_rows, blocks),
            group_max=new(torch.float32, max_rows, groups),
            group_sum=new(torch.float32, max_rows, groups),
            state_int=new(torch.int32, max_rows, 4),
            state_float=new(torch.float32, max_rows, 4),
            candidate_values=new(torch.float32, max_rows, CANDIDATES),
            candidate_ids=new(torch.int32, max_rows, CANDIDATES),
        )

    def enable_full(self) -> FullBuffers:
        """Allocate what kind ``FULL`` needs, once: about 8 bytes for each row and token of the
        vocabulary. To be called before the first such step is captured."""
        if self.full is not None:
            return self.full
        rows, slots, vocab = self.tokens.shape[0], self.last_tokens.shape[0], self.vocab_size
        device = self.tokens.device

        def new(dtype: torch.dtype, *shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.full = FullBuffers(
            history=new(torch.int32, slots, self.max_seq_len),
            bitmask=new(torch.int32, max(rows, slots), triton.cdiv(vocab, 32)),
            biases=new(torch.int64, slots),
            logprobs=new(torch.int32, rows, LOGPROB_COLUMNS),
            edited=new(torch.float32, rows, vocab),
            counts=new(torch.int32, rows, vocab),
            raw_block_max=torch.zeros_like(self.block_max),
            raw_block_sum=torch.zeros_like(self.block_max),
            raw_group_max=torch.zeros_like(self.group_max),
            block_above=torch.zeros_like(self.block_id),
        )
        return self.full


def normalizers(logits: torch.Tensor) -> torch.Tensor:
    """The log ``[R, 1]`` of the sum of the exponentials of each row of float32 ``[R, V]``, the same
    bits whatever R is; NaN where the largest logit is not finite."""
    assert logits.stride(1) == 1, logits.stride()
    found = torch.empty((len(logits), 1), dtype=torch.float32, device=logits.device)
    if len(logits):
        kernels.normalizer_kernel[(len(logits),)](
            logits, logits.stride(0), logits.shape[1], found, BLOCK=_TILE,
            **launch_options(num_warps=8),
        )  # fmt: skip
    return found


def sample(
    logits: torch.Tensor, buffers: SamplerBuffers, rows: int, kind: Kind, pdl: bool = False
) -> None:
    """Sample the first ``rows`` rows of ``logits`` (float32 [>= rows, V], not changed; rows may be
    apart) as ``buffers.params`` says, into ``tokens``, ``last_tokens`` and, for kind ``FULL``,
    ``logprobs`` and ``history`` of ``buffers``.

    Launches 2, 4 or 8 kernels. Kind ``FULL`` needs ``buffers.enable_full()`` before.
    """
    assert logits.shape[1] == buffers.vocab_size and logits.stride(1) == 1, logits.shape
    assert rows <= min(logits.shape[0], buffers.tokens.shape[0]), rows
    if kind is Kind.GREEDY:
        _sample_greedy(logits, buffers, rows, pdl)
        return
    if kind is Kind.FULL:
        assert buffers.full is not None, "enable_full() comes before the first full step"
        _edit(logits, buffers, buffers.full, rows, pdl)
    _draw(logits, buffers, rows, kind, pdl)
    if kind is Kind.FULL:
        assert buffers.full is not None
        _score(logits, buffers, buffers.full, rows, pdl)


def best_of_part(
    logits: torch.Tensor, buffers: SamplerBuffers, first: int, pdl: bool = False
) -> torch.Tensor:
    """The largest logit of every row, int32 ``[R, 2]``: its bits and the token, the first of those
    that have it; of float32 ``[R, W]`` of the tokens from ``first`` on, of which there may be none.

    NaN counts as infinite. What is asked of rows is not looked at.
    """
    rows, width = logits.shape
    assert logits.stride(1) == 1 and rows <= len(buffers.tokens), logits.shape
    blocks = triton.cdiv(width, BLOCK)
    kernels.argmax_kernel[(blocks, rows)](
        logits,
        logits.stride(0),
        max(0, min(width, buffers.vocab_size - first)),
        None,
        0,
        buffers.block_max,
        buffers.block_id,
        BLOCK=BLOCK,
        PDL=pdl,
        **launch_options(num_warps=4, pdl=pdl),
    )
    best = buffers.best[:rows]
    kernels.argmax_part_kernel[(rows,)](
        buffers.block_max,
        buffers.block_id,
        blocks,
        first,
        best.view(torch.float32),
        best[:, 1:],
        MANY=triton.next_power_of_2(blocks),
        PDL=pdl,
        **launch_options(num_warps=1, pdl=pdl),
    )
    return best


def sample_best(best: torch.Tensor, buffers: SamplerBuffers, pdl: bool = False) -> None:
    """Sample greedy rows from what ``best_of_part`` has found in all parts of the vocabulary, side
    by side in their order ``[R, 2 * parts]``: what ``sample`` makes of the logits."""
    rows, width = best.shape
    assert best.is_contiguous()
    _combine(best.view(torch.float32), best[:, 1:], width // 2, 2, buffers, rows, pdl)


def _sample_greedy(logits: torch.Tensor, b: SamplerBuffers, rows: int, pdl: bool) -> None:
    blocks = b.block_max.shape[1]
    kernels.argmax_kernel[(blocks, rows)](
        logits,
        logits.stride(0),
        b.vocab_size,
        b.params,
        b.params.stride(0),
        b.block_max,
        b.block_id,
        BLOCK=BLOCK,
        PDL=pdl,
        **launch_options(num_warps=4, pdl=pdl),
    )
    _combine(b.block_max, b.block_id, blocks, 1, b, rows, pdl)


def _combine(
    values: torch.Tensor,
    ids: torch.Tensor,
    count: int,
    step: int,
    b: SamplerBuffers,
    rows: int,
    pdl: bool,
) -> None:
    kernels.argmax_combine_kernel[(rows,)](
        b.params,
        b.params.stride(0),
        values,
        ids,
        count,
        b.tokens,
        b.last_tokens,
        STEP=step,
        MANY=triton.next_power_of_2(count),
        PDL=pdl,
        **launch_options(num_warps=1, pdl=pdl),
    )


def _edit(logits: torch.Tensor, b: SamplerBuffers, full: FullBuffers, rows: int, pdl: bool) -> None:
    kernels.mask_kernel[(b.block_max.shape[1], rows)](
        logits,
        logits.stride(0),
        b.vocab_size,
        b.params,
        b.params.stride(0),
        full.bitmask,
        full.bitmask.stride(0),
        full.edited,
        full.counts,
        full.raw_block_max,
        full.raw_block_sum,
        full.raw_group_max,
        BLOCK=BLOCK,
        GROUP=GROUP,
        PDL=pdl,
        **launch_options(num_warps=4, pdl=pdl),
    )
    kernels.edit_kernel[(_EDIT_PROGRAMS, rows)](
        b.vocab_size,
        b.params,
        b.params.stride(0),
        full.biases,
        full.history,
        full.history.stride(0),
        full.edited,
        full.counts,
        CHUNK=_EDIT_CHUNK,
        PDL=pdl,
        **launch_options(num_warps=4, pdl=pdl),
    )


def _draw(logits: torch.Tensor, b: SamplerBuffers, rows: int, kind: Kind, pdl: bool) -> None:
    full = b.full if kind is Kind.FULL else None
    edited = full.edited if full else logits
    counts = full.counts if full else b.tokens
    history = full.history if full else b.tokens
    blocks, groups = b.block_max.shape[1], b.group_max.shape[1]
    source = (logits, logits.stride(0), b.vocab_size, b.params, b.params.stride(0), edited)
    many = (blocks, rows)
    kernels.scan_kernel[many](
        *source,
        counts,
        b.block_max,
        b.block_id,
        b.group_max,
        b.group_sum,
        BLOCK=BLOCK,
        GROUP=GROUP,
        FULL=full is not None,
        PDL=pdl,
        **launch_options(num_warps=4, pdl=pdl),
    )
    kernels.bound_kernel[(rows,)](
        b.params,
        b.params.stride(0),
        b.group_max,
        b.group_sum,
        groups,
        b.state_int,
        b.state_float,
        GROUPS=triton.next_power_of_2(groups),
        GROUP=GROUP,
        PDL=pdl,
        **launch_options(num_warps=16, pdl=pdl),
    )
    kernels.collect_kernel[many](
        *source,
        b.block_max,
        b.block_id,
        b.group_max,
        b.state_int,
        b.state_float,
        b.candidate_values,
        b.candidate_ids,
        BLOCK=BLOCK,
        GROUP=GROUP,
        CANDIDATES=CANDIDATES,
        FULL=full is not None,
        PDL=pdl,
        **launch_options(num_warps=4, pdl=pdl),
    )
    kernels.select_kernel[(rows,)](
        *source,
        b.block_max,
        b.block_id,
        blocks,
        b.state_int,
        b.state_float,
        b.candidate_values,
        b.candidate_ids,
        b.tokens,
        b.last_tokens,
        b.thresholds,
        history,
        history.stride(0),
        BLOCKS=triton.next_power_of_2(blocks),
        CANDIDATES=CANDIDATES,
        TILE=_TILE,
        FULL=full is not None,
        PDL=pdl,
        **launch_options(num_warps=16, pdl=pdl),
    )


def _score(
    logits: torch.Tensor, b: SamplerBuffers, full: FullBuffers, rows: int, pdl: bool
) -> None:
    blocks, groups = b.block_max.shape[1], b.group_max.shape[1]
    source = (logits, logits.stride(0), b.vocab_size, b.params, b.params.stride(0))
    kernels.rank_kernel[(blocks, rows)](
        *source,
        full.raw_group_max,
        b.tokens,
        full.block_above,
        BLOCK=BLOCK,
        GROUP=GROUP,
        PDL=pdl,
        **launch_options(num_warps=4, pdl=pdl),
    )
    kernels.logprobs_kernel[(rows,)](
        *source,
        full.raw_block_max,
        full.raw_block_sum,
        full.raw_group_max,
        full.block_above,
        blocks,
        groups,
        b.tokens,
        b.last_tokens,
        full.logprobs,
        BLOCKS=triton.next_power_of_2(blocks),
        GROUPS=triton.next_power_of_2(groups),
        GROUP=GROUP,
        PDL=pdl,
        **launch_options(num_warps=8, pdl=pdl),
    )
