"""A loop on the counting model, driven to its end, and the closed form of what it must answer."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from slipstream.runtime.engine.loop import EngineLoop
from slipstream.runtime.engine.sequence import child_seed
from slipstream.runtime.executors.counting import next_token
from slipstream.runtime.request import FinishReason, Request, RequestOutput
from slipstream.runtime.sampling.params import SamplingParams
from slipstream.runtime.structured.compiler import GrammarCompiler
from slipstream.runtime.structured.grammar import Constraint
from slipstream.runtime.structured.masks import MaskFiller, allowed_tokens
from slipstream.runtime.testing import EOS, VOCAB_SIZE, counting_tokenizer

GRAMMARS = GrammarCompiler(counting_tokenizer(), VOCAB_SIZE)
_FILLER = MaskFiller(VOCAB_SIZE)


def greedy(**params: Any) -> SamplingParams:  # noqa: ANN401
    return SamplingParams(**{"temperature": 0, "max_tokens": 4, **params})


def compiled(request: Request) -> Request:
    """The same with the grammar of its form, if it has one."""
    form = request.params.structured
    return replace(request, grammar=None if form is None else GRAMMARS.compile(form))


def expected_output(request: Request, index: int) -> tuple[list[int], FinishReason]:
    """The closed form: count on from the prompt, to the next token that the form allows, until end
    of sequence, the form's end or ``max_tokens``; and why it ends."""
    params, tokens = request.params, list[int]()
    stride = child_seed(params.seed or 0, index) if params.temperature else 0
    constraint = None if request.grammar is None else request.grammar.start()
    last = request.prompt_token_ids[-1]
    while len(tokens) < (params.max_tokens or 0):
        last = next_token(last, VOCAB_SIZE, stride)
        if constraint is not None:
            last = next_allowed(constraint, last)
            constraint.take(last)
        tokens.append(last)
        ends = constraint is not None and constraint.complete
        if ends or (last == EOS and not params.ignore_eos):
            return tokens, "stop"
    return tokens, "length"


def next_allowed(constraint: Constraint, token: int) -> int:
    """The token, or the next that may come, counting in a circle."""
    mask = np.zeros((1, _FILLER.words), np.int32)
    _FILLER.fill([constraint], mask)
    allowed = np.flatnonzero(allowed_tokens(mask[0], VOCAB_SIZE))
    return min(map(int, allowed), key=lambda each: (each - token) % VOCAB_SIZE)


def check(loop: EngineLoop) -> None:
    """Every page has its owner, and none is held for guesses of the host that are not on their
    way, or for more than a device makes next."""
    kv, running = loop.scheduler.kv, loop.scheduler.running
    kv.check_invariants([s.allocation for s in running if s.allocation])
    speculator = loop._speculator
    ahead = speculator.most if speculator is not None and speculator.leads(()) else 0
    for each in running if loop.stats.speculation else ():
        most = kv.pages_for(max(each.num_tokens, each.num_scheduled + each.num_drafted) + ahead)
        assert each.allocation is not None and len(each.allocation.pages) <= most
        assert all(len(held.pages) <= most for held in each.allocation.windows)


def drain(loop: EngineLoop) -> dict[str, RequestOutput]:
    outputs: dict[str, RequestOutput] = {}
    while loop.has_work:
        for output in loop.step():
            outputs[output.request_id] = output
        check(loop)
    assert loop.scheduler.kv.num_available == loop.scheduler.kv.num_pages
    return outputs


def tokens_of(output: RequestOutput) -> list[int]:
    return output.outputs[0].token_ids
