"""From what the engine loop tells of a request to the outputs of a response."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slipstream.runtime.chat.events import (
    CallArguments,
    CallBegin,
    ContentText,
    Event,
    ReasoningText,
)
from slipstream.runtime.chat.turns import Turns
from slipstream.runtime.request import CompletionOutput, RequestOutput
from slipstream.server.core.logprobs import TokenTexts, by_token_id
from slipstream.server.triton.parameters import Query

Outputs = Mapping[str, NDArray[Any]]


class Answer:
    """The responses to one request, in order."""

    def __init__(self, query: Query, texts: TokenTexts, turns: Turns | None = None) -> None:
        """``turns``: those that answer a conversation."""
        self._query = query
        self._texts = texts
        self._turns = turns
        self._begun = False
        self._ended: set[int] = set()

    def tensors(self, steps: Sequence[RequestOutput]) -> Outputs:
        """One response for outputs of kind ``delta`` that followed each other, or for one of kind
        ``final``; an entry for each completion."""
        by_completion = list(zip(*(step.outputs for step in steps), strict=True))
        outputs = self._said(by_completion) if self._turns is None else self._told(steps)
        for name in self._query.returns:
            outputs[name] = self._extras[name](self, steps, by_completion)
        return outputs

    def _said(self, completions: _Completions) -> dict[str, NDArray[Any]]:
        """Text as it is."""
        prompt = self._query.prompt if self._query.echo and not self._begun else ""
        self._begun = True
        return {"text_output": _strings(f"{prompt}{_joined_text(parts)}" for parts in completions)}

    def _told(self, steps: _Steps) -> dict[str, NDArray[Any]]:
        """Turns of the assistant, taken apart."""
        events: dict[int, list[Event]] = {c.index: [] for c in steps[0].outputs}
        for step in steps:
            for completion in step.outputs:
                events[completion.index] += self._events(step, completion)
        return {
            "text_output": _strings(_text_of(ContentText, told) for told in events.values()),
            "reasoning_output": _strings(_text_of(ReasoningText, told) for told in events.values()),
            "tool_calls": _strings(json.dumps(_calls(told)) for told in events.values()),
        }

    def _events(self, step: RequestOutput, completion: CompletionOutput) -> list[Event]:
        """What is new of a turn; one that has ended is told again until all have."""
        if self._turns is None or completion.index in self._ended:
            return []
        if completion.finish_reason is not None:
            self._ended.add(completion.index)
        return self._turns.take(step, completion).events

    def _finish_reason(self, _: _Steps, completions: _Completions) -> NDArray[Any]:
        # The word "None" for one that goes on, as vLLM's backend.
        if self._turns is not None:
            turns = [self._turns[parts[-1].index] for parts in completions]
            return _strings(str(turn.finish_reason) for turn in turns)
        return _strings(str(parts[-1].finish_reason) for parts in completions)

    def _cumulative_logprob(self, _: _Steps, completions: _Completions) -> NDArray[Any]:
        return np.array([parts[-1].cumulative_logprob for parts in completions], np.float32)

    def _logprobs(self, _: _Steps, completions: _Completions) -> NDArray[Any]:
        if not self._query.logprobs:
            return _strings("null" for _ in completions)
        return _strings(
            json.dumps([by_token_id(e, self._texts) for part in parts for e in part.logprobs or ()])
            for parts in completions
        )

    def _output_log_probs(self, _: _Steps, completions: _Completions) -> NDArray[Any]:
        rows = [[e.logprob for part in parts for e in part.logprobs or ()] for parts in completions]
        longest = max(map(len, rows))
        return np.array([row + [0.0] * (longest - len(row)) for row in rows], np.float32)

    def _num_input_tokens(self, steps: _Steps, _: _Completions) -> NDArray[Any]:
        return np.array([len(steps[-1].prompt_token_ids)], np.uint32)

    def _num_output_tokens(self, _: _Steps, completions: _Completions) -> NDArray[Any]:
        counts = [sum(len(part.token_ids) for part in parts) for parts in completions]
        return np.array(counts, np.uint32)

    _extras: Mapping[str, Callable[[Answer, _Steps, _Completions], NDArray[Any]]] = {
        "finish_reason": _finish_reason,
        "cumulative_logprob": _cumulative_logprob,
        "logprobs": _logprobs,
        "num_input_tokens": _num_input_tokens,
        "num_output_tokens": _num_output_tokens,
        "cum_log_probs": _cumulative_logprob,
        "output_log_probs": _output_log_probs,
    }


_Steps = Sequence[RequestOutput]
_Completions = Sequence[Sequence[CompletionOutput]]


def _joined_text(parts: Sequence[CompletionOutput]) -> str:
    return "".join(part.text for part in parts)


def _text_of(kind: type[ContentText | ReasoningText], events: Sequence[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, kind))


def _calls(events: Sequence[Event]) -> list[dict[str, Any]]:
    """Calls in OpenAI's shape, an entry each; one that was begun before has its arguments only."""
    calls: dict[int, dict[str, Any]] = {}
    for event in events:
        match event:
            case CallBegin(index, call_id, name):
                function = {"name": name, "arguments": ""}
                named = {"id": call_id, "type": "function", "function": function}
                calls[index] = {"index": index, **named}
            case CallArguments(index, text):
                begun = calls.setdefault(index, {"index": index, "function": {"arguments": ""}})
                begun["function"]["arguments"] += text
    return list(calls.values())


def _strings(texts: Any) -> NDArray[Any]:  # noqa: ANN401 - an iterable of str
    return np.array([text.encode() for text in texts], np.object_)
