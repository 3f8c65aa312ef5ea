"""A conversation between a user at a terminal and a model."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from slipstream.errors import SlipstreamError
from slipstream.runtime.async_llm import AsyncLLM
from slipstream.runtime.chat.composer import Composed, Composer
from slipstream.runtime.chat.conversation import Conversation as Written
from slipstream.runtime.chat.events import AssistantTurn, ContentText, Event, ReasoningText
from slipstream.runtime.chat.options import ChatOptions
from slipstream.runtime.sampling.params import SamplingParams
from slipstream.server.chat.commands import run_command
from slipstream.server.chat.conversation import Conversation, Message
from slipstream.server.chat.terminal import Terminal
from slipstream.server.core.usage import Usage


class ChatSession:
    """Reads messages, streams answers, obeys slash commands.

    The engine runs in its own thread, so that Ctrl-C stops an answer within a step and leaves the
    engine as it was.
    """

    def __init__(
        self,
        llm: AsyncLLM,
        terminal: Terminal,
        params: SamplingParams,
        *,
        max_seq_len: int,
        settable: Iterable[str],
        system: str | None = None,
    ) -> None:
        """``settable`` names the fields of ``params`` that the user may change."""
        self.conversation = Conversation(system)
        self.params = params
        # One call at a time: its user types what it returns.
        self.options = ChatOptions(parallel_tool_calls=False)
        self.max_seq_len = max_seq_len
        self.settable = tuple(settable)
        self.usage: Usage | None = None
        self.ended = False
        self._llm = llm
        self._terminal = terminal
        self._composer = Composer(llm.tokenizer)

    def run(self) -> None:
        """Chat until the user leaves."""
        with asyncio.Runner() as runner:
            while not self.ended:
                try:
                    self._turn(runner, self._terminal.read())
                except EOFError:
                    self.ended = True
                except KeyboardInterrupt:
                    self._terminal.notice("\n/exit or Ctrl-D leaves")
                except SlipstreamError as error:
                    self._terminal.notice(f"error: {error}")

    def set(self, name: str, value: object) -> None:
        """Change a sampling parameter; ``InvalidRequestError`` says why not."""
        changed: dict[str, Any] = {name: value}
        self.params = replace(self.params, **changed)

    def _turn(self, runner: asyncio.Runner, text: str) -> None:
        if text.startswith("/"):
            reply = run_command(self, text)
            if reply is not None:
                self._terminal.notice(reply)
        elif text:
            self._answer(runner, text)

    def _answer(self, runner: asyncio.Runner, text: str) -> None:
        self.conversation.ask(text)
        turn = AssistantTurn()
        try:
            runner.run(self._stream(self._prompt(), turn))
            self._terminal.end_answer()
            self._tell_calls(turn)
        except KeyboardInterrupt:
            turn.calls.clear()  # the last may be cut off
            self._terminal.end_answer()
            self._terminal.notice("stopped")
        finally:
            self.conversation.answer(turn.content, turn.calls)

    def _tell_calls(self, turn: AssistantTurn) -> None:
        for call in turn.calls:
            self._terminal.call(f"{call.name}({call.arguments})")
        if turn.calls:
            self._terminal.notice("your next message is what the function returns")

    def _prompt(self) -> Composed:
        """The conversation, with room left for an answer."""
        quarter = self.max_seq_len // 4
        room = min(self.params.max_tokens or quarter, quarter)
        prompt, dropped = self.conversation.fit(self._encode, self.max_seq_len - room)
        if dropped:
            turns = "turn was" if dropped == 1 else f"{dropped} turns were"
            self._terminal.notice(
                f"the oldest {turns} dropped: the model reads {self.max_seq_len} tokens"
            )
        return prompt

    def _encode(self, messages: Sequence[Message]) -> Composed:
        return self._composer.compose(Written(messages, options=self.options), self.params)

    async def _stream(self, prompt: Composed, turn: AssistantTurn) -> None:
        usage, turns = Usage(), prompt.output_turns("delta")
        outputs = self._llm.generate(prompt.tokens, prompt.params, output_kind="delta")
        async with aclosing(outputs):
            async for output in outputs:
                usage.add(output)
                self.usage = usage
                for event in turns.add(output)[0].events:
                    turn.add(event)
                    self._show(event)

    def _show(self, event: Event) -> None:
        match event:
            case ReasoningText(text):
                self._terminal.think(text)
            case ContentText(text):
                self._terminal.write(text)
