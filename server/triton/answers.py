"""From what the engine loop tells of a request to the outputs of a response."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slipstream.runtime.request import CompletionOutput, RequestOutput
from slipstream.server.core.logprobs import TokenTexts, by_token_id
from slipstream.server.triton.parameters import Query

Outputs = Mapping[str, NDArray[Any]]


class Answer:
    """The responses to one request, in order."""

    def __init__(self, query: Query, texts: TokenTexts) -> None:
        self._query = query
        self._texts = texts
        self._begun = False

    def tensors(self, steps: Sequence[RequestOutput]) -> Outputs:
        """One response for outputs of kind ``delta`` that followed each other, or for one of kind
        ``final``; an entry for each completion."""
        by_completion = list(zip(*(step.outputs for step in steps), strict=True))
        prompt = self._query.prompt if self._query.echo and not self._begun else ""
        self._begun = True
        outputs: dict[str, NDArray[Any]] = {
            "text_output": _strings(prompt + _joined_text(parts) for parts in by_completion)
        }
        for name in self._query.returns:
            outputs[name] = self._extras[name](self, steps, by_completion)
        return outputs

    def _finish_reason(self, _: _Steps, completions: _Completions) -> NDArray[Any]:
        # The word "None" for one that goes on, as vLLM's backend.
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


def _strings(texts: Any) -> NDArray[Any]:  # noqa: ANN401 - an iterable of str
    return np.array([text.encode() for text in texts], np.object_)
