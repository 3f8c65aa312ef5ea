"""Pages of float8 that a step's long prompts read many times, as pages of float16.

The prefill kernel decodes a tile of codes for every block of queries that reads it. A prompt of
many blocks is read faster from a copy in float16, which has every code exactly: the same numbers
are multiplied in the same order, so it changes no bit. One copy is all that a layer needs: the next
layer's takes its place.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from slipstream.plugins.cuda.launch import launch_options
from slipstream.plugins.paged_attention.cuda.kernels import widen_kernel

# Whose copy pays: of a step of so many prompt tokens the sequences with so many of them, and so
# many tokens in their pages.
STEP_TOKENS = 512
_QUERIES, _CONTEXT = 256, 512
_MOST_TOKENS = 1 << 16  # of all copies of a step; what does not fit is decoded as it is read
_BLOCK = 8192  # numbers that a program copies at a time
_SHARE = 4  # programs of a page
_THREADS = 128
WIDE, OTHERS = 0, 1  # in ``WidePages.found``


@dataclass(frozen=True, slots=True, eq=False)
class WidePages:
    """The copies, and where they are; calls on one stream may share it.

    numbers float16 ``[N]``: pages one after the other. first int32 ``[S]``: the first page of each
    sequence, -1 of one without a copy. found int32 ``[2]``: how many sequences have a copy, and how
    many others have queries in blocks.
    """

    numbers: Tensor
    first: Tensor
    found: Tensor

    @classmethod
    def allocate(
        cls, max_sequences: int, tokens: int, token_numbers: int, device: torch.device | str
    ) -> WidePages:
        """Space for steps of up to ``max_sequences``, whose copies have together so many tokens of
        ``token_numbers`` k and v each, but at most 65,536 tokens."""
        return cls(
            torch.empty(
                min(tokens, _MOST_TOKENS) * token_numbers, dtype=torch.float16, device=device
            ),
            torch.empty(max_sequences, dtype=torch.int32, device=device),
            torch.zeros(2, dtype=torch.int32, device=device),
        )

    @property
    def _most_sequences(self) -> int:
        """Of any step, so that the kernel is compiled once; one for each thread costs nothing."""
        return int(triton.next_power_of_2(max(self.first.shape[0], _THREADS)))

    def fill(
        self,
        pages: Tensor,
        query_start: Tensor,
        context_len: Tensor,
        page_table: Tensor,
        num_decodes: int,
        page_size: int,
    ) -> Tensor:
        """Copy what long prompts read of a layer's ``pages`` float8 ``[P, ...]``; float16 pages of
        the same shape, whose numbers count from ``first``. The other arguments are those of a
        ``StepTensors``."""
        shape = pages.shape[1:]
        size, sequences = math.prod(shape), context_len.shape[0]
        assert sequences <= self.first.shape[0], sequences
        count = self.numbers.shape[0] // size
        wide = self.numbers[: count * size].view(count, *shape)
        block = math.gcd(size, _BLOCK)
        widen_kernel[(count, min(_SHARE, size // block))](
            pages, wide, self.first, self.found, query_start, context_len, page_table,
            page_table.stride(0), sequences, num_decodes, PAGE=page_size, SIZE=size, BLOCK=block,
            SEQUENCES=self._most_sequences, QUERIES=_QUERIES, CONTEXT=_CONTEXT,
            **launch_options(num_warps=_THREADS // 32),
        )  # fmt: skip
        return wide
