"""Completions as turns: streamed in whatever pieces, they come to what they are as a whole."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
from tests.server.openai.marked import MarkedParser
from tests.server.small_tokenizers import byte_level

from slipstream.runtime.chat.events import AssistantTurn, ToolCall
from slipstream.runtime.chat.turns import Turn
from slipstream.runtime.engine.step import TokenLogprobs
from slipstream.runtime.request import CompletionOutput, FinishReason
from slipstream.runtime.sampling.params import SamplingParams
from slipstream.runtime.testing import counting_tokenizer
from slipstream.runtime.text.detokenizer import Detokenizer
from slipstream.runtime.text.offsets import TextOffsets


@dataclass
class Told:
    """What a turn came to."""

    turn: AssistantTurn = field(default_factory=AssistantTurn)
    tokens: list[int] = field(default_factory=list)
    reasoning: int = 0
    reason: str | None = None


def outputs(
    tokens: Sequence[int], sizes: Sequence[int], params: SamplingParams
) -> list[CompletionOutput]:
    """The outputs of kind ``delta`` for tokens that come so many at a time."""
    detokenizer, made, at = Detokenizer(counting_tokenizer(), params), [], 0
    for size in sizes:
        new, at = list(tokens[at : at + size]), at + size
        text = detokenizer.append(new)
        last = at >= len(tokens) or detokenizer.stopped
        reason: FinishReason | None = "stop" if last else None
        text += detokenizer.finish() if last else ""
        scores = [TokenLogprobs(token, -1.0, 1, {}) for token in new]
        made.append(CompletionOutput(0, text, new, None, scores, reason))
        if last:
            return made
    raise AssertionError("too few pieces")


def told(completions: Sequence[CompletionOutput]) -> Told:
    stream = counting_tokenizer().text_stream(skip_special_tokens=True)
    turn, result = Turn(MarkedParser(), TextOffsets(stream)), Told()
    for completion in completions:
        part = turn.take(completion)
        for event in part.events:
            result.turn.add(event)
        result.tokens += [entry.token_id for entry in part.logprobs]
        result.reasoning += part.reasoning_tokens
    assert result.turn == turn.whole
    result.reason = turn.finish_reason
    return result


def text_tokens(text: str) -> list[int]:
    return counting_tokenizer().encode(text, add_special_tokens=False)


def test_a_turn_is_told_apart() -> None:
    tokens = text_tokens("Ahm mB so sayC get:qD well")
    result = told(outputs(tokens, [len(tokens)], SamplingParams()))
    assert result.turn == AssistantTurn("hm m", " so say well", [ToolCall("call_0", " get", "q")])
    assert result.reason == "tool_calls"
    assert result.reasoning == len("hm m")
    said = counting_tokenizer().decode(result.tokens)
    assert said == " so say well"  # neither marks nor calls


@pytest.mark.parametrize("stop", [(), ("well",), ("ay", "a:b"), ("B so",)])
def test_pieces_of_any_size_come_to_the_same(stop: tuple[str, ...]) -> None:
    random.seed(13)
    params = SamplingParams(stop=stop)
    for _ in range(150):
        text = "".join(random.choice(["A", "B", "C", "D", " ", "a", "say", ":", "well", " so"])
                       for _ in range(random.randrange(1, 25)))  # fmt: skip
        tokens = text_tokens(text)
        whole = outputs(tokens, [1] * len(tokens), params)
        size = sum(len(c.token_ids) for c in whole)
        once = CompletionOutput(
            0, "".join(c.text for c in whole), tokens[:size], None,
            [score for c in whole for score in c.logprobs or ()], "stop")  # fmt: skip
        sizes = [random.randrange(1, 6) for _ in tokens]
        streamed = told(whole)
        assert streamed == told([once])
        if not stop:  # more than the stop string may have come with it
            assert streamed == told(outputs(tokens, sizes, params))


def test_parts_of_a_character_are_said_with_it() -> None:
    tokenizer = byte_level()
    tokens = [0, 2, 3, 0]
    stream = tokenizer.text_stream(skip_special_tokens=True)
    detokenizer, turn = Detokenizer(tokenizer, SamplingParams()), None
    turn = Turn(MarkedParser(), TextOffsets(stream))
    counts = []
    for index, token in enumerate(tokens):
        text, reason = detokenizer.append([token]), "stop" if index == 3 else None
        score = [TokenLogprobs(token, -1.0, 1, {})]
        part = turn.take(CompletionOutput(0, text, [token], None, score, reason))  # type: ignore[arg-type]
        counts.append(len(part.logprobs))
    assert counts == [1, 0, 2, 1]
