"""From conversations to what a model reads, and to the form that holds its answers."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property

from slipstream.errors import InvalidRequestError
from slipstream.runtime.chat.conversation import Conversation
from slipstream.runtime.chat.detection import dialect_of
from slipstream.runtime.chat.dialect import Dialect
from slipstream.runtime.chat.options import Tool
from slipstream.runtime.chat.turns import OutputTurns, Turns
from slipstream.runtime.request import OutputKind
from slipstream.runtime.sampling.params import SamplingParams
from slipstream.runtime.text.length import check_length, texts_of
from slipstream.runtime.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Composed:
    """A conversation as the model reads it, the parameters that hold its completions to their form,
    and who reads those."""

    text: str
    tokens: list[int]
    params: SamplingParams
    turns: Turns

    def __len__(self) -> int:
        return len(self.tokens)

    def output_turns(self, output_kind: OutputKind) -> OutputTurns:
        """Gives the outputs of a request for this kind of them their turns."""
        return OutputTurns(self.turns, self.text, cumulative=output_kind == "cumulative")


class Composer:
    """Writes conversations in the dialect of a model; safe to use from several threads."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        dialect: Dialect | None = None,
        max_seq_len: int = sys.maxsize,
        check: Callable[[Conversation], None] | None = None,
    ) -> None:
        """``dialect`` None finds that of the template when it is asked for. ``check`` refuses
        conversations before they are rendered."""
        self._tokenizer = tokenizer
        self._dialect = dialect
        self._max_seq_len = max_seq_len
        self._check = check

    @cached_property
    def dialect(self) -> Dialect:
        """How the model writes thoughts and calls."""
        return self._dialect or dialect_of(self._tokenizer)

    def render(self, conversation: Conversation) -> str:
        """The text of a conversation in the model's template, which may take as long as it is
        allowed to; raises ``InvalidRequestError``, and ``ContextLengthError`` for more than
        ``max_seq_len`` tokens can hold."""
        if self._check is not None:
            self._check(conversation)
        check_length(self._tokenizer, _texts(conversation), self._max_seq_len)
        dialect, options = self.dialect, conversation.options
        text = self._tokenizer.apply_chat_template(
            dialect.messages(conversation.messages),
            conversation.generating,
            dialect.tools(options),
            continue_final_message=conversation.going_on,
            **{**dialect.variables(options), **conversation.variables},
        )
        check_length(self._tokenizer, [text], self._max_seq_len)  # with roles, names and variables
        return text

    def hold(
        self,
        conversation: Conversation,
        text: str,
        params: SamplingParams,
        add_special_tokens: bool = False,
    ) -> Composed:
        """The conversation that was rendered to ``text``, encoded, and ``params`` with the form of
        all that answers it: thoughts, calls and ``params.structured`` in one.

        Raises ``InvalidRequestError`` for what the model cannot be asked for.
        """
        tokens = self._tokenizer.encode(text, add_special_tokens=add_special_tokens)
        tokens = [*conversation.before, *tokens]
        held = replace(
            params,
            structured=self.dialect.structured(conversation.options, params.structured, text),
            shown_special_tokens=[*params.shown_special_tokens, *self.dialect.special_tokens],
        )
        return Composed(text, tokens, held, self.turns(conversation, params))

    def compose(self, conversation: Conversation, params: SamplingParams) -> Composed:
        """``render`` and ``hold`` in one."""
        return self.hold(conversation, self.render(conversation), params)

    def turns(self, conversation: Conversation, params: SamplingParams) -> Turns:
        """Where the outputs of a conversation, asked for with ``params``, become turns."""
        return Turns(self.dialect, self._tokenizer, conversation.options, params)


def _texts(conversation: Conversation) -> Iterator[str]:
    yield from texts_of(conversation.messages)
    for tool in conversation.options.tools:
        yield tool.description or ""
        yield _parameters(tool)


def _parameters(tool: Tool) -> str:
    try:
        return json.dumps(tool.parameters or {}, ensure_ascii=False, separators=(",", ":"))
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidRequestError(
            f"the parameters of tool {tool.name!r:.80} are no JSON schema ({error}); use texts, "
            "numbers, booleans, lists and dicts",
            param="tools",
        ) from error
