"""Completions of a conversation as turns of the assistant: thoughts, text and calls of tools."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from slipstream.runtime.chat.dialect import Dialect
from slipstream.runtime.chat.events import (
    AssistantTurn,
    Event,
    OutputParser,
    joined,
)
from slipstream.runtime.chat.options import ChatOptions
from slipstream.runtime.chat.turn_tokens import TurnTokens
from slipstream.runtime.engine.step import TokenLogprobs
from slipstream.runtime.request import CompletionOutput, FinishReason, RequestOutput
from slipstream.runtime.sampling.params import SamplingParams
from slipstream.runtime.text.offsets import TextOffsets
from slipstream.runtime.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Part:
    """What is new of a turn: its events, the scores of the tokens that are said, where they were
    asked for, and how many tokens were thoughts."""

    events: list[Event]
    logprobs: list[TokenLogprobs]
    reasoning_tokens: int


class Turn:
    """One completion: ``whole`` is what it has come to so far."""

    __slots__ = ("_parser", "_tokens", "finish_reason", "whole")

    def __init__(self, parser: OutputParser, offsets: TextOffsets) -> None:
        self.whole = AssistantTurn()
        self.finish_reason: FinishReason | Literal["tool_calls"] | None = None
        self._parser = parser
        self._tokens = TurnTokens(offsets)

    def take(self, completion: CompletionOutput) -> Part:
        """Take what is new of the completion (kind ``delta``), or all of it (``final``)."""
        tokens, events, before = self._tokens, [], self._tokens.reasoning
        tokens.add(completion)
        for piece in tokens.cut(completion.text):
            told = self._parser.push(piece)
            tokens.parsed(piece, told)
            events += told
        if completion.finish_reason is not None:
            told = self._parser.finish()
            tokens.finish(told)
            events += told
        for event in events:
            self.whole.add(event)
        self.finish_reason = self._reason(completion.finish_reason)
        logprobs, tokens.content = tokens.content, []
        return Part(joined(events), logprobs, tokens.reasoning - before)

    def _reason(self, reason: FinishReason | None) -> FinishReason | Literal["tool_calls"] | None:
        return "tool_calls" if reason == "stop" and self.whole.calls else reason


class Turns:
    """The turns that answer one conversation, by the index of their completions."""

    def __init__(
        self,
        dialect: Dialect,
        tokenizer: Tokenizer,
        options: ChatOptions,
        params: SamplingParams,
    ) -> None:
        """``options`` and ``params`` are what was asked for."""
        self._dialect = dialect
        self._tokenizer = tokenizer
        self._options = options
        self._params = params
        self._turns: dict[int, Turn] = {}

    def __getitem__(self, index: int) -> Turn:
        """The turn of a completion that has begun."""
        return self._turns[index]

    def take(self, output: RequestOutput, completion: CompletionOutput) -> Part:
        """Take what is new of a completion, one of those of ``output``."""
        if completion.index not in self._turns:
            self._turns[completion.index] = self._begin(output)
        return self._turns[completion.index].take(completion)

    def _begin(self, output: RequestOutput) -> Turn:
        params = self._params
        stream = self._tokenizer.text_stream(
            skip_special_tokens=params.skip_special_tokens,
            shown_special_tokens=[*params.shown_special_tokens, *self._dialect.special_tokens],
            prompt=output.prompt_token_ids,
        )
        parser = self._dialect.parser(self._options, output.prompt or "")
        return Turn(parser, TextOffsets(stream))


class OutputTurns:
    """Gives the outputs of a request their turns, for callers in Python."""

    def __init__(self, turns: Turns, text: str, *, cumulative: bool) -> None:
        """``text`` is that of the prompt. ``cumulative``: an output repeats what the one before it
        has."""
        self._turns = turns
        self._text = text
        self._cumulative = cumulative
        # Of each completion, the characters, tokens and scores that were taken.
        self._taken: dict[int, tuple[int, int, int]] = {}

    def add(self, output: RequestOutput) -> list[Part]:
        """Give each completion its turn so far, one object which grows, and the output the text of
        its prompt; returns what is new of each."""
        output.prompt = self._text
        parts = []
        for completion in output.outputs:
            new = self._new(completion) if self._cumulative else completion
            parts.append(self._turns.take(output, new))
            completion.turn = self._turns[completion.index].whole
        return parts

    def _new(self, completion: CompletionOutput) -> CompletionOutput:
        """What a completion adds to those before it."""
        text, tokens, scores = completion.text, completion.token_ids, completion.logprobs
        begin = self._taken.get(completion.index, (0, 0, 0))
        self._taken[completion.index] = len(text), len(tokens), len(scores or ())
        return replace(
            completion,
            text=text[begin[0] :],
            token_ids=tokens[begin[1] :],
            logprobs=None if scores is None else scores[begin[2] :],
        )
