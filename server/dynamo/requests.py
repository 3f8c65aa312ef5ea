"""Requests of Dynamo as sampling parameters, and outputs as its chunks."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from slipstream.errors import InvalidRequestError
from slipstream.runtime.request import RequestOutput
from slipstream.runtime.sampling.params import SamplingParams
from slipstream.runtime.structured.output import StructuredOutput
from slipstream.runtime.text.tokenizer import Tokenizer
from slipstream.server.core.logprobs import TokenTexts, finite
from slipstream.server.core.structural_tag import structural_tag

# What a request may ask for, in the object that has it; the names are ours, too.
_TAKEN = {
    "sampling_options": (
        "n",
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "presence_penalty",
        "frequency_penalty",
        "repetition_penalty",
        "seed",
        "logit_bias",
    ),
    "stop_conditions": ("max_tokens", "min_tokens", "ignore_eos"),
    "output_options": ("logprobs",),
}
CANCELLED = "cancelled"
_REASONS = {"stop": "stop", "length": "length", "abort": CANCELLED, "error": "error"}
_FORMS = ("json", "regex", "choice", "grammar", "structural_tag")
_MOST_LOGPROBS = 20

Request = Mapping[str, Any]


class Translator:
    """Knows what a model samples by default, and its tokens."""

    def __init__(self, defaults: SamplingParams, tokenizer: Tokenizer) -> None:
        self._defaults = defaults
        self._tokenizer = tokenizer
        self._texts = TokenTexts(tokenizer)

    def params(self, request: Request) -> SamplingParams:
        """What a request asks for; the model's own defaults where it says nothing.

        Strings that end a text are not among it: the frontend, which has the text, ends the
        request. Raises ``InvalidRequestError`` for what is impossible.
        """
        values = {
            name: value
            for part, names in _TAKEN.items()
            for name in names
            if (value := (request.get(part) or {}).get(name)) is not None
        }
        stop = request.get("stop_conditions") or {}
        hidden = stop.get("stop_token_ids_hidden") or ()
        values["stop_token_ids"] = [*(stop.get("stop_token_ids") or ()), *hidden]
        if (form := self._form(request)) is not None:
            values["structured"] = form
        _check(values)
        given = SamplingParams.from_dict(values)
        return replace(self._defaults, **{name: getattr(given, name) for name in values})

    def _form(self, request: Request) -> StructuredOutput | None:
        guided = (request.get("sampling_options") or {}).get("guided_decoding") or {}
        given = {kind: guided[kind] for kind in _FORMS if guided.get(kind) is not None}
        if not given:
            return None
        if (tag := given.pop("structural_tag", None)) is None or given:
            return StructuredOutput.from_dict(given)
        return structural_tag(_parsed(tag) if isinstance(tag, str) else tag, self._tokenizer)

    def prefill_params(self, request: Request) -> SamplingParams:
        """The same for a worker that computes the prompt, and one token to show for it."""
        params = self.params(request)
        return replace(params, max_tokens=1, min_tokens=0, stop_token_ids=(), ignore_eos=True)

    def chunk(self, output: RequestOutput, told: int) -> dict[str, Any]:
        """What is new of the completion, of which so many tokens were told before."""
        (completion,) = output.outputs
        chunk: dict[str, Any] = {"token_ids": completion.token_ids, "index": 0}
        if completion.logprobs:
            chunk["log_probs"] = [finite(entry.logprob) for entry in completion.logprobs]
            chunk["top_logprobs"] = [
                [self._ranked(token, *known) for token, known in entry.top.items()]
                for entry in completion.logprobs
            ]
        if completion.finish_reason is not None:
            prompt, count = len(output.prompt_token_ids), told + len(completion.token_ids)
            chunk["finish_reason"] = _REASONS[completion.finish_reason]
            chunk["completion_usage"] = {
                "prompt_tokens": prompt,
                "completion_tokens": count,
                "total_tokens": prompt + count,
                "prompt_tokens_details": {"cached_tokens": output.num_cached_tokens},
            }
        return chunk

    def _ranked(self, token: int, logprob: float, rank: int) -> dict[str, Any]:
        return {
            "rank": rank,
            "token_id": token,
            "token": self._texts.text(token),
            "logprob": finite(logprob),
            "bytes": self._texts.bytes(token),
        }


def _parsed(tag: str) -> Any:  # noqa: ANN401 - JSON
    try:
        return json.loads(tag)
    except (ValueError, RecursionError) as error:
        raise InvalidRequestError(
            f"structural_tag is no JSON ({error!s:.80}); give an object", param="structured"
        ) from error


def kv_transfer_params(request: Request) -> Any:  # noqa: ANN401 - of another worker
    """What a worker has said of the pages of the prompt that it computed; None without one."""
    result = request.get("prefill_result") or {}
    return (result.get("disaggregated_params") or {}).get("kv_transfer_params")


def disaggregated_params(kv_transfer_params: Mapping[str, Any]) -> dict[str, Any]:
    """What the last chunk of a prompt that was computed says of its pages."""
    return {"kv_transfer_params": dict(kv_transfer_params)}


def counted_at_prefill(chunk: dict[str, Any], request: Request) -> dict[str, Any]:
    """A chunk that says how much of the prompt the worker had in its cache that computed it: what
    was handed over is no hit."""
    details = (request.get("prefill_result") or {}).get("prompt_tokens_details")
    if details and "completion_usage" in chunk:
        chunk["completion_usage"]["prompt_tokens_details"] = details
    return chunk


def cache_salt(request: Request) -> str:
    """With whom what is computed of a prompt may be shared; routers know it by Dynamo's prefix in
    the events of the cache."""
    extra = request.get("extra_args") or {}
    for source in (request.get("nvext"), extra.get("nvext")):
        if isinstance(source, Mapping) and source.get("cache_salt"):
            return f"dynamo-cache-salt:{source['cache_salt']}"
    return ""


def _check(values: Mapping[str, Any]) -> None:
    if values.get("n", 1) != 1:
        raise InvalidRequestError(
            f"n is {values['n']}; Dynamo ends a request with its first completion, so ask for one "
            "at a time",
            param="n",
        )
    count = values.get("logprobs")
    if count is not None and count > _MOST_LOGPROBS:
        raise InvalidRequestError(
            f"logprobs is {count}; at most {_MOST_LOGPROBS} are told of a token", param="logprobs"
        )
