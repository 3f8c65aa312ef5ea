"""Prompts and conversations to validated requests, for every front end alike."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from slipstream.builder.contract import Pooling
from slipstream.errors import InvalidRequestError
from slipstream.runtime.chat.composer import Composed, Composer
from slipstream.runtime.chat.conversation import Conversation
from slipstream.runtime.engine.handover import Handover
from slipstream.runtime.loaded_engine import Model
from slipstream.runtime.pooled_prompts import PooledPrompts, Prompt, token_ids
from slipstream.runtime.pooling import PoolingParams, no_text, require_text
from slipstream.runtime.request import OutputKind, Request
from slipstream.runtime.sampling.params import SamplingParams
from slipstream.runtime.speculation.proposer import OFF
from slipstream.runtime.structured.compiler import GrammarCompiler
from slipstream.runtime.text.length import check_length

__all__ = ["Message", "Prompt", "RequestFactory"]

Message = Mapping[str, Any]
_NO_OUTPUT = SamplingParams(temperature=0, max_tokens=1)


class RequestFactory:
    """Encodes prompts, resolves sampling parameters and compiles grammars; safe to use from several
    threads."""

    def __init__(self, engine: Model, *, compiles: bool = True) -> None:
        """``compiles``: else grammars are left to whoever runs the requests."""
        self._pooling = engine.pooling
        self._pooled_prompts = PooledPrompts(engine, engine.pooling) if engine.pooling else None
        self._tokenizer = engine.tokenizer
        self._vocab_size = engine.vocab_size
        self._defaults = engine.generation_defaults
        self._max_seq_len = engine.config.max_seq_len
        self._guesses = engine.config.speculative != OFF
        self._numbers = itertools.count()
        self.composer = Composer(engine.tokenizer, max_seq_len=engine.config.max_seq_len)
        self.grammars = GrammarCompiler(engine.tokenizer, engine.vocab_size)
        self._compiles = compiles

    def request(
        self,
        prompt: Prompt,
        params: SamplingParams | None,
        *,
        request_id: str | None = None,
        priority: int = 0,
        output_kind: OutputKind,
        cache_salt: str = "",
        handover: Handover | None = None,
    ) -> Request:
        """A request for a text or for token ids; no ``params`` means the model's own defaults.

        Only requests with equal ``cache_salt`` share what was computed of equal prompts. Raises
        ``InvalidRequestError`` for an engine that generates nothing, and for a ``handover`` to or
        from several continuations.
        """
        require_text(self._pooling)
        text = prompt if isinstance(prompt, str) else None
        tokens = self._encoded(text) if text is not None else token_ids(prompt)
        encode = partial(self._tokenizer.encode, add_special_tokens=False)
        params = self._predicted(params or self._defaults).resolve(self._vocab_size, encode)
        form = params.structured
        if handover is not None and params.n > 1:
            raise InvalidRequestError(
                f"n is {params.n}; a prompt that is handed over has one continuation", param="n"
            )
        return Request(
            request_id=str(next(self._numbers)) if request_id is None else request_id,
            prompt_token_ids=tokens,
            params=params,
            prompt=text,
            priority=priority,
            output_kind=output_kind,
            cache_namespace=_unicode(cache_salt),
            grammar=self.grammars.compile(form) if form and self._compiles else None,
            handover=handover,
        )

    def pooled(
        self,
        prompt: Prompt,
        params: PoolingParams,
        *,
        request_id: str | None = None,
        priority: int = 0,
        cache_salt: str = "",
    ) -> Request:
        """A request that pools a text or token ids; raises ``InvalidRequestError`` for an engine
        that does not."""
        return Request(
            request_id=str(next(self._numbers)) if request_id is None else request_id,
            prompt_token_ids=self.pooled_prompts.tokens(prompt, params),
            params=_NO_OUTPUT,
            prompt=prompt if isinstance(prompt, str) else None,
            priority=priority,
            output_kind="final",
            cache_namespace=_unicode(cache_salt),
            pooling=params,
        )

    def vectors_of(self, params: PoolingParams) -> Pooling:
        """How vectors are made; raises ``InvalidRequestError`` for an engine that makes none, or
        none of so many dimensions."""
        pooling = self.pooled_prompts.pooling
        if pooling.task != "embed":
            raise InvalidRequestError(
                f"{no_text(pooling)}, and no vectors; load an engine of an embedding model, built "
                "with --task embed"
            )
        if params.dimensions is not None and params.dimensions > pooling.dimensions:
            raise InvalidRequestError(
                f"dimensions is {params.dimensions}; the model's vectors have {pooling.dimensions}",
                param="dimensions",
            )
        return pooling

    @property
    def pooled_prompts(self) -> PooledPrompts:
        """Prompts of an engine that pools; raises ``InvalidRequestError`` for another."""
        if self._pooled_prompts is None:
            raise InvalidRequestError(
                "this engine generates text and gives no hidden states (it was built for task "
                "generate); load an engine of the checkpoint that was built with --task embed for "
                "vectors, or --task score for a reranker's scores"
            )
        return self._pooled_prompts

    def compose(
        self,
        messages: Sequence[Message],
        params: SamplingParams | None,
        options: Mapping[str, Any],
    ) -> Composed:
        """A conversation for the model, with what belongs to it by name (see
        ``Conversation.of``)."""
        return self.composer.compose(Conversation.of(messages, options), params or self._defaults)

    def _predicted(self, params: SamplingParams) -> SamplingParams:
        """Without a prediction that nobody would look at."""
        if not params.prediction:
            return params
        if not (self._guesses and params.speculative):
            return replace(params, prediction="")
        least = self._tokenizer.least_tokens(params.prediction)
        if least > self._max_seq_len:
            raise InvalidRequestError(
                f"prediction has at least {least} tokens; prompt and answer together have up to "
                f"{self._max_seq_len}. Send the part that is expected",
                param="prediction",
            )
        return params

    def _encoded(self, text: str) -> list[int]:
        check_length(self._tokenizer, [text], self._max_seq_len)
        return self._tokenizer.encode(text)


def _unicode(cache_salt: str) -> str:
    """A salt that pages can be named by; raises ``InvalidRequestError`` for another."""
    try:
        cache_salt.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequestError(
            f"cache_salt {cache_salt!r:.80} is not valid Unicode; remove lone surrogates",
            param="cache_salt",
        ) from error
    return cache_salt
