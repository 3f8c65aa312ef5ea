"""The engine as every server sees it: admission, metrics and an orderly end around it."""

from __future__ import annotations

import asyncio
import logging
import math
import time
import uuid
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol

from slipstream.errors import CapacityError, InvalidRequestError
from slipstream.runtime.chat.composer import Composer
from slipstream.runtime.chat.conversation import Conversation
from slipstream.runtime.chat.detection import dialect_of
from slipstream.runtime.chat.turns import Turns
from slipstream.runtime.engine_client import EngineClient
from slipstream.runtime.request import RequestOutput
from slipstream.runtime.request_factory import Prompt
from slipstream.runtime.sampling.params import SamplingParams
from slipstream.runtime.text.length import check_length
from slipstream.server.core.job import Job
from slipstream.server.core.limits import MAX_SCORES, MAX_SEQUENCES, check_conversation
from slipstream.server.core.logprobs import TokenTexts
from slipstream.server.core.logs import log_event
from slipstream.server.core.merge import merge
from slipstream.server.core.options import ServerOptions
from slipstream.server.core.places import Places
from slipstream.server.core.refusal import Refusal, naming

_LOG = logging.getLogger(__name__)
_SHUTTING_DOWN = "the server is shutting down; send the request again to another one, or later"
_TYPICAL_TOKENS = 4096
# How many times what fits a prompt may have that is cut.
_CUT = 16

# An output, and of which of a request's prompts.
Item = tuple[int, RequestOutput]


class Observer(Protocol):
    """Who hears of one prompt, to count."""

    def see(self, output: RequestOutput) -> None:
        """Hear an output of kind ``delta`` or ``final``."""
        ...

    def close(self, reason: Literal["abort", "error"]) -> None:
        """Hear that there is no last output."""
        ...


class Metrics(Protocol):
    """Who counts."""

    @property
    def mean_latency(self) -> float:
        """Mean seconds that a request took."""
        ...

    def watch(self, max_tokens: int | None = None) -> Observer:
        """An observer for one prompt, which asks for so many tokens; it is used in the event loop
        only."""
        ...


@dataclass(frozen=True, slots=True)
class _Prepared:
    """What the engine is given for one prompt; ``text`` is that of a conversation."""

    prompt: Prompt
    params: SamplingParams
    text: str | None = None


@dataclass(frozen=True, slots=True)
class _Track:
    """One prompt of a job on its way through the engine."""

    position: int
    observer: Observer
    request_id: str = field(default_factory=lambda: uuid.uuid4().hex)


