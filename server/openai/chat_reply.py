"""The answer to a chat: turns of the assistant as choices, whole or as chunks."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field

from slipstream.runtime.chat.events import (
    AssistantTurn,
    CallArguments,
    CallBegin,
    ContentText,
    Event,
    ReasoningText,
)
from slipstream.runtime.chat.turns import Part, Turns
from slipstream.runtime.request import CompletionOutput, RequestOutput
from slipstream.server.core.dump import dump
from slipstream.server.core.refusal import Refusal
from slipstream.server.core.usage import Usage
from slipstream.server.openai.logprobs import chat_logprobs, prompt_logprobs
from slipstream.server.openai.reply import GOES_ON, Frame, json_text, last_fields


@dataclass(slots=True)
class ChatReply:
    """The answer to a chat, or to several, of one choice each.

    ``turns`` and ``echoes``, what every answer begins with, are by conversation. ``scored``: log
    probabilities were asked for; ``thoughts``: thoughts are told; ``identified``: so are token ids.
    """

    frame: Frame
    turns: Sequence[Turns]
    echoes: Sequence[str]
    scored: bool = False
    thoughts: bool = True
    identified: bool = False
    _token_ids: dict[int, list[int]] = field(default_factory=dict)  # not told yet
    _begun: set[int] = field(default_factory=set)
    _ended: set[int] = field(default_factory=set)

    @property
    def usage(self) -> Usage:
        """Tokens so far."""
        return self.frame.usage

    def events(self, position: int, output: RequestOutput) -> bytes:
        """Chunks for every completion with something new."""
        self.usage.add_prompt(output, position)
        new = [c for c in output.outputs if c.index not in self._ended]
        return "".join(self._chunks(output, completion) for completion in new).encode()

    def end(self) -> bytes:
        """The events after the last."""
        return self.frame.end()

    def error(self, refusal: Refusal) -> bytes:
        """The event in their place."""
        return self.frame.error(refusal)

    def body(self, outputs: Sequence[RequestOutput]) -> bytes:
        """The ``chat.completion`` object."""
        choices = []
        for position, output in enumerate(outputs):
            self.usage.add_prompt(output, position)
            choices += [self._choice(position, output, c) for c in output.outputs]
        if len(outputs) > 1:
            return self.frame.whole(choices)
        ids = {"prompt_token_ids": outputs[0].prompt_token_ids} if self.identified else {}
        scores = prompt_logprobs(outputs[0].prompt_logprobs, self.frame.texts)
        return self.frame.whole(choices, prompt_logprobs=scores, **ids)

    def _count(self, completion: CompletionOutput, part: Part) -> None:
        self.usage.generated += len(completion.token_ids)
        self.usage.reasoning += part.reasoning_tokens

    def _chunks(self, output: RequestOutput, completion: CompletionOutput) -> str:
        """The role, what is new and the end are chunks, each with the usage before it."""
        index, chunks = completion.index, ""
        if not completion.token_ids and completion.finish_reason is None:
            return chunks  # it has not begun
        if index not in self._begun:
            self._begun.add(index)
            chunks += self._opening(index, output)
        part = self.turns[0].take(output, completion)
        if self.identified:
            self._token_ids.setdefault(index, []).extend(completion.token_ids)
        chunks += self._deltas(index, part)
        self._count(completion, part)
        if completion.finish_reason is not None:
            self._ended.add(index)
            reason = self.turns[0][index].finish_reason
            chunks += self._chunk(index, "{}", end=last_fields(reason, completion.stop_reason))
        return chunks

    def _opening(self, index: int, output: RequestOutput) -> str:
        more = ""
        if self.identified:
            more = f',"prompt_token_ids":{json.dumps(output.prompt_token_ids)}'
        chunks = self._chunk(index, '{"role":"assistant","content":""}', more=more)
        if self.echoes[0]:
            chunks += self._chunk(index, f'{{"content":{json_text(self.echoes[0])}}}')
        return chunks

    def _deltas(self, index: int, part: Part) -> str:
        """A chunk an event; log probabilities stand with the last text."""
        deltas = [(event, self._delta(event)) for event in part.events]
        logprobs, chunks = "null", []
        if part.logprobs:
            logprobs = dump(chat_logprobs(part.logprobs, self.frame.names)).decode()
        for event, delta in reversed(deltas):
            if not delta:
                continue
            if isinstance(event, ContentText):
                chunks.append(self._chunk(index, delta, logprobs))
                logprobs = "null"
            else:
                chunks.append(self._chunk(index, delta))
        if logprobs != "null":  # a special token, or what a stop string has cut off
            chunks.insert(0, self._chunk(index, '{"content":""}', logprobs))
        return "".join(reversed(chunks))

    def _delta(self, event: Event) -> str:
        match event:
            case ContentText(text):
                return f'{{"content":{json_text(text)}}}'
            case ReasoningText(text):
                told = json_text(text)
                return f'{{"reasoning_content":{told},"reasoning":{told}}}' if self.thoughts else ""
            case CallBegin(index, call_id, name):
                named = f'"name":{json_text(name)},"arguments":""'
                call = f'"id":{json_text(call_id)},"type":"function","function":{{{named}}}'
                return f'{{"tool_calls":[{{"index":{index},{call}}}]}}'
            case CallArguments(index, text):
                call = f'"function":{{"arguments":{json_text(text)}}}'
                return f'{{"tool_calls":[{{"index":{index},{call}}}]}}'

    def _chunk(
        self, index: int, delta: str, logprobs: str = "null", end: str = GOES_ON, more: str = ""
    ) -> str:
        fields = f'"index":{index},"delta":{delta},"logprobs":{logprobs}'
        if ids := self._token_ids.pop(index, None):  # those up to here, and a little more
            fields += f',"token_ids":{json.dumps(ids)}'
        return self.frame.event(f"{{{fields},{end}", more)

    def _choice(
        self, position: int, output: RequestOutput, completion: CompletionOutput
    ) -> dict[str, object]:
        turns = self.turns[position]
        part, logprobs = turns.take(output, completion), None
        self._count(completion, part)
        if self.scored:
            logprobs = chat_logprobs(part.logprobs, self.frame.names)
        turn = turns[completion.index]
        ids = {"token_ids": completion.token_ids} if self.identified else {}
        return {
            "index": position + completion.index,
            "message": self._message(turn.whole, self.echoes[position]),
            "logprobs": logprobs,
            "finish_reason": turn.finish_reason,
            "stop_reason": completion.stop_reason,
            **ids,
        }

    def _message(self, turn: AssistantTurn, echo: str) -> dict[str, object]:
        """Without text the content of calls is null."""
        content = echo + turn.content
        message: dict[str, object] = {
            "role": "assistant",
            "content": content or (None if turn.calls else ""),
            "refusal": None,
        }
        if turn.reasoning and self.thoughts:
            message |= {"reasoning_content": turn.reasoning, "reasoning": turn.reasoning}
        if turn.calls:
            message["tool_calls"] = [call.in_message() for call in turn.calls]
        return message
