"""Prompts and conversations to validated requests, for every front end alike."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from slipstream.errors import InvalidRequestError
from slipstream.runtime.loaded_engine import LoadedEngine
from slipstream.runtime.request import OutputKind, Request
from slipstream.runtime.sampling.params import SamplingParams
from slipstream.runtime.text.length import check_length, texts_of

Prompt = str | Sequence[int]
Message = Mapping[str, Any]


class RequestFactory:
    """Encodes prompts and resolves sampling parameters; safe to use from several threads."""

    def __init__(self, engine: LoadedEngine) -> None:
        self._tokenizer = engine.tokenizer
        self._vocab_size = engine.vocab_size
        self._defaults = engine.generation_defaults
        self._max_seq_len = engine.config.max_seq_len
        self._numbers = itertools.count()

    def request(
        self,
        prompt: Prompt,
        params: SamplingParams | None,
        *,
        request_id: str | None = None,
        priority: int = 0,
        output_kind: OutputKind,
        cache_salt: str = "",
    ) -> Request:
        """A request for a text or for token ids; no ``params`` means the model's own defaults.

        Only requests with equal ``cache_salt`` share what was computed of equal prompts.
        """
        text = prompt if isinstance(prompt, str) else None
        tokens = self._encoded(text) if text is not None else list(_token_ids(prompt))
        encode = partial(self._tokenizer.encode, add_special_tokens=False)
        return Request(
            request_id=str(next(self._numbers)) if request_id is None else request_id,
            prompt_token_ids=tokens,
            params=(params or self._defaults).resolve(self._vocab_size, encode),
            prompt=text,
            priority=priority,
            output_kind=output_kind,
            cache_namespace=cache_salt,
        )

    def chat_prompt(
        self, messages: Sequence[Message], template_options: Mapping[str, Any]
    ) -> list[int]:
        """Token ids of a conversation in the model's chat template."""
        check_length(self._tokenizer, texts_of(messages), self._max_seq_len)
        text = self._tokenizer.apply_chat_template(messages, **template_options)
        check_length(self._tokenizer, [text], self._max_seq_len)  # with roles, names and variables
        return self._tokenizer.encode(text, add_special_tokens=False)

    def _encoded(self, text: str) -> list[int]:
        check_length(self._tokenizer, [text], self._max_seq_len)
        return self._tokenizer.encode(text)


def _token_ids(prompt: Prompt) -> Sequence[int]:
    if isinstance(prompt, Sequence) and all(type(token) is int for token in prompt):
        return prompt  # type: ignore[return-value]
    raise InvalidRequestError(
        f"the prompt is {prompt!r:.80}; expected a text or a list of token ids (int)",
        param="prompt",
    )
