"""What has been said, and what of it still fits."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from slipstream.errors import InvalidRequestError

Message = dict[str, str]


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
        """Begin a turn."""
        self.turns.append([{"role": "user", "content": text}])

    def answer(self, text: str) -> None:
        """End the turn; one without an answer is forgotten, question and all."""
        if text:
            self.turns[-1].append({"role": "assistant", "content": text})
        else:
            del self.turns[-1]

    def reset(self) -> None:
        """Forget all turns; the system prompt stays."""
        self.turns.clear()

    def fit(
        self, encode: Callable[[Sequence[Message]], list[int]], most: int
    ) -> tuple[list[int], int]:
        """Drop the oldest turns until the prompt has at most ``most`` tokens.

        Returns the prompt's tokens and how many turns were dropped; the last turn stays in any
        case.
        """
        dropped = 0
        while len(tokens := encode(self.messages)) > most and len(self.turns) > 1:
            del self.turns[0]
            dropped += 1
        return tokens, dropped

    def save(self, file: Path) -> None:
        """Write the messages as JSON; ``InvalidRequestError`` if the file cannot be written."""
        text = json.dumps(self.messages, indent=2, ensure_ascii=False)
        try:
            file.write_text(text + "\n", encoding="utf-8")
        except OSError as error:
            raise InvalidRequestError(
                f"{file} cannot be written ({error.strerror}); choose another file"
            ) from error
