"""Thoughts between two markers, before the answer."""

from __future__ import annotations

from dataclasses import dataclass

from slipstream.runtime.chat.events import ReasoningText
from slipstream.runtime.chat.grammar import Grammar
from slipstream.runtime.chat.tape import Markers, Steps, Tape

_SPACE = r"/[ \n]{1,4}/?"


@dataclass(frozen=True, slots=True)
class Thoughts:
    """``begin`` is written by the model or ends the prompt; ``end`` is always the model's.

    ``answer``: what some models write around the answer; it is no part of it.
    """

    begin: str
    end: str
    answer: tuple[str, str] | None = None

    def opened(self, prompt: str) -> bool:
        """Whether the prompt has begun the thoughts."""
        return prompt.rstrip().endswith(self.begin)

    def closed(self, prompt: str) -> bool:
        """Whether the prompt says that there are none."""
        return prompt.rstrip().endswith(self.end)

    def read(self, tape: Tape, prompt: str) -> Steps[bool]:
        """Tell the thoughts, with which the text may begin; whether there were any."""
        opened = self.opened(prompt)
        tape.record()
        yield from tape.space()
        space = tape.recorded()
        if (yield from tape.starts(self.begin)) is None and not opened:
            tape.unread(space)
            return False
        yield from tape.all_space()
        yield from tape.until(Markers(self.end), ReasoningText)
        yield from tape.all_space()
        return True

    def rule(self, grammar: Grammar, prompt: str, budget: int | None) -> str:
        """The thoughts within their budget; they may be missing if the prompt has not begun them.
        Nothing where it has closed them."""
        if self.closed(prompt):
            return ""
        until = f"{grammar.until(self.end, budget)} {grammar.rule(_SPACE)}"
        if self.answer is not None:
            until += f" {grammar.literal(self.answer[0])}?"
        if self.opened(prompt):
            return until
        return grammar.rule(f"({grammar.rule(_SPACE)} {grammar.literal(self.begin)} {until})?")
