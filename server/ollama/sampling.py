"""Sampling parameters of Ollama's requests."""

from __future__ import annotations

from typing import Any

from slipstream.runtime.sampling.params import SamplingParams
from slipstream.runtime.structured.output import StructuredOutput
from slipstream.server.core.refusal import naming
from slipstream.server.core.sampling import sampling_params
from slipstream.server.ollama.protocol import AnswerRequest, Form, OllamaOptions

# What the engine calls by another name.
FIELDS = {
    "max_tokens": "num_predict",
    "repetition_penalty": "repeat_penalty",
    "structured": "format",
    "logprobs": "top_logprobs",
}
_SAME = (
    "temperature", "top_k", "top_p", "min_p", "seed", "stop", "presence_penalty",
    "frequency_penalty",
)  # fmt: skip


def params_of(request: AnswerRequest, defaults: SamplingParams) -> SamplingParams:
    """``defaults`` with what a request says; raises ``InvalidRequestError``."""
    given = _given(request.options or OllamaOptions())
    if request.logprobs:
        given["logprobs"] = request.top_logprobs or 0
    with naming(FIELDS):
        return sampling_params(defaults, {**given, "structured": _form(request.format)})


def _given(options: OllamaOptions) -> dict[str, Any]:
    given = {name: getattr(options, name) for name in _SAME}
    given["repetition_penalty"] = 1.0 if options.repeat_last_n == 0 else options.repeat_penalty
    given = {name: value for name, value in given.items() if value is not None}
    if "top_k" in given:
        given["top_k"] = max(given["top_k"], 0)  # below: all tokens
    if options.num_predict is not None:
        given["max_tokens"] = options.num_predict if options.num_predict > 0 else None
    return given


def _form(form: Form) -> StructuredOutput | None:
    if form == "json":
        return StructuredOutput(json_object=True)
    return StructuredOutput(json=form) if isinstance(form, dict) else None
