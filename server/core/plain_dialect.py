"""The dialect of a model that has no marks for thoughts or calls: all that it writes is said."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from slipstream.errors import InvalidRequestError
from slipstream.runtime.chat.events import ContentText, Event, OutputParser
from slipstream.runtime.chat.options import ChatOptions
from slipstream.runtime.structured.output import StructuredOutput


class PlainDialect:
    """Text is content."""

    special_tokens: Sequence[str] = ()

    def messages(self, messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """As they are."""
        return [dict(message) for message in messages]

    def variables(self, options: ChatOptions) -> dict[str, Any]:
        """The effort, for templates that know it."""
        effort = options.reasoning_effort
        return {} if effort is None else {"reasoning_effort": effort}

    def structured(
        self, options: ChatOptions, wanted: StructuredOutput | None, prompt: str
    ) -> StructuredOutput | None:
        """The ``wanted`` form."""
        if options.tool_choice not in ("auto", "none"):
            raise InvalidRequestError(
                "this model has no form for calls of tools; send tool_choice auto or none, or start"
                " the server with --tool-call-parser",
                param="tool_choice",
            )
        return wanted

    def parser(self, options: ChatOptions, prompt: str) -> OutputParser:
        """A parser that has nothing to do."""
        return _PlainParser()


class _PlainParser:
    def push(self, text: str) -> list[Event]:
        """All of it is content."""
        return [ContentText(text)] if text else []

    def finish(self) -> list[Event]:
        """Nothing is held back."""
        return []
