"""Conversations of the Python API: to a prompt, and from its completions to turns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from slipstream.runtime.chat.detection import dialect_of
from slipstream.runtime.chat.dialect import Dialect
from slipstream.runtime.chat.events import AssistantTurn, OutputParser
from slipstream.runtime.chat.options import ChatOptions, split_options
from slipstream.runtime.request import CompletionOutput, OutputKind
from slipstream.runtime.sampling.params import SamplingParams
from slipstream.runtime.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Conversation:
    """A prompt, the parameters that hold its completions to their form, and who reads them."""

    prompt: str
    params: SamplingParams
    dialect: Dialect
    options: ChatOptions

    def turns(self, output_kind: OutputKind) -> Turns:
        """Reads the completions of a request for outputs of this kind."""
        return Turns(self, cumulative=output_kind != "delta")


class Turns:
    """The turns of a request's completions, which grow as its outputs come."""

    def __init__(self, conversation: Conversation, *, cumulative: bool) -> None:
        """``cumulative``: an output has all text so far, not what is new."""
        self._conversation = conversation
        self._cumulative = cumulative
        self._known: dict[int, tuple[OutputParser, AssistantTurn]] = {}
        self._read: dict[int, int] = {}

    def add(self, outputs: Sequence[CompletionOutput]) -> None:
        """Give each output the turn so far: one object, which grows."""
        for output in outputs:
            if output.index not in self._known:
                made = self._conversation
                parser = made.dialect.parser(made.options, made.prompt)
                self._known[output.index] = parser, AssistantTurn()
            parser, turn = self._known[output.index]
            start = self._read.get(output.index, 0) if self._cumulative else 0
            self._read[output.index] = len(output.text)
            events = parser.push(output.text[start:])
            if output.finish_reason is not None:
                events += parser.finish()
            for event in events:
                turn.add(event)
            output.turn = turn


class Conversations:
    """Writes conversations in the dialect of a model."""

    def __init__(self, tokenizer: Tokenizer, defaults: SamplingParams) -> None:
        """``defaults`` are the sampling parameters where none are given."""
        self._tokenizer = tokenizer
        self._defaults = defaults

    @cached_property
    def dialect(self) -> Dialect:
        """How the model writes thoughts and calls."""
        return dialect_of(self._tokenizer)

    def make(
        self,
        messages: Sequence[Mapping[str, Any]],
        params: SamplingParams | None,
        given: Mapping[str, Any],
    ) -> Conversation:
        """``given``: fields of ``ChatOptions``, and what else the template takes."""
        options, variables = split_options(given)
        dialect = self.dialect
        prompt = self._tokenizer.apply_chat_template(
            dialect.messages(messages),
            tools=dialect.tools(options),
            **{**dialect.variables(options), **variables},
        )
        params = params or self._defaults
        params = replace(
            params,
            structured=dialect.structured(options, params.structured, prompt),
            shown_special_tokens=[*params.shown_special_tokens, *dialect.special_tokens],
        )
        return Conversation(prompt, params, dialect, options)
