"""A conversation between a user at a terminal and a model."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from slipstream.errors import SlipstreamError
from slipstream.runtime.async_llm import AsyncLLM
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
        self.max_seq_len = max_seq_len
        self.settable = tuple(settable)
        self.usage: Usage | None = None
        self.ended = False
        self._llm = llm
        self._terminal = terminal

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
        said: list[str] = []
        try:
            runner.run(self._stream(self._prompt(), said))
            self._terminal.end_answer()
        except KeyboardInterrupt:
            self._terminal.end_answer()
            self._terminal.notice("stopped")
        finally:
            self.conversation.answer("".join(said))

    def _prompt(self) -> list[int]:
        """The conversation's tokens, with room left for an answer."""
        quarter = self.max_seq_len // 4
        room = min(self.params.max_tokens or quarter, quarter)
        tokens, dropped = self.conversation.fit(self._encode, self.max_seq_len - room)
        if dropped:
            turns = "turn was" if dropped == 1 else f"{dropped} turns were"
            self._terminal.notice(
                f"the oldest {turns} dropped: the model reads {self.max_seq_len} tokens"
            )
        return tokens

    def _encode(self, messages: Sequence[Message]) -> list[int]:
        text = self._llm.tokenizer.apply_chat_template(messages)
        return self._llm.tokenizer.encode(text, add_special_tokens=False)

    async def _stream(self, prompt: list[int], said: list[str]) -> None:
        usage = Usage()
        outputs = self._llm.generate(prompt, self.params, output_kind="delta")
        async with aclosing(outputs):
            async for output in outputs:
                usage.add(output)
                self.usage = usage
                said.append(output.outputs[0].text)
                self._terminal.write(said[-1])
