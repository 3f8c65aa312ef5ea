"""How a family of models writes its thoughts and its calls of tools."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from slipstream.runtime.chat.events import OutputParser
from slipstream.runtime.chat.options import ChatOptions
from slipstream.runtime.structured.output import StructuredOutput


class Dialect(Protocol):
    """What a chat template's conversations look like, in both directions."""

    @property
    def special_tokens(self) -> Sequence[str]:
        """Special tokens that the parser must see in the text."""
        ...

    @property
    def thinks(self) -> bool:
        """Whether the model may write thoughts."""
        ...

    def messages(self, messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Messages, with ``tool_calls`` and role ``tool`` in OpenAI's shape, as the template wants
        them."""
        ...

    def tools(self, options: ChatOptions) -> list[dict[str, Any]] | None:
        """What the template is given as tools; None if there are none to call.

        Raises ``InvalidRequestError`` for tools that the template would not show, and for a
        ``tool_choice`` that fits them not.
        """
        ...

    def variables(self, options: ChatOptions) -> dict[str, Any]:
        """What the template is given beside messages and tools."""
        ...

    def structured(
        self, options: ChatOptions, wanted: StructuredOutput | None, prompt: str
    ) -> StructuredOutput | None:
        """The form of all that is generated after ``prompt`` (its end will do): thoughts within
        their budget, then calls as ``options`` ask for them, or the ``wanted`` form. None: free.

        Raises ``InvalidRequestError`` for what this model cannot be asked for.
        """
        ...

    def parser(self, options: ChatOptions, prompt: str) -> OutputParser:
        """A parser of one completion after ``prompt``, which may have begun the thoughts."""
        ...