class Service:
    """One engine behind one server; belongs to one event loop."""

    def __init__(
        self,
        llm: EngineClient,
        options: ServerOptions,
        metrics: Metrics,
        places: Places | None = None,
    ) -> None:
        """``places`` are shared with other processes of the server, if there are any."""
        self.llm = llm
        self.places = places or Places()
        self.dialect = dialect_of(
            llm.tokenizer,
            tool_parser=options.tool_call_parser,
            reasoning_parser=options.reasoning_parser,
        )
        self.options = options
        self.defaults = llm.generation_defaults
        if options.default_max_tokens is not None:
            self.defaults = replace(self.defaults, max_tokens=options.default_max_tokens)
        self.names = list(options.served_model_name)
        self.created = int(time.time())
        self.metrics = metrics
        self.texts = TokenTexts(llm.tokenizer)
        self.draining = False
        self._running: set[str] = set()
        self._idle = asyncio.Event()

    @property
    def unavailable(self) -> str | None:
        """Why no request is taken now."""
        return self.llm.unhealthy or (_SHUTTING_DOWN if self.draining else self.llm.closed)

    def model(self, name: str | None) -> str:
        """The name to answer with; raises ``Refusal`` for a model that is not served."""
        if name is None:
            return self.names[0]
        if name not in self.names:
            raise Refusal(
                "not_found",
                f"there is no model {name!r:.100}; this server has {', '.join(self.names)}",
                param="model",
                code="model_not_found",
            )
        return name

    async def run(self, job: Job) -> AsyncGenerator[Item, None]:
        """The outputs of all prompts as they come; closing or cancelling this aborts them.

        Raises ``Refusal`` if the server takes no more, or ends the request; and what
        ``EngineClient.generate`` raises.
        """
        self._check(job)
        with naming(job.fields), self._admission(job), self._tracking(job) as tracks:
            self._log_prompts(job)
            prepared = [await self._prepare(job, prompt) for prompt in job.prompts]
            await self._check_scores(job, [given.prompt for given in prepared])
            runs = [self._generate(job, prepared[t.position], t) for t in tracks.values()]
            async with aclosing(runs[0] if len(runs) == 1 else merge(runs)) as outputs:
                async for output in outputs:
                    track = tracks[output.request_id]
                    output.prompt = prepared[track.position].text or output.prompt
                    track.observer.see(output)
                    if output.finished and _aborted(output):
                        raise Refusal("unavailable", _SHUTTING_DOWN)
                    yield track.position, output

    async def encode(
        self,
        prompt: str | Conversation,
        add_special_tokens: bool | None = None,
        most: int | None = None,
    ) -> list[int]:
        """Token ids of a text, or of a conversation in the model's template; see ``Job``. Raises
        ``InvalidRequestError``, also for more than ``most`` can hold; None: than a prompt has."""
        if isinstance(prompt, str):
            check_length(self.llm.tokenizer, [prompt], most or self.llm.config.max_seq_len)
            return await self._encoded(prompt, add_special_tokens is not False)
        with naming({"prompt": "messages"}):
            text = await self.llm.render(self._composer().render, prompt)
            return await self._encoded(text, bool(add_special_tokens))

    def turns(self, conversation: Conversation, params: SamplingParams) -> Turns:
        """Where the outputs of a conversation, asked for with ``params``, become turns."""
        return self._composer().turns(conversation, params)

    def _composer(self, most: int | None = None) -> Composer:
        most = most or self.llm.config.max_seq_len
        return Composer(self.llm.tokenizer, self.dialect, most, check_conversation)

    async def _encoded(self, text: str, add_special_tokens: bool) -> list[int]:
        encode = self.llm.tokenizer.encode
        return await self.llm.workers.run(len(text), encode, text, add_special_tokens)

    async def _prepare(self, job: Job, prompt: Prompt | Conversation) -> _Prepared:
        """What the engine is given: what it would encode in another way is encoded here."""
        if isinstance(prompt, Conversation):
            return await self._prepare_turn(job, prompt)
        if isinstance(prompt, str) and (job.add_special_tokens is False or job.cuts):
            prompt = await self.encode(prompt, job.add_special_tokens, self._most(job))
        return _Prepared(job.cut(prompt, self.llm.config.max_seq_len), job.params)

    def _most(self, job: Job) -> int:
        """Tokens that a prompt may have before it is cut."""
        return self.llm.config.max_seq_len * (_CUT if job.cuts else 1)

    async def _prepare_turn(self, job: Job, conversation: Conversation) -> _Prepared:
        """A conversation as its dialect writes it, held to the form that this takes."""
        special = bool(job.add_special_tokens)
        with naming({"prompt": "messages"}):
            composer = self._composer(self._most(job))
            made = await self.llm.compose(composer, conversation, job.params, special)
        tokens = job.cut(made.tokens, self.llm.config.max_seq_len)
        return _Prepared(tokens, made.params, made.text)

    def _generate(
        self, job: Job, prepared: _Prepared, track: _Track
    ) -> AsyncGenerator[RequestOutput, None]:
        if job.pooling:
            return self.llm.pool(
                prepared.prompt,
                job.pooling[track.position],
                track.request_id,
                priority=job.priority,
            )
        return self.llm.generate(
            prepared.prompt,
            prepared.params,
            track.request_id,
            priority=job.priority,
            output_kind=job.kind,
            cache_salt=job.cache_salt,
        )

    def _log_prompts(self, job: Job) -> None:
        if self.options.log_prompts:
            prompts = [p.messages if isinstance(p, Conversation) else p for p in job.prompts]
            log_event(_LOG, "prompts", {"prompts": prompts, "params": repr(job.params)})

    @contextmanager
    def _tracking(self, job: Job) -> Iterator[dict[str, _Track]]:
        """Names for the prompts of a job, and an account of how they ended, by name."""
        most = None if job.pooling else job.params.max_tokens
        made = [_Track(position, self.metrics.watch(most)) for position in range(len(job.prompts))]
        tracks = {track.request_id: track for track in made}
        self._running |= tracks.keys()
        try:
            yield tracks
        except (InvalidRequestError, CapacityError, Refusal):  # never begun, or seen to its end
            raise
        except (asyncio.CancelledError, GeneratorExit):
            _close(tracks, "abort")
            raise
        except Exception:
            _close(tracks, "error")
            raise
        finally:
            self._running -= tracks.keys()

    async def drain(self) -> None:
        """Take no more requests and wait for the open ones; abort those that last too long."""
        self.draining = True
        self.llm.stop_rendering()  # what still waits for its prompt would be refused then
        timeout = self.options.drain_timeout
        log_event(_LOG, "draining", {"requests": self.places.own, "timeout": timeout})
        if self.places.own:
            self._idle.clear()
            try:
                await asyncio.wait_for(self._idle.wait(), timeout)
            except TimeoutError:
                log_event(_LOG, "aborting", {"requests": self.places.own}, logging.WARNING)
                for request_id in list(self._running):
                    await self.llm.abort(request_id)

    @property
    def _capacity(self) -> int:
        return self.llm.config.max_batch_size + self.options.max_queued_requests

    def check_count(self, count: int, param: str, n: int = 1, n_param: str = "n") -> None:
        """Raise ``Refusal`` for more prompts, which came as ``param``, than one request takes."""
        most = min(MAX_SEQUENCES, self._capacity)
        if not 1 <= count * n <= most:
            raise Refusal(
                "invalid",
                f"{count} prompts of {n} completions each; one request takes 1 to {most} "
                "completions. Send several requests",
                param=n_param if count <= most < count * n else param,
            )

    def _check(self, job: Job) -> None:
        """Raise ``Refusal`` for what this server never answers."""
        names = (job.fields.get(name, name) for name in ("prompt", "n"))
        self.check_count(len(job.prompts), next(names), job.params.n, *names)
        if job.priority and not self.options.allow_priority:
            raise Refusal(
                "invalid",
                f"priority={job.priority}, but this server runs first what came first; leave it "
                "out, or start the server with --allow-priority",
                param="priority",
            )
        _refuse_scores(job, _answer_scores(job, self.llm.config.max_seq_len), "logprobs")

    async def _check_scores(self, job: Job, prompts: Sequence[Prompt]) -> None:
        """Raise ``Refusal`` for more log probabilities than an answer may hold, those of prompts
        included, whose tokens are counted."""
        count = job.params.prompt_logprobs
        if count is None:
            return
        listed = 1 + (self.llm.tokenizer.vocab_size if count < 0 else count)
        scores = _answer_scores(job, self.llm.config.max_seq_len)
        for prompt in prompts:
            tokens = await self.encode(prompt) if isinstance(prompt, str) else prompt
            scores += len(tokens) * listed
            _refuse_scores(job, scores, "prompt_logprobs")

    @contextmanager
    def _admission(self, job: Job) -> Iterator[None]:
        if self.unavailable is not None:
            raise Refusal("unavailable", self.unavailable)
        count = len(job.prompts) * job.params.n
        if not self.places.take(count, self._capacity):
            raise Refusal(
                "busy",
                f"{self.places.taken} completions run or wait already, and with these {count} "
                f"there were more than {self._capacity}; send this request again later",
                code="queue_full",
                retry_after=self._wait_estimate(),
            )
        try:
            yield
        finally:
            self.places.give_back(count)
            if not self.places.own:
                self._idle.set()

    def _wait_estimate(self) -> int:
        """Seconds until a place may be free: about what a request takes, of at least one."""
        return math.ceil(min(max(self.metrics.mean_latency, 1), 60))


def _close(tracks: Mapping[str, _Track], reason: Literal["abort", "error"]) -> None:
    for track in tracks.values():
        track.observer.close(reason)


def _answer_scores(job: Job, max_seq_len: int) -> int:
    """How many log probabilities the answer holds at most, without those of prompts; of unlimited
    answers, as they mostly are."""
    params = job.params
    if params.logprobs is None:
        return 0
    rows = min(params.max_tokens or _TYPICAL_TOKENS, max_seq_len)
    listed = params.logprobs + len(params.logprob_token_ids or ())
    return len(job.prompts) * params.n * rows * (1 + listed)


def _refuse_scores(job: Job, scores: int, param: str) -> None:
    if scores > MAX_SCORES:
        field = job.fields.get(param, param)
        raise Refusal(
            "invalid",
            f"the answer may hold {scores} log probabilities or more; one request takes "
            f"{MAX_SCORES}. Lower {field}, max_tokens or n, or send several requests",
            param=field,
        )


def _aborted(output: RequestOutput) -> bool:
    return any(completion.finish_reason == "abort" for completion in output.outputs)
