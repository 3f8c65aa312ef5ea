"""The engine in the caller's own thread."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, Self, cast

import numpy as np
from numpy.typing import NDArray

from slipstream.errors import InvalidRequestError
from slipstream.runtime.chat.turns import OutputTurns
from slipstream.runtime.engine.loop import EngineLoop
from slipstream.runtime.engine.stats import EngineStats
from slipstream.runtime.loaded_engine import LoadedEngine
from slipstream.runtime.pooled_prompts import as_batch, as_texts, stacked
from slipstream.runtime.pooling import PoolingParams
from slipstream.runtime.request import OutputKind, Request, RequestOutput
from slipstream.runtime.request_factory import Message, Prompt, RequestFactory
from slipstream.runtime.sampling.params import SamplingParams

Outputs = Generator[RequestOutput, None, None]
Params = SamplingParams | Sequence[SamplingParams] | None


class LLM:
    """Generates text for batches of prompts; to be used from one thread.

    ``options`` are the fields of ``RuntimeConfig``, which documents them and their defaults.
    """

    def __init__(self, model: str | Path, **options: Any) -> None:  # noqa: ANN401 - fields differ
        # Imported here because it pulls in the libraries of the engine's device.
        from slipstream.runtime.loading import load

        self._open(load(model, options))

    @classmethod
    def from_engine(cls, engine: LoadedEngine) -> Self:
        """Take over an engine that is loaded already."""
        llm = cls.__new__(cls)
        llm._open(engine)
        return llm

    def _open(self, engine: LoadedEngine) -> None:
        self.tokenizer = engine.tokenizer
        self._factory = RequestFactory(engine)
        self._loop = EngineLoop(engine)
        self._inboxes: dict[str, deque[RequestOutput]] = {}

    @property
    def stats(self) -> EngineStats:
        """What the scheduler is doing and has done."""
        return self._loop.stats

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: Params = None,
        *,
        cache_salt: str = "",
    ) -> list[RequestOutput]:
        """Complete one prompt or many (texts or lists of token ids), in the order given.

        ``sampling_params`` is one for all, one for each, or None for the model's defaults. Cached
        prompts are shared with those of equal ``cache_salt`` only. Raises
        ``InvalidRequestError`` or ``CapacityError`` before anything runs, and ``ExecutionError`` if
        the device fails (the other prompts of this call are then aborted) or this process was
        forked after the engine was loaded.
        """
        batch = as_batch(prompts)
        each = _params_for_each(sampling_params, len(batch))
        requests = [
            self._factory.request(prompt, params, output_kind="final", cache_salt=cache_salt)
            for prompt, params in zip(batch, each, strict=True)
        ]
        return self._finals(requests)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: Params = None,
        **options: Any,  # noqa: ANN401 - fields of ChatOptions, and templates define their own
    ) -> list[RequestOutput]:
        """Answer one conversation (a list of ``{"role": ..., "content": ...}``) or many.

        ``options`` are fields of ``ChatOptions``, such as ``tools`` and ``thinking``, and variables
        of the template. Each completion's ``turn`` has its thoughts, text and calls.
        """
        one = not messages or not isinstance(messages[0], Sequence)
        conversations = cast(Any, [messages] if one else messages)
        each = _params_for_each(sampling_params, len(conversations))
        made = [
            self._factory.compose(conversation, params, options)
            for conversation, params in zip(conversations, each, strict=True)
        ]
        outputs = self.generate([c.tokens for c in made], [c.params for c in made])
        for output, composed in zip(outputs, made, strict=True):
            composed.output_turns("final").add(output)
        return outputs

    def embed(
        self,
        prompts: Prompt | Sequence[Prompt],
        pooling_params: PoolingParams | None = None,
        *,
        cache_salt: str = "",
    ) -> NDArray[np.float32]:
        """The vectors of one prompt or many (texts or lists of token ids), in the order given:
        ``[prompts, dimensions]``, also of one.

        Raises ``InvalidRequestError`` for an engine that makes none, and what ``generate`` raises.
        """
        params = pooling_params or PoolingParams()
        self._factory.vectors_of(params)
        batch = as_batch(prompts)
        outputs = self._pool(batch, [params] * len(batch), cache_salt)
        return stacked(outputs)

    def score(
        self,
        query: str | Sequence[str],
        documents: str | Sequence[str],
        pooling_params: PoolingParams | None = None,
        *,
        instruction: str | None = None,
        max_tokens_per_doc: int | None = None,
    ) -> list[float]:
        """How well each document answers the query, or the query at its place: what a reranker
        says, or how alike the vectors are.

        ``instruction`` tells a reranker what is sought, and ``max_tokens_per_doc`` cuts documents.
        Raises ``InvalidRequestError`` for an engine that does neither, and what ``generate``
        raises.
        """
        pairs = self._factory.pooled_prompts.pairs(
            as_texts(query),
            as_texts(documents),
            pooling_params or PoolingParams(),
            instruction=instruction,
            max_tokens_per_doc=max_tokens_per_doc,
        )
        return pairs.scores(self._pool(pairs.prompts, pairs.params))

    def stream(
        self,
        prompt: Prompt | Sequence[Message],
        sampling_params: SamplingParams | None = None,
        *,
        output_kind: OutputKind = "cumulative",
        **options: Any,  # noqa: ANN401 - fields of ChatOptions, and templates define their own
    ) -> Iterator[RequestOutput]:
        """Complete one prompt, or answer one conversation, yielding after every token.

        The ``options`` of a conversation are those of ``chat``, and each completion's ``turn`` has
        its thoughts, text and calls so far. Closing the iterator aborts the request. Several may be
        open at once; they share steps.
        """
        make = self._factory.request
        if not isinstance(prompt, str) and prompt and isinstance(prompt[0], Mapping):
            composed = self._factory.compose(cast(Any, prompt), sampling_params, options)
            request = make(composed.tokens, composed.params, output_kind=output_kind)
            return _turned(self._run([request]), composed.output_turns(output_kind))
        if options:
            raise InvalidRequestError(
                f"{', '.join(options)} is for conversations; give messages in place of a prompt, "
                "or leave it out"
            )
        return self._run([make(cast(Prompt, prompt), sampling_params, output_kind=output_kind)])

    def shutdown(self) -> None:
        """Free the device; the object is of no use afterwards."""
        self._loop.shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()

    def _pool(
        self, prompts: Sequence[Prompt], params: Sequence[PoolingParams], cache_salt: str = ""
    ) -> list[RequestOutput]:
        pairs = zip(prompts, params, strict=True)
        return self._finals([self._factory.pooled(p, q, cache_salt=cache_salt) for p, q in pairs])

    def _finals(self, requests: Sequence[Request]) -> list[RequestOutput]:
        """The last outputs of requests that have no others, in their order."""
        outputs = {output.request_id: output for output in self._run(requests)}
        return [outputs[request.request_id] for request in requests]

    def _run(self, requests: Sequence[Request]) -> Outputs:
        """Check all requests, then run them and yield their outputs as they come."""
        for request in requests:
            self._loop.validate(request)
        return self._outputs(requests)

    def _outputs(self, requests: Sequence[Request]) -> Outputs:
        inbox: deque[RequestOutput] = deque()
        unfinished = len(requests)
        try:
            for request in requests:
                self._inboxes[request.request_id] = inbox
                self._loop.add_request(request)
            while unfinished:
                while not inbox:
                    self._step()
                output = inbox.popleft()
                if output.error is not None:
                    raise output.error
                unfinished -= output.finished
                yield output
        finally:
            for request in requests:
                self._inboxes.pop(request.request_id, None)
                self._loop.abort(request.request_id)

    def _step(self) -> None:
        for output in self._loop.step():
            inbox = self._inboxes.get(output.request_id)
            if inbox is not None:
                inbox.append(output)


def _turned(outputs: Outputs, turns: OutputTurns) -> Outputs:
    with closing(outputs):
        for output in outputs:
            turns.add(output)
            yield output


def _params_for_each(params: Params, count: int) -> list[SamplingParams | None]:
    if params is None or isinstance(params, SamplingParams):
        return [params] * count
    if len(params) != count:
        raise InvalidRequestError(
            f"{len(params)} sampling_params for {count} prompts; give one, or one for each"
        )
    return list(params)
