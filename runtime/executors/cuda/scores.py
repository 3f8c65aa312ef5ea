"""Log probabilities of given tokens, on the device that has the logits.

For the tokens of prompts, and for longer lists than the kernels of sampling make: rare, so they are
operators of torch, but for the sum, launched after the head.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import repeat

import torch
from torch import Tensor

from slipstream.plugins.sampling.cuda import normalizers
from slipstream.runtime.engine.step import TokenLogprobs

# Of the largest intermediate result, an int64 for each logit.
_CHUNK_BYTES = 64 << 20
_LOW_BITS = 0x7FFFFFFF


def rows_at_once(vocab_size: int) -> int:
    """How many rows ``score`` should be given."""
    return max(1, _CHUNK_BYTES // (8 * vocab_size))


@dataclass(frozen=True, slots=True)
class PendingScores:
    """On their way to the host: ``ids``, ``values`` and ``places`` (their ranks; None: in this
    order) are ``[R, count]``, the others ``[R]``."""

    tokens: Tensor
    logprobs: Tensor
    ranks: Tensor
    ids: Tensor
    values: Tensor
    places: Tensor | None = None

    def result(self) -> Iterator[TokenLogprobs | None]:
        """Each row's, once the device is done; None where the largest logit is not finite."""
        columns = (self.tokens, self.logprobs, self.ranks, self.ids, self.values)
        places = (
            repeat(range(1, self.ids.shape[1] + 1)) if self.places is None else self.places.tolist()
        )
        rows = zip(*(c.tolist() for c in columns), strict=True)
        for (token, logprob, rank, ids, values), ranks in zip(rows, places, strict=False):
            if logprob != logprob:
                yield None
                continue
            top = {i: (v, place) for i, v, place in zip(ids, values, ranks, strict=True)}
            yield TokenLogprobs(token, logprob, rank, top)


def score(
    logits: Tensor, tokens: Tensor, count: int, listed: Tensor | None = None
) -> PendingScores:
    """Log probability and rank of ``tokens [R]`` (int64) and the ``count`` likeliest (-1: all) in
    ``logits [R, V]`` (float32, not changed), or, in their place, of ``listed [R, K]`` (int64).

    Rank 1 is the likeliest; equal tokens rank in the order of their ids, as in
    ``sampler.token_logprobs``. Nothing waits for the device.
    """
    size = logits.shape[1]
    count = size if count < 0 else min(count, size)
    ids = torch.arange(size, device=logits.device)
    own = logits.gather(1, tokens[:, None])
    ranks = _ranks(logits, tokens, ids)
    normalizer = normalizers(logits)  # torch's sums depend on the number of rows
    best, places = ids[:0].expand(len(logits), 0), None
    if listed is not None:
        best = listed
        columns = [_ranks(logits, column, ids) for column in listed.unbind(1)]
        places = _to_host(torch.stack(columns, 1))
    elif count:
        best = _LOW_BITS - (torch.topk(_ordered(logits, ids), count).values & _LOW_BITS)
    return PendingScores(
        _to_host(tokens),
        _to_host((own - normalizer)[:, 0]),
        _to_host(ranks),
        _to_host(best),
        _to_host(logits.gather(1, best) - normalizer),
        places,
    )


def _ranks(logits: Tensor, tokens: Tensor, ids: Tensor) -> Tensor:
    tokens = tokens[:, None]
    own = logits.gather(1, tokens)
    return ((logits > own) | ((logits == own) & (ids < tokens))).sum(1) + 1


def _ordered(logits: Tensor, ids: Tensor) -> Tensor:
    """Integers in the order of the logits, equal ones in the reverse order of ids."""
    bits = (logits + 0.0).view(torch.int32)  # -0 equals 0
    keys = bits ^ ((bits >> 31) & _LOW_BITS)
    return (keys.long() << 32) | (_LOW_BITS - ids)


def _to_host(values: Tensor) -> Tensor:
    if not values.is_cuda:
        return values.clone()
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    return host.copy_(values, non_blocking=True)
