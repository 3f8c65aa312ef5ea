"""Token ids of what is pooled: texts, and pairs of a query and a document."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast

import numpy as np
from numpy.typing import NDArray

from slipstream.builder.contract import Pooling
from slipstream.errors import InvalidRequestError
from slipstream.runtime.loaded_engine import Model
from slipstream.runtime.pooling import PoolingParams, similarity
from slipstream.runtime.request import RequestOutput
from slipstream.runtime.text.length import check_length

Prompt = str | Sequence[int]
# Names of sentence-transformers for the prompts of the two sides of a search.
_QUERY, _DOCUMENT = "query", "document"
_PLAIN = PoolingParams()


@dataclass(frozen=True, slots=True)
class ScoredPairs:
    """What is to be pooled so that queries and documents get scores.

    Each of ``pairs`` is the places among ``prompts`` of a query and its document, or twice the
    place of a prompt that holds both.
    """

    pooling: Pooling
    prompts: Sequence[Prompt]
    params: Sequence[PoolingParams]
    pairs: Sequence[tuple[int, int]]

    def scores(self, outputs: Sequence[RequestOutput]) -> list[float]:
        """The score of each pair, from the outputs of all prompts."""
        values = [output.pooled for output in outputs]
        found = []
        for query, document in self.pairs:
            a, b = values[query], values[document]
            assert a is not None and b is not None, "a prompt ends when it is pooled"
            one = self.pooling.task == "score"
            found.append(float(a[0]) if one else similarity(self.pooling, a, b))
        return found


class PooledPrompts:
    """Encodes what an engine pools; safe to use from several threads."""

    def __init__(self, engine: Model, pooling: Pooling) -> None:
        self.pooling = pooling
        self._tokenizer = engine.tokenizer
        self._max_seq_len = engine.config.max_seq_len

    def tokens(self, prompt: Prompt, params: PoolingParams) -> list[int]:
        """Of a text with the prompt before it, or token ids, cut where that is asked for."""
        most = self._most(params.truncate_prompt_tokens)
        if not isinstance(prompt, str):
            return token_ids(prompt)[:most]
        text = self._named(params.prompt_name) + prompt
        if most is None:
            check_length(self._tokenizer, [text], self._max_seq_len, generates=False)
        tokens = self._tokenizer.encode(text, params.add_special_tokens)
        return tokens if most is None or len(tokens) <= most else self._cut(text, tokens, most)

    def pairs(
        self,
        queries: Sequence[str],
        documents: Sequence[str],
        params: PoolingParams = _PLAIN,
        *,
        instruction: str | None = None,
        max_tokens_per_doc: int | None = None,
    ) -> ScoredPairs:
        """Each query with the document at its place; one query goes with all documents.

        ``instruction`` tells a reranker what is sought; ``params`` are those of every prompt, and
        ``max_tokens_per_doc`` cuts documents. Raises ``InvalidRequestError`` for numbers of queries
        and documents that make no pairs, and for an instruction to a model that takes none.
        """
        if not documents or len(queries) not in (1, len(documents)):
            raise InvalidRequestError(
                f"{len(queries)} queries and {len(documents)} documents make no pairs; give one "
                "query for all documents, or one for each",
                param="documents",
            )
        documents = [self._first(text, max_tokens_per_doc) for text in documents]
        if self.pooling.task == "score":
            several = queries if len(queries) > 1 else [queries[0]] * len(documents)
            both = zip(several, documents, strict=True)
            prompts = [self._pair(*pair, instruction, params) for pair in both]
            places = [(place, place) for place in range(len(prompts))]
            return ScoredPairs(self.pooling, prompts, [params] * len(prompts), places)
        if instruction is not None:
            raise InvalidRequestError(
                "instruction is for rerankers, which read it with a query and a document; leave it "
                "out, or put it before the query",
                param="instruction",
            )
        sides = [self._side(params, _QUERY)] * len(queries)
        sides += [self._side(params, _DOCUMENT)] * len(documents)
        places = [(i % len(queries), len(queries) + i) for i in range(len(documents))]
        return ScoredPairs(self.pooling, [*queries, *documents], sides, places)

    def _side(self, params: PoolingParams, name: str) -> PoolingParams:
        """With the model's prompt for queries or documents, if it has one of that name."""
        return replace(params, prompt_name=name) if name in self.pooling.prompts else params

    def _pair(
        self, query: str, document: str, instruction: str | None, params: PoolingParams
    ) -> list[int]:
        """A query and a document in the model's template; if need be, the document is cut."""
        tokens = self._rendered(query, document, instruction)
        most = self._most(params.truncate_prompt_tokens)
        while most is not None and len(tokens) > most:
            own = self._tokenizer.encode(document, add_special_tokens=False)
            if not own:
                raise InvalidRequestError(
                    f"the query and the template alone have {len(tokens)} tokens, more than the "
                    f"{most} to which prompts are cut; raise truncate_prompt_tokens",
                    param="truncate_prompt_tokens",
                )
            document = self._first(document, max(0, len(own) - (len(tokens) - most)))
            tokens = self._rendered(query, document, instruction)
        return tokens

    def _rendered(self, query: str, document: str, instruction: str | None) -> list[int]:
        instruction = instruction or self._named(None) or None
        messages = [{"role": _QUERY, "content": query}, {"role": _DOCUMENT, "content": document}]
        if instruction is not None:
            messages.insert(0, {"role": "system", "content": instruction})
        text = self._tokenizer.apply_chat_template(messages, add_generation_prompt=True)
        return self._tokenizer.encode(text, add_special_tokens=False)

    def _first(self, text: str, most: int | None) -> str:
        """The text of the first so many tokens."""
        if most is None:
            return text
        tokens = self._tokenizer.encode(text, add_special_tokens=False)
        if len(tokens) <= most:
            return text
        return self._tokenizer.decode(tokens[:most], skip_special_tokens=False).rstrip("\ufffd")

    def _cut(self, text: str, tokens: list[int], most: int) -> list[int]:
        """The first tokens of a text within what the tokenizer puts around it, which stays."""
        inner = self._tokenizer.encode(text, add_special_tokens=False)
        around = len(tokens) - len(inner)
        kept = most - around
        if kept < 0:
            raise InvalidRequestError(
                f"truncate_prompt_tokens is {most}, and the tokenizer puts {around} tokens around "
                "a text; raise it",
                param="truncate_prompt_tokens",
            )
        before = next(i for i in range(around + 1) if tokens[i : i + len(inner)] == inner)
        return tokens[:before] + inner[:kept] + tokens[before + len(inner) :]

    def _most(self, cut: int | None) -> int | None:
        """How many tokens a prompt is cut to; None: it is not cut."""
        if cut is not None and cut > self._max_seq_len:
            raise InvalidRequestError(
                f"truncate_prompt_tokens is {cut}, and this engine takes {self._max_seq_len}; use "
                "-1, or load the engine with a larger max_seq_len",
                param="truncate_prompt_tokens",
            )
        return self._max_seq_len if cut == -1 else cut

    def _named(self, name: str | None) -> str:
        """A prompt of the model."""
        prompts = self.pooling.prompts
        if name is not None and name not in prompts:
            known = f"its prompts are {', '.join(prompts)}" if prompts else "it has none"
            raise InvalidRequestError(
                f"the model has no prompt {name!r:.80}: {known}", param="prompt_name"
            )
        name = self.pooling.default_prompt if name is None else name
        return "" if name is None else prompts[name]


def as_batch(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt or several."""
    if isinstance(prompts, str):
        return [prompts]
    if prompts and isinstance(prompts[0], int):
        return [cast(Prompt, prompts)]
    return list(cast(Sequence[Prompt], prompts))


def as_texts(texts: str | Sequence[str]) -> list[str]:
    """One text or several; raises ``InvalidRequestError`` for what is no text."""
    found = [texts] if isinstance(texts, str) else list(texts)
    for text in found:
        if not isinstance(text, str):
            raise InvalidRequestError(f"{text!r:.80} is scored; expected a text")
    return found


def stacked(outputs: Sequence[RequestOutput]) -> NDArray[np.float32]:
    """The vectors of outputs that have ended, one below the other."""
    vectors = [output.pooled for output in outputs]
    return np.stack(vectors) if vectors else np.empty((0, 0), np.float32)  # type: ignore[arg-type]


def token_ids(prompt: object) -> list[int]:
    """A prompt that is to be token ids; raises ``InvalidRequestError`` for another."""
    if isinstance(prompt, Sequence) and all(type(token) is int for token in prompt):
        return list(prompt)
    raise InvalidRequestError(
        f"the prompt is {prompt!r:.80}; expected a text or a list of token ids (int)",
        param="prompt",
    )
