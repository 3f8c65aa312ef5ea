"""A loop on the counting model, driven to its end, and the closed form of what it must answer."""

from __future__ import annotations

from typing import Any

from slipstream.runtime.engine.loop import EngineLoop
from slipstream.runtime.engine.sequence import child_seed
from slipstream.runtime.executors.counting import next_token
from slipstream.runtime.request import Request, RequestOutput
from slipstream.runtime.sampling.params import SamplingParams
from slipstream.runtime.testing import EOS, VOCAB_SIZE


def greedy(**params: Any) -> SamplingParams:  # noqa: ANN401
    return SamplingParams(**{"temperature": 0, "max_tokens": 4, **params})


def expected_output(request: Request, index: int) -> list[int]:
    """The closed form: count on from the prompt until end of sequence or ``max_tokens``."""
    params, tokens = request.params, list[int]()
    stride = child_seed(params.seed or 0, index) if params.temperature else 0
    last = request.prompt_token_ids[-1]
    while len(tokens) < (params.max_tokens or 0):
        last = next_token(last, VOCAB_SIZE, stride)
        tokens.append(last)
        if last == EOS and not params.ignore_eos:
            break
    return tokens


def check(loop: EngineLoop) -> None:
    running = loop.scheduler.running
    loop.scheduler.kv.check_invariants([s.allocation for s in running if s.allocation])


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
