"""What has been said, and what of it still fits."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence, Sized
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from slipstream.errors import InvalidRequestError
from slipstream.runtime.chat.events import ToolCall

# In OpenAI's shape; an answer may hold ``tool_calls``.
Message = dict[str, Any]
T = TypeVar("T", bound=Sized)


@dataclass(slots=True)
class Conversation:
    """A system prompt and turns; a turn is a question and, once given, its answer."""

    system: str | None = None
    turns: list[list[Message]] = field(default_factory=list)

    @property
    def messages(self) -> list[Message]:
        """All messages in order, as chat templates take them."""
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [*system, *(message for turn in self.turns for message in turn)]

    def ask(self, text: str) -> None:
        """Begin a turn; after calls of tools, go on with it: the text is what they return."""
        if self.turns and (calls := self.turns[-1][-1].get("tool_calls")):
            self.turns[-1] += [
                {"role": "tool", "tool_call_id": call["id"], "content": text} for call in calls
            ]
        else:
            self.turns.append([{"role": "user", "content": text}])

    def answer(self, text: str, calls: Sequence[ToolCall] = ()) -> None:
        """End the turn; one without an answer is forgotten, question and all."""
        if not text and not calls:
            del self.turns[-1]
            return
        message: Message = {"role": "assistant", "content": text}
        if calls:
            message["tool_calls"] = [call.in_message() for call in calls]
        self.turns[-1].append(message)

    def reset(self) -> None:
        """Forget all turns; the system prompt stays."""
        self.turns.clear()

    def fit(self, encode: Callable[[Sequence[Message]], T], most: int) -> tuple[T, int]:
        """Drop the oldest turns until the prompt, which ``encode`` makes, has at most ``most``
        tokens.

        Returns the prompt and how many turns were dropped; the last turn stays in any
        case.
        """
        dropped = 0
        while len(prompt := encode(self.messages)) > most and len(self.turns) > 1:
            del self.turns[0]
            dropped += 1
        return prompt, dropped

    def save(self, file: Path) -> None:
        """Write the messages as JSON; ``InvalidRequestError`` if the file cannot be written."""
        text = json.dumps(self.messages, indent=2, ensure_ascii=False)
        try:
            file.write_text(text + "\n", encoding="utf-8")
        except OSError as error:
            raise InvalidRequestError(
                f"{file} cannot be written ({error.strerror}); choose another file"
            ) from error
