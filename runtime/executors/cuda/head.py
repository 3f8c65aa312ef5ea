"""Norm, head and sampling of the wanted rows, as one piece of work."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from slipstream.plugins.sampling import Kind
from slipstream.runtime.executors.cuda.device import Work
from slipstream.runtime.executors.cuda.program import CUDAProgram
from slipstream.runtime.executors.cuda.sampling import CUDASampler

if TYPE_CHECKING:  # engines of one rank start without it
    from slipstream.runtime.executors.cuda.team import Team


def head_work(
    program: CUDAProgram,
    sampler: CUDASampler,
    team: Team | None,
    rows: Tensor,
    logits: Tensor,
    kind: Kind,
    *,
    pdl: bool,
) -> Work:
    """Sample ``rows [R, hidden]`` of the residual stream, with their logits in ``logits``.

    Of a ``team`` of ranks the first samples, and all get its tokens. Logits of greedy rows, which
    nobody reads, are not gathered: ranks give each other the best token of their part.
    """
    if team is None:

        def alone() -> None:
            program.logits(rows, logits, pdl)
            sampler.launch(logits, len(rows), kind, pdl)

        return alone

    def whole() -> None:
        program.logits(rows, logits, pdl)
        if team.is_first:
            sampler.launch(logits, len(rows), kind, pdl)
        team.share(sampler.last_tokens)

    def parted() -> None:
        own = sampler.best_of_part(program.part(rows, pdl), team.rank * program.part_size, pdl)
        best = team.beside(own, pdl=pdl)
        if team.is_first:
            sampler.launch_best(best, pdl)
        team.share(sampler.last_tokens)

    return parted if kind is Kind.GREEDY and program.part_size else whole
